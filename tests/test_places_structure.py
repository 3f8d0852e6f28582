"""`ag.places` on models that nobody listed: names that say nothing, attention and sums written in every way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import adaptergraph as ag
from adaptergraph.structure import Structure

WIDTH = 32
STATES = torch.randn(2, 5, WIDTH)


class Attend(nn.Module):
    """Self-attention with three projections, whose names say nothing; subclasses change one thing."""

    def __init__(self, width=WIDTH, heads=4):
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def joined(self, x):
        return x.transpose(1, 2).flatten(2)

    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = self.split(self.b(x)), self.split(self.d(memory)), self.split(self.a(memory))
        return self.c(self.joined(self.mix(q, k, v)))


class Eager(Attend):
    """Scores, a mask, a softmax, a dropout and a weighted sum."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def mix(self, q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
        return self.drop(scores.softmax(-1)) @ v


class Summed(Attend):
    """The same by einsum, with a table of positions that is added to the scores."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def mix(self, q, k, v):
        places = torch.arange(q.shape[2])
        bias = self.table(places[:, None] - places + 4).permute(2, 0, 1)
        return torch.einsum("bhij,bhjd->bhid", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) + bias, -1), v)


class Turned(Attend):
    """Rotary positions from a buffer: each half times a table, added."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.randn(5, 8))

    def turn(self, x):
        left, right = x.chunk(2, -1)
        return x * self.angles.cos() + torch.cat([-right, left], -1) * self.angles.sin()

    def mix(self, q, k, v):
        return super().mix(self.turn(q), self.turn(k), v)


class Flexed(Attend):
    def mix(self, q, k, v):
        return flex_attention(q, k, v)


class Gated(Attend):
    """What attention gives is gated by a projection of the input before the last projection."""

    def __init__(self):
        super().__init__()
        self.e = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        mixed = self.mix(*(self.split(f(x)) for f in (self.b, self.d, self.a)))
        return self.c(self.joined(mixed) * torch.sigmoid(self.e(x)))


class Fused(Attend):
    """One projection for queries, keys and values, one head less for keys and values."""

    def __init__(self):
        super().__init__()
        del self.a, self.b, self.d
        self.e = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        q, k, v = self.e(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (h.view(*x.shape[:2], -1, 8).transpose(1, 2) for h in (q, k, v))
        return self.c(self.joined(self.mix(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))))


class Feed(nn.Module):
    """Two projections; subclasses change one thing."""

    def __init__(self, act=F.gelu):
        super().__init__()
        self.act = act
        self.m, self.n = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x):
        return self.n(self.act(self.m(x)))


class GatedFeed(Feed):
    def __init__(self):
        super().__init__(F.silu)
        self.o = nn.Linear(WIDTH, 48)

    def forward(self, x):
        return self.n(self.act(self.o(x)) * self.m(x))


class DeepFeed(Feed):
    def __init__(self):
        super().__init__()
        self.o = nn.Linear(48, 48)

    def forward(self, x):
        return self.n(F.relu(self.o(F.relu(self.m(x)))))


class Pre(nn.Module):
    def __init__(self, attend=None, feed=None):
        super().__init__()
        self.p, self.q = attend or Attend(), feed or Feed()
        self.r, self.s = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.p(self.r(x))
        return x + self.q(self.s(x))


class Post(Pre):
    def forward(self, x):
        x = self.r(self.p(x) + x)
        return self.s(self.q(x) + x)


class Sandwich(Pre):
    """Norms before and after each branch, a learned scale, and the sum written in place."""

    def __init__(self):
        super().__init__()
        self.t, self.u = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.v = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        x = x.clone()
        x += self.v * self.t(self.p(self.r(x)))
        return x.add_(self.u(self.q(self.s(x))), alpha=0.5)


class Scaled(Pre):
    """The residual itself is scaled."""

    def forward(self, x):
        x = self.r(x * 1.5 + self.p(x))
        return self.s(x * 1.5 + self.q(x))


class Beside(Pre):
    """Attention and feed-forward layer side by side, from one norm; both are summed first."""

    def forward(self, x):
        h = self.r(x)
        return self.p(h) + self.q(h) + x


class BesideInTurn(Pre):
    """The same, added to the residual one after the other."""

    def forward(self, x):
        h = self.r(x)
        x = x + self.p(h)
        return x + self.q(h)


class Stacked(nn.Module):
    """Embeddings, layers, a norm and a head."""

    def __init__(self, *layers):
        super().__init__()
        self.words, self.places = nn.Embedding(20, WIDTH), nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def stacked(*layers):
    return ag.trace(Stacked(*layers).eval(), torch.randint(0, 20, (2, 5)))


def found(graph, preset):
    return list(ag.places(graph, preset))


def each(*names, layers=2):
    return [f"layers.{i}.{name}" for i in range(layers) for name in names]


@pytest.mark.parametrize("block", [Pre, Post, Sandwich, Scaled, Beside, BesideInTurn])
def test_where_norms_and_sums_stand_changes_nothing(block):
    graph = stacked(block(), block())
    assert found(graph, "houlsby") == each("p.c", "q.n")
    assert found(graph, "attention") == each("p.c")
    assert found(graph, "ffn") == found(graph, "pfeiffer") == each("q.n")
    assert found(graph, "ffn-input") == each("q.m")
    assert found(graph, "lora-attention") == each("p.b", "p.a")
    assert found(graph, "lora-qkvo") == each("p.b", "p.d", "p.a", "p.c")
    assert found(graph, "all-linear") == each("p.b", "p.d", "p.a", "p.c", "q.m", "q.n")


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("attend", [Attend, Eager, Summed, Turned, Flexed])
def test_how_attention_is_written_changes_nothing(attend):
    graph = stacked(Pre(attend()), Post(attend()))
    assert found(graph, "houlsby") == each("p.c", "q.n")
    assert found(graph, "lora-attention") == each("p.b", "p.a")
    assert set(found(graph, "lora-qkvo")) == set(each("p.a", "p.b", "p.c", "p.d"))


def test_fused_projections_are_one_place():
    graph = stacked(Pre(Fused()), Post(Fused()))
    assert found(graph, "lora-attention") == each("p.e")
    assert found(graph, "lora-qkvo") == each("p.e", "p.c")


def test_a_gate_of_attention_is_neither_its_output_nor_a_query():
    graph = stacked(Pre(Gated()))
    assert found(graph, "attention") == each("p.c", layers=1)
    assert found(graph, "lora-attention") == each("p.b", "p.a", layers=1)


@pytest.mark.parametrize(("feed", "first"), [(GatedFeed, ["q.o", "q.m"]), (DeepFeed, ["q.m"])])
def test_gates_and_depth_of_a_feed_forward_layer(feed, first):
    graph = stacked(Pre(feed=feed()), Beside(feed=feed()))
    assert found(graph, "pfeiffer") == each("q.n")
    assert found(graph, "ffn-input") == each(*first)


def test_cross_attention_is_attention_too():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.other, self.feed = Attend(), Attend(), Feed()

        def forward(self, x, memory):
            x = x + self.own(x)
            x = x + self.other(x, memory)
            return x + self.feed(x)

    graph = ag.trace(Crossed(), STATES, torch.randn(2, 3, WIDTH))
    assert found(graph, "houlsby") == ["own.c", "other.c", "feed.n"]
    assert found(graph, "lora-attention") == ["own.b", "own.a", "other.b", "other.a"]


def test_a_layer_that_is_called_twice_is_one_place():
    layer = Pre()
    graph = stacked(layer, layer)
    assert found(graph, "houlsby") == ["layers.0.p.c", "layers.0.q.n"]
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    assert found(stacked(layer, layer), "houlsby") == ["layers.0.self_attn", "layers.0.linear2"]


def test_attention_without_a_last_projection_is_the_module_that_gives_its_value():
    class Bare(Attend):
        def forward(self, x):
            return self.joined(self.mix(*(self.split(f(x)) for f in (self.b, self.d, self.a))))

    graph = stacked(Pre(Bare()))
    assert found(graph, "attention") == ["layers.0.p"]


def test_weights_with_a_parametrization_are_projections():
    layer = Pre()
    nn.utils.parametrizations.weight_norm(layer.p.c)
    nn.utils.parametrizations.weight_norm(layer.q.n)
    graph = stacked(layer)
    assert found(graph, "houlsby") == each("p.c", "q.n", layers=1)
    assert found(graph, "all-linear") == each("p.b", "p.d", "p.a", "p.c", "q.m", "q.n", layers=1)


def test_keys_may_be_the_values_and_a_mask_is_neither():
    class Shared(Attend):
        def forward(self, x):
            q, kv = self.split(self.b(x)), self.split(self.d(x))
            mask = x.mean(-1)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
            return self.c(self.joined(F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)))

    assert found(stacked(Pre(Shared())), "lora-attention") == each("p.b", "p.d", layers=1)


def test_a_second_projection_after_attention_is_no_feed_forward_layer():
    class Twice(Attend):
        def __init__(self):
            super().__init__()
            self.e = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.e(super().forward(x).relu())

    graph = stacked(Pre(Twice()))
    assert found(graph, "houlsby") == each("p.c", "q.n", layers=1)


def test_what_gates_a_branch_and_what_comes_from_before_it_do_not_end_it():
    class Narrow(Feed):
        def __init__(self):
            super().__init__()
            self.g, self.h = nn.Linear(WIDTH, 6), nn.Linear(6, 1)

        def forward(self, x):
            return super().forward(x) * self.h(self.g(x).relu()).sigmoid()

    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.stem, self.feed = Feed(), nn.Linear(WIDTH, WIDTH), Feed()

        def forward(self, z):
            early = self.early(z)
            x = self.stem(z)
            return x + self.feed(x) * early

    assert found(stacked(Pre(feed=Narrow())), "pfeiffer") == ["layers.0.q.n"]
    assert found(stacked(Before()), "pfeiffer") == ["layers.0.feed.n"]


# ---------------------------------------------------------------------- experts


class Router(nn.Module):
    """Chooses an expert for each token; what it returns is more than a projection."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x):
        logits = F.linear(x, self.weight)
        weights, chosen = logits.softmax(-1).topk(2)
        return logits, weights, chosen


class Experts(nn.Module):
    """All experts as two parameters, in a module without children."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, WIDTH, 16)), nn.Parameter(torch.randn(3, 16, WIDTH))

    def forward(self, x, weights, chosen):
        given = torch.einsum("btew,ewh->bteh", x[:, :, None].expand(-1, -1, 3, -1), self.up).relu()
        given = torch.einsum("bteh,ehw->btew", given, self.down)
        return (given.gather(2, chosen[..., None].expand(-1, -1, -1, WIDTH)) * weights[..., None]).sum(2)


class Mixture(nn.Module):
    """A router, experts in one module, and one that sees every token behind a gate."""

    def __init__(self):
        super().__init__()
        self.router, self.experts, self.shared, self.gate = Router(), Experts(), Feed(), nn.Linear(WIDTH, 1)

    def forward(self, x):
        _, weights, chosen = self.router(x)
        return self.experts(x, weights, chosen) + torch.sigmoid(self.gate(x)) * self.shared(x)


class Apart(nn.Module):
    """Experts as a list of modules; every one sees every token."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList([Feed(), Feed()])

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


def test_experts_in_one_module_are_one_place():
    graph = stacked(Pre(feed=Mixture()))
    assert set(found(graph, "pfeiffer")) == set(each("q.experts", "q.shared.n", layers=1))
    assert found(graph, "ffn-input") == each("q.shared.m", layers=1)
    # the router chooses: what it gives is no value that a body could change alone
    assert set(found(graph, "all-linear")) == set(
        each("p.a", "p.b", "p.c", "p.d", "q.shared.m", "q.shared.n", "q.gate", layers=1)
    )


def test_experts_in_modules_of_their_own_are_places_of_their_own():
    graph = stacked(Pre(feed=Apart()))
    assert found(graph, "pfeiffer") == each("q.experts.0.n", "q.experts.1.n", layers=1)
    assert found(graph, "attention") == each("p.c", layers=1)


# ---------------------------------------------------------------------- pictures


class Pointwise(nn.Module):
    """A block of convolutions: one for each channel, then two over the channels, and a scale."""

    def __init__(self, kernel=1):
        super().__init__()
        self.near = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.down = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, kernel, padding=kernel // 2)

    def forward(self, x):
        return x + self.down(F.relu(self.up(self.near(x))))


def test_convolutions_of_size_one_are_projections_and_others_are_not():
    pictures = torch.randn(2, 3, 12, 12)
    graph = ag.trace(nn.Sequential(nn.Conv2d(3, 8, 3), Pointwise(), nn.Conv2d(8, 5, 1)), pictures)
    assert found(graph, "pfeiffer") == ["1.down"]
    assert found(graph, "ffn-input") == ["1.up"]
    assert found(graph, "all-linear") == ["1.up", "1.down"]
    graph = ag.trace(nn.Sequential(nn.Conv2d(3, 8, 3), Pointwise(kernel=3)), pictures)
    with pytest.raises(ag.UnknownNode, match="finds no ffn output"):
        ag.places(graph, "pfeiffer")


# ---------------------------------------------------------------------- what is not attention, not a layer, not a head


def test_a_branch_that_mixes_positions_otherwise_is_no_feed_forward_layer():
    class Scan(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x):
            h = self.i(x)
            return x + self.o(h.cumsum(1) * torch.sigmoid(h))

    class Averaged(Scan):
        def forward(self, x):
            h = self.i(x)
            return x + self.o(h.mean(1, keepdim=True) * torch.sigmoid(h))

    for branch in (Scan, Averaged):
        graph = stacked(branch(), Pre())
        assert found(graph, "houlsby") == ["layers.1.p.c", "layers.1.q.n"]
        with pytest.raises(ag.UnknownNode, match="finds no ffn output"):
            ag.places(stacked(branch()), "ffn")


def test_a_norm_written_out_and_a_scale_in_a_module_leave_features_apart():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1, 1, WIDTH))

        def forward(self, x):
            return x * self.factor

    class Normed(Feed):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            h = F.gelu(self.m(x))
            h = (h - h.mean(-1, keepdim=True)) * h.pow(2).mean(-1, keepdim=True).rsqrt()
            return self.scale(self.n(h))

    assert found(stacked(Pre(feed=Normed())), "houlsby") == ["layers.0.p.c", "layers.0.q.n"]


def test_weights_from_a_softmax_of_a_projection_are_no_attention():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.score, self.out = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.out((self.score(x).softmax(1).transpose(1, 2) @ x).squeeze(1))

    with pytest.raises(ag.UnknownNode, match="finds no attention output"):
        ag.places(ag.trace(Pooled(), STATES), "attention")


def test_projections_outside_residual_sums_are_no_feed_forward_layer():
    graph = ag.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(1, 8))
    with pytest.raises(ag.UnknownNode, match="finds no ffn output"):
        ag.places(graph, "ffn")
    assert found(graph, "all-linear") == ["0", "2"]


def test_heads_are_what_the_model_returns_and_nothing_reads():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool, self.label, self.box = Pre(), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.tied = nn.Linear(WIDTH, 20, bias=False)
            self.words = nn.Embedding(20, WIDTH)
            self.tied.weight = self.words.weight

        def forward(self, ids):
            x = self.body(self.words(ids))
            pooled = torch.tanh(self.pool(x))
            return {"words": self.tied(x), "label": self.label(pooled).sigmoid(), "box": self.box(x), "pooled": pooled}

    graph = ag.trace(Heads(), torch.randint(0, 20, (2, 5)))
    inside = [f"body.{name}" for name in ("p.b", "p.d", "p.a", "p.c", "q.m", "q.n")]
    assert set(found(graph, "all-linear")) == {*inside, "pool"}


# ---------------------------------------------------------------------- declared graphs, and graphs with bodies


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_declared_layers(norm):
    y = ag.input("x", shape=("batch", "seq", WIDTH))
    for i in range(2):
        y = ag.blocks.transformer_layer(y, 4, 48, norm=norm, dropout=0.1, name=f"layers.{i}")
    graph = ag.Graph(ag.dense(y, 3, name="head"))
    assert found(graph, "houlsby") == each("attention.output", "ffn.down")
    assert found(graph, "ffn-input") == each("ffn.up")
    assert found(graph, "lora-attention") == each("attention.query", "attention.value")
    assert set(found(graph, "all-linear")) == set(
        each(*(f"attention.{n}" for n in ("query", "key", "value", "output")), "ffn.up", "ffn.down")
    )


def test_a_declared_graph_may_hold_modules_of_torch_and_parameters():
    x = ag.input("x", shape=("batch", 5, WIDTH))
    scale = ag.param("scale", shape=(1, 1, WIDTH))
    mixed = ag.module(x, Attend(), name="torch")
    h = ag.dense(ag.relu(ag.dense(mixed, WIDTH, name="up")) * scale, WIDTH, name="down")
    assert found(ag.Graph(mixed + h), "pfeiffer") == ["down"]


def low_rank(site):
    down = ag.dense(site.input, 4, bias=False, name="a")
    return site.output + ag.dense(down, site.output.shape[-1], bias=False, name="b")


@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "lora-attention", "lora-qkvo", "all-linear", "ffn-input"])
@pytest.mark.parametrize("declared", [False, True])
def test_bodies_hide_nothing_and_are_never_selected(preset, declared):
    if declared:
        y = ag.blocks.transformer_layer(ag.input("x", shape=("batch", 5, WIDTH)), 4, 48, name="layers.0")
        plain = ag.Graph(ag.blocks.transformer_layer(y, 4, 48, norm="pre", name="layers.1"))
    else:
        plain = stacked(Pre(), BesideInTurn())
    graph = plain.splice(ag.places(plain, "all-linear"), low_rank, name="lora", where="around")
    graph = graph.splice(ag.places(plain, "houlsby"), ag.Bottleneck(4))
    assert ag.places(graph, preset).names == ag.places(plain, preset).names


def test_places_splice_compile_and_train_only_bodies():
    torch.manual_seed(0)
    model = Stacked(Pre(Eager(), Mixture()), Beside(Fused(), GatedFeed()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model = model.eval()
    ids = torch.randint(0, 20, (2, 5))
    graph = ag.trace(model, ids)
    places = ag.places(graph, "houlsby").expect(5)
    adapted = graph.splice(places, ag.Bottleneck(4, init="normal")).compile().eval()
    bodies = {n: m for n, m in adapted.named_modules() if n.endswith(".adapter")}
    assert set(bodies) == {f"{place}.adapter" for place in places}
    with torch.no_grad():
        for body in bodies.values():
            for parameter in body.parameters():
                parameter.normal_()
    # by hand: the same small network after the same modules
    by_hand = Stacked(Pre(Eager(), Mixture()), Beside(Fused(), GatedFeed())).eval()
    by_hand.load_state_dict(model.state_dict())
    for place in places:
        down, up = (bodies[f"{place}.adapter"].get_submodule(n) for n in ("down", "up"))
        by_hand.get_submodule(place).register_forward_hook(
            lambda m, args, out, down=down, up=up: out + up(down(out).relu())
        )
    assert not torch.allclose(adapted(ids), model(ids))
    torch.testing.assert_close(adapted(ids), by_hand(ids))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(ids).pow(2).mean().backward()
    optimizer.step()
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".adapter." in name for name in changed)
    assert {name.partition(".adapter.")[0] for name in changed} == set(places)


# ---------------------------------------------------------------------- what cannot be found


def test_an_unknown_preset_is_refused_with_a_suggestion():
    graph = stacked(Pre())
    with pytest.raises(
        ag.GraphError, match=r"there is no preset 'houlsbi'\n.*test_places(?s:.)*did you mean 'houlsby'"
    ):
        ag.places(graph, "houlsbi")
    with pytest.raises(ag.GraphError, match="one of: houlsby, pfeiffer, attention"):
        ag.places(graph, 3)


def test_a_model_is_no_graph():
    with pytest.raises(ag.GraphError, match=r"found in a Graph, not in Pre(?s:.)*ag\.trace\(model"):
        ag.places(Pre(), "houlsby")


def test_what_is_not_there_is_said_with_what_is():
    graph = stacked(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(ag.UnknownNode) as caught:
        ag.places(graph, "houlsby")
    text = str(caught.value)
    assert "the preset 'houlsby' (after attention and after the feed-forward layer) finds no attention output" in text
    assert "attention cores   0" in text
    assert "projections       2" in text
    assert "places here are found by: all-linear" in text
    assert 'ag.places(graph, "houlsby")' in text


def test_projections_that_are_no_modules_are_named():
    class Written(nn.Module):
        """Attention by parameters, with a norm and a sum in the same forward."""

        def __init__(self):
            super().__init__()
            self.w = nn.ParameterList([nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(4)])
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            q, k, v = (x @ w for w in self.w[:3])
            return self.norm(x + F.scaled_dot_product_attention(q, k, v) @ self.w[3])

    graph = stacked(Written())
    with pytest.raises(ag.UnknownNode) as caught:
        ag.places(graph, "attention")
    assert "layers.0/matmul_3" in str(caught.value)
    assert "an operation in the forward of 'layers.0', no module (1 in all)" in str(caught.value)
    with pytest.raises(ag.UnknownNode, match=r"layers\.0/matmul "):
        ag.places(graph, "lora-attention")


def test_projections_inside_attention_by_torch_are_named():
    graph = ag.trace(nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True), STATES)
    assert found(graph, "houlsby") == ["self_attn", "linear2"]
    with pytest.raises(ag.UnknownNode, match=r"in one module *self_attn *MultiheadAttention with all its projections"):
        ag.places(graph, "lora-attention")


def test_counts_are_pinned():
    with pytest.raises(ag.UnknownNode, match="places 'pfeiffer' selects 2 nodes, expected 3"):
        ag.places(stacked(Pre(), Pre()), "pfeiffer").expect(3)


def test_what_is_inside_a_body_is_of_no_host():
    x = ag.input("x", shape=("batch", 4))
    graph = ag.Graph(ag.relu(ag.dense(x, 4, name="fc"), name="act")).splice("fc", ag.Bottleneck(2))
    tapped = graph.tap("fc.adapter.down")
    assert Structure(tapped).kind == Structure(graph).kind
