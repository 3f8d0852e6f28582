"""Which entries and exits of modules a value passes on its way to a reader: on an attribute it passes none. Floor 4.

A body at the exit of a call replaces what the call returns, and nothing that the call kept on an attribute before. So a
recorder gives each call tensors of its own, and its caller others for what it returns: an object that is read in
another call than the one it belongs to came there on another way, past the entries and exits that lie between the two.
"""

from __future__ import annotations

from typing import Protocol

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
NOTHING: frozenset[Passed] = frozenset()


class Ways:
    """To which call each tensor belongs, and what its value has gone past before."""

    def __init__(self) -> None:
        self.owners: dict[int, tuple[Running, frozenset[Passed]]] = {}

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
        owner, past = self.owners[id(tensor)]
        if owner is reader:
            return past
        up, down = _between(owner, reader)
        # what a call was given and kept is what a body before it made, also for readers elsewhere
        kept = {(c.scope, "entry", True) for c in up if made < c.number}
        return past | kept | {(c.scope, "exit", False) for c in up} | {(c.scope, "entry", False) for c in down}

    def owner(self, tensor: Tensor, reader: Running) -> Running:
        """The call that a tensor belongs to; one that was there before the run is at home everywhere."""
        return self.owners.get(id(tensor), (reader, NOTHING))[0]

    def written(self, alias: Tensor, owner: Running, writer: Running) -> None:
        """A call wrote into a tensor of an owner, and so into this one over the same memory."""
        other, past = self.owners.get(id(alias), (owner, NOTHING))
        past = frozenset(p for p in past if p[2])
        if other is owner:
            self.owners[id(alias)] = (writer, past)
            return
        # a body between the two gives one of them other memory; what runs yet has returned neither of them
        up, down = _between(owner, other)
        done = {id(c) for c in _between(owner, writer)[0]} | {id(c) for c in _between(other, writer)[0]}
        entries = {(c.scope, "entry", True) for c in (*up, *down)}
        exits = {(c.scope, "exit", id(c) in done) for c in (*up, *down) if id(c) in done or c in up}
        self.owners[id(alias)] = (other, past | entries | exits)


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
