"""Forwards that ask whether two tensors are one object: refused where the answer sends them another way."""

from __future__ import annotations

import functools
import random

import numpy
import pytest
import torch
from byhand import randomise
from test_attributes import METHOD, bottleneck, linear
from torch import nn

import adaptergraph as ag
from adaptergraph.tracing.identity import asking


class Asking(nn.Module):
    """Linears and a dropout, which hands its argument through in eval."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = linear(), linear(), linear()
        self.drop = nn.Dropout(0.5)


class Branch(Asking):
    def forward(self, x):
        h = self.a(x)
        d = self.drop(h)
        return self.b(h) if d is h else self.c(d)


class Operation(Asking):
    """No module in between, and both ways run the same operations."""

    def forward(self, x):
        h = self.a(x)
        same = h.contiguous() is h
        return self.b(h if same else x)


class Registry(Asking):
    def forward(self, x):
        h = self.a(x)
        known = {id(h): 2.0}
        return self.b(h) * known.get(id(self.drop(h)), 3.0)


class Weights(Asking):
    """Only which weights are read differs."""

    def forward(self, x):
        h = self.a(x)
        layer = self.b if self.drop(h) is h else self.c
        return torch.nn.functional.linear(h, layer.weight)


def one(first, second):
    return first is second


class Hashed(Asking):
    def forward(self, x):
        h = self.a(x)
        known = [hash(h)]
        return self.b(h) if hash(self.drop(h)) in known else self.c(h)


class Helped(Asking):
    """Asks in a function."""

    def forward(self, x):
        h = self.a(x)
        return self.b(h) if one(h, self.drop(h)) else self.c(h)


def twice(forward):
    """A decorator that hides what it decorates."""

    def run(self, x):
        return forward(self, x) * 2

    return run


class Decorated(Asking):
    @twice
    def forward(self, x):
        h = self.a(x)
        return self.b(h) if self.drop(h) is h else self.c(h)


class AlsoDecorated(Asking):
    @twice
    def forward(self, x):
        return self.b(x)


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x, more):
        return self.a(x) if x is more[0] else self.b(x)


class Given(Asking):
    """One tensor as an argument and in a list."""

    def __init__(self):
        super().__init__()
        self.child = Child()

    def forward(self, x):
        h = self.a(x)
        return self.child(h, [h])


class Looking(Asking):
    """On real tensors, as it looks at a value."""

    def forward(self, x):
        h = self.a(x) * (1.0 if x.sum().item() > 1e9 else 2.0)
        return self.b(h) if self.drop(h) is h else self.c(h)


REFUSED = {
    Branch: ("linear in 'b'", "linear in 'c'", "b"),
    Operation: ("linear in 'b'", "linear in 'b', which reads another value", "b"),
    Registry: ("mul", "mul, which reads another value", None),
    Weights: ("linear", "linear, which reads another value", None),
    Hashed: ("linear in 'b'", "linear in 'c'", "b"),
    Helped: ("linear in 'b'", "linear in 'c'", "b"),
    Decorated: ("linear in 'b'", "linear in 'c'", "b"),
    Given: ("linear in 'child.a'", "linear in 'child.b'", "child.a"),
    Looking: ("linear in 'b'", "linear in 'c'", "b"),
}


@pytest.mark.parametrize("make", REFUSED)
def test_a_model_that_goes_another_way_is_refused(make):
    itself, traced, node = REFUSED[make]
    model, x = make().eval(), torch.randn(4, 6)
    before = {n: id(p) for n, p in model.named_parameters()}
    with pytest.raises(ag.GraphError) as error:
        ag.trace(model, x)
    text = str(error.value)
    assert (
        f"the forward of {make.__name__} asks whether two tensors are one object, and goes another way if not" in text
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"by itself {itself}" in lines
    assert f"in a trace {traced}" in lines
    asks = next(line for line in lines if line.startswith("asks"))
    where = {Helped: "one", Given: "Child.forward"}.get(make, f"{make.__name__}.forward")
    assert f"asks {where}, " in asks
    assert "test_identity.py:" in asks
    hint = "a body makes another tensor of what a module hands through: let it ask for a setting, not `is` or id()"
    assert f"to fix {hint}" in lines
    assert error.value.node == node
    assert {n: id(p) for n, p in model.named_parameters()} == before


class Pointed(Asking):
    """Asks whether one tensor lies where another does; on real tensors if it looks at a value too."""

    def __init__(self, other, looks):
        super().__init__()
        self.other, self.looks = other, looks

    def forward(self, x):
        h = self.a(x)
        if self.looks and h.sum().item() > 1e9:
            h = h * 2
        return self.b(h) if self.other(self, h).data_ptr() == h.data_ptr() else self.c(h)


@pytest.mark.parametrize("looks", [False, True])
def test_a_model_that_compares_addresses_across_a_module_is_refused(looks):
    with pytest.raises(ag.GraphError) as error:
        ag.trace(Pointed(lambda m, h: m.drop(h), looks).eval(), torch.randn(4, 6))
    assert str(error.value).splitlines()[0] == (
        "the forward of Pointed asks for the address of one memory before and after 'drop', "
        "and a body there makes another of it"
    )
    assert error.value.hint == "let it ask for a setting, not data_ptr()"
    assert error.value.node == "drop"


def aligned(m, h):
    """As code does that chooses a kernel."""
    assert h.data_ptr() % 16 == m.b.weight.data_ptr() % 16 == 0
    return h


ADDRESSES = {
    "aligned": (aligned, "b"),
    "other": (lambda m, h: h * 1.0, "c"),
    "same": (lambda m, h: h.view(4, 6), "b"),
    "part": (lambda m, h: h[1:], "c"),
    "first part": (lambda m, h: h[:1], "b"),
    "weight": (lambda m, h: m.b.weight, "c"),
}


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("other", ADDRESSES)
def test_addresses_in_a_trace_say_what_those_of_the_model_do(other, looks):
    way, way_taken = ADDRESSES[other]
    base, x = Pointed(way, looks).eval(), torch.randn(4, 6)
    graph = ag.trace(base, x)
    assert graph.outputs == way_taken
    torch.testing.assert_close(base(x), base.get_submodule(way_taken)(base.a(x)))
    model = randomise(graph.splice("a", METHOD).compile(), 2.0)
    with torch.no_grad():
        h = base.a(x)
        expected = base.get_submodule(way_taken)(h + bottleneck(model.a.adapter, h))
        torch.testing.assert_close(model(x), expected)


class Harmless(Asking):
    """Asks, and does the same."""

    def forward(self, x):
        h = self.a(x)
        d = self.drop(h)
        self.same = d is h
        return self.b(d if d is not None else x) + h


@functools.lru_cache
def rows(size):
    """Computed with torch, once."""
    return int(torch.arange(size).numel())


class Remembers(Harmless):
    """Its first run does more than any other."""

    def forward(self, x):
        return super().forward(x) * rows(x.shape[0])


@pytest.mark.parametrize("make", [Harmless, Remembers])
def test_a_model_that_asks_and_does_the_same_is_hosted(make):
    rows.cache_clear()
    base, x = make().eval(), torch.randn(4, 6)
    graph = ag.trace(base, x)
    assert graph._nodes["b"].inputs == ("drop",)
    model = randomise(graph.splice("drop", METHOD).compile(), 2.0)
    with torch.no_grad():
        h = base.a(x)
        expected = base.b(h + bottleneck(model.drop.adapter, h)) + h
        torch.testing.assert_close(model(x), expected * (4 if make is Remembers else 1))


CALLS = []
DRAWS = {
    "python": random.random,
    "python, whole": lambda: random.randint(0, 10**9) / 1e9,
    "numpy": lambda: float(numpy.random.rand()),
}


class Noisy(nn.Module):
    """Draws a number, and has attention, which asks whether its arguments are one."""

    def __init__(self, draw, layer):
        super().__init__()
        self.draw, self.fc, self.layer = draw, linear(), layer

    def forward(self, x):
        h = self.fc(x) * (0.5 + self.draw())
        return self.layer(h, h, h)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(h)[0]


LAYERS = {
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "lstm": lambda: nn.LSTM(6, 6, batch_first=True),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_drawn_by_chance_are_the_same_in_both_runs(draw, layer):
    model, x = Noisy(DRAWS[draw], LAYERS[layer]()).eval(), torch.randn(2, 3, 6)
    assert asking(model.modules())
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    graph = ag.trace(model, x)
    assert graph._nodes["layer"].inputs
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(numpy.array_equal(a, b) for a, b in zip(states[2], numpy.random.get_state(), strict=True))


def count():
    CALLS.append(1)
    return float(len(CALLS))


@pytest.mark.parametrize("draw", [count, random.SystemRandom().random], ids=["counts", "unseeded"])
def test_a_model_that_is_never_the_same_is_refused_for_that_reason(draw):
    CALLS.clear()
    with pytest.raises(ag.GraphError) as error:
        ag.trace(Noisy(draw, LAYERS["attention"]()).eval(), torch.randn(2, 3, 6))
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert lines[0] == (
        "the forward of Noisy does something else each time it runs, and code in it asks whether two objects are one: "
        "whether it would go another way with a body is not known"
    )
    assert "in one run mul" in lines
    assert "in the next mul, which reads another value" in lines
    assert any(line.startswith("asks MultiheadAttention.forward, ") for line in lines)
    hint = (
        "let it draw from the global generators of torch, Python or numpy, which begin each run of a trace alike, "
        "and count nothing while it is traced"
    )
    assert f"to fix {hint}" in lines
    # without code that asks there is nothing to compare
    assert len(ag.trace(Noisy(draw, nn.Sequential(nn.Linear(6, 6))).eval(), torch.randn(2, 3, 6))) > 2


@pytest.mark.parametrize("same", [True, False])
def test_attention_asks_whether_its_arguments_are_one(same):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.attention = linear(), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            h = self.up(x)
            return self.attention(h, h, h if same else h + 1)[0]

    torch.manual_seed(0)
    base, x = Attending().eval(), torch.randn(2, 3, 6)
    assert asking(base.modules())
    model = randomise(ag.trace(base, x).splice("up", METHOD).compile(), 2.0)
    with torch.no_grad():
        h = base.up(x)
        h = h + bottleneck(model.up.adapter, h)
        torch.testing.assert_close(model(x), base.attention(h, h, h if same else h + 1)[0])


def constants(x, kind=None):
    return x is None or kind is not True or type(x) is Asking or x is torch.float32


def test_only_code_that_compares_variables_is_looked_at_twice():
    assert [text.split(",")[0] for text in asking([Branch()])] == ["Branch.forward"]
    assert asking([Asking(), linear(), nn.Dropout(), nn.BatchNorm1d(6), nn.GELU()]) == []
    found = [text.split(",")[0] for text in asking([AlsoDecorated(), Decorated(), AlsoDecorated()])]
    assert found == ["Decorated.forward"]
    host = Asking()
    host.forward = constants
    assert asking([host]) == []
    host.forward = functools.partial(one, 1)
    assert [text.split(",")[0] for text in asking([host])] == ["one"]
