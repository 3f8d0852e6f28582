"""What the modules of one forward tell one another: one frame for each forward and thread. Floor 4.

A frame is open while the module that opened it runs. Checkpointing runs a part of a forward again, when the frame is
long closed and maybe in another thread: that part then finds the frame as it was when it began.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from ..errors import GraphError


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

    __slots__ = ("counts", "lost", "outer", "token", "values", "without_grad")

    def __init__(self, token: Token | None, outer: Frame | None) -> None:
        self.token = token
        self.outer = outer
        self.values: dict[int, Tensor] = {}
        self.without_grad: dict[int, bool] = {}
        self.lost: set[int] = set()
        self.counts: dict[int, int] = {}

    def copy(self) -> Frame:
        """The same as it is now, with the frames around it."""
        twin = Frame(self.token, self.outer.copy() if self.outer is not None else None)
        twin.values.update(self.values)
        twin.without_grad.update(self.without_grad)
        twin.counts.update(self.counts)
        twin.lost.update(self.lost)
        return twin

    def cut(self) -> None:
        """Marks the values whose gradients a reentrant region loses: it knows those of its arguments only."""
        self.lost |= {number for number, value in self.values.items() if value.requires_grad}
        if self.outer is not None:
            self.outer.cut()


class _Here(threading.local):
    # set in each thread at once, so that compiled code finds the same attributes at every call
    def __init__(self) -> None:
        self.frame: Frame | None = None


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
        frame.lost.discard(key.number)


def read(token: Token | None, key: Key) -> Tensor:
    """A value that was noted in this forward.

    Raises:
        GraphError: it was not computed in this forward, or without the gradients that are wanted of it.
    """
    frame = find(token, key.hops)
    if frame is None or key.number not in frame.values:
        raise _not_computed(key, frame is not None)
    value = frame.values[key.number]
    # what a reentrant checkpoint returns was computed without gradients, and has them all the same; what differs from
    # layer to layer is asked last, so that compiled code of one layer serves the others
    if torch.is_grad_enabled() and (
        key.number in frame.lost or (frame.without_grad[key.number] and not value.requires_grad and key.trained)
    ):
        raise GraphError(
            f"a body reads {key.name!r}, and gradients that go through it would be lost",
            node=key.name,
            hint="checkpoint with use_reentrant=False, and compute what is trained with gradients",
        )
    return value


def _not_computed(key: Key, running: bool) -> GraphError:
    """A value is missing: in a forward that did not come to it, or where no forward of all that it needs is running."""
    whole = "call the model as a whole: a part that is called by itself has only its own values"
    skipped = (
        "its module was not called this time: set what skips layers at random while training (layerdrop, stochastic "
    )
    return GraphError(
        f"a body reads {key.name!r}, which was not computed in this forward",
        node=key.name,
        hint=f"{skipped}depth) to 0;\nif it was called by itself before, {whole}" if running else whole,
    )


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
    """Lets the checkpointed regions that run now, if any, find the frame again when they are computed again."""
    if not torch.compiler.is_compiling():
        remember("frame", _as_it_is)


def _as_it_is(reentrant: bool) -> Callable[[], AbstractContextManager[None]]:
    kept = HERE.frame.copy() if HERE.frame is not None else None
    if reentrant and kept is not None:
        kept.cut()
    return lambda: _opened(kept.copy() if kept is not None else None)


@contextmanager
def _opened(frame: Frame | None) -> Iterator[None]:
    outer = HERE.frame
    HERE.frame = frame
    try:
        yield
    finally:
        HERE.frame = outer


def remember(what: object, make: Callable[[bool], Callable[[], AbstractContextManager[None]]]) -> None:
    """Lets the checkpointed regions that run now, if any, run inside a context when they are computed again.

    Args:
        what: what the context brings back; only the first one for each region counts: the state where it began.
        make: called now, with whether the region is a reentrant one; gives what makes the context of a recomputation.
    """
    for regions in (_regions(), _reentrant_regions()):
        for region, attribute in regions:
            known = region.__dict__.setdefault("_adaptergraph", {})
            if what in known:
                break
            if not known:
                setattr(region, attribute, functools.partial(_again, known, getattr(region, attribute)))
            known[what] = make(attribute == "run_function")


def _again(known: Mapping[object, Callable[[], AbstractContextManager[None]]], run: Any, *args: Any) -> Any:
    with ExitStack() as contexts:
        for make in known.values():
            contexts.enter_context(make())
        return run(*args)


def running_backward() -> int:
    """The number of the backward pass that runs in this thread; -1 if none does."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _regions() -> list[tuple[Any, str]]:
    """What torch's checkpoint keeps of the regions that run now, innermost first, and where what runs them again is.

    Torch has no public way to it. Where it cannot be found nothing is remembered, and what is computed again finds no
    frame and no task, which is an error.
    """
    autograd = torch._C._autograd
    found: list[tuple[Any, str]] = []
    taken = []
    while hooks := autograd._top_saved_tensors_default_hooks(True):
        taken.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(taken):
        autograd._push_saved_tensors_default_hooks(pack, unpack)
    for pack, _ in taken:
        code, closure = getattr(pack, "__code__", None), getattr(pack, "__closure__", None)
        if code is not None and closure and "frame" in code.co_freevars:
            frame = closure[code.co_freevars.index("frame")].cell_contents
            if isinstance(frame, checkpoint._CheckpointFrame):
                found.append((frame, "recompute_fn"))
    return found


def _reentrant_regions() -> list[tuple[Any, str]]:
    """The same for reentrant checkpoints, which run a region without gradients."""
    found: list[tuple[Any, str]] = []
    # the forward of an autograd function, which a reentrant checkpoint is, runs without forward gradients
    if torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return found
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT:
            found.append((frame.f_locals["ctx"], "run_function"))
        frame = frame.f_back
    return found


_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
