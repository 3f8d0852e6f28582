"""The words in a box: its title where it stands, what it does, what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ..bodies import Body
from ..graph import Graph
from ..methods.base import METHODS
from ..names import body_name
from .boxes import Boxes, Draft, sign_of
from .data import Box
from .outline import Item, Outline
from .runs import Run

# a longer path is shortened to its last two parts where it stands below a title
_LONG = 26
# of more kinds of operations in one box only the number is shown
_KINDS = 3


class Describe:
    """Makes boxes out of drafts."""

    def __init__(self, graph: Graph, boxes: Boxes, marked: frozenset[str]) -> None:
        self.graph = graph
        self.boxes = boxes
        self.marked = marked
        self.tied = self._tied()
        made = [(body_name(host, s.name), type(s.method)) for s in graph.splices for host in s.hosts]
        self.methods = {name: cls.__name__ for name, cls in made if METHODS.get(cls.__name__) is cls}

    def box(self, draft: Draft, frame: Run | Item | None, singles: Sequence[Run | Item]) -> Box:
        """The box as plain data.

        Args:
            draft: what it is made from.
            frame: the innermost frame around it.
            singles: the runs it stands for alone.
        """
        prefix = prefix_of(frame)
        runs = [run for run in singles if isinstance(run, Run)]
        count = 1
        for run in runs:
            count *= len(run.units)
        path = relative(draft.name, prefix)
        op = self._op(draft)
        return Box(
            name=draft.name,
            path=relative(runs[-1].title(), prefix) if runs else path,
            title=relative(runs[-1].title(), prefix) if runs else self._title(draft, path),
            kind=draft.kind,
            op=op,
            detail=self._detail(draft, op, path),
            shape=self.boxes.shape_of(draft),
            sums=draft.sums.times(count),
            added=draft.item.body,
            marked=self._is_marked(draft),
            count=count,
            widths=self._widths(draft),
            note=self._note(draft),
        )

    def _title(self, draft: Draft, path: str) -> str:
        if draft.norm:
            return f"add · {draft.norm}"
        if draft.joins and draft.kind == "box":
            names = [p for n in draft.nodes for p in self.boxes.outline.params_of.get(n, ())]
            return " · ".join(relative(name, draft.item.path) for name in names)
        if draft.kind == "join":
            kinds = dict.fromkeys(map(sign_of, draft.joins or [self._joined(draft)]))
            return " · ".join(kinds) if len(kinds) <= _KINDS else f"{len(draft.joins)} operations"
        body = self.graph.bodies.get(draft.name)
        return tail(body) if body is not None and draft.item.body and not draft.each else path

    def _joined(self, draft: Draft) -> str:
        """The operation of a join whose value leaves it."""
        return draft.joins[-1] if draft.joins else self.graph._nodes[draft.nodes[0]].op

    def _op(self, draft: Draft) -> str:
        if draft.norm:
            return f"add · {draft.norm}"
        if draft.joins or draft.kind == "join":
            return self._joined(draft).strip("_")
        imported = self.graph.imported
        if imported is not None and draft.name in imported.modules:
            return imported.modules[draft.name].cls
        if draft.item.body and not draft.each:
            return "body"
        return self.graph._nodes[draft.nodes[0]].op if draft.nodes else "parameter"

    def _detail(self, draft: Draft, op: str, path: str) -> str:
        if draft.norm:
            return path if len(path) <= _LONG else ".".join(path.split(".")[-2:])
        chain = self._chain(draft)
        if chain:
            return " → ".join(map(str, chain))
        if draft.kind in ("input", "join"):
            return ""
        if draft.item.body and not draft.each:
            return " · ".join(filter(None, (self.methods.get(draft.name), f"{len(draft.nodes)} nodes")))
        if len(draft.nodes) == 1:
            params = list(self.graph._nodes[draft.nodes[0]].params.values())
            if len(params) == 1 and len(params[0].shape) > 1:
                return f"{op} {' × '.join(map(str, params[0].shape))}"
        return op

    def _chain(self, draft: Draft) -> list[int]:
        """The widths through a box that is one layer, or a few that narrow and widen: `768 → 64 → 768`."""
        first = [name for name in draft.nodes if "@" not in name]
        widths = [w for name in first if (w := self.boxes.widths_of(name)) is not None]
        if not widths or len(widths) > 3 or draft.kind == "join":
            return []
        if any(before[1] != after[0] for before, after in pairwise(widths)):
            return []
        if len(widths) > 1 and any(a == b for a, b in widths):
            return []
        return [widths[0][0], *(after for _, after in widths)]

    def _widths(self, draft: Draft) -> tuple[int, int] | None:
        """Of a single layer that changes the width."""
        widths = self.boxes.widths_of(draft.nodes[0]) if len(draft.nodes) == 1 else None
        return widths if widths is not None and widths[0] != widths[1] else None

    def _is_marked(self, draft: Draft) -> bool:
        if not self.marked:
            return False
        names = [draft.name, *draft.nodes, *(item.path for item in draft.item.up())]
        return not self.marked.isdisjoint(names)

    def _note(self, draft: Draft) -> str:
        if draft.note:
            return draft.note
        calls = self._calls(draft)
        if calls > 1 and draft.sums.total:
            return f"called {calls} ×"
        if draft.sums.total or draft.name not in self.tied:
            return ""
        return f"tied to {self.tied[draft.name]}"

    def _calls(self, draft: Draft) -> int:
        imported, body = self.graph.imported, self.graph.bodies.get(draft.name)
        if body is not None and not draft.each:
            return len(body.calls)
        module = imported.modules.get(draft.name) if imported is not None and not draft.each else None
        return len(module.calls) if module is not None else 1

    def _tied(self) -> dict[str, str]:
        """For each module with tied parameters the box that they are counted with."""
        if self.graph.imported is None or not self.graph.imported.tied:
            return {}
        counted = {p: self.boxes.box_of[n].name for n, params in self.boxes.outline.params_of.items() for p in params}
        pairs = [(other, first) for other, first in self.graph.imported.tied.items() if first in counted]
        pairs += [(first, first) for _, first in pairs]
        return {name.rpartition(".")[0]: counted[first] for name, first in pairs}


def relative(name: str, prefix: str) -> str:
    """A name where it stands: without the name of the frame around it."""
    if prefix and name == prefix:
        return ".".join(name.split(".")[-2:])
    if prefix and name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] in (".", "/"):
        return name[len(prefix) + 1 :]
    return name


def tail(body: Body) -> str:
    """What a body is called where its host stands beside it: `adapter`, or `query.lora` for one around its host."""
    short = body.child
    return short if body.where == "after" or short == body.name else f"{body.host.rpartition('.')[2]}.{short}"


def prefix_of(frame: Run | Item | None) -> str:
    """What the names inside a frame have in common."""
    if frame is None:
        return ""
    return frame.prefix() if isinstance(frame, Run) else frame.path


def additions(graph: Graph, outline: Outline) -> tuple[str, ...]:
    """What was added or unfrozen, in a few words for the title."""
    counts = Counter(b.child for b in graph.bodies.values())
    words = [name if count == 1 else f"{count} × {name}" for name, count in counts.items()]
    if graph.imported is None:
        return tuple(words)
    whole = list(_trained(outline))
    if 0 < len(whole) <= 2:
        words += [f"{item.path} unfrozen" for item in whole]
    elif outline.root.sums.unfrozen:
        words.append("unfrozen hosts")
    return tuple(words)


def _trained(outline: Outline) -> Iterable[Item]:
    """The largest modules that are trained as a whole."""
    for item in outline.root.below():
        if item.sums.unfrozen and not item.sums.frozen and not item.body:
            above = item.parent
            if above is None or above.sums.frozen or not above.path:
                yield item
