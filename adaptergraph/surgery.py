"""Verbs that change a graph: each copies the table, repoints some consumers and shares everything else. Floor 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .collect import unnamed
from .errors import BadSplice, ShapeMismatch, Source, UnknownNode, here
from .graph import Body, Graph, Splice, duplicate
from .names import check_name
from .node import EMPTY, Node, format_shape
from .select import Selector, match

WHERE = ("after", "around")


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a method adds its nodes: what `method.apply(site)` is given.

    Attributes:
        name: the host.
        output: the host's value, after the bodies that are already there.
        graph: the graph before this splice, for reading earlier nodes.
        inputs: the float tensors the host reads, by name of argument.
    """

    name: str
    output: Node
    graph: Graph
    inputs: Mapping[str, Node]
    source: Source | None

    @property
    def input(self) -> Node:
        """The one float tensor the host reads.

        Raises:
            BadSplice: it reads none, or several: use `site.inputs[name]`.
        """
        if len(self.inputs) == 1:
            return next(iter(self.inputs.values()))
        raise BadSplice(
            f"the host {self.name!r} reads {len(self.inputs)} float tensors, so its input is not one of them",
            node=self.name,
            sides=[(name, node.name or "", format_shape(node.shape)) for name, node in self.inputs.items()],
            source=self.source,
            hint="say which: site.inputs[name]" if self.inputs else "splice after an earlier node",
        )


class _Draft:
    """A table under construction: edges can be repointed and nodes put in without walking the whole table again."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = dict(graph._nodes)
        self.readers: dict[str, dict[str, None]] = {n: dict.fromkeys(r) for n, r in graph.consumers.items()}
        self.bodies = dict(graph.bodies)
        self.outputs = graph.outputs
        self.after: dict[str, list[str]] = {}
        self.rank = {name: i for i, name in enumerate(graph._nodes)}
        self.anchor = {name: name for name in graph._nodes}
        reads = Counter(read for b in graph.bodies.values() for read, _ in b.calls)
        # two branches that a user wrote over one node replace nothing for each other: no chain
        self.by_read = {r: b for b in graph.bodies.values() for r, _ in b.calls if reads[r] == 1}

    def repoint(self, old: str, new: str, only: Callable[[str], bool]) -> None:
        for reader in [r for r in self.readers[old] if only(r)]:
            node = self.nodes[reader]
            self.nodes[reader] = replace(node, inputs=tuple(new if i == old else i for i in node.inputs))
            del self.readers[old][reader]
            self.readers[new][reader] = None

    def repoint_outputs(self, old: str, new: str) -> None:
        outputs = self.outputs
        if isinstance(outputs, str):
            self.outputs = new if outputs == old else outputs
        elif isinstance(outputs, dict):
            self.outputs = {k: new if v == old else v for k, v in outputs.items()}
        else:
            self.outputs = tuple(new if v == old else v for v in outputs)

    def add(self, node: Node, near: str) -> None:
        name = node.name or ""
        if name in self.nodes:
            raise duplicate(name, self.nodes[name].source, node.source)
        self.nodes[name] = node
        self.readers[name] = {}
        for value in dict.fromkeys(node.inputs):
            self.readers[value][name] = None
        anchor = max((self.anchor[i] for i in node.inputs), key=self.rank.__getitem__, default=self.anchor[near])
        self.anchor[name] = anchor
        self.after.setdefault(anchor, []).append(name)

    def ordered(self) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for name in self.graph._nodes:
            result[name] = self.nodes[name]
            new = self.after.get(name)
            if new:
                result.update((n, self.nodes[n]) for n in new)
        return result


def splice(graph: Graph, at: Selector, method: Any, name: str, where: str | None) -> Graph:
    """See `Graph.splice`."""
    source = here()
    check_name(name, source)
    apply = getattr(method, "apply", method)
    if not callable(apply):
        raise BadSplice(f"{method!r} is no method and no callable site -> Node", source=source)
    where = where or getattr(method, "where", "after")
    if where not in WHERE:
        raise BadSplice(f"a body can be 'after' or 'around' its host, not {where!r}", source=source)
    hosts = graph.select(at)
    _called(graph, hosts, source)
    draft = _Draft(graph)
    for host in hosts:
        _attach(draft, host, apply, name, where, source)
    kept: Any = at if isinstance(at, str) else list(at) if _plain(at) else list(hosts)
    record = Splice(kept, method, name, where, tuple(hosts))
    return graph._with(
        nodes=draft.ordered(),
        outputs=draft.outputs,
        bodies=draft.bodies,
        splices=(*graph.splices, record),
    )


def _plain(at: Any) -> bool:
    return isinstance(at, list | tuple) and all(isinstance(entry, str) for entry in at)


def _called(graph: Graph, hosts: Iterable[str], source: Source | None) -> None:
    """Refuses hosts at which a body would never run, with the places that work."""
    for host in hosts:
        node = graph._nodes.get(host)
        if graph.imported is not None and (node is None or node.op not in ("input", "output")):
            if "/" in host or "@" in host:
                raise BadSplice(
                    f"{host!r} is an operation or one call inside a forward: no body can be attached there",
                    node=host,
                    source=source,
                    hint=f"splice at the module around it: {_around(graph, host)!r}",
                )
            module = graph.imported.modules.get(host)
            if module is not None and not module.calls:
                raise _never_called(graph, host, source)
            if module is not None and not all(call.output for call in module.calls):
                raise BadSplice(
                    f"{host!r} ({module.cls}) returns no float tensor: a body has nothing to work on",
                    node=host,
                    source=source,
                )
            continue
        if node is not None and (node.op in ("input", "output", "param", "constant") or node.shape is None):
            if node.op == "input" and graph.imported is None:
                continue
            raise BadSplice(
                f"{host!r} is {_article(node.op)} of the graph: a body is added at a layer",
                node=host,
                source=source,
                hint="splice at a layer that reads it",
            )


def _article(op: str) -> str:
    return f"an {op}" if op[0] in "aeiou" else f"a {op}"


def _around(graph: Graph, host: str) -> str:
    scope = graph.imported.scopes.get(host, "") if graph.imported is not None else ""
    return scope or host.partition("/")[0].partition("@")[0]


def _never_called(graph: Graph, host: str, source: Source | None) -> BadSplice:
    assert graph.imported is not None
    own = [p for p in graph.imported.params if p.startswith(host + ".")]
    reader = next((graph.imported.readers[p] for p in own if p in graph.imported.readers), None)
    why = f"; its {own[0].rpartition('.')[2]} is read by {reader!r}" if reader else ""
    return BadSplice(
        f"{host!r} ({graph.imported.modules[host].cls}) is never called{why}: a body there would never run",
        node=host,
        source=source,
        hint=f"splice at {reader!r}" if reader else f"narrow the pattern, or splice at {host.rpartition('.')[0]!r}",
    )


def _attach(draft: _Draft, host: str, apply: Any, name: str, where: str, source: Source | None) -> None:
    body = f"{host}.{name}"
    if body in draft.bodies:
        raise BadSplice(
            f"there is a body {body!r} already",
            node=body,
            source=source,
            hint=f"give this one another name=, or take it out first: graph.unsplice({body!r})",
        )
    passed: set[str] = set()
    inside = _inside(draft, host, passed)
    calls = []
    first: dict[str, Node] = {}
    for index, base in enumerate(draft.graph.calls_of(host)):
        value = base
        while (there := draft.by_read.get(value)) is not None and (there.host + ".").startswith(host + "."):
            passed.add(there.name)
            value = next(w for r, w in there.calls if r == value)
        if index == 0:
            new, written = _apply(draft, host, body, value, apply, where, source)
            first = {n.name or "": n for n in new}
        else:
            new, written = _again(first, calls[0], value, index)
        for node in new:
            draft.add(node, value)
        own = {node.name for node in new}
        draft.repoint(value, written, lambda r, own=own: r not in own and not inside(r))  # type: ignore[misc]
        draft.repoint_outputs(value, written)
        later = draft.by_read.get(value)
        if later is not None:
            moved = tuple((written if r == value else r, w) for r, w in later.calls)
            draft.bodies[later.name] = draft.by_read[written] = replace(later, calls=moved)
        calls.append((value, written))
    record = Body(body, host, where, tuple(calls))
    draft.bodies[body] = record
    draft.by_read.update((read, record) for read, _ in calls)


def _inside(draft: _Draft, host: str, passed: set[str]) -> Callable[[str], bool]:
    """Whether a node runs inside the host, or in a body before this one: such nodes still see the value as it was."""
    imported = draft.graph.imported
    leaf = imported is None and host in draft.graph._nodes

    def inside(name: str) -> bool:
        node = draft.nodes[name]
        if node.op == "output":
            return True
        if node.body is not None:
            if node.body in passed:
                return True
            scope = draft.bodies[node.body].host if node.body in draft.bodies else node.body
            return scope.startswith(host + ".")
        if imported is not None:
            scope = imported.scopes.get(name, "")
        else:
            scope = "" if leaf else name
        return (scope + ".").startswith(host + ".")

    return inside


def _apply(
    draft: _Draft, host: str, body: str, value: str, apply: Any, where: str, source: Source | None
) -> tuple[list[Node], str]:
    graph = draft.graph
    handle = replace(draft.nodes[value], graph=graph, dtype=_full(draft.nodes[value].dtype))
    site = Site(host, handle, graph, _inputs(draft, host, where), source)
    result = apply(site)
    if not isinstance(result, Node):
        raise BadSplice(f"the method at {host!r} returned {result!r}, not a node", node=host, source=source)
    new = _new_nodes(draft, result, body, {value, *(n.name for n in site.inputs.values())}, source)
    if not new:
        raise BadSplice(f"the method at {host!r} added no node", node=host, source=source)
    final = new[-1]
    if (final.shape, final.dtype) != (handle.shape, handle.dtype):
        raise ShapeMismatch(
            f"body {body!r} does not fit its host",
            node=body,
            sides=[
                ("host", host, format_shape(handle.shape), str(handle.dtype)),
                ("body", final.name or "", format_shape(final.shape), str(final.dtype)),
            ],
            source=source,
            hint=f"end the body with the shape of its host: {format_shape(handle.shape)}",
        )
    return new, final.name or ""


def _full(dtype: Any) -> Any:
    """Bodies on a half-precision host compute in float32 (see `CompiledGraph`)."""
    import torch

    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _inputs(draft: _Draft, host: str, where: str) -> Mapping[str, Node]:
    if where != "around":
        return EMPTY
    graph = draft.graph
    if graph.imported is not None:
        call = graph.imported.modules[host].calls[0]
        pairs: Iterable[tuple[str, str]] = call.inputs
    else:
        node = draft.nodes.get(host)
        values = node.inputs if node is not None else ()
        floats = [v for v in values if draft.nodes[v].dtype is not None and draft.nodes[v].dtype.is_floating_point]
        pairs = [(f"input_{i}" if i else "input", v) for i, v in enumerate(dict.fromkeys(floats))]
    return {arg: replace(draft.nodes[v], graph=graph, dtype=_full(draft.nodes[v].dtype)) for arg, v in pairs}


def _new_nodes(draft: _Draft, result: Node, body: str, allowed: set[str | None], source: Source | None) -> list[Node]:
    """The nodes a method made, named below the body, inputs as names; stops at nodes the graph already has."""
    counts: dict[str, int] = {}
    taken: set[str | None] = set()
    names: dict[int, str] = {}
    done: list[Node] = []
    stack = [result]
    seen: set[int] = set()
    while stack:
        node = stack[-1]
        if node.graph is not None or id(node) in names:
            stack.pop()
            continue
        if id(node) not in seen:
            seen.add(id(node))
            stack += [i for i in reversed(node.inputs) if i.graph is None and id(i) not in names]
            continue
        stack.pop()
        if node.op == "input":
            raise BadSplice(f"the body {body!r} reads a new input {node.name!r}", node=body, source=source)
        relative = node.name or unnamed(node.op, counts, taken)
        taken.add(relative)
        full = f"{body}.{check_name(relative, node.source)}"
        inputs = tuple(_settled(draft, i, body, allowed, source) if i.graph else names[id(i)] for i in node.inputs)
        names[id(node)] = full
        done.append(replace(node, name=full, inputs=inputs, body=body))
    return done


def _settled(draft: _Draft, node: Node, body: str, allowed: set[str | None], source: Source | None) -> str:
    name = node.name or ""
    if name not in draft.nodes:
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


def _again(first: Mapping[str, Node], call: tuple[str, str], value: str, index: int) -> tuple[list[Node], str]:
    """The same body for a further call of its host: the same parameters, another value."""
    read, written = call
    names = {name: f"{name}@{index}" for name in first}
    names[read] = value
    copies = [
        replace(node, name=names[name], inputs=tuple(names.get(i, i) for i in node.inputs))
        for name, node in first.items()
    ]
    return copies, names[written]


# ---------------------------------------------------------------------- taking out


def unsplice(graph: Graph, at: Selector) -> Graph:
    """See `Graph.unsplice`."""
    if not graph.bodies:
        raise UnknownNode("this graph has no body to take out", source=here())
    entries = [at] if isinstance(at, str) else list(at)  # type: ignore[arg-type]
    below: dict[str, list[str]] = {}
    for name, body in graph.bodies.items():
        for key in {name, body.host}:
            below.setdefault(key, []).append(name)
    gone: dict[str, None] = {}
    for entry in entries:
        for hit in match([entry], list(below), "body")[entry]:
            gone.update(dict.fromkeys(below[hit]))
    nodes = dict(graph._nodes)
    outputs = graph.outputs
    bodies = dict(graph.bodies)
    moved = {write: read for name in gone for read, write in graph.bodies[name].calls}

    def back(value: str) -> str:
        while value in moved:
            value = moved[value]
        return value

    for name, node in graph._nodes.items():
        if node.body in gone:
            del nodes[name]
        elif any(i in moved for i in node.inputs):
            nodes[name] = replace(node, inputs=tuple(back(i) for i in node.inputs))
    for name, body in graph.bodies.items():
        if name in gone:
            del bodies[name]
        else:
            bodies[name] = replace(body, calls=tuple((back(r), w) for r, w in body.calls))
    if isinstance(outputs, str):
        outputs = back(outputs)
    elif isinstance(outputs, dict):
        outputs = {k: back(v) for k, v in outputs.items()}
    else:
        outputs = tuple(back(v) for v in outputs)
    params = {p for n in nodes.values() for p in n.param_names()}
    kept = {p: t for p, t in graph._overrides.items() if p not in graph.body_params or p in params}
    return graph._with(nodes=nodes, outputs=outputs, bodies=bodies, splices=_remaining(graph, gone), overrides=kept)


def _remaining(graph: Graph, gone: Mapping[str, None]) -> tuple[Splice, ...]:
    left = []
    for record in graph.splices:
        hosts = tuple(h for h in record.hosts if f"{h}.{record.name}" not in gone)
        if hosts == record.hosts:
            left.append(record)
        elif hosts:
            left.append(replace(record, at=list(hosts), hosts=hosts))
    return tuple(left)


# ---------------------------------------------------------------------- declared graphs only


def _declared(graph: Graph, verb: str) -> None:
    if graph.imported is not None:
        raise BadSplice(
            f"{verb} works on declared graphs: this one runs in the forward of {graph.imported.cls}",
            source=here(),
            hint="add to it with graph.splice",
        )


def _known(graph: Graph, name: str) -> Node:
    graph[name]
    return graph._nodes[name]


def replace_node(graph: Graph, name: str, node: Node) -> Graph:
    """See `Graph.replace`."""
    _declared(graph, "replace")
    old = _known(graph, name)
    if (node.shape, node.dtype) != (old.shape, old.dtype):
        raise ShapeMismatch(
            f"the new node does not fit in the place of {name!r}",
            node=name,
            sides=[
                ("old", name, format_shape(old.shape), str(old.dtype)),
                ("new", node.name or node.op, format_shape(node.shape), str(node.dtype)),
            ],
            source=here(),
        )
    return _rebuilt(graph, {name: node})


def remove(graph: Graph, name: str) -> Graph:
    """See `Graph.remove`."""
    _declared(graph, "remove")
    old = _known(graph, name)
    if len(old.inputs) != 1:
        raise BadSplice(
            f"{name!r} reads {len(old.inputs)} nodes, so its consumers cannot simply read its input",
            node=name,
            source=here(),
            hint="graph.replace(name, node) says what stands in its place",
        )
    return replace_node(graph, name, graph[old.inputs[0]])


def _rebuilt(graph: Graph, swaps: Mapping[str, Node]) -> Graph:
    """Writes the table again with other nodes in some places; names stay."""
    gone = set(swaps)
    mapping: dict[str, Node] = {}
    for name, node in graph._nodes.items():
        if name in swaps:
            new = swaps[name]
            if new.graph is None and new.name is None:
                new = replace(new, name=name)
            mapping[name] = new
    table: dict[str, Node] = {}
    alias: dict[str, str] = {}

    def settle(node: Node) -> str:
        """Adds a written node and what it reads; nodes of this graph are there already."""
        stack, names = [node], {}
        while stack:
            top = stack[-1]
            if top.graph is not None:
                names[id(top)] = alias.get(top.name or "", top.name or "")
                stack.pop()
                continue
            waiting = [i for i in top.inputs if id(i) not in names]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            if id(top) in names:
                continue
            name = top.name or unnamed(top.op, counts, taken)
            if name in table or (name in graph._nodes and name not in gone):
                raise duplicate(name, (table.get(name) or graph._nodes[name]).source, top.source)
            check_name(name, top.source)
            taken.add(name)
            table[name] = replace(top, name=name, inputs=tuple(names[id(i)] for i in top.inputs))
            names[id(top)] = name
        return names[id(node)]

    counts: dict[str, int] = {}
    taken: set[str | None] = set(graph._nodes)
    for name, node in graph._nodes.items():
        if name in mapping:
            alias[name] = settle(mapping[name])
        else:
            table[name] = replace(node, inputs=tuple(alias.get(i, i) for i in node.inputs))
    outputs: Any = graph.outputs
    if isinstance(outputs, str):
        outputs = alias.get(outputs, outputs)
    elif isinstance(outputs, dict):
        outputs = {k: alias.get(v, v) for k, v in outputs.items()}
    else:
        outputs = tuple(alias.get(v, v) for v in outputs)
    return _pruned(graph, table, outputs)


def _pruned(graph: Graph, table: dict[str, Node], outputs: Any) -> Graph:
    """Only what leads to the outputs, with what belongs to it."""
    names = [outputs] if isinstance(outputs, str) else list(outputs.values() if isinstance(outputs, dict) else outputs)
    needed: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += table[name].inputs
    nodes = {n: node for n, node in table.items() if n in needed}
    bodies = {}
    for name, body in graph.bodies.items():
        calls = tuple((r, w) for r, w in body.calls if w in nodes and r in nodes)
        if calls:
            bodies[name] = replace(body, calls=calls)
    nodes = {n: node if node.body in bodies else replace(node, body=None) for n, node in nodes.items()}
    params = {p for n in nodes.values() for p in n.param_names()}
    overrides = {p: t for p, t in graph._overrides.items() if p in params}
    splices = _remaining(graph, dict.fromkeys(set(graph.bodies) - set(bodies)))
    return graph._with(nodes=nodes, outputs=outputs, bodies=bodies, splices=splices, overrides=overrides)


def rename(graph: Graph, old: str, new: str) -> Graph:
    """See `Graph.rename`."""
    _declared(graph, "rename")
    source = here()
    node = _known(graph, old)
    if node.body is not None or any(b.host == old or old in sum(b.calls, ()) for b in graph.bodies.values()):
        raise BadSplice(
            f"{old!r} belongs to a body, whose names follow its host",
            node=old,
            source=source,
            hint="rename before the splice",
        )
    check_name(new, source)
    if new in graph:
        raise duplicate(new, graph._nodes[new].source, node.source)
    if new == old:
        return graph
    nodes = {
        (new if n == old else n): replace(
            x, name=new if n == old else n, inputs=tuple(new if i == old else i for i in x.inputs)
        )
        for n, x in graph._nodes.items()
    }
    params = dict(zip(node.param_names(), nodes[new].param_names(), strict=True))
    overrides = {params.get(p, p): t for p, t in graph._overrides.items()}
    outputs: Any = graph.outputs
    if isinstance(outputs, str):
        outputs = new if outputs == old else outputs
    elif isinstance(outputs, dict):
        outputs = {k: new if v == old else v for k, v in outputs.items()}
    else:
        outputs = tuple(new if v == old else v for v in outputs)
    return graph._with(nodes=nodes, outputs=outputs, overrides=overrides)


def truncate(graph: Graph, name: str) -> Graph:
    """See `Graph.truncate`."""
    _declared(graph, "truncate")
    return _pruned(graph, dict(graph._nodes), graph.output_of(name).name)


def tap(graph: Graph, at: Selector) -> Graph:
    """See `Graph.tap`."""
    _declared(graph, "tap")
    taps = {n: graph.output_of(n).name or "" for n in graph.select(at)}
    outputs = graph.outputs
    mine = dict(outputs) if isinstance(outputs, dict) else {n: n for n in graph.output_names()}
    return graph._with(outputs={**mine, **taps})
