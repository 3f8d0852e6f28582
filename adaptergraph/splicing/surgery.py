"""Bodies put into a graph and taken out: the table is copied, some consumers repointed, the rest shared. Floor 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bodies import Body, Splice
from ..collect import unnamed
from ..errors import BadSplice, GraphError, ShapeMismatch, Source, here
from ..graph import Graph
from ..names import body_name, check_name, path_of
from ..node import EMPTY, Node, format_shape
from ..select import Selector, Span, entries_of
from .draft import Draft, in_order
from .hosts import hosts_of, refuse_unread, starts_of

WHERE = ("after", "around", "before")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where a method adds its nodes: what `method.apply(site)` is given.

    Attributes:
        name: the host.
        output: the value that the body replaces, after the bodies that are already there: the host's output, or with
            `where="before"` its input.
        graph: the graph before this splice, for reading earlier nodes. A body that reads `graph[name]` gets that value
            as it reaches its place, after the bodies on the way, whichever was spliced first. At each call of the host
            it is the value of the same call, where there is one; `name@0` is the first one's at all of them.
        inputs: the float tensors the host reads, by name of argument; not with `where="after"`.
        where: `"after"`, `"around"` or `"before"`.
    """

    name: str
    output: Node
    graph: Graph
    inputs: Mapping[str, Node]
    where: str
    source: Source | None

    @property
    def input(self) -> Node:
        """The float tensor the host reads; of several the one that has as many dimensions as its output.

        Raises:
            BadSplice: it reads none, or several: use `site.inputs[name]`.
        """
        return main_input(self.name, self.where, self.inputs, self.output, self.source)[1]


def main_input(
    host: str, where: str, inputs: Mapping[str, Node], output: Node, source: Source | None
) -> tuple[str, Node]:
    """The argument and value that a host works on. Raises: BadSplice, it reads none or several."""
    found = dict(inputs)
    if len(found) > 1:
        rank = len(output.shape or ())
        found = {name: node for name, node in found.items() if len(node.shape or ()) == rank}
    if len(found) == 1:
        return next(iter(found.items()))
    if where == "after":
        raise BadSplice(
            f"a body 'after' {host!r} sees its output only",
            node=host,
            source=source,
            hint="graph.splice(…, where='around') gives it the input too",
        )
    raise BadSplice(
        f"the host {host!r} reads {len(inputs)} float tensors, so its input is not one of them",
        node=host,
        sides=[(name, node.name or "", format_shape(node.shape)) for name, node in inputs.items()],
        source=source,
        hint="say which: site.inputs[name]" if inputs and where == "around" else "splice after an earlier node",
    )


def splice(graph: Graph, at: Selector, method: Any, name: str, where: str | None) -> Graph:
    """See `Graph.splice`."""
    source = here()
    if "." in check_name(name, source):
        raise GraphError(
            f"the name of a body is one word, not {name!r}",
            node=name,
            source=source,
            hint='letters, digits and _: name="adapter"',
        )
    apply = getattr(method, "apply", method)
    if isinstance(method, torch.nn.Module):
        raise BadSplice(
            f"{type(method).__name__} is a module, and a method is a function site -> Node",
            source=source,
            hint=method_of(method),
        )
    if isinstance(method, type) or not callable(apply):
        hint = method_of(method)
        if isinstance(method, str | Span):
            named = isinstance(at, str | Span)
            place, what = (repr(at), "ag.Bottleneck(16)") if named else (repr(method), repr(at))
            hint = f"first where, then what: graph.splice({place}, {what})"
        raise BadSplice(f"{method!r} is no method and no callable site -> Node", source=source, hint=hint)
    where = _where(at, where or getattr(method, "where", "after"), source)
    starts = starts_of(graph, at, source)
    hosts = hosts_of(graph, at, where, source)
    draft = Draft(graph)
    for host in hosts:
        _Splicing(draft, host, starts.get(host), name, where, source).attach(apply)
    texts = entries_of(at)
    plain = all(isinstance(entry, str | Span) for entry in texts)
    kept = at if isinstance(at, str | Span) else texts if plain else list(hosts)
    record = Splice(kept, method, name, where, tuple(hosts))
    nodes = in_order(draft.nodes, draft.ordered(), source)
    _refuse_late(draft, source)
    spliced = graph._with(
        nodes=nodes,
        outputs=draft.outputs,
        bodies=draft.bodies,
        splices=(*graph.splices, record),
        overrides={**graph._overrides, **_frozen(draft, record)},
    )
    refuse_unread(spliced, [body_name(host, name) for host in hosts], source)
    return spliced


def method_of(given: Any) -> str | None:
    """What to write in place of a module or class that was given where a method belongs; None for anything else."""
    cls = type(given) if isinstance(given, torch.nn.Module) else given
    if not isinstance(cls, type):
        return None
    if issubclass(cls, torch.nn.Module):
        prefix = "nn." if cls.__module__.startswith("torch.nn.") else ""
        return f"lambda site: ag.module(site.output, {prefix}{cls.__name__}(…))"
    return f"make one of it: {cls.__name__}(…)"


def _where(at: Selector, where: Any, source: Source | None) -> str:
    if where not in WHERE:
        raise BadSplice(f"a body can be 'after', 'around' or 'before' its host, not {where!r}", source=source)
    spans = [entry for entry in entries_of(at) if isinstance(entry, Span)]
    if spans and where != "around":
        raise BadSplice(
            f"a body {where!r} the end of {spans[0]} never reads its start",
            source=source,
            hint=f"splice at {spans[0].last!r}, or use a method that reads its input, or where='around'",
        )
    return where


def _frozen(draft: Draft, splice: Splice) -> dict[str, bool]:
    """The parameters of new bodies that their method wants frozen: paths below the body."""
    parts = getattr(splice.method, "frozen", ())
    new = {body_name(host, splice.name) for host in splice.hosts} if parts else set()
    below = tuple(f"{body}.{part}." for body in new for part in parts)
    params = (p for node in draft.nodes.values() if node.body in new for p in node.param_names())
    return {p: False for p in params if p.startswith(below)}


class _Splicing:
    """One body being put at one host: once for each call of the host, with the same parameters."""

    def __init__(
        self, draft: Draft, host: str, start: str | None, name: str, where: str, source: Source | None
    ) -> None:
        self.draft = draft
        self.host = host
        self.start = start
        self.body = body_name(host, name)
        self.where = where
        self.source = source
        self.calls: list[tuple[str, str]] = []
        self.argument = ""
        self.given: dict[str, str] = {}
        self.firsts: set[str] = set()
        self.raw: dict[str, str] = {}

    def attach(self, apply: Any) -> None:
        """Adds the nodes of the body, and lets those who read its host's value read its own."""
        draft, host = self.draft, self.host
        self.refuse_taken()
        first: dict[str, Node] = {}
        values = draft.graph.calls_of(host)
        for index, scope in enumerate(draft.scopes.of_host(host)):
            inputs = self.inputs(index)
            value = self.replaced(values[index], scope, inputs)
            if index == 0:
                new = self.apply(value, scope, inputs, apply)
                first = {n.name or "": n for n in new}
                self.given = {a: n.name or "" for a, n in inputs.items()}
                written = new[-1].name or ""
            else:
                new, written = self.again(first, value, scope, inputs, index)
            for node in new:
                draft.add(node, value)
            past = self.past(values[index], scope)
            readers = self.readers(scope, {node.name for node in new}, past)
            draft.repoint(value, written, readers, self.where != "before" and "" not in past)
            self.calls.append((value, written))
            self.late(scope, value, new)
            draft.bodies[self.body] = Body(self.body, host, self.where, tuple(self.calls))
            draft.replacing.setdefault(value, []).append(self.body)

    def refuse_taken(self) -> None:
        body, draft = self.body, self.draft
        if body in draft.bodies or body in draft.nodes:
            raise BadSplice(
                f"there is a {'body' if body in draft.bodies else 'node'} {body!r} already",
                node=body,
                source=self.source,
                hint="give this one another name="
                + (f", or take it out first: graph.unsplice({body!r})" if body in draft.bodies else ""),
            )

    def replaced(self, output: str, scope: str, inputs: Mapping[str, Node]) -> str:
        """The value that the body stands for: what its host gives, or with `before` what it is given."""
        if self.where != "before":
            return self.draft.at_host(self.host, scope, output)
        result = self.draft.nodes[output]
        if self.argument:
            return inputs[self.argument].name or ""
        self.argument, node = main_input(self.host, self.where, inputs, result, self.source)
        return node.name or ""

    def past(self, output: str, scope: str) -> set[str]:
        """Who reads the host's value as it was before the body: it came to them past the host.

        Raises:
            BadSplice: not all of what they read is that value, so that the graph cannot say what they read.
        """
        imported, before = self.draft.graph.imported, self.where == "before"
        if imported is None:
            return set()
        raw = dict(imported.call(scope).inputs)[self.argument] if before else output
        place = output if "/" in self.host else scope
        asides = imported.past(place, "entry" if before else "exit", raw)
        for aside in asides:
            if not aside.whole:
                reader = repr(aside.reader) if aside.reader else "the model itself"
                raise BadSplice(
                    f"{reader} reads what {self.host!r} {'is given' if before else 'gives'}, "
                    f"and not only by way of its {aside.at}: on an attribute, in a dict or list, or in one memory",
                    node=self.host,
                    sides=[("value", raw), ("read by", reader), ("past", f"the {aside.at} of {aside.scope!r}")],
                    source=self.source,
                    hint="let the model hand it on as an argument or result, or splice at a module that reads it",
                )
        return {aside.reader for aside in asides}

    def readers(self, scope: str, own: set[str | None], past: set[str]) -> Callable[[str], bool]:
        """Which readers of the replaced value read the new one."""
        draft, before = self.draft, self.where == "before"
        if "/" in self.host:
            return lambda name: name not in own

        def wanted(name: str) -> bool:
            node = draft.nodes[name]
            if name in own or name in past:
                return False
            if past and node.body is not None and draft.scopes.of_body_node(node) in past:
                return False
            return before == draft.scopes.is_inside(node, scope, self.where)

        return wanted

    def inputs(self, index: int = 0) -> Mapping[str, Node]:
        """The float tensors that one call of the host reads, after the bodies that they pass on their way."""
        if self.where == "after":
            return EMPTY
        draft, graph, host = self.draft, self.draft.graph, self.start or self.host
        if graph.imported is not None:
            if "/" in host:
                return EMPTY
            scopes = draft.scopes.of_host(host)
            scope = scopes[min(index, len(scopes) - 1)]
            pairs = [(a, draft.seen(v, scope, scope)) for a, v in graph.imported.call(scope).inputs]
        else:
            members = graph.containers[host][1] if host in graph.containers else (graph.calls_of(host)[index],)
            reads = dict.fromkeys(v for name in members for v in draft.nodes[name].inputs if v not in members)
            outer = [v for v in reads if not self.inner(host, v) and draft.nodes[v].op not in ("param", "constant")]
            floats = [v for v in outer if (dtype := draft.nodes[v].dtype) is not None and dtype.is_floating_point]
            pairs = [(f"input_{i}" if i else "input", v) for i, v in enumerate(floats)]
        return {argument: _handle(draft, value) for argument, value in pairs}

    def inner(self, group: str, value: str) -> bool:
        """Whether a value comes from inside a group of declared nodes: from a body there."""
        return group in self.draft.graph.containers and self.draft.scopes.is_inside(
            self.draft.nodes[value], group, "after"
        )

    def apply(self, value: str, scope: str, inputs: Mapping[str, Node], apply: Any) -> list[Node]:
        """The nodes that the method makes at the first call."""
        draft, host, source = self.draft, self.host, self.source
        handle, asked = _handle(draft, value), _Readable(draft.graph)
        result = apply(Site(host, handle, asked, inputs, self.where, source))
        if not isinstance(result, Node):
            raise BadSplice(
                f"the method at {host!r} returned {result!r}, not a node",
                node=host,
                source=source,
                hint="end it with return node: a method is a function site -> Node",
            )
        if result.graph is not None:
            raise BadSplice(
                f"the method at {host!r} returned {result.name!r}, which is there already: it added no node",
                node=host,
                source=source,
                hint="return a node made from it: ag.dense(site.output, …)",
            )
        near = {value, *(node.name or "" for node in inputs.values())}
        self.firsts = asked.firsts
        several = len(draft.graph.calls_of(host)) > 1
        if several and (both := self.firsts & (asked.names | near)):
            raise BadSplice(
                f"the body {self.body!r} reads {min(both)!r} as the value of each call and of the first one",
                node=self.body,
                source=source,
                hint="read it by one of its names: with @0 or without",
            )
        new = self.named(result, lambda name: self.seen(name, scope, near))
        if (result.shape, result.dtype) != (handle.shape, handle.dtype):
            raise ShapeMismatch(
                f"body {self.body!r} does not fit its host",
                node=self.body,
                sides=[
                    ("host", host, format_shape(handle.shape), str(handle.dtype)),
                    ("body", new[-1].name or "", format_shape(result.shape), str(result.dtype)),
                ],
                source=source,
                hint=f"end the body with the shape of its host: {format_shape(handle.shape)}",
            )
        return new

    def seen(self, name: str, scope: str, near: set[str]) -> str:
        """What a value that a method asked for is after the bodies that are there."""
        found = name if name in near else self.draft.seen(name, scope, scope)
        self.raw[found] = name
        return found

    def named(self, result: Node, seen: Callable[[str], str]) -> list[Node]:
        """The nodes a method made, named below the body, inputs as names; stops at nodes the graph already has."""
        body, source = self.body, self.source
        order = made(result)
        counts: dict[str, int] = {}
        taken = {node.name for node in order}
        names: dict[int, str] = {}
        done: list[Node] = []
        for node in order:
            if node.op == "input":
                raise BadSplice(
                    f"the body {body!r} reads a new input {node.name!r}",
                    node=body,
                    source=source,
                    hint="declare the input in the graph itself, or make it a constant or a param",
                )
            relative = node.name or unnamed(node.op, counts, taken)
            taken.add(relative)
            names[id(node)] = full = f"{body}.{check_name(relative, node.source)}"
            inputs = tuple(seen(self.settled(i)) if i.graph else names[id(i)] for i in node.inputs)
            done.append(replace(node, name=full, inputs=inputs, body=body))
        return done

    def settled(self, node: Node) -> str:
        """The name of a node that was there before."""
        name, draft = node.name or "", self.draft
        if name not in draft.nodes or is_foreign(draft.graph, node):
            raise BadSplice(
                f"the body {self.body!r} reads {name!r}, which is no node of this graph",
                node=self.body,
                source=self.source,
                hint="read site.output, site.input or site.graph[name]",
            )
        known = draft.nodes[name]
        if draft.graph.imported is None:
            return name
        if known.body is not None and all(name != written for _, written in draft.bodies[known.body].calls):
            raise BadSplice(
                f"the body {self.body!r} reads {name!r}, which is inside the body {known.body!r}",
                node=self.body,
                source=self.source,
                hint=f"read what that body gives: {draft.bodies[known.body].calls[0][1]!r}",
            )
        if known.op == "input" and ":" in name:
            raise BadSplice(
                f"the body {self.body!r} reads {name!r}, which is inside an argument of the model",
                node=self.body,
                source=self.source,
                hint="read a node that reads it",
            )
        return name

    def again(
        self, first: Mapping[str, Node], value: str, scope: str, inputs: Mapping[str, Node], index: int
    ) -> tuple[list[Node], str]:
        """The same body for a further call of its host: the same parameters, other values."""
        read, written = self.calls[0]
        names = {name: f"{name}@{index}" for name in first}
        outside = {i for node in first.values() for i in node.inputs if i not in first}
        for name in outside:
            raw = self.raw.get(name, name)
            names[name] = self.draft.seen(raw if raw in self.firsts else self.twin(raw, index), scope, scope)
        names |= {name: inputs[a].name or "" for a, name in self.given.items() if a in inputs}
        names[read] = value
        copies = [
            replace(node, name=names[name], inputs=tuple(names.get(i, i) for i in node.inputs))
            for name, node in first.items()
        ]
        return copies, names[written]

    def twin(self, name: str, index: int) -> str:
        """The value of the same place in a further call: of what is called as often as the host."""
        graph, path = self.draft.graph, path_of(name)
        node = self.draft.nodes[name]
        if graph.imported is None or (name == path and path not in graph.imported.modules and node.body is None):
            return name
        known = self.draft.bodies[node.body].calls if node.body else graph.imported.modules[path].calls
        other = f"{path}@{index}{name[len(path) :]}" if not node.body else f"{name}@{index}"
        return other if other in self.draft.nodes and len(known) == len(graph.calls_of(self.host)) else name

    def late(self, scope: str, value: str, new: list[Node]) -> None:
        """Notes what the body reads beside its host, and how late in a run it can be there."""
        draft = self.draft
        if draft.graph.imported is None:
            return
        last = draft.scopes.first[scope] - 1 if self.where == "before" else draft.rank[draft.anchor[value]]
        own = {node.name for node in new}
        for name in dict.fromkeys(i for node in new for i in node.inputs if i not in own and i != value):
            draft.reads.append((self.body, name, last))


def _refuse_late(draft: Draft, source: Source | None) -> None:
    """A model runs in its own order, also where a value does not depend on another one."""
    for body, name, last in draft.reads:
        if draft.rank[draft.anchor[name]] > last:
            raise BadSplice(
                f"the body {body!r} reads {name!r}, which runs later in the model's own forward",
                node=body,
                source=source,
                hint="read a node that runs before its host, or splice at a later host",
            )


class _Readable(Graph):
    """A graph as a method reads it, which notes what is asked for by the name of a first call, `x@0`."""

    names: set[str]
    firsts: set[str]

    def __init__(self, graph: Graph) -> None:
        self.__dict__.update(graph.__dict__, _graph=graph, names=set(), firsts=set())

    def __getitem__(self, name: str) -> Node:
        node = super().__getitem__(name)
        (self.firsts if str(name).endswith("@0") else self.names).add(node.name or "")
        return _as_read(node, self._graph)  # type: ignore[attr-defined]


def _handle(draft: Draft, value: str) -> Node:
    """A node of the draft as a method sees it."""
    return _as_read(draft.nodes[value], draft.graph)


def _as_read(node: Node, graph: Graph) -> Node:
    """A node as a method reads it. Bodies on a half-precision host compute in float32 (see `CompiledGraph`)."""
    half = graph.imported is not None and node.dtype in HALF
    return replace(node, graph=graph, dtype=torch.float32 if half else node.dtype)


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


def is_foreign(graph: Graph, node: Node) -> bool:
    """Whether a handle is of another graph, and not of one that this graph was made from."""
    if node.graph is None or node.graph is graph:
        return False
    mine, theirs = graph._nodes.get(node.name or ""), node.graph._nodes.get(node.name or "")
    return mine is None or theirs is None or not mine.same(theirs)
