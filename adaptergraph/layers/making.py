"""What all layers share: how a node is made, and the checks of what is given. Floor 2."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch

from ..errors import GraphError, ShapeMismatch, Source, here, suggestion
from ..names import check_name
from ..node import Node, check_present, format_shape
from ..shapes import infer
from .initializers import check_initializer
from .naming import current_space, scoped, shared
from .table import ACTIVATIONS, OPS, check_activation, runnable

P = ParamSpec("P")
T = TypeVar("T")


def spelt(fn: Callable[P, T]) -> Callable[P, T]:
    """Makes a misspelt option an error of ours, with the nearest option."""
    parameters = inspect.signature(fn).parameters.values()
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for word in kwargs:
            if word not in known and not takes_all:
                what = fn.__qualname__
                raise GraphError(f"{what} has no option {word!r}", source=here(), hint=suggestion(word, known))
        return fn(*args, **kwargs)

    return checked


def make(
    op: str, inputs: Sequence[Any], name: str | None, options: Mapping[str, Any], share: Any = None, **inits: Any
) -> Node:
    """A node of an op: its options checked, its shape known, its weights its own or those of `share`."""
    source = here()
    check_inputs(op, inputs, source)
    if name is not None:
        name = check_name(scoped(check_name(name, source)), source)
    spec = infer(op, runnable(op, options), inputs, options, source, name)
    shape, dtype, axis = (spec.value.shape, spec.value.dtype, spec.value.axis) if spec.value else (None, None, None)
    for key, init in inits.items():
        own = spec.params.get(key.removesuffix("_init"))
        if init is not None and own is not None:
            options = {**options, key: check_initializer(init, own.shape, f"the {key.removesuffix('_init')} of {op}")}
    node = Node(
        *(op, tuple(inputs), name, shape, dtype, options, spec.params),
        source=source,
        space=current_space(),
        axis=axis,
    )
    return node if share is None else shared(node, share)


def reading(node: Node, inputs: Sequence[Node]) -> Node:
    """The same node for values of other shapes: its op, options and parameters stay, what it gives is found again.

    Raises:
        ShapeMismatch: it does not take these values, or would need other parameters for them.
    """
    owner = inputs[0] if node.op == "item" else node
    reads = owner.inputs if node.op == "item" else inputs
    spec = infer(owner.op, runnable(owner.op, owner.options), reads, owner.options, node.source, node.name)
    value = spec.parts[node.options["index"]] if node.op == "item" else spec.value
    if node.op != "item" and spec.params != node.params:
        raise ShapeMismatch(f"{node.op} {node.name!r} needs other parameters for what it reads", source=node.source)
    shape, dtype, axis = (None, None, None) if value is None else (value.shape, value.dtype, value.axis)
    return replace(node, inputs=tuple(inputs), shape=shape, dtype=dtype, axis=axis)


def activated(activation: Any, x: Node, name: str | None, **options: Any) -> Node:
    """A node of an activation."""
    known = ACTIVATIONS[check_activation(activation)][1]
    for word in options:
        if word not in known:
            hint = suggestion(word, known) if known else "it has no options"
            raise GraphError(f"{activation} has no option {word!r}", node=name, source=here(), hint=hint)
    if activation in ("softmax", "log_softmax"):
        options.setdefault("dim", -1)
    if "dim" in options:
        check_axis(options["dim"], x, name)
    return make(activation, [x], name, options)


def check_inputs(op: str, inputs: Sequence[Any], source: Source | None) -> None:
    """What an op reads: nodes, of floats where it needs them."""
    floats = OPS[op].floats if op in OPS else 0
    for i, node in enumerate(inputs):
        if not isinstance(node, Node):
            raise GraphError(
                f"{op} reads nodes, not {type(node).__name__}: {str(node)[:60]}",
                source=source,
                hint="a tensor or number becomes a node with ag.constant(…)"
                if isinstance(node, torch.Tensor | int | float)
                else None,
            )
        if node.shape is None:
            raise GraphError(
                f"{op} reads {node.name or node.op!r}, which gives no single tensor",
                node=node.name,
                source=source,
                hint="read one of its outputs",
            )
        check_present(op, node, source)
        if i < floats and node.dtype is not None and not (node.dtype.is_floating_point or node.dtype.is_complex):
            raise ShapeMismatch(
                f"{op} reads floats, and {node.name or node.op!r} is {node.dtype}",
                node=node.name,
                sides=[("reads", node.name or node.op, format_shape(node.shape), str(node.dtype))],
                source=source,
                hint="ag.nx(x, torch.Tensor.float) makes floats of it",
            )


def check_function(fn: Any, what: str, name: str | None) -> None:
    """A function of tensors that brings no parameters."""
    if not callable(fn):
        raise GraphError(f"{what}() takes a function of tensors, not {fn!r}", node=name, source=here())
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, torch.nn.Module):
        raise GraphError(
            f"{what}() takes a function without parameters, not a {type(owner).__name__}",
            node=name,
            source=here(),
            hint="ag.module(x, nn_module)",
        )


def listed(x: Any, op: str) -> list[Any]:
    """A node or a list of nodes as a list."""
    if isinstance(x, Node):
        return [x]
    if not isinstance(x, Sequence) or isinstance(x, str):
        raise GraphError(f"{op} reads a node or a list of nodes, not {x!r}", source=here())
    return list(x)


def several(x: Any, more: Sequence[Any], op: str) -> list[Any]:
    """Two or more nodes, given as a list or one by one."""
    inputs = [*listed(x, op), *more]
    if len(inputs) < 2:
        raise GraphError(f"{op} takes two or more nodes, not {len(inputs)}", source=here())
    return inputs


def check_axis(value: Any, x: Any, name: str | None) -> int:
    """The number of a dimension of x."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise GraphError(f"a dimension is a whole number, not {value!r}", node=name, source=here())
    shape = x.shape if isinstance(x, Node) else None
    if shape is not None and not -len(shape) <= value < len(shape):
        raise ShapeMismatch(
            f"{x.name or x.op!r} has no dimension {value}",
            node=name,
            sides=[("reads", x.name or x.op, format_shape(shape))],
            source=here(),
            hint=f"from {-len(shape)} to {len(shape) - 1}",
        )
    return value


def check_size(value: Any, what: str, name: str | None = None) -> int:
    """A positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GraphError(
            f"{what}{f' {name!r}' if name else ''} is a positive whole number, not {value!r}", node=name, source=here()
        )
    return value


def check_rate(value: Any, name: str | None = None) -> float:
    """A dropout rate: 0 ≤ rate < 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise GraphError(f"a dropout rate is at least 0 and less than 1, not {value!r}", node=name, source=here())
    return float(value)
