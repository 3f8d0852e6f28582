"""Axon's functional calls: each makes one immutable, named node, its shape known at once. Floor 2.

The first argument is the input node (or nodes), options are keyword-only after the size, `name=` is everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import GraphError, Source, here
from ..names import check_input_name, check_name
from ..node import Dim, Node, Param, check_present
from ..shapes import infer
from .initializers import check_initializer
from .naming import current_space, scoped, shared
from .table import check_activation, runnable

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
        if isinstance(dim, bool) or not (dim is None or isinstance(dim, str) or (isinstance(dim, int) and dim > 0)):
            raise GraphError(
                f"{dim!r} in the shape of input {name!r} is no size",
                node=str(name),
                source=source,
                hint="a positive number, a name such as 'batch', or None",
            )
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"the dtype of input {name!r} is a torch.dtype, not {dtype!r}", source=source)
    options = {"optional": True} if _flag(optional, "optional", str(name)) else {}
    return Node("input", (), check_input_name(name, source), tuple(shape), dtype, options, source=source)


def param(name: str, shape: Sequence[int], *, init: Any = "zeros", dtype: torch.dtype = torch.float32) -> Node:
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
    sizes = tuple(_size(s, f"a size of param {name!r}") for s in shape)
    options = {"init": check_initializer(init)}
    own = {"": Param(sizes, dtype)}
    return Node("param", (), check_name(scoped(name), source), sizes, dtype, options, own, source=source)


def constant(value: torch.Tensor | float | int, *, name: str | None = None) -> Node:
    """A tensor or number that never changes; kept in the compiled model as a buffer, not in `state_dict()`."""
    source = here()
    if isinstance(value, bool) or not isinstance(value, torch.Tensor | float | int):
        raise GraphError(f"a constant is a tensor or a number, not {value!r}", node=name, source=source)
    tensor = value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
    options = {"value": tensor}
    checked = None if name is None else check_name(scoped(name), source)
    return Node(
        "constant", (), checked, tuple(tensor.shape), tensor.dtype, options, source=source, space=current_space()
    )


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
    options = {"size": _size(size, "the size of dense", name), "bias": _flag(bias, "bias", name)}
    node = _node("dense", [x], name, options, share=share, weight_init=weight_init, bias_init=bias_init)
    return node if activation is None else _activation(activation, node, None)


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
    options = {"vocab_size": _size(vocab_size, "vocab_size", name), "size": _size(size, "the size of embedding", name)}
    return _node("embedding", [x], name, options, share=share, weight_init=weight_init)


def activation(x: Node, activation: str, *, name: str | None = None, **options: Any) -> Node:
    """An activation by its name, with torch's options.

    Raises:
        GraphError: there is no such activation; the nearest name is in the message.
    """
    return _activation(activation, x, name, **options)


def relu(x: Node, *, name: str | None = None) -> Node:
    """max(x, 0)."""
    return _activation("relu", x, name)


def gelu(x: Node, *, approximate: str = "none", name: str | None = None) -> Node:
    """X Φ(x); `approximate="tanh"` is the approximation of Hendrycks and Gimpel 2016."""
    return _activation("gelu", x, name, **({} if approximate == "none" else {"approximate": approximate}))


def silu(x: Node, *, name: str | None = None) -> Node:
    """X sigmoid(x), also called swish."""
    return _activation("silu", x, name)


def tanh(x: Node, *, name: str | None = None) -> Node:
    """The hyperbolic tangent."""
    return _activation("tanh", x, name)


def sigmoid(x: Node, *, name: str | None = None) -> Node:
    """1 / (1 + exp(-x))."""
    return _activation("sigmoid", x, name)


def softmax(x: Node, *, dim: int = -1, name: str | None = None) -> Node:
    """exp(x) normalised to sum one over `dim`."""
    return _activation("softmax", x, name, dim=dim)


def dropout(x: Node, *, rate: float = 0.5, name: str | None = None) -> Node:
    """Zeroes a share of the values while training and scales the rest (`nn.Dropout`)."""
    return _node("dropout", [x], name, {"rate": check_rate(rate, name)})


def layer_norm(x: Node, *, eps: float = 1e-5, share: Node | None = None, name: str | None = None) -> Node:
    """Normalises the last dimension (`nn.LayerNorm`): scale starts at one, shift at zero."""
    return _node("layer_norm", [x], name, {"eps": float(eps)}, share=share)


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
        mask: true where a key may be seen: `batch × seq`, or anything that broadcasts to `batch × heads × seq × seq`.
        dropout: of the attention weights, while training.
    """
    heads = _size(num_heads, "num_heads", name)
    options = {"num_heads": heads, "dropout": check_rate(dropout, name), "causal": _flag(causal, "causal", name)}
    return _node("attention", [query, key, value, *([] if mask is None else [mask])], name, options)


def add(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The sum of two or more nodes."""
    return _node("add", _several(x, more, "add"), name, {})


def subtract(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The first node minus the others."""
    return _node("subtract", _several(x, more, "subtract"), name, {})


def multiply(x: Sequence[Node], *more: Node, name: str | None = None) -> Node:
    """The product of two or more nodes."""
    return _node("multiply", _several(x, more, "multiply"), name, {})


def concatenate(x: Sequence[Node], *more: Node, dim: int = -1, name: str | None = None) -> Node:
    """Nodes side by side along `dim`."""
    return _node("concatenate", _several(x, more, "concatenate"), name, {"dim": dim})


def reshape(x: Node, shape: Sequence[Dim], *, name: str | None = None) -> Node:
    """Another shape: sizes, names of sizes that x has (`"batch"`), and at most one -1 for what is left.

    >>> import adaptergraph as ag
    >>> ag.reshape(ag.input("x", shape=("batch", 12)), ("batch", 3, -1))
    <unnamed: reshape batch × 3 × 4>
    """
    source = here()
    _check_inputs("reshape", [x], source)
    sizes: list[Any] = []
    for dim in shape:
        if isinstance(dim, str):
            if dim not in (x.shape or ()):
                raise GraphError(
                    f"reshape asks for {dim!r}, which {x.name or x.op!r} has not",
                    node=name,
                    sides=[("reads", x.name or x.op, " × ".join(map(str, x.shape or ())))],
                    source=source,
                )
            sizes.append(((x.shape or ()).index(dim),))
        elif isinstance(dim, int) and not isinstance(dim, bool):
            sizes.append(dim)
        else:
            raise GraphError(f"{dim!r} is no size to reshape to", node=name, source=source)
    return _node("reshape", [x], name, {"sizes": tuple(sizes)})


def transpose(x: Node, dims: Sequence[int] | None = None, *, name: str | None = None) -> Node:
    """The dimensions in another order; without `dims` all but the batch reversed."""
    rank = len(x.shape or ()) if isinstance(x, Node) else 0
    order = (0, *range(rank - 1, 0, -1)) if dims is None else tuple(dims)
    return _node("transpose", [x], name, {"dims": order})


def flatten(x: Node, *, name: str | None = None) -> Node:
    """Everything but the batch in one dimension."""
    return _node("flatten", [x], name, {})


def module(x: Node | Sequence[Node], nn_module: torch.nn.Module, *, name: str | None = None) -> Node:
    """Any torch module as a node. It is copied when the graph is compiled; yours is never changed."""
    source = here()
    if not isinstance(nn_module, torch.nn.Module):
        raise GraphError(f"module() takes an nn.Module, not {nn_module!r}", node=name, source=source)
    return _node("module", [x] if isinstance(x, Node) else list(x), name, {"module": nn_module})


def nx(x: Node | Sequence[Node], fn: Callable[..., torch.Tensor], *, name: str | None = None) -> Node:
    """Any function of tensors as a node; it has no parameters."""
    if not callable(fn):
        raise GraphError(f"nx() takes a function of tensors, not {fn!r}", node=name, source=here())
    return _node("nx", [x] if isinstance(x, Node) else list(x), name, {"fn": fn})


def layer(fn: Callable[..., torch.Tensor], inputs: Sequence[Node], *, name: str | None = None, **options: Any) -> Node:
    """A layer of your own: `fn(*inputs, **options)`, where inputs may be nodes of `param`.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> ag.layer(torch.mul, [x, ag.param("gain.scale", (8,), init="ones")], name="gain")
    <gain: layer batch × 8>
    """
    if not callable(fn):
        raise GraphError(f"layer() takes a function of tensors, not {fn!r}", node=name, source=here())
    return _node("layer", list(inputs), name, {"fn": fn, **({"options": options} if options else {})})


# ---------------------------------------------------------------------- shared by all of them


def _node(
    op: str, inputs: Sequence[Any], name: str | None, options: Mapping[str, Any], share: Any = None, **inits: Any
) -> Node:
    source = here()
    _check_inputs(op, inputs, source)
    if name is not None:
        name = check_name(scoped(check_name(name, source)), source)
    full = {**options, **{k: check_initializer(v) for k, v in inits.items() if v is not None}}
    spec = infer(op, runnable(op, full), inputs, full, source, name)
    shape, dtype = (spec.value.shape, spec.value.dtype) if spec.value is not None else (None, None)
    node = Node(op, tuple(inputs), name, shape, dtype, full, spec.params, source=source, space=current_space())
    return node if share is None else shared(node, share)


def _activation(activation: Any, x: Node, name: str | None, **options: Any) -> Node:
    if activation == "softmax":
        options.setdefault("dim", -1)
    return _node(check_activation(activation), [x], name, options)


def _check_inputs(op: str, inputs: Sequence[Any], source: Source | None) -> None:
    for node in inputs:
        if not isinstance(node, Node):
            raise GraphError(f"{op} reads nodes, not {type(node).__name__}: {node!r}", source=source)
        if node.shape is None:
            raise GraphError(
                f"{op} reads {node.name or node.op!r}, which gives no single tensor", node=node.name, source=source
            )
        check_present(op, node, source)


def _several(x: Any, more: Sequence[Any], op: str) -> list[Any]:
    inputs = [x, *more] if isinstance(x, Node) else [*x, *more]
    if len(inputs) < 2:
        raise GraphError(f"{op} takes two or more nodes, not {len(inputs)}", source=here())
    return inputs


def _size(value: Any, what: str, name: str | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GraphError(
            f"{what}{f' {name!r}' if name else ''} is a positive whole number, not {value!r}", node=name, source=here()
        )
    return value


def _flag(value: Any, what: str, name: str | None) -> bool:
    if not isinstance(value, bool):
        raise GraphError(f"{what} is True or False, not {value!r}", node=name, source=here())
    return value


def check_rate(value: Any, name: str | None = None) -> float:
    """A dropout rate: 0 ≤ rate < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise GraphError(f"a dropout rate is at least 0 and less than 1, not {value!r}", node=name, source=here())
    return float(value)
