"""Sixteen tasks in one compiled model: right outputs, one program, and a step that moves one adapter only."""

import random

import pytest
import torch
from models import run
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import adaptergraph as ag

SIZE = 8
TASKS = [f"t{i}" for i in range(16)]
SITES = "bert.encoder.layer.*.{attention.output,output}.dense"


def declared(sizes=(2,)):
    """Two sites; the bottleneck of task i has the i-th size, round and round."""
    x = ag.input("x", shape=("batch", SIZE))
    h = ag.relu(ag.dense(x, SIZE, name="one"), name="act")
    graph = ag.Graph(ag.dense(h, SIZE, name="two")).freeze()
    methods = {t: ag.Bottleneck(sizes[i % len(sizes)], activation="gelu") for i, t in enumerate(TASKS)}
    return graph.splice(["one", "two"], ag.Switch(methods))


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ag.graph_of(model).bodies:
            for parameter in model.get_submodule(name).parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows=4, seed=1):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))


def by_hand(model, x, task):
    """The network with this task's adapters, from the values in the model."""

    def adapted(name, h):
        host, body = model.get_submodule(name), model.get_submodule(f"{name}.adapter.{task}")
        h = nn.functional.linear(h, host.weight, host.bias)
        down = nn.functional.gelu(h @ body.down.weight.T + body.down.bias)
        return h + down @ body.up.weight.T + body.up.bias

    return adapted("two", torch.relu(adapted("one", x)))


def order(rounds=3):
    """Every task several times, in a mixed order."""
    tasks = TASKS * rounds
    random.Random(0).shuffle(tasks)
    return tasks


def switched(how, model, task, call):
    if how == "set":
        ag.set_task(model, task)
        return call()
    with ag.task(model, task):
        return call()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["with", "set"])
@pytest.mark.parametrize("sizes", [(2,), (2, 3, 4)])
def test_sixteen_tasks_under_one_compiled_model(how, backend, sizes):
    model = randomise(declared(sizes).compile())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    seen = []
    for i, task in enumerate(order()):
        x = batch(seed=i)
        got = switched(how, compiled, task, lambda x=x: compiled(x))
        torch.testing.assert_close(got, by_hand(model, x, task), rtol=1e-5, atol=1e-5)
        seen.append(counter.frame_count)
    # one program for each size, and nothing is compiled again once every size was there
    assert seen[len(TASKS)] == seen[-1] == len(sizes)


def test_sixteen_tasks_in_a_live_model(traced):
    case, _, graph = traced("bert")
    model = randomise(graph.splice(SITES, ag.Switch({t: ag.Bottleneck(2) for t in TASKS})).compile()).eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    wanted = {task: run(model, case, task=task).logits for task in TASKS}
    assert len({tuple(w.flatten().tolist()) for w in wanted.values()}) == len(TASKS)
    for how in ("with", "set"):
        for task in order(1):
            got = switched(how, compiled, task, lambda: run(compiled, case).logits)
            torch.testing.assert_close(got, wanted[task], rtol=1e-5, atol=1e-5)
    # set_task changes what is trained, which is another program; then it is always the same
    assert counter.frame_count <= 2


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_moves_one_task_of_sixteen(to_none, fast):
    """Momentum and weight decay move what has a gradient, also a zero one: the others have none."""
    model = randomise(declared().compile())
    if fast:
        torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if fast else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for task in [*TASKS[:4], *TASKS[:4], "t9", "t0"]:
        ag.set_task(called, task)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):
            called(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if f".adapter.{task}." in n}, task


def test_without_a_default_task_a_step_moves_what_has_a_gradient():
    """A task of one call says what runs. Gradients of several calls may add up before a step, so none is dropped."""
    model = randomise(declared().compile())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def moved(*tasks, to_none):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for task in tasks:
            model(batch(), task=task).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        return {t for t in TASKS if any(f".adapter.{t}." in n for n in changed)}

    assert moved("t1", to_none=True) == {"t1"}
    assert moved("t2", to_none=True) == {"t2"}
    assert moved("t1", "t3", to_none=True) == {"t1", "t3"}
    # what docs/training.md warns of: a zero gradient is a gradient
    assert moved("t4", to_none=False) == {"t4"}
    assert moved("t5", to_none=True) == {"t4", "t5"}


def everywhere():
    ids = ag.input("ids", shape=("batch", "seq"), dtype=torch.int64)
    h = ag.embedding(ids, 10, SIZE, name="embed")
    h = ag.blocks.transformer_layer(h, 2, 12, name="layer")
    return ag.Graph(ag.softmax(ag.relu(h, name="act"), name="out")).freeze()


@pytest.mark.parametrize("at", ["embed", "layer", "layer.attention", "layer.ffn.up", "layer.norm1", "act", "out"])
def test_a_switch_after_any_node(at):
    """With task a it is the graph with the adapter of a alone, with the same values."""
    methods = {"a": ag.Bottleneck(2), "b": ag.Bottleneck(3, activation="tanh")}
    model = randomise(everywhere().splice(at, ag.Switch(methods)).compile())
    ids = torch.randint(10, (3, 4), generator=torch.Generator().manual_seed(0))
    for task, method in methods.items():
        state = {n.replace(f".adapter.{task}.", ".adapter."): v for n, v in model.state_dict().items()}
        alone = everywhere().splice(at, method).compile()
        alone.load_state_dict({n: state[n] for n in alone.state_dict()})
        torch.testing.assert_close(model(ids, task=task), alone(ids))
    assert not torch.equal(model(ids, task="a"), model(ids, task="b"))
