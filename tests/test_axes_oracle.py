"""Which dimension holds the features, against what nobody wrote by hand: sizes that grow, and values that mark them."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, SENSES, spectrogram, speech
from byhand import randomise
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import adaptergraph as ag

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# ---------------------------------------------------------------------- a size that grows with the input is no feature

# models with convolutions, and of these what is not known: masks and other values without features, heads that a
# product of matrices attends with, tables of positions
NAMES = [*SENSES, "whisper", "detr", "convolutional"]
ATTENDING = {"view", "transpose", "reshape", "permute", "getitem", "matmul", "mul", "div", "add", "softmax", "Dropout"}
REFUSED = {
    "wav2vec2": {"_WeightNorm"},
    "hubert": {"_WeightNorm"},
    "audio_spectrogram": {"input"},
    "beit": {"BeitRelativePositionBias"},
    "swin": {"SwinRelativePositionBias", "masked_fill", "sub", "to", "contiguous", "unsqueeze", "view", "transpose"}
    | {"expand", "reshape", "add"},
    "blip": {*ATTENDING, "to", "where", "contiguous"},
    "vilt": {*ATTENDING, "ones", "float", "interpolate", "pad", "cat", "flatten", "where", "contiguous", "expand"}
    - {"mul", "reshape"},
    "detr": {"ones", "getitem", "float", "interpolate"},
}


def larger(options):
    """A configuration for larger inputs: nothing of it is a number of features."""
    changes = {"image_size": 64, "max_length": 64, "max_source_positions": 32}
    if not isinstance(options, dict):
        return options
    return {k: changes.get(k, larger(v)) for k, v in options.items()}


def grown(name):
    """The same architecture for inputs that are larger in every dimension but that of their features."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    build = architecture.build
    model = build(**larger(build.keywords)) if name in SENSES or name == "whisper" else build()
    args, kwargs = architecture.args()
    if architecture.call in (speech, spectrogram):
        along = {"input_features": 2, "input_values": 1, "decoder_input_ids": 1}
    else:
        along = dict.fromkeys(kwargs, 1)
    more = {k: torch.cat([v, v], along[k]) for k, v in kwargs.items() if v.dim() < 4}
    more |= {k: v.repeat(1, 1, 2, 2) for k, v in kwargs.items() if v.dim() == 4}
    more = {k: torch.cat([v, v[:1]]) for k, v in more.items()}
    return model.eval(), tuple(a.repeat(1, 1, 2, 2)[[0, 1, 0]] for a in args), more


def constant(one, other):
    """The dimensions of a value that are as large in both graphs, counted from the end."""
    rank = len(one.shape)
    return {i - rank for i in range(rank) if one.shape[i] == other.shape[i]}


@pytest.mark.parametrize("name", NAMES)
def test_what_grows_with_the_input_is_no_feature(name):
    architecture = ARCHITECTURES[name]
    args, kwargs = architecture.args()
    graph = ag.trace(architecture.model().eval(), *args, **kwargs)
    model, args, kwargs = grown(name)
    other = ag.trace(model, *args, **kwargs)
    values = [n for n in graph.nodes() if len(n.shape or ()) > 2 and n.dtype.is_floating_point]
    pairs = [(n, other[n.name]) for n in values if n.name in other and len(other[n.name].shape) == len(n.shape)]
    assert len(pairs) > 0.9 * len(values)
    wrong = [n for n, o in pairs if n.axis is not None and n.axis not in constant(n, o)]
    assert not wrong
    sure = [n for n, o in pairs if n.axis is not None and constant(n, o) == {n.axis}]
    assert len(sure) > len(values) / 3
    assert {n.op for n in values if n.axis is None} == REFUSED.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_a_body_at_any_value_runs_at_other_sizes(name):
    model, args, kwargs = ARCHITECTURES[name].model().eval(), *ARCHITECTURES[name].args()
    graph = ag.trace(model, *args, **kwargs)
    hosts = [n for n, node in graph._nodes.items() if len(node.shape or ()) > 2 and n in graph.imported.modules]
    hosts = [n for n in hosts if graph[n].dtype.is_floating_point and graph[n].axis is not None]
    for start in range(3):
        some = hosts[start :: max(3, len(hosts) // 5)]
        adapted = graph.splice(some, ag.Bottleneck(4))
        compiled = randomise(adapted.compile(), 0.1).eval()
        other, more, options = grown(name)
        if {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}:
            before, after = model(*more, **options), compiled(*more, **options)
            assert type(before) is type(after)
        for host in some:
            node = graph[host]
            assert adapted.params[f"{host}.adapter.down.weight"].shape == (4, node.shape[node.axis])


# ---------------------------------------------------------------------- values that mark their features


class Chain(nn.Module):
    """Operations one after the other on a value whose numbers are those of their features."""

    def __init__(self, first, steps):
        super().__init__()
        self.first = first
        self.steps = steps
        # without one anywhere what is not known would be taken to be last
        self.conv = nn.Conv1d(1, 1, 1)
        with torch.no_grad():
            first.weight.zero_()
            first.bias.copy_(torch.arange(1.0, 1 + len(first.bias)))

    def forward(self, x):
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x, self.conv(torch.ones(1, 1))


def varying(x):
    """The dimensions along which the numbers change."""
    return {d - x.dim() for d in range(x.dim()) if not torch.equal(x, x.narrow(d, 0, 1).expand_as(x))}


def shapes_of(size, rank, draw):
    """A shape of this many numbers."""
    shape = []
    for _ in range(rank - 1):
        shape.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= shape[-1]
    return (*shape, size)


def step(draw, shape):
    """One operation for a value of this shape, and its name."""
    rank = len(shape)
    dim = draw(st.integers(-rank, rank - 1))
    other = draw(st.integers(-rank, rank - 1))
    order = draw(st.permutations(range(rank)))
    view = shapes_of(math.prod(shape), draw(st.integers(1, 5)), draw)
    start = draw(st.integers(0, shape[dim] - 1))
    found = {
        "permute": lambda x: x.permute(order),
        "torch.permute": lambda x: torch.permute(x, tuple(order)),
        "transpose": lambda x: x.transpose(dim, other),
        "movedim": lambda x: x.movedim(dim, other),
        "moves": lambda x: torch.movedim(x, (dim, 0), (0, dim)) if dim % rank else x,
        "reshape": lambda x: x.reshape(view),
        "flatten": lambda x: x.flatten(*sorted((dim % rank, other % rank))),
        "flatten all but the first": lambda x: x.flatten(1),
        "unflatten": lambda x: x.unflatten(dim, (1, -1)),
        "unsqueeze": lambda x: x.unsqueeze(dim),
        "squeeze": lambda x: x.squeeze(),
        "squeeze one": lambda x: x.squeeze(dim),
        "narrow": lambda x: x.narrow(dim, start, shape[dim] - start),
        "slice": lambda x: x[..., start % shape[-1] :],
        "new": lambda x: x[:, None],
        "number": lambda x: x[(slice(None),) * (dim % rank) + (0,)],
        "rows": lambda x: x[(slice(None),) * (dim % rank) + (torch.arange(shape[dim]),)],
        "select": lambda x: x.select(dim, 0),
        "unbind": lambda x: x.unbind(dim)[0],
        "cat": lambda x: torch.cat([x, x], dim),
        "stack": lambda x: torch.stack([x, x], dim),
        "chunk": lambda x: x.chunk(2, dim)[0],
        "split": lambda x: x.split(1 + start, dim)[0],
        "mean": lambda x: x.mean(dim),
        "mean, kept": lambda x: x.mean((dim,), keepdim=True),
        "max": lambda x: x.max(dim).values,
        "amax": lambda x: torch.amax(x, [dim], True),
        "flip": lambda x: x.flip(dim),
        "cumsum of signs": lambda x: x.sign() * x,
        "expand": lambda x: x.expand(2, *x.shape),
        "repeat": lambda x: x.repeat(2, *(1,) * rank),
        "relu": lambda x: torch.relu_(x.clone()) + 1,
        "plus its mean": lambda x: x + x.mean(dim, keepdim=True),
        "plus itself, turned": lambda x: x + x.transpose(dim, other),
        "plus what is not known": lambda x: x + torch.cdist(x, x)[..., :1].sort(-1)[0] * 0,
        "plus constants": lambda x: x + torch.zeros(x.shape),
        "quantiles": lambda x: x.quantile(torch.tensor([0.2, 0.7]), dim),
        "quantiles, kept": lambda x: torch.quantile(x, torch.tensor([0.2, 0.7]), dim, keepdim=True),
        "a quantile": lambda x: torch.quantile(x, 0.5, dim),
        "times a column": lambda x: x * torch.ones(shape[-1]),
        "avg_pool1d": lambda x: F.avg_pool1d(x, 1),
        "max_pool2d": lambda x: F.max_pool2d(x, (1, 2)),
        "interpolate": lambda x: F.interpolate(x, scale_factor=2),
        "pad": lambda x: F.pad(x, (1, 1), mode="replicate"),
        "unfold": lambda x: x.unfold(dim, 1, 1),
        "einsum": lambda x: torch.einsum("abc->cab", x),
        "matmul": lambda x: torch.matmul(torch.ones(2, x.shape[-2]), x),
        "mT": lambda x: x.mT,
        "where": lambda x: torch.where(x > 0, x, -x),
        "to": lambda x: x.double().to(torch.float32),
        "written": lambda x: _written(x),
        "squeezed in place": lambda x: x.clone().squeeze_(),
        "unsqueezed in place": lambda x: x.clone().unsqueeze_(dim),
        "turned in place": lambda x: x.clone().transpose_(dim, other),
    }
    name = draw(st.sampled_from(sorted(found)))
    return name, found[name]


def _all(steps, x):
    for each in steps:
        x = each(x)
    return x


def _written(x):
    y = x.clone()
    y[..., :1] += 0
    y.mul_(2)
    return y


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_dimension_is_the_one_along_which_the_features_are(data):
    """Each place has the numbers 1, 2, 3, … as its features, so that they alone change along a dimension."""
    channels = data.draw(st.sampled_from([2, 3, 6]))
    conv = data.draw(st.sampled_from([nn.Conv1d(2, channels, 1), nn.Conv2d(2, channels, 1), nn.Linear(2, channels)]))
    x = {nn.Conv1d: torch.ones(2, 2, 4), nn.Conv2d: torch.ones(2, 2, 3, 4), nn.Linear: torch.ones(3, 4, 2)}[type(conv)]
    here, steps, names = Chain(conv, [])(x)[0], [], []
    for _ in range(data.draw(st.integers(1, 6))):
        name, made = step(data.draw, here.shape)
        try:
            after = made(here)
        except (RuntimeError, IndexError, ValueError):
            continue
        if after.numel() > 5000 or not after.numel() or not after.dim():
            continue
        here, steps, names = after, [*steps, made], [*names, name]
    assume(steps)
    model = Chain(conv, steps)
    torch.testing.assert_close(model(x)[0], here)
    graph = ag.trace(model, x)
    node = graph[graph.outputs["0"]]
    if len(varying(here)) == 1 and node.axis is not None:
        assert {node.axis} == varying(here), names
    if len(varying(here)) > 1:
        assert node.axis is None, names
    # the same in a declared graph, where each operation is a function in one node
    given = ag.module(ag.input("x", shape=x.shape), model.first)
    declared = ag.nx(given, lambda h: _all(steps, h))
    assert declared.axis == node.axis
