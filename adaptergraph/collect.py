"""From the nodes a user wrote to the table of a graph, and everything that must be true of one. Floor 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .errors import DuplicateName, GraphError, here
from .graph import Body, Graph, Splice, prefixes
from .names import check_name
from .node import Node


def collect(outputs: Node | Sequence[Node] | Mapping[str, Node]) -> dict[str, Any]:
    """The fields of the graph that ends in these nodes."""
    order, graphs = _walk(_roots(outputs))
    if any(g.imported is not None for g in graphs):
        raise GraphError(
            "an imported graph runs in its model's own forward: nodes cannot be put on top of it",
            source=here(),
            hint="graph.splice(at, lambda site: …) adds nodes at a place inside the model",
        )
    table: dict[str, Node] = {}
    names: dict[Any, str] = {}
    counts: dict[str, int] = {}
    taken = {node.name for node in order}
    overrides: dict[str, bool] = {}
    for node in order:
        name = node.name or unnamed(node.op, counts, taken)
        taken.add(name)
        refuse_taken(name, table, node)
        names[_key(node)] = name
        if node.graph is None:
            table[name] = replace(node, name=check_name(name, node.source), inputs=_named(node.inputs, names))
        else:
            table[name] = replace(node, graph=None)
            overrides.update((p, node.graph._overrides[p]) for p in node.param_names() if p in node.graph._overrides)
    # inputs first: their order is that of the arguments of forward, and no surgery changes it
    table = {n: x for n, x in table.items() if x.op == "input"} | {n: x for n, x in table.items() if x.op != "input"}
    known = {n: b for g in graphs for n, b in g.bodies.items()}
    table, bodies = with_bodies(table, known)
    return {
        "nodes": table,
        "outputs": _structure(outputs, names),
        "bodies": bodies,
        "splices": remaining((s for g in graphs for s in g.splices), bodies),
        "overrides": overrides,
    }


def _roots(outputs: Any) -> list[Node]:
    if isinstance(outputs, Node):
        return [outputs]
    values = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise GraphError(f"a graph ends in a node, or a list or dict of nodes, not {outputs!r}", source=here())
    for value in values:
        if not isinstance(value, Node):
            raise GraphError(f"a graph ends in nodes, not {value!r}", source=here())
    for key in outputs if isinstance(outputs, Mapping) else ():
        if not isinstance(key, str):
            raise GraphError(f"an output is called by a string, not {key!r}", source=here())
    return list(values)


def _key(node: Node) -> Any:
    return (id(node.graph), node.name) if node.graph is not None else id(node)


def _walk(roots: Iterable[Node]) -> tuple[list[Node], list[Graph]]:
    """Depth first, inputs before the nodes that read them, without recursion."""
    order: list[Node] = []
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
    return order, list(graphs.values())


def _named(inputs: Iterable[Node], names: Mapping[Any, str]) -> tuple[str, ...]:
    return tuple(names[_key(i)] for i in inputs)


def _structure(outputs: Any, names: Mapping[Any, str]) -> Any:
    if isinstance(outputs, Node):
        return names[_key(outputs)]
    if isinstance(outputs, Mapping):
        return {key: names[_key(node)] for key, node in outputs.items()}
    return _named(outputs, names)


def unnamed(op: str, counts: dict[str, int], taken: set[str | None]) -> str:
    """The next free name for an op: `dense_0`, `dense_1`, …"""
    count = counts.get(op, 0)
    while f"{op}_{count}" in taken:
        count += 1
    counts[op] = count + 1
    return f"{op}_{count}"


def refuse_taken(name: str, table: Mapping[str, Node], node: Node) -> None:
    """The error for two nodes with one name; shows both lines."""
    first = table.get(name)
    if first is not None:
        raise DuplicateName(
            f"two different nodes are called {name!r}",
            node=name,
            sides=[("first", _line(first)), ("second", _line(node))],
            source=node.source,
            hint="give one of them another name=, or take both from one graph",
        )


def _line(node: Node) -> str:
    return str(node.source or "–")


def with_bodies(table: dict[str, Node], known: Mapping[str, Body]) -> tuple[dict[str, Node], dict[str, Body]]:
    """The bodies of a table: those that are known and whole, and those that `Adapter.wrap` made.

    Nodes of a body that is no longer whole are nodes like others.
    """
    bodies = {n: b for n, b in known.items() if all(v in table for call in b.calls for v in call)}
    members: dict[str, list[str]] = {}
    for name, node in table.items():
        if node.body is not None and node.body not in bodies:
            members.setdefault(node.body, []).append(name)
    host_of = {written: body.host for body in bodies.values() for _, written in body.calls}
    for body, names in members.items():
        reads = [i for n in names for i in table[n].inputs if table[i].body != body]
        first, last = table[reads[0]] if reads else None, table[names[-1]]
        if body in known or first is None or (first.shape, first.dtype) != (last.shape, last.dtype):
            table.update({n: replace(table[n], body=None) for n in names})
            continue
        host = host_of.get(reads[0], reads[0])
        host_of[names[-1]] = host
        bodies[body] = Body(body, host, "after", ((reads[0], names[-1]),))
    return table, bodies


def remaining(splices: Iterable[Splice], bodies: Mapping[str, Body]) -> tuple[Splice, ...]:
    """The splices whose bodies are still there, each for the hosts that still have it."""
    left = []
    for record in splices:
        hosts = tuple(h for h in record.hosts if f"{h}.{record.name}" in bodies)
        if hosts == record.hosts:
            left.append(record)
        elif hosts:
            left.append(replace(record, at=list(hosts), hosts=hosts))
    return tuple(left)


# ---------------------------------------------------------------------- what must be true


def check(graph: Graph) -> None:
    """See `Graph.check`."""
    seen: set[str] = set()
    for name, node in graph._nodes.items():
        if node.name != name:
            raise GraphError(f"node {node.name!r} stands in the table as {name!r}", node=name, source=node.source)
        for value in node.inputs:
            if value not in seen:
                late = value in graph._nodes
                raise GraphError(
                    f"node {name!r} reads {value!r}, "
                    + ("which comes later: a cycle" if late else "which is not in the graph"),
                    node=name,
                    source=node.source,
                    hint="a node can only read what is computed before it",
                )
        seen.add(name)
        if node.body is not None and node.body not in graph.bodies:
            raise GraphError(f"node {name!r} belongs to {node.body!r}, which is no body of the graph", node=name)
    for name in graph.output_names():
        if name not in seen:
            raise GraphError(f"the output {name!r} is no node of the graph", node=name)
    for body in graph.bodies.values():
        for read, written in body.calls:
            if read not in seen or written not in seen or graph._nodes[written].body != body.name:
                raise GraphError(f"the body {body.name!r} does not lead from {read!r} to {written!r}", node=body.name)
    if graph.imported is None:
        _check_children(graph)
        _check_modules(graph)


def _check_children(graph: Graph) -> None:
    """`a.weight` beside a node `a` with a parameter `weight` would replace it, and a tensor has no children."""
    for name, node in graph._nodes.items():
        for prefix in prefixes(name):
            owner = graph._nodes.get(prefix)
            if owner is None or (not owner.params and owner.op != "constant"):
                continue
            part = name.removeprefix(prefix + ".").partition(".")[0]
            own = {p.partition(".")[0] for p in owner.params}
            if owner.op in ("param", "constant") or part in own:
                what = "is below a tensor" if owner.op in ("param", "constant") else "has the name of a parameter"
                raise DuplicateName(
                    f"node {name!r} {what}: {prefix!r}",
                    node=name,
                    sides=[("owner", prefix, _line(owner)), ("node", name, _line(node))],
                    source=node.source,
                    hint=f"call it {name + '_'!r}" if what != "is below a tensor" else f"rename {prefix!r}",
                )


def _check_modules(graph: Graph) -> None:
    """Each module node is copied by itself, so a tensor in two of them would silently become two."""
    owners: dict[int, str] = {}
    for name, node in graph._nodes.items():
        if node.op != "module":
            continue
        for parameter in node.options["module"].parameters():
            first = owners.setdefault(id(parameter), name)
            if first != name:
                raise GraphError(
                    f"nodes {first!r} and {name!r} hold the same parameter: they would not share it",
                    node=name,
                    sides=[("first", _line(graph._nodes[first])), ("second", _line(node))],
                    source=node.source,
                    hint="give each a module of its own: copy.deepcopy(module)",
                )
