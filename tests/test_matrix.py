"""Every kind of adapter in every kind of model: equal to the same model with the adapters written into its forwards."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import byhand
import pytest
import torch
from cells import ALL, CELLS, Cell, Hand, serial, wrap_after
from models import keys, loss, run, snapshot, tensors
from test_hosted import same
from torch import nn
from torch.overrides import TorchFunctionMode

import adaptergraph as ag

EACH = pytest.mark.parametrize("cell", CELLS, ids=str)


def hidden_states(cell):
    return {"output_hidden_states": True} if cell.case.hidden else {}


def frozen_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


@EACH
def test_fresh_bodies_change_nothing_and_keys_and_classes_stay(traced, cell):
    case, _, graph = traced(cell.name)
    # torch.matmul goes another way where an operand wants gradients, which is another last bit
    base = case.model().requires_grad_(False)
    model = cell.splice(graph).compile()
    if cell.kind in ("low_rank", "ladder", "cross"):
        byhand.randomise(model)
        zero_last(model)
    with torch.no_grad():
        same(run(model, case, **hidden_states(cell)), run(base, case, **hidden_states(cell)))
    bodies = tuple(f"{n}." for n in ag.graph_of(model).bodies)
    assert [k for k in keys(model) if not k.startswith(bodies)] == keys(base)
    assert isinstance(model, type(base))
    for path, module in base.named_modules():
        twin = model.get_submodule(path)
        assert isinstance(twin, type(module))
        assert type(twin).__name__ == type(module).__name__


def zero_last(model):
    """Bodies without a start at zero of their own get one."""
    with torch.no_grad():
        for name in ag.graph_of(model).bodies:
            for part, module in model.get_submodule(name).named_children():
                if part == "b" or part.startswith("rung_"):
                    for parameter in module.parameters():
                        parameter.zero_()


def close(one, other, what=""):
    """Equal but for the order in which gradients of one value are added up."""
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item()), what


@EACH
def test_large_bodies_equal_forwards_written_by_hand(traced, cell):
    case, _, graph = traced(cell.name)
    model = byhand.randomise(cell.splice(graph).unfreeze("**").compile()).train()
    hand, bodies = cell.by_hand(model)
    hand.train()
    counts = byhand.count_calls(model)
    outputs = []
    for one in (model, hand):
        torch.manual_seed(3)
        outputs.append(run(one, case, **hidden_states(cell)))
        loss(outputs[-1]).backward()
    same(*outputs)
    plain = run(case.model().train(), case)
    assert not torch.equal(tensors(plain)[0], tensors(outputs[0])[0])
    assert len(bodies) == len(ag.graph_of(model).bodies) >= 1
    for name, body in bodies.items():
        assert counts[name][1] == body.calls == len(ag.graph_of(model).bodies[name].calls), name
        mine = dict(model.get_submodule(name).named_parameters())
        theirs = dict(body.named_parameters())
        assert mine.keys() == theirs.keys()
        for part, parameter in theirs.items():
            assert parameter.grad.abs().max() > 0, (name, part)
            close(mine[part].grad, parameter.grad, f"{name}.{part}")
    mine = dict(model.named_parameters())
    moved = 0
    for name, parameter in hand.named_parameters():
        assert (mine[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            close(mine[name].grad, parameter.grad, name)
            moved += int(parameter.grad.abs().max() > 0)
    assert moved > 3
    for name, buffer in hand.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer)


@EACH
def test_a_step_changes_bodies_only_and_copies_and_detach_are_exact(traced, cell):
    case, _, graph = traced(cell.name)
    base = case.model()
    before = snapshot(base)
    model = byhand.randomise(cell.splice(graph).compile(base, inplace=True), 0.1)
    expected = tensors(run(model, case))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(run(twin, case), expected)
        assert keys(twin) == keys(model)
        assert ag.graph_of(twin) == ag.graph_of(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    loss(run(model.train(), case)).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    bodies = tuple(f"{n}." for n in ag.graph_of(model).bodies)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert changed == {n for n in state if n.startswith(bodies)}
    ag.detach(model)
    assert snapshot(base) == before


# ---------------------------------------------------------------------- one call, one output


def compared(model, hand, case, **more):
    """Outputs of both, in train mode with the same dropout, after a backward pass."""
    outputs = []
    for one in (model.train(), hand.train()):
        torch.manual_seed(3)
        outputs.append(run(one, case, **more))
        loss(outputs[-1]).backward()
    same(*outputs)
    mine = dict(model.named_parameters())
    for name, parameter in hand.named_parameters():
        if parameter.requires_grad:
            assert (mine[name].grad is None) == (parameter.grad is None), name
            if parameter.grad is not None:
                close(mine[name].grad, parameter.grad, name)


def by_number(module, numbers, change):
    """Changes what some calls of a module return; the module is called `len(numbers)` times in a forward."""
    calls = []

    def counted(value, given):
        calls.append(None)
        return change(value) if numbers[(len(calls) - 1) % len(numbers)] else value

    wrap_after(module, counted)


@pytest.mark.parametrize("unrolled", ["0", "1"])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("roberta", "classifier.dropout"),
        ("t5", "encoder.dropout"),
        ("t5", "decoder.dropout"),
        ("vit", "vit.layers.1.dropout"),
        ("plain", "shared"),
    ],
)
def test_a_body_at_one_call_of_a_module(traced, name, module, unrolled):
    case, _, graph = traced(name)
    graph = graph.unfreeze("**").splice(f"{module}@{unrolled}", ag.Bottleneck(8))
    model = byhand.randomise(graph.compile())
    (body,) = graph.bodies
    hand = Hand(model.get_submodule(body), serial)
    twin = pickle.loads(pickle.dumps(model))
    own = case.model()
    by_number(own.get_submodule(module), [unrolled == "0", unrolled == "1"], hand)
    counts = byhand.count_calls(model)
    compared(model, own, case, **({"output_hidden_states": True} if case.hidden else {}))
    assert counts[body] == [2, 1]
    assert hand.calls == 1
    for mine, theirs in zip(model.get_submodule(body).parameters(), hand.parameters(), strict=True):
        close(mine.grad, theirs.grad)
    # counted anew in each forward
    same(run(model.eval(), case), run(own.eval(), case))
    same(run(twin.eval(), case), run(model, case))
    assert keys(ag.detach(twin)) == keys(own)


def test_a_body_at_one_output_of_several(traced):
    case, _, graph = traced("tagger")
    for at, index in (("lstm:1:0", (1, 0)), ("lstm:1:1", (1, 1)), ("lstm:0", (0,))):
        spliced = graph.unfreeze("**").splice(at, ag.Bottleneck(8))
        model = byhand.randomise(spliced.compile())
        hand = Hand(model.get_submodule(next(iter(spliced.bodies))), serial)
        own = case.model()
        old = own.lstm.forward

        def forward(*args, old=old, index=index, hand=hand):
            states, (last, cell) = old(*args)
            if index == (0,):
                return hand(states), (last, cell)
            return states, ((hand(last), cell) if index[1] == 0 else (last, hand(cell)))

        own.lstm.forward = forward
        compared(model, own, case)
        assert hand.calls == 1
        for mine, theirs in zip(
            model.get_submodule(next(iter(spliced.bodies))).parameters(), hand.parameters(), strict=True
        ):
            close(mine.grad, theirs.grad)
        with pytest.raises(AssertionError):
            same(run(model.eval(), case), run(case.model(), case))
        same(run(copy.deepcopy(model), case), run(model, case))


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("bert", "bert.encoder:last_hidden_state"),
        ("bert", "bert:pooler_output"),
        ("t5", "encoder:last_hidden_state"),
        ("llama", "model:last_hidden_state"),
        ("plain", "halving:right"),
        ("plain", "picking:1"),
        ("plain", "naming:states"),
    ],
)
def test_a_body_at_a_named_output(traced, name, at):
    case, _, graph = traced(name)
    module, _, field = at.partition(":")
    graph = graph.unfreeze("**").splice(at, ag.Bottleneck(8))
    (body,) = graph.bodies
    model = byhand.randomise(graph.compile())
    hand = Hand(model.get_submodule(body), serial)
    own = case.model()
    old = own.get_submodule(module).forward

    def forward(*args, **kwargs):
        out = old(*args, **kwargs)
        if isinstance(out, tuple):
            return tuple(hand(v) if i == int(field) else v for i, v in enumerate(out))
        if isinstance(out, dict):
            out[field] = hand(out[field])
        else:
            out = dataclasses.replace(out, **{field: hand(getattr(out, field))})
        return out

    own.get_submodule(module).forward = forward
    compared(model, own, case)
    assert hand.calls == 1
    for mine, theirs in zip(model.get_submodule(body).parameters(), hand.parameters(), strict=True):
        assert theirs.grad.abs().max() > 0
        close(mine.grad, theirs.grad)


# ---------------------------------------------------------------------- kinds together


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_kinds_stack_in_any_order_of_splicing(traced, name, order):
    """Places that do not meet: the result is the same, in whatever order they were spliced."""
    case, _, graph = traced(name)
    kinds = [Cell(name, kind) for kind in ("low_rank", "sums", "ladder", "parallel")]
    graph = graph.unfreeze("**")
    for i in order:
        graph = kinds[i].splice(graph, label=kinds[i].kind)
    model = byhand.randomise(graph.compile(), 0.3)
    own = case.model()
    for kind in kinds:
        for body_name, body in graph.bodies.items():
            if body_name.rpartition(".")[2].startswith(kind.kind):
                kind.write(own, body.host, kind.hand(model.get_submodule(body_name)))
    compared(model, own, case, output_hidden_states=True)


# ---------------------------------------------------------------------- every operation


class Changing(TorchFunctionMode):
    """Changes what one operation gives: of a module called by its path, by its name and how often it ran before."""

    def __init__(self, model, operation, change):
        super().__init__()
        self.operation, self.change = operation, change
        self.running, self.counts = [""], collections.Counter()
        self.paused, self.done = False, 0
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(lambda m, args, path=path: self.running.append(path))
                module.register_forward_hook(lambda m, args, out: self.leave())

    def leave(self):
        self.running.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.strip("_") if func.__name__.startswith("__") else func.__name__
        if self.paused or not tensors(result):
            return result
        stem = f"{self.running[-1]}/{name}"
        count = self.counts[stem]
        self.counts[stem] += 1
        if self.operation == (f"{stem}_{count}" if count else stem):
            self.paused, self.done = True, self.done + 1
            result = byhand.on_first_float(result, self.change)
            self.paused = False
        return result


@pytest.mark.parametrize(
    ("name", "within", "reached"),
    [
        ("bert", "bert.encoder.layer.0", 0.9),
        ("distilbert", "distilbert.transformer.layer.0", 1),
        ("vit", "vit.layers.0", 1),
        ("llama", "model.layers.0", 0.9),
        ("gpt2", "transformer.h.0", 0.8),
        ("whisper", "model.encoder.layers.0", 0.9),
        ("encoder", "layers.0", 1),
        ("convnet", "layers.0", 1),
    ],
)
def test_every_operation_of_a_layer_is_reached_and_right_or_refused(traced, name, within, reached):
    case = ALL[name]
    args, kwargs = case.args()
    if case.generates:
        kwargs |= {"use_cache": False}
    if name == "gpt2":
        kwargs |= {"attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}
    graph = ag.trace(case.model(), *args, **kwargs)
    found = [
        n for n in graph if n.startswith(within) and "/" in n and ":" not in n and graph[n].dtype.is_floating_point
    ]
    found = [n for n in found if graph[n].op != "output" and graph[n].shape[-1] > 0]
    right = 0
    for operation in found:
        try:
            spliced = graph.splice(operation, ag.Bottleneck(4))
            model = byhand.randomise(spliced.compile(), 0.3)
        except ag.BadSplice:
            continue
        (body,) = spliced.bodies
        hand = Hand(model.get_submodule(body), serial)
        own = case.model().requires_grad_(False)
        with Changing(own, operation, hand) as mode:
            expected = own(*args, **kwargs)
        outputs = [model(*args, **kwargs), expected]
        assert mode.done == hand.calls == 1, operation
        for one, other in zip(*map(tensors, outputs), strict=True):
            close(one, other, operation)
        for out in outputs:
            loss(out).backward()
        for mine, theirs in zip(model.get_submodule(body).parameters(), hand.parameters(), strict=True):
            close(mine.grad, theirs.grad, operation)
        right += 1
    assert right >= reached * len(found) > 0
