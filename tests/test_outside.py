"""Values that leave torch inside a forward, and come back: the graph says what is computed from them."""

from __future__ import annotations

import numpy
import pytest
import torch
from byhand import randomise
from test_attributes import METHOD, bottleneck, linear
from torch import Tensor, nn

import adaptergraph as ag


class Kind(Tensor):
    """A class of tensors."""


WAYS = {
    "as_subclass": lambda h: h.as_subclass(Kind).as_subclass(Tensor),
    "numpy": lambda h: torch.from_numpy(h.detach().numpy() * 2),
    "numpy as data": lambda h: torch.tensor(h.detach().numpy() * 2),
    "numpy, copied": lambda h: torch.as_tensor(numpy.tanh(h.detach().numpy())),
    "asarray": lambda h: torch.asarray(numpy.asarray(h.detach())),
    "array in an operation": lambda h: torch.ones(3, 6).mul(torch.from_numpy(numpy.array(h.detach()))),
    "dlpack": lambda h: torch.from_dlpack(h.detach()),
    "dlpack through numpy": lambda h: torch.from_dlpack(numpy.from_dlpack(h.detach())),
    "tolist": lambda h: torch.tensor(h.tolist()),
    "item": lambda h: torch.ones(3, 6) * h.max().item(),
    "float": lambda h: torch.full((3, 6), float(h.max())),
    "number from a list": lambda h: torch.ones(3, 6).clamp(max=h.tolist()[0][1]),
    "filled": lambda h: torch.zeros(3, 6).masked_fill(torch.ones(3, 6) > 0, h.sum().item()),
    "one of many": lambda h: torch.stack([torch.as_tensor(row) for row in h.tolist()]),
}


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.b, self.o = linear(), linear(), linear()

    def forward(self, x):
        return self.o(self.way(self.a(x)))


def above(graph, name):
    """All that a node is computed from."""
    found, waiting = set(), [name]
    while waiting:
        new = [i for i in graph._nodes[waiting.pop()].inputs if i not in found]
        found.update(new)
        waiting += new
    return found


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_back_is_computed_from_what_left(way):
    base, x = Model(WAYS[way]), torch.randn(3, 6)
    graph = ag.trace(base, x)
    assert above(graph, "o") >= {"x", "a"}
    assert ag.Graph.from_json(graph.to_json()) == graph
    both = graph.splice("a", METHOD).splice("o", METHOD, where="before", name="before")
    assert both.unsplice() == graph
    model = randomise(both.compile(), 2.0)
    with torch.no_grad():
        h = base.a(x)
        h = WAYS[way](h + bottleneck(model.a.adapter, h))
        torch.testing.assert_close(model(x), base.o(h + bottleneck(model.o.before, h)))


class Shown(nn.Module):
    """Ways on which torch shows what comes of a value to nobody."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.a, self.o = linear(), linear()

    def forward(self, x):
        return self.o(self.way(self, x))


UNSHOWN = {
    "cond": lambda m, x: torch.cond(x.isfinite().all(), m.a, lambda v: v * 2, (x,)),
    "nested": lambda m, x: torch.nested.nested_tensor(list(m.a(x))).to_padded_tensor(0.0),
    "memory": lambda m, x: torch.empty(0).set_(m.a(x).untyped_storage(), 0, (3, 6), (6, 1)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", UNSHOWN)
def test_a_body_at_what_torch_shows_to_nobody_is_taken(way):
    base, x = Shown(UNSHOWN[way]).eval(), torch.randn(3, 6)
    graph = ag.trace(base, x)
    assert way == "memory" or above(graph, "o") >= {"x", "a"}
    assert ag.Graph.from_json(graph.to_json()) == graph
    assert "Linear" in str(graph.summary())
    model = randomise(graph.splice("a", METHOD).compile(), 2.0).eval()
    with torch.no_grad():
        own, body = base.a, model.a.adapter
        expected = Shown(UNSHOWN[way])
        expected.o = base.o
        expected.a = nn.Identity()
        expected.a.forward = lambda v: own(v) + bottleneck(body, own(v))
        output = model(x)
        torch.testing.assert_close(output, expected(x))
    assert not torch.allclose(output, base(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", [True, False])
def test_a_nested_tensor_without_a_shape_is_refused(given):
    rows = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    base = Shown(lambda m, x: (m.a(x) if given else torch.nested.nested_tensor([m.a(x)]) * 2).to_padded_tensor(0.0))
    with pytest.raises(ag.GraphError, match=r"a nested tensor says no shape: make it with layout=torch\.jagged"):
        ag.trace(base, rows if given else torch.randn(3, 6))


class InALeaf(nn.Module):
    """No child, and its value leaves torch and comes back inside it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.from_numpy((x * self.weight).detach().numpy() + 1)


class Left(nn.Module):
    """Leaves a number that another module reads."""

    def forward(self, x):
        self.number = x.max().item()
        return x * 2


def test_in_modules_without_children():
    def way(h):
        return base.leaf(h) * base.left(h).sum() + base.left.number

    base = Model(way)
    base.leaf, base.left = InALeaf(), Left()
    graph = ag.trace(base, torch.randn(3, 6))
    assert graph._nodes["leaf"].inputs == ("a",)
    assert graph._nodes["/add"].inputs == ("/mul", "left:max")
    assert above(graph, "o") >= {"x", "a", "leaf", "left"}


def test_what_does_not_come_back_is_read_by_nobody():
    def way(h):
        if h.max().item() > 1e9 or not h.isfinite().all():
            return h
        rows, scale = torch.zeros(h.shape[0], 6), 0.125
        return base.b(rows + torch.tensor(scale)) * scale

    base, x = Model(way), torch.randn(3, 6)
    graph = ag.trace(base, x)
    assert "a" not in above(graph, "o")
    # somebody looks at the number, and may do something with it
    graph.splice("a", METHOD).compile(inplace=True)(x)


def test_a_model_without_values_says_so():
    with torch.device("meta"):
        base = Model(WAYS["dlpack"])
    with pytest.raises(ag.GraphError, match="looks at the values of tensors, and the model has none"):
        ag.trace(base, torch.randn(3, 6))
