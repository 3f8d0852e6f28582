"""What a picture shows: boxes, frames, links and sums that add up, for declared graphs and for traced models."""

from __future__ import annotations

import sys
from graphlib import TopologicalSorter

import pytest
import torch
from models import CASES
from torch import nn

import adaptergraph as ag
from adaptergraph.view import Box, Frame, Link, Sums, View, view


def boxes(shown: View) -> dict[str, Box]:
    return {box.name: box for box in shown.boxes()}


def frames(shown: View) -> list[Frame]:
    return [row.item for row in shown.rows if row.kind == "start"]


def links(shown: View, kind: str | None = None) -> set[tuple[str, str]]:
    return {(link.source, link.target) for link in shown.links if kind in (None, link.kind)}


def drawn(shown: View) -> Sums:
    """The sums of all boxes, each as often as its frames say."""
    total, counts = Sums(), [1]
    for kind, item in shown.rows:
        if isinstance(item, Box):
            total += item.sums.times(counts[-1])
        elif kind == "start":
            counts.append(counts[-1] * item.count)
        else:
            counts.pop()
    assert counts == [1]
    return total


def truth(graph: ag.Graph) -> Sums:
    total = Sums()
    for name, param in graph.params.items():
        if not graph.trained[name]:
            total += Sums(frozen=param.size)
        else:
            total += Sums(new=param.size) if name in graph.body_params else Sums(unfrozen=param.size)
    return total


def check(graph: ag.Graph, **options) -> View:
    """A view whose rows, links and sums hold together."""
    shown = view(graph, **options)
    names = [box.name for box in shown.boxes()]
    assert len(names) == len(set(names))
    assert {n for link in shown.links for n in (link.source, link.target)} <= set(names)
    assert all(link.source != link.target for link in shown.links)
    pairs = [(link.source, link.target) for link in shown.links]
    assert len(pairs) == len(set(pairs))
    forward = [pair for kind in ("plain", "residual", "side") for pair in links(shown, kind)]
    TopologicalSorter({target: [s for s, t in forward if t == target] for _, target in forward}).prepare()
    assert drawn(shown) == shown.totals == truth(graph)
    return shown


def mlp(depth: int, adapted: range = range(0)) -> ag.Graph:
    x = h = ag.input("x", shape=("batch", 8))
    for i in range(depth):
        h = ag.relu(ag.dense(h, 8, name=f"layer.{i}.fc"), name=f"layer.{i}.act")
    graph = ag.Graph(ag.dense(h, 2, name="head") if depth else x).freeze()
    return graph.splice([f"layer.{i}.fc" for i in adapted], ag.Bottleneck(2)) if adapted else graph


class Block(nn.Module):
    def __init__(self, width: int = 8, inner: int = 16):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(self.act(self.up(x))))


class Stack(nn.Module):
    def __init__(self, inner=(16,) * 6):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(inner=i) for i in inner)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def stack(*inner: int) -> ag.Graph:
    return ag.trace(Stack(inner or (16,) * 6), torch.ones(1, 4, 8))


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", [{}, {"fold": False}, {"nodes": True}], ids=["folded", "unfolded", "nodes"])
def test_sums_add_up_for_traced_models(traced, name, options):
    case, _, graph = traced(name)
    check(graph, **options)
    check(graph.unfreeze(case.unfrozen), **options)
    for sites in (case.container, list(case.sites)):
        adapted = graph.splice(sites, ag.Bottleneck(4)) if name != "resnet" else graph
        check(adapted, **options)


def test_sums_of_declared_graphs_tell_new_from_unfrozen():
    graph = mlp(4, range(1, 3)).unfreeze("head").freeze("layer.1.fc.adapter", bodies=True)
    shown = check(graph)
    assert shown.totals == Sums(frozen=4 * 72 + 42, new=42, unfrozen=18)
    assert shown.totals.trained == 60
    check(graph, fold=False)


def test_tied_parameters_are_counted_once(traced):
    graph = traced("gpt2").graph
    shown = check(graph)
    assert boxes(shown)["lm_head"].note == "tied to transformer.wte"
    assert boxes(shown)["lm_head"].sums.total == 0


def test_what_is_never_called_counts_and_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.unused = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
            self.scale, self.nothing = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.fc(x) * self.scale

    shown = check(ag.trace(Odd(), torch.ones(2, 4)))
    notes = {box.title: (box.note, box.sums.total) for box in shown.boxes()}
    assert notes["unused"] == ("never called", 20)
    assert notes["nothing"] == ("never read", 4)
    assert notes["scale"] == ("", 4)


# ---------------------------------------------------------------------- repeats


def test_a_run_of_equal_layers_is_one_frame():
    (frame,) = frames(check(mlp(6)))
    assert (frame.kind, frame.title, frame.count, frame.sums) == ("run", "layer.0 … 5", 6, Sums(frozen=72))


def test_a_run_that_differs_splits():
    shown = check(mlp(6, range(2, 5)))
    assert [(f.title, f.count) for f in frames(shown)] == [
        ("layer.0 … 1", 2),
        ("layer.2 … 4", 3),
        ("layer.5", 1),
    ]


def test_equal_single_boxes_become_one_box_with_a_count():
    x = h = ag.input("x", shape=("batch", 8))
    for i in range(5):
        h = ag.dense(h, 8, name=f"fc_{i}")
    shown = check(ag.Graph(ag.add([h, x])))
    (card,) = [box for box in shown.boxes() if box.count > 1]
    assert (card.title, card.count, card.sums.total) == ("fc_0 … 4", 5, 360)


def test_unnamed_layers_in_a_loop_fold():
    h = ag.input("x", shape=("batch", 8))
    for _ in range(5):
        h = ag.relu(ag.dense(h, 8))
    (frame,) = frames(check(ag.Graph(h)))
    assert (frame.title, frame.count) == ("dense_0 · relu_0 … 4", 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.unfreeze("layer.3"),
        lambda g: g.splice("layer.3.fc", ag.Bottleneck(2)),
        lambda g: g.splice("layer.3.act", ag.Bottleneck(2)),
    ],
    ids=["trained", "added", "added elsewhere"],
)
def test_what_makes_a_layer_different(change):
    shown = check(change(mlp(6)))
    assert [f.count for f in frames(shown)] == [3, 1, 2]


def test_layers_that_read_elsewhere_do_not_fold():
    h = ag.input("x", shape=("batch", 8))
    values = []
    for i in range(4):
        values.append(h)
        h = ag.dense(h, 8, name=f"down.{i}.fc")
    for i in range(4):
        h = ag.add([ag.dense(h, 8, name=f"up.{i}.fc"), values.pop()], name=f"up.{i}.add")
    shown = check(ag.Graph(h))
    assert not [f for f in frames(shown) if f.kind == "run" and "up" in f.title]


def test_a_value_that_is_returned_from_the_middle_splits_the_run():
    graph = mlp(6)
    tapped = graph.tap("layer.2.act")
    assert [f.count for f in frames(check(tapped))] == [3, 3]


def test_a_mask_that_every_layer_reads_does_not_prevent_a_run():
    x, mask = ag.input("x", shape=("batch", 8)), ag.input("mask", shape=("batch", 8))
    h = x
    for i in range(4):
        h = ag.multiply([ag.dense(h, 8, name=f"layer.{i}.fc"), mask], name=f"layer.{i}.mul")
    shown = check(ag.Graph(h))
    assert [f.count for f in frames(shown)] == [4]
    assert ("mask", "layer.0.mul") in links(shown)


def test_fold_false_shows_every_layer():
    shown = check(mlp(5), fold=False)
    assert [f.kind for f in frames(shown)] == ["block"] * 5
    assert len(boxes(shown)) == 13
    assert ("layer.1.act", "layer.2.fc") in links(shown)


def test_links_inside_a_frame_do_not_lead_back():
    shown = check(mlp(5))
    assert links(shown) == {
        ("x", "layer.0.fc"),
        ("layer.0.fc", "layer.0.act"),
        ("layer.0.act", "head"),
        ("head", "output →"),
    }


# ---------------------------------------------------------------------- imported models


def test_a_plain_model_shows_its_repeated_layers_opened_once():
    shown = check(stack())
    assert list(boxes(shown)) == [
        "x",
        "first",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.0.norm",
        "last",
        "output →",
    ]
    assert boxes(shown)["blocks.0.norm"].title == "add · LayerNorm"
    assert ("first", "blocks.0.norm") in links(shown, "residual")
    assert [link.label for link in shown.links if link.source == "blocks.0.up"] == ["GELU"]


def test_a_model_of_one_piece_shows_its_layers():
    graph = ag.trace(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)), torch.ones(1, 8))
    shown = check(graph)
    assert [(b.name, b.detail, b.widths) for b in shown.boxes() if b.kind == "box"] == [
        ("0", "8 → 4", (8, 4)),
        ("3", "4 → 2", (4, 2)),
    ]


def test_bodies_stand_beside_their_hosts_and_the_rest_stays_closed():
    graph = stack().splice("blocks.{3..4}.down", ag.Bottleneck(2))
    shown = check(graph)
    assert [(box.name, box.count) for box in shown.boxes() if "blocks" in box.name] == [
        ("blocks.0", 3),
        ("blocks.3.up", 1),
        ("blocks.3.down", 1),
        ("blocks.3.down.adapter", 1),
        ("blocks.3.norm", 1),
        ("blocks.5", 1),
    ]
    body = boxes(shown)["blocks.3.down.adapter"]
    assert (body.added, body.title, body.detail) == (True, "adapter", "8 → 2 → 8")
    rewired = {(link.source, link.target) for link in shown.links if link.rewired}
    assert rewired == {("blocks.3.down", body.name), (body.name, "blocks.3.norm")}


def test_a_body_at_a_whole_layer_stands_in_the_layers_frame():
    shown = check(stack().splice("blocks.*", ag.Bottleneck(2)))
    (frame,) = frames(shown)
    assert (frame.count, frame.sums.new) == (6, 42)
    assert {"blocks.0", "blocks.0.adapter"} < set(boxes(shown))


def test_layers_of_other_sizes_do_not_fold():
    shown = check(stack(16, 16, 32, 32, 32, 16))
    assert [(f.title, f.count) for f in frames(shown)] == [("blocks.0 … 1", 2), ("blocks.2 … 4", 3)]


def test_a_partly_trained_module_is_opened():
    shown = check(stack().unfreeze("blocks.*.norm"))
    trained = [box.name for box in shown.boxes() if box.sums.unfrozen]
    assert trained == ["blocks.0.norm"]
    assert boxes(check(stack().unfreeze("last")))["last"].sums == Sums(unfrozen=27)


def test_trained_parts_are_in_the_title():
    graph = stack().unfreeze("last").splice("blocks.*", ag.Bottleneck(2))
    graph = graph.splice("first", ag.Bottleneck(2), name="extra")
    assert view(graph).added == ("6 × adapter", "extra", "last unfrozen")
    assert view(stack().unfreeze("**.bias")).added == ("unfrozen hosts",)


def test_operations_that_join_values_are_shown_once(traced):
    graph = traced("llama").graph.splice("**.{q,v}_proj", ag.Bottleneck(4))
    (frame,) = [f for f in frames(check(graph)) if f.kind == "run"]
    joins = [b for b in check(graph).boxes() if b.kind == "join"]
    assert frame.count == 2
    # q and k are multiplied by the same cosines and sines
    assert [b.title for b in joins] == ["×", "×", "scaled_dot_product_attention", "+"]


class Joining(nn.Module):
    """Four linear layers whose values are put together in some way."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.how = how

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        if self.how == "attention":
            b = (a @ b.transpose(-1, -2)).softmax(-1) @ c
            return self.d(x + b), b
        if self.how == "loop":
            for _ in range(6):
                x = torch.tanh(x * a + b) @ c
            return self.d(x), b
        b = a * b if self.how == "product" else torch.relu(a + b)
        c = b + c
        return self.d(c), b if self.how != "sum of three" else c


@pytest.mark.parametrize(
    ("how", "signs", "reads"),
    [
        ("product", ["×", "+"], {"×": "ab", "+": "×c", "0 →": "d", "1 →": "×"}),
        ("sum of three", ["+"], {"+": "abc", "0 →": "d", "1 →": "+"}),
        # the first of two sums is returned: it leaves where it is taken
        ("two sums", ["+", "+"], {"0 →": "d"}),
        ("attention", ["matmul", "+"], {"matmul": "abc", "+": ["x", "matmul"], "0 →": "d", "1 →": ["matmul"]}),
        ("loop", ["× · + · matmul"], {"× · + · matmul": "xabc", "0 →": "d", "1 →": "b"}),
    ],
)
def test_each_kind_of_operation_that_joins_values_has_its_sign(how, signs, reads):
    graph = ag.trace(Joining(how), torch.randn(8, 8)).splice("d", ag.Bottleneck(2))
    shown = check(graph)
    titles = {b.name: b.title for b in shown.boxes()}
    assert [b.title for b in shown.boxes() if b.kind == "join"] == signs
    for target, sources in reads.items():
        sources = {"d.adapter" if s == "d" else s for s in sources}
        found = {s for s, t in links(shown) if target in (t, titles[t])}
        assert {s if s in sources else titles[s] for s in found} == sources, target
    if how == "two sums":
        first, second = (b.name for b in shown.boxes() if b.kind == "join")
        assert {(first, "1 →"), (first, second), ("a", first), ("b", first), ("c", second)} <= links(shown)


@pytest.mark.parametrize("mark", [(), ("model.layers.0.self_attn/mul",)])
def test_a_join_is_called_after_the_operation_that_it_shows(traced, mark):
    graph = traced("llama").graph.splice("**.{q,k,v,o}_proj", ag.Bottleneck(4))
    shown = check(graph, mark=mark)
    joins = [b for b in shown.boxes() if b.kind == "join"]
    assert "model.layers.0.self_attn/scaled_dot_product_attention" in {b.name for b in joins}
    assert all(graph[b.name].op == b.op and graph[b.name].shape == b.shape for b in joins)
    assert {b.name for b in shown.boxes() if b.marked} == set(mark)
    assert "self_attn/scaled_dot_product_attention" in str(graph.summary())


def test_a_mask_is_a_side_link(traced):
    shown = check(traced("bert").graph)
    side = links(shown, "side")
    assert {source for source, _ in side} == {"attention_mask"}
    assert ("input_ids", "bert.embeddings") in links(shown, "plain")


def test_a_module_that_is_called_again_is_one_box():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.out = Block(), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.block(self.block(x)))

    graph = ag.trace(Twice(), torch.ones(1, 8)).splice("block.down", ag.Bottleneck(2))
    shown = check(graph)
    assert boxes(shown)["block.down.adapter"].note == "called 2 ×"
    assert ("block.norm", "block.up") in links(shown, "again")


def test_all_that_leaves_from_one_place_is_one_output():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x)
            return {"a": y, "b": y.relu(), "c": y.tanh(), "d": x}

    shown = check(ag.trace(Many(), torch.ones(1, 4)))
    assert [b.title for b in shown.boxes() if b.kind == "output"] == ["a, b + 1 more", "d"]


# ---------------------------------------------------------------------- opening and marking


def test_an_opened_layer_shows_everything_inside_and_the_rest_stays_closed():
    graph = stack().splice("blocks.*.down", ag.Bottleneck(2))
    shown = check(graph, open=("blocks.0",))
    assert [(f.kind, f.title, f.added) for f in frames(shown)] == [
        ("open", "blocks.0", False),
        ("open", "adapter", True),
    ]
    inside = [b.title for b in shown.boxes() if b.name.startswith("blocks.0.")]
    assert inside == ["up", "down", "down", "act", "up", "+", "add · LayerNorm"]
    card = boxes(shown)["blocks.1"]
    assert (card.count, card.sums.new) == (5, 5 * 42)
    assert shown.tall


def test_a_body_can_be_opened_alone():
    graph = mlp(2, range(2))
    shown = check(graph, open="layer.1.fc.adapter")
    assert {"layer.0.fc.adapter", "layer.1.fc.adapter.down"} < set(boxes(shown))
    assert ("layer.1.fc", "layer.1.fc.adapter.residual") in links(shown, "residual")


def test_marked_names_stand_as_boxes_of_their_own():
    graph = stack()
    shown = check(graph, mark=graph.select("**.up"))
    assert [b.name for b in shown.boxes() if b.marked] == ["blocks.0.up"]
    assert shown.marked == 6
    operation = check(graph, mark=["blocks.2/add"])
    assert [b.name for b in operation.boxes() if b.marked] == ["blocks.2/add"]
    assert [f.count for f in frames(operation)] == [1]


@pytest.mark.parametrize("option", ["open", "mark"])
def test_an_unknown_name_says_the_nearest(option):
    with pytest.raises(ag.UnknownNode, match=r"'blocks.0.dwn' is no node of this graph\n +nearest +'blocks.0.down'"):
        view(stack(), **{option: ("blocks.0.dwn",)})
    with pytest.raises(ag.UnknownNode, match="'' is no node"):
        view(stack(), **{option: ("",)})


# ---------------------------------------------------------------------- cost


def calls(graph: ag.Graph) -> int:
    """How many Python calls one view takes."""
    graph.params, graph.trained, graph.consumers
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        view(graph)
    finally:
        sys.setprofile(None)
    return count


def unequal(depth: int) -> ag.Graph:
    h = ag.input("x", shape=("batch", 8))
    for i in range(depth):
        h = ag.dense(h, 8 + i % 3, name=f"a.{i}.b.{i}.fc")
    return ag.Graph(h)


@pytest.mark.parametrize("make", [mlp, unequal])
def test_the_work_is_linear(make):
    small, large = calls(make(200)), calls(make(800))
    assert large < 4.4 * small


def test_a_long_chain_needs_no_recursion():
    h = ag.input("x", shape=("batch", 2))
    for i in range(3000):
        h = ag.relu(h, name=f"r{'x' * (i % 7)}{i}")
    assert len(boxes(view(ag.Graph(h)))) > 100


def test_a_view_is_the_same_each_time():
    graph = stack().splice("blocks.*.down", ag.Bottleneck(2))
    assert view(graph) == view(graph)
    assert isinstance(view(graph).links[0], Link)


def test_outputs_in_outputs_are_drawn():
    x = ag.input("x", shape=("batch", 4))
    fc = ag.dense(x, 4, name="fc")
    graph = ag.Graph({"first": {"inner": fc}, "rest": (ag.relu(fc, name="act"), fc)})
    assert "first, inner, rest, output 1" in graph.dot()
    assert "rest, output 0" in graph.mermaid()
    str(graph.summary())
