"""The graph: an ordered table of named nodes, what is added to it, and what of it is trained. Immutable.

Floor 1: knows names and edges. Shapes come with the nodes (floor 2); running it is the business of floor 4.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .bodies import Body, Splice
from .errors import UnknownNode, check_flag, here
from .names import path_of
from .node import EMPTY, Node, Param
from .select import Selection, Selector, one_name, select, unknown
from .verbs import Verbs

if TYPE_CHECKING:
    import networkx
    import torch

    from .imported import Imported
    from .plan import Plan

Outputs: TypeAlias = "str | tuple[Any, ...] | dict[str, Any]"


class Diff(NamedTuple):
    """What another graph has that this one has not, and the other way round."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    rewired: tuple[str, ...]


class Graph(Verbs):
    """A validated graph of named nodes; what every verb of this library starts from.

    Args:
        outputs: the node the graph computes, or lists, tuples and dicts of nodes, nested as you like. The compiled
            model returns the same structure (a list comes back as a tuple).

    Raises:
        DuplicateName: two different nodes have one name.
        GraphError: something else that cannot be right; the message names the node.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.relu(ag.dense(x, 4)))
    >>> list(graph)
    ['x', 'dense_0', 'relu_0']
    >>> graph["dense_0"]
    <dense_0: dense batch × 4>
    """

    _nodes: dict[str, Node]
    outputs: Outputs
    bodies: Mapping[str, Body]
    splices: tuple[Splice, ...]
    imported: Imported | None
    _overrides: Mapping[str, bool]

    def __init__(self, outputs: Node | Sequence[Any] | Mapping[str, Any]) -> None:
        from .collect import collect

        self._fill(**collect(outputs))
        self.check()

    @classmethod
    def _of(cls, **fields: Any) -> Graph:
        graph = cls.__new__(cls)
        graph._fill(**fields)
        return graph

    def _fill(
        self,
        nodes: dict[str, Node],
        outputs: Outputs,
        bodies: Mapping[str, Body] = EMPTY,
        splices: tuple[Splice, ...] = (),
        imported: Imported | None = None,
        overrides: Mapping[str, bool] = EMPTY,
    ) -> None:
        self._nodes = nodes
        self.outputs = outputs
        self.bodies = MappingProxyType(dict(bodies))
        self.splices = splices
        self.imported = imported
        self._overrides = MappingProxyType(dict(overrides))

    def _fields(self) -> dict[str, Any]:
        return {
            "nodes": self._nodes,
            "outputs": self.outputs,
            "bodies": dict(self.bodies),
            "splices": self.splices,
            "imported": self.imported,
            "overrides": dict(self._overrides),
        }

    def _with(self, **changes: Any) -> Graph:
        graph = Graph._of(**{**self._fields(), **changes})
        graph.check()
        return graph

    # ------------------------------------------------------------------ reading

    def __getitem__(self, name: str) -> Node:
        if one_name(name) not in self._nodes:
            # a module or container means its output before any body, of several calls the first one's
            values = self.calls_of(name)
            if not values:
                raise UnknownNode(
                    f"{name!r} is never called: it has no output",
                    node=name,
                    source=here(),
                    hint="take a module that runs: graph.summary() shows them",
                )
            name = values[0]
        return replace(self._nodes[name], graph=self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes(self) -> Iterator[Node]:
        """The nodes in topological order, their inputs as names."""
        return iter(self._nodes.values())

    def output_names(self) -> tuple[str, ...]:
        """The names of the output nodes, whatever structure they are returned in."""
        return tuple(leaves(self.outputs))

    @cached_property
    def inputs(self) -> Mapping[str, Node]:
        """The input nodes by name, in the order of the compiled `forward`'s arguments."""
        return MappingProxyType({n: node for n, node in self._nodes.items() if node.op == "input"})

    @cached_property
    def consumers(self) -> Mapping[str, tuple[str, ...]]:
        """For each node the nodes that read it."""
        readers: dict[str, list[str]] = {name: [] for name in self._nodes}
        for name, node in self._nodes.items():
            for value in dict.fromkeys(node.inputs):
                readers[value].append(name)
        return MappingProxyType({name: tuple(r) for name, r in readers.items()})

    @cached_property
    def selectable(self) -> tuple[str, ...]:
        """Every name a selector can reach: nodes, and the modules and containers of an imported model."""
        more = self.containers if self.imported is None else self.imported.names()
        return tuple(dict.fromkeys((*self._nodes, *more)))

    @cached_property
    def containers(self) -> Mapping[str, tuple[str, tuple[str, ...]]]:
        """Declared groups with one way out (`layer` for `layer.norm1`, `layer.norm2`): the node that leaves, and all.

        Bodies change nothing here: a group is what its hosts are.
        """
        without = {written: read for body in self.bodies.values() for read, written in body.calls}

        def host_of(value: str) -> str:
            while value in without:
                value = without[value]
            return value

        readers: dict[str, set[str]] = {name: {""} for name in map(host_of, self.output_names())}
        members: dict[str, list[str]] = {}
        for name, node in self._nodes.items():
            if node.body is None:
                for value in node.inputs:
                    readers.setdefault(host_of(value), set()).add(name)
                for prefix in prefixes(name):
                    members.setdefault(prefix, []).append(name)
        found = {}
        for prefix, names in members.items():
            leave = [n for n in names if any(not r.startswith(prefix + ".") for r in readers.get(n, ()))]
            if len(leave) == 1 and prefix not in self._nodes:
                found[prefix] = (leave[0], tuple(names))
        return MappingProxyType(found)

    @cached_property
    def further_calls(self) -> Mapping[str, tuple[str, ...]]:
        """For each node that shares its weights with others, the names of these: `fc@1`, `fc@2`."""
        found: dict[str, list[str]] = {}
        for name in self._nodes:
            path, at, _ = name.partition("@")
            if at and self.imported is None:
                found.setdefault(path, []).append(name)
        return MappingProxyType({path: tuple(names) for path, names in found.items()})

    @cached_property
    def body_at(self) -> Mapping[str, Body]:
        """For each value that exactly one body replaces for all that read it, that body."""
        at: dict[str, list[Body]] = {}
        for body in self.bodies.values():
            for read, _ in body.calls if body.where != "before" else ():
                at.setdefault(read, []).append(body)
        return MappingProxyType({read: bodies[0] for read, bodies in at.items() if len(bodies) == 1})

    def value_of(self, name: str) -> Node:
        """The node of a name after the bodies that are there: what the host is worth to those who read it."""
        value = self[name].name or ""
        while (body := self.body_at.get(value)) is not None and body.is_below(name):
            value = dict(body.calls)[value]
        return self[value]

    def calls_of(self, name: str) -> tuple[str, ...]:
        """The values a host gives, one for each call; empty for a module that is never called.

        `name@1` is one call of a module that is called several times, `name:1` or `name:hidden` one of several outputs.

        Raises:
            UnknownNode: there is no such host.
        """
        name = one_name(name)
        if self.imported is not None:
            values = self.imported.values(name)
            if values is not None:
                return values
        elif name.endswith("@0") and name[:-2] in self._nodes:
            return (name[:-2],)
        if name in self._nodes:
            return (name, *self.further_calls.get(name, ()))
        if name in self.containers:
            return (self.containers[name][0],)
        raise unknown(self, name)

    def op_of(self, name: str) -> str:
        """What a node or module is: its op, or the class of an imported module. Raises: UnknownNode, it is none."""
        if self.imported is not None and name in self.imported.modules:
            return self.imported.modules[name].cls
        if name in self._nodes:
            return self._nodes[name].op
        self.calls_of(name)
        return self.imported.modules[path_of(name)].cls if self.imported is not None else "block"

    def select(self, at: Selector) -> Selection:
        """The nodes, modules and containers that a selector means, in topological order.

        `*` matches within one dotted segment, `**` any number of segments, `{query,value}` alternatives, `{0..11}` or
        `[0-5]` a range of numbers; a predicate on nodes; or a list of these. Only a pattern with `/` reaches operations
        inside a forward.

        Raises:
            UnknownNode: a pattern, or one entry of a list, matches nothing; the nearest names are in the message.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> ag.Graph(ag.relu(ag.dense(x, 8, name="head.fc"))).select("**.fc")
        <Selection of 1: head.fc>
        """
        return select(self, at)

    # ------------------------------------------------------------------ parameters

    @cached_property
    def params(self) -> Mapping[str, Param]:
        """Every parameter of hosts and bodies by its key in `state_dict()`; tied parameters stand here once."""
        found: dict[str, Param] = dict(self.imported.params) if self.imported is not None else {}
        for node in self._nodes.values():
            if self.imported is None or node.body is not None:
                found.update(zip(node.param_names(), node.params.values(), strict=True))
        return MappingProxyType(found)

    @cached_property
    def body_params(self) -> frozenset[str]:
        """The parameters that bodies bring."""
        return frozenset(p for n in self._nodes.values() if n.body is not None for p in n.param_names())

    @cached_property
    def trained(self) -> Mapping[str, bool]:
        """For each parameter whether training changes it.

        Nodes of a declared graph start trained, nodes of `ag.trace` start frozen, bodies start trained.
        """
        default = self.imported is None
        return MappingProxyType(
            {
                name: self._overrides.get(name, param.trainable and (default or name in self.body_params))
                for name, param in self.params.items()
            }
        )

    def freeze(self, at: Selector | None = None, *, bodies: bool = False) -> Graph:
        """The same graph with these parameters frozen; without an argument all hosts. Calls add up.

        A pattern names parameters (`**.bias`) or modules (`encoder.layer.0`), which means all parameters below.

        Args:
            at: patterns of parameters or modules; None for every host.
            bodies: reach bodies instead of hosts, not both.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> graph = ag.Graph(ag.dense(x, 8, name="fc")).freeze("fc.bias")
        >>> dict(graph.trained)
        {'fc.weight': True, 'fc.bias': False}
        """
        from .edit import set_trained

        return set_trained(self, at, bodies, False)

    def unfreeze(self, at: Selector | None = None, *, bodies: bool = False) -> Graph:
        """The same graph with these parameters trained. Patterns as for `freeze`, but they cannot be left out."""
        from .edit import set_trained

        return set_trained(self, at, bodies, True)

    # ------------------------------------------------------------------ surgery

    def splice(self, at: Selector, method: Any, *, name: str = "adapter", where: str | None = None) -> Graph:
        """A new graph with a body at every selected site.

        Args:
            at: where, see `select`. A module or container means its output.
            method: what to add: a method such as `ag.Bottleneck(64)`, or any callable `site -> Node`.
            name: the body's modules live at `<host>.<name>`.
            where: `"after"` (sees the host's output and replaces it), `"around"` (sees its input too) or `"before"`
                (sees its input and replaces it); a method knows its own.

        Raises:
            UnknownNode: the selector, or one entry of it, matches nothing.
            BadSplice: the body cannot run there, or would never run.
            ShapeMismatch: the body does not give what its host gave.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> graph = ag.Graph(ag.relu(ag.dense(x, 8, name="fc"))).freeze()
        >>> list(graph.splice("fc", ag.Bottleneck(2)))
        ['x', 'fc', 'fc.adapter.down', 'fc.adapter.act', 'fc.adapter.up', 'fc.adapter.residual', 'relu_0']
        """
        from .splicing.surgery import splice

        return splice(self, at, method, name, where)

    def unsplice(self, at: Selector = "**") -> Graph:
        """Takes bodies out again; `at` names bodies or their hosts. `graph.splice(…).unsplice() == graph`."""
        from .splicing.unsplice import unsplice

        return unsplice(self, at)

    def replace(self, name: str | Node, node: Node) -> Graph:
        """A new graph in which `node` stands for the node called `name`: its consumers read `node` instead.

        An unnamed node takes the name, unless it reads the node that it stands for, which then stays.

        Raises:
            ShapeMismatch: it has another shape or dtype.
            BadSplice: the node has a body, or is part of one.

        >>> import adaptergraph as ag
        >>> graph = ag.Graph(ag.relu(ag.input("x", shape=("batch", 8)), name="act"))
        >>> graph.replace("act", ag.gelu(graph["x"]))["act"]
        <act: gelu batch × 8>
        """
        from .edit import replace_node

        return replace_node(self, name, node)

    def remove(self, name: str | Node) -> Graph:
        """A new graph without this node; its consumers read its input instead."""
        from .edit import remove

        return remove(self, name)

    def rename(self, old: str | Node, new: str) -> Graph:
        """A new graph in which one node of a declared graph has another name."""
        from .edit import rename

        return rename(self, old, new)

    def truncate(self, name: str | Node) -> Graph:
        """A new graph that ends at this node and the bodies on it; what no longer leads to the output is gone."""
        from .edit import truncate

        return truncate(self, name)

    def tap(self, at: Selector) -> Graph:
        """A new graph that also returns these nodes, after their bodies: the compiled model returns a dict by name."""
        from .edit import tap

        return tap(self, at)

    # ------------------------------------------------------------------ comparing, checking

    def diff(self, other: Graph) -> Diff:
        """What `other` has more, less, or reads elsewhere. Raises: GraphError, it is no graph.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> graph = ag.Graph(ag.relu(ag.dense(x, 8, name="fc")))
        >>> graph.diff(graph.splice("fc", ag.Bottleneck(2))).rewired
        ('relu_0',)
        """
        from .edit import diff

        return diff(self, other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return (
            self._nodes.keys() == other._nodes.keys()
            and all(node.same(other._nodes[name]) for name, node in self._nodes.items())
            and self.outputs == other.outputs
            and self.bodies == other.bodies
            and self.trained == other.trained
            and self.imported == other.imported
        )

    def __hash__(self) -> int:
        return hash((len(self), self.output_names()))

    def check(self) -> Graph:
        """Everything that must be true of a graph; called by the constructor and by every verb.

        Raises:
            GraphError: and says which node.
        """
        from .collect import check

        check(self)
        return self

    # ------------------------------------------------------------------ other views of it

    def to_networkx(self) -> networkx.DiGraph:
        """The same graph for networkx: nodes by name with `op`, `shape` and `body`, one edge for each read value."""
        import networkx

        result = networkx.DiGraph()
        for name, node in self._nodes.items():
            result.add_node(name, op=node.op, shape=node.shape, body=node.body)
        for name, node in self._nodes.items():
            result.add_edges_from((value, name) for value in node.inputs)
        return result

    def to_json(self) -> str:
        """The graph as JSON text: structure, shapes and splices, no parameter values.

        Raises:
            GraphError: a node holds a callable or module that has no name in a file.
        """
        from .saving.exchange import graph_to_json

        return graph_to_json(self)

    @staticmethod
    def from_json(text: str) -> Graph:
        """The graph that `to_json` wrote. Nothing in the text is run; every name in it is checked."""
        from .saving.exchange import graph_from_json

        return graph_from_json(text)

    def recipe(self) -> str:
        """The splices and what is trained, as JSON text: `ag.apply(graph, recipe)` does the same to another graph."""
        from .saving.storage import recipe

        return recipe(self)

    def compile(
        self,
        host: torch.nn.Module | None = None,
        *,
        inplace: bool = False,
        seed: int = 0,
        state: Mapping[str, torch.Tensor] | str | os.PathLike[str] | None = None,
        task: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.nn.Module:
        """The graph as a torch module.

        A declared graph becomes a `torch.fx.GraphModule` of straight-line code. An imported graph becomes a model of
        the host's own class with the bodies attached; the traced model itself stays as it is, and frozen parameters
        share its storage. A parameter gets storage of its own when values are loaded into it, or when `requires_grad`
        was set and a gradient reaches it. Whatever else writes into it writes into the traced model too: operations in
        place, `reset_parameters`, a step with a `.grad` that was set by hand. Before these, unfreeze it in the graph,
        or set `parameter.data = parameter.data.clone()`.

        Args:
            host: the model, for an imported graph that came from JSON.
            inplace: attach the bodies to the model itself; `ag.detach` gives it back.
            seed: initial values depend on this and on the parameter's name only.
            state: pretrained values by name: a mapping of tensors, or the path of a safetensors file. What is missing
                keeps its starting value, which is an error for a frozen parameter of a declared graph: it would stay
                random for ever.
            task: compile this task of every `Switch` only; its keys stay, and no task is chosen at a call.
            device: where new parameters are made; a body otherwise follows its host.
            dtype: of new parameters; bodies are float32 on a half-precision host unless this says otherwise.

        Raises:
            BadSplice: a body cannot be attached where it was spliced.
            StateMismatch: `state`, or the host, does not fit the graph; every mismatch is listed by name.

        >>> import torch, adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 8))
        >>> graph = ag.Graph(ag.dense(x, 4, name="fc")).freeze()
        >>> graph.compile(state={"fc.weigth": torch.zeros(4, 8), "fc.bias": torch.zeros(5)})
        Traceback (most recent call last):
        adaptergraph.errors.StateMismatch: 3 tensors of state do not fit the model
            fc.weigth   no such parameter   nearest: fc.weight
            fc.bias     model (4,)          given (5,)
            fc.weight   is missing          it is frozen: training would not mend it
        ...
        """
        from .compiler import compile_graph

        return compile_graph(self, host, inplace=inplace, seed=seed, state=state, device=device, dtype=dtype, task=task)

    def plan(self, **sizes: int) -> Plan:
        """What the graph costs: parameters, trained share, FLOPs, activation and optimizer memory, per node and in all.

        The graph runs once in training mode, on tensors that have shapes and no values; no memory is needed. What is
        not counted: the loss, the optimizer's own arithmetic, temporary buffers of kernels.

        * FLOPs are those of one forward, a multiply-add is two: matrix products, convolutions and attention. What is
          done element by element (activations, norms, dropout) is not counted.
        * Activation memory is the sum over all tensors that autograd keeps for the backward, each storage once and
          parameters left out: nothing before the first trained node, and after it what each op needs for the
          gradients of its trained inputs. Kernels are those of the CPU; some of a GPU keep less.
        * AdamW keeps 2 × trained parameters × 4 bytes; gradients are trained parameters × their size.

        Args:
            sizes: of the named dimensions of a declared graph: `graph.plan(batch=8, seq=128)`. An imported graph is
                planned at the sizes it was traced with.

        Returns:
            A value that prints as a table; its numbers are attributes.

        Raises:
            GraphError: a size is missing or unknown, or the forward needs values; the message names it.

        >>> import adaptergraph as ag
        >>> x = ag.input("x", shape=("batch", 768))
        >>> graph = ag.Graph(ag.dense(x, 768, name="fc")).freeze().splice("fc", ag.Bottleneck(64))
        >>> plan = graph.plan(batch=8)
        >>> plan.trained, plan.optimizer, plan.flops == 2 * 8 * (768 * 768 + 2 * 768 * 64)
        (99136, 793088, True)
        """
        from .plan import plan

        return plan(self, sizes)

    def summary(self, fold: bool = True) -> Any:
        """The graph as a table for the terminal; repeats are folded unless `fold=False`."""
        from .draw import summary

        return summary(self, check_flag(fold, "fold"))

    def draw(self, path: Any = None, fold: bool = True, open: Sequence[str] = (), mark: Sequence[str] = ()) -> Any:
        """Draws the graph into a file (`.svg`, `.png`, `.pdf`, `.dot`, `.mmd`) or returns something a notebook shows.

        Args:
            path: the file; None to return the picture.
            fold: draw a run of equal blocks once.
            open: names of boxes to draw with everything inside.
            mark: names of nodes to mark.
        """
        from .draw import draw

        return draw(self, path, check_flag(fold, "fold"), open, mark)

    def dot(self, fold: bool = True, open: Sequence[str] = ()) -> str:
        """The picture as Graphviz DOT text."""
        from .draw import dot

        return dot(self, check_flag(fold, "fold"), open)

    def mermaid(self, fold: bool = True, open: Sequence[str] = ()) -> str:
        """The picture as Mermaid text, which GitHub draws."""
        from .draw import mermaid

        return mermaid(self, check_flag(fold, "fold"), open)

    def _repr_svg_(self) -> str | None:
        from .draw import svg

        return svg(self)

    def __repr__(self) -> str:
        kind = f"imported {self.imported.cls}" if self.imported is not None else "declared"
        bodies = f", {len(self.bodies)} bodies" if self.bodies else ""
        return f"<Graph: {kind}, {len(self)} nodes{bodies}, outputs {', '.join(self.output_names())}>"

    def __deepcopy__(self, memo: Any) -> Graph:
        return self

    def __getstate__(self) -> dict[str, Any]:
        from .collect import stored

        splices = tuple(map(stored, self.splices))
        imported = self.imported.without_host() if self.imported is not None else None
        return {**self._fields(), "splices": splices, "imported": imported}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._fill(**state)


def prefixes(name: str) -> list[str]:
    """The containers a name is in, from the outside.

    >>> prefixes("encoder.layer.0")
    ['encoder', 'encoder.layer']
    """
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def leaves(outputs: Any) -> Iterator[str]:
    """The names in an output structure, in order.

    >>> list(leaves({"a": "x", "b": ("y", ("z",))}))
    ['x', 'y', 'z']
    """
    if isinstance(outputs, str):
        yield outputs
        return
    for value in outputs.values() if isinstance(outputs, dict) else outputs:
        yield from leaves(value)
