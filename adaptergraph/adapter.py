"""`Adapter`: Edifice's module, call for call. The bottleneck of Houlsby et al. 2019, section 2.1. Floor 3."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from . import layers
from .errors import GraphError, ShapeMismatch, check_flag, here, suggestion
from .features import axis_of, features_back, features_last
from .graph import Graph
from .layers.making import check_rate, check_size, make, spelt
from .layers.naming import scoped
from .layers.table import check_activation
from .names import check_name
from .node import Node, format_shape

# how the weights of `down` and `up` and the bias of `down` start: names of initializers, the deviation of a normal
# distribution, or None for torch's own; the bias of `up` starts at zero
INITS: dict[str, tuple[Any, Any, Any]] = {
    "zeros": (None, "zeros", None),
    "normal": (0.02, 1e-3, "zeros"),
    "houlsby": ("truncated_normal", "truncated_normal", "zeros"),
    "bert": (0.02, 0.02, "zeros"),
    "lora": (None, "zeros", "zeros"),
}


class Adapter:
    """Bottleneck adapters as Edifice writes them.

    `up` starts at zero, so a fresh adapter is the identity, unless `init=` says otherwise. Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    """

    @staticmethod
    def build(
        hidden_size: int,
        bottleneck_size: int = 64,
        activation: str = "relu",
        name: str = "adapter",
        **options: Any,
    ) -> Graph:
        """An adapter as a graph of its own: input `"input"` of shape `batch × hidden_size`, output of the same shape.

        Args:
            options: as for `wrap`.

        >>> import adaptergraph as ag
        >>> list(ag.Adapter.build(768, 64))
        ['input', 'adapter.down', 'adapter.act', 'adapter.up', 'adapter.residual']
        """
        x = layers.input("input", shape=("batch", check_size(hidden_size, "hidden_size")))
        return Graph(Adapter.wrap(x, bottleneck_size=bottleneck_size, activation=activation, name=name, **options))

    @staticmethod
    @spelt
    def wrap(
        layer_output: Node,
        *,
        hidden_size: int | None = None,
        bottleneck_size: int = 64,
        activation: str = "relu",
        name: str = "adapter",
        dropout: float = 0.0,
        scale: float | str = 1.0,
        init: str = "zeros",
        residual: bool = True,
        layer_norm: str | None = None,
    ) -> Node:
        """The adapted node: `x + scale · up(dropout(act(down(x))))` with x = `layer_output`.

        Args:
            layer_output: the node to adapt, `… × hidden`.
            hidden_size: may be left out, it is known; a wrong one is an error, never a broadcast.
            bottleneck_size: features between `down` and `up`.
            activation: name of an activation.
            name: the nodes are `name.down`, `name.act`, `name.up`, `name.residual`.
            dropout: after the activation, while training.
            scale: a number, or `"learned"`: one parameter that starts at one.
            init: `"zeros"`: down as `nn.Linear`, up zero. With zero biases: `"normal"`: down N(0, 0.02), up N(0, 1e-3);
                `"houlsby"`: both N(0, 0.01), cut off at 0.02; `"bert"`: both N(0, 0.02), which changes what comes out;
                `"lora"`: down Kaiming-uniform with a = √5, up zero. `"zeros"` and `"lora"` start as the identity.
            residual: add x.
            layer_norm: a norm `"before"` down or `"after"` up.

        Raises:
            ShapeMismatch: `hidden_size` is not the size of the layer.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 768))
        >>> layer = ag.dense(x, 768, name="pretrained_layer")
        >>> ag.Adapter.wrap(layer, hidden_size=768, bottleneck_size=64)
        <adapter.residual: add batch × 768>
        """
        return bottleneck(
            layer_output,
            hidden_size,
            bottleneck_size,
            activation=activation,
            dropout=dropout,
            scale=scale,
            init=init,
            residual=residual,
            layer_norm=layer_norm,
            prefix=check_name(name, here()),
        )

    @staticmethod
    def adapter_block(
        input: Node,
        hidden_size: int,
        *,
        bottleneck_size: int = 64,
        activation: str = "relu",
        name: str = "adapter",
        **options: Any,
    ) -> Node:
        """The same as `wrap`, with the size said.

        Args:
            options: as for `wrap`.
        """
        return Adapter.wrap(
            input,
            hidden_size=check_size(hidden_size, "hidden_size"),
            bottleneck_size=bottleneck_size,
            activation=activation,
            name=name,
            **options,
        )

    @staticmethod
    def output_size(hidden_size: int) -> int:
        """The size an adapter gives for this size: the same.

        >>> Adapter.output_size(768)
        768
        """
        return check_size(hidden_size, "hidden_size")


def bottleneck(
    x: Node,
    hidden_size: int | None,
    size: int,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    scale: float | str = 1.0,
    init: str = "zeros",
    residual: bool = True,
    layer_norm: str | None = None,
    like: Node | None = None,
    prefix: str = "",
) -> Node:
    """The nodes of a bottleneck: `x + scale · up(dropout(act(down(x))))`, named below `prefix`.

    It works on the features, wherever they are: at each place of an image it is a convolution of size one. Without a
    residual it may give what fits to another node than x, `like`.
    """
    axis = axis_of(x) if isinstance(x, Node) else 0
    hidden = _hidden(x, axis, hidden_size, prefix)
    check_size(size, "bottleneck_size")
    check_activation(activation)
    check_rate(dropout)
    check_choices(scale=scale, init=init, residual=residual, layer_norm=layer_norm)
    down_init, up_init, bias_init = INITS[init]

    def called(part: str) -> str:
        return f"{prefix}.{part}" if prefix else part

    axis_after = axis if like is None else axis_of(like)
    given = hidden if like is None or not like.shape else like.shape[axis_after]
    if 0 in (hidden, given):
        empty = x if hidden == 0 or like is None else like
        raise ShapeMismatch(
            f"{empty.name!r} has no features: its shape is {format_shape(empty.shape)}",
            node=empty.name,
            source=here(),
            hint="a body needs values to work on: splice elsewhere, or leave it out of the pattern",
        )
    h = features_last(x, axis, called("features_last"))
    h = layers.layer_norm(h, name=called("norm")) if layer_norm == "before" else h
    h = layers.dense(h, size, weight_init=down_init, bias_init=bias_init, name=called("down"))
    h = layers.activation(h, activation, name=called("act"))
    if dropout:
        h = layers.dropout(h, rate=dropout, name=called("dropout"))
    after = given if isinstance(given, int) else hidden
    h = layers.dense(h, after, weight_init=up_init, bias_init="zeros", name=called("up"))
    if scale == "learned":
        factor = layers.param(called("scale"), (1,), init="ones", dtype=h.dtype)
        h = layers.multiply([h, factor], name=called("scaled"))
    elif scale != 1.0:
        h = layers.multiply([h, layers.constant(float(scale), name=called("factor"))], name=called("scaled"))
    if layer_norm == "after":
        h = layers.layer_norm(h, name=called("norm"))
    moved, h = h, features_back(h, axis_after, called("features_first"))
    if residual:
        h = layers.add([x, h], name=called("residual"))
    elif h is not moved and like is None:
        # readers of x may rely on that
        h = make("contiguous", [h], called("contiguous"), {})
    return _in_body(h, x, scoped(prefix) if prefix else "")


def _in_body(node: Node, outside: Node, body: str) -> Node:
    """The same nodes, marked as one body."""
    if not body or node is outside:
        return node
    inputs = tuple(_in_body(i, outside, body) if i is not outside else i for i in node.inputs)
    return replace(node, inputs=inputs, body=body)


def _hidden(x: Node, axis: int, hidden_size: int | None, prefix: str) -> int:
    if not isinstance(x, Node):
        raise GraphError(f"an adapter wraps a node, not {x!r}", source=here())
    known = x.shape[axis] if x.shape else None
    if hidden_size is not None:
        check_size(hidden_size, "hidden_size")
    if not isinstance(known, int):
        raise ShapeMismatch(
            f"an adapter needs a layer whose features are known; {x.name or x.op!r} gives {format_shape(x.shape)}",
            node=x.name,
            source=here(),
            hint="wrap a layer whose number of features is known",
        )
    if hidden_size is not None and hidden_size != known:
        body = prefix or "adapter"
        raise ShapeMismatch(
            f"body {body!r} does not fit its host",
            node=x.name,
            sides=[
                ("host", x.name or x.op, format_shape(x.shape)),
                (
                    "body",
                    f"{body}.up",
                    format_shape(tuple(hidden_size if i == axis else d for i, d in enumerate(x.shape or ()))),
                    f"(hidden_size={hidden_size})",
                ),
            ],
            source=here(),
            hint=f"leave hidden_size out, or set it to {known}",
        )
    return known


def check_choices(*, scale: Any, init: Any, residual: Any, layer_norm: Any) -> None:
    """The options that are one of a few words."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if not number and scale != "learned":
        raise GraphError(f"scale is a finite number or 'learned', not {scale!r}", source=here())
    if not isinstance(init, str) or init not in INITS:
        hint = suggestion(init, INITS) if isinstance(init, str) else None
        raise GraphError(f"unknown init {init!r}", source=here(), hint=hint)
    check_flag(residual, "residual")
    if layer_norm not in (None, "before", "after"):
        raise GraphError(f"layer_norm is None, 'before' or 'after', not {layer_norm!r}", source=here())
