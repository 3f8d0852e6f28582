"""What a forward imports while it is traced is loaded as at any other time: its constants are real tensors. Floor 4."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily

_BOOTSTRAP: Any = importlib._bootstrap
_LOCK = threading.Lock()
# of all threads; and what loads a module while none is under way
_UNDER_WAY: list[Imports] = []
_OWN: list[Callable[[ModuleSpec], ModuleType]] = []


class Imports:
    """A run under fake tensors, whose mode is left while this thread loads a module.

    Attributes:
        loading: whether a module is being loaded: what is computed meanwhile is nothing of the forward's.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.loading = False

    def __enter__(self) -> Imports:
        with _LOCK:
            if not _UNDER_WAY:
                # all ways to import come here with a module that is not there yet
                _OWN[:] = [_BOOTSTRAP._load_unlocked]
                _BOOTSTRAP._load_unlocked = _load
            _UNDER_WAY.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        with _LOCK:
            _UNDER_WAY.remove(self)
            if not _UNDER_WAY:
                _BOOTSTRAP._load_unlocked = _OWN[0]


def _load(spec: ModuleSpec) -> ModuleType:
    mine = [run for run in _UNDER_WAY if run.thread == threading.get_ident() and not run.loading]
    if not mine:
        return _OWN[0](spec)
    with unset_fake_temporarily():
        for run in mine:
            run.loading = True
        try:
            return _OWN[0](spec)
        finally:
            for run in mine:
                run.loading = False
