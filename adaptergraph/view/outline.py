"""The tree of names behind a picture: modules, bodies, declared groups; and which of them are opened.

Knows names, parameters and where each node runs; nothing of boxes and links.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..graph import Graph
from ..names import path_of
from ..node import Node
from ..select import no_match
from .data import NOTHING, Sums

_DIGITS = re.compile(r"(.*\D|)(\d+)(\D*)")


@dataclass(slots=True, eq=False)
class Item:
    """A module, a body, a group of declared nodes, or one declared node.

    Attributes:
        path: its full name; `""` is the whole model.
        body: it is a body, which stands beside its host.
        nodes: its own nodes: the calls of a module, the operations of a forward, the nodes of a body.
        leaf: it has calls of its own, or is a body: nothing inside it is drawn by itself.
        first: the rank of the first node in or below it.
        sums: its parameters and those below it.
        weighty: it has parameters, its own or tied ones.
        state: how it is drawn: `"closed"` (one box), `"open"` (its children, and its own operations where they join
            values) or `"each"` (a box for each of its own nodes).
        closed_by: the closed item that it is inside of, or itself.
        head, index, tail: its name around the number that tells siblings apart.
    """

    path: str
    parent: Item | None
    body: bool = False
    children: list[Item] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    leaf: bool = False
    first: float = math.inf
    sums: Sums = NOTHING
    weighty: bool = False
    state: Literal["closed", "open", "each"] = "open"
    closed_by: Item | None = None
    head: str = ""
    index: int | None = None
    tail: str = ""

    def __post_init__(self) -> None:
        if self.parent is not None:
            self.parent.children.append(self)
            self.head, self.index, self.tail = _numbered(self.path[len(self.parent.path) :].lstrip("."))

    def up(self) -> Iterator[Item]:
        """It and everything above it."""
        item: Item | None = self
        while item is not None:
            yield item
            item = item.parent

    def below(self) -> Iterator[Item]:
        """It and everything below it, parents first."""
        stack = [self]
        while stack:
            item = stack.pop()
            yield item
            stack += reversed(item.children)


def _numbered(name: str) -> tuple[str, int | None, str]:
    """The text before the number that tells siblings apart, the number, and the text after it."""
    before = ""
    for segment in name.split("."):
        found = _DIGITS.fullmatch(segment)
        if found:
            return before + found[1], int(found[2]), found[3]
        before += segment + "."
    return name, None, ""


class Outline:
    """The tree of a graph's names.

    Attributes:
        root: the model, or the declared graph.
        items: by path.
        item_of: for each node where it stands in the tree.
        params_of: for each node the parameters that are counted with it, each parameter once.
        lost: parameters that no node reads.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.root = Item("", None)
        self.items: dict[str, Item] = {"": self.root}
        self.item_of: dict[str, Item] = {}
        self.params_of: dict[str, list[str]] = {}
        self.lost: list[str] = []
        self._modules()
        for node in graph.nodes():
            if node.body is None:
                self._place(node, self._host(node))
        self._bodies()
        self._order()
        self._parameters()

    def _modules(self) -> None:
        if self.graph.imported is not None:
            for path in self.graph.imported.modules:
                self._group(path)

    def _group(self, path: str) -> Item:
        """The item with this path, with everything above it."""
        made = self.items.get(path)
        if made is not None:
            return made
        missing = [path]
        while (above := missing[-1].rpartition(".")[0]) not in self.items:
            missing.append(above)
        for name in reversed(missing):
            self.items[name] = Item(name, self.items[name.rpartition(".")[0]])
        return self.items[path]

    def _host(self, node: Node) -> Item:
        name, imported = node.name or "", self.graph.imported
        if imported is None:
            return self._group(name)
        if node.op == "input":
            self.items[name] = Item(name, self.root)
            return self.items[name]
        if "/" in name:
            return self.items[path_of(imported.scopes[name])]
        item = self.items.get(path_of(name), self.root)
        item.leaf = item is not self.root
        return item

    def _place(self, node: Node, item: Item) -> None:
        item.nodes.append(node.name or "")
        self.item_of[node.name or ""] = item

    def _bodies(self) -> None:
        """A body stands beside its host, or inside the module whose operation is its host."""
        bodies: dict[str, Item] = {}
        for body in self.graph.bodies.values():
            host = path_of(body.host)
            while host not in self.items:
                host = host.rpartition(".")[0]
            inside = "/" in body.host
            parent = self.items[host] if inside else self.items[host].parent or self.root
            taken = body.name in self.items
            item = Item(f"{body.name} +" if taken else body.name, parent, body=True)
            item.leaf = True
            self.items[item.path] = bodies[body.name] = item
        for node in self.graph.nodes():
            if node.body is not None:
                self._place(node, bodies[node.body])

    def _order(self) -> None:
        for i, name in enumerate(self.graph):
            for item in self.item_of[name].up():
                if item.first < math.inf:
                    break
                item.first = i
        for item in self.items.values():
            item.children.sort(key=lambda child: child.first)

    def _parameters(self) -> None:
        """Counts each parameter once, with the node that reads it first."""
        graph = self.graph
        reader: dict[str, str] = {}
        for node in graph.nodes():
            for param in node.param_names():
                reader.setdefault(param, node.name or "")
        ties: dict[str, list[str]] = {}
        if graph.imported is not None:
            for other, first in graph.imported.tied.items():
                ties.setdefault(first, []).append(other)
                self._weighty(other)
        for param, shape in graph.params.items():
            self._weighty(param)
            sums = self.sums_of(param, shape.size)
            names = [param, *ties.get(param, ())]
            node_name = next((reader[n] for n in names if n in reader), None) or self._called(names)
            if node_name is None:
                self.lost.append(param)
                item = self.above(param)
            else:
                self.params_of.setdefault(node_name, []).append(param)
                item = self.item_of[node_name]
            for above in item.up():
                above.sums += sums

    def _called(self, names: Sequence[str]) -> str | None:
        """The node of the module that one of these parameters belongs to, or else the operation that reads it."""
        imported = self.graph.imported
        if imported is None:
            return None
        own = [n.rpartition(".")[0] for n in names]
        found = [self.items[p].nodes[0] for p in own if p in self.items and self.items[p].leaf]
        return next(iter(found + [imported.readers[n] for n in names if n in imported.readers]), None)

    def _weighty(self, param: str) -> None:
        for item in self.above(param).up():
            if item.weighty:
                break
            item.weighty = True

    def above(self, name: str) -> Item:
        """The nearest item whose path is the start of this name."""
        while name not in self.items:
            name = name.rpartition(".")[0]
        return self.items[name]

    def sums_of(self, param: str, size: int | None = None) -> Sums:
        """The sums of one parameter."""
        size = self.graph.params[param].size if size is None else size
        if not self.graph.trained[param]:
            return Sums(frozen=size)
        return Sums(new=size) if param in self.graph.body_params else Sums(unfrozen=size)

    # ------------------------------------------------------------------ what is opened

    def find(self, name: str) -> Item:
        """The item a user means.

        Raises:
            UnknownNode: there is none; the nearest names are in the message.
        """
        item = self.items.get(name) or self.item_of.get(name)
        if item is None or not name:
            raise no_match(name, [*self.graph.selectable, *self.graph.bodies])
        return item

    def everything(self) -> None:
        """A box for each node."""
        for item in self.items.values():
            item.state = "each"

    def settle(self, wanted: set[Item], inside: set[Item]) -> None:
        """Decides for each item how it is drawn: `wanted` are opened, `inside` down to the last node."""
        declared = self.graph.imported is None
        for item in self.root.below():
            above = item.parent
            if above is not None and above.closed_by is not None:
                item.closed_by = above.closed_by
            elif item.body:
                item.state = "each" if item in inside else "closed"
            elif declared:
                item.state = "each"
            elif item.leaf:
                item.state = "closed"
            elif item.first < math.inf and (item in wanted or item in inside or self._transparent(item)):
                item.state = "open"
            else:
                item.state = "closed"
            if item.state == "closed" and item.closed_by is None:
                item.closed_by = item

    def _transparent(self, item: Item) -> bool:
        """The model itself, a list of modules that is never called as one, and what has no parameters."""
        imported = self.graph.imported
        if item.parent is None or not item.weighty:
            return True
        module = imported.modules.get(item.path) if imported is not None else None
        return module is not None and bool(item.children) and not module.calls

    def adapted(self, marks: Iterable[Item]) -> set[Item]:
        """What must be opened so that bodies, marked names, and trained beside frozen modules stand on their own."""
        hosts = [item for item in self.items.values() if item.body]
        wanted = {above for item in (*hosts, *marks) for above in item.up() if above is not item}
        wanted |= {item for item in self.items.values() if item.sums.trained and item.sums.frozen}
        return wanted

    def largest(self) -> set[Item]:
        """What to open when nothing was added and nothing repeats: the largest groups, until a few boxes stand."""
        wanted = {self.root}
        shown = [child for child in self.root.children if child.weighty]
        while len(shown) < 4:
            groups = [item for item in shown if item.children and not item.leaf]
            if not groups:
                break
            biggest = max(groups, key=lambda item: item.sums.total)
            wanted.add(biggest)
            shown.remove(biggest)
            shown += [child for child in biggest.children if child.weighty]
        return wanted
