"""Tensors without values in the place of a model's own, and out of the caches where they were left. Floor 4."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import _lru_cache_wrapper
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from ..node import EMPTY
from .parts import tensors

# a part of the model or of a library, never of one call
_SHARED = (type, nn.Module, FunctionType, ModuleType)


# whose real kernels take tensors of one dtype only, and whose fake ones take any
_ONE_DTYPE = {"linear", "matmul", "mm", "mv", "addmm", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


class OtherDtype(RuntimeError):
    """An operation was given a tensor of another dtype than a parameter that it reads."""

    def __init__(self, operation: str, given: torch.dtype, name: str, wanted: torch.dtype) -> None:
        super().__init__(f"{operation} is given {given}, and reads {name!r}, which is {wanted}")
        self.given, self.wanted = given, wanted


def refuse_other_dtype(operation: str, given: list[Tensor], parameters: Mapping[int, str]) -> None:
    """Refuses what a fake kernel takes and a real one does not.

    Raises:
        OtherDtype: and names the parameter.
    """
    if operation not in _ONE_DTYPE or torch._C._is_any_autocast_enabled():
        return
    for own in (t for t in given if id(t) in parameters):
        for other in (t for t in given if t.dtype != own.dtype):
            raise OtherDtype(operation, other.dtype, parameters[id(own)], own.dtype)


class Fakes(FakeTensorMode):
    """Tensors without values; a kernel whose fake twin knows bfloat16 only gives what it would give in that dtype."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = EMPTY) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in ("bf16", "bfloat16")):
                raise
        with self:
            halved = tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, (args, kwargs))
        out = super().__torch_dispatch__(func, types, *halved)
        dtype = next(t.dtype for _, t in tensors((args, kwargs)) if t.is_floating_point())
        with self:
            return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, out)


class Faker:
    """Fake twins of tensors, one for each tensor."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.made_of: list[Tensor] = []
        self.twins: dict[int, Any] = {}
        self.further: list[Any] = []

    def __call__(self, tensor: Tensor) -> Any:
        if id(tensor) not in self.twins:
            # keeps the tensor alive, so that its id stays its own
            self.made_of.append(tensor)
            self.twins[id(tensor)] = self.made(tensor)
        return self.twins[id(tensor)]

    def given(self, tensor: Tensor) -> Any:
        """A twin for one place among the arguments: another one for each, unless the tensor is the model's own."""
        if id(tensor) in self.twins:
            return self.twins[id(tensor)]
        self.further.append(self.made(tensor))
        return self.further[-1]

    def made(self, tensor: Tensor) -> Any:
        """A tensor of the same shape without values."""
        if tensor.layout != torch.strided:
            twin: Any = self.mode.from_tensor(tensor)
        else:
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            twin = FakeTensor(self.mode, empty, device)
        if isinstance(tensor, nn.Parameter):
            # as nn.Parameter marks a tensor of another class, without a detached copy of it
            twin._is_param = True
        return twin

    def swap(self, modules: Iterable[nn.Module]) -> None:
        """Puts twins in the place of the parameters, buffers and other tensors of modules."""
        for module in modules:
            for table in (module._parameters, module._buffers, vars(module)):
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        table[name] = self(tensor)


def copy_over(value: Any, fn: Callable[[Any], Any], kind: Any = Tensor) -> Any:
    """A copy of an object over other tensors, so that a forward may write to it; what cannot be copied stays itself.

    Args:
        value: an object; modules in it stay themselves.
        fn: gives the other tensor.
        kind: what counts as a tensor.
    """
    if isinstance(value, _SHARED):
        return value
    found, shared = inside(value, kind)
    with suppress(Exception):
        return copy.deepcopy(value, {id(part): fn(part) for part in found} | {id(part): part for part in shared})
    return value


def inside(value: Any, kind: Any) -> tuple[list[Any], list[Any]]:
    """What an object holds of a kind, a few structures deep, and what of a model or of a library."""
    found, shared, level = [], [], [value]
    for _ in range(6):
        level = [r for o in level for r in gc.get_referents(o)]
        shared += [r for r in level if isinstance(r, _SHARED)]
        level = [r for r in level if not isinstance(r, _SHARED)]
        found += [r for r in level if isinstance(r, kind)]
        if len(level) > 20_000:
            break
    return found, shared


def clear_caches(left: Iterable[Tensor]) -> None:
    """Empties the `functools` caches that hold one of these tensors, of whatever library."""
    ids = {id(t) for t in left}
    for cached in [o for o in gc.get_objects() if type(o) is _lru_cache_wrapper] if ids else ():
        if cached.cache_info().currsize and _holds(cached, ids):
            cached.cache_clear()


def _holds(cached: Any, ids: set[int], depth: int = 4) -> bool:
    """Whether one of these tensors lies in a cache, or a few structures deep in what it keeps."""
    level = [cached]
    for _ in range(depth):
        level = [r for o in level for r in gc.get_referents(o) if not isinstance(r, type | nn.Module)]
        if any(id(r) in ids for r in level):
            return True
        if len(level) > 20_000:
            return False
    return False
