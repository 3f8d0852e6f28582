"""Frozen parameters that a compiled model shares with its base: which get values of their own, when, in which modes."""

from __future__ import annotations

import copy
import gc
import weakref

import byhand
import pytest
import torch
from models import snapshot
from test_hosted_errors import says
from torch import nn

import adaptergraph as ag

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 3


class Net(nn.Module):
    """Two layers, one of them used twice, and a complex parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.turn = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        h = torch.tanh(self.a(torch.tanh(self.a(x))))
        return self.b((h * self.turn).abs()) + self.shift


def loss(model):
    return model(X).pow(2).mean()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


# ---------------------------------------------------------------------- unfrozen by hand


def by_attribute(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


UNFREEZE = {
    "the module": lambda model: model.requires_grad_(True),
    "each parameter": lambda model: [p.requires_grad_(True) for p in model.parameters()],
    "the attribute": by_attribute,
}


def backward(model, optimizer):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def autograd_grad(model, optimizer):
    parameters = list(model.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss(model), parameters), strict=True):
        parameter.grad = grad
    optimizer.step()


def twice_differentiated(model, optimizer):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(model), parameters, create_graph=True)
    optimizer.zero_grad()
    sum(g.abs().pow(2).sum() for g in grads).backward()
    optimizer.step()


def one_in_place(model, optimizer):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(model), parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter -= 0.1 * grad


def checkpointed(model, optimizer):
    optimizer.zero_grad()
    x = X.clone().requires_grad_(True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).pow(2).mean().backward()
    optimizer.step()


def compiled(model, optimizer):
    torch._dynamo.reset()
    optimizer.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(X).pow(2).mean().backward()
    optimizer.step()


STEPS = [backward, autograd_grad, twice_differentiated, one_in_place, checkpointed, compiled]


@pytest.mark.parametrize("order", ["optimizer first", "unfrozen first"])
@pytest.mark.parametrize("how", UNFREEZE)
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
def test_training_what_was_unfrozen_by_hand_is_training_a_copy(step, how, order):
    base = Net()
    twin, model = copy.deepcopy(base), ag.trace(base, X).compile()
    before = snapshot(base)
    optimizers = []
    for one in (twin, model):
        optimizer = sgd(one.parameters()) if order == "optimizer first" else None
        UNFREEZE[how](one)
        optimizers.append(optimizer or sgd(one.parameters()))
    for _ in range(3):
        step(model, optimizers[1])
        step(twin, optimizers[0])
    assert snapshot(base) == before
    for (name, value), (_, wanted) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(value, wanted, msg=name)
        assert not torch.equal(value, base.get_parameter(name)), name


@pytest.mark.parametrize("name", ["a.weight", "turn"])
def test_only_what_a_gradient_reached_is_copied(name):
    base = Net()
    model = ag.trace(base, X).splice("a", ag.Bottleneck(2)).compile()
    parameter = model.get_parameter(name).requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(model), [parameter])
    assert grad.abs().sum() > 0
    own = dict(model.named_parameters())
    assert [n for n, p in base.named_parameters() if own[n].data_ptr() != p.data_ptr()] == [name]


WRITES = {
    "in place": lambda layer: layer.weight.add_(1),
    "past autograd": lambda layer: layer.weight.data.mul_(2),
    "an initializer": lambda layer: nn.init.ones_(layer.weight),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "its state": lambda layer: layer.state_dict()["weight"].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", ["unfrozen in the graph", "values of its own"])
def test_the_ways_out_for_what_writes_without_a_gradient(write, way):
    base = Net()
    before = snapshot(base)
    graph = ag.trace(base, X)
    model = (graph.unfreeze("a") if way == "unfrozen in the graph" else graph).compile()
    if way == "values of its own":
        for parameter in model.a.parameters():
            parameter.data = parameter.data.clone()
    with torch.no_grad():
        WRITES[write](model.a)
    assert snapshot(base) == before
    assert not torch.equal(model.a.weight, base.a.weight)


@pytest.mark.parametrize("write", WRITES)
def test_what_writes_without_a_gradient_writes_into_the_base(write):
    """As the README says: the two are one memory."""
    base = Net()
    model = ag.trace(base, X).splice("a", ag.Bottleneck(2)).compile()
    before, own = base.a.weight.detach().clone(), {n: v.clone() for n, v in model.a.adapter.state_dict().items()}
    with torch.no_grad():
        WRITES[write](model.a)
    assert not torch.equal(base.a.weight, before)
    assert torch.equal(base.a.weight, model.a.weight)
    assert all(torch.equal(v, own[n]) for n, v in model.a.adapter.state_dict().items())


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.load_state_dict({}, strict=False),
        lambda m: m.to("meta"),
    ],
)
def test_a_conversion_never_reaches_the_base(convert):
    base = Net()
    before = snapshot(base)
    model = ag.trace(base, X).splice("a", ag.Bottleneck(2)).compile()
    convert(model)
    with torch.no_grad():
        model.a.weight.add_(1)
    assert snapshot(base) == before


def test_a_compiled_model_is_forgotten_with_its_parameters():
    model = ag.trace(Net(), X).splice("a", ag.Bottleneck(2)).compile().requires_grad_(True)
    loss(model).backward()
    parameters = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(p() is not None for p in parameters)


# ---------------------------------------------------------------------- inference mode


def made(where):
    """A base and the compiled model, of which one or both are made in inference mode."""
    graph = lambda base: ag.trace(base, X).splice("a", ag.Bottleneck(2)).unfreeze("b")  # noqa: E731
    if where == "base":
        with torch.inference_mode():
            base = Net()
        return base, graph(base).compile()
    if where == "compiled":
        base = Net()
        with torch.inference_mode():
            return base, graph(base).compile()
    if where == "both":
        with torch.inference_mode():
            base = Net()
            return base, graph(base).compile()
    base = Net()
    model = graph(base).compile()
    with torch.inference_mode():
        model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()})
    return base, model


@pytest.mark.parametrize("where", ["base", "compiled", "both", "values"])
def test_what_inference_mode_made_can_be_trained(where):
    base, model = made(where)
    before = snapshot(base)
    byhand.randomise(model)
    plain = ag.trace(Net(), X).splice("a", ag.Bottleneck(2)).unfreeze("b").compile()
    byhand.randomise(plain)
    assert not any(v.is_inference() for v in (*model.parameters(), *model.buffers()))
    if where != "values":
        assert model.a.weight.data_ptr() == base.a.weight.data_ptr()
    for one in (model, plain):
        optimizer = sgd(p for p in one.parameters() if p.requires_grad)
        for _ in range(3):
            backward(one, optimizer)
        one.a.requires_grad_(True)
        backward(one, sgd(one.a.parameters()))
    assert snapshot(base) == before
    for (name, value), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(value, wanted), name


def test_a_declared_graph_that_is_compiled_in_inference_mode_can_be_trained():
    graph = ag.Graph(ag.dense(ag.input("x", shape=("batch", 8)), 8, name="fc"))
    with torch.inference_mode():
        model = graph.compile()
    wanted = graph.compile()
    for one in (model, wanted):
        backward(one, sgd(one.parameters()))
    assert torch.equal(model.fc.weight, wanted.fc.weight)


def test_a_parameter_of_inference_mode_cannot_be_trained_in_place():
    with torch.inference_mode():
        model = Net()
    graph = ag.trace(model, X).splice("a", ag.Bottleneck(2)).unfreeze("b")
    before = snapshot(model)
    with says(
        "'b.weight' was made in torch.inference_mode(), so it cannot be trained",
        "written at  test_shared_values.py",
        "to fix      graph.compile() without inplace=True makes a copy that can be; or make the model outside of it",
    ):
        graph.compile(inplace=True)
    assert snapshot(model) == before
    graph.compile()


def test_a_state_for_what_inference_mode_made():
    with torch.inference_mode():
        model = Net()
    before = snapshot(model)
    state = {n: torch.randn_like(v) for n, v in model.state_dict().items()}
    adapted = ag.trace(model, X).splice("a", ag.Bottleneck(2)).compile(inplace=True, state=state)
    assert all(torch.equal(adapted.state_dict()[n], v) for n, v in state.items())
    ag.detach(adapted)
    assert snapshot(model) == before
