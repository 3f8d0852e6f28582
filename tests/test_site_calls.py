"""Bodies at hosts that are called several times, with values of one shape or of several."""

import pytest
import torch
from byhand import randomise
from test_sites import Round
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(2)


class Narrows(nn.Module):
    """`act` is called on values with eight features and with four, `norm` on three rows and on nine."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.act = nn.LayerNorm(8), nn.ReLU()
        self.first, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        wide = self.norm(torch.cat([self.norm(x), x, x]))
        return self.up(self.act(self.down(self.act(self.first(wide)))))


def narrows():
    return Narrows(), (x := torch.randn(3, 8)), ag.trace(Narrows(), x)


def test_a_body_of_one_size_at_a_host_of_two_sizes_is_refused_with_the_calls():
    graph = narrows()[2]
    with pytest.raises(ag.ShapeMismatch) as caught:
        graph.splice("act", METHOD)
    assert str(caught.value).splitlines() == [
        "body 'act.adapter' does not fit each call of its host",
        "    fits       act@0   9 × 8   torch.float32",
        "    does not   act@1   9 × 4   torch.float32",
        "    because    dense 'act.adapter.down' needs other parameters for what it reads",
        next(line for line in str(caught.value).splitlines() if "test_site_calls.py" in line),
        "  to fix      splice at one call, or at each a body of its own: 'act@0', 'act@1'",
    ]


def test_the_way_out_of_it_works():
    base, x, graph = narrows()
    graph = graph.splice("act@0", METHOD, name="wide").splice("act@1", METHOD, name="thin")
    model = randomise(graph.compile())
    wide, thin = model.act.wide_call0, model.act.thin_call1

    def serial(body, h):
        return h + body.up(torch.relu(body.down(h)))

    h = base.first(base.norm(torch.cat([base.norm(x), x, x])))
    h = serial(thin, torch.relu(base.down(serial(wide, torch.relu(h)))))
    torch.testing.assert_close(model(x), base.up(h))


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (lambda site: ag.dense(ag.nx(site.output, lambda t: t.sum(-1, keepdim=True)), 8), "the body gives 9 × 8 there"),
        (lambda site: ag.reshape(site.output, (9, 8)), "reshape 'act.adapter.reshape_0' does not fit what it reads"),
    ],
)
def test_a_body_that_gives_another_size_than_a_further_call_is_refused(method, why):
    with pytest.raises(ag.ShapeMismatch, match=f"because    {why}") as caught:
        narrows()[2].splice("act", method)
    assert "'act@0', 'act@1'" in str(caught.value)


@pytest.mark.parametrize("at", ["act", "norm"])
def test_a_body_that_takes_each_size_has_the_shape_of_each_call(at):
    base, x, graph = narrows()
    half = lambda site: ag.nx(site.output * 0.5, lambda t: t - t.mean(-1, keepdim=True))  # noqa: E731
    graph = graph.splice(at, half if at == "act" else METHOD)
    values = [(graph[read], graph[written]) for read, written in graph.bodies[f"{at}.adapter"].calls]
    assert [written.shape for _, written in values] == [read.shape for read, _ in values]
    assert [read.shape for read, _ in values] == ([(9, 8), (9, 4)] if at == "act" else [(3, 8), (9, 8)])
    model = randomise(graph.compile())

    def body(h, here):
        if here != at:
            return h
        if at == "act":
            return h * 0.5 - (h * 0.5).mean(-1, keepdim=True)
        return h + model.norm.adapter.up(torch.relu(model.norm.adapter.down(h)))

    h = torch.cat([body(base.norm(x), "norm"), x, x])
    h = base.first(body(base.norm(h), "norm"))
    h = base.down(body(torch.relu(h), "act"))
    torch.testing.assert_close(model(x), base.up(body(torch.relu(h), "act")))


def test_the_shapes_of_further_calls_come_back_from_a_file():
    graph = narrows()[2].splice("norm", METHOD)
    again = ag.Graph.from_json(graph.to_json())
    assert again == graph
    assert again["norm.adapter.down@1"].shape == (9, 2)


def test_calls_of_a_declared_layer_with_values_of_other_shapes():
    x, y = ag.input("x", shape=("batch", 8)), ag.input("y", shape=("batch", "seq", 8))
    one = ag.dense(x, 8, name="fc")
    graph = ag.Graph([one, ag.dense(y, 8, share=one)]).splice("fc", METHOD)
    assert graph["fc.adapter.down@1"].shape == ("batch", "seq", 2)
    model = randomise(graph.compile())
    given = torch.randn(3, 8), torch.randn(3, 5, 8)
    for mine, value in zip(model(*given), given, strict=True):
        h = model.fc(value)
        adapter = model.get_submodule("fc.adapter")
        torch.testing.assert_close(mine, h + adapter.up(torch.relu(adapter.down(h))))


def test_a_body_before_a_declared_layer_that_is_called_twice_on_one_value_runs_once_for_each_call():
    x = ag.input("x", shape=("batch", 8))
    one = ag.dense(x, 8, name="fc")
    graph = ag.Graph([one, ag.dense(x, 8, share=one)]).splice("fc", METHOD, where="before")
    assert [graph[call].inputs for call in ("fc", "fc@1")] == [("fc.adapter.residual",), ("fc.adapter.residual@1",)]
    model = randomise(graph.compile())
    given = torch.randn(3, 8)
    adapter = model.get_submodule("fc.adapter")
    expected = model.fc(given + adapter.up(torch.relu(adapter.down(given))))
    torch.testing.assert_close(model(given), (expected, expected))


def test_a_span_that_starts_at_a_layer_called_once_and_ends_at_one_called_twice():
    x = ag.input("x", shape=("batch", 8))
    first = ag.dense(x, 8, name="first")
    one = ag.dense(first, 8, name="fc")
    graph = ag.Graph(ag.dense(one, 8, share=one)).splice(ag.span("first", "fc"), ag.Bottleneck(2, parallel=True))
    model = randomise(graph.compile())
    given = torch.randn(3, 8)
    adapter = model.get_submodule("fc.adapter")
    more = adapter.up(torch.relu(adapter.down(given)))
    torch.testing.assert_close(model(given), model.fc(model.fc(model.first(given)) + more) + more)


class Remembers(nn.Module):
    """Takes a second value at the first call only; at the second the first argument has another name."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x=None, memory=None, late=None):
        h = self.fc(late if x is None else x)
        return h if memory is None else h + memory


class TwiceGiven(nn.Module):
    def __init__(self, late):
        super().__init__()
        torch.manual_seed(0)
        self.once, self.turn, self.late = nn.Linear(4, 4), Remembers(), late

    def forward(self, x):
        return self.turn(late=self.turn(x)) if self.late else self.turn(self.turn(x, self.once(x)))


def beside(name):
    return lambda site: site.output + ag.dense(site.inputs[name], 4, name="read")


@pytest.mark.parametrize(
    ("late", "method", "where", "argument"),
    [
        (False, beside("memory"), "around", "memory"),
        (True, beside("x"), "around", "x"),
        (True, lambda site: site.output + ag.dense(site.output, 4), "before", "x"),
    ],
)
def test_an_argument_that_a_further_call_is_not_given_is_refused(late, method, where, argument):
    base, x = TwiceGiven(late), torch.randn(2, 4)
    graph = ag.trace(base, x)
    with pytest.raises(ag.BadSplice) as caught:
        graph.splice("turn", method, where=where)
    first = (
        f"the body 'turn.adapter' reads the argument {argument!r} of each call of 'turn', and 'turn@1' is not given it"
    )
    assert str(caught.value).splitlines()[0] == first
    assert "to fix      splice at the calls that have it, such as 'turn@0'" in str(caught.value)
    assert graph.splice("turn@0", method, where=where).bodies


def test_an_argument_that_the_body_does_not_read_may_be_missing():
    base, x = TwiceGiven(False), torch.randn(2, 4)
    graph = ag.trace(base, x).splice("turn", beside("x"), where="around")
    model = randomise(graph.compile())
    read = model.turn.adapter.read
    h = base.turn(x, base.once(x)) + read(x)
    torch.testing.assert_close(model(x), base.turn(h) + read(h))


@pytest.mark.parametrize(
    ("method", "where", "way"),
    [
        (lambda site: site.output + ag.dense(site.graph["once"], 4), "before", "as the value of 'turn'"),
        (lambda site: site.output + ag.dense(site.input + site.graph["once"], 4), "around", "as the argument 'input'"),
    ],
)
def test_a_value_that_is_read_by_its_name_and_as_what_the_host_is_given_is_refused(method, where, way):
    graph = ag.trace(Round(), torch.randn(2, 4))
    with pytest.raises(ag.BadSplice) as caught:
        graph.splice("turn", method, where=where)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the body 'turn.adapter' reads 'once' in two ways, which are two values at the call 'turn@1'"
    assert sorted(" ".join(line.split()) for line in lines[1:3]) == sorted(["by its name once", f"{way} between"])
    assert "to fix      read it in one way, or splice at one call: 'turn@0'" in lines[-1]


def test_a_value_that_is_read_by_its_name_only_is_itself_at_each_call():
    base, x = Round(), torch.randn(2, 4)
    named = lambda site: site.output + ag.dense(site.graph["once"], 4, name="read")  # noqa: E731
    model = randomise(ag.trace(base, x).splice("turn", named, where="around").compile())
    once = base.once(x)
    more = model.turn.adapter.read(once)
    torch.testing.assert_close(model(x), base.turn(base.between(base.turn(once) + more)) + more)
