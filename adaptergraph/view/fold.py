"""The last step: runs become frames or single boxes with a count, and links lose what is hidden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import GraphError, here
from ..graph import Graph
from ..shapes import uncollected
from .boxes import Boxes, Draft, Edge
from .data import Box, Frame, Link, Row, Sums, View
from .describe import Describe, additions, prefix_of, relative, tail
from .outline import Item, Outline
from .runs import Repeats, Run

# a picture whose longest chain of boxes is longer than this goes from top to bottom
_WIDE = 14

Place: TypeAlias = "tuple[Run | Item, int]"


def view(
    graph: Graph,
    *,
    fold: bool = True,
    open: Sequence[str] = (),
    mark: Sequence[str] = (),
    nodes: bool = False,
) -> View:
    """What a picture of the graph shows.

    Args:
        fold: show a run of equal blocks once.
        open: names of modules, groups or bodies to show with everything inside; the rest stays closed.
        mark: names to mark; each stands as a box of its own.
        nodes: a box for every node, operations inside a forward too.

    Raises:
        UnknownNode: a name in `open` or `mark` is not in the graph.
    """
    with uncollected():
        outline = Outline(graph)
        opened = [outline.find(name) for name in _names(open, "open")]
        marked = {name: outline.find(name) for name in _names(mark, "mark")}
        special = {*marked, *(item.path for item in opened)}
        runs = Repeats(graph, outline, special).find() if fold and not nodes else []
        if nodes:
            outline.everything()
        else:
            inside = {item for top in opened for item in top.below()}
            outline.settle(_wanted(graph, outline, opened, marked, runs), inside)
        boxes = Boxes(graph, outline, special)
        tangles = boxes.tangles()
        if tangles:
            boxes = Boxes(graph, outline, special, tangles)
        return _Folded(graph, outline, boxes, runs, opened).view(frozenset(marked))


def _names(given: Any, option: str) -> list[str]:
    """The names in an option."""
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(name, str) for name in names):
        raise GraphError(f"{option} takes names, not {given!r}", source=here(), hint=f"{option}=['encoder.layer.0']")
    return names


def _wanted(
    graph: Graph, outline: Outline, opened: Sequence[Item], marked: Mapping[str, Item], runs: Iterable[Run]
) -> set[Item]:
    """The items to open."""
    # a marked operation stands inside the forward of its item; a marked module is the item
    wanted = {above for name, item in marked.items() if name != item.path for above in item.up()}
    if opened:
        return wanted | {above for item in opened for above in item.up() if above is not item}
    wanted |= outline.adapted(marked.values())
    if graph.bodies or marked:
        return wanted
    return wanted | (_spine(outline, runs) or outline.largest())


def _spine(outline: Outline, runs: Iterable[Run]) -> set[Item]:
    """The way to the repeated blocks of a model, and these opened; not what repeats inside a numbered block."""
    opened: set[Item] = set()
    for run in runs:
        members = [item for unit in run.units for item in unit.items]
        share = sum(item.sums.total for item in members)
        groups = len(members) == len(run.units) and all(item.children and not item.leaf for item in members)
        inner = any(item.index is not None for item in run.parent.up())
        if groups and not inner and 20 * share >= outline.root.sums.total > 0:
            opened.update(members, run.parent.up())
    return opened


class _Folded:
    """Which boxes are shown, and in which frames."""

    def __init__(
        self, graph: Graph, outline: Outline, boxes: Boxes, runs: Sequence[Run], opened: Iterable[Item]
    ) -> None:
        self.graph = graph
        self.outline = outline
        self.boxes = boxes
        self.opened = {item for item in opened if item.state != "closed"}
        if self.opened:
            self.opened |= {item for item in outline.items.values() if item.body and item.state == "each"}
        self.drafts = sorted(boxes.drafts.values(), key=lambda draft: draft.first)
        self.places = self._places(runs)
        self.members: dict[Place, list[Draft]] = {}
        self.position: dict[tuple[Place, Draft], int] = {}
        self._fill(runs)
        self.shown = {draft: self._shown(draft) for draft in self.drafts}
        self.frames = {draft: self._frames(draft) for draft in self.drafts if self.shown[draft] is draft}

    def _places(self, runs: Sequence[Run]) -> dict[Draft, list[Place]]:
        """For each box the frames around it, outermost first, and which member of each it is in."""
        units: dict[Item, Place] = {
            item: (run, i) for run in runs for i, unit in enumerate(run.units) for item in unit.items
        }
        places: dict[Draft, list[Place]] = {}
        for draft in self.drafts:
            around: list[Place] = []
            for item in draft.item.up():
                if item in self.opened or self._is_block(item):
                    around.append((item, 0))
                if item in units:
                    around.append(units[item])
            places[draft] = around[::-1]
        return places

    def _is_block(self, what: Run | Item) -> bool:
        """A numbered group that is open: a layer."""
        if isinstance(what, Run) or what in self.opened or what.leaf:
            return False
        return what.index is not None and bool(what.children) and what.state != "closed"

    def _fill(self, runs: Sequence[Run]) -> None:
        """Collects what is in each frame, and keeps the runs whose members are drawn alike, box for box."""
        for draft in self.drafts:
            for place in self.places[draft]:
                inside = self.members.setdefault(place, [])
                self.position[place, draft] = len(inside)
                inside.append(draft)
        unlike = set()
        for run in runs:
            looks = [
                [(d.kind, len(d.nodes), d.sums) for d in self.members.get((run, i), ())] for i in range(len(run.units))
            ]
            if not looks[0] or any(look != looks[0] for look in looks):
                unlike.add(run)
        for draft, around in self.places.items():
            kept = [place for place in around if place[0] not in unlike]
            # a block is framed unless it is inside a run or another block
            repeated = next((i for i, place in enumerate(kept) if place[0] not in self.opened), 0)
            self.places[draft] = [p for i, p in enumerate(kept) if i == repeated or not self._is_block(p[0])]

    def _shown(self, draft: Draft) -> Draft:
        """The box that stands for this one: the same in the first member of every run around it."""
        while True:
            hidden = next((place for place in self.places[draft] if place[1]), None)
            if hidden is None:
                return draft
            draft = self.members[hidden[0], 0][self.position[hidden, draft]]

    def _single(self, place: Place) -> bool:
        """A run whose members are one box each, or a block of one box: drawn without a frame."""
        return place[0] not in self.opened and len(self.members[place]) == 1

    def _frames(self, draft: Draft) -> list[Place]:
        return [place for place in self.places[draft] if not self._single(place)]

    # ------------------------------------------------------------------ the view

    def view(self, marked: frozenset[str]) -> View:
        """Everything as plain data."""
        describe = Describe(self.graph, self.boxes, marked)
        made: dict[Draft, Box] = {}
        for draft, frames in self.frames.items():
            singles = [place[0] for place in self.places[draft] if self._single(place)]
            made[draft] = describe.box(draft, frames[-1][0] if frames else None, singles)
        edges = self._edges()
        rows = self._rows(made)
        outputs, leaving = self._outputs(made)
        links = [Link(made[a].name, made[b].name, e.kind, e.rewired, e.label) for (a, b), e in edges.items()]
        return View(
            title=self.graph.imported.cls if self.graph.imported is not None else "declared graph",
            added=additions(self.graph, self.outline),
            rows=(*rows, *(Row("box", box) for box in outputs)),
            links=(*links, *leaving),
            totals=self.outline.root.sums,
            nodes=len(self.graph),
            marked=len(marked),
            tall=bool(self.opened) or self._longest(edges) > _WIDE,
        )

    def _edges(self) -> dict[tuple[Draft, Draft], Edge]:
        """The links between what is shown. What goes from one member of a run to the next is not."""
        result: dict[tuple[Draft, Draft], Edge] = {}
        for (source, target), edge in self.boxes.edges.items():
            source = self.shown[source]
            if self.shown[target] is not target or self._back(source, target, edge):
                continue
            old = result.get((source, target))
            if old is None or (old.kind != "plain" and edge.kind == "plain"):
                result[source, target] = edge
        return result

    def _back(self, source: Draft, target: Draft, edge: Edge) -> bool:
        return source is target or (edge.kind != "again" and source.depth >= target.depth)

    def _longest(self, edges: Mapping[tuple[Draft, Draft], Edge]) -> int:
        level: dict[Draft, int] = {}
        for source, target in sorted(edges, key=lambda pair: pair[1].depth):
            if source.depth < target.depth:
                level[target] = max(level.get(target, 1), level.get(source, 1) + 1)
        return max(level.values(), default=1)

    def _rows(self, made: Mapping[Draft, Box]) -> list[Row]:
        """The boxes in order, frames around them."""
        first: dict[Place, int] = {}
        for draft, frames in self.frames.items():
            for place in frames:
                first.setdefault(place, draft.first)
        ordered = sorted(self.frames, key=lambda d: (*(first[place] for place in self.frames[d]), d.first))
        rows: list[Row] = []
        around: list[tuple[Place, Frame]] = []
        for draft in ordered:
            frames = self.frames[draft]
            while around and (len(around) > len(frames) or around[-1][0] != frames[len(around) - 1]):
                rows.append(Row("end", around.pop()[1]))
            for place in frames[len(around) :]:
                around.append((place, self._frame(place, around[-1][0][0] if around else None)))
                rows.append(Row("start", around[-1][1]))
            rows.append(Row("box", made[draft]))
        return rows + [Row("end", frame) for _, frame in reversed(around)]

    def _frame(self, place: Place, outer: Run | Item | None) -> Frame:
        sums = sum((draft.sums for draft in self.members[place]), Sums())
        what = place[0]
        if isinstance(what, Run):
            title = relative(what.title(), prefix_of(outer))
            return Frame(what.units[0].items[0].path, title, "run", len(what.units), sums)
        body = self.graph.bodies.get(what.path) if what.body else None
        title = tail(body) if body is not None else relative(what.path, prefix_of(outer))
        return Frame(what.path, title, "open" if what in self.opened else "block", 1, sums, what.body)

    def _outputs(self, made: Mapping[Draft, Box]) -> tuple[list[Box], list[Link]]:
        """What the graph returns, one box for all that leaves from one place."""
        leaving: dict[Draft, list[tuple[str, str]]] = {}
        for key, name in _labelled(self.graph.outputs):
            draft = self.boxes.box_of.get(name)
            if draft is not None:
                leaving.setdefault(self.shown[draft], []).append((key, name))
        boxes, links = [], []
        for draft, names in leaving.items():
            more = f" + {len(names) - 2} more" if len(names) > 2 else ""
            title = ", ".join(key for key, _ in names[:2]) + more
            shape = self.graph._nodes[names[0][1]].shape
            box = Box(f"{names[0][0]} →", title, title, "output", "output", shape=shape)
            boxes.append(box)
            links.append(Link(made[draft].name, box.name, "plain", draft.item.body))
        return boxes, links


def _labelled(outputs: Any, label: str = "") -> Iterator[tuple[str, str]]:
    """Each output with the words that say where in the structure it is."""
    if isinstance(outputs, str):
        yield label or "output", outputs
        return
    pairs = outputs.items() if isinstance(outputs, dict) else ((f"output {i}", part) for i, part in enumerate(outputs))
    for key, part in pairs:
        yield from _labelled(part, f"{label}, {key}" if label else key)
