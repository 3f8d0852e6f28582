"""Verbs that change a declared graph, and the one that says what is trained. Floor 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .bodies import Body
from .collect import refuse_taken, remaining, unnamed, with_bodies
from .errors import (
    BadSplice,
    DuplicateName,
    GraphError,
    ShapeMismatch,
    Source,
    UnknownNode,
    check_flag,
    here,
    quoted,
)
from .graph import Diff, Graph, leaves, prefixes
from .names import check_input_name, check_name
from .node import Node, format_shape
from .select import Selection, Selector, entries_of, match, pattern
from .splicing.draft import in_order, map_outputs
from .splicing.site import is_foreign, made


def set_trained(graph: Graph, at: Selector | None, bodies: bool, value: bool) -> Graph:
    """See `Graph.freeze` and `Graph.unfreeze`."""
    check_flag(bodies, "bodies")
    if at is None:
        if value:
            raise GraphError(
                "unfreeze names what is trained",
                source=here(),
                hint='graph.unfreeze("head") for a part of the model, graph.unfreeze("**") for all hosts, '
                'graph.unfreeze("**", bodies=True) for all bodies',
            )
        pool = [p for p in graph.params if (p in graph.body_params) == bodies]
        return graph._with(overrides={**graph._overrides, **dict.fromkeys(pool, value)})
    below = _below(graph, bodies)
    found = []
    for entry in entries_of(at):
        for text in entry if isinstance(entry, Selection) else [entry.name if isinstance(entry, Node) else entry]:
            if not isinstance(text, str):
                raise GraphError(f"freeze and unfreeze take patterns of names, not {text!r}", source=here())
            _refuse_others(graph, text, below, bodies, value)
            what = "parameter of a body" if bodies else "parameter of a host"
            found += [p for hit in match(text, list(below), what) for p in below[hit]]
    wanted = [p for p in found if graph.params[p].trainable or not value]
    if not wanted:
        raise GraphError(
            f"{found[0]!r} holds whole numbers ({graph.params[found[0]].dtype}): it cannot be trained",
            node=found[0],
            source=here(),
            hint="leave it out of the pattern",
        )
    return graph._with(overrides={**graph._overrides, **dict.fromkeys(wanted, value)})


def _below(graph: Graph, bodies: bool) -> dict[str, list[str]]:
    """For each name the parameters of hosts, or of bodies, at it and below."""
    tied = graph.imported.tied if graph.imported is not None and not bodies else {}
    below: dict[str, list[str]] = {}
    for name in [*(p for p in graph.params if (p in graph.body_params) == bodies), *tied]:
        for prefix in (*prefixes(name), name):
            below.setdefault(prefix, []).append(tied.get(name, name))
    return below


def _refuse_others(graph: Graph, text: str, below: Mapping[str, Any], bodies: bool, value: bool) -> None:
    """Refuses a pattern that means hosts where bodies are asked for, or the other way round."""
    if any(map(pattern(text).fullmatch, below)):
        return
    others = list(filter(pattern(text).fullmatch, _below(graph, not bodies)))
    if others:
        mine, theirs = ("bodies", "hosts") if bodies else ("hosts", "bodies")
        raise UnknownNode(
            f"{text!r} selects parameters of {theirs}, and those of {mine} are meant here",
            node=text,
            sides=[(theirs, quoted(others))],
            source=here(),
            hint=f"graph.{'un' * value}freeze({text!r}{', bodies=True' * (not bodies)})",
        )


def _host(graph: Graph, name: str | Node, verb: str) -> Node:
    """The node that a verb changes: of a declared graph, and no part of a body."""
    refuse_imported(graph, verb)
    key = name.name or "" if isinstance(name, Node) else name
    graph[key]
    node = graph._nodes[key]
    if node.body is not None:
        raise BadSplice(
            f"{key!r} is part of the body {node.body!r}, which changes only as a whole",
            node=key,
            source=here(),
            hint=f"graph.unsplice({node.body!r}), then splice another one",
        )
    return node


def refuse_imported(graph: Graph, verb: str) -> None:
    if graph.imported is not None:
        raise BadSplice(
            f"{verb} works on declared graphs: this one runs in the forward of {graph.imported.cls}",
            source=here(),
            hint="add to it with graph.splice",
        )


def refuse_adapted(graph: Graph, name: str) -> None:
    """A body is called after its host."""
    body = next((b for b in graph.bodies.values() if b.host == name or any(name in call for call in b.calls)), None)
    if body is not None:
        raise BadSplice(
            f"{name!r} has the body {body.name!r}, which would be left without its host",
            node=name,
            source=here(),
            hint=f"take it out first: graph.unsplice({body.name!r})",
        )


def check_fits(one: tuple[str, Node], two: tuple[str, Node], what: str, hint: str, source: Source | None) -> None:
    """Whether two nodes, each with a word for what it is, have the same shape and dtype.

    Raises:
        ShapeMismatch: `what`, with both of them.
    """
    if len({(node.shape, node.dtype) for _, node in (one, two)}) == 2:
        sides = [(word, n.name or n.op, format_shape(n.shape), str(n.dtype)) for word, n in (one, two)]
        raise ShapeMismatch(what, node=one[1].name, sides=sides, source=source, hint=hint)


def replace_node(graph: Graph, name: str | Node, node: Node) -> Graph:
    """See `Graph.replace`."""
    source = here()
    old = _host(graph, name, "replace")
    if not isinstance(node, Node):
        raise GraphError(f"a node is replaced by a node, not {node!r}", node=old.name, source=source)
    check_fits(
        ("old", old),
        ("new", node),
        f"the new node does not fit in the place of {old.name!r}",
        "end it with the old shape and dtype, or change what reads it as well: graph.rewrite_nodes",
        source,
    )
    return _swapped(graph, old.name or "", node)


def remove(graph: Graph, name: str | Node) -> Graph:
    """See `Graph.remove`."""
    source = here()
    old = _host(graph, name, "remove")
    if len(old.inputs) != 1:
        raise BadSplice(
            f"{old.name!r} reads {len(old.inputs)} nodes, so its consumers cannot simply read its input",
            node=old.name,
            source=source,
            hint="graph.replace(name, node) says what stands in its place",
        )
    before = graph._nodes[old.inputs[0]]
    check_fits(
        ("reads", before),
        ("gives", old),
        f"{old.name!r} cannot be left out: its consumers need what it makes of its input",
        "graph.replace(name, node) says what stands in its place",
        source,
    )
    return _swapped(graph, old.name or "", graph[old.inputs[0]])


def _swapped(graph: Graph, old: str, node: Node) -> Graph:
    """The graph in which the consumers of `old` read `node`, which is new or one of the graph."""
    source = here()
    order = made(node) if node.graph is None else []
    handles = [i for n in order for i in n.inputs if i.graph is not None] + ([] if order else [node])
    for handle in handles:
        if is_foreign(graph, handle):
            raise BadSplice(
                f"the new node reads {handle.name!r}, which is no node of this graph",
                node=handle.name,
                source=source,
                hint="read graph[name]",
            )
    stays = any(h.name == old for h in handles)
    table = {n: x for n, x in graph._nodes.items() if n != old or stays}
    new, final = _added(table, order, node, "" if stays else old)
    if final != old:
        refuse_adapted(graph, old)
    kept = {
        n: replace(x, inputs=tuple(final if i == old else i for i in x.inputs)) if old in x.inputs else x
        for n, x in table.items()
    }
    place = [n for x in graph._nodes for n in ([*([old] if stays else []), *new] if x == old else [x])]
    table = in_order(kept | new, inputs_first(kept | new, place), source)
    outputs = map_outputs(graph.outputs, {old: final})
    fresh = {p for x in new.values() for p in x.param_names()}
    overrides = {p: t for p, t in graph._overrides.items() if p not in fresh}
    return pruned(graph, table, outputs, overrides)


def _added(table: Mapping[str, Node], order: list[Node], node: Node, free: str) -> tuple[dict[str, Node], str]:
    """The new nodes with names, and the name of the last; it takes the free name if it has none."""
    new: dict[str, Node] = {}
    names: dict[int, str] = {}
    counts: dict[str, int] = {}
    taken: set[str | None] = {*table, *(n.name for n in order)}
    for one in order:
        name = one.name or (free if one is node and free else unnamed(one.op, counts, taken))
        taken.add(name)
        refuse_taken(name, new if name in new else table, one)
        names[id(one)] = check_name(name, one.source)
        inputs = tuple(i.name or "" if i.graph is not None else names[id(i)] for i in one.inputs)
        new[name] = replace(one, name=name, inputs=inputs)
    return new, names.get(id(node), node.name or "")


def inputs_first(nodes: Mapping[str, Node], names: list[str]) -> list[str]:
    return sorted(names, key=lambda n: nodes[n].op != "input")


def pruned(
    graph: Graph,
    table: Mapping[str, Node],
    outputs: Any,
    overrides: Mapping[str, bool],
    bodies: Mapping[str, Body] | None = None,
) -> Graph:
    """Only what leads to the outputs, with what belongs to it."""
    needed: set[str] = set()
    stack = list(leaves(outputs))
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += table[name].inputs
    kept = {n: x for n, x in table.items() if n in needed}
    nodes, bodies = with_bodies(kept, graph.bodies if bodies is None else bodies)
    params = {p for x in nodes.values() for p in x.param_names()}
    return graph._with(
        nodes=nodes,
        outputs=outputs,
        bodies=bodies,
        splices=remaining(graph.splices, bodies),
        overrides={p: t for p, t in overrides.items() if p in params},
    )


def rename(graph: Graph, old: str | Node, new: str) -> Graph:
    """See `Graph.rename`."""
    source = here()
    node = _host(graph, old, "rename")
    name = node.name or ""
    (check_input_name if node.op == "input" else check_name)(new, source)
    if new == name:
        return graph
    refuse_taken(new, graph._nodes, replace(node, source=source))
    refuse_adapted(graph, name)
    called = {n: new + n.removeprefix(name) for n in graph.calls_of(name)}
    nodes = {
        called.get(n, n): replace(x, name=called.get(n, n), inputs=tuple(called.get(i, i) for i in x.inputs))
        for n, x in graph._nodes.items()
    }
    params = dict(zip(node.param_names(), nodes[new].param_names(), strict=True))
    return graph._with(
        nodes=nodes,
        outputs=map_outputs(graph.outputs, called),
        overrides={params.get(p, p): t for p, t in graph._overrides.items()},
    )


def truncate(graph: Graph, name: str | Node) -> Graph:
    """See `Graph.truncate`."""
    refuse_imported(graph, "truncate")
    key = name.name or "" if isinstance(name, Node) else name
    return pruned(graph, graph._nodes, graph.value_of(key).name, graph._overrides)


def tap(graph: Graph, at: Selector) -> Graph:
    """See `Graph.tap`."""
    refuse_imported(graph, "tap")
    outputs = dict(graph.outputs) if isinstance(graph.outputs, dict) else {n: n for n in graph.output_names()}
    for name in graph.select(at):
        value = graph.value_of(name).name or ""
        if outputs.setdefault(name, value) != value:
            raise DuplicateName(
                f"there is another output called {name!r}",
                node=name,
                sides=[("output", name, outputs[name]), ("tap", name, value)],
                source=here(),
                hint="give the tap another name",
            )
    return graph._with(outputs=outputs)


def diff(graph: Graph, other: Graph) -> Diff:
    """See `Graph.diff`."""
    if not isinstance(other, Graph):
        raise GraphError(
            f"a graph is compared with a graph, not with a {type(other).__name__}",
            source=here(),
            hint="ag.graph_of(model) is the graph of a compiled model, ag.trace(model, …) that of any other",
        )
    mine, theirs = graph._nodes, other._nodes
    return Diff(
        tuple(n for n in theirs if n not in mine),
        tuple(n for n in mine if n not in theirs),
        tuple(n for n in mine if n in theirs and not mine[n].same(theirs[n])),
    )
