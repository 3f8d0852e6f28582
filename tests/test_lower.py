"""A declared graph compiled: readable, like any torch module, and what it starts from depends on names only."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter


def x(*shape, name="x", dtype=torch.float32):
    return ag.input(name, shape=shape or ("batch", 8), dtype=dtype)


def randn(*shape, seed=0):
    return torch.randn(*(shape or (4, 8)), generator=torch.Generator().manual_seed(seed))


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model


def scale(t, by):
    return t * by


def everything():
    """A graph with a node of each kind of lowering, and bodies."""
    h = ag.relu(ag.dense(x(), 8, name="enc.fc"), name="enc.act")
    h = ag.module(h, nn.Sequential(nn.Linear(8, 8), nn.Tanh()), name="seq")
    h = ag.layer(scale, [h], by=2.0, name="scaled")
    h = ag.nx(h, torch.sin, name="sin")
    h = h * ag.param("gain", (8,), init="ones") + ag.constant(0.5, name="shift")
    h = Adapter.wrap(ag.concatenate([h, ag.softmax(h)], name="cat"), bottleneck_size=2, name="wrap")
    graph = ag.Graph(ag.layer_norm(ag.reshape(h, ("batch", 2, -1)), name="out"))
    return graph.freeze().splice("{enc,enc.fc,seq,out}", ag.Bottleneck(3, activation="gelu", scale="learned"))


# ---------------------------------------------------------------------- code and keys


def test_a_node_may_be_called_what_the_library_calls_things():
    inputs, source = x(name="inputs"), x(name="source")
    graph = ag.Graph(ag.dense(inputs, 8, name="layer.inputs") + ag.dense(source, 8, name="layer.source"))
    model = randomised(graph.splice("layer.source", ag.Bottleneck(2)).compile())
    a, b = randn(seed=1), randn(seed=2)
    one, two = model.layer.inputs, model.layer.source
    h = two(b)
    wanted = one(a) + h + two.adapter.up(torch.relu(two.adapter.down(h)))
    assert torch.allclose(model(inputs=a, source=b), wanted)
    assert torch.allclose(pickle.loads(pickle.dumps(model))(a, b), wanted)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(a, b), wanted)
    with pytest.raises(ag.ShapeMismatch, match="input 'source' has another shape than declared"):
        model(a, b[:2])
    top = ag.Graph(ag.dense(ag.input("x", shape=("batch", 8)), 8, name="source")).compile()
    assert list(top.state_dict()) == ["source.weight", "source.bias"]


def test_the_code_can_be_read():
    model = ag.Graph(Adapter.wrap(ag.dense(x(), 8, name="enc.0.fc"), bottleneck_size=2)).compile()
    lines = [line.split(";")[0].strip() for line in model.code.strip().splitlines()]
    assert lines == [
        "def forward(self, x = None):",
        "_inputs = self._inputs",
        "check_inputs = adaptergraph_lower_check_inputs(_inputs, x)",
        'enc_0_fc = getattr(self.enc, "0").fc(x)',
        "adapter_down = self.adapter.down(enc_0_fc)",
        "adapter_act = torch.nn.functional.relu(adapter_down)",
        "adapter_up = self.adapter.up(adapter_act)",
        "adapter_residual = enc_0_fc + adapter_up",
        "return adapter_residual",
    ]
    assert isinstance(model, torch.fx.GraphModule)


def test_the_keys_are_the_names_of_nodes():
    model = everything().compile()
    assert list(model.state_dict()) == list(dict(model.named_parameters()))
    assert (
        set(model.state_dict())
        == set(everything().params)
        == {
            "gain",
            *(f"enc.fc.{p}" for p in ("weight", "bias")),
            *(f"seq.0.{p}" for p in ("weight", "bias")),
            *(f"out.{p}" for p in ("weight", "bias")),
            *(f"wrap.{n}.{p}" for n in ("down", "up") for p in ("weight", "bias")),
            *(
                f"{h}.adapter.{n}.{p}"
                for h in ("enc", "enc.fc", "seq", "out")
                for n in ("down", "up")
                for p in ("weight", "bias")
            ),
            *(f"{h}.adapter.scale" for h in ("enc", "enc.fc", "seq", "out")),
        }
    )
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert shapes == {n: p.shape for n, p in everything().params.items()}


def test_names_that_look_alike_in_code():
    h = ag.relu(ag.dense(x(), 8, name="a.b"), name="a_b")
    h = ag.dense(ag.tanh(h, name="relu"), 8, name="torch")
    graph = ag.Graph(ag.dense(ag.add([h, x(name="a_b_1")], name="check_inputs"), 8, name="0.1_x"))
    model = randomised(graph.compile())
    one, two = randn(), randn(seed=3)
    weights = dict(model.named_parameters())
    h = (one @ weights["a.b.weight"].T + weights["a.b.bias"]).relu().tanh()
    h = h @ weights["torch.weight"].T + weights["torch.bias"] + two
    wanted = h @ weights["0.1_x.weight"].T + weights["0.1_x.bias"]
    torch.testing.assert_close(model(one, two), wanted)


@pytest.mark.parametrize(
    "name", ["input", "list", "type", "x_1", "x1", "_x", "X", "relu", "add", "print", "self_", "operator"]
)
def test_names_of_inputs(name):
    try:
        node = x(name=name)
    except ag.GraphError:
        assert name == "type", "an attribute of every module"
        return
    model = ag.Graph(ag.relu(node) + 1.0).compile()
    given = randn()
    assert torch.equal(model(**{name: given}), given.relu() + 1)
    assert torch.equal(model(given), given.relu() + 1)


# ---------------------------------------------------------------------- what it starts from


def values(graph, seed=0):
    return {n: p.detach() for n, p in graph.compile(seed=seed).named_parameters()}


def same(one, two):
    return all(torch.equal(one[n], two[n]) for n in one.keys() & two.keys())


def test_initial_values_depend_on_seed_and_name_only():
    base = ag.Graph(ag.dense(ag.relu(ag.dense(x(), 8, name="a")), 8, name="b"))
    first = values(base)
    assert same(first, values(base))
    assert same(first, values(base.splice("*", ag.Bottleneck(2))))
    assert same(first, values(base.splice("a", ag.Bottleneck(2), name="other").splice("a", ag.Bottleneck(2))))
    spliced = values(base.splice("*", ag.Bottleneck(2)))
    assert same(spliced, values(base.splice("a", ag.Bottleneck(2))))
    assert same(spliced, values(ag.Graph(ag.dense(base.splice("*", ag.Bottleneck(2))["b"], 3, name="c"))))
    before = ag.dense(x(), 8, name="before")
    assert same(first, values(ag.Graph(ag.dense(ag.dense(before, 8, name="a"), 8, name="b"))))
    assert same(first, values(base.freeze()))
    assert not torch.equal(first["a.weight"], first["b.weight"])
    other = values(base, seed=1)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    renamed = values(base.rename("a", "c"))
    assert not torch.equal(renamed["c.weight"], first["a.weight"])
    torch.manual_seed(123)
    torch.rand(7)
    assert same(first, values(base))


def test_a_wrapped_and_a_spliced_body_start_alike():
    base = ag.Graph(ag.dense(x(), 8, name="fc"))
    wrapped = ag.Graph(Adapter.wrap(ag.dense(x(), 8, name="fc"), bottleneck_size=2, name="fc.adapter"))
    assert same(values(base.splice("fc", ag.Bottleneck(2))), values(wrapped))


def test_state_is_loaded_by_name():
    graph = everything()
    state = {n: torch.full_like(p, i) for i, (n, p) in enumerate(values(graph).items())}
    model = graph.compile(state=state)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    with pytest.raises(ag.StateMismatch, match="is missing   it is frozen: training would not mend it"):
        graph.compile(state={"gain": torch.full((8,), 7.0)})
    hosts = [n for n in graph.params if n not in graph.body_params]
    graph = graph.unfreeze(hosts)
    part = graph.compile(state={"gain": torch.full((8,), 7.0)})
    assert torch.equal(part.gain, torch.full((8,), 7.0))
    assert torch.equal(part.enc.fc.weight, values(graph)["enc.fc.weight"])
    with pytest.raises(ag.StateMismatch, match="2 tensors of state do not fit the model"):
        graph.compile(state={"gian": torch.ones(8), "gain": torch.ones(9)})
    with pytest.raises(ag.GraphError, match="a declared graph has no host to attach to"):
        graph.compile(nn.Linear(2, 2))
    with pytest.raises(ag.GraphError, match="a declared graph has no host to attach to"):
        graph.compile(inplace=True)


def test_compile_for_a_device_and_a_dtype():
    graph = everything()
    meta = graph.compile(device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    half = graph.compile(dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(randn().bfloat16()).dtype == torch.bfloat16
    assert same({n: p.bfloat16() for n, p in values(graph).items()}, dict(half.named_parameters()))


# ---------------------------------------------------------------------- trained and frozen


def test_frozen_parameters_need_no_gradient_and_do_not_move():
    graph = everything()
    model = randomised(graph.compile())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == graph.trained
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(randn()).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is graph.trained[name], name
        assert torch.equal(parameter, before[name]) is not graph.trained[name], name


def test_no_autograd_graph_before_the_first_trained_node():
    graph = ag.Graph(ag.dense(ag.relu(ag.dense(x(), 8, name="a"), name="act"), 8, name="b"))
    model = graph.freeze("a").tap("act").compile()
    out = model(randn())
    assert not out["act"].requires_grad
    assert out["b"].requires_grad
    assert not any(v.requires_grad for v in graph.freeze().tap("act").compile()(randn()).values())


class Norms(nn.Module):
    """Norms with statistics inside a user's module."""

    def __init__(self):
        super().__init__()
        self.own = nn.BatchNorm1d(8)
        self.plain = nn.BatchNorm1d(8, affine=False)

    def forward(self, t):
        return self.plain(self.own(t))


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n}


@pytest.mark.parametrize(
    ("change", "moving"),
    [
        (lambda g: g, {"bn", "n.own", "n.plain"}),
        (lambda g: g.freeze(), set()),
        (lambda g: g.freeze("bn"), {"n.own", "n.plain"}),
        (lambda g: g.freeze("bn.weight"), {"bn", "n.own", "n.plain"}),
        (lambda g: g.freeze("n"), {"bn", "n.plain"}),
        (lambda g: g.freeze().unfreeze("bn.bias"), {"bn", "n.plain"}),
        (lambda g: g.freeze().splice("bn", ag.Bottleneck(2)), set()),
    ],
)
def test_a_frozen_batch_norm_keeps_its_statistics(change, moving):
    h = ag.module(x(), nn.BatchNorm1d(8), name="bn")
    model = change(ag.Graph(ag.module(h, Norms(), name="n"))).compile().train()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = statistics(one)
        one.eval().train()
        one(randn() + 5)
        after = statistics(one)
        assert {n.rpartition(".")[0] for n in before if not torch.equal(before[n], after[n])} == moving
        assert one.training


# ---------------------------------------------------------------------- bodies on modules


def test_a_sequential_does_not_run_its_body_as_one_more_layer():
    torch.manual_seed(0)
    seq = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    graph = ag.Graph(ag.module(x(), seq, name="seq")).splice("seq", ag.Bottleneck(2))
    model = randomised(graph.compile())
    given = randn()
    inner = model.seq
    assert len(inner) == 3
    assert [type(m).__name__ for m in inner] == ["Linear", "Tanh", "Linear"]
    h = inner[2](inner[1](inner[0](given)))
    wanted = h + inner.adapter.up(inner.adapter.down(h).relu())
    assert len(seq) == 3
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(one(given), wanted)
        assert "seq.adapter.down.weight" in one.state_dict()
    assert list(seq._modules) == ["0", "1", "2"]


class WithAdapter(nn.Module):
    """A module that has a child of the name that a body would like to have, and other attributes."""

    def __init__(self):
        super().__init__()
        self.adapter = nn.Sequential(nn.Linear(8, 8))
        self.register_buffer("table", torch.ones(8))
        self.factor = 2

    def forward(self, t):
        return self.adapter(t) * self.table

    def helper(self):
        return None


@pytest.mark.parametrize("name", ["adapter", "table", "factor", "helper"])
def test_a_body_cannot_take_the_place_of_what_a_module_has(name):
    graph = ag.Graph(ag.module(x(), WithAdapter(), name="m"))
    with pytest.raises(ag.GraphError) as caught:
        graph.splice("m", ag.Bottleneck(2), name=name).compile()
    first = str(caught.value).splitlines()[0]
    assert first in (
        f"node 'm.{name}.down' cannot be below a WithAdapter, which has {name!r} already",
        f"node 'm.{name}.down' has the name of a parameter: 'm'",
    )
    graph.splice("m", ag.Bottleneck(2), name="mine").compile()


class Walk(nn.Module):
    """Runs whatever children it has."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, t):
        for child in self.children():
            t = child(t)
        return t


def test_a_module_that_runs_all_its_children_is_no_place_for_a_body():
    graph = ag.Graph(ag.module(x(), Walk(), name="walk"))
    assert torch.equal(graph.compile()(randn()), graph.compile().walk.one(randn()))
    with pytest.raises(ag.BadSplice, match=r"'walk' \(Walk\) runs whatever children it has"):
        graph.splice("walk", ag.Bottleneck(2)).compile()


def test_a_compiled_graph_can_be_a_module_of_another():
    inner = Adapter.build(8, 2, name="deep").compile()
    graph = ag.Graph(ag.module(x(), inner, name="m")).freeze().splice("m", ag.Bottleneck(2))
    model = randomised(graph.compile())
    h = model.m(randn())
    assert not torch.equal(h, randn())
    body = model.m.adapter
    torch.testing.assert_close(model(randn()), h + body.up(body.down(h).relu()))
    assert torch.equal(pickle.loads(pickle.dumps(model))(randn()), model(randn()))


def test_tensors_cannot_take_the_place_of_what_a_module_has():
    h = ag.dense(x(), 8, name="fc")
    for node in (h * ag.param("fc.in_features", (8,)), h * ag.constant(1.0, name="fc.out_features")):
        with pytest.raises(ag.GraphError, match="cannot be below a Linear, which has"):
            ag.Graph(node).compile()


def test_children_of_functions_and_of_layers():
    h = ag.relu(ag.dense(x(), 8, name="a"), name="a.act")
    h = ag.dense(ag.tanh(h, name="f"), 8, name="f.deep.er")
    model = randomised(ag.Graph(h * ag.param("a.gain", (8,))).splice("a", ag.Bottleneck(2)).compile())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(one(randn()), model(randn()))
        assert list(one.state_dict()) == list(model.state_dict())
    assert "a.gain" in model.state_dict()
    assert "f.deep.er.weight" in model.state_dict()


# ---------------------------------------------------------------------- like any torch module


def outputs(model):
    return model.eval()(randn())


def test_copies_and_pickles_give_equal_outputs():
    model = randomised(everything().compile())
    wanted = outputs(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(outputs(one), wanted)
        assert type(one) is type(model)
        assert list(ag.graph_of(one)) == list(everything())
        assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in model.parameters()]
        with torch.no_grad():
            one.gain.add_(1)
        assert not torch.equal(outputs(one), wanted)
        assert torch.equal(outputs(model), wanted)
    assert model.code == copy.deepcopy(model).code


def declared_by_code():
    graph = ag.Graph(ag.dense(x(), 8, name="fc")).freeze()
    return graph.splice("fc", lambda site: site.output + ag.dense(site.output, 8, name="more"), name="own")


def imported_by_code():
    torch.manual_seed(0)
    graph = ag.trace(nn.Sequential(nn.Linear(8, 8)), randn())
    own = ag.Stack(ag.Bottleneck(2), lambda site: site.output + ag.dense(site.output, 8, name="more"))
    return graph.splice("0", own, name="own").splice("0", ag.Bottleneck(3))


@pytest.mark.parametrize("make", [declared_by_code, imported_by_code])
def test_code_of_the_user_is_a_name_in_a_pickle(make):
    graph = make()
    again = pickle.loads(pickle.dumps(graph))
    assert again == graph
    assert list(again) == list(graph)
    assert again.bodies == graph.bodies
    assert not isinstance(again.bodies, dict)
    assert again.unsplice() == graph.unsplice()
    assert "<lambda>" in str(again.splices[0].method)
    assert again.splices[1:] == graph.splices[1:]
    if make is declared_by_code:
        with pytest.raises(
            ag.GraphError, match=r"the method '.*<lambda>' is code of yours, which has no name in a file"
        ):
            again.to_json()
    model = randomised(graph.compile())
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(loaded), outputs(model))
    assert ag.graph_of(loaded) == again
    # a copy in this process keeps the method itself
    assert ag.graph_of(copy.deepcopy(model)).splices == graph.splices


def test_bodies_one_after_the_other_on_a_half_precision_host():
    base = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16)
    given = randn(4, 8).to(torch.bfloat16)
    graph = (
        ag.trace(base, given).splice("0", ag.Bottleneck(2)).splice("0", ag.Bottleneck(3, activation="gelu"), name="b")
    )
    assert ag.Graph.from_json(graph.to_json()) == graph
    model = randomised(graph.compile())
    assert {p.dtype for n, p in model.named_parameters() if "." in n.removeprefix("0.")} == {torch.float32}
    first, second = model[0].adapter, model[0].b
    h = nn.functional.linear(given, model[0].weight, model[0].bias).float()
    h = (h + first.up(torch.relu(first.down(h)))).to(torch.bfloat16).float()
    h = (h + second.up(nn.functional.gelu(second.down(h)))).to(torch.bfloat16)
    out = model(given)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, h)
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in (*first.parameters(), *second.parameters()))


def test_equal_graphs_share_one_class():
    one, two = (Adapter.build(8, 2).compile(seed=s) for s in (0, 1))
    assert type(one) is type(two)
    assert type(Adapter.build(8, 2, activation="gelu").compile()) is not type(one)
    lambdas = [ag.Graph(ag.nx(x(), lambda t, k=k: t * k)).compile() for k in (2, 3)]
    assert type(lambdas[0]) is type(lambdas[1])
    assert torch.equal(lambdas[1](randn()) * 2, lambdas[0](randn()) * 3)


def test_torch_compile_in_one_piece():
    model = randomised(everything().compile())
    given = randn().requires_grad_()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(given), model(given), atol=1e-6)
    assert torch.allclose(fast(randn(7, 8)), model(randn(7, 8)), atol=1e-6)
    fast(given).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(given).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-5, atol=1e-5)
    frozen = ag.Graph(ag.module(x(), nn.BatchNorm1d(8), name="bn")).freeze().splice("bn", ag.Bottleneck(2)).compile()
    assert torch.allclose(torch.compile(frozen, fullgraph=True, backend="eager")(randn()), frozen(randn()))
    with pytest.raises(Exception, match="another shape than declared"):
        fast(randn(4, 9))


def test_export():
    model = randomised(everything().compile()).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (randn(),), dynamic_shapes={"x": {0: batch}})
    assert torch.allclose(exported.module()(randn(7, 8)), model(randn(7, 8)), atol=1e-6)


def test_the_fx_graph_has_the_names_of_nodes():
    names = [n.name for n in randomised(everything().compile()).graph.nodes]
    assert {"enc_fc", "enc_act", "wrap_residual", "out"} <= set(names)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_moved_to_another_dtype(move):
    model = randomised(everything().compile()).eval()
    wanted = model(randn())
    model = move(model)
    dtype = model.gain.dtype
    out = model(randn().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.2, atol=0.2)
    with pytest.raises(ag.ShapeMismatch, match="input 'x' has another dtype than declared") as caught:
        model(randn())
    assert f"declared   {dtype}" in str(caught.value)
    again = copy.deepcopy(model)
    assert torch.equal(again(randn().to(dtype)), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(randn().to(dtype)), out)
    model.float()
    assert model(randn()).dtype == torch.float32


def test_moved_without_parameters_and_with_whole_numbers():
    model = ag.Graph(ag.relu(x()) * 2.0).compile().half()
    assert model(randn().half()).dtype == torch.float16
    ids = x("batch", "seq", name="ids", dtype=torch.int64)
    model = ag.Graph(ag.embedding(ids, 3, 4)).compile().to(torch.bfloat16)
    assert model(torch.ones(1, 2, dtype=torch.int64)).dtype == torch.bfloat16


def test_under_autocast():
    model = randomised(everything().compile())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = model(randn())
        two = model(randn().bfloat16())
    assert torch.allclose(one.float(), model(randn()), atol=0.3)
    assert torch.allclose(two.float(), model(randn()), atol=0.3)


# ---------------------------------------------------------------------- what is called wrong


def attending():
    q, mask = x("batch", "seq", 8), x("batch", "seq", name="mask", dtype=torch.bool)
    return ag.Graph(ag.attention(q, q, q, num_heads=2, mask=mask)).compile()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, ag.GraphError, "input 'x' is missing"),
        ({"x": randn(2, 3, 8)}, ag.GraphError, "input 'mask' is missing"),
        ({"x": randn(2, 3, 8), "mask": [True]}, ag.GraphError, "input 'mask' is no tensor but a list"),
        ({"x": randn(2, 3, 9)}, ag.ShapeMismatch, "input 'x' has another shape than declared"),
        ({"x": randn(2, 8)}, ag.ShapeMismatch, "input 'x' has another shape than declared"),
        ({"x": randn(2, 3, 8, 1)}, ag.ShapeMismatch, "input 'x' has another shape than declared"),
        ({"x": randn(2, 3, 8).double()}, ag.ShapeMismatch, "input 'x' has another dtype than declared"),
        (
            {"x": randn(2, 3, 8), "mask": torch.ones(2, 3)},
            ag.ShapeMismatch,
            "input 'mask' has another dtype than declared",
        ),
        (
            {"x": randn(2, 3, 8), "mask": torch.ones(2, 4, dtype=torch.bool)},
            ag.ShapeMismatch,
            "input 'mask' has another shape than declared",
        ),
        (
            {"x": randn(2, 3, 8), "mask": torch.ones(3, 3, dtype=torch.bool)},
            ag.ShapeMismatch,
            "input 'mask' has another shape than declared",
        ),
        (
            {"x": randn(2, 3, 8), "mask": torch.ones(2, 3, dtype=torch.bool), "extra": 1},
            TypeError,
            r"forward\(\) got an unexpected keyword argument 'extra'",
        ),
    ],
)
def test_wrong_calls_are_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        attending()(**given)


def test_a_wrong_call_says_both_shapes_and_what_a_name_stands_for():
    with pytest.raises(ag.ShapeMismatch) as caught:
        attending()(randn(2, 3, 8), torch.ones(2, 4, dtype=torch.bool))
    assert str(caught.value).splitlines()[1:] == [
        "    declared   batch × seq",
        "    given      2 × 4",
        "    where      batch = 2, seq = 3",
        "  to fix      give a tensor of 2 dimensions with these sizes; a name is one size in all inputs",
    ]
    assert caught.value.node == "mask"


def test_sizes_of_none_are_free():
    model = ag.Graph(ag.relu(x(None, None, 3))).compile()
    assert model(randn(1, 2, 3)).shape == (1, 2, 3)
    assert model(randn(5, 5, 3)).shape == (5, 5, 3)
    assert model(randn(0, 5, 3)).shape == (0, 5, 3)


def test_functions_of_any_kind():
    class Adder:
        def __init__(self, n):
            self.n = n

        def __call__(self, t):
            return t + self.n

    from functools import partial

    code = compile("lambda t: t * 3", "<nowhere>", "eval")
    given = randn()
    for fn, wanted in (
        (lambda t: t * 2, given * 2),
        (eval(code), given * 3),
        (partial(torch.add, alpha=2, other=torch.ones(8)), given + 2),
        (Adder(3), given + 3),
        (torch.Tensor.abs, given.abs()),
        (torch.nn.functional.relu, given.relu()),
        (len, len(given)),
    ):
        out = ag.Graph(ag.nx(x(), fn)).compile()(given)
        assert torch.equal(out, wanted) if isinstance(out, torch.Tensor) else out == wanted
    model = ag.Graph(ag.nx(x(), torch.sin, name="s")).compile()
    assert "(s): Function(sin)" in repr(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(given), given.sin())
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(ag.Graph(ag.nx(x(), lambda t: t)).compile())
