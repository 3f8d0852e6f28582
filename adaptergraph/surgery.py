"""Bodies put into a graph and taken out: the table is copied, some consumers repointed, the rest shared. Floor 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .collect import remaining, unnamed
from .draft import Draft, in_order, map_outputs
from .errors import BadSplice, GraphError, ShapeMismatch, Source, UnknownNode, here
from .graph import Body, Graph, Splice, leaves
from .names import check_name
from .node import EMPTY, Node, format_shape
from .select import Selection, Selector, entries_of, hits, in_graph_order, is_pattern, match

WHERE = ("after", "around")
NO_PLACE = ("input", "output", "param", "constant")


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a method adds its nodes: what `method.apply(site)` is given.

    Attributes:
        name: the host.
        output: the host's value, after the bodies that are already there.
        graph: the graph before this splice, for reading earlier nodes.
        inputs: the float tensors the host reads, by name of argument; only with `where="around"`.
    """

    name: str
    output: Node
    graph: Graph
    inputs: Mapping[str, Node]
    where: str
    source: Source | None

    @property
    def input(self) -> Node:
        """The one float tensor the host reads.

        Raises:
            BadSplice: it reads none, or several: use `site.inputs[name]`.
        """
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        if self.where != "around":
            raise BadSplice(
                f"a body {self.where!r} {self.name!r} sees its output only",
                node=self.name,
                source=self.source,
                hint="graph.splice(…, where='around') gives it the input too",
            )
        raise BadSplice(
            f"the host {self.name!r} reads {len(self.inputs)} float tensors, so its input is not one of them",
            node=self.name,
            sides=[(name, node.name or "", format_shape(node.shape)) for name, node in self.inputs.items()],
            source=self.source,
            hint="say which: site.inputs[name]" if self.inputs else "splice after an earlier node",
        )


def splice(graph: Graph, at: Selector, method: Any, name: str, where: str | None) -> Graph:
    """See `Graph.splice`."""
    source = here()
    if "." in check_name(name, source):
        raise GraphError(f"the name of a body is one word, not {name!r}", node=name, source=source)
    apply = getattr(method, "apply", method)
    if isinstance(method, type) or not callable(apply):
        raise BadSplice(
            f"{method!r} is no method and no callable site -> Node",
            source=source,
            hint=f"make one of it: {method.__name__}(…)" if isinstance(method, type) else None,
        )
    where = where or getattr(method, "where", "after")
    if where not in WHERE:
        raise BadSplice(f"a body can be 'after' or 'around' its host, not {where!r}", source=source)
    hosts = _hosts(graph, at, source)
    draft = Draft(graph)
    for host in hosts:
        _attach(draft, host, apply, name, where, source)
    texts = entries_of(at)
    plain = all(isinstance(entry, str) for entry in texts)
    kept = at if isinstance(at, str) else texts if plain else list(hosts)
    record = Splice(kept, method, name, where, tuple(hosts))
    return graph._with(
        nodes=in_order(draft.nodes, draft.ordered(), source),
        outputs=draft.outputs,
        bodies=draft.bodies,
        splices=(*graph.splices, record),
        overrides={**graph._overrides, **_frozen(draft, record)},
    )


def _frozen(draft: Draft, splice: Splice) -> dict[str, bool]:
    """The parameters of new bodies that their method wants frozen: paths below the body."""
    parts = getattr(splice.method, "frozen", ())
    below = tuple(f"{host}.{splice.name}.{part}." for host in splice.hosts for part in parts)
    new = {f"{host}.{splice.name}" for host in splice.hosts} if parts else set()
    params = (p for node in draft.nodes.values() if node.body in new for p in node.param_names())
    return {p: False for p in params if p.startswith(below)}


def _hosts(graph: Graph, at: Selector, source: Source | None) -> Selection:
    """The hosts of a splice: a name is taken at its word, a pattern or predicate means only what can be a host."""
    found: list[str] = []
    for entry in entries_of(at):
        names = hits(graph, entry)
        if (isinstance(entry, str) and is_pattern(entry)) or callable(entry):
            hosts = [n for n in names if _is_place(graph, n)]
            if not hosts:
                raise BadSplice(
                    f"{repr(entry) if isinstance(entry, str) else 'the predicate'} selects no place for a body",
                    sides=[("selected", n, graph.op_of(n)) for n in names[:6]],
                    source=source,
                    hint="splice at a layer",
                )
            names = hosts
        found += names
    selected = in_graph_order(graph, found, "the selector")
    _refuse(graph, selected, source)
    return selected


def _is_place(graph: Graph, name: str) -> bool:
    node = graph._nodes.get(name)
    if node is None:
        return True
    return node.op not in NO_PLACE and node.body is None and node.shape is not None and "@" not in name


def _refuse(graph: Graph, hosts: Iterable[str], source: Source | None) -> None:
    """Refuses hosts at which a body would never run, with the places that work."""
    for host in hosts:
        node = graph._nodes.get(host)
        if node is not None and node.body is not None:
            raise BadSplice(
                f"{host!r} belongs to the body {node.body!r}",
                node=host,
                source=source,
                hint=f"splice at its host: {graph.bodies[node.body].host!r}",
            )
        if graph.imported is not None and (node is None or node.op not in ("input", "output")):
            _refuse_imported(graph, host, source)
        elif node is not None and node.op in NO_PLACE and (node.op != "input" or graph.imported is not None):
            raise BadSplice(
                f"{host!r} is of the kind {node.op!r}: a body is added at a layer",
                node=host,
                source=source,
                hint="splice at a layer that reads it",
            )
        elif node is not None and "@" in host:
            raise BadSplice(
                f"{host!r} is a further call of {node.path!r}: a body is added at all its calls",
                node=host,
                source=source,
                hint=f"splice at {node.path!r}",
            )
        elif node is not None and node.shape is None:
            raise BadSplice(
                f"{host!r} gives no single tensor: a body has nothing to work on",
                node=host,
                source=source,
                hint="splice at a node that reads it",
            )


def _refuse_imported(graph: Graph, host: str, source: Source | None) -> None:
    assert graph.imported is not None
    if "/" in host or "@" in host:
        around = graph.imported.scopes.get(host) or host.partition("/")[0].partition("@")[0]
        raise BadSplice(
            f"{host!r} is an operation or one call inside a forward: no body can be attached there",
            node=host,
            source=source,
            hint=f"splice at the module around it: {around!r}" if around else "splice at a module inside the model",
        )
    module = graph.imported.modules.get(host)
    if module is None:
        raise BadSplice(
            f"{host!r} is the model itself: bodies are added at modules inside it",
            node=host,
            source=source,
            hint="trace it inside another module: nn.Sequential(model)",
        )
    if not module.calls:
        raise _never_called(graph, host, source)
    if not all(call.output for call in module.calls):
        raise BadSplice(
            f"{host!r} ({module.cls}) returns no float tensor: a body has nothing to work on",
            node=host,
            source=source,
        )


def _never_called(graph: Graph, host: str, source: Source | None) -> BadSplice:
    assert graph.imported is not None
    own = [p for p in graph.imported.params if p.startswith(host + ".")]
    reader = next((graph.imported.readers[p] for p in own if p in graph.imported.readers), None)
    why = f"; its {own[0].rpartition('.')[2]} is read by {reader!r}" if reader else ""
    parent = host.rpartition(".")[0]
    other = f", or splice at {parent!r}" if parent else ""
    return BadSplice(
        f"{host!r} ({graph.imported.modules[host].cls}) is never called{why}: a body there would never run",
        node=host,
        source=source,
        hint=f"splice at {reader!r}" if reader else f"narrow the pattern{other}",
    )


def _attach(draft: Draft, host: str, apply: Any, name: str, where: str, source: Source | None) -> None:
    body = f"{host}.{name}"
    if body in draft.bodies or body in draft.nodes:
        raise BadSplice(
            f"there is a {'body' if body in draft.bodies else 'node'} {body!r} already",
            node=body,
            source=source,
            hint="give this one another name="
            + (f", or take it out first: graph.unsplice({body!r})" if body in draft.bodies else ""),
        )
    inside = _inside(draft, host)
    calls: list[tuple[str, str]] = []
    first: dict[str, Node] = {}
    for index, base in enumerate(draft.graph.calls_of(host)):
        value = draft.arrived(base, lambda b: (b.host + ".").startswith(host + "."))
        if index == 0:
            new = _apply(draft, host, body, value, apply, where, source)
            first = {n.name or "": n for n in new}
            written = new[-1].name or ""
        else:
            new, written = _again(draft, host, where, first, calls, value, index)
        for node in new:
            draft.add(node, value)
        own = {node.name for node in new}
        draft.repoint(value, written, lambda r, own=own: r not in own and not inside(r))  # type: ignore[misc]
        calls.append((value, written))
    draft.bodies[body] = Body(body, host, where, tuple(calls))
    for read, _ in calls:
        draft.replacing.setdefault(read, []).append(body)


def _inside(draft: Draft, host: str) -> Callable[[str], bool]:
    """Whether a node runs inside the host: such nodes still see the value as it was."""
    imported = draft.graph.imported
    leaf = imported is None and host in draft.graph._nodes

    def inside(name: str) -> bool:
        node = draft.nodes[name]
        if node.op == "output":
            return True
        if leaf:
            return False
        if node.body is not None:
            return draft.bodies[node.body].host.startswith(host + ".")
        scope = imported.scopes.get(name, "") if imported is not None else name
        return (scope + ".").startswith(host + ".")

    return inside


def _apply(draft: Draft, host: str, body: str, value: str, apply: Any, where: str, source: Source | None) -> list[Node]:
    handle = _handle(draft, value)
    site = Site(host, handle, draft.graph, _inputs(draft, host, where), where, source)
    result = apply(site)
    if not isinstance(result, Node):
        raise BadSplice(f"the method at {host!r} returned {result!r}, not a node", node=host, source=source)
    if result.graph is not None:
        raise BadSplice(
            f"the method at {host!r} returned {result.name!r}, which is there already: it added no node",
            node=host,
            source=source,
        )
    new = _new_nodes(draft, result, body, {value, *(n.name for n in site.inputs.values())}, source)
    if (result.shape, result.dtype) != (handle.shape, handle.dtype):
        raise ShapeMismatch(
            f"body {body!r} does not fit its host",
            node=body,
            sides=[
                ("host", host, format_shape(handle.shape), str(handle.dtype)),
                ("body", new[-1].name or "", format_shape(result.shape), str(result.dtype)),
            ],
            source=source,
            hint=f"end the body with the shape of its host: {format_shape(handle.shape)}",
        )
    return new


def _handle(draft: Draft, value: str) -> Node:
    """A node as a method sees it. Bodies on a half-precision host compute in float32 (see `CompiledGraph`)."""
    node = replace(draft.nodes[value], graph=draft.graph)
    half = draft.graph.imported is not None and node.dtype in (torch.float16, torch.bfloat16)
    return replace(node, dtype=torch.float32) if half else node


def _inputs(draft: Draft, host: str, where: str, index: int = 0) -> Mapping[str, Node]:
    """The float tensors that one call of the host reads, after the bodies that they pass on their way."""
    if where != "around":
        return EMPTY
    graph = draft.graph
    if graph.imported is not None:
        call = graph.imported.modules[host].calls[index]
        pairs = [(a, draft.arrived(v, lambda b: not host.startswith(b.host + "."))) for a, v in call.inputs]
    else:
        members = graph.containers[host][1] if host in graph.containers else (graph.calls_of(host)[index],)
        inside = _inside(draft, host) if host in graph.containers else lambda v: False
        reads = dict.fromkeys(v for name in members for v in draft.nodes[name].inputs if v not in members)
        values = [v for v in reads if draft.nodes[v].op not in ("param", "constant") and not inside(v)]
        floats = [v for v in values if (dtype := draft.nodes[v].dtype) is not None and dtype.is_floating_point]
        pairs = [(f"input_{i}" if i else "input", v) for i, v in enumerate(floats)]
    return {argument: _handle(draft, value) for argument, value in pairs}


def _new_nodes(draft: Draft, result: Node, body: str, allowed: set[str | None], source: Source | None) -> list[Node]:
    """The nodes a method made, named below the body, inputs as names; stops at nodes the graph already has."""
    order = made(result)
    counts: dict[str, int] = {}
    taken = {node.name for node in order}
    names: dict[int, str] = {}
    done: list[Node] = []
    for node in order:
        if node.op == "input":
            raise BadSplice(f"the body {body!r} reads a new input {node.name!r}", node=body, source=source)
        relative = node.name or unnamed(node.op, counts, taken)
        taken.add(relative)
        names[id(node)] = full = f"{body}.{check_name(relative, node.source)}"
        inputs = tuple(_settled(draft, i, body, allowed, source) if i.graph else names[id(i)] for i in node.inputs)
        done.append(replace(node, name=full, inputs=inputs, body=body))
    return done


def made(result: Node) -> list[Node]:
    """The nodes that are in no graph yet, inputs before the nodes that read them."""
    order: dict[int, Node] = {}
    stack = [result]
    while stack:
        node = stack[-1]
        waiting = [i for i in node.inputs if i.graph is None and id(i) not in order]
        if id(node) in order or not waiting:
            order.setdefault(id(node), node)
            stack.pop()
        else:
            stack += reversed(waiting)
    for node in order.values():
        if node.shares is not None:
            first = node.shares.name or node.shares.op
            raise BadSplice(
                f"{node.op} shares the weights of {first!r}, which is decided where a graph is made",
                node=first,
                source=node.source,
                hint="write it before ag.Graph(…), or leave share= out",
            )
    return list(order.values())


def _settled(draft: Draft, node: Node, body: str, allowed: set[str | None], source: Source | None) -> str:
    name = node.name or ""
    if name not in draft.nodes or is_foreign(draft.graph, node):
        raise BadSplice(
            f"the body {body!r} reads {name!r}, which is no node of this graph",
            node=body,
            source=source,
            hint="read site.output, site.input or site.graph[name]",
        )
    if draft.graph.imported is not None and name not in allowed:
        raise BadSplice(
            f"the body {body!r} reads {name!r}, which does not reach it inside the model's own forward",
            node=body,
            source=source,
            hint="a body of an imported model reads its host's output, and with where='around' its host's input",
        )
    return name


def is_foreign(graph: Graph, node: Node) -> bool:
    """Whether a handle is of another graph, and not of one that this graph was made from."""
    if node.graph is None or node.graph is graph:
        return False
    mine, theirs = graph._nodes.get(node.name or ""), node.graph._nodes.get(node.name or "")
    return mine is None or theirs is None or not mine.same(theirs)


def _again(
    draft: Draft,
    host: str,
    where: str,
    first: Mapping[str, Node],
    calls: list[tuple[str, str]],
    value: str,
    index: int,
) -> tuple[list[Node], str]:
    """The same body for a further call of its host: the same parameters, other values."""
    read, written = calls[0]
    names = {name: f"{name}@{index}" for name in first}
    later = _inputs(draft, host, where, index)
    for argument, node in _inputs(draft, host, where).items():
        if argument in later:
            arrived = later[argument].name or ""
            names[node.name or ""] = dict(calls).get(arrived, arrived)
    names[read] = value
    copies = [
        replace(node, name=names[name], inputs=tuple(names.get(i, i) for i in node.inputs))
        for name, node in first.items()
    ]
    return copies, names[written]


# ---------------------------------------------------------------------- taking out


def unsplice(graph: Graph, at: Selector) -> Graph:
    """See `Graph.unsplice`."""
    source = here()
    if not graph.bodies:
        raise UnknownNode("this graph has no body to take out", source=source)
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
    return graph._with(
        nodes=nodes,
        outputs=outputs,
        bodies=bodies,
        splices=remaining(graph.splices, bodies),
        overrides={p: t for p, t in graph._overrides.items() if p not in lost},
    )


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
