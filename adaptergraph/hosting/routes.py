"""Where the values of an imported graph can be seen while its model runs, and so what each module does for bodies.

Floor 4. Plain data from plain data: the graph says which value replaces which and who reads what; the result says for
each call of each module what is done with its arguments, at operations of its forward, and with its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from torch import nn

from ..bodies import Body
from ..errors import BadSplice, here
from ..graph import Graph, leaves
from ..imported import Path
from ..names import path_of
from ..node import Node
from ..splicing.draft import Draft
from .frames import Key
from .steps import Argument, Step, Visit


@dataclass(frozen=True, slots=True)
class Spot:
    """A place where a value can be seen: among the arguments of a call, in its output, or at an operation inside it.

    Attributes:
        scope: the call, as `path` or `path@1`.
        kind: where of it.
        at: the argument's name, the way to the tensor in the output, or the operation's node.
    """

    scope: str
    kind: Literal["entry", "inside", "exit"]
    at: str | Path


@dataclass(slots=True)
class Act:
    """A step while it is planned: values of the frame are still names."""

    spot: Spot
    child: str | None = None
    owner: str | None = None
    reads: tuple[Argument | str, ...] = ()
    fill: str | None = None
    gives: str | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """What one module does.

    Attributes:
        visits: see `hosted.Plan`.
        counter: where its calls are counted.
        framed: whether it reads or writes frames.
        opens: whether a frame is open while it runs.
        operations: the operations of its forward at which it stops, by name, and their numbers.
    """

    visits: tuple[Visit, ...] = (Visit(),)
    counter: Key | None = None
    framed: bool = False
    opens: bool = False
    operations: Mapping[str, int] = field(default_factory=dict)


def routes_of(graph: Graph, model: nn.Module) -> dict[str, Route]:
    """For each module that has something to do beside its own forward, by its path, what that is.

    Raises:
        BadSplice: a value that a body reads cannot be reached.
    """
    return _Routes(graph, model).routes()


class _Routes:
    def __init__(self, graph: Graph, model: nn.Module) -> None:
        assert graph.imported is not None
        self.graph = graph
        self.imported = graph.imported
        self.model = model
        self.draft = Draft(graph)
        self.scopes = self.draft.scopes
        self.bodies = [(b, i) for b in graph.bodies.values() for i in range(len(b.calls))]
        self.body_of = {b.calls[i][1]: (b, i) for b, i in self.bodies}
        self.acts: dict[str, list[Act]] = {}
        self.wanted: dict[str, set[str]] = {}
        self.kept: dict[str, str] = {}

    # ------------------------------------------------------------------ what there is

    @cached_property
    def origin(self) -> Mapping[str, str]:
        """For each value that a body made, the host's value that it stands for."""
        found: dict[str, str] = {}
        for body, index in self.bodies:
            read, written = body.calls[index]
            while read in self.body_of:
                read = self.body_of[read][0].calls[self.body_of[read][1]][0]
            found[written] = read
        return found

    @cached_property
    def readers(self) -> Mapping[str, list[str]]:
        """For each host's value the host nodes that read it, or what stands for it."""
        found: dict[str, list[str]] = {}
        for node in self.graph.nodes():
            if node.body is None:
                for value in node.inputs:
                    found.setdefault(self.origin.get(value, value), []).append(node.name or "")
        return found

    @cached_property
    def overwritten(self) -> set[str]:
        """What the model writes over at some call, called as in the first one."""
        return {_uncalled(value) for value in self.imported.overwritten}

    def is_overwritten(self, value: str) -> bool:
        """Whether the model writes over a value, or over what a body made in the place of it."""
        return _uncalled(self.origin.get(value, value)) in self.overwritten

    @cached_property
    def taken(self) -> Mapping[str, list[tuple[str, str]]]:
        """For each host's value the calls that have it among their arguments, in the order they run."""
        found: dict[str, list[tuple[str, str]]] = {}
        for path, module in self.imported.modules.items():
            for index, call in enumerate(module.calls):
                for argument, value in call.inputs:
                    found.setdefault(value, []).append((f"{path}@{index}" if index else path, argument))
        first = self.scopes.first
        for calls in found.values():
            calls.sort(key=lambda c: (first.get(c[0], 0), c[0].count(".")))
        return found

    @cached_property
    def carries(self) -> set[str]:
        """The nodes through which gradients go to something trained."""
        trained = {n for n, t in self.graph.trained.items() if t}
        read: dict[str, bool] = {}
        for param, reader in self.imported.readers.items():
            read[reader] = read.get(reader, False) or param in trained
        found: set[str] = set()
        tied = self.imported.tied
        for node in self.graph.nodes():
            name = node.name or ""
            own = any(tied.get(p, p) in trained for p in node.param_names()) or read.get(name, False)
            if own or any(i in found for i in node.inputs):
                found.add(name)
        return found

    # ------------------------------------------------------------------ where a body stands

    def spots(self, body: Body, index: int) -> list[Spot]:
        """Where a body runs, and further arguments that take its result."""
        scope = self.scopes.of_body(body, index)
        read = self.origin[body.calls[index][1]]
        if body.where == "before":
            argument = next(a for a, v in self.imported.call(scope).inputs if v == read)
            return [Spot(scope, "entry", argument)]
        if "/" in body.host:
            return self.at_operation(read)
        label = body.host.partition(":")[2]
        call = self.imported.call(scope)
        if label:
            return [Spot(scope, "exit", next(p for own, _, p in call.parts if own == label))]
        # a value that is returned in several places is replaced in all of them
        further = [p for _, node, p in call.parts if node == call.output and p != call.path]
        return [Spot(scope, "exit", p) for p in (call.path, *further)]

    def at_operation(self, value: str) -> list[Spot]:
        """Where an operation's value can be replaced for all that read it."""
        scope = self.imported.scopes[value]
        inside = [r for r in self.readers.get(value, ()) if self.scopes.within(self.home(r), scope)]
        ways = self.returned(value, scope)
        if not inside and len(ways) == 1 and not self.imported.past(scope, "exit", value):
            return [Spot(scope, "exit", ways[0])]
        given = [self.child_of(r, scope, value) for r in inside]
        whole = len(inside) == len(self.readers.get(value, ()))
        whole = whole and not any(g and self.imported.past(g[0], "entry", value) for g in given)
        returned = any(self.origin.get(o, o) == value for o in leaves(self.graph.outputs))
        if not ways and inside and whole and not returned and all(given):
            order = dict.fromkeys(g for g in given if g is not None)
            first = self.scopes.first
            return [Spot(s, "entry", a) for s, a in sorted(order, key=lambda g: first.get(g[0], 0))]
        return [Spot(scope, "inside", value)]

    def home(self, name: str) -> str:
        return self.scopes.home(self.graph._nodes[name])

    def returned(self, value: str, scope: str) -> list[Path]:
        """The ways to a value in what a call returns."""
        if not scope:
            # what the model itself returns may be handed on in many ways; it is reached inside
            return []
        call = self.imported.call(scope)
        found = [p for _, node, p in call.parts if node == value]
        return found or ([call.path] if call.output == value else [])

    def child_of(self, reader: str, scope: str, value: str) -> tuple[str, str] | None:
        """The call made by this one in which a reader runs, and the argument by which it is given the value."""
        below = ""
        for above in self.imported.around(self.home(reader)):
            if above == scope:
                break
            below = above
        if not below:
            return None
        arguments = [a for a, v in self.imported.call(below).inputs if v == value]
        return (below, arguments[0]) if len(arguments) == 1 else None

    # ------------------------------------------------------------------ the steps

    def routes(self) -> dict[str, Route]:
        self.plan_bodies()
        self.plan_reads()
        openers = self.openers()
        names = {path_of(scope) for scope in self.acts} | set(openers)
        return {path: self.route(path, openers) for path in names}

    def add(self, act: Act, first: bool = False) -> None:
        acts = self.acts.setdefault(act.spot.scope, [])
        acts.insert(0, act) if first else acts.append(act)

    def plan_bodies(self) -> None:
        """Bodies at operations first: at an argument or output they come before those of the module itself."""
        for operation in (True, False):
            for body, index in self.bodies:
                if ("/" in body.host) == operation:
                    self.plan_body(body, index)

    def plan_body(self, body: Body, index: int) -> None:
        written = body.calls[index][1]
        spot, *more = self.spots(body, index)
        owner = path_of(body.host)
        reads = tuple(self.argument(spot, v) or self.from_frame(v, spot.scope) for v in self.outside(body, index))
        own = owner if owner != path_of(spot.scope) else None
        self.add(Act(spot, body.child, own, reads, gives=written))
        for other in more:
            self.add(Act(other, fill=self.from_frame(written, other.scope)))

    def outside(self, body: Body, index: int) -> list[str]:
        """What a body reads from outside beside the value it replaces, in the order its module takes it."""
        read = body.calls[0][0]
        nodes = self.nodes_of[body.name]
        own = {n.name for n in nodes}
        where = {v: (n.name, i) for n in nodes for i, v in enumerate(n.inputs) if v not in own and v != read}
        order = dict.fromkeys(v for n in nodes for v in n.inputs if v in where)
        call = f"@{index}" if index else ""
        return [self.graph._nodes[f"{where[v][0]}{call}"].inputs[where[v][1]] for v in order]

    @cached_property
    def nodes_of(self) -> Mapping[str, list[Node]]:
        """The nodes of each body at the first call of its host."""
        found: dict[str, list[Node]] = {}
        for node in self.graph.nodes():
            if node.body is not None and "@" not in (node.name or ""):
                found.setdefault(node.body, []).append(node)
        return found

    def argument(self, spot: Spot, value: str) -> Argument | None:
        """The argument of a host by which it is given a value itself; None too if it may hold another one by then."""
        if spot.kind == "inside":
            return None
        for name, raw in self.imported.call(spot.scope).inputs:
            if self.draft.seen(raw, spot.scope, spot.scope) == value and not self.is_overwritten(value):
                return self.placed(spot.scope, name)
        return None

    def placed(self, scope: str, name: str) -> Argument:
        parameters = inspect.signature(self.model.get_submodule(path_of(scope)).forward).parameters
        return Argument(_position(parameters, name), name)

    def from_frame(self, value: str, reader: str) -> str:
        """Notes that a value of the frame is read in a call."""
        self.wanted.setdefault(value, set()).add(reader)
        return value

    def plan_reads(self) -> None:
        """Each value that is read from the frame is noted where it can be seen."""
        for value in list(self.wanted):
            made = self.body_of.get(value)
            if made is None:
                spot = self.seen_at(value)
                self.add(Act(spot, gives=value), first=True)
            else:
                spot = self.spots(*made)[0]
            self.kept[value] = spot.scope

    def seen_at(self, value: str) -> Spot:
        """Where a host's own value can be seen, before any body changed it."""
        node = self.graph._nodes[value]
        for taker, argument in self.taken.get(value, ()):
            caller = self.imported.call(taker).caller
            if self.wanted[value] == {taker} and self.draft.seen(value, caller, taker) == value:
                return Spot(taker, "entry", argument)
        if node.op == "input":
            return Spot("", "entry", value.removeprefix("/"))
        if "/" not in value:
            scope, _, label = value.partition(":")
            call = self.imported.call(scope)
            path = call.path if call.output and not label else None
            path = next((p for own, _, p in call.parts if own == label), path)
            if path is None:
                raise BadSplice(
                    f"{value!r} is computed inside a module without modules, where it cannot be read",
                    node=value,
                    source=here(),
                    hint="read what that module gives",
                )
            return Spot(scope, "exit", path)
        scope = self.imported.scopes[value]
        ways = self.returned(value, scope)
        if ways:
            return Spot(scope, "exit", ways[0])
        latest = min(self.scopes.first.get(r, 0) for r in self.wanted[value])
        for taker, argument in self.taken.get(value, ()):
            outside = self.imported.call(taker).caller
            if self.scopes.first.get(taker, 0) <= latest and self.draft.seen(value, outside, taker) == value:
                return Spot(taker, "entry", argument)
        if node.op == "output":
            raise BadSplice(
                f"{value!r} is one of several values of an operation, which cannot be read from elsewhere",
                node=value,
                source=here(),
                hint="read a node that reads it",
            )
        return Spot(scope, "inside", value)

    # ------------------------------------------------------------------ frames

    def common(self, scopes: set[str]) -> str:
        """The innermost call in which all these calls are made, or which they are."""
        first, *others = [list(self.imported.around(s)) for s in scopes]
        shared = set(first).intersection(*map(set, others))
        return next(s for s in first if s in shared)

    @cached_property
    def owners(self) -> Mapping[str, str]:
        """For each value of the frame the call whose frame it is in."""
        return {value: self.common({self.kept[value], *readers}) for value, readers in self.wanted.items()}

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """What tells the values of one frame apart: without the number of the call, if that is enough."""
        groups: dict[tuple[str, str], list[str]] = {}
        for value, scope in self.owners.items():
            groups.setdefault((scope, _uncalled(value)), []).append(value)
        return {v: short if len(same) == 1 else v for (_, short), same in groups.items() for v in same}

    def openers(self) -> dict[str, dict[str, int]]:
        """The modules that open a frame, and the number of each value in it; the calls of a module share numbers."""
        found: dict[str, dict[str, int]] = {}
        for value, scope in self.owners.items():
            numbers = found.setdefault(path_of(scope), {})
            numbers.setdefault(self.labels[value], len(numbers))
        for path in {path_of(s) for s in self.acts}:
            calls = self.calls(path)
            if len(calls) > 1 and len({self.shape(s) for s in calls}) > 1:
                numbers = found.setdefault(path_of(self.common(set(calls))), {})
                numbers["@" + path] = len(numbers)
        return found

    def calls(self, path: str) -> list[str]:
        return [f"{path}@{i}" if i else path for i in range(len(self.imported.modules[path].calls))]

    def shape(self, scope: str) -> Any:
        """What tells the calls of one module apart: what is done in them, with values called as in the first call."""

        def rename(value: str | None) -> Any:
            return value and (self.labels[value], path_of(self.owners[value]), value in self.carries)

        return tuple(
            (
                replace(a.spot, scope="", at=_uncalled(a.spot.at) if isinstance(a.spot.at, str) else a.spot.at),
                a.child,
                a.owner,
                tuple(r if isinstance(r, Argument) else rename(r) for r in a.reads),
                rename(a.fill),
                rename(a.gives) if a.gives in self.wanted else None,
            )
            for a in self.acts.get(scope, ())
        )

    def key(self, value: str, scope: str, openers: Mapping[str, Mapping[str, int]]) -> Key:
        """A value of the frame as a step in this call finds it."""
        owner = self.owners[value]
        number = openers[path_of(owner)][self.labels[value]]
        return Key(self.hops(scope, owner, openers), number, value, value in self.carries)

    def hops(self, scope: str, owner: str, openers: Mapping[str, Any]) -> int:
        frames = [s for s in self.imported.around(scope) if path_of(s) in openers]
        return frames.index(owner)

    def route(self, path: str, openers: Mapping[str, Mapping[str, int]]) -> Route:
        calls = self.calls(path)
        operations: dict[str, int] = {}
        for scope in calls:
            for act in self.acts.get(scope, ()):
                if act.spot.kind == "inside":
                    operations.setdefault(str(act.spot.at).partition("/")[2], len(operations))
        same = len({self.shape(s) for s in calls}) <= 1
        visits = tuple(self.visit(s, operations, openers) for s in (calls[:1] if same else calls))
        counter = None
        if not same:
            owner = self.common(set(calls))
            number = openers[path_of(owner)]["@" + path]
            counter = Key(self.hops(calls[0], owner, openers), number, path)
        framed = counter is not None or path in openers or any(s.framed for v in visits for s in v.steps())
        return Route(visits, counter, framed, path in openers, operations)

    def visit(self, scope: str, operations: Mapping[str, int], openers: Mapping[str, Mapping[str, int]]) -> Visit:
        entry: list[Step] = []
        inside: list[list[Step]] = [[] for _ in operations]
        exits: list[Step] = []
        for act in self.acts.get(scope, ()):
            step = Step(
                at=self.placed(scope, act.spot.at) if act.spot.kind == "entry" else act.spot.at,  # type: ignore[arg-type]
                fill=None if act.fill is None else self.key(act.fill, scope, openers),
                child=act.child,
                reads=tuple(r if isinstance(r, Argument) else self.key(r, scope, openers) for r in act.reads),
                keep=self.key(act.gives, scope, openers) if act.gives in self.wanted else None,
                copied=act.gives in self.wanted and self.is_overwritten(act.gives),
                owner=None if act.owner is None else self.model.get_submodule(act.owner),
            )
            if act.spot.kind == "entry":
                entry.append(step)
            elif act.spot.kind == "exit":
                exits.append(step)
            else:
                inside[operations[str(act.spot.at).partition("/")[2]]].append(replace(step, at=()))
        return Visit(tuple(entry), tuple(map(tuple, inside)), tuple(exits))


def _uncalled(value: str) -> str:
    """A value as it is called in the first call of its module."""
    head, at, rest = value.partition("@")
    return head + rest.lstrip("0123456789") if at else value


def _position(parameters: Mapping[str, inspect.Parameter], argument: str) -> int | None:
    for index, (name, parameter) in enumerate(parameters.items()):
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            return None
        if name == argument:
            return index
        if parameter.kind is parameter.VAR_POSITIONAL and argument.removeprefix(f"{name}_").isdigit():
            return index + int(argument.removeprefix(f"{name}_"))
    return None
