"""Forwards that look at more than their tensors: lowered right or refused, never silently another one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptergraph as ag


class Block(nn.Module):
    """A block with a sum that gets a body, and a second step that subclasses write."""

    at = "0/add"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.last, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.register_buffer("scale", torch.rand(8))
        self.sign, self.p = 1.0, 0.5


class Loop(Block):
    def forward(self, x):
        h = x + self.fc(x)
        for row in h.unbind(1):
            h = h * torch.tanh(self.last(row))[:, None]
        return h


class Rank(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h * self.last(h) if x.dim() == 3 else h - self.last(h)


class Setting(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h) * self.sign


class Buffer(Block):
    at = "0/add_1"

    def forward(self, x):
        scale = self.scale + 1
        h = x + scale * self.fc(x)
        return h + self.last(h) * scale


class Noise(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h) * torch.randn(8)


class Property(Block):
    @property
    def rate(self):
        return self.p if self.training else 0.0

    def forward(self, x):
        h = x + self.fc(x)
        return h + F.dropout(self.last(h), self.rate)


class Mode(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h + F.dropout(self.last(h), training=self.drop.training)


class Gradients(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h) if torch.is_grad_enabled() else h - self.last(h)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h)


class Helper(Block):
    def frozen(self, h):
        with torch.no_grad():
            return self.last(h)

    def forward(self, x):
        h = x + self.fc(x)
        return h + self.frozen(h)


class Further(Block):
    def forward(self, x, **kwargs):
        h = x + self.fc(x)
        return h + self.last(h) * kwargs.get("scale", 1.0)


class Kind(Block):
    def forward(self, x, mask=None):
        h = x + self.fc(x)
        return h + self.last(h * mask if isinstance(mask, Tensor) else h)


class Masked(Kind):
    """Gives the mask itself, in a block of its own."""

    at = "0.inner/add"

    def __init__(self):
        super().__init__()
        self.inner = Kind()

    def forward(self, x):
        return self.inner(x, torch.ones_like(x))


class Same(Block):
    def forward(self, x, y=None):
        h = x + self.fc(x)
        return h + self.last(h) if y is x else h - self.last(h)


class Leaves(Block):
    def forward(self, x):
        h = x + self.fc(x)
        self.kept = h.mean()
        return h + self.last(h)


class Stores(Block):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x):
        self.kept["h"] = h = x + self.fc(x)
        return h + self.last(h)


class Collects(Block):
    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, x):
        h = x + self.fc(x)
        self.kept.append(h)
        return h + self.last(h)


class Renews(Block):
    def moved(self, h):
        self.scale = self.scale + h.mean()

    def forward(self, x):
        h = x + self.fc(x)
        self.moved(h)
        return h + self.last(h) * self.scale


class Tells(Block):
    """Sets an attribute on a module that is not inside it."""

    def forward(self, x):
        h = x + self.fc(x)
        self.others[0].kept = h
        return h + self.last(h)


class Drops(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h if torch.rand(()) > 1.0 - self.p * self.training else h + self.last(h)


class Tries(Block):
    def forward(self, x):
        h = x + self.fc(x)
        try:
            return h + self.last(h) / self.p
        except ZeroDivisionError:
            return h


class TriesInside(Block):
    def safe(self, h):
        try:
            return self.last(h) / self.p
        except ZeroDivisionError:
            return h

    def forward(self, x):
        h = x + self.fc(x)
        return h + self.safe(h)


class New(Block):
    """Makes a tensor where its argument is."""

    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h) * torch.arange(8, device=h.device)


class Away(Block):
    """Asks where its argument is."""

    def forward(self, x):
        h = x + self.fc(x)
        return h + self.last(h) if x.device.type == "cpu" else h


class Fast(Block):
    def forward(self, x):
        h = x + self.fc(x)
        return h if x.is_meta else h + self.last(h)


class Writes(Block):
    def forward(self, x):
        self.scale.mul_(0.5)
        h = x + self.fc(x)
        return h + self.last(h) * self.scale


def compiled(cls, *args):
    base = nn.Sequential(cls(), nn.Linear(8, 8)).eval()
    graph = ag.trace(base, *(args or (torch.ones(2, 5, 8),)))
    model = graph.splice(cls.at, ag.Bottleneck(2)).compile()
    # a bias that moves the value: the same as adding it by hand to the sum
    for name, parameter in model.named_parameters():
        if "adapter" in name and name.endswith("up.bias"):
            parameter.data.fill_(2.0)
    return base, model


def by_hand(base, x):
    """The sum moved by two: the same forward with the first layer's bias moved."""
    base[0].fc.bias.data += 2.0
    return base(x)


@pytest.mark.parametrize("cls", [Loop, Rank, Setting, Noise, Property, New, Away, Fast])
@pytest.mark.parametrize("mode", [False, True])
def test_lowered_forwards_equal_the_same_change_by_hand(cls, mode):
    base, model = compiled(cls)
    x = torch.randn(2, 5, 8)
    base.train(mode), model.train(mode)
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found, by_hand(base, x))


def test_an_operation_on_a_buffer_is_counted_and_follows_the_buffer():
    base, model = compiled(Buffer)
    x = torch.randn(2, 5, 8)
    for m in (base, model):
        m[0].scale.fill_(3.0)
    found = model(x)
    # the frozen bias is in the same storage
    base[0].fc.bias.data += 2.0 / 4.0
    torch.testing.assert_close(found, base(x))


@pytest.mark.parametrize(
    ("cls", "change", "what"),
    [
        (Loop, lambda m: m(torch.randn(2, 7, 8)), "the length of unbind is 7 here, but the forward was lowered for 5"),
        (Rank, lambda m: m(torch.randn(5, 8)), "the number of dimensions of x is 2 here"),
        (Setting, lambda m: (setattr(m[0], "sign", -1.0), m(torch.ones(2, 5, 8))), "the attribute 'sign' is -1.0 here"),
        (
            Away,
            lambda m: m.to("meta")(torch.ones(2, 5, 8, device="meta")),
            r"what it branches on \(.* == .*\) is False here",
        ),
        (Fast, lambda m: m.to("meta")(torch.ones(2, 5, 8, device="meta")), " is True here, but the forward"),
    ],
)
def test_a_call_that_would_go_another_way_is_refused(cls, change, what):
    _, model = compiled(cls)
    with pytest.raises(ag.GraphError, match=what):
        change(model)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Mode, "it asks for the mode of another module"),
        (Gradients, "it asks 'is_grad_enabled'"),
        (Decorated, "it runs a part of itself without gradients, or in another precision"),
        (Helper, "it runs a part of itself without gradients, or in another precision"),
        (Further, "it looks at its further keyword arguments"),
        (Masked, "it asks for the kind of a value: isinstance"),
        (Same, "it asks whether two values are the same object"),
        (Leaves, "it sets the attribute 'kept'"),
        (Stores, "it sets the attribute 'kept'"),
        (Collects, "it sets the attribute 'kept'"),
        (Renews, "it sets the attribute '_buffers'"),
        (Drops, "it branches on what a value is"),
        (Tries, "it goes another way where an error is raised, in a `try` block"),
        (TriesInside, "it goes another way where an error is raised, in a `try` block"),
    ],
)
def test_a_forward_that_cannot_be_followed_is_refused_and_left_alone(cls, why):
    base = nn.Sequential(cls(), nn.Linear(8, 8)).eval()
    before = {n: dict(vars(m)) for n, m in base.named_modules()}
    graph = ag.trace(base, torch.ones(2, 5, 8)).splice(cls.at, ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match=why):
        graph.compile(inplace=True)
    for name, module in base.named_modules():
        assert all(before[name].get(k) is v for k, v in vars(module).items()), name
        assert not vars(module).get("kept")
        assert all(type(b) is torch.Tensor for b in module.buffers())


def test_a_device_is_asked_for_in_each_call():
    _, model = compiled(New)
    found = model.to("meta")(torch.ones(2, 5, 8, device="meta"))
    assert found.device.type == "meta"


def test_a_forward_that_sets_an_attribute_of_another_module_is_refused():
    base = nn.Sequential(Tells(), nn.Linear(8, 8)).eval()
    base[0].others = [base[1]]
    graph = ag.trace(base, torch.ones(2, 5, 8)).splice("0/add", ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match="it sets the attribute 'kept'"):
        graph.compile(inplace=True)
    assert "kept" not in vars(base[1])


def test_the_kind_of_an_argument_that_was_none_is_checked_in_each_call():
    base = nn.Sequential(Kind(), nn.Linear(8, 8)).eval()
    x = torch.ones(2, 5, 8)
    model = ag.trace(base, x).splice("0/add", ag.Bottleneck(2)).compile()
    assert torch.equal(model(x), base(x))
    with pytest.raises(ag.GraphError, match="the argument 'mask' is"):
        model[0](x, mask=torch.ones_like(x))


def test_lowering_leaves_buffers_as_they_were():
    base = nn.Sequential(Writes(), nn.Linear(8, 8)).eval()
    before = base[0].scale.clone()
    graph = ag.trace(base, torch.ones(2, 5, 8)).splice("0/add", ag.Bottleneck(2))
    model = graph.compile(inplace=True)
    assert torch.equal(model[0].scale, before)
    model(torch.ones(2, 5, 8))
    assert torch.equal(model[0].scale, before * 0.5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        return {"last": h, "all": (x, h)}


class ReadsTheOther(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.last = Twice(), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.body(x)["all"][1])


def test_a_value_that_a_module_returns_in_two_places_is_replaced_in_both():
    base, x = ReadsTheOther(), torch.randn(2, 8)
    model = ag.trace(base, x).splice("body", ag.Bottleneck(2)).compile()
    model.get_submodule("body.adapter.up").bias.data.fill_(2.0)
    torch.testing.assert_close(model(x), base.last(base.body(x)["last"] + 2.0))


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.kept = {}

    def forward(self, x):
        if not self.kept:
            self.kept = {"h": self.fc(x)}
        return self.kept


class AsksTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Keeps()

    def forward(self, x):
        return self.body(x)["h"], self.body(x)["h"]


def test_a_body_changes_nothing_that_its_host_keeps():
    base, x = AsksTwice(), torch.randn(2, 8)
    model = ag.trace(base, x).splice("body", ag.Bottleneck(2)).compile()
    model.get_submodule("body.adapter.up").bias.data.fill_(2.0)
    for found in model(x):
        torch.testing.assert_close(found, base.body.fc(x) + 2.0)
