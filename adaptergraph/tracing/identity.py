"""Whether a forward goes another way where a tensor is not the very object it was before. Floor 4.

A body makes another tensor of what a module hands through, and a recorder gives each call tensors of its own: a forward
that asks `one is other` may then take another branch than the model does. Few forwards ask at all, which their code
says; those are run once more with the model's own objects, and both runs are to do the same.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import GraphError, here
from .memory import keeper, place, storage

Event = tuple[str, str, tuple[int, ...], tuple[Any, ...]]


class Events:
    """What a run did: each operation, in which call, and which tensors it was given, by what they show of a memory."""

    def __init__(self) -> None:
        self.found: list[Event] = []
        self.numbers: dict[Any, int] = {}
        # keeps memory alive, so that no other takes its place
        self.alive: list[Any] = []

    def number(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """What tells tensors from those over other elements: the same in each run of a model."""
        found = list(tensors)
        self.alive += [k for t in found for k in (t, keeper(t))]
        return tuple(self.numbers.setdefault((storage(t), place(t)), len(self.numbers)) for t in found)

    def note(self, scope: str, operation: str, given: Iterable[Tensor], more: Iterable[Any]) -> None:
        """An operation is about to run, on these tensors; of what else it is given plain values count."""
        plain = tuple(v for v in more if type(v) in (bool, int, float, str))
        self.found.append((scope, operation, self.number(given), plain))

    def forget(self) -> None:
        """Lets go of every tensor."""
        self.alive, self.numbers = [], {}


def goes_another_way(model: nn.Module, asked: list[str], own: list[Event], traced: list[Event]) -> GraphError:
    """The refusal of a model that does something else with its own objects than with tensors of each call's own.

    It says what each run does where they part, and which code asks.
    """
    mine, there = _parting(own, traced)
    return GraphError(
        f"the forward of {type(model).__name__} asks whether two tensors are one object, and goes another way if not",
        node=mine[0] or None,
        sides=[("by itself", _place(mine)), ("in a trace", _place(there, mine)), *(("asks", a) for a in asked[:3])],
        source=here(),
        hint="a body makes another tensor of what a module hands through: let it ask for a setting, not `is` or id()",
    )


def moves_memory(model: nn.Module, scope: str) -> GraphError:
    """The refusal of a model that asks for the address of one memory before and after a place for a body."""
    return GraphError(
        f"the forward of {type(model).__name__} asks for the address of one memory before and after {scope!r}, "
        "and a body there makes another of it",
        node=scope,
        source=here(),
        hint="let it ask for a setting, not data_ptr()",
    )


def unlike_itself(model: nn.Module, asked: list[str], own: list[Event], again: list[Event]) -> GraphError:
    """The refusal of a model that does something else in each run, so that none of them can be compared."""
    one, other = _parting(own, again)
    return GraphError(
        f"the forward of {type(model).__name__} does something else each time it runs, and code in it asks whether two "
        "objects are one: whether it would go another way with a body is not known",
        node=one[0] or None,
        sides=[("in one run", _place(one)), ("in the next", _place(other, one)), *(("asks", a) for a in asked[:3])],
        source=here(),
        hint="let it draw from the global generators of torch, Python or numpy, which begin each run of a trace alike, "
        "and count nothing while it is traced",
    )


def _parting(one: list[Event], other: list[Event]) -> tuple[Event, Event]:
    """What each of two runs does where they part."""
    end: Event = ("", "the end", (), ())
    return next((a, b) for a, b in zip([*one, end], [*other, end], strict=False) if a != b)


def _place(event: Event, than: Event | None = None) -> str:
    place = f"{event[1]} in {event[0]!r}" if event[0] else event[1]
    return place if than is None or event[:2] != than[:2] else f"{place}, which reads another value"


def asking(modules: Iterable[nn.Module]) -> list[str]:
    """Where the forwards of modules, and the functions that they name, compare variables by identity."""
    waiting: list[tuple[Any, Any]] = []
    for cls, forward in {(type(m), getattr(m.forward, "__func__", m.forward)) for m in modules}:
        methods = {n: v for c in reversed(cls.__mro__) if c is not nn.Module for n, v in vars(c).items()}
        waiting.append((methods, forward))
    seen: set[types.FunctionType] = set()
    found: set[str] = set()
    while waiting:
        methods, given = waiting.pop()
        function = _function(given)
        if function is None or function in seen or _is_foreign(function):
            continue
        seen.add(function)
        names, lines = _scanned(function.__code__)
        found |= {f"{function.__qualname__}, {Path(function.__code__.co_filename).name}:{line}" for line in lines}
        for cell in function.__closure__ or ():
            with suppress(ValueError):
                waiting.append((methods, cell.cell_contents))
        for name in names:
            if name in methods:
                waiting.append((methods, methods[name]))
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType):
                waiting += [({}, vars(value)[n]) for n in names if n in vars(value)]
            elif value is not None:
                waiting.append(({}, value))
    return sorted(found)


def _function(value: Any) -> types.FunctionType | None:
    """The function that is run where this is called; None if it is no function of Python's."""
    while not isinstance(value, types.FunctionType):
        if isinstance(value, functools.partial):
            value = value.func
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, types.MethodType | classmethod | staticmethod):
            value = value.__func__
        elif isinstance(value, functools._lru_cache_wrapper):
            value = value.__wrapped__
        else:
            return None
    return value


def _is_foreign(function: types.FunctionType) -> bool:
    """Whether a function is of Python or of torch's core: no code that decides what a model does."""
    module = function.__module__ or ""
    return module.partition(".")[0] in sys.stdlib_module_names or (
        module.startswith("torch.") and not module.startswith(("torch.nn.functional", "torch.nn.modules."))
    )


@functools.lru_cache(2000)
def _scanned(code: types.CodeType) -> tuple[frozenset[str], tuple[int, ...]]:
    """The names that the code of a function uses, and the lines where it compares."""
    codes = list(_codes(code))
    names = frozenset(name for inner in codes for name in inner.co_names)
    return names, tuple(line for inner in codes for line in _lines(inner, code.co_freevars))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


_IS = dis.opmap["IS_OP"]


def _lines(code: types.CodeType, fixed: Collection[str]) -> Iterator[int]:
    """Where a code compares by identity with what is no constant, no global, and not fixed before all calls."""
    if "id" in code.co_names or "hash" in code.co_names:
        yield code.co_firstlineno
    # every second byte is an instruction
    if _IS not in code.co_code[::2]:
        return
    before: list[dis.Instruction] = []
    for step in dis.get_instructions(code):
        if step.opcode == _IS:
            root = next(s for s in reversed(before) if s.opname != "LOAD_ATTR")
            outer = root.opname == "LOAD_DEREF" and root.argval in fixed
            if not outer and not root.opname.startswith(("LOAD_CONST", "LOAD_GLOBAL")):
                yield (step.positions.lineno if step.positions else None) or code.co_firstlineno
        if step.opname != "CACHE":
            before.append(step)
