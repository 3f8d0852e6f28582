"""Which dimension of a value holds its features: the last one, or the second one as convolutions have it. Floor 3."""

from __future__ import annotations

from collections import deque

from . import layers
from .node import Node

_POOLS = ("max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool", "adaptive_lp_pool")
_FIRST = frozenset(
    {
        "conv",
        "conv_transpose",
        "depthwise_conv",
        "separable_conv2d",
        "batch_norm",
        "group_norm",
        "instance_norm",
        *_POOLS,
    }
    | {f"{kind}{n}d" for kind in ("conv", "conv_transpose", *_POOLS) for n in (1, 2, 3)}
    | {f"{kind}{n}d" for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "MaxPool") for n in (1, 2, 3)}
    | {f"{kind}{n}d" for kind in ("AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool") for n in (1, 2, 3)}
    | {"GroupNorm"}
)
_LAST = frozenset({"dense", "linear", "Linear", "layer_norm", "LayerNorm", "embedding", "Embedding", "attention"})
# after these nothing is known of where the features are
_MOVED = frozenset(
    {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "T", "mT", "reshape", "view", "einsum"}
)


def axis_of(node: Node) -> int:
    """The dimension of a value's features.

    It is told from the layers that made the value, back through what leaves its shape as it is; the last one where
    they do not tell.

    >>> import adaptergraph as ag
    >>> axis_of(ag.conv(ag.input("x", shape=("batch", 3, 8, 8)), 16, kernel_size=3))
    1
    >>> axis_of(ag.dense(ag.input("x", shape=("batch", 3, 8)), 16))
    2
    """
    last = len(node.shape or ()) - 1
    if last < 2:
        return last
    waiting, seen = deque([node]), set[int | str | None]()
    while waiting:
        here = waiting.popleft()
        if here.op in _LAST:
            return last
        if here.op in _FIRST:
            return 1
        if here.op in _MOVED:
            continue
        for value in here.inputs:
            before = value if isinstance(value, Node) else _before(here, value)
            if before is None or before.shape != node.shape:
                continue
            key = before.name if before.graph is not None else id(before)
            if key not in seen:
                seen.add(key)
                waiting.append(before)
    return last


def _before(node: Node, name: str) -> Node | None:
    """A node that another one reads; None for one of a body that is just being added."""
    known = node.graph is not None and name in node.graph
    return node.graph[name] if known else None  # type: ignore[index]


def size_of(node: Node) -> int | str | None:
    """How many features a value has."""
    return (node.shape or (None,))[axis_of(node)] if node.shape else None


def features_last(node: Node, name: str) -> Node:
    """The value with its features in the last dimension."""
    rank = len(node.shape or ())
    if axis_of(node) >= rank - 1:
        return node
    return layers.transpose(node, (0, *range(2, rank), 1), name=name)


def features_like(node: Node, like: Node, name: str) -> Node:
    """A value with its features in the last dimension, laid out as another one."""
    rank = len(like.shape or ())
    if axis_of(like) >= rank - 1:
        return node
    return layers.transpose(node, (0, rank - 1, *range(1, rank - 1)), name=name)
