"""From the nodes a user wrote to the table of a graph, and everything that must be true of one. Floor 1."""

from __future__ import annotations

import pickle
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .bodies import Body, Splice
from .errors import DuplicateName, GraphError, here
from .graph import Graph
from .names import body_name, check_name, path_of
from .node import Node, check_present, format_shape


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
    there = {_key(node) for node in order}
    bases: dict[Any, str] = {}
    overrides: dict[str, bool] = {}
    for node in order:
        first = _first(node)
        if _key(first) not in bases:
            bases[_key(first)] = path_of(first.name) if first.name else _unnamed(first, names, counts, taken)
        base = bases[_key(first)]
        name = node.name or base
        if first is not node and (_key(first) in there or base in table):
            name = further(base, taken)
        taken.add(name)
        refuse_taken(name, table, node)
        names[_key(node)] = name
        if node.graph is None:
            check_name(name.partition("@")[0], node.source)
            inputs = _named(node.inputs, names)
            table[name] = replace(node, name=name, inputs=inputs, shares=None, space="")
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
    """The nodes of an output structure, in order.

    Raises:
        GraphError: something in it is no node; the message says where.
    """
    roots: list[Node] = []

    def walk(value: Any, place: str) -> None:
        at = f" at {place}" if place else ""
        if isinstance(value, Node):
            roots.append(value)
        elif isinstance(value, Mapping) and value:
            for key, part in value.items():
                if not isinstance(key, str):
                    raise GraphError(f"an output is called by a string, not {key!r}", source=here())
                walk(part, f"{place}[{key!r}]")
        elif isinstance(value, list | tuple) and value:
            for index, part in enumerate(value):
                walk(part, f"{place}[{index}]")
        elif place:
            raise GraphError(
                f"a graph ends in nodes, not {value!r}{at}",
                source=here(),
                hint="ag.constant makes a node of a number or tensor",
            )
        else:
            raise GraphError(f"a graph ends in a node, or a list or dict of nodes, not {value!r}", source=here())

    walk(outputs, "")
    return roots


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
        return {key: _structure(value, names) for key, value in outputs.items()}
    return tuple(_structure(value, names) for value in outputs)


def unnamed(op: str, counts: dict[str, int], taken: set[str | None]) -> str:
    """The next free name for an op: `dense_0`, `dense_1`, …"""
    count = counts.get(op, 0)
    while f"{op}_{count}" in taken:
        count += 1
    counts[op] = count + 1
    return f"{op}_{count}"


def _unnamed(node: Node, names: Mapping[Any, str], counts: dict[str, int], taken: set[str | None]) -> str:
    """A name for a node that has none; one of several outputs is called after the node that gives them."""
    owner = names.get(_key(node.inputs[0])) if node.op == "item" else None
    if owner is None:
        return unnamed(node.space + node.op, counts, taken)
    path, at, call = owner.partition("@")
    return f"{path}.{node.options['part']}{at}{call}"


def _first(node: Node) -> Node:
    """The node whose weights this one uses; for most nodes the node itself."""
    first = node if node.shares is None else node.shares
    return first.graph[first.path] if first is not node and first.graph and first.path in first.graph else first


def further(path: str, taken: Container[str | None]) -> str:
    """The name of one more call: `fc@1`, `fc@2`, …"""
    count = 1
    while f"{path}@{count}" in taken:
        count += 1
    return f"{path}@{count}"


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
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.partition("@")[2], []).append(name)
        calls = tuple(filter(None, (_call_of(table, group) for group in groups.values())))
        if body in known or len(calls) < len(groups):
            table.update({n: replace(table[n], body=None) for n in names})
            continue
        host = path_of(host_of.get(calls[0][0], calls[0][0]))
        host_of.update((written, host) for _, written in calls)
        bodies[body] = Body(body, host, "after", calls)
    return table, bodies


def _call_of(table: Mapping[str, Node], names: Sequence[str]) -> tuple[str, str] | None:
    """The value that these nodes of a body replace, and the one they make of it; None if they replace none."""
    reads = [i for n in names for i in table[n].inputs if i not in names]
    if not reads or (table[reads[0]].shape, table[reads[0]].dtype) != (table[names[-1]].shape, table[names[-1]].dtype):
        return None
    return reads[0], names[-1]


def remaining(splices: Iterable[Splice], bodies: Mapping[str, Body]) -> tuple[Splice, ...]:
    """The splices whose bodies are still there, each for the hosts that still have it."""
    left = []
    for record in splices:
        hosts = tuple(h for h in record.hosts if body_name(h, record.name) in bodies)
        if hosts == record.hosts:
            left.append(record)
        elif hosts:
            left.append(replace(record, at=list(hosts), hosts=hosts))
    return tuple(left)


@dataclass(frozen=True, slots=True)
class Code:
    """Stands in a pickle for a method that pickle cannot store: a function without a place in a module."""

    name: str


def stored(splice: Splice) -> Splice:
    """A splice for a pickle: its method is only a record, the nodes are in the graph; of code the name is kept."""
    try:
        pickle.dumps(splice.method)
    except (pickle.PicklingError, AttributeError, TypeError):
        name = getattr(splice.method, "__qualname__", None) or repr(splice.method)
        return replace(splice, method=Code(name))
    return splice


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
        _check_shared(graph)
        _check_optional(graph)


def _check_children(graph: Graph) -> None:
    """`a.weight` beside a node `a` with a parameter `weight` would replace it, and a tensor has no children."""
    for name, node in graph._nodes.items():
        prefix = name
        while "." in prefix:
            prefix = prefix.rpartition(".")[0]
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


def _check_shared(graph: Graph) -> None:
    """Nodes of one module path are calls of one module: `fc` and `fc@1` have one set of weights."""
    owners: dict[str, Node] = {}
    for name, node in graph._nodes.items():
        if "@" not in name:
            continue
        path = node.path
        first = owners.setdefault(path, graph._nodes.get(path, node))
        if first is not node and (first.op, dict(first.params), first.options) != (
            node.op,
            dict(node.params),
            node.options,
        ):
            raise GraphError(
                f"nodes {first.name!r} and {name!r} are calls of one layer, but not the same layer",
                node=name,
                sides=[("first", first.op, _line(first)), ("further", node.op, _line(node))],
                source=node.source,
                hint=f"change both, or call one of them something else than {node.path!r}",
            )


def _check_optional(graph: Graph) -> None:
    """An input that may be missing is read only by what says what stands in its place, and is no output."""
    optional = [n for n, node in graph.inputs.items() if node.options.get("optional")]
    for name in optional:
        for reader in graph.consumers[name]:
            node = graph._nodes[reader]
            if node.op not in ("optional", "or_else") or name in node.inputs[1:]:
                check_present(f"{node.op} {reader!r}", graph._nodes[name], node.source)
        if name in graph.output_names():
            check_present("the graph's output", graph._nodes[name], here())
    for name, node in graph._nodes.items():
        if node.op == "optional":
            sizes_of_optional(graph, name, node)


def sizes_of_optional(graph: Graph, name: str, node: Node) -> list[tuple[str, int] | int]:
    """For each size of what stands for a missing input: the number, or the input and dimension that has it.

    Raises:
        GraphError: no input that is always there has that size.
    """
    given = [i for i in graph.inputs.values() if not i.options.get("optional")]
    sizes: list[tuple[str, int] | int] = []
    for dim in node.shape or ():
        found = next((((i.name or ""), (i.shape or ()).index(dim)) for i in given if dim in (i.shape or ())), None)
        if isinstance(dim, int):
            sizes.append(dim)
        elif dim is None or found is None:
            raise GraphError(
                f"{name!r} cannot make a default for {node.inputs[0]!r}: no other input has the size {dim or '?'!r}",
                node=name,
                sides=[("optional", node.inputs[0], format_shape(node.shape))],
                source=node.source,
                hint="use the same name for the size in an input that is always there, or ag.or_else(x, node)",
            )
        else:
            sizes.append(found)
    return sizes


def alive(graph: Graph, kept: Iterable[str] | None = None) -> frozenset[str]:
    """The values of which something comes: an output, or what an imported model keeps beside its outputs.

    Args:
        kept: what is kept, after the bodies on its way; before any body if it is not given.
    """
    if kept is None:
        kept = [value for value, _ in graph.imported.kept] if graph.imported is not None else ()
    found: set[str] = set()
    stack = [*graph.output_names(), *kept]
    while stack:
        name = stack.pop()
        if name in found:
            continue
        found.add(name)
        node = graph._nodes[name]
        if node.op == "output":
            # a further output comes of what its call reads, and not of the first output
            node = graph._nodes[node.inputs[0]]
        stack += node.inputs
    return frozenset(found)
