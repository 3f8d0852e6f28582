"""What comes out of an op, found by running it on fake tensors. Floor 2; no shape rule is written by hand.

Named sizes are stood in for by primes, twice with different ones: what equals the stand-in of `batch` both times is
`batch`. Results are kept by op, options and input shapes, so a repeated layer costs nothing.
"""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call

from .axes import Following
from .errors import ShapeMismatch, Source
from .loading import Loading
from .node import Node, Param, Shape, format_shape

# small enough for position tables of 512, in two orders, so that no simple sum or product of one is another both times
_PRIMES = ((211, 233, 263, 283, 313, 337), (401, 509, 443, 487, 379, 461))
# for ops that take as many steps as a size says
_FEW = ((11, 13, 17, 19, 23, 29), (31, 37, 41, 43, 47, 53))
_STEPPED = ("lstm", "gru")
_MEMO: dict[Any, Spec] = {}


@dataclass(frozen=True, slots=True)
class Value:
    """Shape and dtype of one value, and the dimension of its features where that is known (see `Node.axis`)."""

    shape: Shape
    dtype: torch.dtype
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """What an op gives: its value (None if it is no single tensor), its parameters, its values if there are several.

    `reads` are the dimensions where it takes the features of what it reads to be, `convolves` is whether it convolves.
    """

    value: Value | None
    params: Mapping[str, Param]
    parts: tuple[Value, ...] = ()
    reads: tuple[int | None, ...] = ()
    convolves: bool = False


def infer(
    op: str,
    make: Callable[[Sequence[Value]], torch.nn.Module | Callable[..., Any]],
    inputs: Sequence[Node],
    options: Mapping[str, Any],
    source: Source | None,
    name: str | None,
) -> Spec:
    """Runs an op on fake tensors of its inputs' shapes.

    Args:
        make: gives the module or function of the op for values of these shapes.

    Raises:
        ShapeMismatch: torch refuses these shapes; the message shows the inputs by name.
    """
    values = [Value(i.shape or (), i.dtype or torch.float32, i.axis) for i in inputs]
    key = _key(op, options, values)
    if key is not None and key in _MEMO:
        return _MEMO[key]
    try:
        spec = _probe(make, values, _FEW if op in _STEPPED else _PRIMES)
    except Exception as error:
        # a torch traceback says nothing that we do not, but the user's own code may be what is wrong
        own = error if op in ("module", "nx", "layer") else None
        raise _refused(op, inputs, values, options, source, name, error) from own
    if key is not None:
        _MEMO[key] = spec
    return spec


def _key(op: str, options: Mapping[str, Any], values: Sequence[Value]) -> Any:
    plain = tuple(sorted((k, _plain(v)) for k, v in options.items()))
    if any(v is _NOT_PLAIN for _, v in plain):
        return None
    return op, plain, tuple((v.shape, v.dtype, v.axis) for v in values), torch.get_default_dtype()


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """What a value is remembered by: `1`, `1.0`, `True` and `"1"` are four different ones."""
    if isinstance(value, tuple | list):
        inner = tuple(_plain(v) for v in value)
        return _NOT_PLAIN if any(v is _NOT_PLAIN for v in inner) else repr(inner)
    if value is None or isinstance(value, str | bool | int | float | torch.dtype):
        return repr(value)
    return _NOT_PLAIN


def _probe(
    make: Callable[[Sequence[Value]], Any], values: Sequence[Value], primes: tuple[tuple[int, ...], ...]
) -> Spec:
    named = any(not isinstance(d, int) for v in values for d in v.shape)
    follow = Following()
    runs = [_run(make, values, _stand_ins(values, primes[0]), follow)]
    runs += [_run(make, values, _stand_ins(values, few)) for few in primes[1:] if named]
    (first, params), (second, others) = runs[0], runs[-1]
    if params != others:
        raise ValueError("its parameters need a size that is known, not a name or None")
    one, two = (_stand_ins(values, few) for few in primes)

    def value(a: torch.Tensor, b: torch.Tensor) -> Value:
        dims = [_named(i, j, one, two) if named else int(i) for i, j in zip(a.shape, b.shape, strict=True)]
        return Value(tuple(dims), a.dtype, follow.axis(a))

    follow.axes.settle()
    beside = tuple(map(follow.axes.known.get, follow.given)), bool(follow.axes.convolutions)
    if isinstance(first, torch.Tensor):
        return Spec(value(first, second), params, (), *beside)
    several = isinstance(first, tuple) and all(isinstance(part, torch.Tensor) for part in first)
    return Spec(None, params, tuple(map(value, first, second)) if several else (), *beside)


def _run(
    make: Callable[[Sequence[Value]], Any],
    values: Sequence[Value],
    stand_in: Mapping[Any, int],
    follow: Following | None = None,
) -> tuple[Any, dict[str, Param]]:
    """One run on fake tensors of these sizes: the result and the parameters."""
    following = follow or nullcontext()
    params: dict[str, Param] = {}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with Loading(), quiet(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        with fake:
            sizes = [tuple(stand_in[_dim(d, i)] for i, d in enumerate(v.shape)) for v in values]
            given = [torch.empty(s, dtype=v.dtype) for s, v in zip(sizes, values, strict=True)]
            versions = [t._version for t in given]
            if follow is not None:
                for tensor, v in zip(given, values, strict=True):
                    follow.starts(tensor, v.axis)
            run = make([Value(s, v.dtype) for s, v in zip(sizes, values, strict=True)])
        if isinstance(run, torch.nn.Module):
            params = {n: Param(tuple(p.shape), p.dtype) for n, p in run.named_parameters()}
            result = _call_module(run, given, fake, following)
        else:
            with fake, following:
                result = run(*given)
    if versions != [t._version for t in given]:
        raise ValueError("it changes in place what it reads, and so for every other reader")
    return result, params


def _call_module(
    module: torch.nn.Module, given: Sequence[torch.Tensor], fake: FakeTensorMode, following: AbstractContextManager[Any]
) -> Any:
    """A call of a copy in eval over stand-ins for its tensors: a user's module is not touched."""
    tensors = (*module.parameters(), *module.buffers())
    twin = copy.deepcopy(module, {id(t): t for t in tensors}).eval()
    with fake:
        state = (*twin.named_parameters(), *twin.named_buffers())
        stand_ins = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in state}
        with following:
            return functional_call(twin, stand_ins, tuple(given))


def _dim(dim: Any, axis: int) -> Any:
    return ("?", axis) if dim is None else dim


def _stand_ins(values: Sequence[Value], primes: Sequence[int]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for value in values:
        for axis, dim in enumerate(value.shape):
            key = _dim(dim, axis)
            if isinstance(key, int):
                found[key] = key
            elif key not in found:
                used = sum(1 for k in found if not isinstance(k, int))
                found[key] = primes[used] if used < len(primes) else primes[-1] * used
    return found


def _named(a: int, b: int, first: Mapping[Any, int], second: Mapping[Any, int]) -> Any:
    if a == b:
        return int(a)
    for key, size in first.items():
        if size == a and second[key] == b and isinstance(key, str):
            return key
    return None


def _refused(
    op: str,
    inputs: Sequence[Node],
    values: Sequence[Value],
    options: Mapping[str, Any],
    source: Source | None,
    name: str | None,
    error: Exception,
) -> ShapeMismatch:
    names: dict[int, str] = {}
    for primes in _PRIMES:
        sizes = _stand_ins(values, primes)
        names.update({s: k if isinstance(k, str) else "?" for k, s in sizes.items() if s not in sizes})
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        first = "it looks at values, which are not known before the graph runs"
    text = re.sub(r"\d+", lambda m: names.get(int(m[0]), m[0]), first)
    shown = [(k, repr(v)) for k, v in options.items() if isinstance(v, str | int | float | tuple)]
    return ShapeMismatch(
        f"{op} {name!r} does not fit what it reads" if name else f"{op} does not fit what it reads",
        node=name,
        sides=[
            *(
                ("reads", i.name or i.op, format_shape(v.shape), str(v.dtype))
                for i, v in zip(inputs, values, strict=True)
            ),
            *(("option", k, v) for k, v in shown),
            ("because", text),
        ],
        source=source,
        hint="change the option, or what the node reads",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Fake kernels log a traceback before they raise; the error we raise says more."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's search for dead cycles waits: while a large graph is built it finds none, and takes half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
