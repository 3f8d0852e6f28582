"""What an adapted model goes through: copies, pickles, compilers, other libraries' hooks, checkpointing, detach."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import byhand
import pytest
import torch
import torch._dynamo.testing
from models import CASES, WIDTH, Block, keys, loss, run, snapshot, tensors
from test_hosted import EACH, METHOD, adapted, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import adaptergraph as ag

GENERATES = pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.generates])


def everywhere(traced, name):
    """A compiled copy with large bodies at the sites of the case and on its container, and the case."""
    case, _, graph = traced(name)
    graph = graph.splice([*case.sites, case.container], METHOD)
    return case, byhand.randomise(graph.compile())


def classes(model):
    return {n: type(m) for n, m in model.named_modules()}


# ---------------------------------------------------------------------- the traced model


@EACH
def test_compiling_shares_frozen_storage_and_leaves_the_traced_model_alone(traced, name):
    case, base, graph = traced(name)
    model = graph.unfreeze(case.unfrozen).splice(list(case.sites), METHOD).compile()
    mine = dict(model.named_parameters())
    for key, parameter in base.named_parameters():
        assert mine[key] is not parameter
        assert (mine[key].data_ptr() == parameter.data_ptr()) == (key != case.unfrozen)
    buffers = dict(model.named_buffers())
    assert all(buffers[k].data_ptr() != b.data_ptr() for k, b in base.named_buffers() if b.numel())


def test_nothing_done_to_a_copy_reaches_the_traced_model(traced):
    case, base, graph = traced("bert")
    graph = graph.splice(list(case.sites), METHOD)
    graph.compile().to(torch.bfloat16)
    graph.compile().train()
    thawed = graph.compile().requires_grad_(True)
    assert thawed.classifier.weight.data_ptr() == base.classifier.weight.data_ptr()
    for _ in range(2):
        loss(run(thawed, case)).backward()
        torch.optim.SGD(thawed.parameters(), lr=1.0).step()
    assert not torch.equal(thawed.classifier.weight, base.classifier.weight)
    other = graph.compile()
    other.load_state_dict({k: torch.ones_like(v) for k, v in other.state_dict().items()})
    assert all((p == 1).all() for p in other.parameters())
    partly = graph.compile(state={"classifier.bias": torch.ones(2)})
    assert (partly.classifier.bias == 1).all()
    assert partly.classifier.bias.data_ptr() != base.classifier.bias.data_ptr()
    assert partly.classifier.weight.data_ptr() == base.classifier.weight.data_ptr()


def test_three_variants_cost_one_base(traced):
    case, base, graph = traced("llama")
    variants = [graph.splice(list(case.sites), ag.Bottleneck(size)).compile() for size in (2, 4, 8)]
    storages = {p.data_ptr() for m in (base, *variants) for n, p in m.named_parameters() if ".adapter." not in n}
    assert storages == {p.data_ptr() for p in base.parameters()}
    fresh = graph.splice(list(case.sites), METHOD)
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.compile().parameters(), fresh.compile().parameters(), strict=True)
    )


@EACH
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_detach_gives_the_model_back_bit_for_bit(traced, name, inplace):
    case, _, graph = traced(name)
    base = case.model().train()
    base.requires_grad_(False)
    next(base.parameters()).requires_grad_(True)
    before = snapshot(base)
    args, kwargs = case.args()
    graph = ag.trace(base, *args, **kwargs).unfreeze(case.unfrozen).splice([*case.sites, case.container], METHOD)
    model = graph.compile(inplace=inplace)
    assert (model is base) == inplace
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss(run(model, case)).backward()
        optimizer.step()
    assert ag.detach(model) is model
    if inplace:
        assert snapshot(model) == before
    else:
        assert snapshot(base) == before
        assert classes(model) == classes(base)
        assert keys(model) == keys(base)
        flags = [(p.requires_grad, p.dtype) for p in model.parameters()]
        assert flags == [(p.requires_grad, p.dtype) for p in base.parameters()]
        assert [m.training for m in model.modules()] == [m.training for m in base.modules()]
        assert [list(vars(m)) for m in model.modules()] == [list(vars(m)) for m in base.modules()]


@EACH
def test_attaching_in_place_again_after_detach_gives_the_same_model(traced, name):
    case, _, graph = traced(name)
    base = case.model()
    graph = graph.splice(list(case.sites), METHOD)
    once = tensors(run(byhand.randomise(graph.compile(base, inplace=True)), case))
    ag.detach(base)
    same(run(byhand.randomise(graph.compile(base, inplace=True)), case), once)


# ---------------------------------------------------------------------- copies and pickles


@EACH
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(traced, name, how):
    case, model = everywhere(traced, name)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    expected = tensors(run(model, case))
    same(run(twin, case), expected)
    assert classes(twin) == classes(model)
    assert keys(twin) == keys(model)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert ag.graph_of(twin) == ag.graph_of(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    same(run(model, case), expected)
    ag.detach(twin)
    assert classes(twin) == classes(case.model())
    assert not any(m._forward_hooks for m in twin.modules())


# ---------------------------------------------------------------------- generate


@GENERATES
def test_generating_with_a_cache_equals_generating_without(traced, name):
    case, model = everywhere(traced, name)
    _, kwargs = case.args()
    kwargs = {"input_ids": kwargs["input_ids"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(**kwargs, use_cache=True)
    assert with_cache.shape[1] >= 6
    assert torch.equal(with_cache, model.generate(**kwargs, use_cache=False))
    hand, _ = byhand.modified(case, model)
    assert torch.equal(with_cache, hand.generate(**kwargs, use_cache=True))
    beams = {**kwargs, "num_beams": 3}
    assert torch.equal(model.generate(**beams), hand.generate(**beams))


# ---------------------------------------------------------------------- what sees the adapted value


def test_hooks_and_a_direct_forward_see_the_adapted_value(traced):
    case, model = adapted(traced, "bert", CASES["bert"].sites)
    byhand.randomise(model)
    host = model.bert.encoder.layer[0].output.dense
    seen = {}
    host.register_forward_hook(lambda m, args, out: seen.update(given=args[0], out=out))
    run(model, case)
    plain = nn.functional.linear(seen["given"], host.weight, host.bias)
    expected = host.adapter(plain)
    assert torch.equal(seen["out"], expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(host.forward(seen["given"]), expected)
    assert torch.equal(type(host).forward(host, seen["given"]), expected)
    host.register_forward_hook(lambda m, args, out: out * 2)
    assert torch.equal(host(seen["given"]), expected * 2)


def test_torch_func_and_data_parallel_replicas_run_the_bodies(traced):
    case, model = everywhere(traced, "sequential")
    (x,), _ = case.args()
    values = {k: v * 2 for k, v in model.state_dict().items()}
    out = torch.func.functional_call(model, values, (x,))
    other = copy.deepcopy(model)
    other.load_state_dict(values)
    assert torch.equal(out, other(x))
    replica = model[1]._replicate_for_data_parallel()
    assert torch.equal(replica(torch.ones(1, WIDTH)), model[1](torch.ones(1, WIDTH)))


# ---------------------------------------------------------------------- containers


def test_a_body_on_a_container_is_no_layer_of_it(traced):
    _, base, graph = traced("sequential")
    model = byhand.randomise(graph.splice("1", METHOD).splice("2", METHOD).compile())
    assert len(model[1]) == len(base[1]) == 2
    assert [type(m).__name__ for m in model[1]] == ["Linear", "ReLU"]
    x = torch.randn(3, WIDTH)
    inner = base[1](x)
    for part in (model[1][:], model[1][0:2]):
        assert type(part) is nn.Sequential
        assert torch.equal(part(x), inner)
    assert type(model[1][-1]) is nn.ReLU
    assert torch.equal(model[1](x), model[1].adapter(inner))
    model[1].append(nn.Tanh())
    assert type(model[1][2]) is nn.Tanh
    assert torch.equal(model[1](x), model[1].adapter(inner.tanh()))
    assert "1.adapter.down.weight" in model.state_dict()


class Listed(nn.Module):
    """Its layers are in a list, a dict and a slice of a Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"a": Block(), "b": Block()})
        self.row = nn.Sequential(Block(), Block(), Block())

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        for layer in self.named.values():
            x = layer(x)
        return self.row[1:](self.row[0](x))


def test_hosts_inside_lists_dicts_and_slices():
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(2, WIDTH)
    graph = ag.trace(model, x).splice(["layers.*", "named.*", "row.{0..2}", "**.down"], METHOD)
    assert len(graph.bodies) == 14
    mine = byhand.randomise(graph.compile(), 0.2)
    hand = copy.deepcopy(model)
    for name, body in graph.bodies.items():
        byhand.write_in(hand.get_submodule(body.host), byhand.Body(mine.get_submodule(name)))
    counts = byhand.count_calls(mine)
    assert torch.equal(mine(x), hand(x))
    assert all(count == [1, 1] for count in counts.values())


def test_one_module_under_two_names_is_one_host():
    torch.manual_seed(0)
    shared, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    graph = ag.trace(model, x).splice("0", METHOD)
    adapted = byhand.randomise(graph.compile())
    assert adapted[0] is adapted[2]
    body = adapted[0].adapter
    assert torch.equal(adapted(x), body(shared(body(shared(x)).relu())))
    assert [n for n, p in adapted.named_parameters() if p.requires_grad] == [
        f"0.adapter.{part}.{p}" for part in ("down", "up") for p in ("weight", "bias")
    ]
    twin = copy.deepcopy(adapted)
    assert twin[0] is twin[2]
    assert keys(ag.detach(twin)) == keys(model)


# ---------------------------------------------------------------------- forwards on the instance


def scaled(self, x):
    """A forward that somebody puts on a Linear."""
    return nn.functional.linear(x, self.weight, self.bias) * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_replaces_the_hosts_own_still_gets_the_body(traced, when):
    case, _, _ = traced("sequential")
    base = case.model()
    args, _ = case.args()
    graph = ag.trace(base, *args).splice("1.0", METHOD)
    bound = functools.partial(scaled, base[1][0])

    if when == "before":
        base[1][0].forward = scaled.__get__(base[1][0])
        model = byhand.randomise(graph.compile())
    else:
        model = byhand.randomise(graph.compile())
        model[1][0].forward = scaled.__get__(model[1][0])
    x = torch.randn(2, WIDTH)
    assert torch.equal(model[1][0](x), model[1][0].adapter(bound(x)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1][0].bias.add_(1)
    assert torch.equal(model[1][0](x), model[1][0].adapter(bound(x)))
    assert not torch.equal(twin[1][0](x), model[1][0](x))
    del model[1][0].forward
    assert torch.equal(model[1][0](x), model[1][0].adapter(nn.functional.linear(x, base[1][0].weight, base[1][0].bias)))
    # some libraries write past __setattr__: seen when training or evaluation starts
    model[1][0].__dict__["forward"] = scaled.__get__(model[1][0])
    model.eval()
    assert torch.equal(model[1][0](x), model[1][0].adapter(bound(x)))
    ag.detach(model)
    assert torch.equal(model[1][0](x), bound(x))


def test_a_function_around_the_hosts_forward_runs_once_and_sees_the_adapted_value(traced):
    _, model = everywhere(traced, "sequential")
    host, x = model[1][0], torch.randn(2, WIDTH)
    expected = host(x)
    old = host.forward
    host.forward = lambda x: old(x) * 2
    assert torch.equal(host(x), expected * 2)
    host.forward = old
    assert torch.equal(host(x), expected)
    assert "forward" not in vars(host)


class Doubling:
    """Made into an accelerate hook that doubles what a module returns."""

    def __new__(cls):
        from accelerate.hooks import ModelHook

        class Hook(ModelHook):
            def post_forward(self, module, output):
                return output * 2

        return Hook()


@pytest.mark.parametrize("order", ["hook attach", "attach hook", "hook attach hook", "hook attach append"])
@pytest.mark.parametrize("undo", ["unhook detach", "detach unhook"])
def test_accelerates_hooks_before_and_after_attaching(traced, order, undo):
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    case, _, graph = traced("sequential")
    base = case.model()
    host, x = base[1][0], torch.randn(2, WIDTH)
    plain = host(x)
    for word in order.split():
        if word == "attach":
            byhand.randomise(graph.splice("1.0", METHOD).compile(base, inplace=True))
        else:
            add_hook_to_module(host, Doubling(), append=word == "append")
    # a hook that was there before belongs to the host's own computation; one that came later sees the body
    expected = {
        "hook attach": lambda: host.adapter(plain * 2),
        "attach hook": lambda: host.adapter(plain) * 2,
        "hook attach hook": lambda: host.adapter(plain * 2),
        "hook attach append": lambda: host.adapter(plain) * 4,
    }[order]()
    assert torch.equal(host(x), expected)
    assert torch.equal(copy.deepcopy(base)[1][0](x), expected)
    body = host.adapter
    for word in undo.split():
        if word == "unhook":
            remove_hook_from_module(host)
            assert torch.equal(host(x), body(plain) if hasattr(host, "adapter") else plain)
        else:
            ag.detach(base)
    assert torch.equal(host(x), plain)
    assert type(host) is nn.Linear


def test_hooked_models_are_copied_with_their_hooks():
    from accelerate.hooks import add_hook_to_module

    case = CASES["sequential"]
    base = case.model()
    add_hook_to_module(base[1][0], Doubling())
    add_hook_to_module(base[2], Doubling())
    (x,), _ = case.args()
    model = byhand.randomise(ag.trace(base, x).splice(["1.0", "2.down"], METHOD).compile())
    h = base[1][1](model[1][0].adapter(base[1][0](base[0](x))))
    block = base[2]
    down = model[2].down.adapter(block.down(nn.functional.gelu(block.up(h))))
    assert torch.equal(model(x), base[3]((h + down) * 2))


class Middle(nn.Module):
    """An operation that only a lowered forward reaches."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.up(x) * 2
        return self.down(h + x) + h


def test_inside_a_forward_that_accelerate_replaced_a_body_is_refused_with_the_way_out():
    from accelerate.hooks import add_hook_to_module, remove_hook_from_submodules

    base, x = nn.Sequential(Middle(), Middle()), torch.randn(3, 6)
    for block in base:
        add_hook_to_module(block, Doubling())
    graph = ag.trace(base, x).splice("*/mul", METHOD)
    with pytest.raises(ag.BadSplice, match="it was replaced on the module itself") as caught:
        graph.compile()
    assert "take off what a library put there (a hook of accelerate, say), compile, and put it on again" in str(
        caught.value
    )
    assert "or splice at a module near it: '" in str(caught.value)
    remove_hook_from_submodules(base)
    model = byhand.randomise(graph.compile())

    def by_hand(times):
        h = x
        for block in model:
            body, mul = block.adapter_mul, block.up(h) * 2
            mul = mul + body.up(torch.relu(body.down(mul)))
            h = (block.down(mul + h) + mul) * times
        return h

    torch.testing.assert_close(model(x), by_hand(1))
    for block in model:
        add_hook_to_module(block, Doubling())
    torch.testing.assert_close(model(x), by_hand(2))


# ---------------------------------------------------------------------- torch.compile and friends


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_torch_compile_sees_the_bodies(traced, name):
    case, model = everywhere(traced, name)
    model.train()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = run(model, case)
    loss(expected).backward()
    grads = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    out = run(torch.compile(model, fullgraph=True, backend="aot_eager"), case)
    for a, b in zip(tensors(out), tensors(expected), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)
    loss(out).backward()
    assert gradients(model).keys() == grads.keys()
    for key, grad in gradients(model).items():
        assert torch.allclose(grad, grads[key], atol=1e-5, rtol=1e-3), key


def test_plain_and_adapted_models_compiled_in_one_process(traced):
    case, _, graph = traced("sequential")
    base = case.model()
    (x,), _ = case.args()
    torch._dynamo.reset()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    plain = base(x)
    assert torch.allclose(compiled(x), plain, atol=1e-6)
    graph = graph.splice([*case.sites, case.container], METHOD)
    copied = byhand.randomise(graph.compile(base))
    assert torch.allclose(torch.compile(copied, fullgraph=True, backend="aot_eager")(x), copied(x), atol=1e-5)
    byhand.randomise(graph.compile(base, inplace=True))
    assert torch.equal(base(x), copied(x))
    assert torch.allclose(compiled(x), copied(x), atol=1e-5)
    assert ag.graph_of(compiled) is graph
    assert not torch.allclose(compiled(x), plain, atol=1e-2)
    ag.detach(compiled)
    assert torch.allclose(compiled(x), plain, atol=1e-6)


def test_layers_that_were_compiled_before_they_were_traced(traced):
    base = CASES["sequential"].model()
    (x,), _ = CASES["sequential"].args()
    torch._dynamo.reset()
    base[1].compile(backend="aot_eager")
    base[2] = torch.compile(base[2], backend="aot_eager")
    plain = base(x)
    graph = ag.trace(base, x).splice(["1", "2._orig_mod", "2._orig_mod.down"], METHOD)
    adapted = byhand.randomise(graph.compile())
    assert torch.allclose(base(x), plain)
    byhand.randomise(graph.compile(inplace=True))
    assert torch.allclose(base(x), adapted(x), atol=1e-5)
    assert not torch.allclose(base(x), plain, atol=1e-2)


def test_twelve_equal_layers_with_equal_bodies_are_compiled_once():
    torch.manual_seed(0)
    base, x = nn.Sequential(*(Block() for _ in range(12))).eval(), torch.randn(2, WIDTH)
    model = byhand.randomise(ag.trace(base, x).splice(["*.down", "{0..11}"], METHOD).compile(), 0.2)
    assert len({type(m) for n, m in model.named_modules() if n.endswith(".adapter")}) == 1
    expected = model(x)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(fullgraph=True, backend=counter)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert counter.frame_count <= 3


def test_export_and_symbolic_tracing_keep_the_bodies(traced):
    case, model = everywhere(traced, "sequential")
    (x,), _ = case.args()
    assert torch.allclose(torch.export.export(model, (x,), strict=False).module()(x), model(x), atol=1e-6)
    assert torch.allclose(torch.fx.symbolic_trace(model)(x), model(x), atol=1e-6)
    assert torch.allclose(torch.jit.trace(model, x)(x), model(x), atol=1e-6)


# ---------------------------------------------------------------------- checkpointing


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_gives_equal_gradients(traced, name, reentrant):
    case, model = everywhere(traced, name)
    twin = copy.deepcopy(model).train()
    twin.enable_input_require_grads()
    checkpointed(model, reentrant)
    counts = byhand.count_calls(model)
    for one in (model, twin):
        torch.manual_seed(3)
        loss(run(one, case, use_cache=False) if case.generates else run(one, case)).backward()
    bodies = ag.graph_of(model).bodies
    # each body runs once more in the backward pass: the checkpoints are around the layers with their bodies
    assert {n: count[1] for n, count in counts.items()} == {n: 2 * len(bodies[n].calls) for n in bodies}
    mine, theirs = gradients(model), gradients(twin)
    assert mine.keys() == theirs.keys()
    # the gradients of an encoder's states are added up in another order, also in the plain model
    equal = torch.equal if name != "t5" else torch.allclose
    assert all(equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_torchs_own_checkpoint_around_a_host(reentrant):
    torch.manual_seed(0)
    base, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, WIDTH)
    model = byhand.randomise(ag.trace(base, x).splice(["*.down", "{0..1}"], METHOD).compile())
    x.requires_grad_(True)
    grads = []
    for checkpoints in (False, True):
        model.zero_grad()
        h = x
        for layer in model:
            h = checkpoint(layer, h, use_reentrant=reentrant) if checkpoints else layer(h)
        h.sum().backward()
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


# ---------------------------------------------------------------------- dtypes and modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "bert", "resnet"])
def test_a_half_precision_host_has_float32_bodies(name, dtype):
    case = CASES[name]
    base = case.model().to(dtype)
    _, kwargs = case.args()
    kwargs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kwargs.items()}
    graph = ag.trace(base, **kwargs).splice(list(case.sites), METHOD)
    model = graph.compile()
    assert {p.dtype for n, p in model.named_parameters() if ".adapter." in n} == {torch.float32}
    with torch.no_grad():
        expected = tensors(base(**kwargs))
        out = tensors(model(**kwargs))
    assert [t.dtype for t in out] == [t.dtype for t in expected]
    same(out, expected)
    byhand.randomise(model)
    host = model.get_submodule(next(iter(graph.bodies.values())).host)
    x = torch.randn(2, *graph[next(iter(graph.bodies.values())).host].shape[1:]).to(dtype)
    body = host.adapter

    def bottleneck(h):
        return torch.relu(h @ body.down.weight.T + body.down.bias) @ body.up.weight.T + body.up.bias

    up = byhand.on_features(body.down.in_features, x.float(), bottleneck)
    assert torch.allclose(body(x), (x.float() + up).to(dtype))
    loss(model(**kwargs)).backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.named_parameters() if ".adapter." in n)
    narrow = graph.compile(dtype=dtype)
    assert {p.dtype for n, p in narrow.named_parameters() if ".adapter." in n} == {dtype}
    same(narrow(**kwargs), expected)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "sequential"])
def test_autocast_and_inference_mode(traced, name):
    case, model = everywhere(traced, name)
    hand, _ = byhand.modified(case, model)
    with torch.inference_mode():
        out = run(model, case)
        same(out, run(hand, case))
    assert all(t.is_inference() for t in tensors(out))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        same(run(model, case), run(hand, case))


def test_bodies_are_made_where_their_host_is():
    case = CASES["t5"]
    with torch.device("meta"):
        base = case.build()
    args, kwargs = case.args()
    graph = ag.trace(base, *args, **kwargs)
    model = graph.splice(["encoder.dropout", *case.sites], METHOD).compile()
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_saving_and_loading_with_the_hosts_own_class(traced, tmp_path):
    case, model = everywhere(traced, "bert")
    model.save_pretrained(tmp_path)
    again = type(case.model()).from_pretrained(tmp_path)
    same(run(again.eval(), case), run(case.model(), case))
    back = ag.trace(again, **case.args()[1]).splice([*case.sites, case.container], METHOD).compile()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    back.load_state_dict(saved)
    same(run(back.eval(), case), run(model, case))


@pytest.mark.parametrize("name", ["bert", "sequential"])
def test_sharding_the_very_layers_that_have_bodies(traced, name):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    case, model = everywhere(traced, name)
    # over the storage of the traced model, which must stay what it is
    _, sharded = everywhere(traced, name)
    model.train()
    sharded.train()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in list(sharded.bert.encoder.layer) if name == "bert" else [sharded[1], sharded[2]]:
            fully_shard(layer)
        fully_shard(sharded)
        outputs = []
        for one in (model, sharded):
            torch.manual_seed(3)
            outputs.append(run(one, case))
            loss(outputs[-1]).backward()
        same(*outputs)
        expected = gradients(model)
        assert gradients(sharded).keys() == expected.keys()
        assert all(torch.equal(g.full_tensor(), expected[n]) for n, g in gradients(sharded).items())
        with pytest.raises(ag.GraphError, match="was changed after the bodies were attached"):
            ag.detach(sharded)
    finally:
        distributed.destroy_process_group()
