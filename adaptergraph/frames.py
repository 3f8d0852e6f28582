"""What the modules of one forward tell one another: one frame for each forward and thread. Floor 4.

A frame is open while the module that opened it runs. Checkpointing runs a part of a forward again, when the frame is
long closed and maybe in another thread: that part then finds the frame as it was when it began.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import GraphError


class Token:
    """Stands for one adapted model; a copy of the model has another one."""


@dataclass(frozen=True, slots=True)
class Key:
    """A value of a frame.

    Attributes:
        hops: how many frames further out it is than the innermost one.
        number: which value of that frame.
        name: of the value in the graph, for messages.
        trained: whether gradients go through it to something trained.
    """

    hops: int
    number: int
    name: str
    trained: bool = False


class Frame:
    """The values of one forward so far, how often its modules were called, and the frame around it."""

    __slots__ = ("counts", "outer", "token", "values", "without_grad")

    def __init__(self, token: Token | None, outer: Frame | None) -> None:
        self.token = token
        self.outer = outer
        self.values: dict[int, Tensor] = {}
        self.without_grad: dict[int, bool] = {}
        self.counts: dict[int, int] = {}

    def copy(self) -> Frame:
        """The same as it is now, with the frames around it."""
        twin = Frame(self.token, self.outer.copy() if self.outer is not None else None)
        twin.values.update(self.values)
        twin.without_grad.update(self.without_grad)
        twin.counts.update(self.counts)
        return twin


class _Here(threading.local):
    frame: Frame | None = None


HERE = _Here()


def find(token: Token | None, hops: int) -> Frame | None:
    """The frame that is so many frames further out, if it is of this model."""
    frame = HERE.frame
    for _ in range(hops):
        frame = frame.outer if frame is not None else None
    return frame if frame is not None and frame.token is token else None


def keep(token: Token | None, key: Key, value: Tensor) -> None:
    """Notes a value; where no frame is open nobody waits for it."""
    frame = find(token, key.hops)
    if frame is not None:
        frame.values[key.number] = value
        frame.without_grad[key.number] = not torch.is_grad_enabled()


def read(token: Token | None, key: Key) -> Tensor:
    """A value that was noted in this forward.

    Raises:
        GraphError: it was not computed in this forward, or without the gradients that are wanted of it.
    """
    frame = find(token, key.hops)
    if frame is None or key.number not in frame.values:
        raise GraphError(
            f"a body reads {key.name!r}, which was not computed in this forward",
            node=key.name,
            hint="call the model as a whole; a part that is called by itself, or computed again by a reentrant "
            "checkpoint (use_reentrant=False keeps it), has only its own values",
        )
    if key.trained and frame.without_grad[key.number] and torch.is_grad_enabled():
        raise GraphError(
            f"a body reads {key.name!r}, which was computed without gradients",
            node=key.name,
            hint="use_reentrant=False, if that part is checkpointed: a reentrant checkpoint loses these gradients",
        )
    return frame.values[key.number]


def count(token: Token | None, key: Key) -> int:
    """How often a module was called before in this forward; this call is counted."""
    frame = find(token, key.hops)
    if frame is None:
        raise GraphError(
            f"{key.name!r} is called by itself, so which of its calls this is cannot be known",
            node=key.name,
            hint="call the model as a whole; a body of one call only is meant for the traced forward",
        )
    number = frame.counts.get(key.number, 0)
    frame.counts[key.number] = number + 1
    return number


# ---------------------------------------------------------------------- what checkpointing computes again


def keep_for_recompute() -> None:
    """Lets the checkpointed region that runs now, if any, find its frame again when it is computed again."""
    before = HERE.frame
    if before is not None:
        remember("frame", lambda: _opened(before.copy()))


@contextmanager
def _opened(frame: Frame) -> Iterator[None]:
    outer = HERE.frame
    HERE.frame = frame
    try:
        yield
    finally:
        HERE.frame = outer


def remember(what: object, make: Callable[[], AbstractContextManager[None]]) -> None:
    """Lets the checkpointed region that runs now, if any, run inside a context when it is computed again.

    Args:
        what: what the context brings back; only the first one for each region counts: the state where it began.
        make: called now and gives a function that makes the context at each recomputation.
    """
    if torch.compiler.is_compiling():
        return
    region = _region()
    if region is None:
        return
    known = region.__dict__.setdefault("_adaptergraph", {})
    if what in known:
        return
    known[what] = make
    if len(known) == 1:
        again = region.recompute_fn

        def restored(*args: Any) -> Any:
            return _inside([*known.values()], again, args)

        region.recompute_fn = restored


def _inside(contexts: list[Callable[[], AbstractContextManager[None]]], again: Any, args: Any) -> Any:
    if not contexts:
        return again(*args)
    with contexts[0]():
        return _inside(contexts[1:], again, args)


def _region() -> Any:
    """What torch's checkpoint keeps of the region that runs now; None outside one, and in a reentrant one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    closure = getattr(pack, "__closure__", None)
    if closure is None or "checkpoint" not in getattr(pack, "__module__", ""):
        return None
    cells = dict(zip(pack.__code__.co_freevars, closure, strict=True))
    frame = cells["frame"].cell_contents if "frame" in cells else None
    return frame if isinstance(frame, torch.utils.checkpoint._CheckpointFrame) else None
