"""Every layer against torch with the same weights, and what is known and refused at the call."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptergraph as ag
from adaptergraph import shapes
from adaptergraph.layers import table

IDS = torch.tensor([[1, 2, 0], [4, 4, 3]])


def x(*shape, dtype=torch.float32, name="x"):
    return ag.input(name, shape=shape or ("batch", 8), dtype=dtype)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def compare(node, plain, *given, weights=()):
    """Forward and backward of a one-layer graph against a plain function of the weights and inputs.

    Args:
        weights: names of the parameters that `plain` is given first, in order.
    """
    model = randomised(ag.Graph(node).compile())
    params = [dict(model.named_parameters())[w].detach().clone().requires_grad_() for w in weights]
    one = [g.clone().requires_grad_() if g.is_floating_point() else g for g in given]
    two = [g.clone().requires_grad_() if g.is_floating_point() else g for g in given]
    out, wanted = model(*one), plain(*params, *two)
    assert out.dtype == wanted.dtype == node.dtype
    assert len(node.shape) == out.dim()
    known = [(d, s) for d, s in zip(node.shape, out.shape, strict=True) if isinstance(d, int)]
    assert all(d == s for d, s in known)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    if out.requires_grad:
        out.square().sum().backward()
        wanted.square().sum().backward()
        for mine, theirs in zip(one, two, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        for name, param in zip(weights, params, strict=True):
            torch.testing.assert_close(model.get_parameter(name).grad, param.grad, rtol=1e-5, atol=1e-5)
    assert set(dict(model.named_parameters())) == set(weights)


# ---------------------------------------------------------------------- one by one


def test_dense():
    compare(ag.dense(x(), 3, name="d"), lambda w, b, t: t @ w.T + b, randn(4, 8), weights=["d.weight", "d.bias"])
    compare(ag.dense(x(), 3, bias=False, name="d"), lambda w, t: t @ w.T, randn(4, 8), weights=["d.weight"])
    three = x("batch", "seq", 8)
    assert ag.dense(three, 3).shape == ("batch", "seq", 3)
    compare(ag.dense(three, 3, name="d"), lambda w, b, t: t @ w.T + b, randn(2, 5, 8), weights=["d.weight", "d.bias"])
    vector = x(8)
    compare(ag.dense(vector, 3, name="d"), lambda w, b, t: w @ t + b, randn(8), weights=["d.weight", "d.bias"])


def test_dense_with_an_activation_is_two_nodes():
    graph = ag.Graph(ag.dense(x(), 3, activation="gelu", name="d"))
    assert list(graph) == ["x", "d", "gelu_0"]
    compare(
        ag.dense(x(), 3, activation="gelu", name="d"),
        lambda w, b, t: F.gelu(t @ w.T + b),
        randn(4, 8),
        weights=["d.weight", "d.bias"],
    )


def test_embedding():
    node = ag.embedding(x("batch", "seq", dtype=torch.int64), 5, 4, name="e")
    assert (node.shape, node.dtype) == (("batch", "seq", 4), torch.float32)
    compare(node, lambda w, t: w[t], IDS, weights=["e.weight"])
    compare(
        ag.embedding(x(3, dtype=torch.int32), 5, 4, name="e"),
        lambda w, t: w[t.long()],
        IDS[0].int(),
        weights=["e.weight"],
    )


def erf_gelu(t):
    return t * 0.5 * (1 + torch.erf(t / math.sqrt(2)))


def tanh_gelu(t):
    return 0.5 * t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))


def soft(t, dim=-1):
    e = (t - t.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


ACTIVATIONS = {
    "relu": lambda t: t * (t > 0),
    "gelu": erf_gelu,
    "silu": lambda t: t / (1 + (-t).exp()),
    "tanh": lambda t: (t.exp() - (-t).exp()) / (t.exp() + (-t).exp()),
    "sigmoid": lambda t: 1 / (1 + (-t).exp()),
    "softmax": soft,
    "exp": torch.exp,
    "elu": lambda t: torch.where(t > 0, t, t.exp() - 1),
    "celu": lambda t: torch.where(t > 0, t, t.exp() - 1),
    "hard_tanh": lambda t: t.clamp(-1, 1),
    "hard_sigmoid": lambda t: (t / 6 + 0.5).clamp(0, 1),
    "hard_silu": lambda t: t * (t / 6 + 0.5).clamp(0, 1),
    "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
    "linear": lambda t: t * 1,
    "log_sigmoid": lambda t: -(1 + (-t).exp()).log(),
    "log_softmax": lambda t: soft(t).log(),
    "log_sumexp": lambda t: t.exp().sum(-1, keepdim=True).log(),
    "mish": lambda t: t * torch.tanh((1 + t.exp()).log()),
    "relu6": lambda t: t.clamp(0, 6),
    "selu": lambda t: 1.0507009873554805 * torch.where(t > 0, t, 1.6732632423543772 * (t.exp() - 1)),
    "softplus": lambda t: (1 + t.exp()).log(),
    "softsign": lambda t: t / (1 + t.abs()),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    compare(ag.activation(x(), name), ACTIVATIONS[name], 2 * randn(4, 8))
    if hasattr(ag, name):
        compare(getattr(ag, name)(x()), ACTIVATIONS[name], 2 * randn(4, 8))


def test_there_is_a_test_for_every_activation():
    assert set(table.ACTIVATIONS) == set(ACTIVATIONS)


def test_options_of_activations():
    compare(ag.gelu(x(), approximate="tanh"), tanh_gelu, randn(4, 8))
    compare(ag.activation(x(), "gelu", approximate="tanh"), tanh_gelu, randn(4, 8))
    compare(ag.softmax(x("batch", 3, 4), dim=1), lambda t: soft(t, 1), randn(2, 3, 4))
    compare(ag.activation(x(), "leaky_relu", negative_slope=0.3), lambda t: torch.where(t > 0, t, 0.3 * t), randn(4, 8))
    compare(ag.activation(x(), "softmax", dim=0), lambda t: soft(t, 0), randn(4, 8))
    compare(ag.activation(x(), "log_sumexp", dim=0), lambda t: t.exp().sum(0, keepdim=True).log(), randn(4, 8))


def test_dropout():
    model = ag.Graph(ag.dropout(x(), rate=0.25)).compile()
    given = torch.ones(100, 8)
    assert torch.equal(model.eval()(given), given)
    torch.manual_seed(0)
    out = model.train()(given)
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.15 < (out == 0).float().mean() < 0.35


def test_layer_norm():
    def plain(w, b, t, eps=1e-5):
        return (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True, unbiased=False) + eps).sqrt() * w + b

    names = ["n.weight", "n.bias"]
    compare(ag.layer_norm(x(), name="n"), plain, randn(4, 8), weights=names)
    compare(ag.layer_norm(x(), eps=0.1, name="n"), lambda w, b, t: plain(w, b, t, 0.1), randn(4, 8), weights=names)
    fresh = ag.Graph(ag.layer_norm(x(), name="n")).compile()
    assert torch.equal(fresh.n.weight, torch.ones(8))
    assert torch.equal(fresh.n.bias, torch.zeros(8))


def two(other=("batch", 8)):
    return [x(), x(*other, name="y")]


def test_combinators():
    given = randn(4, 8), randn(4, 8, seed=1)
    compare(ag.add(two()), lambda a, b: a + b, *given)
    compare(ag.subtract(two()), lambda a, b: a - b, *given)
    compare(ag.multiply(two()), lambda a, b: a * b, *given)
    compare(ag.add(*two()), lambda a, b: a + b, *given)
    three = [*two(), x(name="z")]
    more = (*given, randn(4, 8, seed=2))
    compare(ag.subtract(three), lambda a, b, c: a - b - c, *more)
    compare(ag.multiply(*three), lambda a, b, c: a * b * c, *more)
    compare(ag.add(three), lambda a, b, c: a + b + c, *more)


def test_broadcasting_is_torchs():
    assert ag.add(two((8,))).shape == ("batch", 8)
    assert ag.multiply([x("batch", "seq", 8), x("batch", 1, 8, name="y")]).shape == ("batch", "seq", 8)
    compare(ag.add(two((8,))), lambda a, b: a + b, randn(4, 8), randn(8, seed=1))


def test_concatenate():
    node = ag.concatenate(two(("batch", 3)))
    assert node.shape == ("batch", 11)
    compare(node, lambda a, b: torch.cat([a, b], -1), randn(4, 8), randn(4, 3))
    first = ag.concatenate([x(), x("other", 8, name="y")], dim=0)
    assert first.shape == (None, 8)
    compare(first, lambda a, b: torch.cat([a, b], 0), randn(4, 8), randn(3, 8))


@pytest.mark.parametrize(
    ("shape", "size", "to", "known"),
    [
        (("batch", 12), (2, 12), ("batch", 3, -1), ("batch", 3, 4)),
        (("batch", 3, 4), (2, 3, 4), ("batch", -1), ("batch", 12)),
        (("batch", "seq", 4), (2, 5, 4), ("batch", "seq", 2, 2), ("batch", "seq", 2, 2)),
        (("batch", "seq", 4), (2, 5, 4), ("seq", "batch", 4), ("seq", "batch", 4)),
        (("batch", "seq", 4), (2, 5, 4), (-1, 4), (None, 4)),
        ((3, 4), (3, 4), (2, 6), (2, 6)),
        ((None, 4), (3, 4), (-1, 2, 2), (None, 2, 2)),
    ],
)
def test_reshape(shape, size, to, known):
    node = ag.reshape(x(*shape), to)
    assert node.shape == known
    real = dict(zip(shape, size, strict=True))
    compare(node, lambda t: t.reshape([real.get(d, d) if isinstance(d, str) else d for d in to]), randn(*size))


def test_transpose_and_flatten():
    node = x("batch", 3, 4, 5)
    assert ag.transpose(node).shape == ("batch", 5, 4, 3)
    assert ag.transpose(node, (3, 0, 1, 2)).shape == (5, "batch", 3, 4)
    assert ag.flatten(node).shape == ("batch", 60)
    given = randn(2, 3, 4, 5)
    compare(ag.transpose(node), lambda t: t.permute(0, 3, 2, 1), given)
    compare(ag.transpose(node, (3, 0, -2, 1)), lambda t: t.permute(3, 0, 2, 1), given)
    compare(ag.flatten(node), lambda t: t.reshape(2, 60), given)


def heads(t, n):
    return torch.stack(t.chunk(n, -1), 1)


def attend(q, k, v, n, bias=None):
    scores = heads(q, n) @ heads(k, n).transpose(-1, -2) / math.sqrt(q.shape[-1] // n)
    if bias is not None:
        scores = scores + bias
    out = soft(scores) @ heads(v, n)
    return torch.cat(out.unbind(1), -1)


INF = float("-inf")


def test_attention():
    q, k, v = (x("batch", s, 8, name=n) for s, n in (("q_len", "q"), ("kv", "k"), ("kv", "v")))
    given = randn(2, 4, 8), randn(2, 5, 8, seed=1), randn(2, 5, 8, seed=2)
    node = ag.attention(q, k, v, num_heads=2)
    assert node.shape == ("batch", "q_len", 8)
    compare(node, lambda a, b, c: attend(a, b, c, 2), *given)
    causal = torch.ones(4, 5).tril().log()
    compare(ag.attention(q, k, v, num_heads=4, causal=True), lambda a, b, c: attend(a, b, c, 4, causal), *given)


SEEN = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        (("batch", "kv"), SEEN.bool()),
        (("batch", "kv"), SEEN),
        (("batch", "q_len", "kv"), SEEN[:, None].repeat(1, 4, 1).bool()),
        (("batch", 1, 1, "kv"), SEEN[:, None, None].bool()),
        (("batch", 1, "q_len", "kv"), SEEN[:, None, None].repeat(1, 1, 4, 1).float().log().clamp(min=-1e4)),
    ],
)
def test_masks_of_attention(shape, mask, causal):
    q, k, v = (x("batch", s, 8, name=n) for s, n in (("q_len", "q"), ("kv", "k"), ("kv", "v")))
    node = ag.attention(q, k, v, num_heads=2, mask=x(*shape, dtype=mask.dtype, name="m"), causal=causal)
    assert node.shape == ("batch", "q_len", 8)
    given = randn(2, 4, 8), randn(2, 5, 8, seed=1), randn(2, 5, 8, seed=2)
    bias = SEEN[:, None, None].float().log().clamp(min=-1e4 if mask.is_floating_point() else INF)
    if causal:
        bias = bias + torch.ones(4, 5).tril().log()
    model = ag.Graph(node).compile()
    torch.testing.assert_close(model(*given, mask), attend(*given, 2, bias), rtol=1e-5, atol=1e-5)


def test_dropout_of_attention_only_while_training():
    q = x("batch", "seq", 8)
    model = ag.Graph(ag.attention(q, q, q, num_heads=2, dropout=0.5)).compile()
    given = randn(2, 4, 8)
    assert torch.equal(model.eval()(given), model(given))
    assert not torch.equal(model.train()(given), model(given))


class Gate(nn.Module):
    """A module with a parameter, a buffer, state and two inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(8))
        self.register_buffer("shift", randn(8, seed=1))
        self.calls = 0

    def forward(self, one, two):
        self.calls += 1
        self.last = one
        return one * self.weight + two + self.shift


def test_module_is_copied_and_never_touched():
    gate = Gate().train()
    before = copy.deepcopy(gate.__dict__)
    node = ag.module([x(), x(name="y")], gate, name="gate")
    assert gate.__dict__.keys() == before.keys()
    assert gate.calls == 0
    assert gate.training
    graph = ag.Graph(node)
    model = graph.compile()
    given = randn(4, 8), randn(4, 8, seed=3)
    assert torch.equal(model(*given), gate.weight * given[0] + given[1] + gate.shift)
    model(*given).sum().backward()
    with torch.no_grad():
        model.gate.weight.add_(1)
        model.gate.shift.add_(1)
    assert gate.weight.grad is None
    assert torch.equal(gate.weight, randn(8))
    assert torch.equal(gate.shift, randn(8, seed=1))
    assert not torch.equal(graph.compile().gate.weight, model.gate.weight), "compiled again it starts as the user's is"
    assert list(model.state_dict()) == ["gate.weight", "gate.shift"]


def test_module_keeps_its_own_requires_grad_out_of_it():
    """What is trained is said by the graph, not by what the module happens to say."""
    linear = nn.Linear(8, 8).requires_grad_(False)
    assert all(p.requires_grad for p in ag.Graph(ag.module(x(), linear)).compile().parameters())
    assert not any(p.requires_grad for p in ag.Graph(ag.module(x(), nn.Linear(8, 8))).freeze().compile().parameters())


def test_modules_on_other_devices_and_a_default_device():
    assert ag.module(x(), nn.Linear(8, 3, device="meta")).shape == ("batch", 3)
    torch.set_default_device("meta")
    try:
        assert ag.dense(x(), 7).shape == ("batch", 7)
        assert ag.nx(x(), lambda t: t + torch.ones(8)).shape == ("batch", 8)
        model = ag.Graph(ag.dense(x(), 7, name="d")).compile()
    finally:
        torch.set_default_device(None)
    assert model.d.weight.device.type == "cpu"


def test_nx_and_layer():
    compare(ag.nx(x(), torch.sin), torch.sin, randn(4, 8))
    compare(ag.nx(two(), lambda a, b: a @ b.mT), lambda a, b: a @ b.mT, randn(4, 8), randn(4, 8, seed=1))
    gain = ag.param("gain.scale", (8,), init="ones")
    compare(
        ag.layer(lambda t, g, power: t**power * g, [x(), gain], name="gain", power=2),
        lambda g, t: t**2 * g,
        randn(4, 8),
        weights=["gain.scale"],
    )


def test_param_and_constant():
    compare(x() * ag.param("p", (8,), init="ones"), lambda p, t: t * p, randn(4, 8), weights=["p"])
    value = randn(8, seed=5)
    node = x() + ag.constant(value, name="c")
    compare(node, lambda t: t + randn(8, seed=5), randn(4, 8))
    value.zero_()
    model = ag.Graph(node).compile()
    assert torch.equal(model.c, randn(8, seed=5)), "a constant is a copy"
    assert not model.state_dict()
    assert ag.constant(2).dtype == torch.int64
    assert ag.constant(2.5).shape == ()
    assert ag.constant(torch.ones(2, 3, dtype=torch.bool)).dtype == torch.bool


def test_operators_of_nodes():
    given = randn(4, 8), randn(4, 8, seed=1)
    a, b = two()
    compare(a + b, lambda s, t: s + t, *given)
    compare(a - b, lambda s, t: s - t, *given)
    compare(a * b, lambda s, t: s * t, *given)
    compare(a * 2.0, lambda s: s * 2, given[0])
    compare(2 * a, lambda s: s * 2, given[0])
    compare(a + 1, lambda s: s + 1, given[0])
    compare(1 - a, lambda s: 1 - s, given[0])
    compare(a - 0.5, lambda s: s - 0.5, given[0])
    compare(0.5 + a, lambda s: s + 0.5, given[0])
    assert (a * 2).dtype == torch.float32
    assert list(ag.Graph(a * 2.0)) == ["x", "constant_0", "multiply_0"]
    for wrong in (torch.ones(8), "2", True, None):
        with pytest.raises(ag.GraphError, match="multiply reads nodes, not"):
            a * wrong
    with pytest.raises(ag.GraphError, match=r"ag.constant\(…\)"):
        torch.ones(8) * a


# ---------------------------------------------------------------------- shapes and dtypes


def test_shapes_are_known_at_the_call():
    t = x("batch", "seq", None, 6)
    assert ag.relu(t).shape == ("batch", "seq", None, 6)
    assert ag.dense(t, 3).shape == ("batch", "seq", None, 3)
    assert ag.nx(t, lambda v: v.sum(1)).shape == ("batch", None, 6)
    assert ag.nx(t, lambda v: v.shape and v.mean()).shape == ()
    assert ag.nx(x("batch", "seq", 4), lambda v: v.transpose(0, 1)).shape == ("seq", "batch", 4)
    assert ag.nx(x("batch", 4), lambda v: torch.cat([v, v])).shape == (None, 4)
    assert ag.nx(x("n", 4), lambda v: v @ v.T).shape == ("n", "n")
    assert ag.nx(x("batch", "seq", 4), lambda v: v @ v.mT).shape == ("batch", "seq", "seq")
    assert ag.module(x("batch", 3, "h", "w"), nn.Conv2d(3, 5, 3, padding=1)).shape == ("batch", 5, "h", "w")
    assert ag.module(x("batch", 3, "h", "w"), nn.Conv2d(3, 5, 3)).shape == ("batch", 5, None, None)
    assert x().shape == ("batch", 8)
    assert ag.input("s", shape=()).shape == ()


@pytest.mark.parametrize("size", [211, 233, 401, 2 * 211])
def test_named_sizes_do_not_mix_with_real_ones(size):
    """Whatever stands in for a name while shapes are worked out may also be a real size."""
    t = x("batch", size)
    assert ag.relu(t).shape == ("batch", size)
    assert ag.dense(t, 3).params["weight"].shape == (3, size)
    assert ag.nx(t, lambda v: v.T).shape == (size, "batch")
    assert ag.concatenate([t, x("batch", 1, name="y")]).shape == ("batch", size + 1)


def test_more_names_than_stand_ins():
    names = [f"n{i}" for i in range(9)]
    assert ag.relu(x(*names[:6])).shape == tuple(names[:6])
    several = [x(*names[i : i + 3], name=f"x{i}") for i in (0, 3, 6)]
    node = ag.nx(several, lambda a, b, c: a[..., None, None] * b[0, :, 0, None] * c[0, 0, :])
    assert node.shape == ("n0", "n1", "n2", "n4", "n8")


def test_what_is_remembered_of_one_call_is_not_said_of_another():
    """Options that look alike are different calls: True and 1, 1 and 1.0, "None" and None."""
    values = [
        1,
        1.0,
        True,
        "1",
        None,
        "None",
        (1,),
        (True,),
        ("1",),
        [1, (2,)],
        torch.float32,
        "torch.float32",
        0.0,
        -0.0,
    ]
    keys = [shapes._plain(v) for v in values]
    assert len(set(keys)) == len(values)
    assert shapes._plain([1, 2]) == shapes._plain((1, 2))
    assert ag.dense(x(), 3).params["weight"].shape != ag.dense(x(), 3).params["bias"].shape
    assert ag.dense(x(), 3, bias=False).params.keys() == {"weight"}
    assert ag.dense(x(), 3).params.keys() == {"weight", "bias"}
    assert ag.dense(x(9), 3).params["weight"].shape == (3, 9)
    try:
        torch.set_default_dtype(torch.float64)
        ids = x("batch", dtype=torch.int64)
        assert ag.embedding(ids, 3, 2).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert ag.embedding(ids, 3, 2).dtype == torch.float32


def test_a_repeated_layer_costs_nothing(monkeypatch):
    ag.dense(x("batch", 77), 5)
    monkeypatch.setattr(shapes, "_probe", lambda *a: pytest.fail("worked out again"))
    ag.dense(x("batch", 77), 5, name="other", weight_init="zeros")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_take_the_dtype_of_what_they_read(dtype):
    t = x(dtype=dtype)
    node = ag.layer_norm(ag.relu(ag.dense(t, 8, name="d")), name="n")
    assert node.dtype == dtype
    graph = ag.Graph(ag.Adapter.wrap(node, bottleneck_size=2, scale="learned"))
    assert all(p.dtype == dtype for p in graph.params.values())
    model = graph.splice("d", ag.Bottleneck(2, scale=0.5)).compile()
    assert all(p.dtype == dtype for p in model.parameters())
    assert model(randn(2, 8).to(dtype)).dtype == dtype


def test_making_nodes_and_compiling_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    graph = ag.Graph(ag.dropout(ag.dense(ag.module(x(), nn.Linear(8, 8, device="meta")), 13), rate=0.3))
    graph.splice("dense_0", ag.Bottleneck(2)).truncate("dense_0").unsplice()
    ag.Graph(ag.dense(x(), 13, weight_init="normal")).compile()
    assert torch.equal(torch.rand(1), wanted)


def test_a_module_with_several_outputs_is_an_end():
    node = ag.module(x("batch", "seq", 8), nn.LSTM(8, 8, batch_first=True), name="lstm")
    assert (node.shape, node.dtype) == (None, None)
    out, (h, _) = ag.Graph(node).compile()(randn(2, 3, 8))
    assert (out.shape, h.shape) == ((2, 3, 8), (1, 2, 8))
    with pytest.raises(ag.GraphError, match="relu reads 'lstm', which gives no single tensor"):
        ag.relu(node)
    with pytest.raises(ag.BadSplice, match="'lstm' gives no single tensor: a body has nothing to work on"):
        ag.Graph(node).splice("lstm", ag.Bottleneck(2))


# ---------------------------------------------------------------------- initial values


def test_initial_values_by_name_and_by_function():
    def fresh(**options):
        return ag.Graph(ag.dense(x(100), 200, name="d", **options)).freeze().compile().d

    assert torch.equal(fresh(weight_init="zeros").weight, torch.zeros(200, 100))
    assert torch.equal(fresh(bias_init="ones").bias, torch.ones(200))
    assert fresh(weight_init=0.5).weight.std() == pytest.approx(0.5, rel=0.05)
    assert fresh(weight_init="normal").weight.std() == pytest.approx(0.01, rel=0.05)
    assert fresh(weight_init="uniform").weight.abs().max() == pytest.approx(0.01, rel=0.05)
    assert fresh(weight_init="glorot_uniform").weight.abs().max() == pytest.approx(math.sqrt(6 / 300), rel=0.01)
    assert fresh(weight_init="glorot_normal").weight.std() == pytest.approx(math.sqrt(2 / 300), rel=0.05)
    assert fresh(weight_init="lecun_uniform").weight.abs().max() == pytest.approx(math.sqrt(3 / 100), rel=0.01)
    assert fresh(weight_init="lecun_normal").weight.std() == pytest.approx(math.sqrt(1 / 100), rel=0.05)
    assert fresh(weight_init="he_uniform").weight.abs().max() == pytest.approx(math.sqrt(6 / 100), rel=0.01)
    assert fresh(weight_init="he_normal").weight.std() == pytest.approx(math.sqrt(2 / 100), rel=0.05)
    w = fresh(weight_init="orthogonal").weight
    torch.testing.assert_close(w.T @ w, torch.eye(100), rtol=1e-4, atol=1e-4)
    assert torch.equal(fresh(weight_init="identity").weight, torch.eye(200, 100))
    assert torch.equal(fresh(weight_init=lambda t: t.fill_(7)).weight, torch.full((200, 100), 7.0))
    assert fresh().weight.abs().max() == pytest.approx(1 / math.sqrt(100), rel=0.01), "torch's own"
    emb = ag.Graph(ag.embedding(x("b", dtype=torch.int64), 50, 20, weight_init=0.1, name="e")).freeze().compile().e
    assert emb.weight.std() == pytest.approx(0.1, rel=0.1)
    assert ag.Graph(x() * ag.param("p", (8,), init=2.0)).freeze().compile().p.std() > 0.5


@pytest.mark.parametrize("init", ["identity", "near_identity"])
def test_an_identity_is_a_matrix(init):
    x = ag.input("x", shape=("batch", 8, 8, 3))
    with pytest.raises(ag.GraphError, match=f"'{init}' fills matrices, not the weight of conv of shape"):
        ag.conv(x, 3, kernel_size=3, weight_init=init, name="c")
