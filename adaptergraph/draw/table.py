"""View → a table for the terminal: at most 100 columns, readable without colours; Rich colours it where it prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..view import Box, View, bar, holds, legend, number, plain, shape_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

WIDTH = 100
_HEADS = ("node", "op", "out shape", "params", "")
# the widest a column may be, node aside; what is longer is shortened in the middle
_LIMITS = (26, 18, 7, 20)
_GAP = "  "
_BAR = 80


class _Line(NamedTuple):
    """One line of the table: what stands before the cells, the cells, and how Rich shows it.

    A line with one cell is text that ends where the last column ends.
    """

    before: str
    cells: tuple[str, ...]
    style: str = ""


class Table:
    """A graph as a table. `print` it, or let Rich print it in colour.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> print(ag.Graph(ag.Adapter.wrap(ag.dense(x, 8, name="fc"), bottleneck_size=2)).freeze().summary())
     declared graph + adapter
     ...
       node      op           out shape  params
     ───────────────────────────────────────────────────
       x         input        batch×8         –
       fc        dense 8 → 8  batch×8        72  frozen
     + adapter   8 → 2 → 8    batch×8        42  trained
       output    output       batch×8         –
     ───────────────────────────────────────────────────
     6 nodes, 4 shown · graph.summary(fold=False) shows all
    """

    def __init__(self, view: View) -> None:
        self.view = view

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self._lines())

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        for text, style in self._lines():
            yield Text(text, style=style, no_wrap=True, overflow="crop")

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Each line with its Rich style."""
        yield from self._head()
        rows = list(self._rows())
        edge = max((len(row.before) for row in rows), default=3)
        widths = self._widths(rows, edge)
        rule = " " + "─" * (edge + sum(widths) + len(_GAP) * (len(widths) - 1) - 1)
        yield _text(_Line("", _HEADS), edge, widths), "bold"
        yield rule, "dim"
        for row in rows:
            yield _text(row, edge, widths), row.style
        yield rule, "dim"
        shown = sum(1 for _ in self.view.boxes())
        more = f", {shown} shown · graph.summary(fold=False) shows all" if shown < self.view.nodes else ""
        yield f" {self.view.nodes} nodes{more}", "dim"

    def _widths(self, rows: list[_Line], edge: int) -> list[int]:
        full = [*(row.cells for row in rows if len(row.cells) > 1), _HEADS]
        widths = [max(len(cells[i]) for cells in full) for i in range(len(_HEADS))]
        others = [min(width, limit) for width, limit in zip(widths[1:], _LIMITS, strict=True)]
        room = WIDTH - edge - sum(others) - len(_GAP) * len(others)
        return [max(min(widths[0], room), 8), *others]

    def _head(self) -> Iterator[tuple[str, str]]:
        totals = self.view.totals
        yield shortened(plain(" " + " + ".join([self.view.title, *self.view.added])), WIDTH), "bold"
        if totals.total:
            trained = bar(totals.trained, totals.total, _BAR, 1)
            yield " " + "█" * (_BAR - trained) + "▒" * trained, ""
        frozen, new = legend(totals)
        yield f" {frozen}    {new}", ""
        yield "", ""

    def _rows(self) -> Iterator[_Line]:
        around = ""
        for kind, item in self.view.rows:
            if isinstance(item, Box):
                yield _row(item, around)
            elif kind == "start":
                many = f"× {item.count}" if item.kind == "run" else ""
                plus = "+ " if item.added else ""
                yield _Line(f" {around}╭ ", (f"{plus}{item.title}", "", "", many, ""), "bold")
                around += "│ "
            else:
                around = around[:-2]
                sums = "  ".join(part for part in holds(item.sums, item.count) if part)
                yield _Line(f" {around}╰ ", (sums,), "dim")


def _row(box: Box, around: str) -> _Line:
    sign = "+" if box.added else "▸" if box.marked else " "
    many = f"× {box.count} · " if box.count > 1 else ""
    size = number(box.sums.total) if box.sums.total else "–"
    cells = (box.path, many + _what(box), shape_text(box.shape).replace(" ", ""), size, _state(box))
    return _Line(f" {around}{sign} ", cells, "dark_orange" if box.sums.trained else "")


def _what(box: Box) -> str:
    """The op, with its sizes if there is room."""
    if "→" not in box.detail and not (box.added and box.op == "body"):
        return box.detail if box.detail.startswith(box.op) else box.op
    both = f"{box.op} {box.detail}"
    return box.detail if (box.added and box.op == "body") or len(both) > _LIMITS[0] else both


def _state(box: Box) -> str:
    """What is trained of it, in words."""
    sums = box.sums
    if box.note:
        return box.note
    if not sums.total or not sums.trained:
        return "frozen" if sums.total else ""
    return f"{number(sums.trained)} trained" if sums.frozen else "trained"


def _text(line: _Line, edge: int, widths: list[int]) -> str:
    """The line, laid out; the numbers end where their column ends."""
    before = line.before.ljust(edge)
    if len(line.cells) == 1:
        room = sum(widths) + len(_GAP) * (len(widths) - 1)
        return (line.before + shortened(line.cells[0], room).rjust(edge + room - len(line.before))).rstrip()
    cells = [shortened(plain(cell), width) for cell, width in zip(line.cells, widths, strict=True)]
    laid = [c.rjust(w) if i == 3 else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return shortened((before + _GAP.join(laid)).rstrip(), WIDTH)


def shortened(text: str, width: int) -> str:
    """The text, without its middle if it is too long.

    >>> shortened("encoder.layer.0.attention", 15)
    'encoder…tention'
    """
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"
