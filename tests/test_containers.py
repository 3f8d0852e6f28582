"""Modules that write into a dict or list they are given and return it: who gave it looks into it afterwards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from byhand import randomise
from test_attributes import METHOD, bottleneck, linear
from torch import Tensor, nn

import adaptergraph as ag


def plain(body, x):
    """What stands in a forward where no body is."""
    return x


class Host(nn.Module):
    """A linear, and where a forward modified by hand runs the body."""

    def __init__(self):
        super().__init__()
        self.fc = linear()
        self.adapted = plain

    def at_exit(self, x):
        return self.adapted(getattr(self, "adapter", None), x)


class Updates(Host):
    def forward(self, d):
        d["h"] = self.at_exit(self.fc(d["h"]))
        return d


class UpdatesLeaf(nn.Module):
    """The same without a child."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.adapted = plain

    def forward(self, d):
        d["h"] = self.adapted(getattr(self, "adapter", None), d["h"] * self.weight)
        return d


class Replaces(Host):
    """Writes into the first place of a list."""

    def forward(self, states):
        states[0] = self.at_exit(self.fc(states[0]))
        return states


class Inside(Host):
    """Returns a dict that lies in the one it was given, and was put there by itself."""

    def forward(self, d):
        d["inner"] = {"h": self.at_exit(self.fc(d["h"]))}
        return d["inner"]


class Around(Host):
    """Returns what it was given inside something new."""

    def forward(self, d):
        d["h"] = self.at_exit(self.fc(d["h"]))
        return {"all": (d, 1)}


class InTuple(Host):
    """A tuple in a list: another tuple in the same list."""

    def forward(self, states):
        states[0] = (self.at_exit(self.fc(states[0][0])), states[0][1])
        return states


class Model(nn.Module):
    """A module that hands its container on, and a forward that goes on with the old and the new name of it."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid, self.last = make(), linear(), linear()


class Dicts(Model):
    def forward(self, x):
        d = {"h": x}
        e = self.up(d)
        e["h"] = self.mid(e["h"])
        return self.last(d["h"])


class BothNames(Model):
    def forward(self, x):
        d = {"h": x}
        e = self.up(d)
        d["more"] = self.mid(e["h"])
        return self.last(d["h"]) * e["more"]


class Lists(Model):
    def forward(self, x):
        old = [x]
        new = self.up(old)
        new.append(self.mid(old[0]))
        return self.last(old[-1])


class Inner(Model):
    def forward(self, x):
        d = {"h": x}
        e = self.up(d)
        e["h"] = self.mid(d["inner"]["h"])
        return self.last(d["inner"]["h"])


class Outer(Model):
    def forward(self, x):
        d = {"h": x}
        e = self.up(d)
        e["all"][0]["h"] = self.mid(d["h"])
        return self.last(d["h"])


class Tuples(Model):
    def forward(self, x):
        old = [(x, x + 1)]
        new = self.up(old)
        new.append(self.mid(old[0][0]))
        return self.last(old[-1]) * old[0][1]


class Given(Model):
    """The container is the caller's."""

    def forward(self, d):
        e = self.up(d)
        e["h"] = self.mid(e["h"])
        return self.last(d["h"])


CASES = {
    "dict": (Dicts, Updates),
    "dict, leaf": (Dicts, UpdatesLeaf),
    "both names": (BothNames, Updates),
    "list": (Lists, Replaces),
    "inside the argument": (Inner, Inside),
    "around the argument": (Outer, Around),
    "tuple in a list": (Tuples, InTuple),
}


def by_hand(base, model):
    """The body of a compiled model written into the forward of its host."""
    base.up.adapter, base.up.adapted = model.up.adapter, lambda body, x: x + bottleneck(body, x)
    return base


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_into_a_returned_container_is_read_in_the_one_that_was_given(case):
    make, host = CASES[case]
    base, x = make(host), torch.randn(4, 6)
    graph = ag.trace(base, x)
    assert "mid" in graph._nodes["last"].inputs or "mid" in graph._nodes["/mul"].inputs
    adapted = graph.splice("up", METHOD)
    model = adapted.compile()
    assert torch.equal(model(x), base(x))
    randomise(model, 2.0)
    result = model(x)
    assert not torch.allclose(result, base(x))
    torch.testing.assert_close(result, by_hand(base, model)(x))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), result)


def test_a_container_of_the_caller_is_left_as_the_model_leaves_it():
    base, x = Given(Updates), torch.randn(4, 6)
    given = {"h": x}
    graph = ag.trace(base, given)
    assert list(given) == ["h"]
    assert given["h"] is x
    model = randomise(graph.splice("up", METHOD).compile(), 2.0)
    mine, theirs = {"h": x}, {"h": x}
    by_hand(base, model)
    for _ in range(2):
        torch.testing.assert_close(model(mine), base(theirs))
        torch.testing.assert_close(mine["h"], theirs["h"])


class HandsOn(Host):
    """Adds to what it is given, and returns all of it."""

    def forward(self, d):
        d["more"] = self.fc(d["h"])
        return d


class HandsOnLeaf(UpdatesLeaf):
    def forward(self, d):
        d["more"] = d["h"] * self.weight
        return d


class Passes(nn.Module):
    """Hands on what another one hands on."""

    def __init__(self):
        super().__init__()
        self.inner = HandsOn()

    def forward(self, d):
        return self.inner(d)


class Reads(Model):
    def forward(self, d):
        e = self.up(d)
        return self.last(e["h"]) * self.mid(e["more"])


@pytest.mark.parametrize("host", [HandsOn, HandsOnLeaf, Passes])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_no_body_writes_into_the_callers_container_what_the_model_would_not(kind, host):
    """A loop that gives the model one dict again and again would find the body's value in it."""
    base = Reads(host)
    graph = ag.trace(base, kind({"h": torch.randn(4, 6)}))
    with pytest.raises(ag.BadSplice) as error:
        graph.splice("up", METHOD)
    assert "the model itself reads what 'up' gives, and not only by way of its exit: on an attribute, in a dict" in str(
        error.value
    )
    model = randomise(graph.splice("up:more", METHOD).compile(), 2.0)
    given = kind({"h": torch.randn(4, 6)})
    with torch.no_grad():
        one, two = model(given), model(given)
        more = base.up({"h": given["h"]})["more"]
        body = getattr(model.up, next(iter(ag.graph_of(model).bodies)).rpartition(".")[2])
        expected = base.last(given["h"]) * base.mid(more + bottleneck(body, more))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, expected)
    # where the dict is made in the forward nobody else has it
    inside = ag.trace(Wrapped(base), torch.randn(4, 6)).splice("model.up", METHOD)
    randomise(inside.compile(), 2.0)(torch.randn(4, 6))


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model({"h": x})


class Constant(Host):
    """Returns one and the same dict at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(4, 6))

    def forward(self, x):
        if "kept" not in vars(self):
            self.kept = {"h": self.table}
        return self.kept


class UsesTable(Model):
    def forward(self, x):
        return self.last(self.up(x)["h"]) * self.mid(x)


def test_a_container_that_the_module_keeps_is_not_written_into():
    base, x = UsesTable(Constant), torch.randn(4, 6)
    model = randomise(ag.trace(base, x).splice("up", METHOD).compile(), 2.0)
    with torch.no_grad():
        one, two = model(x), model(x)
        table = base.up.table
        expected = base.last(table + bottleneck(model.up.adapter, table)) * base.mid(x)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, expected)
    assert model.up.kept["h"] is model.up.table


@dataclass
class Held:
    """What a module may keep and return."""

    h: Tensor


class ConstantObject(Constant):
    """The same with an object that is not copied."""

    def forward(self, x):
        if "kept" not in vars(self):
            self.kept = OrderedDict(h=self.table) if self.kind is OrderedDict else Held(self.table)
        return self.kept


class UsesObject(UsesTable):
    def forward(self, x):
        found = self.up(x)
        return self.last(found["h"] if self.up.kind is OrderedDict else found.h) * self.mid(x)


@pytest.mark.parametrize("kind", [OrderedDict, Held])
def test_no_body_writes_again_and_again_into_an_object_that_the_module_keeps(kind):
    base, x = UsesObject(ConstantObject), torch.randn(4, 6)
    base.up.kind = kind
    with pytest.raises(ag.BadSplice, match="the model itself reads what 'up' gives, and not only by way of its exit"):
        ag.trace(base, x).splice("up", METHOD)


class Passing(nn.Module):
    def forward(self, values):
        return values


class GivesTables(Model):
    """Gives a module a list that lies deep in an attribute."""

    def __init__(self, make):
        super().__init__(make)
        self.held = {"deep": [{"tables": [torch.randn(6), torch.randn(6)]}]}

    def forward(self, x):
        first, second = self.up(self.held["deep"][0]["tables"])
        return self.last(x * first) + second


def test_a_trace_leaves_nothing_in_a_list_that_the_model_keeps():
    base, x = GivesTables(Passing), torch.randn(4, 6)
    tables = base.held["deep"][0]["tables"]
    before = list(tables)
    expected = base(x)
    ag.trace(base, x)
    assert all(a is b for a, b in zip(tables, before, strict=True))
    assert torch.equal(base(x), expected)


class Twice(Host):
    """Returns one dict in two places."""

    def forward(self, d):
        d["h"] = self.fc(d["h"])
        return d, [d]


class ReadsTwice(Model):
    def forward(self, x):
        d = {"h": x}
        first, (second,) = self.up(d)
        assert first is second is d
        return self.last(first["h"]) * self.mid(second["h"])


def test_one_container_in_two_places_stays_one():
    base, x = ReadsTwice(Twice), torch.randn(4, 6)
    graph = ag.trace(base, x)
    assert graph._nodes["last"].inputs == graph._nodes["mid"].inputs == ("up.fc",)
    model = randomise(graph.splice("up", METHOD).compile(), 2.0)
    with torch.no_grad():
        h = base.up.fc(x)
        h = h + bottleneck(model.up.adapter, h)
        result: Tensor = model(x)
        torch.testing.assert_close(result, base.last(h) * base.mid(h))
