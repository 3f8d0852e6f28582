"""Which calls a host stands for, and what runs inside which call. Floor 1.

A call of an imported module is written `path` or `path@1`; `""` is the model's own. In a declared graph the name of a
node or group takes the place of the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from ..bodies import Body
from ..graph import Graph
from ..names import body_name, path_of
from ..node import Node
from .hosts import starts_of


class Scopes:
    """Where the hosts, bodies and nodes of one graph run."""

    def __init__(self, graph: Graph, bodies: Mapping[str, Body]) -> None:
        self.graph = graph
        self.imported = graph.imported
        self.bodies = bodies
        self.known: dict[str, tuple[str, ...]] = {}

    def of_host(self, host: str) -> tuple[str, ...]:
        """The calls of a host, in the order of `graph.calls_of`; an operation stands in the call that runs it."""
        if host not in self.known:
            self.known[host] = self._of_host(host)
        return self.known[host]

    def _of_host(self, host: str) -> tuple[str, ...]:
        if self.imported is None:
            return (host,) if host in self.graph.containers else self.graph.calls_of(host)
        if "/" in host:
            return tuple(self.imported.scopes[value] for value in self.graph.calls_of(host))
        path, (call, _, label) = path_of(host), host[len(path_of(host)) :].partition(":")
        calls = self.imported.modules[path].calls
        numbers = [int(call[1:])] if call else range(len(calls))
        given = [i for i in numbers if (any(p[0] == label for p in calls[i].parts) if label else calls[i].output)]
        return tuple(f"{path}@{i}" if i else path for i in given)

    def of_body(self, body: Body, index: int) -> str:
        """The call at which the index-th copy of a body runs."""
        scopes = self.of_host(body.host)
        # one body that a user wrote over several nodes is at the first of them
        return scopes[min(index, len(scopes) - 1)]

    def of_body_node(self, node: Node) -> str:
        """The call at which the body runs that a node belongs to."""
        return self.of_body(self.bodies[node.body or ""], int((node.name or "").partition("@")[2] or 0))

    def home(self, node: Node) -> str:
        """The call that a host node is, or in which an operation or input of the model stands."""
        name = node.name or ""
        if self.imported is None or node.op == "input":
            return name if self.imported is None else ""
        return self.imported.scopes.get(name, "") if "/" in name else name.partition(":")[0]

    def within(self, scope: str, outer: str) -> bool:
        """Whether a call is this one, or is made while it runs."""
        if self.imported is None:
            return (scope + ".").startswith(outer + ".")
        return any(above == outer for above in self.imported.around(scope))

    @cached_property
    def starts(self) -> dict[str, str]:
        """For each body over a span the module that the span starts at."""
        return {
            body_name(last, splice.name): first
            for splice in self.graph.splices
            for last, first in starts_of(self.graph, splice.at, None).items()
        }

    @cached_property
    def first(self) -> dict[str, int]:
        """For each call the rank of the first node that runs in it."""
        found: dict[str, int] = {}
        for rank, node in enumerate(self.graph.nodes()):
            if self.imported is None or node.body is not None or node.op == "input":
                continue
            for scope in self.imported.around(self.home(node)):
                if scope in found:
                    break
                found[scope] = rank
        return found

    def is_passed_by(self, body: Body, index: int, value: str, reader: str) -> bool:
        """Whether a host's value came to a call that is given or returns it past the place of this body."""
        if self.imported is None or "/" in body.host or not self.imported.asides:
            return False
        at = "entry" if body.where == "before" else "exit"
        return any(a.reader == reader for a in self.imported.past(self.of_body(body, index), at, value))

    # ------------------------------------------------------------------ what is inside a host

    def replaces_at(self, body: Body, index: int, view: str) -> bool:
        """Whether the value that a body replaces is replaced for those who look from inside this call."""
        declared = self.imported is None and body.host not in self.graph.containers
        if "/" in body.host or (declared and body.where != "before"):
            return True
        inside = self.within(view, self.of_body(body, index))
        return inside if body.where == "before" else not inside

    def is_inside(self, reader: Node, scope: str, where: str) -> bool:
        """Whether a reader of a value stands inside a host, at which the value is replaced for others or only there."""
        if reader.op == "output":
            # one of several values of an operation or module stays what it is
            return where != "before"
        if reader.body is None:
            if self.imported is None and scope in self.graph:
                return where == "before" and reader.name == scope
            return self.within(self.home(reader), scope)
        start = self.starts.get(reader.body)
        if start is not None and where == "before":
            # the body of a span reads what its start is given
            starts, index = self.of_host(start), int((reader.name or "").partition("@")[2] or 0)
            return self.within(starts[min(index, len(starts) - 1)], scope)
        own = self.of_body_node(reader)
        # a body runs when its host does, around it: one at the same host sees the input that its host sees
        same = where == "before" or "/" in self.bodies[reader.body].host
        return self.within(own, scope) and (own != scope or same)
