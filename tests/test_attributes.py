"""Values that go from module to module on attributes: a body is read there as the graph says, or refused by name.

Each model is compiled with large random bodies and compared with its graph, evaluated here edge by edge: what a node
reads is what the graph says that it reads, and nothing else.
"""

import operator
from functools import reduce

import pytest
import torch
from byhand import randomise
from torch import Tensor, nn

import adaptergraph as ag

METHOD = ag.Bottleneck(3)


def linear():
    return nn.Linear(6, 6)


class Keeping(nn.Module):
    """A leaf that keeps what it returns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        self.saved = x @ self.weight
        return self.saved


class Inner(nn.Module):
    """The same with a child."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x):
        self.saved = self.fc(x)
        return self.saved


class Summing(Inner):
    """Keeps an operation's value."""

    def forward(self, x):
        self.saved = self.fc(x) + x
        return self.saved


class InList(Inner):
    def forward(self, x):
        self.saved = [self.fc(x)]
        return self.saved[0]


class GivesItsList(Inner):
    """Returns the very list that it keeps."""

    def forward(self, x):
        self.saved = [self.fc(x)]
        return self.saved


class GivesItsDict(Inner):
    def forward(self, x):
        self.saved = {"h": self.fc(x)}
        return self.saved


class Ctx(nn.Module):
    """Reads what somebody put on it."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x):
        return self.fc(x) * self.ctx


class CtxLeaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * self.weight + self.ctx


class Parent(nn.Module):
    """Its modules, and a last layer, so that what is read is not what is returned."""

    def __init__(self, **modules):
        super().__init__()
        torch.manual_seed(0)
        for name, make in modules.items():
            self.add_module(name, make())
        self.last = linear()

    def forward(self, x):
        return self.last(self.run(x))


class PutsOnTheChild(Parent):
    """The brief of it all: a value handed over as an attribute, after the call that made it."""

    def run(self, x):
        h = self.up(x)
        self.child.ctx = h
        return self.child(x)


class PutsOnTheChildWhatItGives(PutsOnTheChild):
    def run(self, x):
        h = self.up(x)
        self.child.ctx = h
        return self.child(h)


class PutsInput(Parent):
    def run(self, x):
        self.child.ctx = x
        return self.up(self.child(x))


class ReadsTheOther(Parent):
    def run(self, x):
        h = self.up(x)
        saved = self.up.saved
        saved = saved["h"] if isinstance(saved, dict) else saved[0] if isinstance(saved, list) else saved
        h = h if isinstance(h, Tensor) else h["h"] if isinstance(h, dict) else h[0]
        return h * torch.tanh(saved * 2)


class GivesTheOther(ReadsTheOther):
    """What was kept is an argument of the next module."""

    def run(self, x):
        h = self.up(x)
        return self.child(self.up.saved) * h


class GivesBoth(Parent):
    def run(self, x):
        h = self.up(x)
        return self.up.saved * h


class ReturnsTheOther(Parent):
    def forward(self, x):
        return self.last(self.up(x)), self.up.saved


class ReturnsTheOtherOnly(Parent):
    def forward(self, x):
        self.up(x)
        return self.up.saved


class Holder(nn.Module):
    """A container that returns what its child kept, not what the child gave."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        self.inner(x)
        return self.inner.saved


class Plain(Parent):
    def run(self, x):
        return torch.tanh(self.up(x))


class NeverRead(Plain):
    """Keeps for debugging only."""

    def run(self, x):
        self.seen = self.up(x)
        return torch.tanh(self.seen)


class OnAnother(Parent):
    """A module that puts what it made on another one, which reads it later."""

    def run(self, x):
        h = self.up(x)
        self.child.ctx = self.up.saved
        return self.child(x) - h


class InPlace(Parent):
    """What was kept and what was returned are one memory: an addition in place changes both."""

    def run(self, x):
        h = self.up(x)
        h += 1
        return h * torch.sigmoid(self.up.saved)


class WritesElsewhere(Inner):
    """Writes into what another module kept."""

    def forward(self, x):
        self.where[0].saved.add_(1)
        return self.fc(x)


class InPlaceElsewhere(Parent):
    def run(self, x):
        h = self.up(x)
        self.child.where = [self.up]
        return self.child(x) * torch.sigmoid(h)


class Written(nn.Module):
    """Writes into its argument and returns something else."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x):
        x += 1
        return self.fc(x)


class WritesIntoTheArgument(Parent):
    def run(self, x):
        h = self.up(x)
        return self.child(h) * torch.tanh(h)


class Sink(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x):
        self.saved = x
        return self.fc(x)


class KeptArgument(Parent):
    def run(self, x):
        return self.sink(self.up(x)) * torch.tanh(self.sink.saved)


class Quiet(Inner):
    """Keeps an operation's value on a child, where nobody reads it."""

    def forward(self, x):
        h = self.fc(x) + x
        return h * torch.tanh(h)


class Handing(nn.Module):
    """A sum that is an argument of a child and an attribute on it."""

    def __init__(self):
        super().__init__()
        self.fc, self.child = linear(), Ctx()

    def forward(self, x):
        h = self.fc(x) + x
        self.child.ctx = h
        return self.child(h)


class InBlock(Plain):
    """Runs one block."""


class Both(nn.Module):
    """Reads one value as an argument and in a list."""

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x, more):
        return self.fc(x) * more[0]


class BothAtOnce(Both):
    def forward(self, x, more):
        return self.fc(x * more[0])


class TwoWays(Parent):
    def run(self, x):
        h = self.up(x)
        return self.child(h, [h])


def evaluated(graph: ag.Graph, model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a graph: each node from what the graph says that it reads."""
    values = {}
    own = dict(model.named_modules())
    for node in graph.nodes():
        given = [values[i] for i in node.inputs]
        made = graph.bodies.get(node.body or "")
        if made is not None:
            read = {w: r for r, w in made.calls}.get(node.name)
            # the body is run as a whole where its last node stands
            values[node.name] = values[read] + bottleneck(own[made.name], values[read]) if read else None
        elif node.op == "input":
            values[node.name] = x
        elif node.op == "output":
            values[node.name] = given[0]
        elif "/" not in node.name:
            values[node.name] = leaf(own[node.path], given)
        else:
            values[node.name] = OPERATIONS[node.op](node, given)
    outputs = graph.outputs
    names = [outputs] if isinstance(outputs, str) else list(outputs.values() if isinstance(outputs, dict) else outputs)
    return [values[n] for n in names]


def bottleneck(body: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(x @ body.down.weight.T + body.down.bias) @ body.up.weight.T + body.up.bias


def leaf(module: nn.Module, given: list[Tensor]) -> Tensor:
    if isinstance(module, Keeping):
        return given[0] @ module.weight
    if isinstance(module, CtxLeaf):
        # in the order it reads them: its argument, and what is on it
        return given[0] * module.weight + given[-1]
    return given[0] @ module.weight.T + module.bias


OPERATIONS = {
    "add": lambda node, given: reduce(operator.add, given),
    "mul": lambda node, given: given[0] * (given[1] if len(given) > 1 else 2),
    "sub": lambda node, given: given[0] - given[1],
    "add_": lambda node, given: given[0] + 1,
    "tanh": lambda node, given: torch.tanh(given[0]),
    "sigmoid": lambda node, given: torch.sigmoid(given[0]),
    "identity": lambda node, given: given[0],
}

RIGHT = {
    "put on a child after the call": (lambda: PutsOnTheChild(up=linear, child=Ctx), "up", None),
    "put on a leaf after the call": (lambda: PutsOnTheChild(up=linear, child=CtxLeaf), "up", None),
    "put on a child, body at it": (lambda: PutsOnTheChild(up=linear, child=Ctx), "child", None),
    "put on a child, before it": (lambda: PutsOnTheChild(up=linear, child=Ctx), "child", "before"),
    "argument and attribute, before": (lambda: PutsOnTheChildWhatItGives(up=linear, child=Ctx), "child", "before"),
    "argument and attribute, after": (lambda: PutsOnTheChildWhatItGives(up=linear, child=Ctx), "up", None),
    "input and attribute, before": (lambda: PutsInput(up=linear, child=Ctx), "child", "before"),
    "kept by a leaf": (lambda: ReadsTheOther(up=Keeping), "up", None),
    "kept by a container": (lambda: ReadsTheOther(up=Inner), "up", None),
    "kept by a container, body at its child": (lambda: ReadsTheOther(up=Inner), "up.fc", None),
    "both, inner first": (lambda: ReadsTheOther(up=Inner), ["up.fc", "up"], None),
    "kept operation": (lambda: ReadsTheOther(up=Summing), "up", None),
    "kept in a list": (lambda: ReadsTheOther(up=InList), "up", None),
    "kept list that is returned": (lambda: ReadsTheOther(up=GivesItsList), "up", None),
    "kept dict that is returned": (lambda: ReadsTheOther(up=GivesItsDict), "up", None),
    "kept and given to a module": (lambda: GivesTheOther(up=Inner, child=linear), "up", None),
    "kept and given to a module, before it": (lambda: GivesTheOther(up=Inner, child=linear), "child", "before"),
    "kept and given to a container": (lambda: GivesTheOther(up=Inner, child=Inner), "up", None),
    "kept and returned by the model": (lambda: ReturnsTheOther(up=Inner), "up", None),
    "returned by a container, body at it": (lambda: Plain(up=Holder), "up", None),
    "never read": (lambda: NeverRead(up=Inner), "up", None),
    "never read, leaf": (lambda: NeverRead(up=Keeping), "up", None),
    "on another module": (lambda: OnAnother(up=Inner, child=Ctx), "up", None),
    "on another leaf": (lambda: OnAnother(up=Keeping, child=CtxLeaf), "up", None),
    "on another, before it": (lambda: OnAnother(up=Inner, child=Ctx), "child", "before"),
    "one memory, body inside": (lambda: InPlace(up=Inner), "up.fc", None),
    "one memory, written elsewhere, body inside": (
        lambda: InPlaceElsewhere(up=Inner, child=WritesElsewhere),
        "up.fc",
        None,
    ),
    "one memory, body elsewhere": (lambda: InPlace(up=Inner), "last", None),
    "argument that is written into": (lambda: WritesIntoTheArgument(up=linear, child=Written), "up", None),
    "argument that is written into, after": (lambda: WritesIntoTheArgument(up=linear, child=Written), "child", None),
    "argument that is kept": (lambda: KeptArgument(up=linear, sink=Sink), "up", None),
    "argument that is kept, after": (lambda: KeptArgument(up=linear, sink=Sink), "sink", None),
    "in the middle, read by nobody": (lambda: InBlock(up=Quiet), "up/add", None),
    "list argument": (lambda: TwoWays(up=linear, child=Both), "up", None),
}


def spliced(graph, at, where):
    for number, place in enumerate(at if isinstance(at, list) else [at]):
        graph = graph.splice(place, METHOD, where=where, name=f"body{number}")
    return graph


def found(output):
    return list(output) if isinstance(output, tuple) else [output]


@pytest.mark.parametrize("case", RIGHT)
def test_a_body_is_read_where_the_graph_says(case):
    make, at, where = RIGHT[case]
    base, x = make(), torch.randn(4, 6)
    graph = ag.trace(base, x)
    with torch.no_grad():
        for a, b in zip(evaluated(graph, base, x), found(base(x.clone())), strict=True):
            torch.testing.assert_close(a, b)
        for order in (at, at[::-1]) if isinstance(at, list) else (at,):
            adapted = spliced(graph, order, where)
            assert ag.Graph.from_json(adapted.to_json()) == adapted
            assert adapted.unsplice() == graph
            for module in base.modules():
                vars(module).pop("ctx", None), vars(module).pop("saved", None)
            model = randomise(adapted.compile(), 2.0)
            results = found(model(x.clone()))
            for a, b in zip(evaluated(adapted, model, x), results, strict=True):
                torch.testing.assert_close(a, b)


REFUSED = {
    "both ways in one operation": (lambda: GivesBoth(up=Inner), "up", None, "'/mul' reads what 'up' gives"),
    "both ways in one leaf": (
        lambda: PutsOnTheChildWhatItGives(up=linear, child=CtxLeaf),
        "child",
        "before",
        "'child' reads what 'child' is given",
    ),
    "one memory": (lambda: InPlace(up=Inner), "up", None, "'/sigmoid' reads what 'up' gives"),
    "one memory, leaf": (lambda: InPlace(up=Keeping), "up", None, "'/sigmoid' reads what 'up' gives"),
    "one memory, written elsewhere": (
        lambda: InPlaceElsewhere(up=Inner, child=WritesElsewhere),
        "up",
        None,
        "'/sigmoid' reads what 'up' gives",
    ),
    "argument that is kept": (
        lambda: KeptArgument(up=linear, sink=Sink),
        "sink",
        "before",
        "'/tanh' reads what 'sink'",
    ),
    "argument and list": (lambda: TwoWays(up=linear, child=BothAtOnce), "child", "before", "'child/mul' reads what"),
}


def test_a_module_of_which_only_what_it_keeps_is_read_is_no_place_for_a_body():
    graph = ag.trace(ReturnsTheOtherOnly(up=Inner), torch.randn(4, 6))
    with pytest.raises(ag.BadSplice, match="'up' gives a value that nothing reads: a body there would change nothing"):
        graph.splice("up", METHOD)


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_edge_can_say_is_refused_by_name(case):
    make, at, where, said = REFUSED[case]
    graph = ag.trace(make(), torch.randn(4, 6))
    with pytest.raises(ag.BadSplice) as error:
        graph.splice(at, METHOD, where=where)
    text = str(error.value)
    assert said in text
    assert ", and not only by way of its " in text
    hint = "let the model hand it on as an argument or result, or splice at a module that reads it"
    assert f"to fix      {hint}" in text
    assert error.value.node == at
    # an earlier place that has no such reader is fine
    graph.splice("last", METHOD).compile()


class KeepsOnly(Parent):
    """Of one module only what it kept is read, of the other only what it gave is kept."""

    def forward(self, x):
        self.up(x)
        self.seen = self.child(x)
        return self.last(x)


@pytest.mark.parametrize(
    ("make", "at", "past"),
    [
        (lambda: ReturnsTheOtherOnly(up=Inner), "up", "up.fc"),
        (lambda: ReturnsTheOtherOnly(up=Keeping), "up", "up"),
        (lambda: Plain(up=Holder), "up.inner", "up.inner.fc"),
        (lambda: KeepsOnly(up=Inner, child=Inner), "up", None),
        (lambda: KeepsOnly(up=Keeping, child=Keeping), "up", None),
    ],
    ids=["returned", "returned, leaf", "returned by a container", "kept", "kept by a leaf"],
)
def test_a_body_at_what_is_only_kept_before_it_changes_nothing_and_is_refused(make, at, past):
    graph = ag.trace(make(), torch.randn(4, 6))
    with pytest.raises(ag.BadSplice, match=f"'{at}' gives a value that nothing reads") as error:
        graph.splice(at, METHOD)
    assert (f"    past it   '{past}'   is re" in str(error.value)) == (past is not None)


@pytest.mark.parametrize("make", [Inner, Keeping])
@pytest.mark.parametrize("at", ["child", "last"])
def test_what_is_kept_after_a_body_is_what_the_body_gave(make, at):
    base, x = KeepsOnly(up=make, child=make), torch.randn(4, 6)
    graph = ag.trace(base, x).splice(at, METHOD)
    assert ag.Graph.from_json(graph.to_json()) == graph
    with torch.no_grad():
        out, seen = base(x), base.seen
        model = randomise(graph.compile())
        torch.testing.assert_close(model(x), out + bottleneck(model.last.adapter, out) if at == "last" else out)
        expected = seen + bottleneck(model.child.adapter, seen) if at == "child" else seen
        torch.testing.assert_close(model.seen, expected)


def test_what_a_body_at_a_kept_value_reads_is_a_place():
    base, x = KeepsOnly(up=linear, child=linear), torch.randn(4, 6)
    tap = ag.trace(base, x).splice("child", lambda s: s.output + ag.dense(s.graph["up"], 6, name="tapped"), name="tap")
    with torch.no_grad():
        model = randomise(tap.splice("up", METHOD).compile())
        model(x)
        up = base.up(x)
        given = up + bottleneck(model.up.adapter, up)
        torch.testing.assert_close(model.seen, base.child(x) + model.child.tap.tapped(given))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: GivesBoth(up=Summing), "it sets the attribute 'saved'"),
        (lambda: InBlock(up=Handing), "it sets the attribute 'ctx'"),
    ],
    ids=["returned and kept", "argument and attribute"],
)
def test_an_operation_whose_value_is_kept_is_reached_inside_or_not_at_all(make, why):
    """Neither at the exit, nor at the arguments, where those who read the attribute would not see it."""
    graph = ag.trace(make(), torch.randn(4, 6))
    with pytest.raises(ag.BadSplice, match="is an operation inside a forward that cannot be reached") as error:
        graph.splice("up/add", METHOD).compile()
    assert why in str(error.value)


class Memory(Parent):
    """Adds what its module kept in the forward before."""

    def run(self, x):
        before = getattr(self.up, "saved", None)
        h = self.up(x)
        return h if before is None else h + torch.tanh(before)


@pytest.mark.parametrize("kept", [False, True], ids=["traced first", "traced second"])
@pytest.mark.parametrize("make", [Keeping, Inner])
def test_what_the_forward_before_kept_is_what_it_was_before_the_body(make, kept):
    base, one, two = Memory(up=make), torch.randn(4, 6), torch.randn(4, 6)
    with torch.no_grad():
        if kept:
            base(one)
        graph = ag.trace(base, two)
        vars(base.up).pop("saved", None)
        model = randomise(graph.splice("up", METHOD).compile(), 2.0)
        base(one), model(one)
        saved, h = base.up.saved, base.up(two)
        expected = base.last(h + bottleneck(model.up.adapter, h) + torch.tanh(saved))
        torch.testing.assert_close(model(two), expected)
