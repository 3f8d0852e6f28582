"""Which branch of a `Switch` runs: the module behind the method. Floor 4.

A switch keeps its choice itself, in a slot with one value for each thread, and always as the module that is to run:
for `torch.compile` that is an input like any other, so that equal branches are one compiled program.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GraphError, Source, here
from .hosting import frames


@dataclass(frozen=True, slots=True)
class Rows:
    """One task for each row of the batch: their names, and their numbers among the tasks of one switch."""

    tasks: tuple[str, ...]
    numbers: Tensor


Chosen = tuple[nn.Module | None, Rows | None, int, FrameType | None]

_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(slots=True, eq=False)
class Block:
    """A `with` block that is open, in the thread where it was entered."""

    there: Running
    chosen: Chosen

    def leave(self) -> None:
        """Takes it away, whichever others are open; the innermost of them counts."""
        self.there.blocks.remove(self)
        self.there.restore(self.there.blocks[-1].chosen if self.there.blocks else (None, None, -1, None))


class Running:
    """What runs in one thread: a branch, or one for each row.

    Attributes:
        branch: the module that runs.
        rows: or what runs for each row.
        backward: the backward pass in which it was chosen; -1 outside one.
        opener: the generator or coroutine whose block chose it; None if it is not one.
        blocks: those that are open, innermost last.
    """

    def __init__(self) -> None:
        self.branch: nn.Module | None = None
        self.rows: Rows | None = None
        self.backward = -1
        self.opener: FrameType | None = None
        self.blocks: list[Block] = []

    def choose(self, branch: nn.Module | None, rows: Rows | None) -> Chosen:
        """Lets this run during one call, and gives what `restore` brings back."""
        before = self.branch, self.rows, self.backward, self.opener
        self.restore((branch, rows, frames.running_backward(), None))
        return before

    def restore(self, before: Chosen) -> None:
        """What was chosen before."""
        self.branch, self.rows, self.backward, self.opener = before

    def replace(self, was: nn.Module, now: nn.Module) -> None:
        """Lets a branch run that was put in the place of another one."""
        self.branch = now if self.branch is was else self.branch
        for block in self.blocks:
            block.chosen = (now if block.chosen[0] is was else block.chosen[0], *block.chosen[1:])

    def enter(self, branch: nn.Module | None, rows: Rows | None, opener: FrameType | None) -> Block:
        """Lets this run until the block is left."""
        block = Block(self, (branch, rows, frames.running_backward(), opener))
        self.blocks.append(block)
        self.restore(block.chosen)
        return block

    def suspended(self) -> FrameType | None:
        """The generator or coroutine that is suspended inside the innermost block, so that others run meanwhile.

        One that has returned, and left its block to whoever holds it, is not.
        """
        if self.opener is not None and self.opener.f_back is None:
            if dis.opname[self.opener.f_code.co_code[self.opener.f_lasti]] not in ("RETURN_VALUE", "RETURN_CONST"):
                return self.opener
            self.opener = None
        return None


class Slot(threading.local):
    """Finds what runs in this thread. A copy starts empty.

    What changes is in an object of its own: compiled code does not write attributes of a `threading.local` back.
    """

    def __init__(self) -> None:
        self.here = Running()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()


def opener() -> FrameType | None:
    """The innermost generator or coroutine that runs; functions of `contextlib.contextmanager` are not meant."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        outer = frame.f_back
        of_contextlib = any(f is not None and f.f_globals.get("__name__") == "contextlib" for f in (frame, outer))
        if frame.f_code.co_flags & _SUSPENDS and not of_contextlib:
            return frame
        frame = outer
    return None


class Switch(nn.Module):
    """The branches of one site by task, of which the chosen one runs; made by `graph.compile`.

    Attributes:
        adaptergraph_path: where it is, for messages.
        adaptergraph_default: the branch that runs where nothing else is chosen.
        adaptergraph_slot: what is chosen in each thread.
    """

    adaptergraph_default: nn.Module | None

    def __init__(self, path: str, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.adaptergraph_path = path
        self.adaptergraph_slot = Slot()
        self._modules.update(branches)
        self.be_default(next(iter(branches)) if len(branches) == 1 else None)

    def be_default(self, task: str | None) -> None:
        """Lets this task run where nothing else is chosen."""
        self.__dict__["adaptergraph_default"] = None if task is None else self._modules[task]

    def __setattr__(self, name: str, value: Any) -> None:
        was = self._modules.get(name)
        super().__setattr__(name, value)
        self._follow(was, self._modules.get(name))

    def __delattr__(self, name: str) -> None:
        was = self._modules.get(name)
        super().__delattr__(name)
        self._follow(was, None)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch, where it may replace a module too."""
        was = self._modules.get(name)
        super().add_module(name, module)
        self._follow(was, module)

    def _follow(self, was: nn.Module | None, now: nn.Module | None) -> None:
        """A branch in the place of another one runs where that one was chosen: by default, in blocks of this thread."""
        if was is None:
            return
        if self.adaptergraph_default is was:
            self.__dict__["adaptergraph_default"] = now
        if now is not None:
            self.adaptergraph_slot.here.replace(was, now)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        slot = self.adaptergraph_slot.here
        if not torch.compiler.is_compiling():
            if frames.running_backward() != slot.backward:
                raise _not_known(self)
            if slot.opener is not None and (frame := slot.suspended()) is not None:
                raise whose_call(self, frame)
            frames.remember(self, self._as_it_is)
        if slot.rows is not None:
            by_row = self._all if torch.compiler.is_compiling() else self._grouped
            return by_row(slot.rows, (x, *more))
        branch = slot.branch if slot.branch is not None else self.adaptergraph_default
        if branch is None:
            raise _not_chosen(self)
        return branch(x, *more)

    def _as_it_is(self, _: bool) -> Callable[[], AbstractContextManager[None]]:
        """What is chosen now, for a checkpointed region that is computed again."""
        slot = self.adaptergraph_slot.here
        branch = slot.branch if slot.branch is not None or slot.rows is not None else self.adaptergraph_default
        return functools.partial(_restored, self.adaptergraph_slot, branch, slot.rows)

    def _grouped(self, rows: Rows, given: tuple[Tensor, ...]) -> Tensor:
        """Each branch on its rows, put back in order."""
        _check_rows(self, rows, given[0])
        order, parts = [], []
        for task in dict.fromkeys(rows.tasks):
            own = torch.tensor([i for i, name in enumerate(rows.tasks) if name == task], device=given[0].device)
            order.append(own)
            parts.append(self._modules[task](*(x.index_select(0, own) for x in given)))  # type: ignore[misc]
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def _all(self, rows: Rows, given: tuple[Tensor, ...]) -> Tensor:
        """Every branch on all rows, and each row keeps its own: a compiled program does not depend on who is where."""
        x = given[0]
        _check_rows(self, rows, x)
        numbers = rows.numbers.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
        out = x
        for number, branch in enumerate(self._modules.values()):
            out = torch.where(numbers == number, branch(*given), out)  # type: ignore[misc]
        return out

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return "tasks: " + ", ".join(self._modules)


@contextmanager
def _restored(slot: Slot, branch: nn.Module | None, rows: Rows | None) -> Iterator[None]:
    running = slot.here
    before = running.choose(branch, rows)
    try:
        yield
    finally:
        running.restore(before)


def _check_rows(switch: Switch, rows: Rows, x: Tensor) -> None:
    if x.shape[0] != rows.numbers.shape[0]:
        path = switch.adaptergraph_path
        raise GraphError(
            f"{rows.numbers.shape[0]} tasks were given for {x.shape[0]} rows at {path!r}",
            node=path,
            sides=[("rows", "the first dimension", "of the value at the host: " + " × ".join(map(str, x.shape)))],
            hint="give one task, or one for each row of the batch; generate(num_beams=n) makes n rows of each: repeat "
            "each task n times\nwhere the sequence comes first, rows are its steps: give one task, or splice where the "
            "batch comes first",
        )


def _not_chosen(switch: Switch) -> GraphError:
    return GraphError(
        f"no task is chosen at {switch.adaptergraph_path!r}",
        node=switch.adaptergraph_path,
        sides=[("tasks", ", ".join(switch._modules))],
        hint='model(…, task="…"), or with ag.task(model, "…"), or ag.set_task(model, "…")',
    )


def whose_call(switch: Switch, frame: FrameType) -> GraphError:
    """A generator or coroutine is suspended inside a block, and somebody else wants to run."""
    return GraphError(
        f"which task is to run at {switch.adaptergraph_path!r} is not known: a generator or coroutine is suspended "
        "inside its block",
        node=switch.adaptergraph_path,
        sides=[(frame.f_code.co_name, f"waits at {Source(frame.f_code.co_filename, frame.f_lineno)}")],
        source=here(),
        hint='no yield or await inside such a block; model(…, task="…") always runs its own',
    )


def _not_known(switch: Switch) -> GraphError:
    return GraphError(
        f"{switch.adaptergraph_path!r} runs in a backward pass, and which task it is to run is not known there",
        node=switch.adaptergraph_path,
        hint="do not compile what a checkpoint computes again; or call the model with task= inside the checkpoint",
    )
