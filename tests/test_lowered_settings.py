"""What lowered code has as it was when it was lowered: a call in which it is another one is refused."""

import copy
import enum

import byhand
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import adaptergraph as ag

BODY = ag.Bottleneck(4)
GLOBAL = 2.0


class Config:
    def __init__(self):
        self.scale, self.kind, self.unread = 1.0, "tanh", 0


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.temperature, self.p = nn.Linear(8, 8), 1.0, 3.0

    def forward(self, x):
        return self.fc(x) * self.p


def helper(module, h):
    return h * getattr(module, "gain", 1.0) if hasattr(module, "has_gain") else h * module.shift


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Curve:
    def __call__(self, h):
        return h.cos()


class Line(Curve):
    def __call__(self, h):
        return h


class Block(nn.Module):
    """Reads all kinds of things off itself."""

    rate = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.child, self.items = nn.Linear(8, 8), Child(), nn.ModuleList([Child()])
        self.scale, self.config, self.on, self.shift = 1.0, Config(), True, 1.0
        self.scales, self.options, self.act, self.nothing = [1.0, 2.0], {"k": 1.0}, torch.tanh, None
        self.mode, self.sets, self.curve, self.more = Mode.FAST, {1, 2}, Curve(), [1.0]
        self.body = lambda h: h

    @property
    def doubled(self):
        return self.shift * 2

    def forward(self, x):
        h = self.q(x) * self.scale * self.scales[0] * self.options["k"] * self.rate * self.doubled
        h = helper(self, h) * self.child.temperature * self.items[0].temperature
        h = self.act(h) if self.config.kind == "tanh" else torch.relu(h)
        h = self.body(h + self.config.scale)
        if self.on and self.nothing is None and self.mode == Mode.FAST and 1 in self.sets:
            h = h * 2
        for factor in self.more:
            h = self.curve(h) * factor
        return self.child(h) + h


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **more):
        return self.inner(x, *args, **more)


def compiled(inner, at="inner/add"):
    base = Outer(inner).eval()
    return base, byhand.randomise(ag.trace(base, torch.randn(2, 5, 8)).splice(at, BODY).compile())


CHANGES = {
    "scale": lambda b: setattr(b, "scale", 5.0),
    "on": lambda b: setattr(b, "on", False),
    "scales[0]": lambda b: b.scales.__setitem__(0, 5.0),
    "options['k']": lambda b: b.options.__setitem__("k", 5.0),
    "rate": lambda b: setattr(b, "rate", 5.0),
    "shift": lambda b: setattr(b, "shift", 5.0),
    "act": lambda b: setattr(b, "act", torch.relu),
    "nothing": lambda b: setattr(b, "nothing", 1),
    "config.kind": lambda b: setattr(b.config, "kind", "relu"),
    "config.scale": lambda b: setattr(b.config, "scale", 5.0),
    "config": lambda b: setattr(b, "config", type("Other", (), {"kind": "tanh", "scale": 1.0})()),
    "child.temperature": lambda b: setattr(b.child, "temperature", 5.0),
    "items.0.temperature": lambda b: setattr(b.items[0], "temperature", 5.0),
    "mode": lambda b: setattr(b, "mode", Mode.SLOW),
    "sets": lambda b: b.sets.clear(),
    "curve": lambda b: setattr(b, "curve", Line()),
    "more": lambda b: b.more.append(2.0),
    "has_gain": lambda b: setattr(b, "has_gain", True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_was_changed_is_named(name):
    _, model = compiled(Block())
    x = torch.randn(3, 5, 8)
    before = model(x)
    CHANGES[name](model.inner)
    with pytest.raises(ag.GraphError) as error:
        model(x)
    text = str(error.value)
    assert text.startswith("in 'inner', the ")
    assert name in text.splitlines()[0]
    assert "splice at a module instead of an operation" in text
    # others have theirs
    assert torch.equal(compiled(Block())[1](x), before)


def test_a_list_that_became_shorter_and_a_number_that_became_a_tensor():
    _, model = compiled(Block())
    model.inner.scales.clear()
    with pytest.raises(ag.GraphError, match=r"in 'inner', the length of the attribute 'scales' is 0 here"):
        model(torch.randn(3, 5, 8))
    _, model = compiled(Block())
    model.inner.scale = torch.ones(8)
    with pytest.raises(ag.GraphError, match=r"'scale' is a tensor \(8,\) here, but the forward was lowered for 1.0"):
        model(torch.randn(3, 5, 8))


def test_what_only_modules_inside_read_and_what_nobody_reads_may_change():
    base, model = compiled(Block())
    body, x = byhand.Body(model.inner.adapter_add), torch.randn(3, 5, 8)
    for m in (base, model):
        m.inner.child.p = 7.0
        m.inner.config.unread = 9
        m.inner.other = 9
        m.inner.q = copy.deepcopy(m.inner.q)
    base.inner.body = lambda h: body(h, None)
    assert torch.equal(model(x), base(x))


def test_settings_hold_under_compile_in_copies_and_pickles(tmp_path):
    inner = Block()
    del inner.body
    inner.__class__ = Plain
    _, model = compiled(inner)
    x = torch.randn(3, 5, 8)
    wanted = model(x)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(fast(x), wanted)
    torch.save(model, tmp_path / "model")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model", weights_only=False)):
        assert torch.equal(other(x), wanted)
        other.inner.config.scale = 3.0
        with pytest.raises(ag.GraphError, match=r"'config.scale' is 3.0 here"):
            other(x)
    assert torch.equal(model(x), wanted)
    model.inner.config.scale = 3.0
    # no other result: torch.compile shows the line that refuses
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"OtherWay|program\.py"):
        fast(x)


class Plain(Block):
    """The same without a function that nobody can pickle."""

    def body(self, h):
        return h


def test_another_kind_of_attention():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    base, ids = BertModel(config).eval(), torch.randint(0, 50, (2, 6))
    model = ag.trace(base, input_ids=ids).splice("encoder.layer.*.attention.self/transpose", BODY).compile()
    model.set_attn_implementation("eager")
    with pytest.raises(
        ag.GraphError, match=r"_attn_implementation.* is 'eager' here, but the forward was lowered for 'sdpa'"
    ):
        model(ids)


# ---------------------------------------------------------------------- in place, dtypes, numbers


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("bias", torch.ones(8))
        self.body = lambda h: h


class Argument(InPlace):
    """Writes into what its caller goes on with."""

    def forward(self, x):
        x += self.a(x)
        x *= 2
        return (self.body(self.b(x).tanh()) * 2.0).sin()


class Own(InPlace):
    """Keeps its dtype where a sum would not."""

    def forward(self, x):
        h = self.a(x)
        h += self.bias
        h -= 1
        return (self.body(h.tanh()) * 2.0).sin() + h


class Goes(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), inner

    def forward(self, x):
        h = self.first(x)
        y = self.inner(h)
        return y + h


@pytest.mark.parametrize("cls", [Argument, Own])
def test_operators_that_write_in_place(cls):
    base = Goes(cls()).eval().requires_grad_(False)
    model = byhand.randomise(ag.trace(base, torch.randn(3, 8)).splice("inner/tanh", BODY).compile())
    body, x = byhand.Body(model.inner.adapter_tanh), torch.randn(4, 8)
    base.inner.body = lambda h: body(h, None)
    assert torch.equal(model(x), base(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(x), base(x)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


class Slices(InPlace):
    """Writes into slices of what it computed."""

    def forward(self, x):
        h = self.body(self.a(x) * 2)
        h[:, 0] = 0
        h[..., 1:3] += x[..., :2]
        return self.b(h).tanh() + h


class After(InPlace):
    """What comes after it has a body."""

    def forward(self, x):
        h = self.a(x)
        h[:, 0] = x[:, 1]
        h = self.body(h * 2)
        return self.b(h) * h


@pytest.mark.parametrize("cls", [Slices, After])
def test_slices_that_are_written(cls):
    base = Goes(cls()).eval().requires_grad_(False)
    model = byhand.randomise(ag.trace(base, torch.randn(3, 5, 8)).splice("inner/mul", BODY).compile())
    body, x = byhand.Body(model.inner.adapter_mul), torch.randn(4, 6, 8)
    base.inner.body = lambda h: body(h, None)
    found, wanted = model(x), base(x)
    assert torch.equal(found, wanted)
    found.pow(2).sum().backward()
    wanted.pow(2).sum().backward()
    for mine, hand in zip(model.inner.adapter_mul.parameters(), body.values(), strict=True):
        assert torch.equal(mine.grad, hand.grad)


class Cast(InPlace):
    """Asks for a dtype to go back to it."""

    def forward(self, x):
        q = self.a(x)
        w = (q @ x.transpose(1, 2)).softmax(-1, dtype=torch.float32).to(q.dtype)
        h = self.body(w @ self.b(x) + x)
        return h.relu() * h


class Knows(InPlace):
    """A function has to know the dtype."""

    def forward(self, x):
        h = self.body(self.a(x) + x)
        return h.clamp(min=torch.finfo(h.dtype).min) * h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_that_is_asked_for_is_that_of_the_call(dtype):
    base, model = compiled(Cast())
    body = byhand.Body(model.inner.adapter_add).to(dtype)
    base.inner.body = lambda h: body(h, None)
    x = torch.randn(2, 5, 8, dtype=dtype)
    assert torch.equal(model.to(dtype)(x), base.to(dtype)(x))


def test_under_autocast_it_is_that_of_autocast():
    base, model = compiled(Cast())
    body = byhand.Body(model.inner.adapter_add)
    base.inner.body = lambda h: body(h, None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(torch.ones(2, 5, 8)), base(torch.ones(2, 5, 8)))


def test_a_dtype_that_a_function_has_to_know_is_the_traced_one():
    base, model = compiled(Knows())
    assert not torch.equal(model(torch.ones(2, 5, 8)), base(torch.ones(2, 5, 8)))
    with pytest.raises(
        ag.GraphError, match=r"in 'inner', .*dtype is torch.bfloat16 here, but the forward was lowered for"
    ):
        model.bfloat16()(torch.ones(2, 5, 8, dtype=torch.bfloat16))


class Steps(InPlace):
    def forward(self, x, steps=3):
        h = self.body(self.a(x) + x)
        for _ in range(steps):
            h = self.b(h) * h
        *outer, size = h.shape
        return h.view(*outer, 2, size // 2).flatten(-2)


def test_a_number_that_a_call_gives_is_fixed_and_sizes_are_not():
    base, model = compiled(Steps())
    body = byhand.Body(model.inner.adapter_add)
    base.inner.body = lambda h: body(h, None)
    x = torch.randn(4, 3, 8)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model(x, 3), base(x, 3))
    with pytest.raises(
        ag.GraphError, match="in 'inner', the argument 'steps' is 2 here, but the forward was lowered for 3"
    ):
        model(x, 2)


class OverTime(InPlace):
    def forward(self, x):
        h = self.a(x) + x
        return torch.stack([self.b(h[:, t]) for t in range(h.shape[1])], 1) * h


class Asks(InPlace):
    def forward(self, x):
        h = self.a(x) + x
        return self.b(h) * h if h.requires_grad else self.b(h) + h


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (OverTime, "it needs a size as a plain number"),
        (Asks, "it asks 'requires_grad', which is another one in training"),
    ],
)
def test_what_cannot_be_lowered(cls, why):
    graph = ag.trace(Outer(cls()), torch.randn(2, 5, 8)).splice("inner/add", BODY)
    with pytest.raises(ag.BadSplice, match="is an operation inside a forward that cannot be reached") as error:
        graph.compile()
    assert why in str(error.value)
