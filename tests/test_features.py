"""Where a value has its features: a bottleneck works on these, also where images have them before their places."""

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
    assert axis_of(ag.dense(conv, 8)) == 3
    assert axis_of(image) == 3
    assert axis_of(ag.batch_norm(ag.input("x", shape=("batch", 8)))) == 1


def test_a_fusion_over_channels_is_refused():
    graph = ag.trace(Net(2), torch.randn(2, 3, 8, 8))
    with pytest.raises(
        ag.ShapeMismatch, match="Fusion needs a host whose features are last; those of 'first'"
    ) as caught:
        graph.splice("first", ag.Fusion({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)}))
    assert "splice it at a layer that gives batch × … × features" in str(caught.value)
