"""From nodes to boxes and links: one walk in topological order, in which what is hidden vanishes into its neighbours.

A node belongs to the closed item around it. Outside of closed items, an operation that only hands on one value
vanishes; one that joins several becomes a join, which takes in further ones of its kind, and a norm takes in the add
before it. Where a forward would be a tangle of joins, such as a loop that it runs step by step, those that follow each
other are one. Every link is an edge of the graph, or a chain of edges through what vanished.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..graph import Graph
from ..node import Node
from .data import NOTHING, Shape, Sums
from .outline import Item, Outline

Kind = Literal["plain", "residual", "side", "again"]
ADDS = frozenset({"add", "add_", "add_alike", "iadd", "radd"})
_SIGNS = {**dict.fromkeys(ADDS, "+"), **dict.fromkeys(("mul", "mul_", "imul", "rmul", "multiply"), "×")}
_SIGNS |= dict.fromkeys(("sub", "sub_", "isub", "subtract"), "−")
_SILENT = ("dropout", "identity")
_CALL = re.compile(r"@\d+")
# a forward with more joins than this is a tangle
_TANGLE = 8


@dataclass(slots=True, eq=False)
class Draft:
    """A box in the making. `each` boxes are single nodes; a join may take in further operations."""

    name: str
    item: Item
    kind: Literal["input", "output", "join", "box"]
    first: int
    depth: int = 0
    each: bool = False
    nodes: list[str] = field(default_factory=list)
    joins: list[str] = field(default_factory=list)
    sums: Sums = NOTHING
    norm: str = ""
    note: str = ""


@dataclass(slots=True)
class Edge:
    """A link in the making."""

    kind: Kind
    rewired: bool
    label: str
    value: str


class Boxes:
    """The boxes and links of a graph whose outline is settled."""

    def __init__(
        self, graph: Graph, outline: Outline, special: Iterable[str], tangled: frozenset[Item] = frozenset()
    ) -> None:
        self.graph = graph
        self.tangled = tangled
        self.outline = outline
        self.special = frozenset(special)
        self.outputs = frozenset(graph.output_names())
        self.drafts: dict[str, Draft] = {}
        self.edges: dict[tuple[Draft, Draft], Edge] = {}
        self.box_of: dict[str, Draft] = {}
        self.side: set[str] = set()
        self.through: dict[str, str] = {}
        self.latest: dict[Item, Draft] = {}
        self.inside: dict[Item, list[str]] = {}
        for name, item in outline.item_of.items():
            if item.closed_by is not None:
                self.inside.setdefault(item.closed_by, []).append(name)
        for i, (name, node) in enumerate(graph._nodes.items()):
            self._visit(i, name, node, outline.item_of[name])
        self._settle()
        self._parameters()

    def tangles(self) -> frozenset[Item]:
        """The forwards that have too many joins."""
        counts = Counter(draft.item for draft in self.drafts.values() if draft.joins and not draft.each)
        return frozenset(item for item, count in counts.items() if count > _TANGLE)

    # ------------------------------------------------------------------ one node

    def _visit(self, i: int, name: str, node: Node, item: Item) -> None:
        if node.op == "input":
            self._new(name, item, "input", i)
            self._join(name, self.drafts[name])
            if not _floating(node):
                self.side.add(name)
        elif item.state == "each":
            data = self._sources(node)
            join = not node.params and node.op != "module" and len(data) > 1
            self._box(i, name, node, item, "join" if join else "box").each = True
        elif item.closed_by is not None and not self._hands_on(node, item):
            weighty = item.closed_by.weighty or item.closed_by.body
            path = item.closed_by.path if weighty or name in self.special else name
            self._box(i, path, node, item.closed_by, "box")
        else:
            self._loose(i, name, node, item)

    def _box(self, i: int, path: str, node: Node, item: Item, kind: Literal["join", "box"]) -> Draft:
        name = node.name or ""
        draft = self.drafts.get(path)
        if draft is None:
            draft = self._taken_in(name, node, item) if item.leaf and not item.body else None
            if draft is None:
                draft = self._new(path, item, kind, i)
                members = [name] if path == name else self.inside.get(item, [name])
                reads = [value for m in members for value in self.graph._nodes[m].inputs]
                draft.depth = 1 + max((self.box_of[v].depth for v in reads if v in self.box_of), default=0)
        self._join(name, draft)
        self._read(node, draft)
        return draft

    def _new(self, name: str, item: Item, kind: Literal["input", "join", "box"], i: int) -> Draft:
        self.drafts[name] = Draft(name, item, kind, i)
        return self.drafts[name]

    def _join(self, name: str, draft: Draft) -> None:
        draft.nodes.append(name)
        self.box_of[name] = draft

    def _hands_on(self, node: Node, item: Item) -> bool:
        """A module without parameters that keeps the shape: dropout, identity, an activation."""
        if item.closed_by is not item or item.weighty or item.body or item.path in self.special or not node.inputs:
            return False
        return node.op == "output" or node.shape == self.graph._nodes[node.inputs[0]].shape

    def _loose(self, i: int, name: str, node: Node, item: Item) -> None:
        again = self.box_of.get(_CALL.sub("", name)) if "@" in name else None
        if again is not None and _CALL.sub("", name) in again.nodes:
            # the same operation in a further call of the module around it
            self._join(name, again)
            self._read(node, again)
            return
        data = self._sources(node)
        params = self.outline.params_of.get(name, ())
        own = name in self.special or bool(params)
        if own or len(data) > 1:
            draft = self._join_of(i, name, node, item, data, own)
            draft.kind = "box" if params else draft.kind
            # it is called after the operation whose value leaves it
            del self.drafts[draft.name]
            draft.name = name
            self.drafts[name] = draft
            draft.joins.append(node.op)
            self._join(name, draft)
            self._read(node, draft)
            return
        values = [v for v in node.inputs if v in self.box_of]
        if data:
            values = [v for v in values if v not in self.side]
        elif values:
            self.side.add(name)
        if values:
            self.box_of[name] = self.box_of[values[0]]
            said = self.through.get(values[0], "")
            if item.leaf and not any(word in node.op.lower() for word in _SILENT) and node.op != "output":
                said = " · ".join(w for w in (said, node.op) if w)
            if said:
                self.through[name] = said

    def _sources(self, node: Node) -> list[Draft]:
        """The boxes whose values this node works on; masks and positions are none of them."""
        values = [v for v in node.inputs if v in self.box_of and v not in self.side]
        return list(dict.fromkeys(self.box_of[v] for v in values))

    def _join_of(self, i: int, name: str, node: Node, item: Item, data: list[Draft], own: bool) -> Draft:
        """The join before it in the same forward, if this operation goes on with it, or a new one."""
        last = self.latest.get(item)
        if last is not None and not (own or last.norm or last.name in self.special) and self._goes_on(node, data, last):
            return last
        draft = self._new(name, item, "join", i)
        draft.depth = 1 + max((d.depth for d in data), default=0)
        self.latest[item] = draft
        return draft

    def _goes_on(self, node: Node, data: list[Draft], last: Draft) -> bool:
        """Whether an operation does once more what a join does: with the same values, or with its result and others."""
        known = [source is last or (source, last) in self.edges for source in data]
        if not all(source is last or source.depth < last.depth for source in data):
            return False
        if last.item in self.tangled:
            return any(known)
        if not last.joins or sign_of(last.joins[-1]) != sign_of(node.op):
            return False
        if last not in data:
            return all(known)
        return all(self._only_read_by(node, value) for value in node.inputs if self.box_of.get(value) is last)

    def _only_read_by(self, node: Node, value: str) -> bool:
        """Whether nothing else comes of a value, nor of what it was made of in its box."""
        draft, reader = self.box_of[value], node.name
        while set(self.graph.consumers[value]) == {reader} and value not in self.outputs:
            if value in draft.nodes:
                return True
            reader = value
            value = next(v for v in self.graph._nodes[value].inputs if self.box_of.get(v) is draft)
        return False

    def _taken_in(self, name: str, node: Node, item: Item) -> Draft | None:
        """A norm that reads an add of the same forward becomes one box with it, under the norm's name."""
        data = self._sources(node)
        if "norm" not in node.op.lower() or len(data) != 1 or data[0] is not self.latest.get(item.parent or item):
            return None
        draft = data[0]
        known = draft.norm or any(n in self.outline.params_of or n in self.special for n in draft.nodes)
        if known or set(draft.joins) - ADDS:
            return None
        del self.drafts[draft.name]
        draft.name, draft.kind, draft.norm, draft.item = item.path, "box", node.op, item
        self.drafts[item.path] = draft
        return draft

    # ------------------------------------------------------------------ links

    def _read(self, node: Node, target: Draft) -> None:
        depths = [self.box_of[v].depth for v in node.inputs if v in self.box_of]
        for value in node.inputs:
            source = self.box_of.get(value)
            if source is None or source is target:
                continue
            kind: Kind = "plain"
            if value in self.side or not _floating(self.graph._nodes[value]):
                kind = "side" if source.kind == "input" else "plain"
            elif source.depth >= target.depth:
                kind = "again"
            elif node.op in ADDS and len(depths) > 1 and source.depth < max(depths):
                kind = "residual"
            rewired = source.item.body or target.item.body
            edge = self.edges.get((source, target))
            if edge is None:
                self.edges[source, target] = Edge(kind, rewired, self.through.get(value, ""), value)
            elif edge.kind != "plain" and kind == "plain":
                edge.kind = kind

    def _settle(self) -> None:
        """What only all links together tell: a residual goes past something, and a side link has a value beside it."""
        readers: dict[Draft, int] = {}
        reads: dict[Draft, list[Edge]] = {}
        for (source, target), edge in self.edges.items():
            readers[source] = readers.get(source, 0) + 1
            reads.setdefault(target, []).append(edge)
        for (source, _), edge in self.edges.items():
            if edge.kind == "residual" and readers[source] < 2:
                edge.kind = "plain"
        for target, edges in reads.items():
            if target.kind == "box" and not target.item.body and not target.each:
                self._aside(edges, self.shape_of(target))
            if all(edge.kind == "side" for edge in edges):
                for edge in edges:
                    edge.kind = "plain"

    def _aside(self, edges: list[Edge], shape: Shape | None) -> None:
        """Beside a value with as many features as the box gives, others (positions, conditions) are side links."""
        plain = [edge for edge in edges if edge.kind == "plain"]
        shapes = [self.graph._nodes[edge.value].shape or () for edge in plain]
        if not shape or not any(other and len(other) == len(shape) and other[-1] == shape[-1] for other in shapes):
            return
        for edge, other in zip(plain, shapes, strict=True):
            if len(other) != len(shape) or (len(shape) < 4 and other[-1] != shape[-1]):
                edge.kind = "side"

    # ------------------------------------------------------------------ what a box holds

    def _parameters(self) -> None:
        for name, params in self.outline.params_of.items():
            for param in params:
                self.box_of[name].sums += self.outline.sums_of(param)
        for param in self.outline.lost:
            item = self.outline.above(param)
            item = item.closed_by or item
            name = item.path if item.state == "closed" else param
            draft = self.drafts.get(name)
            if draft is None:
                last = len(self.graph) + len(self.drafts)
                note = "never called" if name == item.path else "never read"
                draft = self.drafts[name] = Draft(name, item, "box", last, note=note)
            draft.sums += self.outline.sums_of(param)

    def shape_of(self, draft: Draft) -> Shape | None:
        """The shape of the value that leaves a box."""
        table = self.graph._nodes
        imported = self.graph.imported
        if imported is not None and draft.item.path == draft.name and draft.name in imported.modules:
            outputs = [c.output for c in imported.modules[draft.name].calls if c.output]
            if outputs:
                return table[outputs[0]].shape
        nodes = [n for n in draft.nodes if table[n].op != "output"]
        return table[nodes[-1]].shape if nodes else None

    def widths_of(self, name: str) -> tuple[int, int] | None:
        """The sizes before and after a layer that is a matrix or a convolution."""
        node = self.graph._nodes[name]
        matrix = next((p.shape for p in node.params.values() if len(p.shape) > 1), None)
        if not node.inputs:
            return None
        before, after = self.graph._nodes[node.inputs[0]].shape, node.shape
        axis = -1 if matrix is None or len(matrix) == 2 else 1
        if not before or not after or len(before) != len(after) or len(before) < 2:
            return None
        a, b = before[axis], after[axis]
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if matrix is None:
            item = self.outline.item_of[name]
            tied = item.leaf and item.weighty and before[:-1] == after[:-1] and a != b
            return (a, b) if tied else None
        return (a, b) if len(matrix) > 2 or {a, b} == set(matrix) else None


def _floating(node: Node) -> bool:
    return node.dtype is None or node.dtype.is_floating_point


def sign_of(op: str) -> str:
    """What a join is called: operations with one sign are of one kind."""
    return _SIGNS.get(op, op.strip("_"))
