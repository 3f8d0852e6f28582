"""Which dimension of a value holds its features, and a value with them last. Floor 3.

A node knows it from what made it, and a node of a model also from what reads it: see `axes`. Here is what to do where
that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from . import layers
from .errors import ShapeMismatch, here
from .node import Node, format_shape


def axis_of(node: Node) -> int:
    """The dimension of a value's features.

    Raises:
        ShapeMismatch: neither what made the value nor what reads it tells, and there are convolutions, which have their
            features elsewhere than the layers of a transformer.

    >>> import adaptergraph as ag
    >>> axis_of(ag.conv(ag.input("x", shape=("batch", 3, 8, 8)), 16, kernel_size=3))
    1
    >>> axis_of(ag.dense(ag.input("x", shape=("batch", 3, 8)), 16))
    2
    """
    rank = len(node.shape or ())
    axis = node.axis
    if axis is None and rank > 2:
        raise NotImplementedError
    return rank - 1 if axis is None else rank + axis


def last_without_convolutions(nodes: Mapping[str, Node], convolutions: Iterable[str]) -> dict[str, Node]:
    """The same nodes; those of which nothing is known, before and after no convolution, have their features last."""
    unknown = [name for name, node in nodes.items() if node.axis is None and node.shape]
    near = set(convolutions)
    if unknown and near:
        near = _after(nodes, near) | _before(nodes, near)
    last = {name: replace(nodes[name], axis=-1) for name in unknown if name not in near}
    return {**nodes, **last}


def _after(nodes: Mapping[str, Node], start: set[str]) -> set[str]:
    """These nodes and all that are computed from them."""
    found = set(start)
    for name, node in nodes.items():
        if not found.isdisjoint(node.inputs):
            found.add(name)
    return found


def _before(nodes: Mapping[str, Node], start: set[str]) -> set[str]:
    """These nodes and all that they are computed from."""
    found = set(start)
    for name in reversed(list(nodes)):
        if name in found:
            found.update(nodes[name].inputs)
    return found


def size_of(node: Node) -> int | str | None:
    """How many features a value has."""
    return node.shape[axis_of(node)] if node.shape else None


def features_last(node: Node, axis: int, name: str) -> Node:
    """The value with its features, which are in this dimension, in the last one."""
    rank = len(node.shape or ())
    order = (*(i for i in range(rank) if i != axis), axis)
    return node if axis >= rank - 1 else layers.transpose(node, order, name=name)


def features_back(node: Node, axis: int, name: str) -> Node:
    """A value with its features in the last dimension, with them in this one."""
    rank = len(node.shape or ())
    order = (*range(axis), rank - 1, *range(axis, rank - 1))
    return node if axis >= rank - 1 else layers.transpose(node, order, name=name)
