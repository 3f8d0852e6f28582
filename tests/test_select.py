"""Selectors: what they match, in which order, and what is said when they match nothing."""

import pytest
import torch
from torch import nn

import adaptergraph as ag
from adaptergraph.select import pattern


def encoder(layers=3):
    """As an encoder has them: `encoder.layer.<n>.{attention.query,attention.value,sum,output.dense,norm}`."""
    x = ag.input("x", shape=("batch", 8))
    for n in range(layers):
        name = f"encoder.layer.{n}"
        q = ag.dense(x, 8, name=f"{name}.attention.query")
        v = ag.dense(x, 8, name=f"{name}.attention.value")
        h = ag.dense(ag.add([q, v], name=f"{name}.sum"), 8, name=f"{name}.output.dense")
        x = ag.layer_norm(h, name=f"{name}.norm")
    return ag.Graph(ag.dense(x, 8, name="head"))


def names(selector, graph=None):
    return list((graph or encoder()).select(selector))


LAYER = "encoder.layer."


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("head", ["head"]),
        ("h*", ["head"]),
        ("encoder.layer.1.norm", [LAYER + "1.norm"]),
        ("encoder.layer.*.norm", [LAYER + f"{n}.norm" for n in range(3)]),
        ("encoder.layer.{0,2}.norm", [LAYER + "0.norm", LAYER + "2.norm"]),
        ("encoder.layer.{0..1}.norm", [LAYER + "0.norm", LAYER + "1.norm"]),
        ("encoder.layer.[1-2].norm", [LAYER + "1.norm", LAYER + "2.norm"]),
        ("encoder.layer.[1..2].norm", [LAYER + "1.norm", LAYER + "2.norm"]),
        ("encoder.layer.0.attention.{query,value}", [LAYER + "0.attention.query", LAYER + "0.attention.value"]),
        ("**.{query,value}", [LAYER + f"{n}.attention.{p}" for n in range(3) for p in ("query", "value")]),
        ("**.{q*,dense}", [LAYER + f"{n}.{p}" for n in range(3) for p in ("attention.query", "output.dense")]),
        ("**.norm", [LAYER + f"{n}.norm" for n in range(3)]),
        ("**.0.**.dense", [LAYER + "0.output.dense"]),
        ("encoder.**.layer.0.norm", [LAYER + "0.norm"]),
        ("**.head", ["head"]),
        ("*", ["x", "encoder", "head"]),
        (["head", "**.0.norm"], [LAYER + "0.norm", "head"]),
        (["head", "h*", "head"], ["head"]),
        (lambda n: n.op == "layer_norm", [LAYER + f"{n}.norm" for n in range(3)]),
        (["head", lambda n: n.op == "add"], [*(LAYER + f"{n}.sum" for n in range(3)), "head"]),
    ],
)
def test_what_a_selector_matches_in_topological_order(selector, found):
    assert names(selector) == found


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("a.*", ["a.b"], ["a", "a.b.c", "a/b", "xa.b"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a", "a/b"]),
        ("**.a", ["a", "b.a", "c.b.a"], ["ba", "a.b", "b/a"]),
        ("a.**.b", ["a.b", "a.c.b", "a.c.d.b"], ["ab", "a.bb", "a.cb"]),
        ("**", ["a", "a.b"], ["a/b", "a.b/c"]),
        ("a/*", ["a/b"], ["a/b.c", "a.b", "a/b/c"]),
        ("a.**/add*", ["a/add", "a.b/add_1", "a.b.c/add"], ["b/add", "a.b.add"]),
        ("a_*", ["a_b", "a_"], ["a.b", "b_a"]),
        ("a.{0..10}", ["a.0", "a.10"], ["a.11", "a.010", "a.1x"]),
        ("l[0-2]", ["l0", "l2"], ["l3", "l", "l-"]),
        ("a.b", ["a.b"], ["aXb"]),
    ],
)
def test_patterns_one_by_one(text, yes, no):
    assert [n for n in yes + no if pattern(text).fullmatch(n)] == yes


def test_a_container_is_its_output():
    graph = encoder()
    assert graph["encoder.layer.1"].name == "encoder.layer.1.norm"
    assert graph["encoder.layer.1.output"].name == "encoder.layer.1.output.dense"
    assert "encoder.layer.1.attention" not in graph.selectable, "two ways out: it has no output"


def test_a_container_stays_when_bodies_come():
    """Its way out is that of its hosts, wherever bodies are put."""
    graph = encoder()
    for at in ("encoder.layer.1", "encoder.layer.1.norm", "encoder.layer.1.output.dense", "encoder.layer.*"):
        spliced = graph.splice(at, ag.Bottleneck(2))
        assert set(graph.selectable) <= set(spliced.selectable)
        assert spliced["encoder.layer.1"].name == "encoder.layer.1.norm"


def test_expect_pins_the_count():
    assert len(encoder().select("**.norm").expect(3)) == 3
    with pytest.raises(ag.UnknownNode, match=r"'\*\*.norm' selects 3 nodes, expected 4"):
        encoder().select("**.norm").expect(4)


def test_where_narrows():
    graph = encoder()
    assert list(graph.select("**").where(op="layer_norm")) == [LAYER + f"{n}.norm" for n in range(3)]
    assert list(graph.select(["x", "head"]).where(lambda n: n.op == "dense")) == ["head"]
    assert list(graph.select("*").where(shape=(None, 8), op="dense")) == ["head"]
    assert list(graph.select("*").where(shape=("batch", 8), op="dense")) == ["head"]
    with pytest.raises(ag.UnknownNode, match="none of the 3 selected nodes is left") as caught:
        graph.select("*").where(op="dens")
    assert "did you mean 'dense'?" in str(caught.value)
    with pytest.raises(ag.UnknownNode, match="is left"):
        graph.select("*").where(shape=(None, 9))
    with pytest.raises(ag.UnknownNode, match="is left"):
        graph.select("*").where(shape=(8,))
    with pytest.raises(ag.GraphError, match="a shape is a tuple of sizes, not 8"):
        graph.select("*").where(shape=8)


def test_a_selection_is_checked_against_the_graph_it_is_used_in():
    graph = encoder()
    selection = graph.select("**.norm")
    assert list(graph.splice("head", ag.Bottleneck(2)).select(selection)) == list(selection)
    assert list(graph.select([selection, "head"])) == [*selection, "head"]
    with pytest.raises(ag.UnknownNode, match=r"'encoder.layer.2.norm' is no node of this graph"):
        encoder(2).select(selection)


def test_a_handle_selects():
    graph = encoder()
    assert list(graph.select(graph["head"])) == ["head"]
    assert graph.splice(graph["head"], ag.Bottleneck(2)) == graph.splice("head", ag.Bottleneck(2))


def test_a_selection_is_a_sequence_of_names():
    selection = encoder().select("**.norm")
    assert selection[0] == LAYER + "0.norm"
    assert len(selection) == 3
    assert LAYER + "1.norm" in selection
    assert repr(selection) == ("<Selection of 3: encoder.layer.0.norm, encoder.layer.1.norm, encoder.layer.2.norm>")
    assert repr(encoder(5).select("**.{query,value}")).endswith(" …>")


# ---------------------------------------------------------------------- nothing found


@pytest.mark.parametrize(
    ("selector", "message", "nearest"),
    [
        ("haed", "'haed' is no node of this graph", "'head'"),
        ("encoder.layer.7.norm", "'encoder.layer.7.norm' is no node of this graph", "'encoder.layer.2.norm'"),
        ("encoder.layers.*.norm", "'encoder.layers.*.norm' selects no node", "'encoder.layer.*.norm' selects 3"),
        ("encoder.layer.{0..1}.nrm", "selects no node", "'encoder.layer.{0..1}.norm' selects 2"),
        ("encoder.layer.[0-1].nrm", "selects no node", "'encoder.layer.[0-1].norm' selects 2"),
        ("layer.*.norm", "'layer.*.norm' selects no node", "'**.layer.*.norm' selects 3"),
        ("output.dense", "is no node of this graph", "'**.output.dense' selects 3"),
        ("**.querry", "selects no node", "'**.query' selects 3"),
        (["head", "**.querry"], "'**.querry' selects no node", "'**.query' selects 3"),
        (["head", "norm"], "'norm' is no node of this graph", "'**.norm' selects 3"),
        # a part was left out: what is between is put in where it is the same for all
        ("encoder.layer.*.query", "selects no node", "'encoder.layer.*.attention.query' selects 3"),
        ("encoder.layer.{0..1}.dense", "selects no node", "'encoder.layer.{0..1}.output.dense' selects 2"),
        ("encoder.layer.0.dense", "is no node of this graph", "'encoder.layer.0.output.dense'"),
        ("encoder.*.norm", "selects no node", "'encoder.*.**.norm' selects 3"),
        ("encoder.norm", "is no node of this graph", "'encoder.**.norm' selects 3"),
        ("layer.*.dense", "selects no node", "'encoder.layer.*.output.dense' selects 3"),
        ("layer.*.{query,value}", "selects no node", "'encoder.layer.*.attention.{query,value}' selects 6"),
        ("**.layer.*.dense", "selects no node", "'**.layer.*.output.dense' selects 3"),
        # the last part stays what it is
        ("decoder.xyz.*.query", "selects no node", "query' selects 3"),
        ("q.w.e.r.query", "is no node of this graph", "'**.query' selects 3"),
        ("**.QUERY", "selects no node", "'**.query' selects 3"),
        (".*query", "selects no node", "'**.*query' selects 3"),
    ],
)
def test_nothing_found_says_what_was_probably_meant(selector, message, nearest):
    with pytest.raises(ag.UnknownNode) as caught:
        names(selector)
    assert message in str(caught.value).splitlines()[0]
    assert nearest in str(caught.value).splitlines()[1]
    assert caught.value.source.text.strip() == "names(selector)" or caught.value.source.file == __file__


class Block(nn.Module):
    """One module with several outputs, one that is called twice, operations, and a layer with nothing of these."""

    def __init__(self):
        super().__init__()
        self.lstm, self.act, self.fc = nn.LSTM(4, 4, batch_first=True), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        out, (hidden, _) = self.lstm(x)
        return self.act(self.fc(self.act(out + x))) + hidden[0][:, None]


@pytest.fixture(scope="module")
def blocks():
    return ag.trace(nn.Sequential(Block(), Block()), torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("selector", "nearest"),
    [
        ("*.lstm:2", ["'*.lstm:1:0' selects 2", "'*.lstm:0' selects 2"]),
        ("*.lstm:1:1", ["'*.lstm:1:0' selects 2"]),
        ("*.lsmt:1:0", ["'*.lstm:1:0' selects 2"]),
        ("*.lstm@1:0", ["'*.lstm' selects 2"]),
        ("*.fc:0", ["'*.fc' selects 2"]),
        ("*.act@2", ["'*.act@1' selects 2", "'*.act@0' selects 2"]),
        ("0.act@2", ["'0.act@1'", "'0.act@0'"]),
        ("*.akt@1", ["'*.act@1' selects 2"]),
        ("*.fc@1", ["'*.fc' selects 2"]),
        ("*/ad", ["'*/add' selects 2"]),
        ("0/ad", ["'0/add'"]),
        ("1/mul", ["'1/add'", "'1/getitem'", "'1/getitem_1'", "'1/add_1'"]),
        ("*.add", ["'*/add' selects 2"]),
        ("add", ["'**/add' selects 2"]),
        ("*.fc/add", ["'**/add' selects 2"]),
        ("*.fc/mul", ["'*.fc' selects 2"]),
    ],
)
def test_the_nearest_outputs_calls_and_operations(blocks, selector, nearest):
    with pytest.raises(ag.UnknownNode) as caught:
        blocks.select(selector)
    lines = str(caught.value).splitlines()
    found = [line.split("nearest")[1].strip() for line in lines if line.startswith("    nearest")]
    assert sorted(found) == sorted(nearest)
    for one in found:
        blocks.select(one.split("'")[1])


def test_a_pattern_is_no_name(blocks):
    with pytest.raises(ag.UnknownNode) as caught:
        blocks["*.act"]
    assert str(caught.value).splitlines()[:2] == [
        "'*.act' is a pattern, and here is a place for the name of one node",
        "    it selects   0.act, 1.act",
    ]
    assert caught.value.hint == "graph.select('*.act') for all of them, '0.act' for the first"
    with pytest.raises(ag.UnknownNode, match="it selects   nothing"):
        blocks["q*"]
    with pytest.raises(ag.UnknownNode, match=r"'\*.act' is a pattern"):
        blocks.splice("1.fc", lambda site: site.output + site.graph["*.act"])


class Named(nn.Module):
    """Gives a tensor and a dict of tensors, and a list of such dicts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return a + b, {"kept": a * 2, "two": b * 2}, {"two": b * 3}


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Named(), Named()])

    def forward(self, x):
        for block in self.blocks:
            x, one, other = block(x)
            x = x + one["kept"] + one["two"] + other["two"]
        return x


@pytest.mark.parametrize("block", ["blocks.1", "blocks.0"])
def test_the_last_word_of_an_output_will_do_as_in_a_pattern(block):
    graph = ag.trace(Names(), torch.randn(2, 4))
    for label in ("kept", "two"):
        # the pattern is of both blocks
        both = [n for n in graph.select(f"blocks.*:{label}") if n.startswith(block)]
        assert list(graph.select(f"{block}:{label}")) == both
    assert list(graph.select(f"{block}:kept")) == [f"{block}:1:kept"]
    assert list(graph.select(f"{block}:two")) == [f"{block}:1:two", f"{block}:2:two"]
    assert graph.splice(f"{block}:kept", ag.Bottleneck(2)) == graph.splice(f"{block}:1:kept", ag.Bottleneck(2))
    with pytest.raises(ag.UnknownNode, match=f"the model reads no output '1' of '{block}'"):
        graph.select(f"{block}:1")


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("*.act@0", ["0.act@0", "1.act@0"]),
        ("0.act@*", ["0.act@0", "0.act@1"]),
        ("*.act@{0,1}", ["0.act@0", "0.act@1", "1.act@0", "1.act@1"]),
        ("*.lstm:*", ["0.lstm:0", "0.lstm:1:0", "1.lstm:0", "1.lstm:1:0"]),
        ("0.*", ["0.lstm", "0.act", "0.fc"]),
        ("*/add", ["0/add", "1/add"]),
    ],
)
def test_patterns_of_calls_and_outputs(blocks, selector, found):
    assert sorted(blocks.select(selector)) == sorted(found)


def test_patterns_of_operations_and_outputs_at_one_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    graph = ag.trace(Twice(), torch.randn(2, 3, 4))
    assert list(graph.select("*@0/add")) == ["block@0/add"]
    assert list(graph.select("*@1/add")) == ["block@1/add"]
    assert list(graph.select("*/add")) == ["block/add"]
    assert list(graph.select("block.lstm@{0,1}:0")) == ["block.lstm@0:0", "block.lstm@1:0"]
    assert list(graph.select("block.lstm:*")) == ["block.lstm:0", "block.lstm:1:0"]


@pytest.mark.parametrize(
    ("selector", "kind", "message"),
    [
        ([], ag.UnknownNode, "the list of selectors is empty: it selects no node"),
        (lambda n: False, ag.UnknownNode, "the predicate selects no node"),
        (5, ag.GraphError, "a selector is a string, a predicate or a list of these, not 5"),
        (["head", 5], ag.GraphError, "a selector is a string, a predicate or a list of these, not 5"),
        ("a[0", ag.GraphError, "the selector 'a[0' has a bracket that is not closed, or one inside another"),
        ("*a]", ag.GraphError, "the selector '*a]' has a bracket that is not closed"),
        ("{a,{b,c}}", ag.GraphError, "has a bracket that is not closed, or one inside another"),
        ("a]b[", ag.GraphError, "has a bracket that is not closed"),
        ("a.[05]", ag.GraphError, "[05] in the selector 'a.[05]' is no range of numbers"),
        ("a.[a-b]", ag.GraphError, "is no range of numbers"),
        ("a.{5..2}", ag.GraphError, "the range 5..2 in the selector 'a.{5..2}' is empty or too long"),
        ("a.{0..999999}", ag.GraphError, "is empty or too long"),
        ("", ag.UnknownNode, "'' is no node of this graph"),
    ],
)
def test_selectors_that_cannot_be_right(selector, kind, message):
    with pytest.raises(kind) as caught:
        names(selector)
    assert message in str(caught.value).splitlines()[0]
    assert caught.value.source.file == __file__


def test_a_splice_reaches_layers_not_what_only_carries_values():
    """A pattern means the places where a body can be; a name is taken at its word."""
    x = ag.input("x", shape=("batch", 8))
    graph = ag.Graph(ag.dense(x, 8, name="a") * ag.param("p", (8,)) + ag.constant(1.0, name="c"))
    spliced = graph.splice("*", ag.Bottleneck(2))
    assert [b.host for b in spliced.bodies.values()] == ["a", "multiply_0", "add_0"]
    assert [b.host for b in spliced.splice("**", ag.Bottleneck(2), name="b").bodies.values()][3:] == [
        "a",
        "multiply_0",
        "add_0",
    ]
    assert [b.host for b in graph.splice("x", ag.Bottleneck(2)).bodies.values()] == ["x"]
    for at in ("p", "c"):
        with pytest.raises(ag.BadSplice, match=f"'{at}' is of the kind"):
            graph.splice(at, ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match=r"'\[pc\]\*'|'\{p,c\}' selects no place for a body"):
        graph.splice("{p,c}", ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match="the predicate selects no place for a body"):
        graph.splice(lambda n: n.op == "param", ag.Bottleneck(2))
    with pytest.raises(ag.BadSplice, match=r"'a.adapter.down' belongs to the body 'a.adapter'"):
        spliced.splice("a.adapter.down", ag.Bottleneck(2))
