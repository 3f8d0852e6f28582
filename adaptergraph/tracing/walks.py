"""Over which modules a forward walks and computes with what it finds: a body there would be one more of it. Floor 4."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, MethodType
from typing import Any

from torch import nn

# what all other ways to walk go through, and whether it comes to more than children
_WALKS = {"named_children": False, "named_modules": True, "named_parameters": True}


@dataclass(slots=True, eq=False)
class _Walk:
    """One walk over a module: what it has come to, and whether anything was done with that."""

    path: str
    deep: bool
    at: Any = None
    used: bool = False


class Walks:
    """The walks of one run, by `modules()`, `children()`, `parameters()` and what goes through these.

    A walk that only looks, for a dtype, a device or a hook, does not count: what it comes to must be called, or read by
    an operation, before the next step. Nor does one that stops there. Whether there is anything at all to find is asked
    of a module in order to call it or not, so this counts where the module is called before the one who asked returns.

    Attributes:
        found: the modules by path, and whether all below is walked over or the children only.
    """

    def __init__(self) -> None:
        self.found: dict[str, bool] = {}
        self.under_way: list[_Walk] = []
        self._empty: dict[int, list[tuple[_Walk, CodeType]]] = {}
        self._inside = False
        self._paths: dict[int, str] = {}

    def watch(self, modules: Mapping[str, nn.Module]) -> None:
        """Sees from now on who walks over these modules."""
        self._paths = {id(m): path for path, m in modules.items()}
        watched = functools.cache(self._watched)
        for module in modules.values():
            for name, deep in _WALKS.items():
                # a bound method is another one on a copy of the module
                vars(module)[name] = MethodType(watched(getattr(type(module), name), deep), module)

    def _watched(self, own: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        def walk(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            found, path = own(module, *args, **kwargs), self._paths.get(id(module))
            own_only = kwargs.get("recurse") is False or args[1:2] == (False,)
            # a walk is made of others
            if self._inside or own_only or path is None or not isinstance(found, Iterator):
                return found
            return self._steps(found, module, _Walk(path, deep), _asker())

        return walk

    def _steps(self, found: Iterator[Any], module: nn.Module, walk: _Walk, asker: CodeType | None) -> Iterator[Any]:
        while True:
            self._inside = True
            try:
                step = next(found, None)
            finally:
                self._inside = False
            if walk.used:
                self._note(walk)
            if step is None:
                break
            walk.at = step[1]
            self.under_way.append(walk)
            try:
                yield step
            finally:
                self.under_way.remove(walk)
        if walk.at is None and asker is not None:
            self._empty.setdefault(id(module), []).append((walk, asker))

    def used(self, what: Any) -> None:
        """A module is called, or an operation reads a parameter."""
        for walk in self.under_way:
            walk.used |= walk.at is what
        for walk, asker in self._empty.get(id(what), ()):
            if asker in _running():
                self._note(walk)

    def _note(self, walk: _Walk) -> None:
        self.found[walk.path] = self.found.get(walk.path, False) or walk.deep


def _running() -> Iterator[CodeType]:
    """The code of this call, of the one that made it, and so on."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back  # type: ignore[assignment]


def _asker() -> CodeType | None:
    """The code that began a walk; None for torch's own, which looks for hooks."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") == nn.Module.__module__ or frame.f_code.co_name.startswith("<"):
        assert frame.f_back is not None
        frame = frame.f_back
    return None if frame.f_globals.get("__name__", "").startswith("torch.") else frame.f_code
