"""Which memory a tensor shows, which part of it, and what writes into it. Floor 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

from ..axes import op_name
from .parts import tensors


def can_be_viewed(tensor: Tensor) -> bool:
    """Whether another tensor can show the same memory."""
    return tensor.layout == torch.strided and not tensor.is_nested


def form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape and dtype of a tensor.

    Raises:
        ValueError: it is nested, and says no shape.
    """
    try:
        return tuple(tensor.shape), tensor.dtype
    except RuntimeError:
        raise ValueError("a nested tensor says no shape: make it with layout=torch.jagged, which does") from None


def another(tensor: Tensor) -> Tensor:
    """A second tensor over the same elements."""
    if type(tensor) is FakeTensor and tensor.constant is None and not tensor.requires_grad:
        # as `view_as` gives, in a sixth of the time: nothing needs to be found out about it
        with in_kernel_invocation_manager(tensor.fake_mode):
            elements = tensor.detach()
        return FakeTensor(tensor.fake_mode, elements, tensor.fake_device)
    return tensor.view_as(tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to."""
    try:
        return tensor._version
    except RuntimeError:
        # an inference tensor counts none
        return 0


def storage(tensor: Tensor) -> int:
    """What tells the memory of a tensor from all others."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def keeper(tensor: Tensor) -> Any:
    """What keeps the memory of a tensor, also where the tensor is given another one."""
    return tensor.untyped_storage() if can_be_viewed(tensor) and storage(tensor) != -id(tensor) else tensor


def place(tensor: Tensor) -> Any:
    """Which elements of its storage a tensor shows; None where that cannot be said."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors over one storage may share elements."""
    if place(a) is None or place(b) is None:
        return True
    (first, last), (start, end) = _extent(a), _extent(b)
    return first <= end and start <= last


def _extent(tensor: Tensor) -> tuple[Any, Any]:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return tensor.storage_offset() * size, (tensor.storage_offset() + steps) * size


def written(func: Any, args: Any, kwargs: Any, changed: list[Tensor], outs: list[Any]) -> list[Tensor]:
    """Those that a function wrote into: tensors over one storage count their changes together."""
    if _replaces(func):
        return [args[0]]
    if args and isinstance(args[0], list | tuple) and op_name(func).endswith("_"):
        # `torch._foreach_mul_` and its like: of fake tensors in lists no version counts this
        return [t for _, t in tensors(args[0])]
    if len(changed) < 2:
        return changed
    target = [args[0]] if func is Tensor.__setitem__ else []
    target += [t for _, t in tensors(kwargs.get("out"))] + [t for _, t in outs]
    return [t for t in changed if any(t is g for g in target)] or changed


def _replaces(func: Any) -> bool:
    """Whether a function gives its first argument other memory, which no version counts."""
    return getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__"
