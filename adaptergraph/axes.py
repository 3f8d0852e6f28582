"""Which dimension of a value holds its features, told from the operations that made it and read it. Floor 2.

A dimension is counted from the end, -1 for the last: so it is the same with and without a batch before it. Each torch
function has a rule: it says where the features are (a convolution, a linear layer), or hands on what it got, moved or
not; of any other nothing is known. What is not known yet is told by those who read it, if nothing speaks against it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .rules import Event, Key, Way, rule_of


class Axes:
    """The dimensions of the features of all values of one run; a value is whatever a key stands for."""

    def __init__(self) -> None:
        self.known: dict[Key, int] = {}
        # values of which nothing is known, what was made of them, and how their dimensions moved
        self.links: list[tuple[Key, Key, Way]] = []
        # products of values: how many links there were before, what was made, and of what
        self.products: list[tuple[int, Key, Sequence[tuple[Key, Way]]]] = []
        self.asked: dict[Key, set[int]] = {}
        # values that are known from how the dimensions of others moved; and of those that stayed the value before
        self.moved: set[Key] = set()
        self.stayed: dict[Key, Key] = {}
        # values of one layout, such as those of a sum and what comes of them, that are not all known to be alike
        self.sums: list[tuple[list[Key], Key, Way]] = []
        # values that operations made of parameters and numbers alone: the other values of a sum say more than they
        self.constants: set[Key] = set()
        # the first value of each convolution
        self.convolutions: list[Key] = []

    def follow(
        self, op: str, args: Any, kwargs: Any, outs: Sequence[tuple[Key, Tensor]], key: Callable[[Tensor], Key]
    ) -> None:
        """An operation gave tensors.

        Args:
            outs: these tensors and what stands for each.
            key: what stands for a tensor that it was given; None for one that is no value, such as a parameter.
        """
        rule, event = rule_of(op), Event(self, args, kwargs, outs, key)
        if not any(True for _ in event.values(event.given())):
            self.constants.update(out for out, _ in outs)
        if rule is not None and outs:
            # of a call in a form that its rule does not know, nothing is known either
            with suppress(TypeError, ValueError, IndexError, AttributeError):
                rule(event)

    def hand_on(self, source: Key, result: Key, way: Way = None) -> None:
        """A value was made of another one, its dimensions moved in this way."""
        axis = self.known.get(source)
        if axis is None:
            if source is not None:
                self.links.append((source, result, way))
            return
        moved = _onward(axis, way)
        if moved is not None:
            self.known[result] = moved
            if moved != axis:
                self.moved.add(result)
            elif source in self.moved:
                self.moved.add(result)
                self.stayed[result] = source

    def ask(self, value: Key, axis: int) -> None:
        """Somebody reads a value as one with its features there."""
        if value is not None and value not in self.known:
            self.asked.setdefault(value, set()).add(axis)

    def settle(self) -> None:
        """Tells what is not known yet from those who read it, if they agree; forgets what does not fit together."""
        ways: dict[Key, list[tuple[Key, Way, bool]]] = {}
        for source, result, way in self.links:
            ways.setdefault(source, []).append((result, way, True))
            ways.setdefault(result, []).append((source, way, False))
        found: dict[Key, set[int]] = {}
        self._spread(found, ways, [(value, axis) for value, asked in self.asked.items() for axis in asked])
        # what is in one sum with it tells nothing of a value, but may speak against what its readers say
        told = [{_onward(self.known[v], way) for v in values if v in self.known} for values, _, way in self.sums]
        against = [
            (out, axis) for (_, out, _), axes in zip(self.sums, told, strict=True) for axis in axes if found.get(out)
        ]
        self._spread(found, ways, [(out, axis) for out, axis in against if axis is not None])
        self.known.update((value, next(iter(axes))) for value, axes in found.items() if len(axes) == 1)
        for (values, out, way), axes in zip(self.sums, told, strict=True):
            if len(axes | found.get(out, set())) > 1:
                for value in values:
                    self._doubt(value, out, way)

    def _spread(self, found: dict[Key, set[int]], ways: Any, waiting: list[tuple[Key, int]]) -> None:
        """Notes what is said of values that are not known, also for those made of them and those they are made of."""
        while waiting:
            value, axis = waiting.pop()
            if value in self.known or axis in found.setdefault(value, set()):
                continue
            found[value].add(axis)
            for other, way, onward in ways.get(value, ()):
                moved = _onward(axis, way) if onward else _back(axis, way)
                if moved is not None:
                    waiting.append((other, moved))

    def _doubt(self, value: Key, out: Key, way: Way) -> None:
        """Forgets a value that is added to others of another layout, if it was told from how dimensions moved."""
        if value not in self.moved or _onward(self.known.get(value), way) == self.known.get(out):
            return
        while value in self.known:
            del self.known[value]
            value = self.stayed.get(value)

    def product(self, result: Key, factors: Sequence[tuple[Key, Way]]) -> None:
        """A value was made of several, with the dimensions of each that are still there; nobody knows the features."""
        if all(key is not None for key, _ in factors):
            self.products.append((len(self.links), result, factors))

    def assume_last(self, rank: Callable[[Key], int]) -> set[Key]:
        """Lets values of which nobody told have their features last, vectors excepted, and follows these from there.

        Args:
            rank: how many dimensions a value has.

        Returns:
            what has no features: products that sum up those of all factors, such as the scores of attention, and what
            was made of one.
        """
        events = [*self.products, *((n, result, [(source, way)]) for n, (source, result, way) in enumerate(self.links))]
        made: dict[Key, list[tuple[Key, Way]]] = {}
        for _, result, factors in sorted(events, key=lambda event: event[0]):
            made.setdefault(result, []).extend(factors)
        products, without = {result for _, result, _ in self.products}, set[Key]()
        for result, factors in made.items():
            given = [(key, way) for key, way in factors if key not in without]
            known = [self.known.get(key, -1 if key not in made and rank(key) > 1 else None) for key, _ in given]
            if result in self.known or None in known:
                continue
            left = {_onward(axis, way) for axis, (_, way) in zip(known, given, strict=True)} - {None}
            if not left if result in products else len(given) < len(factors):
                without.add(result)
            elif len(left) == 1:
                self.known[result] = left.pop()  # type: ignore[assignment]
        return without


class Following(TorchFunctionMode):
    """Follows the features through what is run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.axes = Axes()
        self.given: list[Key] = []
        # a number for each value of a tensor, and the tensors, so that their ids stay their own
        self.values: dict[int, tuple[int, Tensor]] = {}
        self.count = itertools.count()

    def starts(self, tensor: Tensor, axis: int | None) -> None:
        """A tensor that is there before."""
        key = next(self.count)
        self.given.append(key)
        self.values[id(tensor)] = key, tensor
        if axis is not None:
            self.axes.known[key] = axis

    def axis(self, tensor: Tensor) -> int | None:
        """Where a tensor has its features."""
        return self.axes.known.get(self.key(tensor))

    def key(self, tensor: Tensor) -> Key:
        """What stands for a tensor; None for a parameter."""
        return self.values.get(id(tensor), (None,))[0]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outs = [t for t in (result if isinstance(result, list | tuple) else (result,)) if isinstance(t, Tensor)]
        new = [(next(self.count), t) for t in outs]
        self.axes.follow(op_name(func), args, kwargs or {}, new, self.key)
        self.values.update((id(t), (key, t)) for key, t in new)
        return result


_NO_WORD = re.compile(r"\W+")


def op_name(func: Any) -> str:
    """What an operation is called in a graph."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "get")
    return _NO_WORD.sub("_", name.strip("_") if name.startswith("__") else name) or "op"


def _onward(axis: int | None, way: Way) -> int | None:
    """Which dimension this one becomes."""
    return axis if way is None or axis is None else way[axis]


def _back(axis: int, way: Way) -> int | None:
    """Which dimension became this one."""
    return axis if way is None else way.index(axis) - len(way) if way.count(axis) == 1 else None
