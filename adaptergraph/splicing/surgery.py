"""Bodies put into a graph and taken out: the table is copied, some consumers repointed, the rest shared. Floor 1."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..bodies import Body, Splice
from ..collect import unnamed
from ..errors import BadSplice, GraphError, ShapeMismatch, Source, here
from ..graph import Graph
from ..names import body_name, check_name, path_of
from ..node import EMPTY, Node, format_shape, reading
from ..select import Selector, Span, entries_of
from .draft import Draft, in_order
from .hosts import hosts_of, refuse_unread, starts_of
from .site import Readable, Site, handle_of, is_foreign, made, main_input

WHERE = ("after", "around", "before")


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
    try:
        inspect.signature(apply).bind(None)
    except TypeError as error:
        hint = "a method is a function of one argument: lambda site: ag.dense(site.output, …)"
        raise BadSplice(f"{method!r} cannot be called with a site: {error}", source=source, hint=hint) from None
    except ValueError:
        # written in C: nobody knows
        pass
    where = _where(at, getattr(method, "where", "after") if where is None else where, source)
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
    refuse_unread(spliced, draft.kept(), [body_name(host, name) for host in hosts], source)
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
    if not isinstance(where, str) or where not in WHERE:
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
        self.firsts: set[str] = set()
        # for each value that is read from outside, what it is read as: the host's value, an argument, or by its name
        self.roles: dict[str, dict[tuple[str, str], None]] = {}

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
            return self.argued(self.argument, scope, inputs)
        self.argument, node = main_input(self.host, self.where, inputs, result, self.source)
        return node.name or ""

    def argued(self, argument: str, scope: str, inputs: Mapping[str, Node]) -> str:
        """The value of an argument at a further call."""
        if argument not in inputs:
            raise BadSplice(
                f"the body {self.body!r} reads the argument {argument!r} of each call of {self.start or self.host!r}, "
                f"and {scope!r} is not given it",
                node=self.body,
                sides=[(scope, name, node.name or "") for name, node in inputs.items()],
                source=self.source,
                hint=f"splice at the calls that have it, such as {path_of(self.host) + '@0'!r}",
            )
        return inputs[argument].name or ""

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
            calls = draft.scopes.of_host(host)
            members = graph.containers[host][1] if host in graph.containers else (calls[min(index, len(calls) - 1)],)
            reads = dict.fromkeys(self.outer(host, v) for name in members for v in draft.nodes[name].inputs)
            inner = {v for v in reads if v in members or self.is_inner(host, v)}
            outer = [v for v in reads if v not in inner and draft.nodes[v].op not in ("param", "constant")]
            floats = [v for v in outer if (dtype := draft.nodes[v].dtype) is not None and dtype.is_floating_point]
            pairs = [(f"input_{i}" if i else "input", v) for i, v in enumerate(floats)]
        return {argument: handle_of(draft, value) for argument, value in pairs}

    def is_inner(self, group: str, value: str) -> bool:
        """Whether a value comes from inside a group of declared nodes: from a body there."""
        return group in self.draft.graph.containers and self.draft.scopes.is_inside(
            self.draft.nodes[value], group, "after"
        )

    def outer(self, group: str, value: str) -> str:
        """What a value is before the bodies inside a group of declared nodes."""
        draft = self.draft
        while self.is_inner(group, value) and (body := draft.nodes[value].body):
            before = [read for read, written in draft.bodies[body].calls if written == value]
            if not before:
                break
            value = before[0]
        return value

    def apply(self, value: str, scope: str, inputs: Mapping[str, Node], apply: Any) -> list[Node]:
        """The nodes that the method makes at the first call."""
        draft, host, source = self.draft, self.host, self.source
        handle, asked = handle_of(draft, value), Readable(draft.graph)
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
        handles = {id(handle): ("value", ""), **{id(node): ("argument", a) for a, node in inputs.items()}}
        new = self.named(result, lambda node: self.read(node, handles, scope, near))
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
        # who reads it takes it for what the host gave
        new[-1] = replace(new[-1], axis=handle.axis)
        return new

    def read(self, node: Node, handles: Mapping[int, tuple[str, str]], scope: str, near: set[str]) -> str:
        """The name of a value that the body reads; what it reads it as is noted."""
        raw = self.settled(node)
        found = self.seen(raw, scope, near)
        self.roles.setdefault(found, {})[handles.get(id(node), ("name", raw))] = None
        return found

    def seen(self, name: str, scope: str, near: set[str]) -> str:
        """What a value that a method asked for is after the bodies that are there."""
        return name if name in near else self.draft.seen(name, scope, scope)

    def named(self, result: Node, read: Callable[[Node], str]) -> list[Node]:
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
            inputs = tuple(read(i) if i.graph else names[id(i)] for i in node.inputs)
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
        names |= {name: self.further(name, value, scope, inputs, index) for name in self.roles}
        was = {name: handle_of(self.draft, name) for name in self.roles}
        now = {name: handle_of(self.draft, names[name]) for name in self.roles}
        host = handle_of(self.draft, read), handle_of(self.draft, value)
        try:
            copies = _copied(first, was, now, names)
            if not _alike(copies[written], host[1]):
                raise ShapeMismatch(f"the body gives {format_shape(copies[written].shape)} there")
            if not _keeps_layout(first, was, now, names, read):
                raise ShapeMismatch("the features are in another dimension there, or it is not known in which")
        except ShapeMismatch as error:
            raise self.unlike(*host, scope, index, error) from error.__cause__
        copies[written] = replace(copies[written], axis=host[1].axis)
        nodes = [replace(n, inputs=tuple(i.name or "" for i in n.inputs)) for n in copies.values()]
        return nodes, names[written]

    def further(self, name: str, value: str, scope: str, inputs: Mapping[str, Node], index: int) -> str:
        """What the body reads at a further call in place of a value that it reads at the first one."""
        near = {value, *(node.name or "" for node in inputs.values())}
        found: dict[str, str] = {}
        for role, part in self.roles[name]:
            if role == "name":
                part = part if part in self.firsts else self.twin(part, index)
                found[self.seen(part, scope, near)] = "by its name"
            else:
                as_argument = role == "argument"
                now = self.argued(part, scope, inputs) if as_argument else value
                found[now] = f"as the argument {part!r}" if as_argument else f"as the value of {self.host!r}"
        if len(found) > 1:
            raise BadSplice(
                f"the body {self.body!r} reads {name!r} in two ways, which are two values at the call {scope!r}",
                node=self.body,
                sides=[(way, other) for other, way in found.items()],
                source=self.source,
                hint="read it in one way, or splice at one call: " + repr(path_of(self.host) + "@0"),
            )
        return next(iter(found))

    def unlike(self, was: Node, now: Node, scope: str, index: int, error: ShapeMismatch) -> ShapeMismatch:
        """The error for a body that fits its host at the first call and not at a further one."""
        host, path, imported = self.host, path_of(self.host), self.draft.graph.imported is not None
        scopes = [self.draft.scopes.of_host(host)[0], scope] if imported else ["", f"@{index}"]
        calls = [f"{path}@{s.partition('@')[2] or 0}{host[len(path) :]}" for s in scopes]
        shown = [(call, format_shape(n.shape), str(n.dtype)) for call, n in zip(calls, (was, now), strict=True)]
        return ShapeMismatch(
            f"body {self.body!r} does not fit each call of its host",
            node=self.body,
            sides=[("fits", *shown[0]), ("does not", *shown[1]), ("because", str(error).splitlines()[0])],
            source=self.source,
            hint=f"splice at one call, or at each a body of its own: {calls[0]!r}, {calls[1]!r}",
        )

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


def _alike(one: Node, other: Node) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _copied(
    first: Mapping[str, Node], was: Mapping[str, Node], now: Mapping[str, Node], names: Mapping[str, str]
) -> dict[str, Node]:
    """The nodes of a body once more, called `names`, reading what is there `now` instead of what there `was`."""
    copies: dict[str, Node] = {}
    for name, node in first.items():
        before = [first.get(i) or was[i] for i in node.inputs]
        inputs = [copies.get(i) or now[i] for i in node.inputs]
        same = all(_alike(a, b) and a.axis == b.axis for a, b in zip(before, inputs, strict=True))
        copy = node if same else reading(node, inputs)
        copies[name] = replace(copy, name=names[name], inputs=tuple(inputs))
    return copies


def _keeps_layout(
    first: Mapping[str, Node], was: Mapping[str, Node], now: Mapping[str, Node], names: Mapping[str, str], host: str
) -> bool:
    """Whether a body follows the features of its host to where they are now, or does the same wherever they are."""
    if host not in was or was[host].axis is None or all(now[n].axis == was[n].axis for n in was):
        return True
    layouts = {name: replace(node, axis=_elsewhere(was[name], node)) for name, node in now.items()}
    *_, written = _copied(first, was, layouts, names).values()
    return written.axis == layouts[host].axis


def _elsewhere(was: Node, now: Node) -> int | None:
    """The dimension of a value's features; where it is not known, another one than there was."""
    if now.axis is not None or was.axis is None:
        return now.axis
    return next((axis for axis in range(-len(now.shape or ()), 0) if axis != was.axis), was.axis)


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
