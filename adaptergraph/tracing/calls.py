"""What a recorder notes: events, calls of modules that are running, and calls that returned. Floor 4."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ways import Passed

_numbers = itertools.count()


@dataclass(slots=True, eq=False)
class Record:
    """One event: an input, an operation, or a call of a module without children.

    `past` says which of the values that it reads came to it past entries and exits of modules. A call is `silent` that
    returned no tensor, and made some: it wrote them in place, or keeps them.
    """

    kind: str
    op: str
    scope: str
    path: str = ""
    index: int = 0
    reads: list[tuple[Record, Any]] = field(default_factory=list)
    params: dict[str, None] = field(default_factory=dict)
    outs: dict[Any, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    into: Record | None = None
    name: str = ""
    past: list[tuple[tuple[Record, Any], frozenset[Passed]]] = field(default_factory=list)
    silent: bool = False
    number: int = field(default_factory=_numbers.__next__)

    def final(self) -> Record:
        """The event this one is a part of, or itself."""
        record = self
        while record.into is not None:
            record = record.into
        return record

    @property
    def main(self) -> Any:
        """The key of the first float tensor it gives, or else of its first tensor."""
        floats = (k for k, (_, dtype) in self.outs.items() if dtype.is_floating_point)
        return next(floats, next(iter(self.outs), None))


@dataclass(slots=True, eq=False)
class Frame:
    """A module call that is running; `entered` says what its tensors were when it began, by their ids."""

    path: str
    index: int
    scope: str
    outer: Frame | None = None
    entered: dict[int, Any] = field(default_factory=dict)
    reads: list[Any] = field(default_factory=list)
    past: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    calls_children: bool = False
    given: list[tuple[Tensor, Tensor, Any]] = field(default_factory=list)
    lent: list[Tensor] = field(default_factory=list)
    returned: dict[int, Tensor] = field(default_factory=dict)
    number: int = field(default_factory=_numbers.__next__)


@dataclass(slots=True, eq=False)
class Made:
    """One call of a module that returned: who made it, where its first float tensor sits, all it returned and read."""

    caller: str
    first: tuple[Any, ...] | None
    parts: list[tuple[tuple[Any, ...], tuple[Record, Any]]]
    inputs: list[tuple[str, Any]]
