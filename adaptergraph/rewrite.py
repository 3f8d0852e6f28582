"""Axon's verbs that go over all nodes: each a single walk in topological order. Floor 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .collect import refuse_taken, unnamed
from .edit import check_fits, inputs_first, pruned, refuse_adapted, refuse_imported
from .errors import BadSplice, GraphError, Source, here
from .graph import Graph
from .names import check_name
from .node import Node
from .splicing.draft import map_outputs
from .splicing.site import is_foreign, made


def map_nodes(graph: Graph, fn: Callable[[Node], Node]) -> Graph:
    """See `Graph.map_nodes`."""
    _check_function("map_nodes", fn, "node -> node")
    return rewrite_nodes(graph, lambda node: lambda inputs, output: fn(output))


def reduce_nodes(graph: Graph, start: Any, fn: Callable[[Node, Any], Any]) -> Any:
    """See `Graph.reduce_nodes`."""
    _check_function("reduce_nodes", fn, "(node, value so far) -> value")
    value = start
    for name in graph:
        value = fn(graph[name], value)
    return value


def _check_function(verb: str, fn: Any, form: str) -> None:
    if not callable(fn):
        raise GraphError(f"{verb} takes a function {form}, not {fn!r}", source=here())


class _Draft:
    """The table of the new graph while it is written, and what each old node has become."""

    def __init__(self, graph: Graph, source: Source | None) -> None:
        self.graph = graph
        self.source = source
        self.table: dict[str, Node] = {}
        self.now: dict[str, str] = {}
        self.dropped: set[str] = set()
        self.made: dict[int, Node] = {}
        self.names: dict[int, str] = {}
        self.counts: dict[str, int] = {}
        self.taken: set[str | None] = set(graph._nodes)

    def keep(self, node: Node) -> str:
        """Puts an old node into the table, reading what its inputs have become."""
        name = node.name or ""
        refuse_taken(name, self.table, node)
        self.table[name] = replace(node, inputs=tuple(self.now[i] for i in node.inputs))
        return name

    def put(self, old: Node, result: Node) -> None:
        """Puts what a rewriter made in the place of an old node."""
        order = made(result) if result.graph is None else []
        reads = [i for n in order for i in n.inputs if i.graph is not None] + ([] if order else [result])
        for handle in reads:
            self.check_read(old, handle)
        uses = any(handle.name == old.name for handle in reads)
        if uses:
            self.now[old.name or ""] = self.keep(old)
        else:
            self.dropped.add(old.name or "")
        for node in order:
            if id(node) not in self.made:
                self.add(node, "" if uses else old.name or "", node is result)
        self.now[old.name or ""] = self.names.get(id(result)) or self.now[result.name or ""]

    def add(self, node: Node, free: str, last: bool) -> None:
        """Puts a new node into the table; the last one takes the name that became free, if it has none."""
        name = node.name or (free if free and last else unnamed(node.space + node.op, self.counts, self.taken))
        refuse_taken(name, self.table if name == free or name in self.table else self.graph._nodes, node)
        check_name(name, node.source)
        self.taken.add(name)
        self.made[id(node)] = node
        self.names[id(node)] = name
        inputs = tuple(self.names[id(i)] if i.graph is None else self.now[i.name or ""] for i in node.inputs)
        self.table[name] = replace(node, name=name, inputs=inputs, space="")

    def check_read(self, old: Node, handle: Node) -> None:
        name = handle.name or ""
        if is_foreign(self.graph, handle):
            raise BadSplice(
                f"what stands for {old.name!r} reads {name!r}, which is no node of this graph",
                node=old.name,
                source=self.source,
                hint="read what the rewriter is given, or graph[name]",
            )
        if name != old.name and name not in self.now:
            raise BadSplice(
                f"what stands for {old.name!r} reads {name!r}, which comes later: a cycle",
                node=old.name,
                source=self.source,
                hint="a node can only read what is computed before it",
            )


def rewrite_nodes(graph: Graph, rewriter: Callable[[Node], Any]) -> Graph:
    """See `Graph.rewrite_nodes`."""
    source = here()
    _check_function("rewrite_nodes", rewriter, "node -> None, or a function (inputs, output) -> node")
    refuse_imported(graph, "rewrite_nodes")
    draft = _Draft(graph, source)
    for name, node in graph._nodes.items():
        # a body changes only as a whole, and the outputs of one node with it
        write = None if node.body is not None else rewriter(graph[name])
        if write is None:
            draft.now[name] = draft.keep(node)
            continue
        if not callable(write):
            raise GraphError(
                f"the rewriter returned {write!r} for {name!r}",
                node=name,
                source=source,
                hint="return None to keep the node, or a function (inputs, output) -> Node",
            )
        result = write([graph[value] for value in node.inputs], graph[name])
        _check_made(node, result, source)
        draft.put(node, result)
    for name in draft.dropped - set(draft.table):
        refuse_adapted(graph, name)
    bodies = {
        name: replace(body, calls=tuple((draft.now[read], written) for read, written in body.calls))
        for name, body in graph.bodies.items()
    }
    changed = {p for n in draft.names.values() for p in draft.table[n].param_names()}
    table = {n: draft.table[n] for n in inputs_first(draft.table, list(draft.table))}
    overrides = {p: t for p, t in graph._overrides.items() if p not in changed}
    return pruned(graph, table, map_outputs(graph.outputs, draft.now), overrides, bodies)


def _check_made(old: Node, result: Any, source: Source | None) -> None:
    if not isinstance(result, Node):
        raise GraphError(
            f"what the rewriter made for {old.name!r} is no node but {result!r}",
            node=old.name,
            source=source,
            hint="return a node, or the old one to leave it as it is",
        )
    check_fits(
        ("old", old),
        ("new", result),
        f"what the rewriter made does not fit in the place of {old.name!r}",
        "end it with the shape and dtype of the old node",
        source,
    )


def pop_node(graph: Graph) -> tuple[Node, Graph]:
    """See `Graph.pop_node`."""
    source = here()
    refuse_imported(graph, "pop_node")
    if not isinstance(graph.outputs, str):
        raise BadSplice(
            f"the graph has {len(graph.output_names())} outputs, and pop_node takes the one last node off",
            source=source,
            hint="graph.truncate(name) ends at a node",
        )
    last = graph[graph.outputs]
    body = last.body or next((b.name for b in graph.bodies.values() if b.host == last.name), None)
    if body is not None or not last.inputs:
        raise BadSplice(
            f"{last.name!r} cannot be popped: it is {'part of the body ' + repr(body) if body else 'an ' + last.op}",
            node=last.name,
            source=source,
            hint=f"take it out first: graph.unsplice({body!r})" if body else None,
        )
    ends: Any = last.inputs[0] if len(last.inputs) == 1 else last.inputs
    return last, pruned(graph, graph._nodes, ends, graph._overrides)
