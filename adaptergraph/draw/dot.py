"""View → Graphviz DOT text. Five rules: fill says trained, `+` and a thick border say added, a frame with a pill is a
run, the bar in the title is true to scale, and what a splice rewired is orange.

The ids are the names of the view, so the same graph always gives the same text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..view import Box, Frame, Link, View, bar, holds, legend, number, plain, shape_text

FROZEN, TRAINED = "#E8EDF2", "#FF8A1F"
_GREY, _DARK, _TEXT, _FAINT, _BROWN, _BLACK = "#B4C0CC", "#1F2933", "#475462", "#6B7785", "#B24F00", "#241000"
_FONT = 'fontname="Helvetica,Arial,sans-serif"'
_BARE = 'BORDER="0" CELLBORDER="0" CELLSPACING="0"'
_TITLE_WIDTH = 18
# below the words of a frame in which residuals go past something: they are drawn there
_ROOM = '<TR><TD HEIGHT="20"></TD></TR>'


@dataclass(frozen=True, slots=True)
class _Look:
    """Colours and borders of a box."""

    fill: str
    border: str
    text: str
    thick: float
    style: str


def to_dot(view: View) -> str:
    """The text of a digraph, the same each time.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> print(ag.Graph(ag.dense(x, 4, name="fc")).dot().splitlines()[0])
    digraph adaptergraph {
    """
    return "\n".join(_Digraph(view).lines()) + "\n"


class _Digraph:
    """Writes one view."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.tall = view.tall
        self.around: dict[str, tuple[Frame, ...]] = {}
        self.boxes: dict[str, Box] = {}
        frames: list[Frame] = []
        for kind, item in view.rows:
            if isinstance(item, Box):
                self.boxes[item.name] = item
                self.around[item.name] = tuple(frames)
            elif kind == "start":
                frames.append(item)
            else:
                frames.pop()
        self.entries = self._entries()
        self.dots: dict[str, list[_Entry]] = {}
        for entry in dict.fromkeys(self.entries.values()):
            self.dots.setdefault(entry.frame.name, []).append(entry)
        self.reached: set[_Entry] = set()
        passed = [link.target for link in view.links if link.kind == "residual"]
        self.past = {frame.name for name in passed for frame in self.around[name]}

    def lines(self) -> Iterator[str]:
        """The text, line by line."""
        flow = "rankdir=TB, nodesep=0.35, ranksep=0.3" if self.tall else "rankdir=LR, nodesep=0.28, ranksep=0.34"
        yield "digraph adaptergraph {"
        yield f"  graph [{flow}, {_FONT}, bgcolor=white, pad=0.3, splines=spline, labelloc=t, labeljust=l,"
        yield f"    label=<{self._title()}>]"
        yield f"  node [shape=plain, {_FONT}]"
        yield f'  edge [color="#9AA7B4", penwidth=1.5, arrowsize=0.6, {_FONT}, fontsize=10, fontcolor="{_FAINT}"]'
        depth = 1
        for kind, item in self.view.rows:
            pad = "  " * depth
            if isinstance(item, Box):
                yield from (pad + line for line in self._box(item))
            elif kind == "start":
                yield from (pad + line for line in self._start(item))
                depth += 1
            else:
                depth -= 1
                yield "  " * depth + "}" * (3 if item.kind == "run" else 1)
        inputs = [_quoted(box.name) for box in self.boxes.values() if box.kind == "input"]
        if len(inputs) > 1:
            yield f"  {{rank=same; {'; '.join(inputs)}}}"
        for link in self.view.links:
            yield from ("  " + line for line in self._link(link))
        yield "}"

    # ------------------------------------------------------------------ title

    def _title(self) -> str:
        view, totals = self.view, self.view.totals
        added = "".join(f" + {word}" for word in view.added)
        marked = f" · {view.marked} marked" if view.marked else ""
        words = _font(view.title, 20, _DARK, bold=True) + _font(added, 20, _BROWN, bold=True)
        width = 330 if self.tall else 620
        trained = bar(totals.trained, totals.total, width, 6)
        cells = "".join(
            f'<TD HEIGHT="9" WIDTH="{w}" FIXEDSIZE="TRUE" BGCOLOR="{colour}"></TD>'
            for w, colour in ((width - trained, _GREY), (trained, TRAINED))
            if w
        )
        frozen, new = legend(totals)
        numbers = _font(frozen, 12, _TEXT, bold=True) + _font("    ", 12, _DARK)
        numbers += _font(new, 12, _BROWN if totals.trained else _FAINT, bold=True)
        rows = [
            words + _font(marked, 20, _DARK, bold=True),
            f'<TABLE ALIGN="LEFT" FIXEDSIZE="TRUE" WIDTH="{width}" HEIGHT="9" {_BARE} CELLPADDING="0">'
            f"<TR>{cells}</TR></TABLE>"
            if totals.total
            else "",
            numbers if totals.total else "",
        ]
        room = '<TR><TD HEIGHT="12"></TD></TR>'
        return _table("".join(f'<TR><TD ALIGN="LEFT">{row}</TD></TR>' for row in rows if row) + room, "2")

    # ------------------------------------------------------------------ boxes

    def _box(self, box: Box) -> Iterator[str]:
        look = _look(box)
        plus = "+ " if box.added and not any(frame.added for frame in self.around[box.name]) else ""
        tooltip = "\n".join(part for part in (box.name, box.op, shape_text(box.shape)) if part)
        common = f"class={_quoted(look.style)}, tooltip={_quoted(tooltip)}"
        if box.kind in ("input", "output"):
            body = f"label=<{_label(box)}>"
        elif box.kind == "join":
            body = _join(box, look)
        elif self.tall:
            body = _flat(box, look, plus)
        else:
            body = f"label=<{_card(box, look, plus)}>"
        node = f"{_quoted(box.name)} [{body}, {common}]"
        if box.count == 1:
            yield node
            return
        yield from _stack(box.name)
        yield f"  {node}"
        yield "}}"

    def _start(self, frame: Frame) -> Iterator[str]:
        if frame.kind == "run":
            yield from _stack(frame.name)
            style = 'margin=16, style="rounded,filled", color="#8D9AA8", fillcolor="#FAFBFC", penwidth=1.4'
        elif frame.added:
            style = f'margin=12, style="rounded,filled", color="{_BROWN}", fillcolor="#FFF3E6", penwidth=2'
        else:
            dashes = ",dashed" if frame.kind == "open" else ""
            style = f'margin=14, style="rounded,filled{dashes}", color="#8D9AA8", fillcolor="#FAFBFC", penwidth=1.4'
        yield f"subgraph {_quoted('cluster ' + frame.name)} {{"
        yield f"  graph [{style}, labelloc=t, labeljust=l, label=<{self._caption(frame)}>]"
        for entry in self.dots.get(frame.name, ()):
            colour = _BROWN if frame.added else "#9AA7B4"
            dot = f'shape=circle, fixedsize=true, width=0.09, style=filled, fillcolor="{colour}", color="{colour}"'
            yield f'  {_quoted(entry.name)} [{dot}, label="", tooltip={_quoted(entry.source)}]'

    def _caption(self, frame: Frame) -> str:
        if frame.kind != "run":
            return _open_caption(frame, past=frame.name in self.past and not self.tall)
        frozen, trained = holds(frame.sums, frame.count)
        words = [
            _font(" " + frame.title, 13, _DARK, bold=True),
            _font("  " + frozen, 11, _TEXT) if frozen else "",
            _font(" " + trained, 11, _BROWN, bold=True) if trained else "",
        ]
        pill = f'<TD BGCOLOR="{_DARK}" STYLE="ROUNDED">{_font(f" × {frame.count} ", 14, "white", bold=True)}</TD>'
        if self.tall:
            below = "".join(f'<TR><TD ALIGN="LEFT" COLSPAN="2">{word}</TD></TR>' for word in words[1:] if word)
            return _table(f'<TR>{pill}<TD ALIGN="LEFT">{words[0]}</TD></TR>{below}', "3")
        cells = "".join(f"<TD>{word}</TD>" for word in words if word)
        return _table(f"<TR>{pill}{cells}</TR>{_ROOM if frame.name in self.past else ''}", "3")

    # ------------------------------------------------------------------ links

    def _entries(self) -> dict[tuple[str, str], _Entry]:
        """The links that enter a frame together: one value that several boxes in the frame read."""
        groups: dict[tuple[str, str], list[Link]] = {}
        frames: dict[str, Frame] = {}
        for link in self.view.links:
            frame = self._entered(link)
            if frame is not None and link.kind in ("plain", "residual"):
                frames[frame.name] = frame
                groups.setdefault((link.source, frame.name), []).append(link)
        entries: dict[tuple[str, str], _Entry] = {}
        for (source, name), links in groups.items():
            if len(links) > 1:
                entry = _Entry(f"{name} ← {source}", source, frames[name])
                entries.update(((link.source, link.target), entry) for link in links)
        return entries

    def _entered(self, link: Link) -> Frame | None:
        """The outermost frame that a link goes into."""
        outside = self.around[link.source]
        return next((frame for frame in self.around[link.target] if frame not in outside), None)

    def _link(self, link: Link) -> Iterator[str]:
        source = _quoted(link.source)
        label = self._label_of(link)
        entry = self.entries.get((link.source, link.target))
        if entry is not None:
            if entry not in self.reached:
                self.reached.add(entry)
                rewired = entry.frame.added or self.boxes[link.source].added
                style = _style("plain", rewired)
                yield f"{source} -> {_quoted(entry.name)} [{style}, arrowhead=none{label}]"
            source, label = _quoted(entry.name), ""
        yield f"{source} -> {_quoted(link.target)} [{_style(link.kind, link.rewired)}{label}]"

    def _label_of(self, link: Link) -> str:
        """Inside what was opened, the activation on the way and the shape after a change of width."""
        around = {frame.kind for frame in self.around.get(link.source, ()) + self.around.get(link.target, ())}
        if around and "open" not in around:
            return ""
        source = self.boxes[link.source]
        shape = shape_text(source.shape).replace(" ", "") if source.widths and "open" in around else ""
        words = "  ".join(word for word in (link.label, shape) if word)
        return f", label=<{_spaces(2)}{_escaped(words)}{_spaces(2)}>" if words and link.kind == "plain" else ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """The dot at which a value enters a frame."""

    name: str
    source: str
    frame: Frame


def _style(kind: str, rewired: bool) -> str:
    if kind == "plain":
        return f'color="{TRAINED}", penwidth=3, weight=20' if rewired else "weight=20"
    if rewired:
        return f'color="{TRAINED}", penwidth=1.4, style=dashed, weight=1'
    pale = 'color="#C3CDD7", penwidth=1.2, arrowsize=0.5, weight=0'
    return pale if kind == "residual" else f"{pale}, style=dashed" + (", constraint=false" if kind == "again" else "")


def _look(box: Box) -> _Look:
    if box.sums.trained and not box.sums.frozen:
        fill, text, style = TRAINED, _BLACK, "trained"
    else:
        fill, text, style = (FROZEN if box.sums.total else "white"), _TEXT, "partly" if box.sums.trained else "frozen"
    border = _BROWN if box.sums.trained or box.added else _GREY
    if box.marked:
        return _Look(fill, _DARK, text, 4, f"{style} marked")
    return _Look(fill, border, text, 3 if box.added else 1, style + (" added" if box.added else ""))


def _titles(text: str, width: int = _TITLE_WIDTH) -> list[str]:
    """A title in lines that are not too long, broken after dots and underscores."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]?", text):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def _words(box: Box) -> tuple[str, str]:
    """What it does, and what it holds."""
    detail = box.detail if box.detail != box.title else ""
    many = f"× {box.count}" if box.count > 1 else ""
    size = number(box.sums.total) if box.sums.total else ""
    return " · ".join(w for w in (many, detail) if w), " · ".join(w for w in (size, box.note) if w)


def _partly(box: Box) -> str:
    """What is trained of a box that is mostly frozen."""
    return f"{number(box.sums.trained)} trained" if box.sums.trained and box.sums.frozen else ""


def _card(box: Box, look: _Look, plus: str) -> str:
    detail, size = _words(box)
    rows = [_row(_font(line, 13, look.text, bold=True)) for line in _titles(plus + box.title)]
    rows += [_row(_font(detail, 10, look.text))] if detail else []
    rows += [_row(_font(size, 11, look.text, bold=True))] if size else []
    if _partly(box):
        rows.append(_row(_font(_partly(box), 10, _BROWN, bold=True)))
    thin = '<TR><TD HEIGHT="2" CELLPADDING="0"></TD></TR>'
    style = f'BORDER="{look.thick:g}" COLOR="{look.border}" BGCOLOR="{look.fill}" STYLE="ROUNDED"'
    return f'<TABLE {style} CELLBORDER="0" CELLSPACING="0" CELLPADDING="2">{thin}{"".join(rows)}{thin}</TABLE>'


def _flat(box: Box, look: _Look, plus: str) -> str:
    """A box for a picture that goes down: a trapezium if it changes the width."""
    detail, size = _words(box)
    below = "   ".join(w for w in (detail, size) if w)
    if not box.sums.total and not box.note:
        return _pill(" · ".join(dict.fromkeys((box.title, below))) if below else box.title, look)
    titles = _titles(plus + box.title, 30)
    rows = [_font(line, 12, look.text, bold=True) for line in titles] + ([_font(below, 10, look.text)] if below else [])
    if _partly(box):
        rows.append(_font(_partly(box), 10, _BROWN, bold=True))
    width = max(2.6 if below else 1.0, 0.1 * max(map(len, titles)) + 0.3, 0.075 * len(below) + 0.4)
    height = 0.2 + 0.2 * len(rows)
    shape = 'shape=box, style="filled,rounded"'
    if box.widths is not None:
        shape = f"shape={'invtrapezium' if box.widths[0] > box.widths[1] else 'trapezium'}, style=filled"
        width += 1.0
    colours = f'fillcolor="{look.fill}", color="{look.border}", penwidth={0.8 * look.thick:g}'
    label = _table("".join(f"<TR><TD>{row}</TD></TR>" for row in rows), "1")
    return f"{shape}, fixedsize=true, width={width:.2f}, height={height:.2f}, {colours}, label=<{label}>"


def _join(box: Box, look: _Look) -> str:
    colour = look.border if box.marked or box.added else "#8D9AA8"
    thick = 2.5 if box.marked else 2 if box.added else 1.2
    if len(box.title) == 1:
        label = _font(box.title, 14, colour, bold=True)
        circle = "shape=circle, fixedsize=true, width=0.3, style=filled, fillcolor=white"
        return f'{circle}, color="{colour}", penwidth={thick}, label=<{label}>'
    return _pill(box.title, look)


def _pill(text: str, look: _Look) -> str:
    """Something small without parameters."""
    label = _table("".join(f"<TR><TD>{_font(line, 11, _TEXT)}</TD></TR>" for line in _titles(text)), "1")
    border = f'color="{look.border}", penwidth={0.8 * look.thick:g}'
    return f'shape=box, style="filled,rounded", fillcolor=white, height=0.3, {border}, label=<{label}>'


def _label(box: Box) -> str:
    """The name and shape of an input or output, without a box."""
    lines = [_font(line, 12, _DARK, bold=True) for line in _titles(box.title)]
    if box.shape is not None:
        lines.append(_font(shape_text(box.shape), 10, _FAINT))
    return _table("".join(map(_row, lines)), "2")


def _open_caption(frame: Frame, past: bool) -> str:
    lines = [_font(("+ " if frame.added else "") + frame.title, 13, _BROWN if frame.added else _DARK, bold=True)]
    frozen, trained = holds(frame.sums)
    lines += [_font(frozen, 11, _TEXT)] if frozen else []
    lines += [_font(trained, 11, _BROWN)] if trained else []
    return _table("".join(f'<TR><TD ALIGN="LEFT">{line}</TD></TR>' for line in lines) + (_ROOM if past else ""), "1")


def _stack(name: str) -> Iterable[str]:
    """Two empty frames around what follows: a stack of equal things."""
    for i, colour in ((2, "#DDE4EA"), (1, "#C6D0DA")):
        yield f"subgraph {_quoted(f'cluster {name} {i}')} {{"
        yield f'  graph [label="", margin=6, style=rounded, color="{colour}"]'


def _table(rows: str, padding: str) -> str:
    return f'<TABLE {_BARE} CELLPADDING="{padding}">{rows}</TABLE>'


def _row(cell: str) -> str:
    return f"<TR><TD>{_spaces(2)}{cell}{_spaces(2)}</TD></TR>"


def _font(text: str, size: int, colour: str, bold: bool = False) -> str:
    if not text:
        return ""
    inner = _escaped(text)
    return f'<FONT POINT-SIZE="{size}" COLOR="{colour}">{f"<B>{inner}</B>" if bold else inner}</FONT>'


def _spaces(count: int) -> str:
    return "&nbsp;" * count


def _escaped(text: str) -> str:
    """Text for an HTML-like label; spaces at the ends and in rows are kept."""
    return html.escape(plain(text)).replace("  ", "&nbsp;&nbsp;").replace("> ", ">&nbsp;")


def _quoted(text: str) -> str:
    """Text for a quoted string; a new line stays one."""
    lines = [plain(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n")]
    return '"' + "\\n".join(lines) + '"'
