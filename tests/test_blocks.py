"""Blocks of the literature against plain torch with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptergraph as ag
from adaptergraph import blocks

SIZE, HEADS, D_FF = 12, 3, 20


class Plain(nn.Module):
    """A transformer layer as the papers write it, with adapters by hand: none, serial or parallel."""

    def __init__(self, state, norm, adapters=None, scale=1.0):
        super().__init__()
        self.w = nn.ParameterDict({k.replace(".", "/"): nn.Parameter(v.clone()) for k, v in state.items()})
        self.norm, self.adapters, self.scale = norm, adapters, scale

    def linear(self, name, x):
        return x @ self.w[f"{name}/weight"].T + self.w[f"{name}/bias"]

    def normed(self, name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * self.w[f"{name}/weight"] + self.w[f"{name}/bias"]

    def attend(self, x, mask):
        b, n, _ = x.shape
        q, k, v = (
            self.linear(f"layer/attention/{p}", x).view(b, n, HEADS, -1).transpose(1, 2)
            for p in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / (SIZE // HEADS) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return self.linear("layer/attention/output", (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, SIZE))

    def feed(self, x):
        return self.linear("layer/ffn/down", F.gelu(self.linear("layer/ffn/up", x)))

    def delta(self, host, x):
        return self.linear(f"layer/{host}/adapter/up", torch.relu(self.linear(f"layer/{host}/adapter/down", x)))

    def part(self, run, host, container, x):
        out = run(x)
        if self.adapters == "serial":
            out = out + self.delta(host, out)
        elif self.adapters == "parallel":
            out = out + self.scale * self.delta(container, x)
        return out

    def forward(self, x, mask=None):
        parts = [
            (lambda h: self.attend(h, mask), "attention/output", "attention"),
            (self.feed, "ffn/down", "ffn"),
        ]
        for i, (run, host, container) in enumerate(parts, start=1):
            if self.norm == "post":
                x = self.normed(f"layer/norm{i}", x + self.part(run, host, container, x))
            else:
                x = x + self.part(run, host, container, self.normed(f"layer/norm{i}", x))
        return x


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def layer(norm, masked=False, **options):
    x = ag.input("x", shape=("batch", "seq", SIZE))
    mask = ag.input("mask", shape=("batch", "seq"), dtype=torch.bool) if masked else None
    return ag.Graph(blocks.transformer_layer(x, HEADS, D_FF, norm=norm, mask=mask, **options))


def compare(graph, norm, adapters, masked=False, **options):
    """In float32 and, so that nothing hides in rounding, in float64."""
    for dtype, close in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = randomised(graph.compile()).to(dtype)
        plain = Plain(model.state_dict(), norm, adapters, **options)
        x = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        given = (x, mask) if masked else (x,)
        one, two = model(*given), plain(*given)
        torch.testing.assert_close(one, two, rtol=close, atol=close)
        one.square().mean().backward()
        two.square().mean().backward()
        grads = {n.replace("/", "."): p.grad for n, p in plain.w.items()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, grads[name], rtol=10 * close, atol=close)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_transformer_layer_equals_plain_torch(norm, masked):
    compare(layer(norm, masked), norm, None, masked)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_serial_adapters(norm):
    graph = layer(norm).splice("layer.{attention.output,ffn.down}", ag.Bottleneck(4))
    compare(graph, norm, "serial")


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_parallel_adapters_read_the_input_of_their_sub_layer(norm, masked, scale):
    graph = layer(norm, masked).splice("layer.{attention,ffn}", ag.Bottleneck.parallel(4, scale=scale))
    assert [b.where for b in graph.bodies.values()] == ["around", "around"]
    compare(graph, norm, "parallel", masked, scale=scale)
    assert graph.unsplice() == layer(norm, masked)


def test_parallel_adapters_beside_serial_ones_inside():
    graph = layer("pre").splice("layer.{attention.output,ffn.down}", ag.Bottleneck(4), name="inner")
    both = graph.splice("layer.ffn", ag.Bottleneck.parallel(4))
    names = list(both)
    assert both["layer.ffn.adapter.down"].inputs == ("layer.norm2",)
    assert both["layer.ffn.adapter.residual"].inputs == ("layer.ffn.down.inner.residual", "layer.ffn.adapter.scaled")
    assert both["layer.add2"].inputs == ("layer.add1", "layer.ffn.adapter.residual")
    assert names.index("layer.ffn.adapter.down") > names.index("layer.norm2")


def test_presets_are_bottlenecks():
    assert ag.Bottleneck.houlsby() == ag.Bottleneck(64, activation="gelu")
    assert ag.Bottleneck.houlsby(8, activation="tanh") == ag.Bottleneck(8, activation="tanh")
    assert ag.Bottleneck.pfeiffer() == ag.Bottleneck(reduction=16)
    assert ag.Bottleneck.parallel(8, scale=2.0) == ag.Bottleneck(8, scale=2.0, parallel=True)
    assert ag.Bottleneck.parallel(8).parallel is True
    assert ag.Bottleneck(8).parallel is False
    assert (ag.Bottleneck(8).where, ag.Bottleneck.parallel(8).where) == ("after", "around")
    with pytest.raises(ag.GraphError, match="Bottleneck has no option 'scal'"):
        ag.Bottleneck.parallel(8, scal=1.0)


def test_a_parallel_adapter_may_change_the_number_of_features():
    graph = layer("post").splice("layer.ffn.up", ag.Bottleneck.parallel(4))
    assert graph["layer.ffn.up.adapter.up"].shape == ("batch", "seq", D_FF)
    assert graph["layer.ffn.up.adapter.down"].inputs == ("layer.norm1",)


def test_a_parallel_adapter_needs_the_input():
    with pytest.raises(ag.BadSplice, match=r"a body 'after' 'layer\.ffn' sees its output only"):
        layer("post").splice("layer.ffn", ag.Bottleneck.parallel(4), where="after")


def test_every_node_is_named():
    names = [n for n in layer("post") if n != "x"]
    assert names == [
        *(f"layer.attention.{n}" for n in ("query", "key", "value", "heads", "output")),
        "layer.add1",
        "layer.norm1",
        "layer.ffn.up",
        "layer.ffn.act",
        "layer.ffn.down",
        "layer.add2",
        "layer.norm2",
    ]


def test_dropout_only_while_training():
    model = randomised(layer("post", dropout=0.5).compile())
    x = torch.randn(2, 5, SIZE)
    assert torch.equal(model.eval()(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "'layer' cannot split batch × seq × 12 into 5 heads"),
        ({"num_heads": 0}, "'layer' cannot split batch × seq × 12 into 0 heads"),
        ({"norm": "middle"}, "norm is 'post' or 'pre', not 'middle'"),
        ({"activation": "gelux"}, "unknown activation 'gelux'"),
        ({"dropout": 1.0}, "a dropout rate is at least 0 and less than 1"),
        ({"name": "a b"}, "a node cannot be called 'a b'"),
    ],
)
def test_options_that_cannot_be_right(options, message):
    x = ag.input("x", shape=("batch", "seq", SIZE))
    with pytest.raises(ag.GraphError, match=message):
        blocks.transformer_layer(x, **{"num_heads": HEADS, "d_ff": D_FF, **options})
