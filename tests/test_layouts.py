"""Values whose features are easily taken for others: scores of rows, tokens that are mixed, heads, two layouts."""

import os

import pytest
import torch
import torch.nn.functional as F
from byhand import randomise
from test_features import Written, by_hand
from torch import nn
from torch.overrides import TorchFunctionMode

import adaptergraph as ag

os.environ.setdefault("HF_HUB_OFFLINE", "1")
UNKNOWN = "it is not known which dimension of {} holds its features"


def bottleneck(body, h, axis=-1):
    """The bottleneck on one dimension of a value, in torch's own words."""
    t = h.movedim(axis, -1)
    down = F.linear(t, body.down.weight, body.down.bias)
    return h + F.linear(torch.relu(down), body.up.weight, body.up.bias).movedim(-1, axis)


def is_as_by_hand(base, x, at, features, axis=-1, others=()):
    """A body at a module does what a hook with the same numbers does."""
    base = base.eval()
    model = randomise(ag.trace(base, x).splice(at, ag.Bottleneck(3)).compile(), 1.0)
    body = model.get_submodule(at).adapter
    assert body.down.weight.shape == (3, features)
    expected = by_hand(base, at, lambda h: bottleneck(body, h, axis))
    for given in (x, *others):
        torch.testing.assert_close(model(given), expected(given))


# ---------------------------------------------------------------------- values without features


def scores():
    return Written(lambda s, x: s.score(s.body(x).relu()), body=nn.Linear(8, 8), score=score())


def score():
    """One number for each row."""
    return Written(lambda s, x: s.l(x).squeeze(-1), l=nn.Linear(8, 1))


def scores_of_sounds():
    net = nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return Written(lambda s, x: s.score(s.net(x)), net=net, score=score())


def vocoder():
    """Batch × time comes out."""
    inner = Written(lambda s, x: s.conv(x).tanh().squeeze(1), conv=nn.Conv1d(3, 1, 5, padding=2))
    return Written(lambda s, x: s.vocoder(s.pre(x)) * 0.5, pre=nn.Conv1d(3, 3, 1), vocoder=inner)


def envelope():
    inner = Written(lambda s, x: s.c(x).mean(1), c=nn.Conv1d(3, 6, 1))
    return Written(lambda s, x: s.vocoder(x) * 1.0, vocoder=inner)


@pytest.mark.parametrize(
    ("make", "shape", "at", "value"),
    [
        (scores, (5, 8), "score", "'score/squeeze'"),
        (scores_of_sounds, (5, 1, 9), "score", "'score/squeeze'"),
        (vocoder, (2, 3, 12), "vocoder", "'vocoder/squeeze'"),
        (envelope, (2, 3, 12), "vocoder", "'vocoder/mean'"),
    ],
)
def test_scores_and_sounds_have_no_features(make, shape, at, value):
    graph = ag.trace(make().eval(), torch.randn(shape))
    with pytest.raises(ag.ShapeMismatch, match=UNKNOWN.format(value)) as caught:
        graph.splice(at, ag.Bottleneck(2))
    assert "test_layouts.py" in str(caught.value)
    assert "or write the body yourself" in str(caught.value)


def test_a_sound_has_no_features_before_it_is_read():
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    config = transformers.Wav2Vec2Config(
        vocab_size=40, **sizes, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    graph = ag.trace(transformers.Wav2Vec2Model(config).eval(), torch.randn(2, 400))
    with pytest.raises(ag.ShapeMismatch, match=UNKNOWN.format("'input_values'")):
        graph.splice("feature_extractor", ag.Bottleneck(2), where="before")


def test_vectors_and_flat_values_whose_features_are_known_keep_them():
    is_as_by_hand(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), torch.randn(8), "1", 6)
    flat = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Tanh())
    is_as_by_hand(flat, torch.randn(2, 3, 5, 6), "3", 6 * 3 * 4, others=[torch.randn(7, 3, 5, 6)])
    pooled = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    is_as_by_hand(pooled, torch.randn(2, 3, 5, 6), "3", 6, others=[torch.randn(1, 3, 9, 8)])
    image = ag.input("x", shape=("batch", 3, 8, 8))
    assert ag.Adapter.wrap(ag.flatten(ag.conv(image, 6, kernel_size=3)), bottleneck_size=2).shape == ("batch", 216)


# ---------------------------------------------------------------------- what mixes tokens


def mixing(size=6):
    """A linear layer over the tokens of batch × tokens × features."""
    return Written(lambda s, x: s.l(x.mT).mT, l=nn.Linear(size, size))


def mixer(size=8):
    """A block with a mixing of tokens and one of features."""
    channels = nn.Sequential(nn.Linear(size, 16), nn.GELU(), nn.Linear(16, size))

    def forward(s, x):
        x = x + s.mix(s.norm1(x))
        return x + s.channels(s.norm2(x))

    return Written(forward, norm1=nn.LayerNorm(size), mix=mixing(), norm2=nn.LayerNorm(size), channels=channels)


def mixed_first():
    return Written(
        lambda s, x: (lambda h: h + s.channels(s.norm(h)))(x + s.drop(s.mix(x))),
        mix=mixing(),
        drop=nn.Dropout(0.1),
        norm=nn.LayerNorm(8),
        channels=nn.Linear(8, 8),
    )


def weighed():
    """A weight for each token, of the input itself."""
    return Written(
        lambda s, x: s.gru(s.act(x * s.weigh(x.mean(-1)).softmax(-1).unsqueeze(-1)))[0],
        weigh=nn.Linear(6, 6),
        act=nn.ReLU(),
        gru=nn.GRU(8, 4, batch_first=True),
    )


def mixed_between():
    return Written(lambda s, x: (lambda h: s.o(h + s.mix(h)))(s.stem(x)), stem=nn.Linear(8, 8), mix=mixing(), o=score())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("make", "at"),
    [
        *[(mixer, at) for at in ("norm1", "mix", "norm2", "channels", "channels.2")],
        *[(mixed_first, at) for at in ("drop", "norm", "channels")],
        (weighed, "act"),
        *[(mixed_between, at) for at in ("stem", "mix")],
    ],
)
def test_mixed_tokens_are_no_features(make, at, batch):
    torch.manual_seed(0)
    is_as_by_hand(make(), torch.randn(batch, 6, 8), at, 8, others=[torch.randn(3, 6, 8)])


def test_a_parallel_one_beside_a_mixing_of_tokens():
    base, x = mixer().eval(), torch.randn(2, 6, 8)
    model = randomise(ag.trace(base, x).splice("channels.0", ag.Bottleneck(3, parallel=True)).compile(), 1.0)
    body = model.channels[0].adapter
    assert (body.down.weight.shape, body.up.weight.shape) == ((3, 8), (16, 3))
    h = x + base.mix(base.norm1(x))
    given = base.norm2(h)
    wide = base.channels[0](given) + body.up(torch.relu(body.down(given)))
    torch.testing.assert_close(model(x), h + base.channels[2](F.gelu(wide)))


def patches():
    """Images as tokens, which are then mixed."""
    return Written(
        lambda s, x: s.head(s.norm(s.blocks(s.stem(x).flatten(2).mT)).mean(1)),
        stem=nn.Conv2d(3, 8, 2, stride=2),
        blocks=nn.Sequential(mixer(), mixer()),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 2),
    )


@pytest.mark.parametrize("at", ["blocks.0", "blocks.0.norm1", "blocks.0.norm2", "blocks.1.channels", "blocks", "norm"])
@pytest.mark.parametrize("batch", [1, 2])
def test_features_stay_known_where_tokens_of_images_are_mixed(at, batch):
    torch.manual_seed(0)
    is_as_by_hand(patches(), torch.randn(batch, 3, 4, 6), at, 8, others=[torch.randn(3, 3, 4, 6)])


def test_a_mixing_of_tokens_of_images_is_refused():
    graph = ag.trace(patches().eval(), torch.randn(2, 3, 4, 6))
    with pytest.raises(ag.ShapeMismatch, match=UNKNOWN.format("'blocks.0.mix/mT_1'")):
        graph.splice("blocks.0.mix", ag.Bottleneck(2))
    # inside, its layer has as many features as it gives
    assert graph.splice("blocks.0.mix.l", ag.Bottleneck(2)).params["blocks.0.mix.l.adapter.down.weight"].shape == (2, 6)


# ---------------------------------------------------------------------- heads


class Attention(nn.Module):
    """Attention of four heads with eight features each; `after` is a function on what a head gives."""

    def __init__(self, bias):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.bias = nn.Embedding(7, 4) if bias else None

    def forward(self, x, after=lambda h: h):
        q, k, v = (f(x).view(-1, 7, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        if self.bias is not None:
            steps = torch.arange(7)
            scores = scores + self.bias((steps[:, None] - steps).abs()).permute(2, 0, 1)[None]
        return self.o(after(scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_of_each_head_tells_no_features(bias, batch):
    torch.manual_seed(0)
    base, x = Attention(bias).eval(), torch.randn(batch, 7, 32)
    model = nn.Sequential(base)
    model = randomise(ag.trace(model, x).splice("0/matmul_1", ag.Bottleneck(3)).compile(), 1.0)
    body = model[0].adapter_matmul_1
    assert body.down.weight.shape == (3, 8)
    for given in (x, torch.randn(3, 7, 32)):
        torch.testing.assert_close(model(given), base(given, lambda h: bottleneck(body, h)))


class SecondProduct(TorchFunctionMode):
    """Puts a function on what the second matrix product gives."""

    def __init__(self, function):
        super().__init__()
        self.function, self.count = function, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.matmul:
            self.count += 1
            if self.count == 2:
                with torch._C.DisableTorchFunction():
                    return self.function(result)
        return result


def test_heads_with_a_learnt_bias_of_positions():
    from transformers import MPNetConfig, MPNetModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = MPNetModel(MPNetConfig(vocab_size=40, **sizes)).eval()
    ids = torch.randint(2, 39, (2, 7))
    at = "encoder.layer.0.attention.attn"
    model = randomise(ag.trace(base, ids).splice(f"{at}/matmul_1", ag.Bottleneck(3)).compile(), 1.0)
    body = model.get_submodule(at).adapter_matmul_1
    assert body.down.weight.shape == (3, 8)
    for given in (ids, torch.randint(2, 39, (3, 5))):
        with SecondProduct(lambda h: bottleneck(body, h)):
            expected = base(given).last_hidden_state
        torch.testing.assert_close(model(given).last_hidden_state, expected)


def test_a_gate_of_each_head_tells_no_features():
    torch.manual_seed(0)
    base = Written(
        lambda s, x: s.o(s.drop(s.v(x).view(len(x), -1, 4, 8) * s.g(x).sigmoid().unsqueeze(-1)).flatten(2)),
        v=nn.Linear(32, 32),
        g=nn.Linear(32, 4),
        drop=nn.Dropout(0.1),
        o=nn.Linear(32, 32),
    )
    is_as_by_hand(base, torch.randn(2, 7, 32), "drop", 8, others=[torch.randn(3, 5, 32)])


def test_heads_beside_a_convolution_are_not_known():
    from transformers import Mamba2Config, Mamba2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2}
    base = Mamba2Model(Mamba2Config(vocab_size=40, **sizes, n_groups=2, chunk_size=4)).eval()
    graph = ag.trace(base, torch.randint(2, 39, (2, 7)))
    # batch × steps × heads × features
    assert graph["layers.0.mixer/view"].shape == (2, 7, 8, 8)
    assert graph["layers.0.mixer/view"].axis is None
    assert graph["layers.0.mixer.out_proj"].axis == -1


# ---------------------------------------------------------------------- constants


def test_constants_tell_nothing_and_take_nothing_away():
    def forward(s, x):
        h = s.c(x).flatten(2).mT
        h = torch.cat([s.token.expand(len(h), -1, -1), h], 1)
        h = s.r(h + torch.arange(h.shape[1] * 8.0).view(1, -1, 8))
        return torch.where(torch.rand(h.shape) > 2, torch.zeros(h.shape), s.q(h))

    torch.manual_seed(0)
    base = Written(forward, c=nn.Conv2d(3, 8, 2, stride=2), r=nn.ReLU(), q=nn.Tanh())
    base.token = nn.Parameter(torch.randn(1, 1, 8))
    for at in ("r", "q"):
        is_as_by_hand(base, torch.randn(1, 3, 4, 6), at, 8, others=[torch.randn(2, 3, 8, 4)])


def squeezed(x):
    return x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("forward", "modules", "axis"),
    [
        (lambda s, x: s.r(x + s.c(s.n(x).relu())), {"n": nn.GroupNorm(2, 6)}, -3),
        (lambda s, x: s.r(torch.cat([x, s.c(x)], 1)), {}, -3),
        (lambda s, x: s.r(x * s.c(squeezed(x)).sigmoid()), {}, -3),
        (lambda s, x: s.r(s.c(x) * s.l(squeezed(x).flatten(1))[:, :, None, None]), {"l": nn.Linear(6, 6)}, -3),
        (lambda s, x: s.r(s.c(x) + torch.randn(x.shape)), {}, -3),
        (lambda s, x: s.r(x + s.c(s.n(x).movedim(-1, 1)).movedim(1, -1)), {"n": nn.LayerNorm(6)}, -1),
        (lambda s, x: s.r(x + s.c(x.movedim(-1, 1)).movedim(1, -1)), {}, -1),
    ],
)
def test_sums_with_what_is_given_are_known_from_its_readers(forward, modules, axis, batch):
    base = Written(forward, c=nn.Conv2d(6, 6, 3, padding=1), r=nn.ReLU(), **modules).eval()
    shape = (batch, 6, 5, 4) if axis == -3 else (batch, 5, 4, 6)
    graph = ag.trace(base, torch.randn(shape))
    assert (graph["x"].axis, graph["r"].axis) == (axis, axis)


# ---------------------------------------------------------------------- several quantiles


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize("quantiles", [0.3, [0.1, 0.5, 0.9]])
def test_quantiles_come_in_front(quantiles, keepdim):
    torch.manual_seed(0)
    q = torch.tensor(quantiles)
    base = Written(
        lambda s, x: s.r(torch.quantile(s.c(x), q, dim=2, keepdim=keepdim)),
        c=nn.Conv1d(3, 6, 3, padding=1),
        r=nn.ReLU(),
    )
    is_as_by_hand(base, torch.randn(5, 3, 12), "r", 6, -2 if keepdim else -1, others=[torch.randn(2, 3, 20)])


# ---------------------------------------------------------------------- one module, two layouts


class Gain(nn.Module):
    """Returns what it is given, in the layout that it has."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.gain


def two_layouts(act, tokens_first=False):
    """One module for channels before steps and for features behind them."""

    def forward(s, x):
        if tokens_first:
            return s.act(s.c(s.act(s.l(x)).mT))
        return s.l(s.act(s.l(s.act(s.c(x)).mT)))

    given = 8 if tokens_first else 3
    return Written(forward, c=nn.Conv1d(given, 8, 3, padding=1), act=act, l=nn.Linear(8, 8)).eval()


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("act", [nn.Tanh, Gain])
def test_a_body_at_calls_of_two_layouts_is_refused(act, tokens_first):
    base = two_layouts(act(), tokens_first)
    shape = (2, 8, 8) if tokens_first else (2, 3, 8)
    graph = ag.trace(base, torch.randn(shape))
    axes = [-1, -2] if tokens_first else [-2, -1]
    assert [graph[n].axis for n in ("act", "act@1")] == axes
    methods = [
        ag.Bottleneck(3),
        ag.Stack(ag.Bottleneck(2)),
        ag.Sum(ag.Bottleneck(2)),
        ag.Switch({"a": ag.Bottleneck(2)}),
    ]
    for method in methods:
        with pytest.raises(ag.ShapeMismatch, match=r"body 'act.adapter' does not fit each call of its host") as caught:
            graph.splice("act", method)
        text = str(caught.value)
        assert "because    the features are in another dimension there, or it is not known in which" in text
        assert "fits       act@0   2 × 8 × 8" in text
        assert "splice at one call, or at each a body of its own: 'act@0', 'act@1'" in text
        assert "test_layouts.py" in text


@pytest.mark.parametrize("act", [nn.Tanh, Gain])
def test_a_body_at_each_of_two_layouts(act):
    torch.manual_seed(0)
    base, x = two_layouts(act()), torch.randn(2, 3, 8)
    graph = (
        ag.trace(base, x).splice("act@0", ag.Bottleneck(3), name="one").splice("act@1", ag.Bottleneck(3), name="two")
    )
    model = randomise(graph.compile(), 1.0)
    one, two = model.act.one_call0, model.act.two_call1
    for given in (x, torch.randn(3, 3, 20)):
        h = bottleneck(one, base.act(base.c(given)), -2).mT
        expected = base.l(bottleneck(two, base.act(base.l(h))))
        torch.testing.assert_close(model(given), expected)


def test_a_body_that_does_the_same_in_each_layout_is_none_to_refuse():
    base, x = two_layouts(Gain()), torch.randn(2, 3, 8)

    def scaled(site):
        return site.output * ag.param("scale", (1,), init="ones")

    graph = ag.trace(base, x).splice("act", scaled)
    model = graph.compile()
    with torch.no_grad():
        model.act.adapter.scale.fill_(-2.5)
    expected = base.l(-2.5 * base.act(base.l(-2.5 * base.act(base.c(x)).mT)))
    torch.testing.assert_close(model(x), expected)


def test_a_call_whose_features_are_not_known_is_refused_too():
    base = Written(
        lambda s, x: s.act(torch.cdist(s.act(s.c(x).mT), s.c(x).mT)),
        c=nn.Conv1d(3, 8, 1),
        act=nn.ReLU(),
    ).eval()
    graph = ag.trace(base, torch.randn(2, 3, 8))
    assert [graph[n].axis for n in ("act", "act@1")] == [-1, None]
    with pytest.raises(ag.ShapeMismatch, match=r"body 'act.adapter' does not fit each call of its host"):
        graph.splice("act", ag.Bottleneck(3))
    assert graph.splice("act@0", ag.Bottleneck(3)).params["act.adapter_call0.down.weight"].shape == (3, 8)
