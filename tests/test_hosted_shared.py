"""A module that is part of two models: one may be adapted in place, and never at the other's cost."""

from __future__ import annotations

import copy

import byhand
import pytest
import torch
from models import snapshot
from test_hosted_errors import says
from torch import nn
from torch.nn.functional import linear

import adaptergraph as ag

METHOD = ag.Bottleneck(2)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) * 10


class Headed(nn.Module):
    """A head over a part that it shares with others."""

    def __init__(self, shared, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.part = shared
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.part(x)))


def two(make=lambda: nn.Linear(8, 8)):
    torch.manual_seed(0)
    shared = make()
    return Headed(shared, 1).eval(), Headed(shared, 2).eval()


def by_hand(model):
    """What a model whose part is a Linear with a bottleneck computes."""
    h = linear(X, model.part.weight, model.part.bias)
    body = model.part.adapter
    return model.head(torch.tanh(h + body.up(torch.relu(body.down(h)))))


def refused(call, models, path, cls):
    """It is refused by the name of the module, and no model is changed."""
    before = [snapshot(m) for m in models]
    with says(
        f"{path!r} ({cls}) is part of another adapted model already",
        "written at  test_hosted_shared.py",
        "to fix      ag.detach(…) that model first, or adapt a copy of it",
        kind=ag.GraphError,
    ):
        call()
    assert [snapshot(m) for m in models] == before


@pytest.mark.parametrize("at", ["part", "head"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_second_model_over_a_host_is_refused(at, inplace):
    first, second = two()
    graph = ag.trace(second, X).splice(at, METHOD, name="second")
    byhand.randomise(ag.trace(first, X).splice("part", METHOD).compile(inplace=True))
    expected = by_hand(first)
    assert torch.allclose(first(X), expected, atol=1e-5)
    refused(lambda: ag.trace(second, X), (first, second), "part", "Linear")
    refused(lambda: graph.compile(inplace=inplace), (first, second), "part", "Linear")
    refused(lambda: graph.plan(), (first, second), "part", "Linear")
    assert torch.allclose(first(X), expected, atol=1e-5)
    ag.detach(first)
    assert ag.trace(second, X).splice(at, METHOD, name="second") == graph
    model = byhand.randomise(graph.compile(inplace=inplace))
    h = linear(X, second.part.weight, second.part.bias)
    h = torch.tanh(model.part.second(h) if at == "part" else h)
    out = linear(h, second.head.weight, second.head.bias)
    assert torch.allclose(model(X), model.head.second(out) if at == "head" else out, atol=1e-5)


def test_both_may_be_adapted_as_copies_or_one_of_them_in_place():
    first, second = two()
    graphs = [ag.trace(m, X).splice("part", METHOD) for m in (first, second)]
    one = byhand.randomise(graphs[0].compile())
    other = byhand.randomise(graphs[1].compile())
    third = byhand.randomise(graphs[1].compile(inplace=True))
    for model in (one, other, third):
        assert torch.allclose(model(X), by_hand(model), atol=1e-5)
    assert one.part.weight.data_ptr() == third.part.weight.data_ptr()
    # a copy of an adapted model is another model, with hosts of its own
    twin = copy.deepcopy(third)
    ag.detach(third)
    assert torch.allclose(twin(X), by_hand(twin), atol=1e-5)
    ag.detach(twin)
    graphs[0].compile(inplace=True)


def test_frozen_statistics_that_are_kept_for_one_model_are_not_let_go_by_another():
    first, second = two(lambda: nn.BatchNorm1d(8))
    graphs = [ag.trace(m, X).splice("head", METHOD) for m in (first, second)]
    model = graphs[0].compile(inplace=True)
    refused(lambda: graphs[1].compile(inplace=True), (first, second), "part", "BatchNorm1d")
    refused(lambda: ag.trace(second, X), (first, second), "part", "BatchNorm1d")
    mean = first.part.running_mean.clone()
    model.train()(X)
    assert torch.equal(first.part.running_mean, mean)
    ag.detach(model)
    second.train()(X)
    assert not torch.equal(first.part.running_mean, mean)
    graphs[1].compile(inplace=True)


def test_a_part_of_an_adapted_model():
    first, _ = two(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    ag.trace(first, X).splice("{part,part.0}", METHOD).compile(inplace=True)
    refused(lambda: ag.trace(first.part, X), (first,), "Sequential", "Sequential")
    refused(lambda: ag.trace(first.part[0], X), (first,), "Linear", "Linear")
    refused(lambda: ag.trace(nn.Sequential(nn.Tanh(), first.part), X), (first,), "1", "Sequential")
    with says("this Headed has bodies already", "ag.graph_of(model).splice"):
        ag.trace(first, X)


def test_the_plan_of_a_graph_whose_model_has_bodies_by_now():
    first, _ = two()
    graph = ag.trace(first, X).splice("part", METHOD)
    wanted = graph.plan()
    model = graph.compile(inplace=True)
    with says("this Headed has bodies already", "ag.detach(model) takes them off"):
        graph.plan()
    ag.detach(model)
    assert graph.plan() == wanted


@pytest.mark.parametrize("inplace", [True, False])
def test_a_declared_model_may_be_a_part_and_stays_what_it_was(inplace):
    x = ag.input("x", shape=("batch", 8))
    h = ag.batch_norm(ag.dense(x, 8, name="fc"), name="norm")
    inner = ag.Graph(h).freeze().compile()
    inner.norm.running_mean.normal_()
    base = nn.Sequential(inner, nn.Linear(8, 8)).eval()
    before, plain = snapshot(base), base(X)
    graph = ag.trace(base, X).splice("{0.norm,0.fc}", METHOD)
    for _ in range(2):
        model = byhand.randomise(graph.compile(inplace=inplace))
        h = model[0].fc.adapter(linear(X, inner.fc.weight, inner.fc.bias))
        norm = inner.norm
        h = nn.functional.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        assert torch.allclose(model(X), base[1](model[0].norm.adapter(h)), atol=1e-4)
        ag.detach(model)
        assert torch.equal(model(X), plain)
        assert snapshot(base) == before
    # its own frozen statistics stay frozen
    base.train()
    assert not inner.norm.training
    # and a host of it that was replaced is seen
    base.eval()
    model = graph.compile(inplace=inplace)
    model[0].norm = nn.BatchNorm1d(8)
    with says("0.norm   was BatchNorm1d   is another BatchNorm1d without the bodies"):
        ag.detach(model)
