"""What lowered code has as it was: what a forward reads off its module beside tensors, looked at in each call. Floor 4.

Such as a scale, a mode, a number of heads in a config: numbers, words and functions, on the module itself, in its lists
and dicts, in objects, on the modules inside.
"""

from __future__ import annotations

import dis
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .hosted import hosted_class
from .program import MISSING, Setting

_PLAIN = (bool, int, float, complex, str, bytes, range, Enum, torch.dtype, torch.device)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
# what each module has, or is given for a time; its children are looked at by their names
_OWN = {*vars(nn.Module()), "forward"}
# how many objects deep
_DEPTH = 4


def settings_of(module: nn.Module, run: Callable[[], Any]) -> tuple[list[Setting], Any]:
    """The settings that a forward of a module may read, and what the run of that forward returned.

    Args:
        run: the forward; every function of Python that it calls is looked at, but for the modules inside.
    """
    codes, result = _executed(run)
    # what a class puts around the forwards of its subclasses, as layers that checkpoint themselves do, is around ours
    codes.discard(getattr(vars(hosted_class(type(module)))["forward"], "__code__", None))
    asked = {name for code in codes for name in _asked(code)}
    found = list(_Reader({name for code in codes for name in code.co_names} | asked).on_object(module, (), 0))
    own = set(dir(module))
    found += [Setting((name,), MISSING) for name in sorted(asked) if name not in own]
    return found, result


def _executed(run: Callable[[], Any]) -> tuple[set[types.CodeType], Any]:
    """The code of all functions that ran, without what modules ran when they were called."""
    codes: set[types.CodeType] = set()
    call = nn.Module._wrapped_call_impl.__code__
    depth = 0

    def note(frame: types.FrameType, event: str, arg: Any) -> None:
        nonlocal depth
        if depth:
            depth += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call":
            if frame.f_code is call:
                depth = 1
            else:
                codes.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = run()
    finally:
        sys.setprofile(before)
    return codes, result


def _asked(code: types.CodeType) -> Iterator[str]:
    """The names that code asks for by `getattr` and `hasattr`."""
    waiting = False
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            waiting = step.argval in ("getattr", "hasattr")
        elif waiting and isinstance(step.argval, str) and step.opname == "LOAD_CONST":
            waiting = False
            yield step.argval


class _Reader:
    """Walks over what code can come to by the names that it reads."""

    def __init__(self, read: set[str]) -> None:
        self.read = sorted(name for name in read - _OWN if not name.startswith("__"))
        self.seen: set[int] = set()

    def on_object(self, holder: Any, place: tuple[Any, ...], depth: int) -> Iterator[Setting]:
        """The attributes of an object, and of its class; each object once."""
        if id(holder) in self.seen or depth > _DEPTH:
            return
        self.seen.add(id(holder))
        state = getattr(holder, "__dict__", {})
        for name in self.read:
            if name in state:
                yield from self.in_value(state[name], (*place, name), depth)
            elif isinstance(holder, nn.Module) and name in holder._modules:
                yield from self.in_value(holder._modules[name], (*place, name), depth)
            elif isinstance(value := inspect.getattr_static(type(holder), name, None), _PLAIN):
                yield Setting((*place, name), value)
        if isinstance(holder, nn.ModuleList | nn.Sequential):
            for name, child in holder._modules.items():
                yield from self.in_value(child, (*place, name), depth)

    def in_value(self, value: Any, place: tuple[Any, ...], depth: int) -> Iterator[Setting]:
        """The settings in the value of an attribute."""
        if value is None or isinstance(value, (*_PLAIN, *_FUNCTIONS)):
            yield Setting(place, value)
        elif isinstance(value, list | tuple | dict):
            if id(value) not in self.seen and depth <= _DEPTH:
                self.seen.add(id(value))
                yield Setting((*place, len), len(value))
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    yield from self.in_value(item, (*place, (key,)), depth + 1)
        elif isinstance(value, set | frozenset):
            yield Setting(place, frozenset(value))
        elif isinstance(value, nn.Module):
            # called where it stands, whatever it is
            yield from self.on_object(value, place, depth + 1)
        elif not isinstance(value, Tensor | type | types.ModuleType):
            yield Setting((*place, type), type(value))
            yield from self.on_object(value, place, depth + 1)
