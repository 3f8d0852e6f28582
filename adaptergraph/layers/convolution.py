"""Convolutions, channels first, on `nn.Conv*d` and `nn.ConvTranspose*d`. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import GraphError, check_flag, here
from ..node import Node
from ..shapes import Value
from .making import activated, check_size, make, spelt
from .table import Op, add_rows
from .windows import Pairs, Sizes, check_padding, check_sizes, each, even, pad, pairs, spatial

__all__ = ["conv", "conv_transpose", "depthwise_conv", "separable_conv2d"]


class _Padded:
    """A convolution with another padding before than after, which torch's own layers do not take."""

    around: Pairs = ()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, self.around))  # type: ignore[misc]


class PaddedConv1d(_Padded, nn.Conv1d):
    """`nn.Conv1d` over what was padded before."""


class PaddedConv2d(_Padded, nn.Conv2d):
    """`nn.Conv2d` over what was padded before."""


class PaddedConv3d(_Padded, nn.Conv3d):
    """`nn.Conv3d` over what was padded before."""


class _Cropped:
    """A transposed convolution that gives size × stride: what is beyond is cut off (or left at the bias)."""

    crop: Pairs = ()

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        full = super().forward(x, output_size)  # type: ignore[misc]
        return pad(full, [(-before, -after) for before, after in self.crop])


class CroppedConvTranspose1d(_Cropped, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` whose output is cut to size × stride."""


class CroppedConvTranspose2d(_Cropped, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` whose output is cut to size × stride."""


class CroppedConvTranspose3d(_Cropped, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` whose output is cut to size × stride."""


_CONV: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PADDED: Any = {1: PaddedConv1d, 2: PaddedConv2d, 3: PaddedConv3d}
_TRANSPOSE: Any = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_CROPPED: Any = {1: CroppedConvTranspose1d, 2: CroppedConvTranspose2d, 3: CroppedConvTranspose3d}


def _channels(x: Sequence[Value]) -> int:
    return int(x[0].shape[1])  # type: ignore[arg-type]


def _conv(
    x: Sequence[Value],
    size: int,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Any,
    dilation: Sizes,
    groups: int,
    bias: bool,
) -> nn.Module:
    dims = len(x[0].shape) - 2
    kernel, steps, holes = (each(v, dims) for v in (kernel_size, stride, dilation))
    around = pairs(padding, kernel, holes)
    both = even(around)
    options = {"stride": steps, "dilation": holes, "groups": groups, "bias": bias, "dtype": x[0].dtype}
    if both is not None:
        return _CONV[dims](_channels(x), size, kernel, padding=both, **options)
    module = _PADDED[dims](_channels(x), size, kernel, **options)
    module.around = around
    return module


def _depthwise(x: Sequence[Value], multiplier: int, **options: Any) -> nn.Module:
    return _conv(x, _channels(x) * multiplier, groups=_channels(x), **options)


def _conv_transpose(
    x: Sequence[Value], size: int, kernel_size: Sizes, stride: Sizes, padding: Any, dilation: Sizes, bias: bool
) -> nn.Module:
    dims = len(x[0].shape) - 2
    kernel, steps, holes = (each(v, dims) for v in (kernel_size, stride, dilation))
    options = {"stride": steps, "dilation": holes, "bias": bias, "dtype": x[0].dtype}
    crop = pairs(padding, kernel, holes)
    if padding == "same":
        extra = [d * (k - 1) + 1 - s for k, s, d in zip(kernel, steps, holes, strict=True)]
        crop = tuple((max(e, 0) // 2, e - max(e, 0) // 2) for e in extra)
    both = even(crop)
    if both is not None and min(both) >= 0:
        return _TRANSPOSE[dims](_channels(x), size, kernel, padding=both, **options)
    module = _CROPPED[dims](_channels(x), size, kernel, **options)
    module.crop = crop
    return module


add_rows(
    Op("conv", "convolution", module=_conv, floats=1),
    Op("depthwise_conv", "a convolution for each channel by itself", module=_depthwise, floats=1),
    Op("conv_transpose", "transposed convolution", module=_conv_transpose, floats=1),
)


@spelt
def conv(
    x: Node,
    size: int,
    *,
    kernel_size: Sizes = 1,
    stride: Sizes = 1,
    padding: Any = "valid",
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    activation: str | None = None,
    weight_init: Any = None,
    bias_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """A convolution over one to three spatial dimensions (`nn.Conv1d`, `2d`, `3d`).

    Reads `batch × channels × spatial…`, gives `batch × size × spatial…`.

    Args:
        size: channels of the output.
        kernel_size, stride, dilation: a number, or one for each spatial dimension.
        padding: `"valid"` (none), `"same"` (k - 1 in total, whatever the stride; an odd one at the end), a number, a
            number for each spatial dimension, or a pair (before, after) for each.
        groups: channels are convolved in that many groups.
        activation: adds a node of this activation after it.
        weight_init, bias_init: see `param`; None is torch's own.
        share: another conv node, whose weights this one uses.

    Raises:
        GraphError: x has no spatial dimensions, or an option is no size.
        ShapeMismatch: the channels are no multiple of `groups`, or the kernel is larger than x.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 3, 32, 32))
    >>> ag.conv(x, 16, kernel_size=3, padding="same", stride=2)
    <unnamed: conv batch × 16 × 16 × 16>
    """
    options = {
        "size": check_size(size, "the size of conv", name),
        **_window(x, "conv", kernel_size, stride, dilation, name),
    }
    options |= {
        "padding": check_padding(padding, spatial(x, "conv", name), name),
        "bias": check_flag(bias, "bias", name),
    }
    options["groups"] = check_size(groups, "groups of conv", name)
    node = make("conv", [x], name, options, share=share, weight_init=weight_init, bias_init=bias_init)
    return node if activation is None else activated(activation, node, None)


@spelt
def depthwise_conv(
    x: Node,
    multiplier: int = 1,
    *,
    kernel_size: Sizes = 1,
    stride: Sizes = 1,
    padding: Any = "valid",
    dilation: Sizes = 1,
    bias: bool = True,
    activation: str | None = None,
    weight_init: Any = None,
    bias_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """A convolution of each channel by itself, `multiplier` outputs for each: `nn.Conv*d` with as many groups.

    Reads `batch × channels × spatial…`, gives `batch × channels·multiplier × spatial…`. Options as for `conv`.

    >>> import adaptergraph as ag
    >>> ag.depthwise_conv(ag.input("x", shape=("batch", 4, 8, 8)), 2, kernel_size=3)
    <unnamed: depthwise_conv batch × 8 × 6 × 6>
    """
    options = _window(x, "depthwise_conv", kernel_size, stride, dilation, name)
    options |= {"multiplier": check_size(multiplier, "the multiplier of depthwise_conv", name)}
    options["padding"] = check_padding(padding, spatial(x, "depthwise_conv", name), name)
    options["bias"] = check_flag(bias, "bias", name)
    node = make("depthwise_conv", [x], name, options, share=share, weight_init=weight_init, bias_init=bias_init)
    return node if activation is None else activated(activation, node, None)


@spelt
def separable_conv2d(
    x: Node,
    multiplier: int = 1,
    *,
    kernel_size: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    padding: Any = "valid",
    bias: bool = True,
    activation: str | None = None,
    name: str | None = None,
) -> Node:
    """A spatially separable convolution as Axon's: each channel first along the height, then along the width.

    Two `depthwise_conv` nodes, `name.rows` and `name.columns`. Reads `batch × channels × height × width`, gives
    `batch × channels·multiplier × height × width`. (A depthwise convolution and then a pointwise one, which others call
    separable, is `conv(depthwise_conv(x, kernel_size=3), size)`.)

    Raises:
        GraphError: x has not two spatial dimensions.
    """
    _two_dims(x, name)
    (high, wide), (down, right) = (
        each(check_sizes(v, 2, what, name), 2) for v, what in ((kernel_size, "kernel_size"), (stride, "stride"))
    )
    around: Any = check_padding(padding, 2, name)
    rows, columns = (around, around) if isinstance(around, str) else _apart(pairs(around, (high, wide), (1, 1)))
    part = {"rows": None, "columns": None} if name is None else {p: f"{name}.{p}" for p in ("rows", "columns")}
    h = depthwise_conv(
        x, multiplier, kernel_size=(high, 1), stride=(down, 1), padding=rows, bias=bias, name=part["rows"]
    )
    h = depthwise_conv(h, kernel_size=(1, wide), stride=(1, right), padding=columns, bias=bias, name=part["columns"])
    return h if activation is None else activated(activation, h, None)


@spelt
def conv_transpose(
    x: Node,
    size: int,
    *,
    kernel_size: Sizes = 1,
    stride: Sizes = 1,
    padding: Any = "valid",
    dilation: Sizes = 1,
    bias: bool = True,
    activation: str | None = None,
    weight_init: Any = None,
    bias_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """A transposed convolution (`nn.ConvTranspose1d`, `2d`, `3d`): the gradient of `conv`, which makes x larger.

    Reads `batch × channels × spatial…`, gives `batch × size × spatial…`.

    Args:
        padding: `"same"` gives spatial size × stride; numbers cut that much off the full result, as in torch.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 4, 6, 6))
    >>> ag.conv_transpose(x, 3, kernel_size=3, stride=2, padding="same")
    <unnamed: conv_transpose batch × 3 × 12 × 12>
    """
    options = {"size": check_size(size, "the size of conv_transpose", name)}
    options |= _window(x, "conv_transpose", kernel_size, stride, dilation, name)
    options["padding"] = check_padding(padding, spatial(x, "conv_transpose", name), name)
    options["bias"] = check_flag(bias, "bias", name)
    node = make("conv_transpose", [x], name, options, share=share, weight_init=weight_init, bias_init=bias_init)
    return node if activation is None else activated(activation, node, None)


def _window(x: Any, op: str, kernel_size: Any, stride: Any, dilation: Any, name: str | None) -> dict[str, Any]:
    dims = spatial(x, op, name)
    given = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    return {what: check_sizes(value, dims, f"{what} of {op}", name) for what, value in given.items()}


def _two_dims(x: Any, name: str | None) -> None:
    if spatial(x, "separable_conv2d", name) != 2:
        raise GraphError("separable_conv2d reads batch × channels × height × width", node=name, source=here())


def _apart(around: Pairs) -> tuple[Pairs, Pairs]:
    return (around[0], (0, 0)), ((0, 0), around[1])
