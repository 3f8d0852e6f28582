"""torch.compile and torch.export of models with bodies over spans, with taps, and inside forwards."""

import byhand
import pytest
import torch
from kinds import BODY, KINDS, NEW, adapted, add_tap, deep_llama, gradients, ids
from test_recompute import AT_CALLS, Net, Twice, called_twice, reading
from torch._dynamo.testing import CompileCounterWithBackend

import adaptergraph as ag

EACH = pytest.mark.parametrize("kind", NEW)
GIVEN = {"input_ids": ids(), "use_cache": False}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that was compiled before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **more):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter, **more), counter


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def near_gradients(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5, msg=name)


def trained_step(model, run):
    model.zero_grad()
    out = run(**GIVEN).logits
    out.pow(2).mean().backward()
    return out.detach(), gradients(model)


@EACH
def test_forward_and_backward_are_one_graph(kind):
    model = adapted(kind)
    expected, grads = trained_step(model, model)
    fast, counter = compiled(model)
    for _ in range(2):
        out, found = trained_step(model, fast)
        near(out, expected)
        near_gradients(found, grads)
        assert counter.frame_count == 1
    with torch.no_grad():
        byhand.randomise(model, 0.2)
    near(fast(**GIVEN).logits, model(**GIVEN).logits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["span", "mid"])
def test_other_shapes_cost_what_they_cost_without_bodies(kind):
    counts = []
    for model in (deep_llama(1), adapted(kind, deep_llama(1))):
        fast, counter = compiled(model, dynamic=True)
        for shape in ((2, 7), (3, 9), (4, 5)):
            with torch.no_grad():
                near(fast(ids(*shape), use_cache=False).logits, model(ids(*shape), use_cache=False).logits)
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]


def test_calls_and_taps_at_other_shapes_are_one_graph():
    model = called_twice()
    fast, counter = compiled(model, dynamic=True)
    first = 0
    for rows in (2, 3, 5):
        x = torch.randn(rows, 8)
        for run in (model, fast):
            model.zero_grad()
            run(x).pow(2).sum().backward()
            if run is model:
                expected = gradients(model)
        near(fast(x), model(x))
        near_gradients(gradients(model), expected)
        first = first or counter.frame_count
        assert counter.frame_count == first


def test_differently_adapted_copies_in_one_process():
    base = deep_llama()
    models = {"plain": base, **{kind: adapted(kind, base) for kind in KINDS}}
    with torch.no_grad():
        expected = {kind: model(**GIVEN).logits for kind, model in models.items()}
        fast = {kind: compiled(model) for kind, model in models.items()}
        for _ in range(2):
            for kind, (run, _counter) in fast.items():
                near(run(**GIVEN).logits, expected[kind])
    assert all(not torch.allclose(v, expected["plain"], atol=0.1) for k, v in expected.items() if k != "plain")


def test_bodies_that_are_attached_after_compiling():
    torch.manual_seed(0)
    base = Net()
    x = torch.randn(3, 8)
    graph = ag.trace(base, x)
    plain = base(x)
    fast, _ = compiled(base)
    near(fast(x), plain)
    for splices in (AT_CALLS, (("layers.2.norm", reading("layers.0.norm", "embed")),)):
        adapted = graph
        for i, (at, method) in enumerate(splices):
            adapted = adapted.splice(at, method, name=f"body_{i}")
        byhand.randomise(adapted.compile(base, inplace=True))
        near(fast(x), base(x))
        assert not torch.allclose(fast(x), plain, atol=0.1)
        ag.detach(base)
        near(fast(x), plain)


@pytest.mark.parametrize("how", ["calls and taps", "operation"])
def test_inductor(how):
    if how == "operation":
        torch.manual_seed(0)
        base = Twice()
        graph = ag.trace(base, torch.randn(2, 16)).splice("/add", BODY)
        model, x = byhand.randomise(graph.compile()), torch.randn(3, 16)
    else:
        model, x = called_twice(), torch.randn(3, 8)
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        near(fast(x), model(x))


@EACH
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(kind, strict):
    model = adapted(kind)
    exported = torch.export.export(model, (), GIVEN, strict=strict).module()
    near(exported(**GIVEN).logits, model(**GIVEN).logits)
    other = {"input_ids": ids(seed=9), "use_cache": False}
    near(exported(**other).logits, model(**other).logits)


@pytest.mark.parametrize("kind", ["serial", "span", "mid"])
def test_twelve_layers_compiled_one_by_one_are_compiled_once(kind):
    base = deep_llama(12)
    counts = []
    for model in (deep_llama(12), adapted(kind, base)):
        torch._dynamo.reset()
        expected = model(**GIVEN).logits
        counter = CompileCounterWithBackend("aot_eager")
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=counter)
        with torch.no_grad():
            near(model(**GIVEN).logits, expected)
        counts.append(counter.frame_count)
    assert counts == [1, 1]
    # with gradients, the first layer's input requires none and the others' do
    out, grads = trained_step(model, model)
    near(out, expected)
    assert counter.frame_count <= 3
    plain = adapted(kind, base)
    near_gradients(grads, trained_step(plain, plain)[1])


def test_a_tap_between_layers_that_are_compiled_one_by_one():
    model = adapted("tap", deep_llama(12))
    expected, grads = trained_step(model, model)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    out, found = trained_step(model, model)
    near(out, expected)
    near_gradients(found, grads)
    assert counter.frame_count <= 4


def test_a_ladder_over_layers_that_are_compiled_one_by_one():
    """Each layer notes a value of its own, so each is compiled for itself."""
    model = adapted("ladder", deep_llama(12))
    expected, grads = trained_step(model, model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=counter, isolate_recompiles=True)
    out, found = trained_step(model, model)
    near(out, expected)
    near_gradients(found, grads)
    assert counter.frame_count == 12


def test_sixteen_tasks_over_taps_and_spans_are_one_graph():
    names = [f"t{i}" for i in range(16)]
    graph = ag.trace(deep_llama(), **GIVEN)
    graph = graph.splice("model.layers.*/add", ag.Switch(dict.fromkeys(names, BODY)), name="tasks")
    graph = KINDS["span"](graph).splice("model.layers.1.mlp.down_proj", add_tap, name="tap")
    model = byhand.randomise(graph.compile(), 0.3)
    fast, counter = compiled(model)
    outputs = []
    for name in names:
        found = []
        for run in (model, fast):
            with ag.task(run, name):
                found.append(trained_step(model, run))
        near(found[0][0], found[1][0])
        near_gradients(found[0][1], found[1][1])
        outputs.append(found[0][0])
    assert counter.frame_count == 1
    assert all(not torch.allclose(outputs[0], other, atol=1e-2) for other in outputs[1:])


@pytest.mark.parametrize("kind", ["span", "tap", "mid"])
def test_compiled_layers_that_checkpoint_themselves(kind):
    model = adapted(kind).train()
    _, expected = trained_step(model, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=kind != "mid"):
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        near_gradients(trained_step(model, model)[1], expected)


def test_a_compiled_layer_that_checkpoints_itself_runs_the_task_it_ran():
    graph = ag.trace(deep_llama(), **GIVEN).splice("model.layers.*.mlp.down_proj", ag.Switch({"a": BODY, "b": BODY}))
    model = byhand.randomise(graph.compile(), 0.3).train()
    model.enable_input_require_grads()

    def step():
        model.zero_grad()
        out = model(**GIVEN, task="b").logits.pow(2).mean()
        with model.task("a"):
            out.backward()
        return gradients(model)

    expected = step()
    assert {n.split(".")[6] for n in expected} == {"b"}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    near_gradients(step(), expected)
