"""Repeats: which siblings of the tree of names are equal up to a number, and follow each other. Linear in the nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..graph import Graph
from .outline import Item, Outline


@dataclass(slots=True, eq=False)
class Unit:
    """Siblings with the same number in their names: one member of a run, if its neighbours are like it."""

    items: list[Item]
    index: int
    nodes: list[str] = field(default_factory=list)
    content: Any = None
    reads: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Run:
    """Two or more equal units in a row."""

    parent: Item
    units: list[Unit]

    def title(self) -> str:
        """The names of the members: `encoder.layer.0 … 11`."""
        first, last = self.units[0], self.units[-1].items[0]
        heads = dict.fromkeys(f"{item.head}{item.index}{item.tail}" for item in first.items)
        names = [f"{self.parent.path}.{head}" if self.parent.path else head for head in heads]
        more = " …" if len(names) > 3 else ""
        return f"{' · '.join(names[:3])}{more} … {last.index}{last.tail}"

    def prefix(self) -> str:
        """What the names inside the first member have in common."""
        item = self.units[0].items[0]
        heads = {(i.head, i.tail) for i in self.units[0].items}
        own = f"{item.head}{item.index}{item.tail}" if len(heads) == 1 else ""
        return ".".join(p for p in (self.parent.path, own) if p)


class Repeats:
    """Finds the runs of a graph.

    Two units are equal when their nodes are, in order: names up to the number, ops, options, shapes, parameters, what of
    them is trained, bodies, marks, and what they read from each other. They follow each other when each reads from the
    one before it what that one read from its own predecessor, and everything else from one place.
    """

    def __init__(self, graph: Graph, outline: Outline, special: Iterable[str]) -> None:
        self.graph = graph
        self.outline = outline
        self.special = frozenset(special)
        self.outputs = frozenset(graph.output_names())
        self.known: dict[Any, int] = {}
        self.rank = {name: i for i, name in enumerate(graph)}
        self.lost: dict[Item, list[str]] = {}
        for param in outline.lost:
            self.lost.setdefault(outline.above(param), []).append(param)

    def find(self) -> list[Run]:
        """All runs, outer ones before inner ones."""
        found: list[Run] = []
        for item in self.outline.root.below():
            if not item.leaf:
                for group in self._groups(item):
                    found += self._runs(item, group)
        return found

    def _groups(self, parent: Item) -> list[list[Unit]]:
        """Stretches of numbered siblings; those with one number are one unit."""
        stretches: list[list[Unit]] = [[]]
        for item in parent.children:
            if item.index is None or self._is_input(item):
                stretches.append([])
            elif stretches[-1] and stretches[-1][-1].index == item.index:
                stretches[-1][-1].items.append(item)
            else:
                stretches[-1].append(Unit([item], item.index))
        return [units for units in stretches if len(units) > 1]

    def _is_input(self, item: Item) -> bool:
        return bool(item.nodes) and self.graph._nodes[item.nodes[0]].op == "input"

    def _runs(self, parent: Item, units: list[Unit]) -> list[Run]:
        for unit in units:
            self._describe(unit)
        runs: list[Run] = []
        current = [units[0]]
        for unit in units[1:]:
            if self._continues(current, unit):
                current.append(unit)
                continue
            runs.append(Run(parent, current))
            current = [unit]
        runs.append(Run(parent, current))
        return [run for run in runs if len(run.units) > 1]

    def _describe(self, unit: Unit) -> None:
        """What the unit is, as a small number that equal units share, and what it reads from elsewhere."""
        below = [item for top in unit.items for item in top.below()]
        cut = {item: len(top.path) for top in unit.items for item in top.below()}
        unit.nodes = sorted((n for item in below for n in item.nodes), key=self.rank.__getitem__)
        local = {name: i for i, name in enumerate(unit.nodes)}
        content: list[Any] = [tuple((i.head, i.tail, i.body) for i in unit.items)]
        for i, name in enumerate(unit.nodes):
            node = self.graph._nodes[name]
            links = tuple(local.get(value, -1) for value in node.inputs)
            unit.reads += [(i, value) for value in node.inputs if value not in local]
            item = self.outline.item_of[name]
            content.append(
                (name[cut[item] :], node.op, node.shape, node.dtype, links, node.body is not None, name in self.special)
            )
            content += self._params(self.outline.params_of.get(name, ()), cut[item])
            if node.options:
                content.append(tuple(sorted((k, repr(v)) for k, v in node.options.items())))
        for item in below:
            content += self._params(self.lost.get(item, ()), cut[item])
            content.append((item.path[cut[item] :], item.path in self.special))
        unit.content = self.known.setdefault(tuple(content), len(self.known))

    def _params(self, params: Sequence[str], cut: int) -> list[Any]:
        table, trained = self.graph.params, self.graph.trained
        return [(p[cut:], table[p].shape, table[p].dtype, trained[p]) for p in params]

    def _continues(self, run: list[Unit], unit: Unit) -> bool:
        before = run[-1]
        if unit.content != before.content:
            return False
        mine = {name: i for i, name in enumerate(before.nodes)}
        earlier = {name: i for i, name in enumerate(run[-2].nodes)} if len(run) > 1 else None
        for (_, value), (_, old) in zip(unit.reads, before.reads, strict=True):
            place = mine.get(value)
            if place is None and value != old:
                return False
            if place is not None and earlier is not None and earlier.get(old) != place:
                return False
        return len(run) == 1 or self._leaves(before, unit) == self._leaves(run[0], run[1])

    def _leaves(self, unit: Unit, following: Unit) -> set[tuple[int, str]]:
        """Which values of a unit are read anywhere but in it and in the next one."""
        near = {*unit.nodes, *following.nodes}
        readers = self.graph.consumers
        left = {(i, r) for i, name in enumerate(unit.nodes) for r in readers[name] if r not in near}
        return left | {(i, "") for i, name in enumerate(unit.nodes) if name in self.outputs}
