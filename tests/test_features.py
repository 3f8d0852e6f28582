"""Where a value has its features: a bottleneck works on these, also where images have them before their places."""

import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from byhand import randomise
from torch import nn

import adaptergraph as ag
from adaptergraph.features import axis_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def convolved(body, h):
    """The bottleneck as two convolutions of size one, in torch's own words."""
    kernel = (..., *[None] * (h.dim() - 2))
    conv = {3: F.conv1d, 4: F.conv2d}[h.dim()]
    down = conv(h, body.down.weight[kernel], body.down.bias)
    return conv(torch.relu(down), body.up.weight[kernel], body.up.bias)


class Net(nn.Module):
    """Two convolutions around a normalisation, and a head."""

    def __init__(self, dims):
        super().__init__()
        torch.manual_seed(0)
        make, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dims]
        self.first, self.norm, self.act, self.last = make(3, 6, 3, padding=1), norm(6), nn.ReLU(), make(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = self.act(self.norm(self.first(x)))
        return self.head(self.last(h).flatten(2).mean(-1))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("host", ["first", "norm", "act", "last"])
def test_after_a_convolution_it_is_a_convolution_of_size_one(dims, host):
    base = Net(dims).eval()
    x = torch.randn(2, 3, *(6,) * dims)  # as many places as features: the sizes do not tell
    model = randomise(ag.trace(base, x).splice(host, ag.Bottleneck(4)).compile())
    body = model.get_submodule(f"{host}.adapter")
    size = 5 if host == "last" else 6
    assert body.down.weight.shape == (4, size)
    for given in (x, torch.randn(3, 3, *(9,) * dims)):
        h = given
        for name in ("first", "norm", "act", "last"):
            h = getattr(base, name)(h)
            h = h + convolved(body, h) if name == host else h
        torch.testing.assert_close(model(given), base.head(h.flatten(2).mean(-1)))


def test_a_parallel_one_reads_the_features_of_its_input():
    base, x = Net(2).eval(), torch.randn(2, 3, 7, 4)
    model = randomise(ag.trace(base, x).splice("last", ag.Bottleneck(4, parallel=True)).compile())
    h = base.act(base.norm(base.first(x)))
    expected = base.head((base.last(h) + convolved(model.last.adapter, h)).flatten(2).mean(-1))
    torch.testing.assert_close(model(x), expected)


def test_wrapping_a_declared_convolution():
    x = ag.input("x", shape=("batch", 3, 8, 8))
    graph = ag.Graph(ag.Adapter.wrap(ag.conv(x, 6, kernel_size=3, name="conv"), hidden_size=6, bottleneck_size=2))
    model, given = graph.compile(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    h = model.conv(given)
    torch.testing.assert_close(model(given), h + convolved(model.adapter, h))
    with pytest.raises(ag.ShapeMismatch, match="does not fit its host") as caught:
        ag.Adapter.wrap(ag.conv(x, 6, kernel_size=3, name="conv"), hidden_size=9, bottleneck_size=2)
    assert "leave hidden_size out, or set it to 6" in str(caught.value)


def test_tokens_that_convolutions_compute_stay_apart():
    from transformers import SqueezeBertConfig, SqueezeBertModel

    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    base = SqueezeBertModel(SqueezeBertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).eval()
    ids = torch.randint(1, 64, (2, 12))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    graph = ag.trace(base, input_ids=ids, attention_mask=mask)
    model = randomise(graph.splice(ag.places(graph, "pfeiffer"), ag.Bottleneck(4)).compile())
    body = model.get_submodule(next(iter(ag.graph_of(model).bodies)))
    assert body.down.weight.shape == (4, 32)
    other = torch.where(mask.bool(), ids, torch.randint(1, 64, (2, 12)))
    one, two = (model(input_ids=i, attention_mask=mask).last_hidden_state[:, :8] for i in (ids, other))
    torch.testing.assert_close(one, two)
    assert model(input_ids=ids[:, :7]).last_hidden_state.shape == (2, 7, 32)


def test_where_the_features_are():
    image = ag.input("image", shape=("batch", 3, 8, 8))
    conv = ag.conv(image, 6, kernel_size=3)
    assert axis_of(ag.relu(ag.add([conv, ag.dropout(ag.batch_norm(conv), rate=0.1)]))) == 1
    assert axis_of(ag.activation(conv, "linear")) == 1
    assert axis_of(ag.transpose(conv, (0, 2, 3, 1))) == 3
    assert axis_of(ag.transpose(conv, (1, 0, 2, 3))) == 0
    assert axis_of(ag.dense(conv, 8)) == 3
    assert axis_of(image) == 3
    assert axis_of(ag.batch_norm(ag.input("x", shape=("batch", 8)))) == 1
    for made in (
        ag.module(image, nn.Conv2d(3, 6, 3)),
        ag.module(image, nn.Sequential(nn.Conv2d(3, 6, 3), nn.PixelShuffle(1))),
        ag.resize(conv, (4, 4)),
        ag.lp_pool(conv, kernel_size=2),
        ag.avg_pool(conv, kernel_size=2, dilation=2),
        ag.global_avg_pool(conv, keep_dims=True),
        ag.split(conv, 2, dim=1)[0],
        ag.concatenate(conv, conv, dim=1),
        ag.reshape(conv, ("batch", 6, 36)),
        ag.nx(conv, lambda x: x.permute(0, 2, 1, 3).transpose(1, 2)),
        ag.conv_transpose(image, 4, kernel_size=2, padding="same"),
    ):
        assert axis_of(made) == 1, made.op
    assert axis_of(ag.nx(conv, lambda x: x.flatten(2).mT)) == 2


def test_readers_of_a_declared_value_tell():
    x = ag.input("x", shape=("batch", 3, 8, 8))
    conv = ag.conv(ag.tanh(ag.relu(x, name="relu"), name="tanh"), 6, kernel_size=3, name="conv")
    pooled = ag.max_pool(x, kernel_size=2, name="pool")
    graph = ag.Graph((conv, pooled, ag.transpose(x, (0, 2, 3, 1), name="last")))
    assert [axis_of(graph[name]) for name in ("x", "relu", "tanh", "pool", "last")] == [1, 1, 1, 1, 3]
    assert axis_of(ag.Graph(ag.relu(x, name="relu"))["relu"]) == 3
    two = ag.Graph((ag.conv(x, 6, name="conv"), ag.dense(x, 2, name="dense")))
    with pytest.raises(ag.ShapeMismatch, match="it is not known which dimension of 'x' holds its features"):
        axis_of(two["x"])
    model = randomise(graph.splice("relu", ag.Bottleneck(2)).compile(), 1.0)
    given = torch.randn(2, 3, 8, 8)
    h = torch.relu(given)
    expected = model.conv(torch.tanh(h + convolved(model.relu.adapter, h)))
    torch.testing.assert_close(model(given)[0], expected)


# ---------------------------------------------------------------------- plain nets


class Written(nn.Module):
    """A forward of its own over modules by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.written = [forward]
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.written[0](self, x)


class Standardised(nn.Conv2d):
    """Weights without their mean: a subclass that convolves inside its own forward."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, 1, 1)


class LastAndBack(nn.Module):
    """A norm of channels that come first."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(given=3, size=6):
    return nn.Conv2d(given, size, 3, padding=1)


def then(act, given=3, size=6, after=6, **more):
    """A convolution, something, and a convolution."""
    return Written(lambda s, x: s.d(s.r(s.c(x))), c=conv(given, size), r=act, d=conv(after, 4), **more)


NETS = {
    "a causal convolution": (
        lambda: Written(
            lambda s, x: s.d(s.r(s.c(x)[..., :-2])),
            c=nn.Conv1d(3, 6, 3, padding=2),
            r=nn.ReLU(),
            d=nn.Conv1d(6, 4, 1),
        ),
        (3, 12),
        6,
    ),
    "upsampled": (lambda: then(nn.Upsample(scale_factor=2)), (3, 10, 12), 6),
    "shuffled pixels": (lambda: then(nn.PixelShuffle(2), size=24), (3, 10, 12), 6),
    "side by side": (
        lambda: Written(
            lambda s, x: s.d(s.r(torch.cat([s.c(x), s.e(x)], 1))), c=conv(), e=conv(3, 5), r=nn.ReLU(), d=conv(11, 4)
        ),
        (3, 10, 12),
        11,
    ),
    "a chunk": (
        lambda: Written(lambda s, x: s.d(s.r(s.c(x).chunk(2, 1)[0])), c=conv(3, 12), r=nn.ReLU(), d=conv(6, 4)),
        (3, 10, 12),
        6,
    ),
    "gated": (lambda: then(nn.GLU(1), size=12), (3, 10, 12), 6),
    "squeezed and excited": (
        lambda: Written(
            lambda s, x: s.c(x) * torch.sigmoid(s.d(s.r(s.c(x).mean((2, 3), keepdim=True)))),
            c=conv(),
            r=nn.ReLU(),
            d=nn.Conv2d(6, 6, 1),
        ),
        (3, 10, 12),
        6,
    ),
    "a norm of what was last": (
        lambda: Written(lambda s, x: s.d(s.r(s.n(s.c(x)))), c=conv(), n=LastAndBack(), r=nn.ReLU(), d=conv(6, 4)),
        (3, 10, 12),
        6,
    ),
    "a norm of all": (lambda: then(nn.LayerNorm((6, 10, 12))), (3, 10, 12), 6),
    "a subclass": (lambda: Written(lambda s, x: s.d(s.r(x)), r=Standardised(3, 6, 3), d=conv(6, 4)), (3, 10, 12), 6),
    "flat places": (
        lambda: Written(lambda s, x: s.d(s.r(s.c(x).flatten(2))), c=conv(), r=nn.ReLU(), d=nn.Conv1d(6, 4, 1)),
        (3, 10, 12),
        6,
    ),
    "shuffled channels": (
        lambda: Written(
            lambda s, x: s.d(s.r(s.c(x).view(len(x), 2, 3, 10, 12).transpose(1, 2).reshape(len(x), 6, 10, 12))),
            c=conv(),
            r=nn.ReLU(),
            d=conv(6, 4),
        ),
        (3, 10, 12),
        6,
    ),
    "places in an order by hand": (lambda: then(nn.ChannelShuffle(2)), (3, 10, 12), 6),
    "written in place": (lambda: then(nn.ReLU(inplace=True)), (3, 10, 12), 6),
    "weight norm": (
        lambda: Written(
            lambda s, x: s.d(s.r(x)), r=nn.utils.parametrizations.weight_norm(conv()), d=nn.Conv2d(6, 4, 1)
        ),
        (3, 10, 12),
        6,
    ),
}
TOKENS = {
    "places pooled": (
        lambda: Written(lambda s, x: s.d(s.r(s.c(x))), c=nn.Linear(12, 8), r=nn.AvgPool2d((2, 1)), d=nn.Linear(8, 4)),
        (3, 10, 12),
    ),
    "normed over tokens": (
        lambda: Written(lambda s, x: s.d(s.r(s.c(x))), c=nn.Linear(12, 8), r=nn.BatchNorm1d(3), d=nn.Linear(8, 4)),
        (3, 12),
    ),
}


def by_hand(model, at, function, before=False):
    """The model with a function on what a module of it gives, or is given, in hooks of torch's own."""
    model = copy.deepcopy(model)
    module = model.get_submodule(at)
    if before:
        module.register_forward_pre_hook(lambda module, args: (function(args[0]),))
    else:
        module.register_forward_hook(lambda module, args, output: function(output))
    return model


@pytest.mark.parametrize("name", NETS)
def test_in_plain_nets_it_is_a_convolution_of_size_one(name):
    make, shape, channels = NETS[name]
    torch.manual_seed(0)
    base, x = make().eval(), torch.randn(2, *shape)
    adapted = randomise(ag.trace(base, x).splice("r", ag.Bottleneck(4)).compile(), 1.0)
    body = adapted.r.adapter
    assert body.down.weight.shape == (4, channels)
    expected = by_hand(base, "r", lambda h: h + convolved(body, h))
    torch.testing.assert_close(adapted(x), expected(x))
    if name not in ("a norm of all", "shuffled channels"):
        more = torch.cat([x, x[..., :5]], -1)
        torch.testing.assert_close(adapted(more), expected(more))


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_keep_their_features_last(name):
    make, shape = TOKENS[name]
    base, x = make().eval(), torch.randn(2, *shape)
    adapted = randomise(ag.trace(base, x).splice("r", ag.Bottleneck(4)).compile(), 1.0)
    body = adapted.r.adapter
    expected = by_hand(base, "r", lambda h: h + body.up(torch.relu(body.down(h))))
    torch.testing.assert_close(adapted(x), expected(x))


@pytest.mark.parametrize(("at", "size"), [("c", 3), ("d", 6)])
def test_before_a_convolution_it_is_one(at, size):
    base = Written(lambda s, x: s.d(F.interpolate(s.c(x / 2), scale_factor=2)), c=conv(), d=conv(6, 4)).eval()
    x = torch.randn(2, 3, 10, 12)
    adapted = randomise(ag.trace(base, x).splice(at, ag.Bottleneck(4), where="before").compile(), 1.0)
    body = adapted.get_submodule(at).adapter
    assert body.down.weight.shape == (4, size)
    expected = by_hand(base, at, lambda h: h + convolved(body, h), before=True)
    for given in (x, torch.randn(1, 3, 6, 20)):
        torch.testing.assert_close(adapted(given), expected(given))


def test_without_a_batch():
    base, x = then(nn.ReLU()).eval(), torch.randn(3, 10, 12)
    graph = ag.trace(base, x)
    adapted = randomise(graph.splice("r", ag.Bottleneck(4)).compile(), 1.0)
    body = adapted.r.adapter
    expected = by_hand(base, "r", lambda h: h + convolved(body, h[None])[0])
    torch.testing.assert_close(adapted(x), expected(x))


def test_a_change_of_the_last_step_leaves_the_first():
    base, x = NETS["a causal convolution"][0]().eval(), torch.randn(1, 3, 12)
    adapted = randomise(ag.trace(base, x).splice("r", ag.Bottleneck(4)).compile(), 1.0)
    other = x.clone()
    other[..., -1] += 9
    assert torch.equal(adapted(x)[..., 0], adapted(other)[..., 0])


# ---------------------------------------------------------------------- where it is not known


def sorted_places():
    """A convolution, and what no rule is known of."""
    return Written(lambda s, x: s.r(torch.cdist(s.c(x).flatten(2), s.c(x).flatten(2))), c=conv(), r=nn.ReLU()).eval()


def test_what_is_not_known_is_refused_with_the_place():
    graph = ag.trace(sorted_places(), torch.randn(2, 3, 10, 12))
    for method in (ag.Bottleneck(4), ag.Sum(ag.Bottleneck(2)), ag.Switch({"a": ag.Bottleneck(2)})):
        with pytest.raises(
            ag.ShapeMismatch, match="it is not known which dimension of 'r' holds its features"
        ) as caught:
            graph.splice("r", method)
        assert "value   r   2 × 6 × 6   ReLU" in str(caught.value)
        hint = "take a convolution, linear layer or norm before or after it; or write the body yourself, lambda site: …"
        assert hint in str(caught.value)
    with pytest.raises(ag.ShapeMismatch, match="it is not known"):
        graph.splice("r", ag.Fusion({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)}))
    # the way out
    own = graph.splice(
        "r",
        lambda s: s.output + ag.transpose(ag.dense(ag.transpose(s.output, (0, 2, 1)), 6, name="fc"), (0, 2, 1)),
    )
    model = randomise(own.compile(), 1.0)
    x = torch.randn(2, 3, 10, 12)
    h = graph.compile()(x)
    expected = h + model.r.adapter.fc(h.mT).mT
    torch.testing.assert_close(model(x), expected)


def test_without_convolutions_it_is_the_last():
    base = Written(lambda s, x: s.r(torch.cdist(s.c(x), s.c(x))), c=nn.Linear(6, 6), r=nn.ReLU())
    graph = ag.trace(base, torch.randn(2, 5, 6))
    assert graph["r"].axis == -1


class Attending(nn.Module):
    """Attention by hand: with one head, with two, or said in letters."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.how, self.drop = how, nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how != "one head":
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        if self.how == "letters":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        elif self.how == "added":
            scores = torch.baddbmm(torch.zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (-1, 2))
        else:
            scores = q @ k.transpose(-1, -2)
        scores = self.drop((scores / 2 + scores.new_ones(scores.shape)).softmax(-1))
        h = torch.einsum("...qk,...kd->...qd", scores, v) if self.how == "letters" else scores @ v
        return self.o(h if self.how == "one head" else h.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("how", ["one head", "heads", "letters", "added"])
def test_scores_of_attention_have_no_features(how):
    graph, longer = (ag.trace(nn.Sequential(Attending(how)), torch.randn(2, n, 8)) for n in (5, 7))
    assert list(graph) == list(longer)
    for one, other in zip(graph.nodes(), longer.nodes(), strict=True):
        if one.axis is not None and one.op not in ("zeros", "new_ones"):
            assert one.shape[one.axis] == other.shape[other.axis], one.name
    scores = [n for n in graph if graph[n].shape[-2:] == (5, 5) and graph[n].op != "new_ones"]
    assert {graph[n].axis for n in scores} == {None}
    assert {graph[n].axis for n in graph if graph[n].op in ("transpose", "mT") and graph[n].shape[-1] == 5} <= {-2}
    for at in ("0/softmax", "0.drop"):
        with pytest.raises(ag.ShapeMismatch, match=f"it is not known which dimension of '{at}' holds its features"):
            graph.splice(at, ag.Bottleneck(4))
    model = randomise(graph.splice("**.{q,k,v,o}", ag.Bottleneck(4)).compile(), 1.0).eval()
    assert model(torch.randn(3, 9, 8)).shape == (3, 9, 8)


def test_files_keep_it():
    base = Written(
        lambda s, x: (s.r(torch.cdist(s.c(x).flatten(2), s.c(x).flatten(2))), s.d(x)), c=conv(), d=conv(), r=nn.ReLU()
    )
    graph = ag.trace(base, torch.randn(2, 3, 10, 12)).splice("d", ag.Bottleneck(2))
    data = json.loads(graph.to_json())
    assert data["imported"]["axes"] == {
        "x": -3,
        "c": -3,
        "c@1": -3,
        "d": -3,
        "/flatten": -2,
        "/flatten_1": -2,
        "/cdist": None,
        "r": None,
    }
    again = ag.Graph.from_json(graph.to_json())
    assert {n.name: n.axis for n in again.nodes()} == {n.name: n.axis for n in graph.nodes()}
    assert again["d.adapter.residual"].axis == -3
    del data["imported"]["axes"]
    with pytest.raises(ag.ShapeMismatch, match="it is not known"):
        ag.Graph.from_json(json.dumps(data)).splice("d", ag.Bottleneck(2), name="more")
    text = ag.trace(nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 3, 4)).to_json()
    assert json.loads(text)["imported"]["axes"] == {}


def test_a_body_gives_what_its_host_gave():
    graph = ag.trace(then(nn.ReLU()), torch.randn(2, 3, 10, 12))
    graph = graph.splice("r", lambda s: ag.dense(s.output, 12, name="wide"), name="own")
    assert graph["r.own.wide"].axis == -3
    assert graph.splice("r", ag.Bottleneck(2)).params["r.adapter.down.weight"].shape == (2, 6)
    both = ag.trace(nn.Sequential(nn.Sequential(conv())), torch.randn(2, 3, 10, 12)).splice(
        ["0", "0.0"], ag.Bottleneck(2)
    )
    assert [both.params[f"{n}.adapter.down.weight"].shape for n in ("0", "0.0")] == [(2, 6), (2, 6)]


# ---------------------------------------------------------------------- around a host


def test_a_parallel_one_around_the_first_convolution():
    base, x = nn.Sequential(conv(), nn.ReLU()).eval(), torch.randn(2, 3, 10, 12)
    adapted = randomise(ag.trace(base, x).splice("0", ag.Bottleneck(2, parallel=True)).compile(), 1.0)
    body = adapted[0].adapter
    assert (body.down.weight.shape, body.up.weight.shape) == ((2, 3), (6, 2))
    for given in (x, torch.randn(1, 3, 5, 4)):
        torch.testing.assert_close(adapted(given), torch.relu(base[0](given) + convolved(body, given)))


class Turned(nn.Module):
    """Channels come in first and go out last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 1)

    def forward(self, x):
        return self.conv(x).mT


def test_a_parallel_one_around_what_moves_its_features():
    base, x = nn.Sequential(Turned(), nn.Linear(6, 2)).eval(), torch.randn(2, 3, 12)
    adapted = randomise(ag.trace(base, x).splice("0", ag.Bottleneck(2, parallel=True)).compile(), 1.0)
    torch.testing.assert_close(adapted(x), base[1](base[0](x) + convolved(adapted[0].adapter, x).mT))


class Expand(nn.Module):
    """One query becomes five."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, q):
        return self.l(q).expand(-1, 5, -1) + torch.arange(5.0)[:, None]


@pytest.mark.parametrize(
    ("model", "at", "shape", "sides"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, stride=2, padding=1)),
            "1",
            (2, 3, 10, 12),
            ("2 × 6 × 10 × 12", "2 × 6 × 5 × 6"),
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Upsample(size=(10, 12))),
            "2",
            (2, 3, 10, 12),
            ("2 × 6 × 1 × 1", "2 × 6 × 10 × 12"),
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8), Expand()), "1", (2, 1, 8), ("2 × 1 × 8", "2 × 5 × 8")),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(2)),
            "1",
            (2, 3, 8, 8),
            ("2 × 6 × 2 × 2", "2 × 6 × 4"),
        ),
    ],
)
def test_around_what_changes_places_it_is_refused(model, at, shape, sides):
    graph = ag.trace(model(), torch.randn(shape))
    message = f"a body around '{at}' cannot add to what it gives: the host changes places, not features alone"
    with pytest.raises(ag.ShapeMismatch, match=message) as caught:
        graph.splice(at, ag.Bottleneck(2, parallel=True))
    assert all(side in str(caught.value) for side in sides)
    hint = "splice it around a layer that keeps the places, or after this one, without parallel=True"
    assert hint in str(caught.value)
    assert "test_features.py" in str(caught.value)


@pytest.mark.parametrize("length", [20, 1])
def test_places_that_agreed_by_chance_are_refused_when_they_do_not(length):
    """Of one place a broadcast would make twelve without a word."""
    base, x = nn.Sequential(nn.Conv1d(3, 6, 1), nn.AdaptiveAvgPool1d(12), nn.Conv1d(6, 2, 1)), torch.randn(2, 3, 12)
    model = ag.trace(base, x).splice("1", ag.Bottleneck(2, parallel=True)).compile()
    assert torch.equal(model(x), base(x))
    message = "a body around its host cannot add to what it gives: the host changes places, not features alone"
    with pytest.raises(ag.ShapeMismatch, match=message) as caught:
        model(torch.randn(2, 3, length))
    hint = "splice it around a layer that keeps the places at all sizes, or after the host without parallel=True"
    assert hint in str(caught.value)
    assert "host   2 × 6 × 12" in str(caught.value)
    assert f"body   2 × 6 × {length}" in str(caught.value)


def test_a_body_without_residual_is_laid_out_as_its_host():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.h = nn.Conv2d(3, 6, 3), nn.Linear(6 * 80, 2)

        def forward(self, x):
            h = self.c(x)
            return self.h(h.view(len(h), -1))

    base, x = Viewing().eval(), torch.randn(2, 3, 10, 12)

    def wrapped(site):
        return ag.Adapter.wrap(site.output, bottleneck_size=2, residual=False, name="w")

    model = randomise(ag.trace(base, x).splice("c", wrapped).compile(), 1.0)
    expected = base.h(convolved(model.c.adapter.w, base.c(x)).flatten(1))
    torch.testing.assert_close(model(x), expected)


def test_a_fusion_over_channels_is_refused():
    graph = ag.trace(Net(2), torch.randn(2, 3, 8, 8))
    with pytest.raises(
        ag.ShapeMismatch, match="Fusion needs a host whose features are last; those of 'first'"
    ) as caught:
        graph.splice("first", ag.Fusion({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)}))
    assert "splice it at a layer that gives batch × … × features" in str(caught.value)
