"""What a picture is made of: plain data, no text layout, no colour. Renderers read this and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Shape: TypeAlias = "tuple[str | int | None, ...]"


@dataclass(frozen=True, slots=True)
class Sums:
    """How many numbers a box holds: frozen ones, and the trained ones of bodies and of hosts.

    >>> (Sums(frozen=10, new=2) + Sums(unfrozen=1)).trained
    3
    """

    frozen: int = 0
    new: int = 0
    unfrozen: int = 0

    @property
    def trained(self) -> int:
        """What training changes."""
        return self.new + self.unfrozen

    @property
    def total(self) -> int:
        """All of it."""
        return self.frozen + self.trained

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.frozen + other.frozen, self.new + other.new, self.unfrozen + other.unfrozen)

    def times(self, count: int) -> Sums:
        """The sums of that many equal boxes."""
        return Sums(self.frozen * count, self.new * count, self.unfrozen * count)


NOTHING = Sums()


@dataclass(frozen=True, slots=True)
class Box:
    """One box of a picture, one line of a table.

    Attributes:
        name: the full name of the node or module, unique in the view.
        path: its name where it stands: without the name of the frame around it.
        title: what stands over the box: `adapter`, `add · LayerNorm`, or the path.
        kind: `"input"`, `"output"`, `"join"` (an operation that joins values) or `"box"`.
        op: the op, or the class of a module.
        detail: what it does in a few characters, such as `768 → 64 → 768`.
        shape: of the value that leaves it.
        sums: parameters of all it stands for: of all `count` members for a folded run of single boxes.
        added: it belongs to a body.
        marked: it was asked to be marked, or holds something that was.
        count: how many equal boxes it stands for.
        widths: of a layer that changes the width, the width before and after.
        note: something to know, such as `never called`.
    """

    name: str
    path: str
    title: str
    kind: Literal["input", "output", "join", "box"]
    op: str
    detail: str = ""
    shape: Shape | None = None
    sums: Sums = NOTHING
    added: bool = False
    marked: bool = False
    count: int = 1
    widths: tuple[int, int] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """A group of boxes: a run of `count` equal blocks drawn once, one numbered block, or something that was opened.

    `sums` are those of one member.
    """

    name: str
    title: str
    kind: Literal["run", "block", "open"]
    count: int
    sums: Sums
    added: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A value that goes from one box to another.

    Attributes:
        kind: `"plain"`; `"residual"` (past other boxes into an add); `"side"` (a mask, positions, conditions: beside
            the value that the box works on); `"again"` (back, into a further call of the same module).
        rewired: it leads into or out of a body.
        label: what it passes without being shown, such as an activation.
    """

    source: str
    target: str
    kind: Literal["plain", "residual", "side", "again"]
    rewired: bool = False
    label: str = ""


class Row(NamedTuple):
    """One step through a view in order: a box, or the start or end of a frame."""

    kind: Literal["box", "start", "end"]
    item: Box | Frame


@dataclass(frozen=True, slots=True)
class View:
    """A graph as a picture or a table shows it.

    Attributes:
        title: the class of the model.
        added: what was added or unfrozen, in words.
        rows: boxes in order, between the start and the end of their frames.
        links: between boxes, each pair once.
        totals: `graph.params` and `graph.trained`, summed over everything drawn.
        nodes: how many nodes the graph has.
        marked: how many names were asked to be marked.
        tall: better drawn from top to bottom.
    """

    title: str
    added: tuple[str, ...]
    rows: tuple[Row, ...]
    links: tuple[Link, ...]
    totals: Sums
    nodes: int
    marked: int
    tall: bool

    def boxes(self) -> Iterator[Box]:
        """The boxes in order."""
        return (row.item for row in self.rows if isinstance(row.item, Box))


def number(count: int) -> str:
    """A count of parameters in three digits.

    >>> number(768), number(99136), number(109482240)
    ('768', '99.1 K', '109 M')
    """
    if count < 1000:
        return str(count)
    units = ["K", "M", "B", "T"]
    value = count / 1000
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[0]}"


def plain(text: str) -> str:
    """Text on one line: what cannot be printed becomes a space."""
    return "".join(c if c.isprintable() else " " for c in text)


def shape_text(shape: Shape | None) -> str:
    """A shape as people read it; nothing for none."""
    if shape is None:
        return ""
    return " × ".join("?" if d is None else str(d) for d in shape) or "scalar"


def legend(totals: Sums) -> tuple[str, str]:
    """The two numbers under a title: what is frozen, what is trained."""
    share = f"{number(totals.trained)} ({percent(totals.trained, totals.total)})"
    if totals.new and totals.unfrozen:
        new = f"+ new {number(totals.new)}, unfrozen {number(totals.unfrozen)}: trained {share}"
    elif totals.new:
        new = f"+ new, trained {share}"
    else:
        new = f"trained {share}" if totals.trained else "nothing trained"
    return f"frozen {number(totals.frozen)}", new


def percent(part: int, whole: int) -> str:
    """A share, with one digit, and never 0.0 for something or 100.0 for not quite all.

    >>> percent(2, 1000), percent(1, 100000), percent(0, 0)
    ('0.2 %', '< 0.1 %', '0.0 %')
    """
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= share < 100 else f"{share:.1f} %"


def holds(sums: Sums, count: int = 1) -> tuple[str, str]:
    """What a frame holds: the frozen part and the trained part in words; either may be empty.

    >>> holds(Sums(frozen=7_090_000, new=198_000), count=12)
    ('each 7.09 M frozen', '+ 198 K new')
    """
    each = "each " if count > 1 else ""
    frozen = f"{each}{number(sums.frozen)} frozen" if sums.frozen else ""
    parts = [f"+ {number(sums.new)} new"] if sums.new else []
    parts += [f"{number(sums.unfrozen)} trained"] if sums.unfrozen else []
    return frozen, (each if parts and not frozen else "") + ", ".join(parts)


def bar(part: int, whole: int, width: int, least: int) -> int:
    """How much of a bar a share takes: true to scale, but at least so much for something, and for what is left.

    >>> bar(1, 1000, 600, 6), bar(0, 10, 600, 6), bar(10, 10, 600, 6)
    (6, 0, 600)
    """
    if not part or not whole or part == whole:
        return width if part else 0
    return min(max(round(width * part / whole), least), width - least)
