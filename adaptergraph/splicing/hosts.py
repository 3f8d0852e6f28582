"""What can be a host, and why something cannot: with the places that work instead. Floor 1."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..bodies import Body
from ..collect import alive
from ..errors import BadSplice, Source
from ..graph import Graph
from ..imported import Imported
from ..names import path_of
from ..select import Selection, Selector, Span, entries_of, hits, in_graph_order, is_pattern

NO_PLACE = ("input", "output", "param", "constant")


def hosts_of(graph: Graph, at: Selector, where: str, source: Source | None) -> Selection:
    """The hosts of a splice: a name is taken at its word, a pattern or predicate means only what can be a host.

    Raises:
        BadSplice: a body would never run there, or nothing that is selected can have one.
    """
    entries = entries_of(at)
    found = [n for e in entries for n in _places(graph, e.last if isinstance(e, Span) else e, source)]
    selected = in_graph_order(graph, found, "the selector")
    for host in selected:
        refuse(graph, host, where, source)
    return selected


def starts_of(graph: Graph, at: Selector, source: Source | None) -> dict[str, str]:
    """For each host that is the end of a span, the module that the span starts at.

    Raises:
        BadSplice: a span has not as many starts as ends, or starts after its end.
    """
    found: dict[str, str] = {}
    rank = {name: i for i, name in enumerate(graph)}
    for span in (e for e in entries_of(at) if isinstance(e, Span)):
        firsts, lasts = (in_graph_order(graph, _places(graph, e, source), "") for e in (span.first, span.last))
        if len(firsts) != len(lasts):
            raise BadSplice(
                f"{span} has {len(firsts)} starts and {len(lasts)} ends: they are paired in order",
                sides=[("starts", ", ".join(firsts[:6])), ("ends", ", ".join(lasts[:6]))],
                source=source,
                hint="narrow the pattern that selects more",
            )
        for first, last in zip(firsts, lasts, strict=True):
            for host in (first, last):
                refuse(graph, host, "after", source)
            if "/" in first or last.startswith(first + "."):
                what = "an operation, which has no input of its own" if "/" in first else "around its end"
                raise BadSplice(
                    f"the span starts at {first!r}, which is {what}",
                    node=first,
                    source=source,
                    hint="start it at the module whose input the body is to read",
                )
            if rank[graph.calls_of(first)[0]] > rank[graph.calls_of(last)[0]]:
                raise BadSplice(
                    f"the span starts at {first!r}, which runs after its end",
                    node=last,
                    source=source,
                    hint=f"ag.span({last!r}, {first!r})",
                )
            found[last] = first
    return found


def _places(graph: Graph, entry: Any, source: Source | None) -> list[str]:
    """What one entry of a selector means: of a pattern or predicate only what can be a host."""
    names = hits(graph, entry)
    if not callable(entry) and not (isinstance(entry, str) and is_pattern(entry)):
        return names
    hosts = [n for n in names if _is_place(graph, n, entry if isinstance(entry, str) else "")]
    if not hosts:
        raise BadSplice(
            f"{repr(entry) if isinstance(entry, str) else 'the predicate'} selects no place for a body",
            sides=[("selected", n, graph.op_of(n)) for n in names[:6]],
            source=source,
            hint="splice at a layer",
        )
    return hosts


def _is_place(graph: Graph, name: str, wanted: str) -> bool:
    node = graph._nodes.get(name)
    if node is None:
        return True
    if node.op == "output" and ":" in wanted:
        return True
    return (
        node.op not in NO_PLACE and node.body is None and node.shape is not None and ("@" not in name or "@" in wanted)
    )


def refuse(graph: Graph, host: str, where: str, source: Source | None) -> None:
    """Refuses a host at which a body would never run, with the places that work.

    Raises:
        BadSplice: and names the host.
    """
    node = graph._nodes.get(host)
    if node is not None and node.body is not None:
        raise BadSplice(
            f"{host!r} belongs to the body {node.body!r}",
            node=host,
            source=source,
            hint=f"splice at its host: {graph.bodies[node.body].host!r}",
        )
    if where == "before" and ("/" in host or ":" in host):
        raise BadSplice(
            f"a body cannot stand before {host!r}, which is no layer but a value",
            node=host,
            source=source,
            hint=f"splice after it, or before the module around it: {path_of(host)!r}",
        )
    fine = "input" if graph.imported is None else "output"
    if node is not None and node.op in NO_PLACE and node.op != fine:
        raise BadSplice(
            f"{host!r} is of the kind {node.op!r}: a body is added at a layer",
            node=host,
            source=source,
            hint="splice at a layer that reads it" + (", or before it" if node.op == "input" else ""),
        )
    if graph.imported is not None:
        _refuse_imported(graph, host, source)
        _refuse_walked_over(graph.imported, host, source)
    elif node is not None and node.shape is None:
        raise BadSplice(
            f"{host!r} gives no single tensor: a body has nothing to work on",
            node=host,
            source=source,
            hint="splice at a node that reads it",
        )


def _refuse_imported(graph: Graph, host: str, source: Source | None) -> None:
    assert graph.imported is not None
    if "/" in host:
        _refuse_operation(graph, host, source)
        return
    module = graph.imported.modules.get(path_of(host))
    if module is None or not path_of(host):
        raise BadSplice(
            f"{host!r} is the model itself: bodies are added at modules inside it",
            node=host,
            source=source,
            hint="trace it inside another module, nn.Sequential(model), and splice at '0'",
        )
    if graph.imported.values(host) is None:
        raise BadSplice(
            f"{host!r} is computed inside a module without modules: no body can be attached there",
            node=host,
            source=source,
            hint=f"splice at {path_of(host)!r}",
        )
    if not module.calls:
        raise _never_called(graph, host, source)
    values = graph.calls_of(host)
    if not values or not all(call.output for call in module.calls):
        raise BadSplice(
            f"{host!r} ({module.cls}) returns no float tensor: a body has nothing to work on",
            node=host,
            source=source,
            hint="splice at a module or operation that gives floats",
        )
    for value in values:
        dtype = graph._nodes[value].dtype
        if dtype is None or not dtype.is_floating_point:
            raise BadSplice(
                f"{host!r} is no float tensor but {dtype}: a body has nothing to work on",
                node=host,
                source=source,
                hint="splice at a module or operation that gives floats",
            )


def _refuse_walked_over(imported: Imported, host: str, source: Source | None) -> None:
    path = imported.walked_over(path_of(host))
    if path is not None:
        where = f"in {path!r}" if path else "in the model"
        what = f"all that is {where}" if imported.walked[path] else f"the children of {path!r}"
        raise BadSplice(
            f"a forward walks over {what} and computes with what it finds: a body at {host!r} would be a part of it",
            node=host,
            source=source,
            hint="splice somewhere else, or let that forward name the modules and parameters that it means",
        )


def _refuse_operation(graph: Graph, host: str, source: Source | None) -> None:
    assert graph.imported is not None
    node = graph[host]
    around = path_of(host)
    instead = f"splice at the module around it: {around!r}" if around else "splice at a module inside the model"
    if node.op == "output":
        raise BadSplice(
            f"{host!r} is one of several values of an operation: no body can be attached there",
            node=host,
            source=source,
            hint=f"splice at what reads it, or {instead}",
        )
    if any(graph._nodes[r].op == "output" for r in graph.consumers.get(node.name or "", ())):
        raise BadSplice(
            f"{host!r} gives several values, of which none is its own: no body can be attached there",
            node=host,
            source=source,
            hint=f"splice at what reads one of them, or {instead}",
        )
    if node.dtype is None or not node.dtype.is_floating_point:
        raise BadSplice(
            f"{host!r} gives no float tensor but {node.dtype}: a body has nothing to work on",
            node=host,
            source=source,
            hint=instead,
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
        sides=[] if reader else [("traced", "in eval, with the arguments that were given to ag.trace")],
        source=source,
        hint=f"splice at {reader!r}"
        if reader
        else f"narrow the pattern{other}; or trace with arguments that make the model call it",
    )


def refuse_unread(graph: Graph, kept: Iterable[str], bodies: list[str], source: Source | None) -> None:
    """Refuses new bodies of an imported graph of which nothing comes, at no call of their host.

    Args:
        kept: what the model keeps beside its outputs, after the bodies.

    Raises:
        BadSplice: and names the host, and an output of it that is read, or a module before it.
    """
    read, found = unread(graph, kept, bodies)
    if found:
        raise _unread(graph, found[0], read, source)


def unread(graph: Graph, kept: Iterable[str], bodies: Iterable[str]) -> tuple[frozenset[str], list[Body]]:
    """The nodes of an imported graph of which something comes, and those of these bodies of which nothing does."""
    if graph.imported is None:
        return frozenset(), []
    read = alive(graph, kept)
    return read, [graph.bodies[n] for n in bodies if read.isdisjoint(write for _, write in graph.bodies[n].calls)]


def _unread(graph: Graph, body: Body, read: frozenset[str], source: Source | None) -> BadSplice:
    host = body.host
    given, written = "is given" if body.where == "before" else "gives", body.calls[0][1]
    sides: list[tuple[str, ...]] = [("read by", r, "of which nothing comes") for r in graph.consumers[written][:6]]
    others = _read_parts(graph, host, read) if body.where != "before" else []
    sides += [("is read", other, f"by {reader!r}" if reader else "returned by the model") for other, reader in others]
    if graph.imported is not None and body.where != "before":
        values = {value for value, _ in body.calls}
        past = [a for a in graph.imported.asides if path_of(a.scope) == path_of(host) and a.value in values]
        sides += [("past it", repr(a.value), f"is read by {a.reader!r}" if a.reader else "is returned") for a in past]
    hint = _nearest_before(graph, host, read)
    if others:
        other, reader = others[0]
        hint = f"splice at {other!r}, which " + (f"{reader!r} reads" if reader else "the model returns")
    hint += "\nor first splice what reads it, or trace with the arguments that make the model read it (labels, say)"
    return BadSplice(
        f"{host!r} {given} a value that "
        + ("reaches no output" if graph.consumers[written] else "nothing reads")
        + f": a body {'before it' if body.where == 'before' else 'there'} would change nothing",
        node=host,
        sides=sides,
        source=source,
        hint=hint,
    )


def _read_parts(graph: Graph, host: str, read: frozenset[str]) -> list[tuple[str, str]]:
    """The other float outputs of a module of which something comes, and who reads each; `""` for the model's caller."""
    imported, path = graph.imported, path_of(host)
    assert imported is not None
    head, _, label = host[len(path) :].partition(":")
    if "/" in host:
        return []
    found: dict[str, str] = {}
    for index, call in enumerate(imported.modules[path].calls):
        scope = f"{path}@{index}" if index else path
        for part, value, way in call.parts if head in ("", f"@{index}") else ():
            dtype = graph._nodes[value].dtype
            if part == label or (not label and way == call.path) or dtype is None or not dtype.is_floating_point:
                continue
            readers = [r for r in graph.consumers[value] if r in read and graph._nodes[r].op != "output"]
            outside = [r for r in readers if scope not in imported.around(imported.scopes.get(r, ""))]
            if value in graph.output_names() or outside:
                found.setdefault(f"{path}{head}:{part}", outside[0] if outside else "")
    return list(found.items())


def _nearest_before(graph: Graph, host: str, read: frozenset[str]) -> str:
    """What to do where nothing comes of a host: the nearest module before it of whose value something comes."""
    assert graph.imported is not None
    waiting, seen = list(graph.calls_of(host)[:1]), set[str]()
    for name in waiting:
        node = graph._nodes[name]
        if name in read and name in graph.imported.modules and node.dtype and node.dtype.is_floating_point:
            return f"splice at {name!r}, which runs before it and is read, or leave it out of the pattern"
        waiting += [i for i in node.inputs if i not in seen]
        seen.update(node.inputs)
    return "leave it out of the pattern: print(graph.summary()) shows what there is"
