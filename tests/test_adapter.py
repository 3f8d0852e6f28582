"""`Adapter` and `Bottleneck` against a bottleneck written by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter
from adaptergraph.layers.table import ACTIVATIONS
from adaptergraph.methods import METHODS


def x(*shape):
    return ag.input("x", shape=shape or ("batch", 8))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def by_hand(state, t, *, activation="relu", scale=1.0, residual=True, layer_norm=None):
    """Houlsby et al. 2019, figure 2, with the variants."""

    def linear(name, v):
        return v @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(v):
        centred = v - v.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state["norm.weight"]
            + state["norm.bias"]
        )

    h = norm(t) if layer_norm == "before" else t
    h = linear("up", getattr(F, activation)(linear("down", h)))
    h = h * (state["scale"] if scale == "learned" else scale)
    h = norm(h) if layer_norm == "after" else h
    return t + h if residual else h


def local(model, prefix):
    return {n.removeprefix(prefix): p.detach().clone() for n, p in model.named_parameters() if n.startswith(prefix)}


def test_build_is_a_graph_of_its_own():
    graph = Adapter.build(8, 2)
    assert list(graph) == ["input", "adapter.down", "adapter.act", "adapter.up", "adapter.residual"]
    assert graph["input"].shape == graph["adapter.residual"].shape == ("batch", 8)
    assert graph["adapter.down"].shape == ("batch", 2)
    assert [p.shape for p in graph.params.values()] == [(2, 8), (2,), (8, 2), (8,)]
    assert Adapter.build(8)["adapter.down"].shape == ("batch", 64)
    assert "mine.down" in Adapter.build(8, 2, name="mine")
    assert Adapter.build(8, 2, activation="gelu")["adapter.act"].op == "gelu"
    assert Adapter.build(8, 2, scale="learned")["adapter.scale"].shape == (1,)
    assert list(graph.bodies) == ["adapter"]
    assert list(graph.unsplice()) == ["input"]


def test_output_size():
    assert Adapter.output_size(8) == 8


def test_wrap_and_block_say_the_same():
    layer = ag.dense(x(), 8, name="layer")
    wrapped = ag.Graph(Adapter.wrap(layer, bottleneck_size=2, activation="tanh", name="a", dropout=0.1))
    block = ag.Graph(Adapter.adapter_block(layer, 8, bottleneck_size=2, activation="tanh", name="a", dropout=0.1))
    known = ag.Graph(Adapter.wrap(layer, hidden_size=8, bottleneck_size=2, activation="tanh", name="a", dropout=0.1))
    assert wrapped == block == known
    assert list(wrapped) == ["x", "layer", "a.down", "a.act", "a.dropout", "a.up", "a.residual"]
    assert wrapped.bodies["a"].host == "layer"


@pytest.mark.parametrize("shape", [(8,), ("batch", 8), ("batch", "seq", 8), (None, 3, 4, 8)])
def test_any_rank_is_adapted_over_the_last_size(shape):
    node = Adapter.wrap(x(*shape), bottleneck_size=2)
    assert node.shape == shape
    model = randomised(ag.Graph(node).compile())
    given = randn(*(d if isinstance(d, int) else 3 for d in shape))
    torch.testing.assert_close(model(given), by_hand(local(model, "adapter."), given))


def test_a_fresh_adapter_is_the_identity_bit_for_bit():
    given = randn(16, 8) * 1e3
    for options in (
        {},
        {"activation": "gelu"},
        {"scale": "learned"},
        {"scale": 3.0},
        {"layer_norm": "before"},
        {"layer_norm": "after"},
        {"dropout": 0.5},
    ):
        model = Adapter.build(8, 4, **options).compile().train()
        assert torch.equal(model(given), given), options
        assert not torch.equal(randomised(model)(given), given)
    assert torch.equal(Adapter.build(8, 4, residual=False).compile()(given), torch.zeros(16, 8))
    assert torch.equal(Adapter.build(8, 4, init="lora").compile()(given), given)
    for init in ("normal", "houlsby", "bert"):
        assert not torch.equal(Adapter.build(8, 4, init=init, activation="gelu").compile()(given), given)


VARIANTS = [
    {"activation": a, "scale": s, "layer_norm": n, "residual": r}
    for a, s, n, r in itertools.product(
        ["relu", "gelu", "silu"], [1.0, 0.25, "learned"], [None, "before", "after"], [True, False]
    )
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_outputs_and_gradients_are_those_by_hand(options):
    model = randomised(Adapter.build(8, 3, **options).compile())
    state = {n: p.requires_grad_() for n, p in local(model, "adapter.").items()}
    one, two = (randn(4, 8, seed=2).requires_grad_() for _ in range(2))
    out, wanted = model(one), by_hand(state, two, **options)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, state[name.removeprefix("adapter.")].grad, rtol=1e-4, atol=1e-3)


TORCHS = {
    "celu": F.celu,
    "elu": F.elu,
    "exp": torch.exp,
    "gelu": F.gelu,
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "hard_tanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "linear": lambda v: v,
    "log_sigmoid": F.logsigmoid,
    "log_softmax": lambda v: F.log_softmax(v, -1),
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": lambda v: F.softmax(v, -1),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("name", TORCHS)
def test_an_adapter_takes_every_activation(name):
    model = randomised(Adapter.build(8, 4, activation=name).compile())
    given, s = randn(16, 8), local(model, "adapter.")
    h = TORCHS[name](given @ s["down.weight"].T + s["down.bias"])
    torch.testing.assert_close(model(given), given + h @ s["up.weight"].T + s["up.bias"], rtol=1e-5, atol=1e-5)
    assert ag.Bottleneck(4, activation=name).activation == name


def test_every_activation_was_tried():
    # log_sumexp gives one feature for all
    assert set(ACTIVATIONS) - set(TORCHS) == {"log_sumexp"}


def test_initial_values():
    zeros = Adapter.build(100, 50).compile().adapter
    assert torch.equal(zeros.up.weight, torch.zeros(100, 50))
    assert torch.equal(zeros.up.bias, torch.zeros(100))
    assert zeros.down.weight.abs().max().item() == pytest.approx(0.1, rel=0.01)
    normal = Adapter.build(100, 50, init="normal").compile().adapter
    assert normal.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert normal.up.weight.std().item() == pytest.approx(1e-3, rel=0.05)
    assert not normal.down.bias.any()
    assert not normal.up.bias.any()
    learned = Adapter.build(8, 2, scale="learned").compile().adapter
    assert torch.equal(learned.scale, torch.ones(1))


def drawn(fill, *shape):
    tensor = torch.empty(*shape)
    fill(tensor)
    return tensor


def zeros(w):
    nn.init.zeros_(w)


def bert(w):
    nn.init.normal_(w, 0.0, 0.02)


def houlsby(w):
    nn.init.trunc_normal_(w, 0.0, 1e-2, -2e-2, 2e-2)


def kaiming(w):
    nn.init.kaiming_uniform_(w, a=math.sqrt(5))


# what AdapterHub does with `init_weights` of these names; its word for "lora" is "mam_adapter"
PUBLISHED = {"bert": (bert, bert), "houlsby": (houlsby, houlsby), "lora": (kaiming, zeros)}


def distance(a, b):
    """The largest difference of two empirical distribution functions (Kolmogorov and Smirnov)."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat([a, b])
    below = [torch.searchsorted(v, at, right=True) / len(v) for v in (a, b)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("make", ["wrap", "splice", "parallel"])
@pytest.mark.parametrize("init", PUBLISHED)
def test_the_published_inits(init, make):
    hidden, size = 400, 300
    layer = ag.dense(x("batch", hidden), hidden, name="fc")
    if make == "wrap":
        graph = ag.Graph(Adapter.wrap(layer, bottleneck_size=size, init=init, name="fc.adapter"))
    else:
        graph = ag.Graph(layer).splice("fc", ag.Bottleneck(size, init=init, parallel=make == "parallel"))
    torch.manual_seed(0)
    adapter = graph.compile().fc.adapter
    for part, fill in zip((adapter.down, adapter.up), PUBLISHED[init], strict=True):
        wanted = drawn(fill, *part.weight.shape)
        assert distance(part.weight.detach(), wanted) < 0.008, part
        assert part.weight.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.2)
        assert not part.bias.any()
    # what tells them apart
    assert distance(drawn(bert, size, hidden), drawn(houlsby, size, hidden)) > 0.1
    if init == "houlsby":
        assert 0.0199 < adapter.down.weight.abs().max().item() <= 0.02
    # seed and name decide
    assert torch.equal(graph.compile().fc.adapter.down.weight, adapter.down.weight)
    assert not torch.equal(graph.compile(seed=1).fc.adapter.down.weight, adapter.down.weight)


def test_dropout_is_between_the_activation_and_up():
    model = randomised(Adapter.build(8, 4, dropout=0.5).compile())
    given = randn(4, 8)
    assert torch.equal(model.eval()(given), model(given))
    assert not torch.equal(model.train()(given), model(given))
    graph = ag.graph_of(model)
    assert graph["adapter.dropout"].inputs == ("adapter.act",)
    assert graph["adapter.up"].inputs == ("adapter.dropout",)


# ---------------------------------------------------------------------- the method


OPTIONS = {
    "activation": ["tanh"],
    "dropout": [0.1],
    "scale": [2.0, "learned"],
    "init": ["normal", "houlsby", "bert", "lora"],
    "layer_norm": ["before", "after"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OPTIONS.items() for v in values])
def test_the_method_makes_the_nodes_of_wrap(name, value):
    graph = ag.Graph(ag.dense(x(), 8, name="fc")).splice("fc", ag.Bottleneck(3, **{name: value}))
    wrapped = ag.Graph(Adapter.wrap(ag.dense(x(), 8, name="fc"), bottleneck_size=3, name="fc.adapter", **{name: value}))
    assert graph == wrapped
    given = randn(2, 8)
    assert torch.equal(graph.compile().eval()(given), wrapped.compile().eval()(given))


def test_a_size_or_a_reduction():
    graph = ag.Graph(ag.dense(ag.dense(x(), 32, name="wide"), 8, name="low"))
    reduced = graph.splice("*", ag.Bottleneck(reduction=16))
    assert reduced["wide.adapter.down"].shape == ("batch", 2)
    assert reduced["low.adapter.down"].shape == ("batch", 1)
    assert graph.splice("low", ag.Bottleneck())["low.adapter.down"].shape == ("batch", 64)
    assert ag.Bottleneck() == ag.Bottleneck(64)
    with pytest.raises(ag.GraphError, match="Bottleneck takes a size or a reduction, not both"):
        ag.Bottleneck(64, reduction=16)


def test_a_method_is_a_value():
    one = ag.Bottleneck(8, activation="gelu", scale=2)
    assert one == ag.Bottleneck(8, activation="gelu", scale=2.0)
    assert one != ag.Bottleneck(8)
    assert len({one, ag.Bottleneck(8, activation="gelu", scale=2.0), ag.Bottleneck(8)}) == 2
    assert repr(one) == "Bottleneck(8, activation='gelu', scale=2.0)"
    assert repr(ag.Bottleneck(reduction=16)) == "Bottleneck(reduction=16)"
    assert eval(repr(one), {"Bottleneck": ag.Bottleneck}) == one
    assert METHODS["Bottleneck"] is ag.Bottleneck
    with pytest.raises(Exception, match=r"cannot assign to field|frozen"):
        one.size = 4


def test_a_wrong_hidden_size_is_found_where_it_is_spliced():
    graph = ag.Graph(ag.dense(x(), 8, name="fc"))
    with pytest.raises(ag.ShapeMismatch, match="does not fit its host") as caught:
        graph.splice("fc", ag.Bottleneck(2, hidden_size=1))
    assert caught.value.source.file == __file__
    assert graph.splice("fc", ag.Bottleneck(2, hidden_size=8)) == graph.splice("fc", ag.Bottleneck(2))


def test_an_adapter_needs_a_size_that_is_known():
    for shape in (("batch", "features"), ("batch", None), ()):
        with pytest.raises(ag.ShapeMismatch, match="an adapter needs a layer whose features are known"):
            Adapter.wrap(x(*shape) if shape else ag.input("s", shape=()))
