"""What is imported during a run on fake tensors is loaded as at any other time: its constants are real. Floor 2."""

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
_RUNS: list[Loading] = []
_OWN: list[Callable[[ModuleSpec], ModuleType]] = []


class Loading:
    """A run under fake tensors, whose mode is left while this thread loads a module.

    Attributes:
        under_way: whether a module is being loaded: what is computed meanwhile is nothing of the run's.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.under_way = False

    def __enter__(self) -> Loading:
        with _LOCK:
            if not _RUNS:
                # all ways to import come here with a module that is not there yet
                _OWN[:] = [_BOOTSTRAP._load_unlocked]
                _BOOTSTRAP._load_unlocked = _load
            _RUNS.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        with _LOCK:
            _RUNS.remove(self)
            if not _RUNS:
                _BOOTSTRAP._load_unlocked = _OWN[0]


def _load(spec: ModuleSpec) -> ModuleType:
    mine = [run for run in _RUNS if run.thread == threading.get_ident() and not run.under_way]
    if not mine:
        return _OWN[0](spec)
    with unset_fake_temporarily():
        for run in mine:
            run.under_way = True
        try:
            return _OWN[0](spec)
        finally:
            for run in mine:
                run.under_way = False
