"""A model is given back whole or left as it is: after other libraries changed it, and when something is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings

import byhand
import pytest
import safetensors.torch
import torch
from models import snapshot
from safetensors.torch import load_file, save_file
from test_hosted_errors import says
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import adaptergraph as ag

METHOD = ag.Bottleneck(2)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 10


class Net(nn.Module):
    """Two layers and a norm below a head; some of it is frozen, and the user has gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.part = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 8)
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(torch.relu(h + self.part(h)))


def everything(model):
    """What must not change: bytes, classes, modes, flags, gradients, attributes and children."""
    tables = {n: (list(vars(m)), list(m._modules), list(m._parameters)) for n, m in model.named_modules()}
    grads = {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()}
    return snapshot(model), tables, grads


def used():
    """A model that its user has trained for a step."""
    model = Net()
    (model(X) ** 2).sum().backward()
    return model


def adapted(model, at="{a,part.0}"):
    return byhand.randomise(ag.trace(model, X).splice(at, METHOD).unfreeze("head").compile(inplace=True))


def trained(model):
    """Moves what is trained, and the statistics of the norm."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(X) ** 2).mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.part[1].running_mean.add_(5)


# ---------------------------------------------------------------------- detach, after the model was changed


def put(name, make):
    """Puts another module in the place of one, and gives what puts the old one back."""

    def change(model):
        old, changed = model._modules[name], make()
        setattr(model, name, changed)
        return lambda: setattr(model, name, old)

    return change


def deleted(model):
    old = model.a
    del model.a

    def undo():
        model.a = old
        for name in ("part", "head"):
            model._modules[name] = model._modules.pop(name)

    return undo


def pruned(path):
    def change(model):
        module, values = model.get_submodule(path), model.get_submodule(path).weight.detach().clone()
        prune.l1_unstructured(module, "weight", 0.5)

        def undo():
            prune.remove(module, "weight")
            with torch.no_grad():
                module.weight.copy_(values)

        return undo

    return change


def normed(path):
    def change(model):
        module, values = model.get_submodule(path), model.get_submodule(path).weight.detach().clone()
        parametrizations.weight_norm(module)

        def undo():
            parametrize.remove_parametrizations(module, "weight")
            with torch.no_grad():
                module.weight.copy_(values)

        return undo

    return change


CHANGES = {
    "weight_norm on an unfrozen head": (normed("head"), ["head.weight   was (8, 8)   is gone"]),
    "prune on an unfrozen head": (pruned("head"), ["head.weight   was (8, 8)   is gone"]),
    "a head of another size": (
        put("head", lambda: nn.Linear(8, 4)),
        ["head.weight   was (8, 8)   is (4, 8)", "head.bias     was (8,)     is (4,)"],
    ),
    "a host replaced": (put("a", lambda: nn.Linear(8, 8)), ["a   was Linear   is another Linear without the bodies"]),
    "a host deleted": (deleted, ["a   was Linear   is gone"]),
    "a container around a host replaced": (
        put("part", lambda: nn.Sequential(nn.Identity(), nn.BatchNorm1d(8))),
        ["part.0   was Linear        is another Identity", "part.1   was BatchNorm1d   is another BatchNorm1d"],
    ),
    "another class around a host": (
        put("part", lambda: nn.Identity()),
        ["part.0   was Linear        is gone", "part     was Sequential    has the class Identity"],
    ),
    "prune on a frozen host": (pruned("a"), ["a.weight   was trained   is a.weight_orig now"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_listed_and_nothing_is_taken_off(name):
    change, rows = CHANGES[name]
    model, plain = Net(), Net()
    before, flags = [n for n, _ in model.named_parameters()], [p.requires_grad for p in model.parameters()]
    adapted(model)
    trained(model)
    undo = change(model)
    changed = everything(model)
    for _ in range(2):
        with says(
            "this Net was changed after the bodies were attached: ",
            *rows,
            "written at  test_hosted_undone.py",
            "to fix      undo first what changed it",
        ):
            ag.detach(model)
        assert everything(model) == changed
    undo()
    ag.detach(model)
    assert sorted(n for n, _ in model.named_parameters()) == sorted(before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == dict(zip(before, flags, strict=True))
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model.eval()(X), plain.eval()(X))
    ag.trace(model, X)


def test_weight_norm_on_a_frozen_layer_that_is_no_host():
    model, hand = Net(), Net()
    ag.trace(model, X).splice("a", METHOD).compile(inplace=True)
    undo = normed("head")(model)
    normed("head")(hand)
    changed = everything(model)
    with says(
        "head.weight   was trained   "
        "is head.parametrizations.weight.original0, head.parametrizations.weight.original1 now",
        "give parameters with a new name their requires_grad",
    ):
        ag.detach(model)
    assert everything(model) == changed
    twin = copy.deepcopy(model)
    twin.head.requires_grad_(True)
    ag.detach(twin)
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in hand.named_parameters()
    ]
    # torch makes a parametrization of frozen parameters into a buffer
    undo()
    with says("head.weight   was a parameter   is a buffer"):
        ag.detach(model)
    values = model.head.weight
    del model.head.weight
    model.head.weight = nn.Parameter(values)
    ag.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in Net().named_parameters()
    }


def test_a_copy_whose_unfrozen_head_was_parametrized():
    base = Net().requires_grad_(False)
    model = ag.trace(base, X).splice("a", METHOD).unfreeze("head").compile()
    undo = normed("head")(model)
    with says("head.weight   was frozen   is head.parametrizations.weight.original0"):
        ag.detach(model)
    undo()
    assert not any(p.requires_grad for p in ag.detach(model).parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "head", nn.Sequential(nn.Linear(8, 4), nn.Tanh())),
        lambda model: setattr(model, "head", nn.Identity()),
        lambda model: setattr(model.head, "bias", None),
        lambda model: setattr(model, "extra", nn.Linear(2, 2).requires_grad_(False)),
    ],
    ids=["another head", "no head", "no bias", "a new part"],
)
def test_changes_that_leave_nothing_to_give_back_do_not_stop_detach(change):
    model, hand = Net(), Net()
    ag.trace(model, X).splice("{a,part.0}", METHOD).compile(inplace=True)
    torch.manual_seed(4)
    change(model)
    torch.manual_seed(4)
    change(hand)
    ag.detach(model)
    assert {n: (type(m), list(vars(m))) for n, m in model.named_modules()} == {
        n: (type(m), list(vars(m))) for n, m in hand.named_modules()
    }
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in hand.named_parameters()
    }
    assert torch.equal(model.eval()(X), hand.eval()(X))


def test_a_pruned_host_whose_parameter_is_given_its_flag_by_hand():
    model, hand = Net(), Net()
    ag.trace(model, X).splice("{a,part.0}", METHOD).compile(inplace=True)
    for one in (model, hand):
        prune.l1_unstructured(one.a, "weight", 0.5)
    model.a.weight_orig.requires_grad_(True)
    ag.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in hand.named_parameters()
    }
    assert torch.equal(model.eval()(X), hand.eval()(X))


def test_a_model_that_got_its_values_after_the_bodies_keeps_them():
    with torch.device("meta"):
        model = Net()
    ag.trace(model, X.to("meta")).splice("a", METHOD).unfreeze("head").compile(inplace=True)
    model.to_empty(device="cpu")
    state = Net().state_dict()
    model.load_state_dict(state, strict=False)
    ag.detach(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())


def to_eight_bits(model):
    return model.to(torch.float8_e5m2)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, to_eight_bits], ids=lambda f: f.__name__)
def test_a_model_that_was_rounded_since_is_given_back_with_a_warning(convert):
    model, hand = used(), convert(used())
    adapted(model)
    trained(model)
    convert(model)
    before = everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with says(
            "this Net was converted after the bodies were attached: 10 of its tensors are given back rounded",
            "a.weight        was torch.float32   is torch.",
            "… and 7 more",
            "to fix      load their values again; graph.compile() without inplace=True makes a copy to convert",
            kind=UserWarning,
        ):
            ag.detach(model)
    assert everything(model) == before
    with pytest.warns(UserWarning, match="given back rounded") as caught:
        ag.detach(model)
    assert [w.filename for w in caught] == [__file__]
    assert {n: v.tolist() for n, v in model.state_dict().items()} == {
        n: v.tolist() for n, v in hand.state_dict().items()
    }
    assert {v.dtype for v in model.parameters()} == {hand.a.weight.dtype}


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_whose_dtype_holds_more_is_given_back_bit_for_bit(first):
    model = Net().to(first)
    ag.trace(model, X.to(first)).splice("{a,part.0}", METHOD).unfreeze("head").compile(inplace=True)
    with torch.no_grad():
        model.head.weight.add_(1)
    model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ag.detach(model)
    for name, value in Net().to(first).double().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
        assert model.state_dict()[name].dtype == value.dtype


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = Net()
    graph = ag.trace(model, X).splice("{a,part.0}", METHOD)
    before = everything(model)
    ag.detach(graph.compile(inplace=True))
    assert everything(model) == before
    with says("nothing.like.it", kind=ag.StateMismatch):
        graph.compile(inplace=True, state={"nothing.like.it": torch.zeros(1)})
    assert everything(model) == before


def test_many_changes_are_listed_in_short():
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(14)))
    model = ag.trace(base, X).splice("*", METHOD).compile(inplace=True)
    for i in range(14):
        model._modules[str(i)] = nn.Linear(8, 8)
    with says("14 differences", "11   was Linear   is another Linear", "… and 2 more"):
        ag.detach(model)


# ---------------------------------------------------------------------- saving, after the model was changed


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a host replaced", ["a.adapter.down.weight   graph (2, 8)   model has none", "a.adapter.up.bias"]),
        ("a host deleted", ["a.adapter.down.weight   graph (2, 8)   model has none"]),
        ("a head of another size", ["head.weight   graph (8, 8)   model (4, 8)", "head.bias     graph (8,)"]),
        ("prune on an unfrozen head", ["head.weight   graph (8, 8)   model has none"]),
        ("weight_norm on an unfrozen head", ["head.weight   graph (8, 8)   model has none"]),
    ],
)
def test_an_adapter_that_is_not_whole_any_more_is_not_saved(name, rows, tmp_path):
    model = adapted(Net())
    wanted = {n: v.clone() for n, v in ag.adapter_state(model).items()}
    undo = CHANGES[name][0](model)
    for call in (lambda: ag.adapter_state(model), lambda: ag.save(model, tmp_path / "new")):
        with says(
            "this Net was changed after it was compiled: ",
            *rows,
            "written at  test_hosted_undone.py",
            "to fix      put back what was replaced",
        ):
            call()
    assert not (tmp_path / "new").exists()
    undo()
    state = ag.adapter_state(model)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[n], v) for n, v in wanted.items())
    twin = ag.load(Net(), ag.save(model, tmp_path / "new"))
    assert torch.equal(twin.eval()(X), model.eval()(X))


# ---------------------------------------------------------------------- a refused compile leaves nothing behind


class Interrupted(dict):
    """A mapping during whose reading the user presses Ctrl-C."""

    def items(self):
        raise KeyboardInterrupt


class Second(dict):
    """One that is read once; when it is read again, the user presses Ctrl-C between two of its values."""

    reads = 0

    def items(self):
        self.reads += 1
        for i, pair in enumerate(super().items()):
            if i and not self.reads % 2:
                raise KeyboardInterrupt
            yield pair


def with_switch(graph):
    return graph.splice("{a,part}", ag.Switch({"x": METHOD, "y": METHOD}))


def with_bodies(graph):
    return graph.splice("{a,part,part.0}", METHOD).unfreeze("head")


STATES = {
    "a wrong shape": ({"a.weight": torch.zeros(3, 3)}, ag.StateMismatch, "a.weight   model (8, 8)   given (3, 3)"),
    "a wrong name": ({"a.wieght": torch.zeros(8, 8)}, ag.StateMismatch, "a.wieght   no such parameter"),
    "no tensor": ({"a.bias": [0.0]}, ag.StateMismatch, "a.bias   model (8,)   given no tensor but a list"),
    "no values": (
        {"a.weight": torch.zeros(8, 8), "a.bias": torch.zeros(8, device="meta")},
        ag.StateMismatch,
        "a.bias   model on cpu   given a tensor without values, on meta",
    ),
    "no such file": ("/nowhere/none.safetensors", ag.StateMismatch, "cannot be read as safetensors"),
    "an interrupt": (Interrupted(), KeyboardInterrupt, ""),
    "an interrupt between two values": (
        Second({"a.weight": torch.ones(8, 8), "head.bias": torch.ones(8), "a.bias": torch.ones(8)}),
        KeyboardInterrupt,
        "",
    ),
    "another kind": (
        {"a.bias": torch.ones(8), "a.weight": torch.full((8, 8), 1 + 2j)},
        ag.StateMismatch,
        "a.weight   model torch.float32   given torch.complex64",
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("change", [with_bodies, with_switch])
def test_a_refused_state_leaves_the_model_as_it_was(name, change):
    state, kind, line = STATES[name]
    model = used()
    plain = model.eval()(X)
    model.train()
    graph = change(ag.trace(model, X))
    before = everything(model)
    with says(line, kind=kind):
        graph.compile(inplace=True, state=state)
    assert everything(model) == before
    assert torch.equal(model.eval()(X), plain)
    ag.detach(change(ag.trace(model, X)).compile(inplace=True))


def test_detach_gives_back_what_a_state_replaced():
    model = used()
    before = everything(model)[0]
    state = {n: torch.randn_like(v) * 9 for n, v in model.state_dict().items() if v.is_floating_point()}
    adapted = with_bodies(ag.trace(model, X)).compile(inplace=True, state=state)
    assert all(torch.equal(adapted.state_dict()[n], v) for n, v in state.items())
    ag.detach(adapted)
    assert everything(model)[0] == before


class Sealing(type):
    def __new__(mcs, name, bases, space):
        if any(isinstance(base, Sealing) for base in bases):
            raise TypeError(f"{name} has no subclasses")
        return super().__new__(mcs, name, bases, space)


class Sealed(nn.BatchNorm1d, metaclass=Sealing):
    """A class of which there is no subclass."""


def test_an_error_in_the_middle_of_attaching_leaves_the_model_as_it_was():
    model = Net()
    model.part.append(Sealed(8))
    (model(X) ** 2).sum().backward()
    graph = with_bodies(ag.trace(model, X))
    before = everything(model)
    # the first norm is kept frozen already when the second one refuses
    with says("Sealed cannot be a host", "Sealed has no subclasses"):
        graph.compile(inplace=True)
    assert everything(model) == before
    ag.trace(model, X)


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def test_fused_paths_are_on_again_after_a_refused_state():
    model, x = encoder(), torch.randn(2, 3, 8)
    before, plain, hooks = everything(model), model(x), [len(m._forward_hooks) for m in model.modules()]
    graph = ag.trace(model, x).splice("**.linear2", METHOD)
    with says("0.adapter", kind=ag.StateMismatch):
        graph.compile(inplace=True, state={"layers.0.adapter": torch.zeros(1)})
    assert everything(model) == before
    assert model.use_nested_tensor == encoder().use_nested_tensor
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(x), plain)


# ---------------------------------------------------------------------- a refused load


def saved(folder):
    return ag.save(adapted(Net()), folder)


def other():
    """A model of the same shapes with other values."""
    model = used()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.mark.parametrize("of", [lambda model: model, lambda model: ag.trace(model, X)], ids=["model", "graph"])
def test_a_warning_that_is_raised_as_an_error_leaves_the_model_as_it_was(of, tmp_path):
    saved(tmp_path)
    model = other()
    host = of(model)
    before = everything(model)
    with pytest.warns(UserWarning, match="with other frozen weights than these") as caught:
        copied = ag.load(host, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with says("with other frozen weights than these", kind=UserWarning):
            ag.load(host, tmp_path, inplace=True)
    assert everything(model) == before
    with pytest.warns(UserWarning, match="with other frozen weights than these"):
        assert ag.load(host, tmp_path, inplace=True) is model
    assert torch.equal(model.eval()(X), copied.eval()(X))


def test_a_warning_on_an_adapted_model_leaves_its_values(tmp_path):
    saved(tmp_path)
    model = adapted(other())
    before = everything(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with says("with other frozen weights than these", kind=UserWarning):
            ag.load(model, tmp_path, inplace=True)
    assert everything(model) == before


class Interrupting(torch.Tensor):
    """A tensor during whose copying the user presses Ctrl-C."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            raise KeyboardInterrupt
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("at", range(3))
def test_an_interrupt_while_an_adapter_is_read_leaves_the_values(at, tmp_path, monkeypatch):
    saved(tmp_path / "whole")
    alone = byhand.randomise(ag.trace(Net(), X).splice("{a,part.0}", METHOD).compile())
    ag.save(alone, tmp_path / "branch")
    read = safetensors.torch.load

    def interrupted(raw):
        tensors = read(raw)
        name = list(tensors)[at]
        return tensors | {name: tensors[name].as_subclass(Interrupting)}

    mine = adapted(Net())
    fused = ag.trace(Net(), X).splice("{a,part.0}", ag.Fusion({"x": METHOD, "y": METHOD})).compile()
    states = everything(mine), everything(fused)
    monkeypatch.setattr(safetensors.torch, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ag.load(mine, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        ag.load_branch(fused, tmp_path / "branch", "x")
    assert (everything(mine), everything(fused)) == states
    monkeypatch.undo()
    ag.load_branch(fused, tmp_path / "branch", "x")
    assert everything(fused) != states[1]


def test_a_tensor_too_many_in_a_file_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "adapter.safetensors") | {"a.adapter.down.scale": torch.ones(1)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    text = json.loads((tmp_path / "adapter.json").read_text())
    raw = (tmp_path / "adapter.safetensors").read_bytes()
    text["checksum"] = "sha256:" + hashlib.sha256(raw).hexdigest()
    (tmp_path / "adapter.json").write_text(json.dumps(text))
    model = used()
    before = everything(model)
    with says("a.adapter.down.scale   no such parameter", kind=ag.StateMismatch):
        ag.load(model, tmp_path, inplace=True)
    assert everything(model) == before
    # what was adapted already stays adapted, with the values it had
    mine = adapted(Net())
    before = everything(mine)
    with says("a.adapter.down.scale   no such parameter", kind=ag.StateMismatch):
        ag.load(mine, tmp_path, inplace=True)
    assert everything(mine) == before
