"""Nodes from several nodes, several nodes from one, inputs that may be missing, other shapes. Floor 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GraphError, ShapeMismatch, check_flag, here, suggestion
from ..node import Node, format_shape
from ..shapes import Value, infer
from .making import check_inputs, check_size, make, spelt
from .table import Op, _last, add_rows, runnable
from .windows import check_sizes, spatial
from .windows import pad as pad_around

__all__ = ["bias", "bilinear", "cond", "container", "optional", "or_else", "pad", "resize", "split"]

METHODS = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")


class Bias(nn.Module):
    """A trained shift of the last dimension; starts at zero."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _bilinear(x: Sequence[Value], size: int, bias: bool) -> nn.Module:
    return nn.Bilinear(_last(x[:1]), _last(x[1:]), size, bias=bias, dtype=x[0].dtype)


def item(xs: tuple[Tensor, ...], index: int, part: str) -> Tensor:
    """One of several outputs; `part` is what the graph calls it."""
    return xs[index]


def split_into(x: Tensor, sizes: int | tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """Equal parts, or parts of these sizes."""
    if isinstance(sizes, int):
        if x.shape[dim] % sizes:
            raise ValueError(f"a size of {x.shape[dim]} is no {sizes} equal parts")
        return tuple(x.chunk(sizes, dim))
    return tuple(x.split(list(sizes), dim))


def where(pred: Tensor, true: Tensor, false: Tensor) -> Tensor:
    """The one value or the other: for all, or for each row."""
    return torch.where(pred.reshape(pred.shape + (1,) * (true.dim() - pred.dim())), true, false)


def or_default(x: Tensor | None, sizes: Sequence[int], default: Any, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """X, or a tensor of the default when it is missing."""
    device = None if like is None else like.device
    return torch.full(tuple(sizes), default, dtype=dtype, device=device) if x is None else x


def or_other(x: Tensor | None, other: Tensor) -> Tensor:
    """X, or the other value when it is missing."""
    return other if x is None else x


def resized(x: Tensor, size: Any, method: str, antialias: bool) -> Tensor:
    """Spatial dimensions of other sizes."""
    return F.interpolate(x, size, mode=method, antialias=antialias)


add_rows(
    Op("bilinear", "x1 A x2 + b", module=_bilinear, floats=2),
    Op("bias", "a trained shift", module=lambda x: Bias(_last(x), x[0].dtype), floats=1),
    Op("item", "one of several outputs", function=item),
    Op("split", "parts of one node", function=split_into),
    Op("cond", "one of two values", function=where),
    Op("optional", "a default for an input that may be missing", function=or_default),
    Op("or_else", "another value for an input that may be missing", function=or_other),
    Op("pad", "values around the last dimensions", function=pad_around),
    Op("resize", "other spatial sizes", function=resized, floats=1),
)


@spelt
def bilinear(
    x1: Node,
    x2: Node,
    size: int,
    *,
    bias: bool = True,
    weight_init: Any = None,
    bias_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """A bilinear form of two nodes (`nn.Bilinear`): `… × in1` and `… × in2` to `… × size`.

    >>> import adaptergraph as ag
    >>> ag.bilinear(ag.input("a", shape=("batch", 6)), ag.input("b", shape=("batch", 4)), 3)
    <unnamed: bilinear batch × 3>
    """
    options = {"size": check_size(size, "the size of bilinear", name), "bias": check_flag(bias, "bias", name)}
    inits = {"weight_init": weight_init, "bias_init": bias_init}
    return make("bilinear", [x1, x2], name, options, share=share, **inits)


@spelt
def bias(x: Node, *, bias_init: Any = None, share: Node | None = None, name: str | None = None) -> Node:
    """Adds one trained number for each feature of the last dimension; they start at zero."""
    return make("bias", [x], name, {}, share=share, bias_init=bias_init)


def parts_of(node: Node, labels: Sequence[str], values: Sequence[Value]) -> tuple[Node, ...]:
    """The outputs of a node that has several, as nodes of their own: `name.label`."""
    names = [None if node.name is None else f"{node.name}.{label}" for label in labels]
    return tuple(
        Node(
            "item",
            (node,),
            name,
            v.shape,
            v.dtype,
            {"index": i, "part": label},
            source=node.source,
            space=node.space,
            axis=v.axis,
        )
        for i, (label, name, v) in enumerate(zip(labels, names, values, strict=True))
    )


def values_of(node: Node) -> tuple[Value, ...]:
    """Shapes and dtypes of the outputs of a node that has several."""
    return infer(node.op, runnable(node.op, node.options), node.inputs, node.options, node.source, node.name).parts


@spelt
def split(x: Node, sizes: int | Sequence[int], *, dim: int = -1, name: str | None = None) -> tuple[Node, ...]:
    """Parts of one node along `dim`: that many equal ones, or one for each size. They are called `name.0`, `name.1`, ….

    Raises:
        ShapeMismatch: the parts are not what x has.

    >>> import adaptergraph as ag
    >>> a, b = ag.split(ag.input("x", shape=("batch", 6)), (2, 4))
    >>> a, b
    (<unnamed: item batch × 2>, <unnamed: item batch × 4>)
    """
    if isinstance(sizes, list | tuple):
        checked: Any = tuple(check_size(s, "a size of split", name) for s in sizes)
    else:
        checked = check_size(sizes, "the parts of split are how many: it", name)
    node = make("split", [x], name, {"sizes": checked, "dim": dim})
    values = values_of(node)
    return parts_of(node, [str(i) for i in range(len(values))], values)


@spelt
def cond(pred: Node, true: Node, false: Node, *, name: str | None = None) -> Node:
    """One of two nodes: `true` where `pred` holds, else `false`. Both are computed.

    Args:
        pred: booleans: a scalar for all, or `batch` for each row.

    Raises:
        GraphError: `pred` is no boolean.
        ShapeMismatch: the branches have different shapes or dtypes, or `pred` has more dimensions than they.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> large = ag.input("large", shape=(), dtype=torch.bool)
    >>> ag.cond(large, ag.relu(x), ag.tanh(x))
    <unnamed: cond batch × 8>
    """
    source = here()
    check_inputs("cond", [pred, true, false], source)
    if pred.dtype != torch.bool:
        raise GraphError(
            f"cond asks {pred.name or pred.op!r}, which is no boolean",
            node=name,
            sides=[("pred", pred.name or pred.op, format_shape(pred.shape), str(pred.dtype))],
            source=source,
            hint="compare it: ag.nx(x, lambda x: x.mean() > 0)",
        )
    sides = [(s, n.name or n.op, format_shape(n.shape), str(n.dtype)) for s, n in (("true", true), ("false", false))]
    if (true.shape, true.dtype) != (false.shape, false.dtype):
        raise ShapeMismatch(
            "the branches of cond differ",
            node=name,
            sides=sides,
            source=source,
            hint="end both in the same shape and dtype",
        )
    if (pred.shape or ()) != (true.shape or ())[: len(pred.shape or ())]:
        row = ("pred", pred.name or pred.op, format_shape(pred.shape), str(pred.dtype))
        raise ShapeMismatch(
            "cond asks a scalar, or one boolean for each row",
            node=name,
            sides=[row, *sides],
            source=source,
            hint="reduce it to one boolean, or to one for each row of the branches: ag.nx(x, lambda x: x.mean(-1) > 0)",
        )
    return make("cond", [pred, true, false], name, {})


@spelt
def optional(x: Node, *, default: float | int | bool = 0, name: str | None = None) -> Node:
    """An input that may be missing, with a default: a number everywhere, in the sizes that other inputs have.

    Args:
        x: an input made with `optional=True`.

    Raises:
        GraphError: x is no optional input. When the graph is made: no other input has a size that x names.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 4))
    >>> gain = ag.input("gain", shape=("batch", 4), optional=True)
    >>> model = ag.Graph(x * ag.optional(gain, default=2.0)).compile()
    >>> model(torch.ones(1, 4))
    tensor([[2., 2., 2., 2.]])
    """
    _check_optional(x, "optional", name)
    if not isinstance(default, bool | int | float):
        hint = "ag.or_else(x, node)" if isinstance(default, Node) else None
        raise GraphError(f"the default of {x.name!r} is a number, not {default!r}", node=name, source=here(), hint=hint)
    return make("optional", [x], name, {"default": default})


@spelt
def or_else(x: Node, other: Node, *, name: str | None = None) -> Node:
    """An input that may be missing, or another node of the same shape when it is.

    Raises:
        GraphError: x is no optional input.
        ShapeMismatch: the other node has another shape or dtype.
    """
    _check_optional(x, "or_else", name)
    check_inputs("the other side of or_else", [other], here())
    if (x.shape, x.dtype) != (other.shape, other.dtype):
        raise ShapeMismatch(
            f"{other.name or other.op!r} cannot stand for the input {x.name!r}",
            node=name,
            sides=[(n.name or n.op, format_shape(n.shape), str(n.dtype)) for n in (x, other)],
            source=here(),
            hint="give a node of the shape and dtype of the input",
        )
    return make("or_else", [x, other], name, {})


def _check_optional(x: Any, op: str, name: str | None) -> None:
    if not isinstance(x, Node) or x.op != "input" or not x.options.get("optional"):
        label = repr(x.name or x.op) if isinstance(x, Node) else repr(x)
        raise GraphError(
            f"{op} reads an optional input, and {label} is always there",
            node=name,
            source=here(),
            hint="ag.input(…, optional=True)",
        )


@spelt
def container(outputs: Any) -> Any:
    """Nodes in dicts, lists and tuples, nested as you like, checked: what a graph returns, `ag.Graph(ag.container(…))`.

    It makes no node: a graph takes the same structure as it is, and the compiled model returns it.

    Raises:
        GraphError: something in it is no node; the message says where.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> ag.Graph(ag.container({"in": x, "out": (ag.relu(x), ag.tanh(x))})).outputs
    {'in': 'x', 'out': ('relu_0', 'tanh_0')}
    """
    _nodes_only(outputs, "")
    return outputs


def _nodes_only(value: Any, place: str) -> None:
    if isinstance(value, Node):
        return
    if isinstance(value, Mapping | list | tuple) and value:
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in entries:
            _nodes_only(part, f"{place}[{key!r}]")
        return
    raise GraphError(
        f"a container holds nodes, not {value!r}" + (f" at {place}" if place else ""),
        source=here(),
        hint="ag.constant makes a node of a number or tensor",
    )


@spelt
def pad(x: Node, widths: Sequence[Sequence[int]], value: float = 0.0, *, name: str | None = None) -> Node:
    """A value around the last dimensions: one pair (before, after) for each.

    >>> import adaptergraph as ag
    >>> ag.pad(ag.input("x", shape=("batch", 3, 8, 8)), [(1, 0), (0, 2)])
    <unnamed: pad batch × 3 × 9 × 10>
    """
    rank = len(x.shape or ()) if isinstance(x, Node) else 0
    good = isinstance(widths, list | tuple) and all(isinstance(w, list | tuple) and len(w) == 2 for w in widths)
    if not good or (isinstance(x, Node) and not 0 < len(widths) <= rank):
        raise GraphError(
            f"pad takes a pair (before, after) for each of the last dimensions, not {widths!r}",
            node=name,
            source=here(),
        )
    around = tuple(check_sizes(list(w), 2, "a pair of pad", name, 0) for w in widths)
    return make("pad", [x], name, {"around": around, "value": float(value)})


@spelt
def resize(
    x: Node, size: int | Sequence[int], *, method: str = "nearest", antialias: bool = False, name: str | None = None
) -> Node:
    """Other spatial sizes (`F.interpolate`), of `batch × channels × spatial…`.

    Args:
        method: one of torch's modes; `"nearest-exact"` is Axon's `:nearest`.
        antialias: for `"bilinear"` and `"bicubic"`, when x gets smaller.

    Raises:
        GraphError: there is no such method; the nearest name is in the message.

    >>> import adaptergraph as ag
    >>> ag.resize(ag.input("x", shape=("batch", 3, 8, 8)), (16, 12), method="bilinear")
    <unnamed: resize batch × 3 × 16 × 12>
    """
    sizes = check_sizes(size, spatial(x, "resize", name), "the size of resize", name)
    if method not in METHODS:
        hint = suggestion(method, METHODS) if isinstance(method, str) else None
        raise GraphError(f"resize has no method {method!r}", node=name, source=here(), hint=hint)
    options = {"size": sizes, "method": method, "antialias": check_flag(antialias, "antialias", name)}
    return make("resize", [x], name, options)
