"""Pools over spatial dimensions, channels first, on torch's own functions. Floor 2."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import GraphError, check_flag, here
from ..node import Node
from .making import make, spelt
from .table import Op, add_rows
from .windows import Sizes, check_padding, check_sizes, each, even, pad, pairs, spatial

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "global_avg_pool",
    "global_max_pool",
    "lp_pool",
    "max_pool",
]

_MAX: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADAPTIVE_AVG: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_ADAPTIVE_MAX: Any = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}


def max_over(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Any, dilation: Sizes) -> Tensor:
    """The largest value of each window; padding is never the largest."""
    dims = x.dim() - 2
    kernel, holes = each(kernel_size, dims), each(dilation, dims)
    around = pairs(padding, kernel, holes)
    both = even(around)
    if both is not None and all(2 * p <= k for p, k in zip(both, kernel, strict=True)):
        return _MAX[dims](x, kernel, stride, both, holes)
    return _MAX[dims](pad(x, around, -math.inf), kernel, stride, 0, holes)


def avg_over(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Any, dilation: Sizes) -> Tensor:
    """The mean of each window, where padding counts as zeros."""
    dims = x.dim() - 2
    kernel, holes, steps = each(kernel_size, dims), each(dilation, dims), each(stride, dims)
    x = pad(x, pairs(padding, kernel, holes))
    if all(d == 1 for d in holes):
        return _AVG[dims](x, kernel, steps)
    # torch has no dilated mean: a convolution with equal weights is one
    channels = x.shape[1]
    weight = x.new_full((channels, 1, *kernel), 1 / math.prod(kernel))
    return _CONV[dims](x, weight, None, steps, 0, holes, channels)


def lp_over(x: Tensor, kernel_size: Sizes, stride: Sizes, padding: Any, dilation: Sizes, norm: float) -> Tensor:
    """The power mean of each window without the division: `(Σ x^p)^(1/p)`, as `nn.LPPool2d`."""
    size = math.prod(each(kernel_size, x.dim() - 2))
    total = avg_over(x.pow(norm), kernel_size, stride, padding, dilation) * size
    return (total.sign() * F.relu(total.abs())).pow(1 / norm)


def adaptive_avg(x: Tensor, output_size: Sizes) -> Tensor:
    """The mean of each of torch's bins."""
    return _ADAPTIVE_AVG[x.dim() - 2](x, output_size)


def adaptive_max(x: Tensor, output_size: Sizes) -> Tensor:
    """The largest value of each of torch's bins."""
    return _ADAPTIVE_MAX[x.dim() - 2](x, output_size)


def global_avg(x: Tensor, keep_dims: bool) -> Tensor:
    """The mean over all spatial dimensions."""
    return x.mean(tuple(range(2, x.dim())), keepdim=keep_dims)


def global_max(x: Tensor, keep_dims: bool) -> Tensor:
    """The largest value over all spatial dimensions."""
    return torch.amax(x, tuple(range(2, x.dim())), keepdim=keep_dims)


add_rows(
    Op("max_pool", "largest value of each window", function=max_over, floats=1),
    Op("avg_pool", "mean of each window", function=avg_over, floats=1),
    Op("lp_pool", "p-norm of each window", function=lp_over, floats=1),
    Op("adaptive_avg_pool", "mean of each bin", function=adaptive_avg, floats=1),
    Op("adaptive_max_pool", "largest value of each bin", function=adaptive_max, floats=1),
    Op("global_avg_pool", "mean over all spatial dimensions", function=global_avg, floats=1),
    Op("global_max_pool", "largest value over all spatial dimensions", function=global_max, floats=1),
)


@spelt
def max_pool(
    x: Node,
    *,
    kernel_size: Sizes = 1,
    stride: Sizes | None = None,
    padding: Any = "valid",
    dilation: Sizes = 1,
    name: str | None = None,
) -> Node:
    """The largest value of each window (`F.max_pool1d`, `2d`, `3d`), of `batch × channels × spatial…`.

    Args:
        stride: None for the kernel's size.
        padding: `"valid"`, `"same"`, numbers or pairs, as for `conv`; never the largest value.

    Raises:
        GraphError: x has no spatial dimensions, or an option is no size.
        ShapeMismatch: the kernel is larger than x.

    >>> import adaptergraph as ag
    >>> ag.max_pool(ag.input("x", shape=("batch", 3, 8, 8)), kernel_size=2)
    <unnamed: max_pool batch × 3 × 4 × 4>
    """
    return make("max_pool", [x], name, _pool(x, "max_pool", kernel_size, stride, padding, dilation, name))


@spelt
def avg_pool(
    x: Node,
    *,
    kernel_size: Sizes = 1,
    stride: Sizes | None = None,
    padding: Any = "valid",
    dilation: Sizes = 1,
    name: str | None = None,
) -> Node:
    """The mean of each window (`F.avg_pool1d`, `2d`, `3d`), where padding counts as zeros. Options as `max_pool`."""
    return make("avg_pool", [x], name, _pool(x, "avg_pool", kernel_size, stride, padding, dilation, name))


@spelt
def lp_pool(
    x: Node,
    *,
    norm: float = 2,
    kernel_size: Sizes = 1,
    stride: Sizes | None = None,
    padding: Any = "valid",
    dilation: Sizes = 1,
    name: str | None = None,
) -> Node:
    """The p-norm of each window, `(Σ x^p)^(1/p)` as `nn.LPPool2d`. Options as `max_pool`.

    Raises:
        GraphError: `norm` is no positive number.
    """
    if isinstance(norm, bool) or not isinstance(norm, int | float) or norm <= 0:
        raise GraphError(f"the norm of lp_pool is a positive number, not {norm!r}", node=name, source=here())
    options = _pool(x, "lp_pool", kernel_size, stride, padding, dilation, name)
    return make("lp_pool", [x], name, {**options, "norm": norm})


@spelt
def adaptive_avg_pool(x: Node, output_size: Sizes, *, name: str | None = None) -> Node:
    """The mean of as many bins as asked for, whatever the size of x (`F.adaptive_avg_pool2d`).

    >>> import adaptergraph as ag
    >>> ag.adaptive_avg_pool(ag.input("x", shape=("batch", 3, "h", "w")), (2, 2))
    <unnamed: adaptive_avg_pool batch × 3 × 2 × 2>
    """
    size = check_sizes(output_size, spatial(x, "adaptive_avg_pool", name), "output_size", name)
    return make("adaptive_avg_pool", [x], name, {"output_size": size})


@spelt
def adaptive_max_pool(x: Node, output_size: Sizes, *, name: str | None = None) -> Node:
    """The largest value of as many bins as asked for (`F.adaptive_max_pool2d`)."""
    size = check_sizes(output_size, spatial(x, "adaptive_max_pool", name), "output_size", name)
    return make("adaptive_max_pool", [x], name, {"output_size": size})


@spelt
def global_avg_pool(x: Node, *, keep_dims: bool = False, name: str | None = None) -> Node:
    """The mean over all spatial dimensions: `batch × channels`, or with ones behind when `keep_dims`."""
    spatial(x, "global_avg_pool", name)
    return make("global_avg_pool", [x], name, {"keep_dims": check_flag(keep_dims, "keep_dims", name)})


@spelt
def global_max_pool(x: Node, *, keep_dims: bool = False, name: str | None = None) -> Node:
    """The largest value over all spatial dimensions: `batch × channels`, or with ones behind when `keep_dims`."""
    spatial(x, "global_max_pool", name)
    return make("global_max_pool", [x], name, {"keep_dims": check_flag(keep_dims, "keep_dims", name)})


def _pool(
    x: Any, op: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, name: str | None
) -> dict[str, Any]:
    dims = spatial(x, op, name)
    given = {"kernel_size": kernel_size, "stride": kernel_size if stride is None else stride, "dilation": dilation}
    options: dict[str, Any] = {k: check_sizes(v, dims, f"{k} of {op}", name) for k, v in given.items()}
    return {**options, "padding": check_padding(padding, dims, name)}
