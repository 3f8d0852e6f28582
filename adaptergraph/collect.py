"""From the nodes a user wrote to the table of a graph: order, names, bodies. Floor 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import GraphError, here
from .graph import Body, Graph, duplicate, named
from .node import Node


def collect(outputs: Node | Sequence[Node] | Mapping[str, Node]) -> dict[str, Any]:
    """The fields of the graph that ends in these nodes."""
    roots = _roots(outputs)
    order, names, graphs = _walk(roots)
    table: dict[str, Node] = {}
    counts: dict[str, int] = {}
    taken = {node.name for node in order if node.name is not None}
    for node in order:
        name = node.name
        if name is None:
            name = unnamed(node.op, counts, taken)
            taken.add(name)
        if node.graph is not None:
            if name in table:
                raise duplicate(name, table[name].source, node.source)
            table[name] = replace(node, graph=None)
        else:
            named(name, table, node)
            table[name] = replace(node, name=name, inputs=tuple(names[_key(i)] for i in node.inputs))
        names[_key(node)] = name
    final = _renamed(outputs, names)
    return {"nodes": table, "outputs": final, **_inherited(graphs, table, final)}


def _roots(outputs: Any) -> list[Node]:
    if isinstance(outputs, Node):
        return [outputs]
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise GraphError(f"a graph ends in a node, or a list or dict of nodes, not {outputs!r}", source=here())
    for value in values:
        if not isinstance(value, Node):
            raise GraphError(f"a graph ends in nodes, not {value!r}", source=here())
    return list(values)


def _key(node: Node) -> Any:
    return (id(node.graph), node.name) if node.graph is not None else id(node)


def _walk(roots: Iterable[Node]) -> tuple[list[Node], dict[Any, str], list[Graph]]:
    """Depth first, inputs before the nodes that read them, without recursion."""
    order: list[Node] = []
    names: dict[Any, str] = {}
    state: dict[Any, bool] = {}
    graphs: dict[int, Graph] = {}
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            key = _key(node)
            if key in state:
                stack.pop()
                if not state[key]:
                    state[key] = True
                    order.append(node)
                continue
            state[key] = False
            if node.graph is not None:
                graphs[id(node.graph)] = node.graph
                inputs: Iterable[Node] = [node.graph[i] for i in node.inputs]
            else:
                inputs = node.inputs
            stack += [i for i in reversed(list(inputs)) if _key(i) not in state]
    return order, names, list(graphs.values())


def unnamed(op: str, counts: dict[str, int], taken: set[str | None]) -> str:
    """The next free name for an op: `dense_0`, `dense_1`, …"""
    count = counts.get(op, 0)
    while f"{op}_{count}" in taken:
        count += 1
    counts[op] = count + 1
    return f"{op}_{count}"


def _renamed(outputs: Any, names: Mapping[Any, str]) -> Any:
    if isinstance(outputs, Node):
        return names[_key(outputs)]
    if isinstance(outputs, Mapping):
        return {key: names[_key(node)] for key, node in outputs.items()}
    return tuple(names[_key(node)] for node in outputs)


def _inherited(graphs: list[Graph], table: Mapping[str, Node], outputs: Any) -> dict[str, Any]:
    """What the graphs that were built upon already knew, and the bodies that `Adapter.wrap` made."""
    if any(g.imported is not None for g in graphs):
        raise GraphError(
            "an imported graph runs in its model's own forward: nodes cannot be put on top of it",
            source=here(),
            hint="graph.splice(at, lambda site: …) adds nodes at a place inside the model",
        )
    overrides = {p: t for g in graphs for p, t in g._overrides.items()}
    splices = tuple(s for g in graphs for s in g.splices)
    bodies = {n: b for g in graphs for n, b in g.bodies.items() if any(w in table for _, w in b.calls)}
    members: dict[str, list[str]] = {}
    for name, node in table.items():
        if node.body is not None and node.body not in bodies:
            members.setdefault(node.body, []).append(name)
    for body, nodes in members.items():
        reads = [i for n in nodes for i in table[n].inputs if table[i].body != body]
        if not reads:
            raise GraphError(
                f"the body {body!r} reads no node outside itself", node=body, source=table[nodes[0]].source
            )
        bodies[body] = Body(body, reads[0], "after", ((reads[0], nodes[-1]),))
    return {"bodies": bodies, "splices": splices, "overrides": overrides}
