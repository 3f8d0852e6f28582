"""Bodies taken out again: what read them reads what they replaced. Floor 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..collect import remaining
from ..errors import BadSplice, GraphError, Source, UnknownNode, here
from ..graph import Graph, leaves
from ..node import Node
from ..select import Selection, Selector, entries_of, match
from .draft import Draft, map_outputs
from .hosts import unread


def unsplice(graph: Graph, at: Selector) -> Graph:
    """See `Graph.unsplice`."""
    source = here()
    if not graph.bodies:
        raise UnknownNode(
            "this graph has no body to take out", source=source, hint="splice first; graph.bodies holds what is there"
        )
    below: dict[str, list[str]] = {}
    for name, body in graph.bodies.items():
        for key in {name, body.host}:
            below.setdefault(key, []).append(name)
    gone: dict[str, None] = {}
    for entry in entries_of(at):
        for text in entry if isinstance(entry, Selection) else [entry]:
            if not isinstance(text, str):
                raise GraphError(f"unsplice takes names of bodies or hosts, not {text!r}", source=source)
            for hit in match(text, list(below), "body"):
                gone.update(dict.fromkeys(below[hit]))
    moved = {write: read for name in gone for read, write in graph.bodies[name].calls}

    def back(value: str) -> str:
        while value in moved:
            value = moved[value]
        return value

    nodes = {
        name: replace(node, inputs=tuple(map(back, node.inputs))) if any(i in moved for i in node.inputs) else node
        for name, node in graph._nodes.items()
        if node.body not in gone
    }
    outputs = map_outputs(graph.outputs, {value: back(value) for value in moved})
    _refuse_readers(graph, nodes, outputs, source)
    bodies = {
        name: replace(body, calls=tuple((back(r), w) for r, w in body.calls))
        for name, body in graph.bodies.items()
        if name not in gone
    }
    lost = {p for name, node in graph._nodes.items() if name not in nodes for p in node.param_names()}
    left = graph._with(
        nodes=nodes,
        outputs=outputs,
        bodies=bodies,
        splices=remaining(graph.splices, bodies),
        overrides={p: t for p, t in graph._overrides.items() if p not in lost},
    )
    _, idle = unread(left, Draft(left).kept(), bodies) if bodies else ((), [])
    if idle:
        raise BadSplice(
            f"of the body {idle[0].name!r} nothing comes without {', '.join(map(repr, gone))}: it would change nothing",
            node=idle[0].name,
            source=source,
            hint=f"take it out too: graph.unsplice({[*gone, *(body.name for body in idle)]})",
        )
    return left


def _refuse_readers(graph: Graph, nodes: Mapping[str, Node], outputs: Any, source: Source | None) -> None:
    """What is left may read the value a body makes, which is replaced by its host's, but nothing inside it."""
    reads = [(f"{n!r} reads", i) for n, node in nodes.items() for i in node.inputs if i not in nodes]
    for who, value in [*reads, *(("the graph returns", name) for name in leaves(outputs))]:
        if value not in nodes:
            raise BadSplice(
                f"{who} {value!r} of the body {graph._nodes[value].body!r}, which cannot be taken out alone",
                node=value,
                source=source,
                hint="take out what reads it first",
            )
