"""Forwards that walk over modules and parameters: where a body would be one more of what they find, it is refused."""

from __future__ import annotations

import copy
import json
import re

import byhand
import pytest
import torch
from architectures import ARCHITECTURES
from models import snapshot
from torch import nn
from torch.nn.utils import parameters_to_vector

import adaptergraph as ag

METHOD = ag.Bottleneck(2)


def linear():
    return nn.Linear(8, 8)


class Two(nn.Module):
    """Two layers, the first in a container; what it computes with them is below."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(linear(), nn.ReLU()), linear()

    def plain(self, x):
        return self.b(self.a(x))


class Modules(Two):
    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = torch.tanh(module(x))
        return x


class Leaves(Two):
    """A module below the one that runs it is asked whether it has children."""

    def forward(self, x):
        for _, module in self.a.named_modules(prefix="a"):
            if not list(module.children()):
                x = module(x)
        return self.b(x)


class Penalty(Two):
    def forward(self, x):
        return self.plain(x) + sum(p.pow(2).sum() for p in self.parameters())


class Vector(Two):
    def forward(self, x):
        return self.plain(x) + parameters_to_vector(self.b.parameters()).mean()


class Clamped(Two):
    def forward(self, x):
        for _, parameter in self.b.named_parameters():
            x = x + parameter.mean()
        return self.plain(x)


def run(modules, x):
    for module in modules:
        x = module(x)
    return x


class Nested(Two):
    """Runs the children of what has some, and what has none itself."""

    def forward(self, x):
        for module in (self.a, self.b):
            x = run(module.children() if any(True for _ in module.children()) else [module], x)
        return x


class Weighted(Two):
    """Whether a layer has parameters says how it is called."""

    def forward(self, x):
        x = self.a[0](x)
        for module in (self.a[1], self.b):
            factor = 1 if next(module.parameters(), None) is None else 2
            x = module(x) * factor
        return x


class Inside(Two):
    def forward(self, x):
        return self.a(x) + self.b(x)


class Root(nn.Module):
    """The model itself walks over all that it has."""

    def __init__(self, make):
        super().__init__()
        self.n = make()

    def forward(self, x):
        return self.n(x) + sum(p.abs().mean() for p in self.parameters())


def fresh():
    body = nn.Sequential(linear(), nn.ReLU(), linear())
    nn.init.zeros_(body[2].bias)
    nn.init.constant_(body[2].weight, 0.1)
    return body


@pytest.mark.parametrize(
    ("make", "at", "what"),
    [
        (Modules, "n.a.0", "all that is in 'n'"),
        (Modules, "n.b", "all that is in 'n'"),
        (Leaves, "n.a.0", "the children of 'n.a.0'"),
        (Leaves, "n.a.1", "the children of 'n.a.1'"),
        (Penalty, "n.b", "all that is in 'n'"),
        (Penalty, "n.a.1", "all that is in 'n'"),
        (Vector, "n.b", "all that is in 'n.b'"),
        (Clamped, "n.b", "all that is in 'n.b'"),
        (Nested, "n.b", "the children of 'n.b'"),
        (Weighted, "n.a.1", "all that is in 'n.a.1'"),
        (lambda: Root(Inside), "n.n.b", "all that is in 'n'"),
    ],
)
def test_a_body_that_would_be_a_part_of_what_a_forward_walks_over(make, at, what):
    model = nn.Sequential()
    model.add_module("n", make())
    model.eval()
    x = torch.randn(3, 8)
    before, expected = snapshot(model), model(x)
    graph = ag.trace(model, x)
    assert snapshot(model) == before
    lines = (
        f"a forward walks over {what} and computes with what it finds: a body at {at!r} would be a part of it",
        "written at  test_walks.py",
        "to fix      splice somewhere else, or let that forward name the modules and parameters that it means",
    )
    for each in (graph, ag.Graph.from_json(graph.to_json())):
        with pytest.raises(ag.BadSplice, match="(?s)" + ".*".join(map(re.escape, lines))):
            each.splice(at, METHOD)
    # why: a module that nobody calls changes what comes out
    model.get_submodule(at).add_module("adapter", fresh())
    assert not torch.allclose(model(x), expected)


def test_the_model_itself_walks():
    graph = ag.trace(Root(linear), torch.ones(1, 8))
    with pytest.raises(ag.BadSplice, match="a forward walks over all that is in the model and computes"):
        graph.splice("n", METHOD)


class Looking(Two):
    """Walks for a dtype, a device, a mode, a count, names: none of it is computed with."""

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype).to(list(self.parameters())[-1].device)
        assert {p.device for p in self.parameters()} == {x.device}
        if any(m.training for m in self.modules()) or sum(p.numel() for p in self.parameters()) < 0:
            return x
        names = [n for n, _ in self.named_modules()] + [n for n, _ in self.named_children()]
        return self.plain(x) * (1 if names else 0)


class First(Two):
    """Stops at the first one."""

    def forward(self, x):
        for module in self.a.children():
            x = module(x)
            break
        return self.b(self.a[1](x)) + next(self.b.parameters()).mean()


class Own(Two):
    """What is a module's own is the same with bodies."""

    def forward(self, x):
        own = sum(p.sum() for p in self.b.parameters(recurse=False))
        return self.plain(x) + own + sum(p.sum() for _, p in self.b.named_parameters("", False))


class Elsewhere(Two):
    """Walks over another module than the hosts."""

    def __init__(self):
        super().__init__()
        self.walked = nn.Sequential(linear(), nn.Tanh())

    def forward(self, x):
        return self.plain(run(self.walked.children(), x)) + sum(p.sum() for p in self.walked.parameters())


class Asked(Two):
    """Who asks what a module has returns before it is called: as libraries that put hooks on all modules."""

    def install(self, module):
        for child in module.children():
            self.install(child)

    def forward(self, x):
        self.install(self)
        return self.plain(x)


class Functional(Two):
    def forward(self, x):
        return torch.func.functional_call(self.b, dict(self.b.named_parameters()), (self.a(x),))


@pytest.mark.parametrize("make", [Looking, First, Own, Elsewhere, Asked, Functional])
@pytest.mark.parametrize("at", ["a.0", "b"])
def test_walks_that_only_look_go_on_working(make, at):
    model = make().eval()
    x = torch.randn(3, 8)
    adapted = byhand.randomise(ag.trace(model, x).splice(at, METHOD).compile()).eval()
    body = adapted.get_submodule(at).adapter
    handle = model.get_submodule(at).register_forward_hook(lambda module, args, out: body(out))
    assert torch.equal(adapted(x), model(x))
    handle.remove()
    assert not torch.allclose(adapted(x), model(x))


def test_a_copy_that_a_forward_makes_is_another_module():
    class Copying(Two):
        def forward(self, x):
            other = copy.deepcopy(self.a).double()
            assert next(other.children()) is other[0]
            return self.plain(x) + other[0].weight.sum().float()

    model, x = Copying().eval(), torch.randn(3, 8)
    before = snapshot(model)
    graph = ag.trace(model, x)
    assert snapshot(model) == before
    assert torch.equal(graph.splice("b", METHOD).compile()(x), model(x))


def test_a_file_says_what_is_walked_over():
    text = json.loads(ag.trace(nn.Sequential(Penalty()), torch.ones(1, 8)).to_json())
    assert text["imported"]["walked"] == {"0": True}


@pytest.mark.parametrize("name", ["nn.TransformerEncoder", "xlnet", "segformer", "llava"])
def test_libraries_that_look_at_modules_lose_no_place(name):
    """These walk in their forwards: for hooks, dtypes, and to capture outputs."""
    case = ARCHITECTURES[name]
    args, kwargs = case.args()
    assert ag.trace(case.model(), *args, **kwargs).imported.walked == {}
