"""A table of nodes under construction: edges repointed and nodes put in without walking the whole table. Floor 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..bodies import Body
from ..collect import refuse_taken
from ..errors import BadSplice, Source
from ..graph import Graph
from ..node import Node
from .scopes import Scopes


class Draft:
    """A table under construction: edges can be repointed and nodes put in without walking the whole table again."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = dict(graph._nodes)
        self.readers: dict[str, dict[str, None]] = {n: dict.fromkeys(r) for n, r in graph.consumers.items()}
        self.bodies = dict(graph.bodies)
        self.outputs = graph.outputs
        self.after: dict[str, list[str]] = {}
        self.rank: dict[str, int] = {}
        for i, (name, node) in enumerate(graph._nodes.items()):
            # one of several values is there when the others are, and stands in the table where it is first read
            self.rank[name] = self.rank[node.inputs[0]] if node.op == "output" else i
        self.anchor = {name: name for name in graph._nodes}
        self.replacing: dict[str, list[str]] = {}
        for body in graph.bodies.values():
            for read, _ in body.calls:
                self.replacing.setdefault(read, []).append(body.name)
        self.scopes = Scopes(graph, self.bodies)
        self.reads: list[tuple[str, str, int]] = []

    def at_host(self, host: str, scope: str, value: str) -> str:
        """What a value of a host becomes after the bodies that are at the host or inside it."""

        def below(body: Body, index: int) -> bool:
            if body.where == "before" or self.scopes.is_passed_by(body, index, value, scope):
                return False
            if "/" in host:
                # the same operation, at each call or at one
                return "/" in body.host
            return self.scopes.within(self.scopes.of_body(body, index), scope)

        return self._after(value, below)

    def seen(self, value: str, view: str, reader: str) -> str:
        """What a value becomes for those who look from inside a call, where it is given to another call or the same."""
        replaces, is_passed_by = self.scopes.replaces_at, self.scopes.is_passed_by
        return self._after(value, lambda b, i: replaces(b, i, view) and not is_passed_by(b, i, value, reader))

    def kept(self) -> list[str]:
        """What an imported model keeps beside its outputs, after the bodies on its way."""
        imported = self.graph.imported
        return [self.seen(value, scope, scope) for value, scope in imported.kept] if imported is not None else []

    def _after(self, value: str, past: Callable[[Body, int], bool]) -> str:
        """A value after the bodies on it.

        Two branches that a user wrote over one node replace nothing for each other.
        """
        while True:
            bodies = [self.bodies[n] for n in dict.fromkeys(self.replacing.get(value, ()))]
            found = [(b, i) for b in bodies for i, (read, _) in enumerate(b.calls) if read == value and past(b, i)]
            written_by_hand = self.graph.imported is None and sum(b.where != "before" for b in bodies) > 1
            if len(found) != 1 or written_by_hand:
                return value
            value = found[0][0].calls[found[0][1]][1]

    def repoint(self, old: str, new: str, only: Callable[[str], bool], outputs: bool = True) -> None:
        """Lets readers of one value, the outputs and the bodies that replace it read another value."""
        for reader in [r for r in self.readers[old] if only(r)]:
            node = self.nodes[reader]
            self.nodes[reader] = replace(node, inputs=tuple(new if i == old else i for i in node.inputs))
            del self.readers[old][reader]
            self.readers[new][reader] = None
        if outputs:
            self.outputs = map_outputs(self.outputs, {old: new})
        for name in self.replacing.pop(old, ()):
            body = self.bodies[name]
            calls = tuple((new if r == old and only(w) else r, w) for r, w in body.calls)
            self.bodies[name] = replace(body, calls=calls)
            for value in (old, new):
                if any(r == value for r, _ in calls) and name not in self.replacing.get(value, ()):
                    self.replacing.setdefault(value, []).append(name)

    def add(self, node: Node, near: str) -> None:
        name = node.name or ""
        refuse_taken(name, self.nodes, node)
        self.nodes[name] = node
        self.readers[name] = {}
        for value in dict.fromkeys(node.inputs):
            self.readers[value][name] = None
        anchor = max((self.anchor[i] for i in (near, *node.inputs)), key=self.rank.__getitem__)
        self.anchor[name] = anchor
        self.after.setdefault(anchor, []).append(name)

    def ordered(self) -> list[str]:
        return [n for name in self.graph._nodes for n in (name, *self.after.get(name, ()))]


def map_outputs(outputs: Any, names: Mapping[str, str]) -> Any:
    """The same structure with some names replaced."""
    if isinstance(outputs, str):
        return names.get(outputs, outputs)
    if isinstance(outputs, dict):
        return {key: map_outputs(value, names) for key, value in outputs.items()}
    return tuple(map_outputs(value, names) for value in outputs)


def in_order(nodes: Mapping[str, Node], wanted: Iterable[str], source: Source | None) -> dict[str, Node]:
    """The table in this order, where a node that is read comes first.

    Raises:
        BadSplice: a node reads what is computed from it.
    """
    table: dict[str, Node] = {}
    path: dict[str, None] = {}
    for name in wanted:
        stack = [name]
        while stack:
            top = stack[-1]
            missing = [i for i in nodes[top].inputs if i not in table]
            if top in table or not missing:
                table.setdefault(top, nodes[top])
                path.pop(top, None)
                stack.pop()
                continue
            path[top] = None
            again = next((i for i in missing if i in path), None)
            if again is not None:
                raise _cycle(nodes, [*reversed(list(path)[list(path).index(again) :])], source)
            stack += reversed(missing)
    return table


def _cycle(nodes: Mapping[str, Node], ring: list[str], source: Source | None) -> BadSplice:
    """Each name is read by the next, and the last by the first; told from the body that closes it, if there is one."""
    closing = [i for i, n in enumerate(ring) if nodes[n].body not in (None, nodes[ring[i - 1]].body)]
    ring = ring[closing[0] :] + ring[: closing[0]] if closing else ring
    shown = ring if len(ring) < 9 else [*ring[:4], "…", *ring[-4:]]
    return BadSplice(
        f"{ring[0]!r} reads {ring[-1]!r}, which is computed from it: a cycle",
        node=ring[0],
        sides=[("cycle", " → ".join([*shown, ring[0]]))],
        source=source,
        hint="a node can only read what is computed before it",
    )
