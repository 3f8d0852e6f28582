"""Modules without children that return nothing: they write in place, into a container, or keep what they made."""

from __future__ import annotations

import pytest
import torch
from byhand import randomise
from test_attributes import METHOD, bottleneck, linear
from torch import nn

import adaptergraph as ag


class Silent(nn.Module):
    """A weight, and no result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))


class Writes(Silent):
    def forward(self, y):
        y.mul_(self.weight)


class WritesAView(Silent):
    def forward(self, y):
        y[:, 2:].add_(self.weight[2:])


class IntoADict(Silent):
    def forward(self, y, d):
        d["h"] = y * self.weight


class Keeps(Silent):
    def forward(self, y):
        self.out = y * self.weight


class Gives(Silent):
    """Makes a value of its weight alone."""

    def forward(self):
        self.out = self.weight * 2


class Says(Silent):
    """Makes nothing at all."""

    def forward(self, y):
        return None


class Model(nn.Module):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.o = linear(), make(), linear()

    def forward(self, x):
        return self.run(x, lambda h: h, lambda h: h)

    def run(self, x, after_a, before_o):
        y, d = after_a(self.a(x)), {}
        given = {Gives: (), IntoADict: (y, d)}.get(type(self.n), (y,))
        self.n(*given)
        result = d.get("h", y * self.n.out if isinstance(self.n, Keeps | Gives) else y)
        return self.o(before_o(result))


CASES = {
    Writes: {"n": ("a",), "n:mul_": ("n",), "o": ("n:mul_",)},
    WritesAView: {"n": ("a",), "n:add_:view:0": ("n",), "o": ("n:add_:view:0",)},
    IntoADict: {"n": ("a",), "n:mul": ("n",), "o": ("n:mul",)},
    Keeps: {"n": ("a",), "n:mul": ("n",), "/mul": ("a", "n:mul")},
    Gives: {"n": (), "n:mul": ("n",), "/mul": ("a", "n:mul")},
}


@pytest.mark.parametrize("make", CASES)
def test_what_it_wrote_or_keeps_is_what_it_gives(make):
    base, x = Model(make), torch.randn(4, 6)
    graph = ag.trace(base, x)
    assert {n: graph._nodes[n].inputs for n in CASES[make]} == CASES[make]
    assert graph._nodes["n"].shape is None
    assert set(graph._nodes["n"].params) == {"weight"}
    assert ag.Graph.from_json(graph.to_json()) == graph
    assert "n " in str(graph.summary())
    assert '"n"' in graph.dot()
    assert graph.plan().parameters == sum(p.numel() for p in base.parameters())
    adapted = graph.splice("a", METHOD).splice("o", METHOD, where="before", name="before").unfreeze("n")
    model = randomise(adapted.compile(), 2.0)
    result = model(x)
    result.sum().backward()
    assert model.n.weight.grad.abs().sum() > 0
    with torch.no_grad():

        def with_body(body):
            return lambda h: h + bottleneck(body, h)

        torch.testing.assert_close(result, base.run(x, with_body(model.a.adapter), with_body(model.o.before)))


@pytest.mark.parametrize("where", ["after", "before"])
def test_no_body_stands_at_it(where):
    graph = ag.trace(Model(Writes), torch.randn(4, 6))
    with pytest.raises(ag.BadSplice, match=r"'n' \(Writes\) returns no float tensor"):
        graph.splice("n", METHOD, where=where)
    with pytest.raises(ag.GraphError, match="add reads 'n', which gives no single tensor"):
        graph.splice("o", lambda site: site.output + site.graph["n"])


def test_a_pattern_passes_it_by():
    graph = ag.trace(Model(Keeps), torch.randn(4, 6))
    assert list(graph.splice("*", METHOD).bodies) == ["a.adapter", "o.adapter"]


def test_a_module_that_makes_nothing_is_no_node():
    graph = ag.trace(Model(Says), torch.randn(4, 6))
    assert "n" not in graph
    assert graph._nodes["o"].inputs == ("a",)
    with pytest.raises(ag.BadSplice, match="returns no float tensor"):
        graph.splice("n", METHOD)


def test_a_file_may_not_say_so_of_another_node():
    import json

    graph = ag.trace(Model(Writes), torch.randn(4, 6))
    for name in ("a", "n:mul_", "x"):
        data = json.loads(graph.to_json())
        for node in data["nodes"]:
            if node["name"] == name:
                del node["shape"], node["dtype"]
        with pytest.raises(ag.GraphError, match=f"'{name}' has the shape – and dtype None"):
            ag.Graph.from_json(json.dumps(data))
