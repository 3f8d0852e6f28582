"""Which dimension of a value holds its features, and a value with them last. Floor 3.

A node knows it from what made it, and a node of a model also from what reads it: see `axes`. Here is what to do where
that is not enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from . import layers
from .errors import ShapeMismatch, here
from .graph import Graph
from .layers.table import runnable
from .node import Node, format_shape
from .shapes import Spec, infer

# what is no op that can be run
_NO_RUN = ("input", "constant", "param", "item")


def axis_of(node: Node) -> int:
    """The dimension of a value's features.

    Raises:
        ShapeMismatch: neither what made the value nor what reads it tells, and there are convolutions, which have their
            features elsewhere than the layers of a transformer; or a model has one number for each row there.

    >>> import adaptergraph as ag
    >>> axis_of(ag.conv(ag.input("x", shape=("batch", 3, 8, 8)), 16, kernel_size=3))
    1
    >>> axis_of(ag.dense(ag.input("x", shape=("batch", 3, 8)), 16))
    2
    """
    rank = len(node.shape or ())
    axis = node.axis if node.axis is not None else _told(node)
    if axis is None and rank:
        name = node.name or node.op
        raise ShapeMismatch(
            f"it is not known which dimension of {name!r} holds its features",
            node=node.name,
            sides=[("value", name, format_shape(node.shape), node.op)],
            source=here(),
            hint="take a convolution, linear layer or norm before or after it; or write the body yourself, "
            "lambda site: …, with ag.transpose and ag.dense",
        )
    return rank - 1 if axis is None else rank + axis


def _told(node: Node) -> int | None:
    """What is known of a value that what made it does not tell of."""
    graph = node.graph
    if graph is None:
        return _told_before(node)
    if graph.imported is not None:
        # the trace has asked already
        return None
    if "_told" not in vars(graph):
        vars(graph)["_told"] = _told_in(graph)
    found: dict[str, int | None] = vars(graph)["_told"]
    if node.name in found:
        return found[node.name]
    # of a body that is being added: as the host that it reads, or where all values have theirs
    axes = {found[i] for i in node.inputs if i in found and graph._nodes[i].shape == node.shape} or set(found.values())
    return axes.pop() if len(axes) == 1 else None


def _told_before(node: Node) -> int | None:
    """Of a node in no graph only what it was made of can tell: the last one, if all that has its features there."""
    waiting, seen = [node], {id(node)}
    while waiting:
        value = waiting.pop()
        axis = _told(value) if value.axis is None and value.graph is not None else value.axis
        if axis not in (None, -1) or (axis is None and value.graph is not None):
            return None
        new = [i for i in value.inputs if axis is None and id(i) not in seen]
        seen.update(map(id, new))
        waiting += new
    return -1


def _told_in(graph: Graph) -> dict[str, int | None]:
    """What those who read the values of a declared graph tell, and those who read these."""
    nodes = dict(graph._nodes)
    for name in reversed(list(nodes)):
        if nodes[name].axis is None and nodes[name].shape:
            asked = {axis for reader in graph.consumers[name] for axis in _asked(nodes, nodes[reader], name)}
            nodes[name] = replace(nodes[name], axis=asked.pop() if len(asked) == 1 else None)
    convolutions = []
    for name, node in nodes.items():
        spec = None if node.op in _NO_RUN else _spec(nodes, node)
        if spec is not None and spec.convolves:
            convolutions.append(name)
        if spec is not None and spec.value is not None and node.axis is None:
            nodes[name] = replace(node, axis=spec.value.axis)
    return {name: node.axis for name, node in last_without_convolutions(nodes, convolutions).items()}


def _asked(nodes: Mapping[str, Node], reader: Node, name: str) -> Iterator[int]:
    """Where a reader takes the features of a value to be: it says so itself, or those who read it do."""
    if reader.op in _NO_RUN:
        return
    own = {i: nodes[i] for i in reader.inputs}
    read = _spec(own, reader).reads[reader.inputs.index(name)]
    if read is not None:
        yield read
    elif reader.axis is not None:
        for axis in range(-len(nodes[name].shape or ()), 0):
            value = _spec({**own, name: replace(nodes[name], axis=axis)}, reader).value
            if value is not None and value.axis == reader.axis:
                yield axis


def _spec(nodes: Mapping[str, Node], node: Node) -> Spec:
    inputs = [nodes[i] for i in node.inputs]
    return infer(node.op, runnable(node.op, node.options), inputs, node.options, node.source, node.name)


def last_without_convolutions(nodes: Mapping[str, Node], convolutions: Iterable[str]) -> dict[str, Node]:
    """The same nodes; where no convolution is anywhere, those of which nothing is known have their features last."""
    if any(True for _ in convolutions):
        return dict(nodes)
    return {name: replace(n, axis=-1) if n.axis is None and n.shape else n for name, n in nodes.items()}


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
