"""Axon's verbs as methods of a graph; what they do is in `rewrite.py`. Floor 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import GraphError, here
from .node import Node

if TYPE_CHECKING:
    from .graph import Graph


class Verbs:
    """Verbs that go over all nodes, called as in Axon."""

    def map_nodes(self: Any, fn: Callable[[Node], Node]) -> Graph:
        """A new graph in which `fn(node)` stands for each node; a node that `fn` gives back stays. See `rewrite_nodes`.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> graph = ag.Graph(ag.relu(ag.dense(x, 4, name="fc"), name="act"))
        >>> graph.map_nodes(lambda n: ag.tanh(graph["fc"]) if n.op == "relu" else n)["act"]
        <act: tanh batch × 4>
        """
        from .rewrite import map_nodes

        return map_nodes(self, fn)

    def reduce_nodes(self: Any, start: Any, fn: Callable[[Node, Any], Any]) -> Any:
        """One value from all nodes in topological order: `fn(node, value so far)`.

        >>> import adaptergraph as ag
        >>> graph = ag.Graph(ag.relu(ag.input("x", shape=("batch", 8))))
        >>> graph.reduce_nodes([], lambda node, ops: [*ops, node.op])
        ['input', 'relu']
        """
        from .rewrite import reduce_nodes

        return reduce_nodes(self, start, fn)

    def rewrite_nodes(self: Any, rewriter: Callable[[Node], Any]) -> Graph:
        """A new graph in which some nodes are replaced by what is written in their place.

        Args:
            rewriter: given each host in topological order, returns None to keep it, or a function
                `(inputs, output) -> Node`. `inputs` is the list of what it reads, after what was rewritten before it;
                `output` is the node itself, so that using it keeps it.

        Raises:
            GraphError: the rewriter returns something else.
            ShapeMismatch: the new node has another shape or dtype than the one it stands for.
            BadSplice: the new node reads one that comes later; or a host with a body would be dropped.

        >>> import adaptergraph as ag
        >>> graph = ag.Graph(ag.relu(ag.dense(ag.input("x", shape=("batch", 8)), 8, name="fc")))
        >>> wrap = lambda inputs, output: ag.Adapter.wrap(output, bottleneck_size=2)
        >>> list(graph.rewrite_nodes(lambda node: wrap if node.op == "dense" else None))
        ['x', 'fc', 'adapter.down', 'adapter.act', 'adapter.up', 'adapter.residual', 'relu_0']
        """
        from .rewrite import rewrite_nodes

        return rewrite_nodes(self, rewriter)

    def pop_node(self: Any) -> tuple[Node, Graph]:
        """The last node, and the graph that ends in what it reads: how a head is taken off.

        Raises:
            BadSplice: the graph has several outputs, or ends in an input, a body or a host with a body.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> head, rest = ag.Graph(ag.dense(ag.relu(x, name="act"), 2, name="head")).pop_node()
        >>> head, rest.outputs
        (<head: dense batch × 2>, 'act')
        """
        from .rewrite import pop_node

        return pop_node(self)

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused: what runs is the model that `graph.compile()` gives.

        Raises:
            GraphError: always.
        """
        raise GraphError("a graph does not run", source=here(), hint="compile it first: graph.compile()(…)")

    def get_inputs(self: Any) -> dict[str, Any]:
        """The shapes of the inputs by name."""
        return {name: node.shape for name, node in self.inputs.items()}

    def get_output_shape(self: Any) -> Any:
        """The shape of the output; for several, the shapes in the structure of `outputs`."""
        from .splicing.draft import map_outputs

        return map_outputs(self.outputs, {name: self._nodes[name].shape for name in self.output_names()})

    def get_op_counts(self: Any) -> dict[str, int]:
        """How many nodes there are of each op.

        >>> import adaptergraph as ag
        >>> ag.Adapter.build(8, 2).get_op_counts()
        {'input': 1, 'dense': 2, 'relu': 1, 'add': 1}
        """
        return dict(Counter(node.op for node in self._nodes.values()))

    @property
    def properties(self: Any) -> dict[str, str]:
        """The op of each node by name."""
        return {name: node.op for name, node in self._nodes.items()}
