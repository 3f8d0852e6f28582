"""Splices at different places commute: the graph and what it computes are the same, whichever was spliced first."""

import pytest
import torch
from byhand import randomise
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from torch import nn

import adaptergraph as ag
from adaptergraph.names import path_of

METHOD = ag.Bottleneck(4)


def group():
    """Two layers that are a group, between two others."""
    x = ag.input("x", shape=("batch", 8))
    h = ag.dense(ag.dense(x, 8, name="first"), 8, name="block.up")
    return ag.Graph(ag.dense(ag.dense(h, 8, name="block.down"), 8, name="last")).freeze()


@pytest.mark.parametrize("order", ["node first", "group first"])
@pytest.mark.parametrize("node", ["before", "around", "after"])
@pytest.mark.parametrize("around", ["before", "around", "after"])
def test_a_body_at_a_group_and_one_at_a_node_inside_it(node, around, order):
    """The group is given what it was given, whatever is inside it."""
    x, graph = torch.randn(3, 8), group()
    methods = {"before": METHOD, "after": METHOD, "around": ag.Bottleneck(4, parallel=True)}
    splices = [("block.up", "inner", node), ("block", "outer", around)]
    for at, name, where in splices if order == "node first" else splices[::-1]:
        graph = graph.splice(at, methods[where], name=name, where=where)
    model = randomise(graph.compile())
    inner, outer = model.get_submodule("block.up.inner"), model.get_submodule("block.outer")

    def body(body, h):
        return body.up(torch.relu(body.down(h)))

    given = h = model.first(x)
    if around == "before":
        given = h = h + body(outer, h)
    value = h + body(inner, h) if node == "before" else h
    up = model.block.up(value)
    if node != "before":
        up = up + body(inner, up if node == "after" else value)
    down = model.block.down(up)
    if around != "before":
        down = down + body(outer, down if around == "after" else given)
    torch.testing.assert_close(model(x), model.last(down))


# ---------------------------------------------------------------------- any two places of any graph


class Steps(nn.Module):
    """Runs its children and some operations as its instructions say, and returns what nothing else has read."""

    def __init__(self, rng, depth):
        super().__init__()
        makes = [lambda: nn.Linear(4, 4), nn.Tanh, lambda: nn.LSTM(4, 4, batch_first=True)]
        makes += [lambda: Steps(rng, depth - 1)] * (2 if depth else 0)
        self.parts = nn.ModuleList(rng.choice(makes)() for _ in range(rng.randint(1, 3)))
        self.several = [isinstance(part, nn.LSTM) for part in self.parts]
        self.steps = [(rng.choice(["call"] * 3 + ["add", "mul"]), rng.random(), rng.random()) for _ in range(4)]
        self.steps.append(("call", rng.random(), 1.0))

    def forward(self, x):
        values, unread = [x], {0}

        def taken(share):
            index = min(int(share * len(values)), len(values) - 1)
            unread.discard(index)
            return values[index]

        for kind, one, two in self.steps:
            if kind == "call":
                part = int(one * len(self.parts))
                made = self.parts[part](taken(two))
                made = [made[0], made[1][0][0][:, None]] if self.several[part] else [made]
            else:
                a, b = taken(one), taken(two)
                made = [a + b if kind == "add" else a * b]
            unread |= {*range(len(values), len(values) + len(made))}
            values += made
        return sum(values[i] for i in sorted(unread))


def written(rng):
    """A random declared graph: layers in groups, some of them called again."""
    values = [ag.input("x", shape=("batch", 4))]
    layers = []
    for number in range(rng.randint(3, 8)):
        name = ".".join([*rng.choice([[], ["g"], ["g", "h"], ["k"]]), f"n{number}"])
        x = rng.choice(values[-3:])
        kind = rng.choice(["dense", "dense", "tanh", "add", "again"])
        if kind == "again" and layers:
            values.append(ag.dense(x, 4, share=rng.choice(layers)))
        elif kind == "add":
            values.append(ag.add([x, rng.choice(values)], name=name))
        elif kind == "tanh":
            values.append(ag.tanh(x, name=name))
        else:
            layers.append(ag.dense(x, 4, name=name))
            values.append(layers[-1])
    return ag.Graph(values[-3:]).freeze()


def traced(rng):
    torch.manual_seed(rng.randint(0, 99))
    return ag.trace(nn.Sequential(Steps(rng, 1), Steps(rng, 1)), torch.randn(2, 3, 4))


def reading(name):
    """A body that reads an earlier value."""

    def tap(site):
        return site.output + ag.dense(ag.tanh(site.graph[name]), 4, name="tapped")

    return tap


def anything(rng, graph):
    """A place of any kind, a method for it, and where; most of them can be."""
    names = [n for n in graph.selectable if n not in graph.inputs and graph.calls_of(n)]
    rank = {name: number for number, name in enumerate(graph)}
    at, where = rng.choice(names), rng.choice(["after", "before", "around"])
    before = [n for n in names if rank[graph.calls_of(n)[0]] < rank[graph.calls_of(at)[0]]]
    kind = rng.choice(["plain", "plain", "tap", "span"]) if before else "plain"
    if "/" in at or ":" in at:
        where = "after"
    if kind == "tap":
        name = rng.choice(before)
        first = name.partition("@")[0] == name and rng.choice([False, True])
        return at, reading(f"{name}@0" if first else name), "before" if where == "before" else "after"
    if kind == "span":
        starts = [n for n in before if "/" not in n and ":" not in n] or before
        return ag.span(rng.choice(starts), at), ag.Bottleneck(2, parallel=True), None
    return at, ag.Bottleneck(2, parallel=where == "around"), where


def refused(call):
    """What a call gives; None where it is an error of ours."""
    try:
        return call()
    except ag.GraphError:
        return None


def spliced(graph, *splices):
    for name, (at, method, where) in splices:
        graph = graph.splice(at, method, name=name, where=where)
    return graph


def replaced(graph):
    """The values that a body replaces and where: bodies that share one of these run in splice order."""
    (body,) = graph.bodies.values()
    around = path_of(body.host) if "/" not in body.host else "/"
    return {(body.where == "before", around, value) for value, _ in body.calls}


def outputs(graph, x):
    model = refused(lambda: graph.compile().eval())
    if model is None:
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(graph.body_params):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        return model(x)


SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("make", [written, traced])
@SETTINGS
@given(rng=st.randoms(use_true_random=False))
def test_two_splices_anywhere_commute(make, rng):
    graph = make(rng)
    one, two = ("one", anything(rng, graph)), ("two", anything(rng, graph))
    alone = [refused(lambda s=s: spliced(graph, s)) for s in (one, two)]
    assume(all(alone) and replaced(alone[0]).isdisjoint(replaced(alone[1])))
    note(f"{ {name: node.inputs for name, node in graph._nodes.items()} }\n{one}\n{two}")
    first, second = (refused(lambda o=o: spliced(graph, *o)) for o in ((one, two), (two, one)))
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert first == second
        assert first.unsplice([n for n in first.bodies if n.endswith(".one") or ".one_" in n]) == alone[1]
        x = torch.randn(2, 4) if make is written else torch.randn(2, 3, 4)
        results = [outputs(g, x) for g in (first, second)]
        assert (results[0] is None) == (results[1] is None)
        if results[0] is not None:
            torch.testing.assert_close(results[0], results[1], equal_nan=True)
