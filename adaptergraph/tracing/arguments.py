"""The arguments of a forward: by name, as its signature says; as plain data for tracing again; and back. Floor 4."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .memory import form


def bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, as forward's signature says; the second of `*xs` is `xs_1`."""
    return by_name(inspect.signature(module.forward), args, kwargs)


def by_name(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of a signature."""
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{i}": v for i, v in enumerate(value)})
        else:
            named[name] = value
    return named


def as_given(signature: inspect.Signature, named: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The way back from `by_name`: by keyword, and by position what has no other way."""
    args: list[Any] = []
    kwargs = dict(named)
    parameters = signature.parameters.values()
    several = any(p.kind is p.VAR_POSITIONAL and f"{p.name}_0" in kwargs for p in parameters)
    for p in parameters:
        if p.kind is p.VAR_POSITIONAL:
            more = [key for i in range(len(kwargs)) if (key := f"{p.name}_{i}") in kwargs]
            args += [kwargs.pop(key) for key in more]
        elif p.name in kwargs and (p.kind is p.POSITIONAL_ONLY or (several and p.kind is p.POSITIONAL_OR_KEYWORD)):
            args.append(kwargs.pop(p.name))
    return args, kwargs


def example_of(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments of a call as shapes and plain values, for tracing again; None where that is not enough."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, dtype = form(value)
            return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError

    try:
        return {name: plain(value) for name, value in bound(model, args, kwargs).items()}
    except (TypeError, ValueError):
        return None


def from_example(model: nn.Module, example: Mapping[str, Any], device: Any = None) -> tuple[list[Any], dict[str, Any]]:
    """Arguments such as those of an example, to call the model with: tensors are zeros."""

    def made(value: Mapping[str, Any]) -> Any:
        if "shape" not in value:
            return value["value"]
        return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)

    return as_given(inspect.signature(model.forward), {name: made(value) for name, value in example.items()})


def described(value: Any) -> str:
    """An argument on one line, for messages."""
    if not isinstance(value, Tensor):
        return _short(value)
    return f"{_form(value)} {value.dtype} on {value.device}"


def _form(value: Tensor) -> Any:
    return "nested" if value.is_nested else tuple(value.shape)


def _short(value: Any) -> str:
    """A value on one line; of tensors in a list or dict only their shapes."""
    if isinstance(value, Tensor):
        return f"<{_form(value)} {value.dtype}>"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_short, value[:4])) + ", …" * (len(value) > 4)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {_short(v)}" for k, v in value.items()) + "}"
    return " ".join(repr(value).split())[:60]
