"""The graph as a value: names that never move, surgery, freezing, and what must always hold."""

import copy
import pickle
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter


def x(width=8, name="x"):
    return ag.input(name, shape=("batch", width))


def chain():
    """x → a → act → b → out."""
    h = ag.relu(ag.dense(x(), 8, name="a"), name="act")
    return ag.Graph(ag.tanh(ag.dense(h, 8, name="b"), name="out"))


def diamond():
    """x → a → (l, r) → sum."""
    a = ag.dense(x(), 8, name="a")
    return ag.Graph(ag.add([ag.relu(a, name="l"), ag.tanh(a, name="r")], name="sum"))


def run(graph, seed=0, **more):
    torch.manual_seed(0)
    given = {n: torch.randn(3, *node.shape[1:]) for n, node in graph.inputs.items()}
    return graph.compile(seed=seed)(**{**given, **more})


def scaled(t, k):
    return t * k


def bottleneck(size=2, **options):
    """One that changes what it is put on."""
    return ag.Bottleneck(size, init="normal", activation="gelu", scale=1000.0, **options)


# ---------------------------------------------------------------------- making one


def test_a_graph_is_a_table_in_topological_order():
    graph = chain()
    assert list(graph) == ["x", "a", "act", "b", "out"]
    assert len(graph) == 5
    assert "act" in graph
    assert "nope" not in graph
    assert graph["b"].inputs == ("act",)
    assert graph["b"].shape == ("batch", 8)
    assert graph["b"].dtype == torch.float32
    assert graph.output_names() == ("out",)
    assert list(graph.inputs) == ["x"]
    assert graph.consumers["a"] == ("act",)
    assert list(graph.params) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert repr(graph) == "<Graph: declared, 5 nodes, outputs out>"
    assert repr(graph["b"]) == "<b: dense batch × 8>"


def test_names_are_given_once_and_in_the_order_of_reading():
    one, two = ag.dense(x(), 4), ag.dense(ag.input("y", shape=("batch", 3)), 4)
    assert list(ag.Graph(ag.concatenate([two, one]))) == ["y", "x", "dense_0", "dense_1", "concatenate_0"]


def test_a_made_up_name_keeps_clear_of_given_ones():
    h = ag.dense(ag.dense(ag.dense(x(), 8), 8, name="dense_0"), 8, name="dense_2")
    assert list(ag.Graph(ag.dense(h, 8))) == ["x", "dense_1", "dense_0", "dense_2", "dense_3"]


def test_inputs_come_first_in_the_order_of_reading():
    graph = ag.Graph(ag.relu(x(), name="r") + ag.input("y", shape=("batch", 8)))
    assert list(graph) == ["x", "y", "r", "add_0"]
    one, two = torch.randn(2, 8), torch.randn(2, 8)
    assert torch.equal(graph.compile()(one, two), one.relu() + two)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.splice("dense_0", ag.Bottleneck(2)),
        lambda g: g.splice("dense_1", lambda s: ag.dense(ag.dense(s.output, 8), 8)),
        lambda g: g.replace("relu_0", ag.gelu(g["dense_0"])),
        lambda g: g.replace("relu_0", ag.dense(ag.dense(g["dense_0"], 8), 8)),
        lambda g: g.remove("relu_0"),
        lambda g: g.rename("relu_0", "other"),
        lambda g: g.tap("dense_0"),
        lambda g: g.freeze().unfreeze("dense_1"),
        lambda g: g.truncate("dense_1"),
        lambda g: g.splice("*", ag.Bottleneck(2)).unsplice(),
    ],
)
def test_surgery_renames_nothing(change):
    h = ag.dense(ag.relu(ag.dense(x(), 8)), 8)
    graph = ag.Graph(ag.dense(h, 8))
    changed = change(graph)
    for name in graph:
        if name in changed and name != "relu_0":
            assert changed[name].op == graph[name].op
            assert changed[name].params == graph[name].params
    assert list(graph) == ["x", "dense_0", "relu_0", "dense_1", "dense_2"], "the graph itself is as it was"


def test_the_same_node_is_one_node_wherever_it_is_read():
    a = ag.dense(x(), 8, name="a")
    graph = ag.Graph(ag.add([a, a]))
    assert list(graph) == ["x", "a", "add_0"]
    assert graph["add_0"].inputs == ("a", "a")
    given = torch.randn(2, 8)
    model = graph.compile()
    assert torch.equal(model(given), 2 * model.a(given))
    spliced = graph.splice("a", bottleneck())
    assert spliced["add_0"].inputs == ("a.adapter.residual",) * 2


def test_two_nodes_of_one_name_are_refused_with_both_lines():
    first = ag.dense(x(), 8, name="fc")
    with pytest.raises(ag.DuplicateName) as caught:
        ag.Graph(ag.dense(first, 8, name="fc"))
    text = str(caught.value).splitlines()
    assert text[0] == "two different nodes are called 'fc'"
    assert "test_graph.py" in text[1]
    assert 'first = ag.dense(x(), 8, name="fc")' in text[1]
    assert 'ag.Graph(ag.dense(first, 8, name="fc"))' in text[2]
    assert caught.value.node == "fc"


@pytest.mark.parametrize("form", [tuple, list, lambda v: dict(zip("ab", v, strict=True))])
def test_outputs_come_back_in_the_form_they_were_given(form):
    given = x()
    one, two = ag.relu(given, name="one"), ag.tanh(given, name="two")
    graph = ag.Graph(form([one, two]))
    out = run(graph)
    assert type(out) is (dict if isinstance(form([1, 2]), dict) else tuple)
    assert graph.output_names() == ("one", "two")
    values = list(out.values()) if isinstance(out, dict) else out
    assert torch.equal(values[1], values[1].clamp(-1, 1))


def test_one_node_may_be_two_outputs_and_an_input_may_be_one():
    node = ag.relu(x(), name="r")
    out = run(ag.Graph({"a": node, "b": node, "x": node.inputs[0]}))
    assert torch.equal(out["a"], out["b"])
    assert torch.equal(out["a"], out["x"].relu())


def test_a_list_of_one_is_a_tuple_of_one():
    assert isinstance(run(ag.Graph([ag.relu(x())])), tuple)


# ---------------------------------------------------------------------- equality


def test_equal_is_structural():
    assert chain() == chain()
    assert hash(chain()) == hash(chain())
    assert chain() != diamond()
    assert chain() != chain().freeze("a")
    assert chain() != chain().splice("a", ag.Bottleneck(2))
    assert chain() != chain().tap("a")
    assert chain() != 5
    assert chain().freeze("a").unfreeze("a") == chain()


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (lambda: ag.constant(torch.ones(8)), lambda: ag.constant(torch.ones(8)), True),
        (lambda: ag.constant(torch.ones(8)), lambda: ag.constant(torch.zeros(8)), False),
        (lambda: ag.constant(torch.ones(8)), lambda: ag.constant(torch.ones(1)), False),
        (lambda: ag.constant(1), lambda: ag.constant(1.0), False),
        (lambda: ag.relu(ag.layer(torch.sum, [x(name="y")], dim=1, keepdim=True)),) * 2 + (True,),
        (
            lambda: ag.layer(torch.sum, [x(name="y")], dim=[1], keepdim=True),
            lambda: ag.layer(torch.sum, [x(name="y")], dim=[0], keepdim=True),
            False,
        ),
        (
            lambda: ag.layer(lambda t, k: t * k, [x(name="y")], k=1),
            lambda: ag.layer(lambda t, k: t * k, [x(name="y")], k=1),
            False,
        ),
        (lambda: ag.layer(scaled, [x(name="y")], k=1), lambda: ag.layer(scaled, [x(name="y")], k=True), False),
        (lambda: ag.layer(scaled, [x(name="y")], k=1), lambda: ag.layer(scaled, [x(name="y")], k=1), True),
    ],
)
def test_options_are_compared_by_value(one, two, same):
    assert (ag.Graph(x() * one()) == ag.Graph(x() * two())) is same


def test_copies():
    graph = chain().freeze("a").splice("b", ag.Bottleneck(2))
    assert copy.deepcopy(graph) is graph
    again = pickle.loads(pickle.dumps(graph))
    assert again == graph
    assert again.splices == graph.splices
    assert again.check() is again
    assert again.unsplice() == chain().freeze("a")


# ---------------------------------------------------------------------- handles


def test_a_handle_can_be_read_by_further_calls():
    graph = chain()
    more = ag.Graph(ag.dense(graph["act"], 3, name="head"))
    assert list(more) == ["x", "a", "act", "head"]
    assert run(more).shape == (3, 3)
    both = ag.Graph({"old": graph["out"], "new": ag.dense(graph["act"], 3, name="head")})
    assert list(both) == ["x", "a", "act", "b", "out", "head"]


def test_what_was_built_upon_keeps_what_it_knew():
    graph = chain().freeze().splice("a", ag.Bottleneck(2))
    more = ag.Graph(ag.dense(graph["act"], 3, name="head"))
    assert list(more.bodies) == ["a.adapter"]
    assert [s.hosts for s in more.splices] == [("a",)]
    assert {n.partition(".")[0] for n, t in more.trained.items() if not t} == {"a"}
    assert more.trained["a.adapter.up.weight"]
    assert more.unsplice("a") == ag.Graph(ag.dense(chain().freeze()["act"], 3, name="head"))


def test_a_new_node_starts_trained_whatever_had_its_name():
    graph = chain().freeze()
    assert ag.Graph(ag.dense(graph["act"], 3, name="b")).trained["b.weight"]
    assert graph.replace("b", ag.dense(graph["act"], 8)).trained["b.weight"]


def test_a_body_that_is_cut_is_one_no_more():
    graph = chain().splice("a", ag.Bottleneck(2))
    cut = ag.Graph(ag.relu(graph["a.adapter.down"]))
    assert not cut.bodies
    assert not cut.splices
    assert cut["a.adapter.down"].body is None
    assert cut.check()


def test_nodes_of_two_graphs():
    graph = chain()
    spliced = graph.splice("a", ag.Bottleneck(2))
    with pytest.raises(ag.DuplicateName, match="two different nodes are called"):
        ag.Graph(ag.add([graph["out"], spliced["out"]]))
    other = ag.Graph(ag.relu(ag.input("z", shape=("batch", 8)), name="other"))
    joined = ag.Graph(ag.add([graph["out"], other["other"]]))
    assert list(joined.inputs) == ["x", "z"]


# ---------------------------------------------------------------------- splicing


def test_a_splice_repoints_the_consumers():
    graph = diamond()
    spliced = graph.splice("a", ag.Bottleneck(2))
    body = [f"a.adapter.{p}" for p in ("down", "act", "up", "residual")]
    assert list(spliced) == ["x", "a", *body, "l", "r", "sum"]
    assert spliced["l"].inputs == spliced["r"].inputs == ("a.adapter.residual",)
    assert graph.diff(spliced) == (tuple(body), (), ("l", "r"))
    assert spliced.diff(graph) == ((), tuple(body), ("l", "r"))
    assert spliced.bodies["a.adapter"].calls == (("a", "a.adapter.residual"),)
    assert all(spliced[n].body == "a.adapter" for n in body)
    assert spliced.unsplice() == graph


def test_a_splice_at_the_output_and_at_an_input():
    graph = chain()
    end = graph.splice("out", bottleneck())
    assert end.output_names() == ("out.adapter.residual",)
    start = graph.splice("x", bottleneck())
    assert start["a"].inputs == ("x.adapter.residual",)
    assert list(start.inputs) == ["x"]
    for one in (end, start):
        assert one.unsplice() == graph
        model = one.compile()
        assert not torch.equal(run(one), run(graph))
        assert set(model.state_dict()) > set(graph.compile().state_dict())


def test_bodies_at_one_place_run_in_the_order_they_came():
    graph = chain()
    two = graph.splice("a", bottleneck()).splice("a", bottleneck(3), name="second")
    assert two["a.second.down"].inputs == ("a.adapter.residual",)
    assert two["act"].inputs == ("a.second.residual",)
    assert two.unsplice("a.second") == graph.splice("a", bottleneck())
    assert two.unsplice("a.adapter") == graph.splice("a", bottleneck(3), name="second")
    assert two.unsplice("a") == two.unsplice(["a.adapter", "a.second"]) == two.unsplice() == graph
    assert [s.name for s in two.unsplice("a.adapter").splices] == ["second"]
    with pytest.raises(ag.BadSplice, match=r"there is a body 'a.adapter' already"):
        two.splice("a", ag.Bottleneck(2))


def block():
    """A container `block` whose way out is `block.b`, read by two."""
    h = ag.dense(ag.relu(ag.dense(x(), 8, name="block.a"), name="block.act"), 8, name="block.b")
    return ag.Graph(ag.add([ag.relu(h, name="one"), h], name="two"))


def test_a_container_means_its_output_and_inner_bodies_come_first():
    graph = block()
    inner_first = graph.splice("block.b", bottleneck()).splice("block", bottleneck(3))
    outer_first = graph.splice("block", bottleneck(3)).splice("block.b", bottleneck())
    assert inner_first == outer_first
    assert inner_first["block.adapter.down"].inputs == ("block.b.adapter.residual",)
    assert inner_first["one"].inputs == ("block.adapter.residual",)
    assert inner_first.value_of("block").name == "block.adapter.residual"
    assert inner_first.value_of("block.b").name == "block.b.adapter.residual"
    assert inner_first.unsplice("block.adapter") == graph.splice("block.b", bottleneck())
    assert inner_first.unsplice("block.b") == graph.splice("block", bottleneck(3))
    assert torch.equal(run(inner_first), run(outer_first))
    at_once = graph.splice("{block,block.b}", bottleneck())
    assert at_once["block.adapter.down"].inputs == ("block.b.adapter.residual",)
    assert graph.splice("block", bottleneck()).splice("block", bottleneck(), name="again").unsplice("block") == graph


def test_an_inner_body_of_a_container_with_a_body():
    graph = block().splice("block", bottleneck())
    inner = graph.splice("block.a", bottleneck(), name="deep")
    assert inner["block.act"].inputs == ("block.a.deep.residual",)
    assert inner.unsplice("block.a") == graph


def test_around_sees_what_the_host_reads():
    seen = {}

    def method(site):
        seen[site.name] = {k: (v.name, v.shape) for k, v in site.inputs.items()}
        return site.output + ag.dense(site.input, site.output.shape[-1])

    graph = block().splice(
        "{block,block.b,two}", lambda s: method(s) if s.name != "two" else s.output * 2, where="around"
    )
    assert seen == {"block": {"input": ("x", ("batch", 8))}, "block.b": {"input": ("block.act", ("batch", 8))}}
    assert graph.bodies["block.adapter"].where == "around"
    given = torch.randn(2, 8)
    model = graph.compile()
    a = model.block.a(given).relu()
    b = model.block.b(a) + model.block.b.adapter.dense_0(a)
    b = b + model.block.adapter.dense_0(given)
    torch.testing.assert_close(model(given), 2 * (b.relu() + b))


def test_around_reads_what_reaches_the_host_after_other_bodies():
    graph = (
        chain()
        .splice("a", bottleneck())
        .splice("b", lambda s: s.output + ag.dense(s.input, 8, name="d"), where="around")
    )
    assert graph["b.adapter.d"].inputs == ("act",)
    first = chain().splice("act", bottleneck())
    second = first.splice("b", lambda s: s.output + ag.dense(s.input, 8, name="d"), where="around", name="two")
    assert second["b.two.d"].inputs == ("act.adapter.residual",)
    other = chain().splice("b", lambda s: s.output + ag.dense(s.input, 8, name="d"), where="around", name="two")
    assert other.splice("act", bottleneck())["b.two.d"].inputs == ("act.adapter.residual",)
    assert other.splice("act", bottleneck()) == second


def test_a_site_with_several_inputs():
    graph = ag.Graph(ag.add([x(), x(name="y")], name="sum"))
    with pytest.raises(ag.BadSplice, match="the host 'sum' reads 2 float tensors") as caught:
        graph.splice("sum", lambda s: s.output + s.input, where="around")
    assert "input_1   y   batch × 8" in str(caught.value)
    spliced = graph.splice("sum", lambda s: ag.add([s.output, s.inputs["input_1"]], name="more"), where="around")
    assert spliced["sum.adapter.more"].inputs == ("sum", "y")
    with pytest.raises(ag.BadSplice, match="a body 'after' 'sum' sees its output only"):
        graph.splice("sum", lambda s: s.output + s.input)
    ids = ag.Graph(ag.embedding(ag.input("ids", shape=("batch",), dtype=torch.int64), 3, 8, name="e"))
    with pytest.raises(ag.BadSplice, match="the host 'e' reads 0 float tensors"):
        ids.splice("e", lambda s: s.output + s.input, where="around")


def test_a_body_may_read_any_earlier_node():
    graph = chain().splice("b", lambda s: ag.add([s.output, ag.dense(s.graph["a"], 8, name="d")], name="sum"))
    assert graph["b.adapter.d"].inputs == ("a",)
    assert list(graph) == ["x", "a", "act", "b", "b.adapter.d", "b.adapter.sum", "out"]
    assert graph.unsplice() == chain()
    later = graph.splice("a", ag.Bottleneck(2))
    assert later["b.adapter.d"].inputs == ("a.adapter.residual",)
    assert later.unsplice("a") == graph


def test_a_body_may_read_a_node_that_only_stands_later():
    """Not computed from it: the table is put in order again, and the inputs keep theirs."""
    one = ag.relu(ag.dense(x(), 8, name="one"), name="act")
    two = ag.dense(x(name="y"), 8, name="two")
    graph = ag.Graph(ag.add([one, two, x(name="z")], name="sum"))
    assert list(graph) == ["x", "y", "z", "one", "act", "two", "sum"]
    spliced = graph.splice("one", lambda s: ag.add([s.output, ag.tanh(s.graph["two"], name="t")], name="s"))
    assert list(spliced) == ["x", "y", "z", "one", "two", "one.adapter.t", "one.adapter.s", "act", "sum"]
    assert list(spliced.inputs) == ["x", "y", "z"]
    assert spliced.unsplice() == graph
    model, given = spliced.compile(), [torch.randn(2, 8) for _ in range(3)]
    wanted = (model.one(given[0]) + model.two(given[1]).tanh()).relu() + model.two(given[1]) + given[2]
    torch.testing.assert_close(model(*given), wanted)


def test_a_body_that_reads_what_comes_from_its_host_is_a_cycle():
    with pytest.raises(ag.BadSplice) as caught:
        chain().splice("a", lambda s: ag.add([s.output, s.graph["out"]], name="sum"))
    first, line, *_ = str(caught.value).splitlines()
    assert first == "'a.adapter.sum' reads 'out', which is computed from it: a cycle"
    assert line.split("cycle")[1].strip() == "a.adapter.sum → act → b → out → a.adapter.sum"


def test_branches_by_hand_replace_nothing_for_each_other():
    layer = ag.dense(x(), 8, name="fc")
    one = Adapter.wrap(layer, bottleneck_size=2, name="one")
    two = Adapter.wrap(layer, bottleneck_size=3, name="two")
    graph = ag.Graph(ag.add([one, two], name="sum"))
    assert {n: (b.host, b.calls[0][0]) for n, b in graph.bodies.items()} == {"one": ("fc", "fc"), "two": ("fc", "fc")}
    spliced = graph.splice("fc", bottleneck())
    assert spliced["one.down"].inputs == spliced["two.down"].inputs == ("fc.adapter.residual",)
    # taking one branch out leaves the adapted value, not the raw one
    left = spliced.unsplice("one")
    assert left["sum"].inputs == ("fc.adapter.residual", "two.residual")
    assert spliced.unsplice("fc.adapter") == graph
    assert spliced.unsplice("fc")["sum"].inputs == ("fc", "fc")
    again = spliced.splice("fc", bottleneck(), name="second")
    assert again["fc.second.down"].inputs == ("fc.adapter.residual",)
    assert again["one.down"].inputs == ("fc.second.residual",)


def test_wraps_on_wraps_share_their_host():
    graph = ag.Graph(Adapter.wrap(Adapter.wrap(ag.dense(x(), 8, name="fc"), name="one"), name="two"))
    assert {n: (b.host, b.calls[0][0]) for n, b in graph.bodies.items()} == {
        "one": ("fc", "fc"),
        "two": ("fc", "one.residual"),
    }
    assert graph.splice("fc", ag.Bottleneck(2))["fc.adapter.down"].inputs == ("two.residual",)
    assert list(graph.unsplice("fc")) == ["x", "fc"]
    assert list(graph.unsplice("one")) == ["x", "fc", "two.down", "two.act", "two.up", "two.residual"]


@pytest.mark.parametrize("at", ["a", "act", "b", "out", "x", "*"])
def test_a_zero_init_splice_changes_no_bit(at):
    graph = chain()
    assert torch.equal(run(graph), run(graph.splice(at, ag.Bottleneck(2))))
    assert torch.equal(run(graph), run(graph.splice(at, ag.Bottleneck(2, scale="learned", activation="gelu"))))


class Double:
    """A method of the user's: anything with `apply` and maybe `where`."""

    where = "around"

    def apply(self, site):
        assert site.inputs
        return ag.multiply([site.output, ag.constant(2.0, name="two")], name="twice")


@pytest.mark.parametrize("method", [Double(), lambda s: ag.add([s.output, s.output], name="twice")])
def test_any_callable_is_a_method(method):
    graph = chain().splice("out", method)
    assert torch.equal(run(graph), 2 * run(chain()))


def test_names_in_a_body_are_made_up_clear_of_given_ones():
    graph = chain().splice("a", lambda s: ag.dense(ag.dense(ag.dense(s.output, 8), 8, name="dense_0"), 8))
    assert list(graph)[2:5] == ["a.adapter.dense_1", "a.adapter.dense_0", "a.adapter.dense_2"]


def test_unsplice_refuses_to_take_out_what_is_read():
    graph = chain().splice("a", ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match=r"the graph returns 'a.adapter.down' of the body 'a.adapter'"):
        graph.tap("a.adapter.down").unsplice()
    reader = graph.splice("out", lambda s: s.output + ag.dense(s.graph["a.adapter.down"], 8), name="reader")
    with pytest.raises(ag.BadSplice, match=r"'out.reader.dense_0' reads 'a.adapter.down' of the body"):
        reader.unsplice("a")
    assert reader.unsplice("out") == graph
    assert reader.unsplice() == chain()


# ---------------------------------------------------------------------- other surgery


def test_replace_keeps_the_name_and_the_rest():
    graph = chain()
    swapped = graph.replace("act", ag.gelu(graph["a"]))
    assert list(swapped) == list(graph)
    assert swapped["act"].op == "gelu"
    assert graph.diff(swapped) == ((), (), ("act",))
    named = graph.replace("act", ag.gelu(graph["a"], name="gelu"))
    assert list(named) == ["x", "a", "gelu", "b", "out"]
    end = graph.replace("out", ag.relu(graph["b"]))
    assert end.output_names() == ("out",)


def test_replace_by_several_nodes():
    graph = chain()
    long = graph.replace("b", ag.dense(ag.relu(ag.dense(graph["act"], 3, name="low")), 8))
    assert list(long) == ["x", "a", "act", "low", "relu_0", "b", "out"]
    bodied = graph.replace("act", Adapter.wrap(ag.gelu(graph["a"], name="g"), bottleneck_size=2))
    assert bodied.bodies["adapter"].host == "g"
    assert list(bodied.unsplice()) == ["x", "a", "g", "b", "out"]


def test_replace_by_what_reads_the_node_puts_it_behind():
    graph = chain()
    behind = graph.replace("a", ag.layer_norm(graph["a"]))
    assert list(behind) == ["x", "a", "layer_norm_0", "act", "b", "out"]
    wrapped = graph.replace("out", Adapter.wrap(graph["out"], bottleneck_size=2))
    assert wrapped.bodies["adapter"].host == "out"
    assert wrapped.unsplice() == graph


def test_replace_by_a_node_of_the_graph():
    graph = diamond()
    assert list(graph.replace("l", graph["r"])) == ["x", "a", "r", "sum"]
    with pytest.raises(ag.BadSplice, match="a cycle"):
        chain().replace("a", chain()["out"])


def test_replace_what_a_body_is_on():
    graph = chain().splice("a", ag.Bottleneck(2))
    swapped = graph.replace("a", ag.dense(graph["x"], 8, bias=False))
    assert swapped["a.adapter.down"].inputs == ("a",)
    assert list(swapped.params)[:2] == ["a.weight", "a.adapter.down.weight"]
    assert swapped.unsplice() == chain().replace("a", ag.dense(chain()["x"], 8, bias=False))
    for change in (
        lambda: graph.replace("a", ag.dense(graph["x"], 8, name="other")),
        lambda: graph.remove("a"),
        lambda: graph.rename("a", "other"),
    ):
        with pytest.raises(ag.BadSplice, match=r"'a' has the body 'a.adapter'"):
            change()
    for change in (
        lambda: graph.replace("a.adapter.act", ag.gelu(graph["a.adapter.down"])),
        lambda: graph.remove("a.adapter.act"),
        lambda: graph.rename("a.adapter.act", "other"),
    ):
        with pytest.raises(ag.BadSplice, match=r"'a.adapter.act' is part of the body 'a.adapter'"):
            change()


def test_replace_an_input():
    graph = ag.Graph(ag.add([x(), x(name="y"), x(name="z")]))
    swapped = graph.replace("y", x(name="other"))
    assert list(swapped.inputs) == ["x", "other", "z"]
    computed = graph.replace("y", ag.relu(ag.input("ids", shape=("batch", 8)), name="r"))
    assert list(computed.inputs) == ["x", "ids", "z"]


def test_nodes_of_another_graph_are_refused():
    other = ag.Graph(ag.dense(ag.input("x", shape=("batch", 3)), 8, name="a"))
    for change in (
        lambda: chain().replace("act", ag.relu(other["a"])),
        lambda: chain().splice("act", lambda s: s.output + ag.relu(other["a"])),
        lambda: chain().replace("act", other["a"]),
    ):
        with pytest.raises(ag.BadSplice, match="reads 'a', which is no node of this graph"):
            change()
    # an earlier version of the graph is the graph
    graph = chain()
    assert graph.splice("b", ag.Bottleneck(2)).replace("act", ag.gelu(graph["a"]))["act"].op == "gelu"


def test_remove():
    assert list(chain().remove("act")) == ["x", "a", "b", "out"]
    assert chain().remove("act")["b"].inputs == ("a",)
    assert chain().remove("out").output_names() == ("b",)
    assert chain().remove("a")["act"].inputs == ("x",)
    wide = ag.Graph(ag.dense(ag.dense(x(), 4, name="low"), 8, name="up"))
    with pytest.raises(ag.ShapeMismatch, match="'low' cannot be left out"):
        wide.remove("low")
    with pytest.raises(ag.BadSplice, match="'sum' reads 2 nodes"):
        diamond().remove("sum")
    with pytest.raises(ag.BadSplice, match="'x' reads 0 nodes"):
        chain().remove("x")


def test_rename():
    graph = chain().freeze("a.weight")
    renamed = graph.rename("a", "first.layer")
    assert list(renamed) == ["x", "first.layer", "act", "b", "out"]
    assert renamed["act"].inputs == ("first.layer",)
    assert renamed.trained == {
        "first.layer.weight": False,
        "first.layer.bias": True,
        "b.weight": True,
        "b.bias": True,
    }
    assert renamed.rename("first.layer", "a") == graph
    assert graph.rename("a", "a") is graph
    assert graph.rename("out", "end").output_names() == ("end",)
    assert graph.rename("x", "y").compile()(y=torch.ones(1, 8)).shape == (1, 8)
    with pytest.raises(ag.DuplicateName, match="two different nodes are called 'b'"):
        graph.rename("a", "b")
    with pytest.raises(ag.GraphError, match=r"an input cannot be called 'y\.z'"):
        graph.rename("x", "y.z")
    with pytest.raises(ag.DuplicateName, match=r"'b\.weight' has the name of a parameter"):
        graph.rename("a", "b.weight")


def test_truncate_ends_at_a_node_and_the_bodies_on_it():
    assert list(chain().truncate("act")) == ["x", "a", "act"]
    adapted = chain().splice("a", bottleneck()).splice("b", bottleneck())
    cut = adapted.truncate("a")
    assert cut.output_names() == ("a.adapter.residual",)
    assert list(cut.bodies) == ["a.adapter"]
    assert [s.hosts for s in cut.splices] == [("a",)]
    assert cut.unsplice().output_names() == ("a",)
    assert block().splice("block", bottleneck()).truncate("block").output_names() == ("block.adapter.residual",)
    two = ag.Graph(ag.add([ag.relu(x(), name="one"), x(name="y")]))
    assert list(two.truncate("one").inputs) == ["x"]
    inside = adapted.truncate("a.adapter.act")
    assert not inside.bodies
    assert inside.check()


def test_tap_returns_values_after_their_bodies():
    graph = chain().tap(["a", "act"])
    out = run(graph)
    assert list(out) == ["out", "a", "act"]
    assert torch.equal(out["act"], out["a"].relu())
    assert torch.equal(out["out"], run(chain()))
    adapted = chain().splice("a", bottleneck()).tap("a")
    assert adapted.outputs == {"out": "out", "a": "a.adapter.residual"}
    assert adapted.unsplice() == chain().tap("a")
    assert chain().tap("out").outputs == {"out": "out"}
    named = ag.Graph({"a": ag.relu(ag.dense(x(), 8, name="a"), name="r")})
    with pytest.raises(ag.DuplicateName, match="there is another output called 'a'"):
        named.tap("a")
    tuple_out = ag.Graph((ag.relu(x(), name="r"),)).tap("r")
    assert tuple_out.outputs == {"r": "r"}


def test_verbs_take_handles():
    graph = chain()
    assert graph.remove(graph["act"]) == graph.remove("act")
    assert graph.truncate(graph["act"]) == graph.truncate("act")
    assert graph.rename(graph["act"], "r") == graph.rename("act", "r")
    assert graph.freeze(graph["a"]) == graph.freeze("a")
    assert graph.tap([graph["a"]]) == graph.tap("a")
    assert graph.replace(graph["act"], ag.gelu(graph["a"])) == graph.replace("act", ag.gelu(graph["a"]))


def test_unknown_names_in_verbs_suggest():
    graph = chain()
    for call in (
        lambda: graph["acl"],
        lambda: graph.remove("acl"),
        lambda: graph.replace("acl", graph["a"]),
        lambda: graph.rename("acl", "b"),
        lambda: graph.truncate("acl"),
        lambda: graph.tap("acl"),
        lambda: graph.splice("acl", ag.Bottleneck(2)),
    ):
        with pytest.raises(ag.UnknownNode, match="'acl' is no node of this graph") as caught:
            call()
        assert "'act'" in str(caught.value)


def test_diff():
    graph = chain()
    assert graph.diff(graph) == ((), (), ())
    changed = graph.remove("act").rename("b", "c")
    assert graph.diff(changed) == (("c",), ("act", "b"), ("out",))
    assert graph.diff(changed).added == ("c",)


def test_to_networkx():
    network = diamond().splice("a", ag.Bottleneck(2)).to_networkx()
    assert list(network)[:2] == ["x", "a"]
    assert network.nodes["a"] == {"op": "dense", "shape": ("batch", 8), "body": None}
    assert network.nodes["a.adapter.up"]["body"] == "a.adapter"
    assert set(network.successors("a")) == {"a.adapter.down", "a.adapter.residual"}


# ---------------------------------------------------------------------- freezing


def test_freeze_is_a_map_of_parameters():
    graph = chain()
    assert all(graph.trained.values())
    assert dict(graph.freeze("a.bias").trained) == {
        "a.weight": True,
        "a.bias": False,
        "b.weight": True,
        "b.bias": True,
    }
    assert [n for n, t in graph.freeze("*.bias").trained.items() if t] == ["a.weight", "b.weight"]
    assert [n for n, t in graph.freeze().unfreeze("**.bias").trained.items() if t] == ["a.bias", "b.bias"]
    assert [n for n, t in graph.freeze("a").freeze("b.bias").trained.items() if t] == ["b.weight"]
    assert graph.freeze(graph.select("{a,b}")) == graph.freeze()
    assert graph.freeze(["a", "b"]) == graph.freeze()


def test_freeze_means_hosts_and_bodies_only_when_asked():
    graph = chain().splice("a", ag.Bottleneck(2))
    bodies = [n for n in graph.params if ".adapter." in n]
    assert [n for n, t in graph.freeze().trained.items() if t] == bodies
    assert [n for n, t in graph.freeze("a").trained.items() if t] == [*bodies, "b.weight", "b.bias"]
    assert [n for n, t in graph.freeze("**").trained.items() if t] == bodies
    assert [n for n, t in graph.freeze(bodies=True).trained.items() if not t] == bodies
    assert [n for n, t in graph.freeze("**.down", bodies=True).trained.items() if not t] == bodies[:2]
    for at in ("a.adapter.down", "**.adapter", "*.adapter.*.weight"):
        for verb in (graph.freeze, graph.unfreeze):
            with pytest.raises(ag.UnknownNode, match="selects parameters of bodies, and those of hosts are") as caught:
                verb(at)
            assert caught.value.hint == f"graph.{verb.__name__}({at!r}, bodies=True)"
            assert caught.value.node == at
            verb(at, bodies=True)
    with pytest.raises(ag.UnknownNode, match="'b' selects parameters of hosts, and those of bodies are") as caught:
        graph.freeze("b", bodies=True)
    assert caught.value.hint == "graph.freeze('b')"
    for options in ({}, {"bodies": True}):
        with pytest.raises(ag.GraphError, match=r"^unfreeze names what is trained\n.*\n.*graph\.unfreeze\(\"head\"\)"):
            graph.unfreeze(**options)
    assert graph.freeze("a.adapter", bodies=True).unsplice() == chain()
    assert graph.freeze().unsplice() == chain().freeze()


def test_freezing_what_has_no_parameters():
    for at in ("act", "*.wieght", [], ["a", "act"]):
        with pytest.raises(ag.UnknownNode):
            chain().freeze(at)
    with pytest.raises(ag.GraphError, match="freeze and unfreeze take patterns of names, not <function"):
        chain().freeze(lambda n: True)


class Codes(nn.Module):
    """Quantised weights are parameters of whole numbers."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.arange(8, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.codes.float() * self.scale


def test_whole_numbers_are_never_trained():
    graph = ag.Graph(ag.module(x(), Codes(), name="q"))
    assert dict(graph.trained) == {"q.codes": False, "q.scale": True}
    assert dict(graph.freeze().unfreeze("q").trained) == {"q.codes": False, "q.scale": True}
    with pytest.raises(ag.GraphError, match=r"'q.codes' holds whole numbers \(torch.int8\)"):
        graph.unfreeze("q.codes")
    assert not graph.compile().q.codes.requires_grad


# ---------------------------------------------------------------------- what must hold


def broken(**changes):
    graph = chain().splice("a", ag.Bottleneck(2))
    fields = {
        "nodes": graph._nodes,
        "outputs": graph.outputs,
        "bodies": graph.bodies,
        "splices": graph.splices,
        "imported": None,
        "overrides": graph._overrides,
    }
    return ag.Graph._of(**{**fields, **{k: v(graph) for k, v in changes.items()}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": lambda g: {**g._nodes, "other": g._nodes["a"]}}, "node 'a' stands in the table as 'other'"),
        (
            {"nodes": lambda g: {n: g._nodes[n] for n in reversed(g._nodes)}},
            "node 'out' reads 'b', which comes later: a cycle",
        ),
        (
            {"nodes": lambda g: {n: v for n, v in g._nodes.items() if n != "act"}},
            "node 'b' reads 'act', which is not in the graph",
        ),
        ({"outputs": lambda g: "nope"}, "the output 'nope' is no node of the graph"),
        ({"bodies": lambda g: {}}, "node 'a.adapter.down' belongs to 'a.adapter', which is no body of the graph"),
        (
            {"bodies": lambda g: {"a.adapter": moved(g)}},
            "the body 'a.adapter' does not lead from 'a' to 'act'",
        ),
    ],
)
def test_check_finds_what_cannot_be(changes, message):
    with pytest.raises(ag.GraphError) as caught:
        broken(**changes).check()
    assert str(caught.value).splitlines()[0] == message


def moved(graph):
    return replace(graph.bodies["a.adapter"], calls=(("a", "act"),))


def test_children_of_tensors_and_of_parameters_are_refused():
    fc = ag.dense(x(), 8, name="fc")
    with pytest.raises(ag.DuplicateName, match=r"node 'fc.weight' has the name of a parameter: 'fc'"):
        ag.Graph(ag.dense(fc, 8, name="fc.weight"))
    with pytest.raises(ag.DuplicateName, match=r"node 'fc.weight.deep' has the name of a parameter: 'fc'"):
        ag.Graph(ag.dense(fc, 8, name="fc.weight.deep"))
    with pytest.raises(ag.DuplicateName, match=r"node 'p.fc' is below a tensor: 'p'"):
        ag.Graph(ag.dense(x(), 8, name="p.fc") * ag.param("p", (8,)))
    with pytest.raises(ag.DuplicateName, match=r"node 'c.d.fc' is below a tensor: 'c'"):
        ag.Graph(ag.dense(x(), 8, name="c.d.fc") * ag.constant(1.0, name="c"))
    no_bias = ag.dense(x(), 8, bias=False, name="fc")
    assert "fc.bias" in ag.Graph(ag.relu(no_bias, name="fc.bias"))


def test_one_module_at_two_nodes_is_refused():
    shared = nn.Linear(8, 8)
    with pytest.raises(ag.GraphError, match="nodes 'm' and 'n' hold the same parameter: they would not share it"):
        ag.Graph(ag.module(ag.module(x(), shared, name="m"), shared, name="n"))
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    with pytest.raises(ag.GraphError, match="hold the same parameter"):
        ag.Graph(ag.module(ag.module(x(), shared, name="m"), tied, name="n"))
    relu = nn.ReLU()
    ag.Graph(ag.module(ag.module(x(), relu, name="m"), relu, name="n"))


# ---------------------------------------------------------------------- size


def test_fifty_thousand_nodes():
    """Nothing recurses and nothing is quadratic."""
    start = time.perf_counter()
    h = ag.input("x", shape=("batch", 2))
    for _ in range(25_000):
        h = ag.relu(ag.dense(h, 2))
    graph = ag.Graph(h)
    assert len(graph) == 50_001
    graph = graph.freeze().splice("dense_{0..99}", ag.Bottleneck(1)).splice("relu_24999", ag.Bottleneck(1))
    assert len(graph) == 50_001 + 101 * 4
    assert graph.unsplice("dense_7") != graph
    assert graph.unsplice("relu_24999").diff(graph).added[0] == "relu_24999.adapter.down"
    graph.truncate("relu_24998").replace("relu_0", ag.tanh(graph["dense_0"])).tap("dense_5").rename("x", "y")
    model = graph.compile()
    with torch.no_grad():
        assert model(torch.ones(1, 2)).shape == (1, 2)
    assert sum(p.requires_grad for p in model.parameters()) == 101 * 4
    print(f"50,000 nodes: {time.perf_counter() - start:.1f} s")
