"""What a method is given, and what it may give back: the place of a body, and the values it can read there. Floor 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import BadSplice, Source
from ..graph import Graph
from ..node import Node, format_shape
from .draft import Draft

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", Inputs(self))

    @property
    def input(self) -> Node:
        """The float tensor the host reads; of several the one that has as many dimensions as its output.

        Raises:
            BadSplice: it reads none, or several: use `site.inputs[name]`.
        """
        return main_input(self.name, self.where, self.inputs, self.output, self.source)[1]


class Inputs(dict[str, Node]):
    """What a host reads, by name of argument; another name is an error that lists these."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.inputs)
        self.site = site

    def __missing__(self, name: object) -> Node:
        host, where, source = self.site.name, self.site.where, self.site.source
        if where == "after":
            raise _sees_its_output(host, source)
        raise BadSplice(
            f"the host {host!r} reads no float tensor as {name!r}",
            node=host,
            sides=[(argument, node.name or "", format_shape(node.shape)) for argument, node in self.items()],
            source=source,
            hint=f"one of: {', '.join(self)}" if self else "splice elsewhere: it reads none that a body could see",
        )


def _sees_its_output(host: str, source: Source | None) -> BadSplice:
    return BadSplice(
        f"a body 'after' {host!r} sees its output only",
        node=host,
        source=source,
        hint="graph.splice(…, where='around') gives it the input too",
    )


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
        raise _sees_its_output(host, source)
    raise BadSplice(
        f"the host {host!r} reads {len(inputs)} float tensors, so its input is not one of them",
        node=host,
        sides=[(name, node.name or "", format_shape(node.shape)) for name, node in inputs.items()],
        source=source,
        hint="say which: site.inputs[name]"
        if inputs and where == "around"
        else "splice after an earlier node"
        + ("" if inputs else ": what is in a list or dict, is whole numbers or is overwritten there does not count"),
    )


class Readable(Graph):
    """A graph as a method reads it, which notes what is asked for by the name of a first call, `x@0`."""

    names: set[str]
    firsts: set[str]

    def __init__(self, graph: Graph) -> None:
        self.__dict__.update(graph.__dict__, _graph=graph, names=set(), firsts=set())

    def __getitem__(self, name: str) -> Node:
        node = super().__getitem__(name)
        (self.firsts if str(name).endswith("@0") else self.names).add(node.name or "")
        return _as_read(node, self._graph)  # type: ignore[attr-defined]


def handle_of(draft: Draft, value: str) -> Node:
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
