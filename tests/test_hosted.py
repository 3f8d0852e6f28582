"""Bodies in a live model: equal to the same bodies written by hand into its forward, in outputs and in gradients."""

from __future__ import annotations

import byhand
import pytest
import torch
from models import CASES, keys, loss, run, tensors
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(4)
EACH = pytest.mark.parametrize("name", CASES)


# (model, selector) for every kind of place that a body can stand at
PLACES = [
    pytest.param(name, getattr(case, what), id=f"{name}-{what}")
    for name, case in CASES.items()
    for what in ("sites", "container", "last", "repeated")
    if getattr(case, what) is not None
]


def adapted(traced, name, at, method=METHOD, **options):
    """A compiled copy with bodies, and the case."""
    case, _, graph = traced(name)
    return case, graph.splice(list(at) if isinstance(at, tuple) else at, method, **options).compile()


def same(one, other):
    """Two outputs are equal to the last bit."""
    one, other = tensors(one), tensors(other)
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_fresh_bodies_change_nothing(traced, name, at):
    case, model = adapted(traced, name, at)
    hidden = {"output_hidden_states": True} if case.hidden else {}
    with torch.no_grad():
        same(run(model, case, **hidden), run(case.model(), case, **hidden))


@pytest.mark.parametrize("everything", [False, True], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize(("name", "at"), PLACES)
def test_large_bodies_equal_a_forward_written_by_hand(traced, name, at, everything):
    case, _, graph = traced(name)
    if everything:
        graph = graph.unfreeze("**")
    model = graph.splice(list(at) if isinstance(at, tuple) else at, METHOD).compile()
    compare(case, byhand.randomise(model), unfrozen=everything)


def compare(case, model, around=False, unfrozen=False):
    """Outputs, hidden states, gradients and numbers of calls, in train mode with its dropout."""
    hand, bodies = byhand.modified(case, model, around)
    model.train()
    hand.train()
    if not unfrozen:
        for module in hand.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    counts = byhand.count_calls(model)
    hidden = {"output_hidden_states": True} if case.hidden else {}
    outputs = []
    for one in (model, hand):
        torch.manual_seed(3)
        outputs.append(run(one, case, **hidden))
        loss(outputs[-1]).backward()
    same(*outputs)
    mine, theirs = dict(model.named_parameters()), dict(hand.named_parameters())
    for name, body in bodies.items():
        assert counts[name] == [body.calls, body.calls]
        assert body.calls == len(ag.graph_of(model).bodies[name].calls)
        for ours, parameter in zip(model.get_submodule(name).parameters(), body.values(), strict=True):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
            assert torch.equal(ours.grad, parameter.grad)
    for name, parameter in theirs.items():
        assert (mine[name].grad is None) == (parameter.grad is None) == (not unfrozen)
        assert parameter.grad is None or torch.equal(mine[name].grad, parameter.grad)
    for name, buffer in hand.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.linear])
def test_a_body_that_reads_its_hosts_input_equals_one_written_by_hand(traced, name):
    case, model = adapted(traced, name, CASES[name].linear, byhand.lora, where="around")
    compare(case, byhand.randomise(model), around=True)


@pytest.mark.parametrize("name", ["bert", "t5", "sequential", "plain"])
def test_bodies_stack_in_the_order_they_were_added(traced, name):
    case, _, graph = traced(name)
    at = case.linear or case.sites[0]
    model = (
        graph.splice(at, METHOD, name="one").splice(at, METHOD, name="two").splice(at, METHOD, name="three").compile()
    )
    for host in graph.select(at):
        assert [s.child for s in model.get_submodule(host)._adaptergraph_plan.visits[0].exit] == ["one", "two", "three"]
    compare(case, byhand.randomise(model, 0.3))


@pytest.mark.parametrize("container_first", [False, True])
@pytest.mark.parametrize(
    ("name", "inner", "outer"),
    [
        ("bert", "bert.encoder.layer.1.output.dense", "bert.encoder.layer.1"),
        ("bert", "bert.encoder.layer.1.output.LayerNorm", "bert.encoder.layer.1.output"),
        ("sequential", "1.1", "1"),
        ("t5", "encoder.dropout", "encoder"),
        ("encoder", "layers.0.norm2", "layers.0"),
    ],
)
def test_a_container_and_its_last_child_may_both_have_bodies(traced, name, inner, outer, container_first):
    case, _, graph = traced(name)
    order = (outer, inner) if container_first else (inner, outer)
    graph = graph.splice(order[0], METHOD).splice(order[1], METHOD)
    compare(case, byhand.randomise(graph.compile(), 0.3))
    read = graph.bodies[f"{outer}.adapter"].calls[-1][0]
    assert graph._nodes[read].body in (f"{inner}.adapter", None)
    if name != "bert" or inner.endswith("LayerNorm"):
        assert graph._nodes[read].body == f"{inner}.adapter"


@pytest.mark.parametrize("lora_first", [False, True])
def test_a_body_sees_its_hosts_input_after_the_bodies_on_the_way(traced, lora_first):
    case, _, graph = traced("bert")
    verbs = [
        lambda g: g.splice("bert.encoder.layer.1.attention.self.query", byhand.lora, name="lora", where="around"),
        lambda g: g.splice("bert.encoder.layer.0.output.LayerNorm", METHOD),
        lambda g: g.splice("bert.encoder.layer.0", METHOD, name="late"),
    ]
    for verb in verbs if lora_first else verbs[::-1]:
        graph = verb(graph)
    first = graph["bert.encoder.layer.1.attention.self.query.lora.a"]
    assert first.inputs == ("bert.encoder.layer.0.late.residual",)
    model = byhand.randomise(graph.compile())
    hand = case.model().requires_grad_(False)
    for name, body in graph.bodies.items():
        byhand.write_in(
            hand.get_submodule(body.host), byhand.Body(model.get_submodule(name), around=name.endswith("lora"))
        )
    same(run(model, case), run(hand, case))


def test_a_body_that_reads_the_input_of_a_module_called_twice(traced):
    case, _, graph = traced("plain")
    graph = graph.splice("shared", METHOD).splice("shared", byhand.lora, name="lora", where="around")
    reads = [graph[n].inputs[0] for n in ("shared.lora.a", "shared.lora.a@1")]
    assert reads == ["/add", "/add"] or reads == ["act", "/add"]
    first, second = graph.bodies["shared.lora"].calls
    assert [graph[c[0]].name for c in (first, second)] == ["shared.adapter.residual", "shared.adapter.residual@1"]
    model = byhand.randomise(graph.compile(), 0.3)
    hand = case.model()
    for name in ("adapter", "lora"):
        byhand.write_in(hand.shared, byhand.Body(model.shared.get_submodule(name), around=name == "lora"))
    same(run(model, case), run(hand, case))


# ---------------------------------------------------------------------- torch's fused encoder

PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("at", ["layers.*.linear2", "layers.*.self_attn", "layers.*", "layers.1.norm1", "layers.0"])
def test_the_fused_path_of_an_encoder_skips_no_body(traced, at, padded, grad):
    case, _, graph = traced("encoder")
    model = byhand.randomise(graph.splice(at, METHOD).compile())
    hand, _ = byhand.modified(case, model)
    (x,), _ = case.args()
    mask = PADDED if padded else None
    # nothing here may hook the model: that alone turns the fused path off
    with torch.set_grad_enabled(grad):
        out = model(x, src_key_padding_mask=mask)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = hand(x, src_key_padding_mask=mask)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    # at padded positions too, where an encoder that packs its input leaves zeros
    assert torch.allclose(out, expected, atol=1e-5)
    if grad:
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_encoder_packs_again_after_detach(traced):
    case, _, _ = traced("encoder")
    model = case.model()
    (x,), _ = case.args()
    graph = ag.trace(model, x).splice("layers.0.linear1", METHOD)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=PADDED)
        ag.detach(graph.compile(inplace=True))
        assert torch.equal(model(x, src_key_padding_mask=PADDED), before)
    assert model.use_nested_tensor


# ---------------------------------------------------------------------- training


@EACH
def test_training_changes_bodies_and_unfrozen_parameters_only(traced, name):
    case, _, graph = traced(name)
    graph = graph.unfreeze(case.unfrozen).splice(list(case.sites), METHOD)
    model = byhand.randomise(graph.compile(), 0.1).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    tied = graph.imported.tied
    assert trained == {n for n in dict(model.named_parameters()) if graph.trained[tied.get(n, n)]}
    assert any(case.unfrozen == n for n in trained)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        loss(run(model, case)).backward()
        optimizer.step()
    owner = case.unfrozen.rpartition(".")[0]
    statistics = {f"{owner}.{n}" for n, _ in model.get_submodule(owner).named_buffers()}
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == trained | statistics


@EACH
def test_the_copy_has_the_hosts_keys_and_the_bodies_own(traced, name):
    case, base, graph = traced(name)
    model = graph.splice(list(case.sites), METHOD).compile()
    added = [
        f"{b}.{part}.{p}" for b in ag.graph_of(model).bodies for part in ("down", "up") for p in ("weight", "bias")
    ]
    assert [k for k in keys(model) if k not in set(added)] == keys(base)
    assert sorted(set(keys(model)) - set(keys(base))) == sorted(added)
    assert type(model) is type(base)
    for path, module in base.named_modules():
        twin = model.get_submodule(path)
        assert isinstance(twin, type(module))
        assert (type(twin).__name__, type(twin).__qualname__, type(twin).__module__) == (
            type(module).__name__,
            type(module).__qualname__,
            type(module).__module__,
        )


@pytest.mark.parametrize("mode", [False, True])
def test_bodies_start_in_the_mode_of_their_host(mode):
    model = CASES["sequential"].model().train(mode)
    model[2].train(not mode)
    graph = ag.trace(model, torch.ones(1, 8)).splice(["0", "2.down"], ag.Bottleneck(4, dropout=0.5))
    adapted = graph.compile()
    assert {m.training for m in adapted[0].modules()} == {mode}
    assert {m.training for m in adapted[2].modules()} == {not mode}
    assert {m.training for m in adapted.train().modules()} == {True}
