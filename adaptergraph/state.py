"""Parameters: which are shared with the traced model, which have values of their own, and loading them. Floor 4."""

from __future__ import annotations

import copy
import functools
import os
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.utils.hooks import unserializable_hook

from .errors import GraphError, StateMismatch, here, nearest, shortened
from .hosting.attachment import values_of
from .hosting.hosted import parts_of

_SHARED = "_adaptergraph_shared"


def shared_copy(model: nn.Module, trained: Mapping[str, bool]) -> nn.Module:
    """A copy of the module tree: frozen parameters over the same storage, everything else its own.

    Raises:
        GraphError: something in the model cannot be copied; the message names it.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in memo or type(parameter) is not nn.Parameter:
            continue
        values = _of_autograd(parameter.detach())
        memo[id(parameter)] = nn.Parameter(values.clone() if trained.get(name, False) else values, requires_grad=False)
        if not trained.get(name, False):
            _share(memo[id(parameter)])
        memo[id(parameter)].requires_grad_(parameter.requires_grad)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise _uncopied(model, error) from error
    _refuse_other_values(model, copied, memo)
    _refuse_foreign_functions(model, copied)
    for module in copied.modules():
        if any(getattr(p, _SHARED, False) for p in module._parameters.values() if p is not None):
            module.register_load_state_dict_pre_hook(unshare)
    return copied


def _refuse_other_values(model: nn.Module, copied: nn.Module, memo: Mapping[int, Any]) -> None:
    """A module may copy itself: as the very same module, as one made anew, or with values of its own."""
    own, values = {id(m): n for n, m in model.named_modules()}, values_of(copied)
    same = [own[id(m)] for m in copied.modules() if id(m) in own]
    other = [n for n, v in values_of(model).items() if n not in values or values[n] is not memo.get(id(v))]
    if not same and not other:
        return
    path = same[0] if same else other[0].rpartition(".")[0]
    while not same and path and id(model.get_submodule(path)) not in memo:
        # a module around it made it
        path = path.rpartition(".")[0]
    cls = type(model.get_submodule(path)).__name__
    raise GraphError(
        f"the model cannot be copied: {path or cls} ({cls}) copies itself in a way of its own",
        node=path,
        sides=[("in the copy", "it is the module of the model itself" if same else f"{other[0]!r} is another value")],
        source=here(),
        hint="attach to the model itself: graph.compile(inplace=True)",
    )


def _refuse_foreign_functions(model: nn.Module, copied: nn.Module) -> None:
    """A function that was put on a module is copied as it is, with the modules and tensors that it closes over."""
    own = {id(m): n or type(model).__name__ for n, m in model.named_modules()}
    own |= {id(t): n for n, t in values_of(model).items()}
    for path, module in copied.named_modules():
        for key, function in _functions(module):
            read = next((own[id(part)] for part in parts_of(function) if id(part) in own), None)
            if read is None:
                continue
            way = "make it a bound method of its module" if key == "forward" else "put it on the compiled model instead"
            raise GraphError(
                f"the model cannot be copied: {path or type(model).__name__}.{key} "
                f"{'is' if isinstance(function, _FUNCTIONS) and not key.endswith('_hooks') else 'holds'} "
                "a function over the model itself",
                node=path,
                sides=[(getattr(function, "__qualname__", type(function).__name__), f"reads {read!r}")],
                source=here(),
                hint=f"{way}, or attach to the model itself: graph.compile(inplace=True)",
            )


def _functions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What was put on a module and may run or be read in its forward: functions, references, hooks, lists of them."""
    for key, value in vars(module).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            # torch packs some of them
            yield from ((key.strip("_"), vars(h)["hook"] if isinstance(h, _WrappedHook) else h) for h in value.values())
        elif key == "forward" or (isinstance(value, (*_FUNCTIONS, *_HOLDERS)) and key not in _TORCHS_OWN):
            yield key, value


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, weakref.ref)
# a copy of one of these holds copies of modules and tensors, but the functions themselves
_HOLDERS = (list, tuple, set, dict)
_TORCHS_OWN = {*dir(nn.Module), *vars(nn.Module())}


def _of_autograd(values: Tensor) -> Tensor:
    """A tensor that was made in inference mode as one that autograd takes, over the same storage."""
    if not values.is_inference():
        return values
    empty = torch.empty(0, dtype=values.dtype, device=values.device)
    return empty.set_(values.untyped_storage(), values.storage_offset(), values.shape, values.stride())


def _share(parameter: nn.Parameter) -> None:
    """Marks a parameter as shared, until somebody sets `requires_grad` by hand and its first gradient arrives."""
    setattr(parameter, _SHARED, True)
    if parameter.is_floating_point() or parameter.is_complex():
        # the hook is held where no garbage collector looks
        reference = weakref.ref(parameter)
        parameter.requires_grad_(True)
        # runs for `torch.autograd.grad` too, unlike one after the gradient was added up
        parameter.register_hook(unserializable_hook(lambda _: _own(reference())))
        parameter.requires_grad_(False)


def _own(parameter: Tensor | None) -> None:
    if parameter is not None and getattr(parameter, _SHARED, False):
        with torch.inference_mode(False):
            parameter.data = parameter.data.clone()
        # two threads may be at it
        vars(parameter).pop(_SHARED, None)


def unshare(module: nn.Module, *_: Any) -> None:
    """Before values are loaded into a module: its shared parameters get storage of their own."""
    for parameter in module._parameters.values():
        if parameter is not None:
            _own(parameter)


def _uncopied(model: nn.Module, error: Exception) -> GraphError:
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value, {id(m): m for m in model.modules()})
            except Exception:
                computed = isinstance(value, Tensor) and not value.is_leaf
                first = "call the model once in torch.no_grad(), if that computes it anew, " if computed else ""
                return GraphError(
                    f"the model cannot be copied: {path or type(model).__name__}.{key} ({type(value).__name__})",
                    node=path,
                    sides=[("copy says", str(error).splitlines()[0])],
                    source=here(),
                    hint=f"{first}{'or ' * computed}clear that attribute, or attach to the model itself: "
                    "graph.compile(inplace=True)",
                )
    return GraphError(f"the model cannot be copied: {error}", source=here(), hint="graph.compile(inplace=True)")


def values_from(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        StateMismatch: the file cannot be read, or is of another kind; a pickle is never opened.
    """
    import safetensors.torch

    if os.path.isfile(os.path.join(path, "adapter.json")):
        raise StateMismatch(
            f"{os.fspath(path)!r} is a folder of ag.save, not a file of tensors",
            source=here(),
            hint=f"ag.load(model, {os.fspath(path)!r}) makes the adapted model of a plain one",
        )
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StateMismatch(
            f"{os.fspath(path)!r} cannot be read as safetensors",
            sides=[("because", str(error).splitlines()[0])],
            source=here(),
            hint="safetensors.torch.save_file(state_dict, path) writes one; a file of torch.save may run code, so load "
            "it yourself and give the mapping",
        ) from None


@contextmanager
def put_back_on_error(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Whatever goes wrong inside, also an interrupt, these parameters and buffers get the values that they had."""
    own = values_of(model)
    before = {name: own[name].detach().clone() for name in names if name in own}
    try:
        yield
    except BaseException:
        with torch.inference_mode():
            for name, value in before.items():
                own[name].copy_(value)
        raise


def _storage_kind(value: Tensor) -> str:
    """What a tensor is kept as, if not as plain numbers in rows."""
    return ", quantized" if value.is_quantized else "" if value.layout is torch.strided else f", {value.layout}"


def load_values(model: nn.Module, values: Mapping[str, Tensor], what: str, needed: Iterable[str] = ()) -> None:
    """Copies values into parameters and buffers by name, unless something does not fit: an error lists every mismatch.

    Args:
        needed: names that must be among the values.

    Raises:
        StateMismatch: a name is unknown or needed and missing, a shape differs, or a value is no tensor, of a kind that
            would lose a part of it (`torch.can_cast`), or on the meta device.
    """
    own = values_of(model)
    wrong: list[tuple[str, ...]] = []
    for name, value in values.items():
        mine = own.get(name)
        if mine is None:
            close = nearest(name, own)
            wrong.append((name, "no such parameter", f"nearest: {close[0]}" if close else ""))
        elif not isinstance(value, Tensor):
            wrong.append((name, f"model {tuple(mine.shape)}", f"given no tensor but a {type(value).__name__}"))
        elif mine.shape != value.shape:
            wrong.append((name, f"model {tuple(mine.shape)}", f"given {tuple(value.shape)}"))
        elif not torch.can_cast(value.dtype, mine.dtype) or _storage_kind(value) != _storage_kind(mine):
            wrong.append((name, f"model {mine.dtype}", f"given {value.dtype}" + _storage_kind(value)))
        elif value.is_meta and not mine.is_meta:
            wrong.append((name, f"model on {mine.device}", "given a tensor without values, on meta"))
    wrong += [(name, "is missing", "it is frozen: training would not mend it") for name in needed if name not in values]
    if wrong:
        raise StateMismatch(
            f"{len(wrong)} tensors of {what} do not fit the model",
            sides=shortened(wrong),
            source=here(),
            hint="give values of this very model: graph.params lists names, shapes and dtypes",
        )
    for name, value in values.items():
        _own(own[name])
        # what was made in inference mode is changed in it only; others can be, too
        with torch.inference_mode():
            own[name].copy_(value)
