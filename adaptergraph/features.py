"""Which dimension of a value holds its features: the last one, or the second one as convolutions have it. Floor 3."""

from __future__ import annotations

from collections import deque

from . import layers
from .node import Node

_POOLS = ("max_pool", "avg_pool", "lp_pool", "adaptive_avg_pool", "adaptive_max_pool")
_FIRST = frozenset(
    {
        "conv",
        "conv_transpose",
        "depthwise_conv",
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
_LAST = frozenset({"dense", "Linear", "layer_norm", "LayerNorm", "embedding", "Embedding", "attention"})
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
    imported = node.graph is not None and node.graph.imported is not None
    waiting, seen = deque([node]), set[int | str | None]()
    while waiting:
        here = waiting.popleft()
        # in a model `linear` is torch's function, in a declared graph the activation that does nothing
        if here.op in _LAST or (imported and here.op == "linear"):
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
    return node.shape[axis_of(node)] if node.shape else None


def features_last(node: Node, axis: int, name: str) -> Node:
    """The value with its features, which are in this dimension, in the last one."""
    rank = len(node.shape or ())
    return node if axis >= rank - 1 else layers.transpose(node, (0, *range(2, rank), 1), name=name)


def features_back(node: Node, axis: int, name: str) -> Node:
    """A value with its features in the last dimension, with them in this one."""
    rank = len(node.shape or ())
    return node if axis >= rank - 1 else layers.transpose(node, (0, rank - 1, *range(1, rank - 1)), name=name)
