"""A table of nodes under construction: edges repointed and nodes put in without walking the whole table. Floor 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from .collect import refuse_taken
from .errors import BadSplice, Source
from .graph import Body, Graph
from .node import Node


class Draft:
    """A table under construction: edges can be repointed and nodes put in without walking the whole table again."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = dict(graph._nodes)
        self.readers: dict[str, dict[str, None]] = {n: dict.fromkeys(r) for n, r in graph.consumers.items()}
        self.bodies = dict(graph.bodies)
        self.outputs = graph.outputs
        self.after: dict[str, list[str]] = {}
        self.rank = {name: i for i, name in enumerate(graph._nodes)}
        self.anchor = {name: name for name in graph._nodes}
        self.replacing: dict[str, list[str]] = {}
        for body in graph.bodies.values():
            for read, _ in body.calls:
                self.replacing.setdefault(read, []).append(body.name)

    def arrived(self, value: str, past: Callable[[Body], bool]) -> str:
        """What a value becomes after the bodies on it.

        Two branches that a user wrote over one node replace nothing for each other.
        """
        while len(names := self.replacing.get(value, [])) == 1 and past(self.bodies[names[0]]):
            value = dict(self.bodies[names[0]].calls)[value]
        return value

    def repoint(self, old: str, new: str, only: Callable[[str], bool]) -> None:
        """Lets readers of one value, the outputs and the bodies that replace it read another value."""
        for reader in [r for r in self.readers[old] if only(r)]:
            node = self.nodes[reader]
            self.nodes[reader] = replace(node, inputs=tuple(new if i == old else i for i in node.inputs))
            del self.readers[old][reader]
            self.readers[new][reader] = None
        self.outputs = map_outputs(self.outputs, {old: new})
        for name in self.replacing.pop(old, ()):
            body = self.bodies[name]
            self.bodies[name] = replace(body, calls=tuple((new if r == old else r, w) for r, w in body.calls))
            self.replacing.setdefault(new, []).append(name)

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
