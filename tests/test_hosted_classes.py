"""Hosts whose classes do something with subclasses, attributes or their forward: ours is no new class to them."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from typing import Generic, TypeVar

import byhand
import pytest
import torch
from models import snapshot
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(2)
REGISTERED: dict[str, type] = {}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Registering(nn.Module):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTERED[cls.__name__] = cls


class Registered(Layer, Registering):
    pass


class Once(nn.Module):
    def __init_subclass__(cls):
        if cls.__name__ in REGISTERED:
            raise RuntimeError(f"{cls.__name__} is registered already")
        REGISTERED[cls.__name__] = cls


class Unique(Layer, Once):
    pass


class Kinds(nn.Module):
    def __init_subclass__(cls, *, kind):
        cls.kind = kind


class Kind(Layer, Kinds, kind="dense"):
    pass


class Slotted(Layer, Registering):
    __slots__ = ("more",)


T = TypeVar("T")


class Typed(Layer, Generic[T]):
    pass


class TypedByHalf(Typed[torch.Tensor]):
    pass


class Locked(Layer):
    """Takes no attribute any more."""

    def __setattr__(self, name, value):
        if name != "training" and "inner" in self.__dict__.get("_modules", {}):
            raise AttributeError(f"locked: {name}")
        super().__setattr__(name, value)


class Described(Layer):
    """Its forward is another one for each module."""

    class Tripled:
        def __get__(self, module, cls=None):
            return self if module is None else lambda x: module.inner(x) * 3

    forward = Tripled()  # type: ignore[assignment]


class Partial(Layer):
    def times(self, factor, x):
        return self.inner(x) * factor

    forward = functools.partialmethod(times, 5)  # type: ignore[assignment]


class Static(Layer):
    @staticmethod
    def forward(x):
        return x * 2


CLASSES = [Registered, Unique, Kind, Slotted, Typed, TypedByHalf, Locked, Described, Partial, Static]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_host_of_a_class_of_its_own_kind(cls):
    registered, kind = dict(REGISTERED), getattr(cls, "kind", None)
    model = nn.Sequential(nn.Linear(8, 8), cls(), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    before, expected = snapshot(model), model(x)
    graph = ag.trace(model, x).splice("1", METHOD)
    assert torch.equal(graph.compile()(x), expected)
    adapted = byhand.randomise(graph.compile())
    handle = model[1].register_forward_hook(lambda module, args, out: adapted[1].adapter(out))
    hand = model(x)
    handle.remove()
    assert not torch.allclose(hand, expected)
    assert isinstance(adapted[1], cls)
    assert type(adapted[1]).__name__ == cls.__name__
    for same in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(same(x), hand)
    if cls is Unique:
        assert registered == REGISTERED
    assert getattr(adapted[1], "kind", None) == kind
    graph.compile(inplace=True)
    assert isinstance(model[1], cls)
    assert snapshot(ag.detach(model)) == before


def test_a_watched_class_is_one_graph_for_torch_compile():
    model = nn.Sequential(nn.Linear(8, 8), Registered()).eval()
    x = torch.randn(3, 8)
    adapted = byhand.randomise(ag.trace(model, x).splice("1", METHOD).compile())
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), adapted(x))


class Final(type):
    def __new__(mcs, name, bases, space):
        if any(isinstance(base, Final) for base in bases):
            raise TypeError(f"{bases[0].__name__} is final")
        return super().__new__(mcs, name, bases, space)


class Closed(Layer, metaclass=Final):
    pass


class ClosedNorm(nn.BatchNorm1d, metaclass=Final):
    """Frozen, it is kept in eval."""


@pytest.mark.parametrize(
    ("make", "at", "line"),
    [
        (Closed, "1", "'1' (Closed) cannot be a host: its class takes no subclass"),
        (lambda: ClosedNorm(8), "0", "ClosedNorm cannot be a host: its class takes no subclass"),
    ],
)
def test_a_class_that_takes_no_subclass(make, at, line):
    model = nn.Sequential(nn.Linear(8, 8), make())
    graph = ag.trace(model, torch.ones(2, 8)).splice(at, METHOD)
    before = snapshot(model)
    lines = (line, "it raises   TypeError: Closed", "is final", "splice at a module inside it")
    for inplace in (False, True):
        with pytest.raises(ag.BadSplice, match="(?s)" + ".*".join(map(re.escape, lines))):
            graph.compile(inplace=inplace)
        assert snapshot(model) == before


def test_inside_of_what_takes_no_subclass():
    model = nn.Sequential(nn.Linear(8, 8), Closed()).eval()
    x = torch.randn(3, 8)
    adapted = byhand.randomise(ag.trace(model, x).splice("1.inner", METHOD).compile())
    inner = nn.functional.linear(model[0](x), model[1].inner.weight, model[1].inner.bias)
    assert torch.equal(adapted(x), torch.tanh(adapted[1].inner.adapter(inner)))
