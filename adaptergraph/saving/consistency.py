"""Whether the tables of a graph from a file agree with one another. Floor 5.

What a part of a file looks like is the business of `exchange`, the order of the nodes that of `Graph.check`. Here is
what a trace or a splice makes true, so that later code may rely on it. Each table is walked once.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..bodies import Body, Splice
from ..errors import GraphError, here, nearest
from ..graph import Graph, prefixes
from ..imported import Call, Imported
from ..layers.initializers import check_initializer
from ..names import body_name, check_name, path_of
from ..node import Node, Param, format_shape
from ..splicing.hosts import refuse
from ..splicing.scopes import Scopes

HINT = "it was changed by hand, or is of another version: write it again"


def check_consistency(graph: Graph) -> None:
    """Whether what the tables of a graph say of one another is true.

    Args:
        graph: one that `graph.check()` has passed.

    Raises:
        GraphError: the first entry that contradicts another one; it is named.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> text = ag.Graph(ag.dense(x, 4, name="fc")).to_json()
    >>> ag.Graph.from_json(text.replace('"trained":{}', '"trained":{"fc.wait":true}'))
    Traceback (most recent call last):
    adaptergraph.errors.GraphError: the graph is not readable: trained: 'fc.wait' is no parameter
    ...
    """
    for node in graph.nodes():
        if graph.imported is None or node.body is not None:
            _check_options(node)
    if graph.imported is not None:
        _Tables(graph, graph.imported).check()
    _Bodies(graph).check()
    for name, trained in graph._overrides.items():
        if name not in graph.params:
            raise _unknown("trained", "parameter", name, graph.params)
        if trained and not graph.params[name].trainable:
            raise wrong(f"trained: {name!r} holds whole numbers ({graph.params[name].dtype})", name)


def wrong(what: str, node: str | None = None, sides: Sequence[Sequence[str]] = (), hint: str = HINT) -> GraphError:
    """The error for a file that contradicts itself."""
    return GraphError(f"the graph is not readable: {what}", node=node, sides=sides, source=here(), hint=hint)


def _unknown(place: str, what: str, name: str, known: Mapping[str, Any]) -> GraphError:
    close = nearest(name, known)
    hint = f"did you mean {close[0]!r}?" if close else HINT
    return wrong(f"{place}: {name!r} is no {what}", name, hint=hint)


# ---------------------------------------------------------------------- options that no op is run with


def _check_options(node: Node) -> None:
    """The options that tell how a node starts or what it stands for: no run on fake tensors shows that they are wrong.

    Raises:
        GraphError: one is none that the layer has, or nothing that it could be.
    """
    name, options = node.name or "", node.options
    if node.op == "param":
        if options.keys() != {"init"}:
            raise wrong(f"the parameter {name!r} has {dict(options)}, not 'init' alone", name)
        if not node.params[""].trainable:
            raise wrong(f"the parameter {name!r} holds whole numbers ({node.dtype})", name)
    if node.op == "input" and options.get("optional") not in (None, True):
        raise wrong(f"the input {name!r} is optional: {options['optional']!r}", name, hint="true, or leave it out")
    if node.op == "optional":
        default = options.get("default")
        if options.keys() != {"default"} or isinstance(default, bool) or not isinstance(default, int | float):
            raise wrong(f"{name!r} has {dict(options)}, not a number as its default", name)
    if node.op == "switch":
        _check_switch(node)
    # they become words of generated code
    strange = [key for key in options if not key.isidentifier() or keyword.iskeyword(key)]
    if strange or (
        node.op == "item" and not (options.keys() == {"index", "part"} and isinstance(options["part"], str))
    ):
        raise wrong(f"{name!r} has the options {', '.join(map(repr, options))}", name)
    for key, value in options.items():
        own = node.params.get("" if key == "init" else key.removesuffix("_init"))
        if not key.endswith("init") or (own is None and not key.endswith("_init")):
            continue
        if own is None:
            raise wrong(f"{name!r} has {key!r}, and no such parameter", name)
        try:
            check_initializer(value, own.shape, repr(key))
        except GraphError as error:
            raise wrong(f"{name!r}: {_first_line(error)}", name, hint=error.hint or HINT) from None


def _first_line(error: GraphError) -> str:
    return str(error).splitlines()[0]


def _check_switch(node: Node) -> None:
    """Each branch is below the name of its task."""
    tasks: Any = node.options.get("tasks")
    named = isinstance(tasks, tuple) and all(isinstance(t, str) and t and "." not in t for t in tasks)
    if not named or node.options.keys() != {"tasks"} or len(set(tasks)) != len(tasks):
        raise wrong(f"the switch {node.name!r} has {dict(node.options)}, not tasks by name", node.name)
    if len(tasks) != len(node.inputs) - 1:
        raise wrong(
            f"the switch {node.name!r} has not as many branches as tasks",
            node.name,
            [("tasks", ", ".join(tasks)), ("branches", ", ".join(node.inputs[1:]))],
        )
    for task, branch in zip(tasks, node.inputs[1:], strict=True):
        if node.body is not None and not branch.startswith(f"{node.body}.{task}."):
            raise wrong(f"the switch {node.name!r}: {branch!r} is no branch of the task {task!r}", node.name)


# ---------------------------------------------------------------------- what is known of a traced model


class _Tables:
    """The tables beside the nodes of an imported graph."""

    def __init__(self, graph: Graph, imported: Imported) -> None:
        self.imported = imported
        self.nodes = graph._nodes
        self.consumers = graph.consumers
        self.calls: dict[str, Call] = {}
        for path, module in imported.modules.items():
            for index, call in enumerate(module.calls):
                self.calls[f"{path}@{index}" if index else path] = call

    def check(self) -> None:
        self.check_modules()
        self.check_tree()
        for scope, call in self.calls.items():
            self.check_call(scope, call)
        self.check_asides()
        self.check_parameters()
        for name, node in self.nodes.items():
            if node.body is None:
                self.check_node(name, node)
        for name in self.imported.scopes:
            if name not in self.nodes or self.nodes[name].body is not None or self.nodes[name].op == "input":
                raise wrong(f"scopes: {name!r} is no node that the model computes", name)
        self.check_example()

    def check_modules(self) -> None:
        """They are a tree of names, and the model itself was called."""
        modules = self.imported.modules
        if "" not in modules or not modules[""].calls:
            raise wrong("modules: the model itself, '', is not there, or has no call")
        if modules[""].cls != self.imported.cls:
            raise wrong(f"modules: the model is a {self.imported.cls}, and '' a {modules[''].cls}")
        for path in modules:
            if path_of(path) != path or path.rpartition(".")[0] not in modules:
                raise wrong(f"modules: {path!r} is in no other module", path)

    def check_tree(self) -> None:
        """Every call was made by another one, and in the end by the model's own."""
        if self.calls[""].caller:
            raise wrong(f"modules: the model's own call was made by {self.calls[''].caller!r}: it is the first")
        done = {""}
        for start in self.calls:
            way: dict[str, None] = {}
            scope = start
            while scope not in done:
                way[scope] = None
                caller = self.calls[scope].caller
                if caller not in self.calls:
                    raise wrong(f"modules: the call {scope!r} was made by {caller!r}, which is no call", scope)
                if caller in way:
                    ring = [*list(way)[list(way).index(caller) :], caller]
                    shown = " ← ".join(ring if len(ring) < 9 else [*ring[:4], "…", *ring[-4:]])
                    raise wrong(
                        f"modules: the call {caller!r} was made by itself: a cycle", caller, [("made by", shown)]
                    )
                scope = caller
            done.update(way)

    def check_call(self, scope: str, call: Call) -> None:
        """What a call was given and gave are nodes of the model."""
        place = f"modules: the call {scope!r}"
        values = [v for _, v in call.inputs] + [node for _, node, _ in call.parts]
        for value in [*values, *([] if call.output is None else [call.output])]:
            if value not in self.nodes or self.nodes[value].body is not None:
                raise wrong(f"{place} speaks of {value!r}, which is no node of the model", value)
        arguments = [argument for argument, _ in call.inputs]
        if len(set(arguments)) != len(arguments) or "" in arguments:
            raise wrong(f"{place} has two arguments of one name, or one without: {', '.join(arguments)}", scope)
        for label, value, path in call.parts:
            if not path or label != ":".join(str(key).lstrip(".") for key in path):
                raise wrong(f"{place}: {label!r} is not the way to {value!r}, which is at {list(path)}", scope)
        ways = [(path, value) for _, value, path in call.parts]
        if call.output is None and call.path:
            raise wrong(f"{place} gives nothing at {list(call.path)}", scope)
        if call.output is not None and (call.path or ways) and (call.path, call.output) not in ways:
            raise wrong(f"{place} gives {call.output!r} at {list(call.path)}, and its parts say otherwise", scope)

    def check_asides(self) -> None:
        """What is kept, or came past a call, is a node of the model; the latter came to a node or to a call.

        What is overwritten is a node of the model too, and what is walked over is a module.
        """
        for path in self.imported.walked:
            if path not in self.imported.modules:
                raise wrong(f"walked: {path!r} is no module", path)
        for kept, scope in self.imported.kept:
            if kept not in self.nodes or self.nodes[kept].body is not None:
                raise wrong(f"kept: {kept!r} is no node of the model", kept)
            if scope and scope not in self.calls:
                raise wrong(f"kept: {scope!r} is no call", scope)
        for value in self.imported.overwritten:
            if value not in self.nodes or self.nodes[value].body is not None:
                raise wrong(f"overwritten: {value!r} is no node of the model", value)
        for aside in self.imported.asides:
            if aside.scope not in self.calls and "/" not in aside.scope:
                raise wrong(f"asides: {aside.scope!r} is no call", aside.scope)
            for name, calls in ((aside.value, {}), (aside.reader, self.calls), (aside.scope, self.calls)):
                node = self.nodes.get(name or "")
                if name is not None and name not in calls and (node is None or node.body is not None):
                    raise wrong(f"asides: {name!r} is no node of the model" + (", nor a call" if calls else ""), name)

    def check_parameters(self) -> None:
        """Each belongs to a module; further names have a first one; who reads them is a node."""
        origin = self.imported
        firsts = {name: name for name in origin.params} | dict(origin.tied)
        parts = {name: name.rpartition(".")[::2] for name in firsts}
        known = {(first, parts[name][1]) for name, first in firsts.items() if parts[name][0] in origin.modules}
        for name, first in firsts.items():
            # a module that has a second name has its parameters there too
            if parts[name][0] not in origin.modules and (name == first or (first, parts[name][1]) not in known):
                raise wrong(f"params: {name!r} belongs to no module", name)
        for name, first in origin.tied.items():
            if first not in origin.params:
                raise _unknown("tied", "parameter", first, origin.params)
            if name in origin.params:
                raise wrong(f"tied: {name!r} is a parameter of its own, and {first!r} by another name", name)
        for name, reader in origin.readers.items():
            if name not in origin.params and name not in origin.tied:
                raise _unknown("readers", "parameter", name, origin.params)
            if reader not in self.nodes or self.nodes[reader].body is not None:
                raise wrong(f"readers: {reader!r}, which reads {name!r}, is no node of the model", name)

    def check_node(self, name: str, node: Node) -> None:
        """Its name, op, shape, parameters and scope say the same."""
        if node.shape is None or node.dtype is None:
            known = node.shape is node.dtype is None and self.gives_nothing(name)
        else:
            known = all(isinstance(d, int) and 0 <= d < 2**63 for d in node.shape)
        if not known:
            raise wrong(f"{name!r} has the shape {format_shape(node.shape)} and dtype {node.dtype}", name)
        if node.op == "input":
            if node.inputs or node.params or name in self.imported.modules:
                raise wrong(f"{name!r} is an input, and not an input alone", name)
            return
        head, colon, _ = name.partition(":")
        if colon and (node.op != "output" or len(node.inputs) != 1 or not name.startswith(f"{node.inputs[0]}:")):
            raise wrong(f"{name!r} is no output of {', '.join(node.inputs) or 'nothing'}", name)
        path = self.module_of(name)
        scope = name.partition("/")[0] if "/" in name else self.calls[head].caller if path else ""
        given = self.imported.scopes.get(name)
        if given != scope or scope not in self.calls:
            raise wrong(
                f"scopes: {name!r} does not run in {given!r}",
                name,
                [("scopes", repr(given)), ("its name says", repr(scope) if scope in self.calls else "no call")],
            )
        if "/" not in name and not colon and node.op != self.imported.modules[path].cls:
            raise wrong(f"{name!r} is a {node.op}, and its module a {self.imported.modules[path].cls}", name)
        for part, param in node.params.items():
            self.check_param(name, f"{path}.{part}" if path else part, param)

    def gives_nothing(self, name: str) -> bool:
        """Whether a node is a call that returns no tensor: only what it wrote or keeps is read of it."""
        call = self.calls.get(name)
        readers = (self.nodes[reader].op for reader in self.consumers[name])
        return call is not None and call.output is None and not call.parts and all(op == "output" for op in readers)

    def module_of(self, name: str) -> str:
        """The module that a node is a call of; a model that calls no module is called by its class."""
        head = name.partition(":")[0]
        if "/" in name:
            return ""
        if path_of(name) == self.imported.cls and head not in self.calls:
            return ""
        if head not in self.calls or not path_of(name):
            raise wrong(f"{name!r} is no call of a module", name)
        return path_of(name)

    def check_param(self, name: str, full: str, param: Param) -> None:
        known = self.imported.params.get(full)
        if known != param:
            sides = [
                (place, "none" if p is None else f"{format_shape(p.shape)}, {p.dtype}")
                for place, p in (("nodes", param), ("params", known))
            ]
            raise wrong(f"{name!r} has the parameter {full!r}, and the model not, or another one", name, sides)

    def check_example(self) -> None:
        """The arguments of the traced call are the inputs of the graph."""
        for name, value in (self.imported.example or {}).items():
            if "shape" not in value:
                continue
            node = self.nodes.get(f"/{name}" if name in self.imported.modules else name)
            if node is None or node.op != "input" or list(node.shape or ()) != value["shape"]:
                raise wrong(
                    f"example: the argument {name!r} is no input of this shape",
                    name,
                    [
                        ("example", format_shape(tuple(value["shape"]))),
                        ("nodes", "none" if node is None else repr(node)),
                    ],
                )


# ---------------------------------------------------------------------- what was added


class _Bodies:
    """The bodies, their nodes, and the splices that they came from."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph._nodes
        self.rank = {name: i for i, name in enumerate(self.nodes)}
        self.members: dict[str, list[Node]] = {name: [] for name in graph.bodies}
        for node in graph.nodes():
            if node.body is not None:
                self.members[node.body].append(node)
        self.made = {written: read for body in graph.bodies.values() for read, written in body.calls}
        self.scopes = Scopes(graph, graph.bodies)

    def check(self) -> None:
        for body in self.graph.bodies.values():
            self.check_body(body)
        spliced = self.check_splices()
        if self.graph.imported is None:
            self.check_declared(spliced)
            return
        for name in self.graph.bodies:
            if name not in spliced:
                raise wrong(f"bodies: {name!r} came from no splice", name)
        origin: dict[str, str] = {}
        for name in self.nodes:
            if name in self.made:
                origin[name] = origin.get(self.made[name], self.made[name])
        for body in self.graph.bodies.values():
            self.check_hosted(body, self.graph.imported, origin)
        self.check_reads()

    def check_body(self, body: Body) -> None:
        """It is one piece: nodes below its name, between a value before it and one of its own."""
        own = self.members[body.name]
        if not body.calls or not own:
            raise wrong(f"bodies: {body.name!r} has no {'nodes' if body.calls else 'calls'}", body.name)
        for node in own:
            if not (node.name or "").startswith(body.name + "."):
                raise wrong(f"the node {node.name!r} is not below its body {body.name!r}", node.name)
        for read, written in body.calls:
            if self.rank[read] > self.rank[written] or self.nodes[read].body == body.name:
                raise wrong(f"bodies: {body.name!r} replaces {read!r}, which is not before it", body.name)
            if self.made[written] != read:
                raise wrong(f"bodies: {body.name!r} gives {written!r} twice", body.name)
        ends = [self.nodes[value] for value in body.calls[0]]
        if ends[0].shape != ends[1].shape:
            raise wrong(
                f"bodies: {body.name!r} replaces a value of another shape",
                body.name,
                [(n.name or "", format_shape(n.shape)) for n in ends],
            )
        for node in own:
            if node.op == "switch" and node.name in self.made:
                self.check_branches(body, node)

    def check_branches(self, body: Body, switch: Node) -> None:
        """Each node of a body that ends in a switch is in one branch, and reads nothing of another one."""
        tasks = switch.options["tasks"]
        for node in self.members[body.name]:
            if node.op == "switch":
                continue
            task = (node.name or "")[len(body.name) + 1 :].partition(".")[0]
            below = f"{body.name}.{task}."
            strange = [i for i in node.inputs if self.nodes[i].body == body.name and not i.startswith(below)]
            if task not in tasks or strange:
                raise wrong(f"the switch {switch.name!r}: {node.name!r} is in no branch, or in several", node.name)

    def check_splices(self) -> dict[str, Splice]:
        """Each splice has its bodies; gives these, and the splice of each."""
        found: dict[str, Splice] = {}
        for splice in self.graph.splices:
            place = f"splices: {splice.name!r}"
            if "." in check_name(splice.name) or not splice.hosts:
                raise wrong(f"{place} has no host" if not splice.hosts else f"{place} is more than one word")
            for host in splice.hosts:
                name = body_name(host, splice.name)
                body = self.graph.bodies.get(name)
                if body is None:
                    raise wrong(f"{place} has the host {host!r}, and there is no body {name!r}", name)
                if (body.host, body.where) != (host, splice.where):
                    raise wrong(
                        f"{place} and the body {name!r} say otherwise where it stands",
                        name,
                        [("splices", splice.where, host), ("bodies", body.where, body.host)],
                    )
                if name in found:
                    raise wrong(f"splices: the body {name!r} came from two splices", name)
                found[name] = splice
        return found

    def check_declared(self, spliced: Mapping[str, Splice]) -> None:
        """Bodies that were written by hand are in no splice; all have a host."""
        hosts = {body.host for body in self.graph.bodies.values() if body.host not in self.nodes}
        if hosts:
            hosts -= {path for name in self.nodes for path in (*prefixes(name), path_of(name))}
        for body in self.graph.bodies.values():
            if body.host in hosts or (body.name not in spliced and body.where != "after"):
                raise wrong(f"bodies: {body.name!r} is {body.where} {body.host!r}, which cannot be", body.name)

    # ------------------------------------------------------------------ in a model

    def check_hosted(self, body: Body, imported: Imported, origin: Mapping[str, str]) -> None:
        """It stands at every call of its host, in the place of what the host gives there or is given."""
        try:
            refuse(self.graph, body.host, body.where, None)
        except GraphError as error:
            raise wrong(f"bodies: {body.name!r}: {_first_line(error)}", body.name, hint=error.hint or HINT) from None
        scopes, values = self.scopes.of_host(body.host), self.graph.calls_of(body.host)
        if len(body.calls) != len(scopes):
            raise wrong(
                f"bodies: {body.name!r} does not stand at every call of {body.host!r}",
                body.name,
                [("calls of the body", str(len(body.calls))), ("of its host", str(len(scopes)))],
            )
        for index, (read, written) in enumerate(body.calls):
            before = [v for _, v in imported.call(scopes[index]).inputs] if body.where == "before" else []
            host = origin.get(read, read)
            if host not in (before if body.where == "before" else [values[index]]):
                raise wrong(
                    f"bodies: {body.name!r} replaces {read!r}, which {body.host!r} "
                    + ("is not given" if body.where == "before" else "does not give"),
                    body.name,
                )
            if written != _called(body.calls[0][1], index):
                raise wrong(f"bodies: {body.name!r} gives {written!r} at call {index} of its host", body.name)
        self.check_copies(body)

    def check_copies(self, body: Body) -> None:
        """At each call of its host a body has the same nodes, called `x`, `x@1`, …, that read the same of it."""
        first = [node for node in self.members[body.name] if "@" not in (node.name or "")]
        own = {node.name for node in first}
        if len(first) * len(body.calls) != len(self.members[body.name]):
            raise wrong(f"bodies: {body.name!r} has not the same nodes at each call of its host", body.name)
        for index, (read, _) in enumerate(body.calls):
            for node in first:
                copy = self.nodes.get(_called(node.name or "", index))
                ways = [_called(i, index) if i in own else read if i == body.calls[0][0] else "" for i in node.inputs]
                if copy is None or copy.body != body.name or len(copy.inputs) != len(ways):
                    raise wrong(f"{node.name!r} has no copy at call {index} of {body.host!r}", node.name)
                for way, value in zip(ways, copy.inputs, strict=True):
                    # what the body gave at another call may have come to this one as its input
                    inside = self.nodes[value].body == body.name and value not in self.made
                    if value != way if way else inside:
                        raise wrong(f"{copy.name!r} does not read what {node.name!r} reads", copy.name)

    def check_reads(self) -> None:
        """From outside only what a body gives is read."""
        for reader, value, own in self.reads():
            node = self.nodes[value]
            if node.body not in (None, own) and value not in self.made:
                raise wrong(f"{reader} {value!r}, which is inside the body {node.body!r}", value)

    def reads(self) -> Iterator[tuple[str, str, str | None]]:
        """Who reads which value, and in which body."""
        for name, node in self.nodes.items():
            for value in node.inputs:
                yield f"{name!r} reads", value, node.body
        for value in self.graph.output_names():
            yield "the graph returns", value, None


def _called(name: str, index: int) -> str:
    """A node of a body at a further call of its host."""
    return f"{name}@{index}" if index else name
