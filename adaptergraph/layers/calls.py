"""Axon's functional calls: each makes one immutable, named node, its shape known at once. Floor 2.

The first argument is the input node (or nodes), options are keyword-only after the size, `name=` is everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import GraphError, ShapeMismatch, check_flag, here
from ..names import check_input_name, check_name
from ..node import Dim, Node, Param, format_shape
from .initializers import check_initializer
from .making import (
    activated,
    check_axis,
    check_function,
    check_inputs,
    check_rate,
    check_size,
    listed,
    make,
    several,
    spelt,
)
from .naming import current_space, scoped

__all__ = [
    "activation",
    "add",
    "attention",
    "concatenate",
    "constant",
    "dense",
    "dropout",
    "embedding",
    "flatten",
    "gelu",
    "input",
    "layer",
    "layer_norm",
    "module",
    "multiply",
    "nx",
    "param",
    "relu",
    "reshape",
    "sigmoid",
    "silu",
    "softmax",
    "subtract",
    "tanh",
    "transpose",
]


@spelt
def input(name: str, shape: Sequence[Dim], dtype: torch.dtype = torch.float32, *, optional: bool = False) -> Node:
    """An input of the graph: an argument of the compiled model's `forward`.

    Args:
        name: a plain identifier.
        shape: sizes; a name such as `"batch"` stands for any size, equal wherever the name is; None for any size.
        dtype: checked when the model is called.
        optional: it may be left out of a call; only `ag.optional` and `ag.or_else` can read it.

    Raises:
        GraphError: the name or shape cannot be used.

    >>> import adaptergraph as ag
    >>> ag.input("ids", shape=("batch", "seq"), dtype=torch.int64)
    <ids: input batch × seq>
    """
    source = here()
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise GraphError(f"the shape of input {name!r} is a tuple of sizes, not {shape!r}", source=source)
    for dim in shape:
        number = isinstance(dim, int) and not isinstance(dim, bool) and dim > 0
        if not (dim is None or number or (isinstance(dim, str) and dim)):
            raise GraphError(
                f"{dim!r} in the shape of input {name!r} is no size",
                node=str(name),
                source=source,
                hint="a positive number, a name such as 'batch', or None",
            )
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"the dtype of input {name!r} is a torch.dtype, not {dtype!r}", source=source)
    options = {"optional": True} if check_flag(optional, "optional") else {}
    return Node("input", (), check_input_name(name, source), tuple(shape), dtype, options, source=source)


@spelt
def param(name: str, shape: Sequence[int], *, init: Any = "zeros", dtype: torch.dtype | None = torch.float32) -> Node:
    """A trained tensor as a node of its own; `name` is its key in `state_dict()`.

    Args:
        shape: its sizes.
        init: one of Axon's initializer names, a callable that fills a tensor in place, or a float (normal deviation).

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> list(ag.Graph(x * ag.param("scale", (8,), init="ones")).params)
    ['scale']
    """
    source = here()
    name = check_name(scoped(check_name(name, source)), source)
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise GraphError(f"the shape of param {name!r} is a tuple of sizes, not {shape!r}", node=name, source=source)
    sizes = tuple(check_size(s, f"a size of param {name!r}") for s in shape)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise GraphError(f"param {name!r} is trained, so its dtype is one of floats, not {dtype!r}", source=source)
    options = {"init": check_initializer(init, sizes, f"param {name!r}")}
    return Node("param", (), name, sizes, dtype, options, {"": Param(sizes, dtype)}, source=source)


@spelt
def constant(value: torch.Tensor | float | int, *, name: str | None = None) -> Node:
    """A tensor or number that never changes; kept in the compiled model as a buffer, not in `state_dict()`.

    >>> import adaptergraph as ag
    >>> ag.constant(2.0, name="two")
    <two: constant scalar>
    """
    source = here()
    if isinstance(value, bool) or not isinstance(value, torch.Tensor | float | int):
        raise GraphError(f"a constant is a tensor or a number, not {value!r}", node=name, source=source)
    tensor = value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
    options = {"value": tensor}
    checked = None if name is None else check_name(scoped(check_name(name, source)), source)
    return Node(
        "constant", (), checked, tuple(tensor.shape), tensor.dtype, options, source=source, space=current_space()
    )


@spelt
def dense(
    x: Node,
    size: int,
    *,
    bias: bool = True,
    activation: str | None = None,
    weight_init: Any = None,
    bias_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """A linear layer over the last dimension: `nn.Linear`, `... × features` to `... × size`.

    Args:
        size: features of the output.
        activation: adds a node of this activation after it.
        weight_init, bias_init: see `param`; None is torch's own (Kaiming-uniform).
        share: another dense node, whose weights this one uses.

    Raises:
        GraphError: `size` is no positive number.

    >>> import adaptergraph as ag
    >>> ag.dense(ag.input("x", shape=("batch", 768)), 64)
    <unnamed: dense batch × 64>
    """
    options = {"size": check_size(size, "the size of dense", name), "bias": check_flag(bias, "bias", name)}
    node = make("dense", [x], name, options, share, weight_init=weight_init, bias_init=bias_init)
    return node if activation is None else activated(activation, node, None)


@spelt
def embedding(
    x: Node,
    vocab_size: int,
    size: int,
    *,
    weight_init: Any = None,
    share: Node | None = None,
    name: str | None = None,
) -> Node:
    """Rows of a trained table: integers `...` to `... × size` (`nn.Embedding`)."""
    rows, features = check_size(vocab_size, "vocab_size", name), check_size(size, "the size of embedding", name)
    return make("embedding", [x], name, {"vocab_size": rows, "size": features}, share, weight_init=weight_init)


@spelt
def activation(x: Node, activation: str, *, name: str | None = None, **options: Any) -> Node:
    """An activation by its name, with torch's options.

    Raises:
        GraphError: there is no such activation; the nearest name is in the message.
    """
    return activated(activation, x, name, **options)


@spelt
def relu(x: Node, *, name: str | None = None) -> Node:
    """max(x, 0)."""
    return activated("relu", x, name)


@spelt
def gelu(x: Node, *, approximate: str = "none", name: str | None = None) -> Node:
    """X Φ(x); `approximate="tanh"` is the approximation of Hendrycks and Gimpel 2016."""
    return activated("gelu", x, name, **({} if approximate == "none" else {"approximate": approximate}))


@spelt
def silu(x: Node, *, name: str | None = None) -> Node:
    """X sigmoid(x), also called swish."""
    return activated("silu", x, name)


@spelt
def tanh(x: Node, *, name: str | None = None) -> Node:
    """The hyperbolic tangent."""
    return activated("tanh", x, name)


@spelt
def sigmoid(x: Node, *, name: str | None = None) -> Node:
    """1 / (1 + exp(-x))."""
    return activated("sigmoid", x, name)


@spelt
def softmax(x: Node, *, dim: int = -1, name: str | None = None) -> Node:
    """exp(x) normalised to sum one over `dim`."""
    return activated("softmax", x, name, dim=dim)


@spelt
def dropout(x: Node, *, rate: float = 0.5, name: str | None = None) -> Node:
    """Zeroes a share of the values while training and scales the rest (`nn.Dropout`)."""
    return make("dropout", [x], name, {"rate": check_rate(rate, name)})


@spelt
def layer_norm(x: Node, *, eps: float = 1e-5, share: Node | None = None, name: str | None = None) -> Node:
    """Normalises the last dimension (`nn.LayerNorm`): scale starts at one, shift at zero."""
    if isinstance(eps, bool) or not isinstance(eps, int | float) or eps < 0:
        raise GraphError(f"eps is a number that is not negative, not {eps!r}", node=name, source=here())
    return make("layer_norm", [x], name, {"eps": float(eps)}, share)


@spelt
def attention(
    query: Node,
    key: Node,
    value: Node,
    *,
    num_heads: int,
    mask: Node | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    name: str | None = None,
) -> Node:
    """Scaled dot-product attention in heads, of queries, keys and values that are projected already.

    Args:
        query: `batch × seq × size`, as are `key` and `value`; the size is a multiple of `num_heads`.
        mask: true (or not 0) where a key may be seen, floats are added to the scores: `batch × keys`,
            `batch × queries × keys`, or anything that broadcasts to `batch × heads × queries × keys`.
        dropout: of the attention weights, while training.
        causal: a query sees no later key.
    """
    for node in (query, key, value):
        if isinstance(node, Node) and node.shape is not None and len(node.shape) < 3:
            raise ShapeMismatch(
                f"attention reads batch × seq × size, not {format_shape(node.shape)}",
                node=name,
                sides=[("reads", node.name or node.op, format_shape(node.shape))],
                source=here(),
                hint='reshape it: ag.reshape(x, ("batch", -1, size))',
            )
    heads = check_size(num_heads, "num_heads", name)
    options = {"num_heads": heads, "dropout": check_rate(dropout, name), "causal": check_flag(causal, "causal", name)}
    return make("attention", [query, key, value, *([] if mask is None else [mask])], name, options)


@spelt
def add(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The sum of two or more nodes."""
    return make("add", several(x, more, "add"), name, {})


@spelt
def subtract(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The first node minus the others."""
    return make("subtract", several(x, more, "subtract"), name, {})


@spelt
def multiply(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The product of two or more nodes."""
    return make("multiply", several(x, more, "multiply"), name, {})


@spelt
def concatenate(x: Sequence[Node], *more: Node, dim: int = -1, name: str | None = None) -> Node:
    """Nodes side by side along `dim`."""
    inputs = several(x, more, "concatenate")
    return make("concatenate", inputs, name, {"dim": check_axis(dim, inputs[0], name)})


@spelt
def reshape(x: Node, shape: Sequence[Dim], *, name: str | None = None) -> Node:
    """Another shape: sizes, names of sizes that x has (`"batch"`), and at most one -1 for what is left.

    >>> import adaptergraph as ag
    >>> ag.reshape(ag.input("x", shape=("batch", 12)), ("batch", 3, -1))
    <unnamed: reshape batch × 3 × 4>
    """
    source = here()
    check_inputs("reshape", [x], source)
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise GraphError(f"reshape takes a tuple of sizes, not {shape!r}", node=name, source=source)
    known = x.shape or ()
    sizes: list[Any] = []
    for dim in shape:
        if isinstance(dim, str):
            if dim not in known:
                raise GraphError(
                    f"reshape asks for {dim!r}, which {x.name or x.op!r} has not",
                    node=name,
                    sides=[("reads", x.name or x.op, format_shape(known))],
                    source=source,
                    hint="a text stands for a size that the input has by this name; -1 is what is left",
                )
            sizes.append((known.index(dim),))
        elif isinstance(dim, int) and not isinstance(dim, bool) and dim >= -1:
            sizes.append(dim)
        else:
            raise GraphError(
                f"{dim!r} is no size to reshape to",
                node=name,
                source=source,
                hint="a whole number, -1 for what is left, or the name of a size of the input",
            )
    return make("reshape", [x], name, {"sizes": tuple(sizes)})


@spelt
def transpose(x: Node, dims: Sequence[int] | None = None, *, name: str | None = None) -> Node:
    """The dimensions in another order; without `dims` all but the batch reversed."""
    check_inputs("transpose", [x], here())
    if dims is None:
        order = (0, *range(len(x.shape or ()) - 1, 0, -1))
    elif isinstance(dims, Sequence) and not isinstance(dims, str):
        order = tuple(check_axis(d, x, name) for d in dims)
    else:
        raise GraphError(f"transpose takes a tuple of dimensions, not {dims!r}", node=name, source=here())
    return make("transpose", [x], name, {"dims": order})


@spelt
def flatten(x: Node, *, name: str | None = None) -> Node:
    """Everything but the batch in one dimension."""
    return make("flatten", [x], name, {})


@spelt
def module(x: Node | Sequence[Node], nn_module: torch.nn.Module, *, name: str | None = None) -> Node:
    """Any torch module as a node. It is copied when the graph is compiled; yours is never changed.

    >>> import adaptergraph as ag
    >>> ag.module(ag.input("x", shape=("batch", 3, 8, 8)), torch.nn.Conv2d(3, 5, 3), name="conv")
    <conv: module batch × 5 × 6 × 6>
    """
    if not isinstance(nn_module, torch.nn.Module):
        raise GraphError(f"module() takes an nn.Module, not {nn_module!r}", node=name, source=here())
    return make("module", listed(x, "module"), name, {"module": nn_module})


@spelt
def nx(x: Node | Sequence[Node], fn: Callable[..., torch.Tensor], *, name: str | None = None) -> Node:
    """Any function of tensors as a node; it has no parameters."""
    check_function(fn, "nx", name)
    return make("nx", listed(x, "nx"), name, {"fn": fn})


@spelt
def layer(fn: Callable[..., torch.Tensor], inputs: Sequence[Node], *, name: str | None = None, **options: Any) -> Node:
    """A layer of your own: `fn(*inputs, **options)`, where inputs may be nodes of `param`.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> ag.layer(torch.mul, [x, ag.param("gain.scale", (8,), init="ones")], name="gain")
    <gain: layer batch × 8>
    """
    check_function(fn, "layer", name)
    for key, value in options.items():
        if isinstance(value, torch.Tensor | Node):
            raise GraphError(
                f"option {key!r} of a layer is a plain value, not a {type(value).__name__}",
                node=name,
                source=here(),
                hint="a tensor is one of the inputs: ag.constant(…), or ag.param(…) for one that is trained",
            )
    own = {"options": copy.deepcopy(options)} if options else {}
    return make("layer", listed(inputs, "layer"), name, {"fn": fn, **own})
