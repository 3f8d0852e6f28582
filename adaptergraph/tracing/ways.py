"""Which entries and exits of modules a value passes on its way to a reader: on an attribute it passes none. Floor 4.

A body at the exit of a call replaces what the call returns, and nothing that the call kept on an attribute before. So a
recorder gives each call tensors of its own, and its caller others for what it returns: an object that is read in
another call than the one it belongs to came there on another way, past the entries and exits that lie between the two.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Running(Protocol):
    """A call of a module: which one, when it began, and the call that made it."""

    @property
    def scope(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def outer(self) -> Running | None: ...


# the call, "entry" or "exit", and whether a body there changes what is read in a way that no edge can say
Passed = tuple[str, str, bool]
Line = Any
NOTHING: frozenset[Passed] = frozenset()


class Ways:
    """To which call each tensor belongs, and what its value has gone past before."""

    def __init__(self) -> None:
        self.owners: dict[int, tuple[Running, frozenset[Passed]]] = {}
        # the entries and exits that memory has passed, the last one first
        self.lines: dict[int, Line] = {}
        # the same for the operations that gave another tensor over it; writes that are not read yet, by tensor; and
        # the operations that memory was written past and then read, with a call that did
        self.views: dict[int, Line] = {}
        self.writes: dict[int, list[tuple[Line, Line]]] = {}
        self.tied: dict[int, str] = {}

    def give(self, tensor: Tensor, call: Running, past: frozenset[Passed] = NOTHING) -> None:
        """From now on the tensor belongs to this call."""
        self.owners[id(tensor)] = (call, past)

    def past(self, tensor: Tensor, reader: Running, made: int) -> frozenset[Passed]:
        """The entries and exits that a body may stand at, past which this tensor came to its reader.

        Args:
            made: when its value was made.
        """
        if id(tensor) not in self.owners or not tensor.is_floating_point():
            return NOTHING
        for one, other in self.writes.pop(id(tensor), ()):
            for view in apart(one, other):
                self.tied.setdefault(view, reader.scope)
        owner, past = self.owners[id(tensor)]
        if owner is reader:
            return past
        up, down = _between(owner, reader)
        # what a call was given and kept is what a body before it made, also for readers elsewhere
        kept = {(c.scope, "entry", True) for c in up if made < c.number}
        return past | kept | {(c.scope, "exit", False) for c in up} | {(c.scope, "entry", False) for c in down}

    def derive(
        self, tensor: Tensor, origin: Tensor, at: tuple[str, str] | None = None, view: int | None = None
    ) -> None:
        """A tensor shares memory with another one, also past this entry, exit or operation, unless there is a body."""
        line, views = self.lines.get(id(origin)), self.views.get(id(origin))
        self.lines[id(tensor)] = line if at is None else (at, line)
        self.views[id(tensor)] = views if view is None else (view, views)

    def written(self, alias: Tensor, tensor: Tensor, writer: Running) -> None:
        """A call wrote into a tensor, and so into this one over the same memory."""
        past = {p for p in self.owners[id(alias)][1] if p[2]} if id(alias) in self.owners else set()
        one, other = self.lines.get(id(alias)), self.lines.get(id(tensor))
        if one is not other:
            past |= {(scope, at, True) for scope, at in apart(one, other)}
        self.owners[id(alias)] = (writer, frozenset(past))
        one, other = self.views.get(id(alias)), self.views.get(id(tensor))
        if one is not other:
            self.writes.setdefault(id(alias), []).append((one, other))


def apart(one: Line, other: Line) -> list[Any]:
    """What only one of two lines has passed."""
    ends = _ends(one), _ends(other)
    return [line[0] for mine, theirs in (ends, ends[::-1]) for key, line in mine.items() if key not in theirs]


def _ends(line: Line) -> dict[int, Any]:
    """A line of entries and exits, and what it was before each of them."""
    found = {}
    while line is not None:
        found[id(line)] = line
        line = line[1]
    return found


def _between(one: Running, other: Running) -> tuple[list[Running], list[Running]]:
    """The calls around the first one that are not around the second, and the other way round."""
    lines = []
    for call in (one, other):
        line: list[Running] = []
        here: Running | None = call
        while here is not None:
            line.append(here)
            here = here.outer
        lines.append(line)
    first, second = ({id(c) for c in line} for line in lines)
    return [c for c in lines[0] if id(c) not in second], [c for c in lines[1] if id(c) not in first]
