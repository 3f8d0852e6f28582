"""Blocks of the literature as graphs: every node named, so that adapters can be spliced anywhere in them. Floor 3."""

from __future__ import annotations

from typing import Literal

from . import layers
from .errors import GraphError, here
from .names import check_name
from .node import Node, format_shape


def transformer_layer(
    x: Node,
    num_heads: int,
    d_ff: int,
    *,
    mask: Node | None = None,
    dropout: float = 0.0,
    activation: str = "gelu",
    norm: Literal["post", "pre"] = "post",
    eps: float = 1e-5,
    name: str = "layer",
) -> Node:
    """A transformer encoder layer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    The nodes are `name.attention.query`, `.key`, `.value`, `.heads`, `.output`, `name.norm1`, `name.ffn.up`, `.act`,
    `.down`, `name.norm2`, and the residual sums `name.add1`, `name.add2`. Serial adapters (Houlsby et al. 2019) go
    after `{attention.output,ffn.down}`.

    Args:
        x: `batch × seq × size`.
        num_heads: heads; a divisor of the size.
        d_ff: features of the feed-forward layer.
        mask: true where a position may be seen: `batch × seq`, or what broadcasts to `batch × heads × seq × seq`.
        dropout: after attention and feed-forward, and of the attention weights, while training.
        activation: of the feed-forward layer.
        norm: `"post"` normalises after each residual sum (BERT), `"pre"` before each sub-layer (GPT-2).
        eps: of the norms.

    Raises:
        GraphError: the size of x is no multiple of `num_heads`, or an option is unknown.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", "seq", 768))
    >>> graph = ag.Graph(ag.blocks.transformer_layer(x, 12, 3072))
    >>> graph.select("layer.{attention.output,ffn.down}").expect(2)
    <Selection of 2: layer.attention.output, layer.ffn.down>
    """
    size = _size(x, num_heads, check_name(name, here()))
    if norm not in ("post", "pre"):
        raise GraphError(f"norm is 'post' or 'pre', not {norm!r}", node=name, source=here())

    def attend(h: Node) -> Node:
        query, key, value = (layers.dense(h, size, name=f"{name}.attention.{n}") for n in ("query", "key", "value"))
        options = {"num_heads": num_heads, "mask": mask, "dropout": dropout}
        heads = layers.attention(query, key, value, **options, name=f"{name}.attention.heads")  # type: ignore[arg-type]
        return layers.dense(heads, size, name=f"{name}.attention.output")

    def feed(h: Node) -> Node:
        h = layers.dense(h, d_ff, name=f"{name}.ffn.up")
        return layers.dense(layers.activation(h, activation, name=f"{name}.ffn.act"), size, name=f"{name}.ffn.down")

    for i, part in enumerate((attend, feed), start=1):
        h = part(x if norm == "post" else layers.layer_norm(x, eps=eps, name=f"{name}.norm{i}"))
        if dropout:
            h = layers.dropout(h, rate=dropout, name=f"{name}.dropout{i}")
        x = layers.add([x, h], name=f"{name}.add{i}")
        if norm == "post":
            x = layers.layer_norm(x, eps=eps, name=f"{name}.norm{i}")
    return x


def _size(x: Node, num_heads: int, name: str) -> int:
    size = x.shape[-1] if isinstance(x, Node) and x.shape else None
    heads = num_heads if isinstance(num_heads, int) and not isinstance(num_heads, bool) else 0
    if not isinstance(size, int) or heads < 1 or size % heads:
        shape = format_shape(x.shape) if isinstance(x, Node) else repr(x)
        raise GraphError(
            f"{name!r} cannot split {shape} into {num_heads!r} heads",
            node=name,
            source=here(),
            hint="the last size must be a multiple of num_heads",
        )
    return size
