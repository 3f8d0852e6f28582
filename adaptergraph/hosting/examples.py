"""What the modules of a model are called with: their arguments in one run, as shapes and plain values. Floor 4."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..imported import Imported
from ..tracing.arguments import from_example
from ..tracing.fakes import copy_over, inside
from ..tracing.record import Recorder
from ..tracing.trace import recorded
from .following import is_plain
from .program import Other


@dataclass(frozen=True, slots=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Object:
    """A copy of an object, such as a cache, with `Like` in the place of its tensors."""

    copy: Any


def arguments_of(model: nn.Module, imported: Imported, paths: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """What these modules are called with first, when the model is called as it was when it was traced.

    Returns:
        By path positional and keyword arguments: tensors with random values (whole numbers are zeros), plain values
        as they are, copies of objects, and `Other` for what cannot be copied.
    """
    wanted = dict.fromkeys(paths)
    seen: dict[str, tuple[Any, Any]] = {}

    class Watcher(Recorder):
        """Also notes the arguments."""

        def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
            path = self.paths[id(module)]
            if path in wanted and path not in seen:
                seen[path] = _described(args), _described(kwargs)
            super().enter(module, args, kwargs)

    first = next(model.parameters(), None)
    device = first.device if first is not None and not first.is_meta else None
    if imported.given is not None:
        args, kwargs = imported.given
    else:
        args, kwargs = from_example(model, imported.example or {}, device)
    recorded(model, args, kwargs, Watcher)
    return {path: (_made(args, model, path), _made(kwargs, model, path)) for path, (args, kwargs) in seen.items()}


def _described(value: Any) -> Any:
    """The same with tensors without values."""
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), value.dtype)
    if type(value) in (tuple, list):
        return type(value)(_described(v) for v in value)
    if type(value) is dict:
        return {k: _described(v) for k, v in value.items()}
    if is_plain(value):
        return value
    copied = copy_over(value, _described)
    return Other(type(value).__name__) if inside(copied, Tensor)[0] else Object(copied)


def _made(value: Any, model: nn.Module, path: str) -> Any:
    if isinstance(value, Like):
        own = next(model.get_submodule(path).parameters(), None)
        device = own.device if own is not None else None
        if value.dtype.is_floating_point:
            values = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        else:
            values = torch.full(value.shape, value.dtype == torch.bool)
        return values.to(device=device, dtype=value.dtype)
    if isinstance(value, Object):
        return copy_over(value.copy, lambda like: _made(like, model, path), Like)
    if type(value) in (tuple, list):
        return type(value)(_made(v, model, path) for v in value)
    if type(value) is dict:
        return {k: _made(v, model, path) for k, v in value.items()}
    return value
