"""Structures that a module returns and that their class alone would not make again with another tensor in them."""

import dataclasses
import types
from collections.abc import Mapping

import pytest
import torch
from byhand import randomise
from torch import Tensor, nn

import adaptergraph as ag


@dataclasses.dataclass(frozen=True)
class Derived:
    h: Tensor
    twice: Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", self.h * 2)


@dataclasses.dataclass(frozen=True)
class Given:
    h: Tensor
    size: dataclasses.InitVar[int]


class Pair(tuple):
    def __new__(cls, one, two):
        return super().__new__(cls, (one, two))


class Const(Mapping):
    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, name):
        return self.items_[name]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


KINDS = {
    "derived": (Derived, lambda r: r.h + r.twice),
    "init": (lambda h: Given(h, 3), lambda r: r.h),
    "tuple": (lambda h: Pair(h, h * 2), lambda r: r[0] + r[1]),
    "proxy": (lambda h: types.MappingProxyType({"h": h}), lambda r: r["h"]),
    "mapping": (lambda h: Const(h=h), lambda r: r["h"]),
}


class Inner(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.fc, self.make = nn.Linear(4, 4), make

    def forward(self, x):
        return self.make(self.fc(x))


class Model(nn.Module):
    def __init__(self, make, read):
        super().__init__()
        self.i, self.o, self.read = Inner(make), nn.Linear(4, 4), read

    def forward(self, x):
        return self.o(self.read(self.i(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_inside_is_seen(kind):
    make, read = KINDS[kind]
    base, x = Model(make, read).eval(), torch.randn(3, 4)
    model = randomise(ag.trace(base, x).splice("i.fc", ag.Bottleneck(2)).compile(), 2.0)
    body, h = model.i.fc.adapter, base.i.fc(x)
    torch.testing.assert_close(model(x), base.o(read(make(h + body.up(torch.relu(body.down(h)))))))


@pytest.mark.parametrize("kind", ["derived", "init", "tuple"])
def test_a_body_at_it_replaces_its_first_tensor(kind):
    make, read = KINDS[kind]
    base, x = Model(make, read).eval(), torch.randn(3, 4)
    model = randomise(ag.trace(base, x).splice("i", ag.Bottleneck(2)).compile(), 2.0)
    body, h = model.i.adapter, base.i.fc(x)
    expected = base.o(read(make(h)) + body.up(torch.relu(body.down(h))))
    torch.testing.assert_close(model(x), expected)
    assert type(model.i(x)) is type(base.i(x))


@pytest.mark.parametrize("kind", ["proxy", "mapping"])
def test_what_cannot_be_written_to_is_no_place_for_a_body(kind):
    graph = ag.trace(Model(*KINDS[kind]).eval(), torch.randn(3, 4))
    with pytest.raises(ag.BadSplice, match=r"'i' \(Inner\) returns no float tensor: a body has nothing to work on"):
        graph.splice("i", ag.Bottleneck(2))
