"""The tensors in what a forward takes and returns: found in any structure, and replaced. Floor 4."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

# what holds no tensor, and what a structure mostly holds
PLAIN = {type(None), bool, int, float, str, type, torch.Size, torch.dtype, torch.device}
_WRITTEN_IN_PYTHON = 1 << 9


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in a structure and the way to each: an index, a key, or `.name` for an attribute."""
    if isinstance(value, Tensor):
        yield path, value
    elif type(value) in PLAIN:
        return
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, (*path, i))
    elif isinstance(value, slice):
        yield from tensors((value.start, value.stop, value.step), path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from tensors(getattr(value, f.name, None), (*path, "." + f.name))


def containers(value: Any) -> Iterator[Any]:
    """What holds parts of a structure and can be written into, at any depth: dicts, lists, dataclasses."""
    inside = None if isinstance(value, Tensor) else _inside(value)
    if inside is not None:
        if not isinstance(value, tuple):
            yield value
        for part in inside:
            yield from containers(part)


def holds(values: Iterable[Any], container: Any) -> bool:
    """Whether a container is among these values, or in one of them, at any depth."""
    for value in values:
        if value is container:
            return True
        if type(value) is not Tensor and (inside := _inside(value)) is not None and holds(inside, container):
            return True
    return False


def _inside(value: Any) -> Iterable[Any] | None:
    """What a structure holds; None for anything else."""
    if type(value) in PLAIN:
        return None
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, dict | Mapping):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    return None


def replaced(value: Any, fn: Callable[[Tensor], Tensor], given: Collection[int] = ()) -> Any:
    """The same structure, tensors replaced where `fn` gives another one; what cannot hold another stays as it is.

    Args:
        given: the ids of dicts and lists that are written into; of any other a copy is, as who made it may keep it.
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        items = [replaced(v, fn, given) for v in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else tuple_like(value, items)
    if type(value) in (list, dict):
        keys = list(value) if type(value) is dict else range(len(value))
        other = {k: new for k in keys if (new := replaced(value[k], fn, given)) is not value[k]}
        if other and id(value) not in given:
            value = value.copy()
        for key, new in other.items():
            value[key] = new
        return value
    if isinstance(value, list):
        value[:] = [replaced(v, fn, given) for v in value]
    elif isinstance(value, MutableMapping):
        for key in list(value):
            new = replaced(value[key], fn, given)
            if new is not value[key]:
                value[key] = new
    elif dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        for name, old in fields.items():
            if (new := replaced(old, fn, given)) is not old:
                value = with_field(value, name, new)
    return value


def is_fixed(value: Any, path: tuple[Any, ...]) -> bool:
    """Whether a tensor lies in something that cannot hold another one: a mapping that is only read."""
    for key in path:
        if isinstance(value, slice) or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
            return True
        value = getattr(value, key[1:]) if isinstance(key, str) and key.startswith(".") else value[key]
    return False


def tuple_like(value: Any, items: list[Any]) -> Any:
    """A tuple of the same class with other items, whatever that class is made from."""
    cls = type(value)
    if not cls.__flags__ & _WRITTEN_IN_PYTHON:
        # also those of torch, such as `torch.return_types.max`
        return cls(items)
    other = tuple.__new__(cls, items)
    for name, kept in getattr(value, "__dict__", {}).items():
        setattr(other, name, kept)
    return other


def with_field(value: Any, name: str, new: Any) -> Any:
    """A dataclass with another value in one field: of a frozen one a copy, which is not initialised again."""
    if value.__dataclass_params__.frozen:
        value = copy.copy(value)
        object.__setattr__(value, name, new)
    else:
        setattr(value, name, new)
    return value
