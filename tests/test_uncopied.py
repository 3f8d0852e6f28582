"""Models that `graph.compile()` cannot copy are refused by name; what torch's own copy takes along goes on working."""

from __future__ import annotations

import copy
import functools
import re
import weakref

import byhand
import pytest
import torch
from models import WIDTH, snapshot, stack
from torch import nn
from torch.nn.utils import prune

import adaptergraph as ag

METHOD = ag.Bottleneck(2)


def says(*lines):
    """The error whose message has these pieces in this order."""
    return pytest.raises(ag.GraphError, match="(?s)" + ".*".join(re.escape(line) for line in lines))


def test_a_cached_tensor_that_cannot_be_copied_is_named():
    model = stack()
    graph = ag.trace(model, torch.ones(1, 8)).splice("0", METHOD)
    model[2].last = model[0].weight * 2
    before = snapshot(model)
    with says("the model cannot be copied: 2.last (Tensor)", "copy says", "graph.compile(inplace=True)"):
        graph.compile()
    assert snapshot(model) == before
    assert graph.compile(inplace=True) is model


COMPUTED = {
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("way", COMPUTED)
def test_a_weight_that_is_computed_in_each_call_is_named_with_a_way_out(way):
    """Torch copies no tensor with a gradient; one that was computed without is computed anew with one."""
    model, x = nn.Sequential(nn.Linear(4, 4), COMPUTED[way](nn.Linear(4, 4))).eval(), torch.randn(3, 4)
    model(x)
    graph = ag.trace(model, x).splice("0", METHOD).unfreeze("1")
    with says(
        "the model cannot be copied: 1.weight (Tensor)", "to fix      call the model once in torch.no_grad(), if"
    ):
        graph.compile()
    with torch.no_grad():
        expected = model(x)
    adapted = graph.compile().eval()
    assert torch.equal(adapted(x), expected)
    twin = copy.deepcopy(model)
    byhand.randomise(adapted)
    hand = twin[1](adapted[0].adapter(nn.functional.linear(x, twin[0].weight, twin[0].bias)))
    assert torch.equal(adapted(x), hand)
    adapted(x).pow(2).sum().backward()
    hand.pow(2).sum().backward()
    for name, parameter in twin[1].named_parameters():
        assert torch.equal(adapted[1].get_parameter(name).grad, parameter.grad), name
        assert parameter.grad.abs().sum() > 0


def test_a_forward_over_the_model_itself_is_no_copy():
    model = stack().eval()
    inner = model[2]
    old = inner.forward
    inner.forward = lambda x: old(x) * 2
    graph = ag.trace(model, torch.ones(1, 8)).splice("2.down", METHOD)
    before = snapshot(model)
    with says("the model cannot be copied: 2.forward is a function over the model itself", "inplace=True"):
        graph.compile()
    assert snapshot(model) == before
    x = torch.randn(1, 8)
    expected = model(x)
    adapted = graph.compile(inplace=True)
    assert torch.equal(adapted(x), expected)
    with torch.no_grad():
        adapted[2].down.adapter.up.bias.fill_(1.0)
    assert not torch.equal(adapted(x), expected)
    ag.detach(adapted)
    assert snapshot(model) == before


class Singleton(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class Remade(nn.Linear):
    """Made anew from its arguments, as pickling by a configuration does."""

    def __reduce__(self):
        return Remade, (4, 4)


class OwnValues(nn.Linear):
    def __deepcopy__(self, memo):
        new = OwnValues(4, 4)
        new.load_state_dict(self.state_dict())
        return new


class Around(nn.Module):
    """Another one with the same values."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        new = Around()
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x):
        return self.inner(x)


class OwnBuffer(nn.BatchNorm1d):
    def __reduce__(self):
        return OwnBuffer, (4, 1e-5, 0.1, False)


class Nothing(nn.ReLU):
    """Has no values, but may become a host."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Singleton(4, 4), "it is the module of the model itself"),
        (lambda: Remade(4, 4), "'1.2.weight' is another value"),
        (lambda: OwnValues(4, 4), "'1.2.weight' is another value"),
        (Around, "'1.2.inner.weight' is another value"),
        (lambda: OwnBuffer(4, affine=False), "'1.2.running_mean' is another value"),
        (Nothing, "it is the module of the model itself"),
    ],
    ids=["itself", "anew", "other storage", "other modules", "other buffers", "itself without values"],
)
@pytest.mark.parametrize("at", ["0", "1.2"])
def test_a_module_that_copies_itself_is_named(make, why, at):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4), make())).eval()
    x = torch.randn(3, 4)
    graph, before, expected = ag.trace(model, x).splice(at, METHOD), snapshot(model), model(x)
    name = type(model[1][2]).__name__
    with says(f"the model cannot be copied: 1.2 ({name}) copies itself in a way of its own", why, "inplace=True"):
        graph.compile()
    assert snapshot(model) == before
    assert torch.equal(graph.compile(inplace=True)(x), expected)
    assert not torch.equal(byhand.randomise(model)(x), expected)


def test_a_copy_method_that_copies_as_torch_does_is_taken():
    class Counting(nn.Linear):
        copies = 0

        def __deepcopy__(self, memo):
            Counting.copies += 1
            memo[id(self)] = new = Counting.__new__(Counting)
            vars(new).update(copy.deepcopy(vars(self), memo))
            return new

    model = nn.Sequential(nn.Linear(4, WIDTH), torch.fx.symbolic_trace(stack()[2]), Counting(WIDTH, 4))
    adapted = ag.trace(model, torch.ones(1, 4)).splice("2", METHOD).compile()
    assert Counting.copies == 1
    assert adapted[2].weight.data_ptr() == model[2].weight.data_ptr()


class Keeping(nn.Module):
    """What a function put on it reads, its forward computes with."""

    def __init__(self, put=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))
        self.kept = {}
        if put is not None:
            put(self)

    def forward(self, x):
        return self.b(self.a(x)) * self.scale + self.kept.get("a", 0)


def keeping(model):
    return lambda m, args, out: model.kept.__setitem__("a", out.detach())


def reads(model):
    """Functions that reach a model or a part of it, by each way there is."""
    layers, named, ref = [model.b], {"b": model.b}, weakref.ref(model)
    helper = lambda x: model.b(x)  # noqa: E731

    def by_default(m, args, out, own=model.b):
        return own(out)

    return {
        "the model": (keeping(model), "'Keeping'"),
        "a module": (lambda m, args, out, inner=None: helper(out), "'Keeping'"),
        "a list": (lambda m, args, out: layers[0](out), "'b'"),
        "a dict": (lambda m, args, out: named["b"](out), "'b'"),
        "a weak reference": (lambda m, args, out: ref().b(out), "'Keeping'"),
        "a default": (by_default, "'b'"),
        "a parameter": ((lambda w: lambda m, args, out: out * w)(model.scale), "'scale'"),
        "a buffer": ((lambda w: lambda m, args, out: out + w)(model.shift), "'shift'"),
        "a partial": (functools.partial(lambda f, m, args, out: f(out), helper), "'Keeping'"),
        "a global": (over_a_global, "'Keeping'"),
    }


def over_a_global(m, args, out):
    # also below another function
    return next(GLOBAL["model"].b(value) for value in [out])


GLOBAL = {}


@pytest.mark.parametrize("way", reads(Keeping()))
def test_a_hook_over_the_model_itself_is_no_copy(way):
    model = Keeping()
    GLOBAL["model"] = model
    hook, read = reads(model)[way]
    model.a.register_forward_hook(hook)
    x = torch.randn(2, 4)
    expected = model(x)
    graph = ag.trace(model, x).splice("a", METHOD)
    before = snapshot(model)
    with says(
        "the model cannot be copied: a.forward_hooks holds a function over the model itself",
        f"reads {read}",
        "written at  test_uncopied.py",
        "to fix      put it on the compiled model instead, or attach to the model itself: graph.compile(inplace=True)",
    ):
        graph.compile()
    assert snapshot(model) == before
    assert torch.equal(graph.compile(inplace=True)(x), expected)
    ag.detach(model)
    model.a._forward_hooks.clear()
    graph.compile()


KINDS_OF_HOOKS = {
    "forward_pre_hooks": lambda m, hook: m.b.register_forward_pre_hook(hook),
    "forward_pre_hooks with keywords": lambda m, hook: m.b.register_forward_pre_hook(hook, with_kwargs=True),
    "forward_hooks with keywords": lambda m, hook: m.b.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "backward_hooks": lambda m, hook: m.b.register_full_backward_hook(hook),
    "backward_pre_hooks": lambda m, hook: m.b.register_full_backward_pre_hook(hook),
    "state_dict_hooks": lambda m, hook: m.b.register_state_dict_post_hook(hook),
    "state_dict_pre_hooks": lambda m, hook: m.b.register_state_dict_pre_hook(hook),
    "load_state_dict_pre_hooks": lambda m, hook: m.b.register_load_state_dict_pre_hook(hook),
    "load_state_dict_post_hooks": lambda m, hook: m.b.register_load_state_dict_post_hook(hook),
}


@pytest.mark.parametrize("kind", KINDS_OF_HOOKS)
def test_every_kind_of_hook_is_looked_at(kind):
    model = Keeping()
    graph = ag.trace(model, torch.ones(1, 4)).splice("a", METHOD)
    handle = KINDS_OF_HOOKS[kind](model, lambda *args: model.kept.clear())
    with says(f"the model cannot be copied: b.{kind.partition(' ')[0]} holds a function over the model itself"):
        graph.compile()
    handle.remove()
    graph.compile()


@pytest.mark.parametrize(
    "put",
    [
        lambda model: setattr(model, "act", lambda x: model.b(x)),
        lambda model: setattr(model.a, "act", weakref.ref(model)),
        lambda model: setattr(model, "act", [("b", lambda x: model.b(x))]),
        lambda model: setattr(model.a, "act", {"b": [functools.partial(lambda m, x: m(x), weakref.ref(model))]}),
    ],
    ids=["a function", "a reference", "a list", "a dict"],
)
def test_an_attribute_over_the_model_itself_is_no_copy(put):
    model = Keeping(put)
    with says("act ", "a function over the model itself", "reads 'Keeping'"):
        ag.trace(model, torch.ones(1, 4)).splice("a", METHOD).compile()


def test_a_list_of_functions_over_the_model_is_run_where_it_is_attached_in_place():
    class Steps(Keeping):
        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    model = Steps(lambda model: setattr(model, "steps", [lambda x: model.a(x), torch.relu, model.b.forward]))
    x = torch.randn(2, 4)
    graph = ag.trace(model, x).splice("a", METHOD)
    with says("the model cannot be copied: Steps.steps holds a function over the model itself", "inplace=True"):
        graph.compile()
    expected = torch.relu(
        byhand.randomise(graph.compile(inplace=True)).a.adapter(
            torch.nn.functional.linear(x, model.a.weight, model.a.bias)
        )
    )
    assert torch.equal(model(x), model.b(expected))


def test_lists_that_a_copy_takes_along_go_on_working():
    """Modules, bound methods and functions of others in a list are no reason to refuse."""

    class Steps(Keeping):
        def forward(self, x):
            for step in self.steps:
                x = step(x)
            return x

    model = Steps(lambda model: setattr(model, "steps", [model.a, torch.relu, lambda x: x * 2, model.b.forward]))
    x = torch.randn(2, 4)
    adapted = byhand.randomise(ag.trace(model, x).splice("a", METHOD).compile())
    h = adapted.a.adapter(torch.nn.functional.linear(x, model.a.weight, model.a.bias))
    assert torch.equal(adapted(x), model.b(torch.relu(h) * 2))


def test_hooks_that_a_copy_takes_along_go_on_working():
    """As in torch's own copy: bound methods and callable objects are copied, other functions are the same."""

    class Adding:
        def __init__(self, model):
            self.model = model

        def __call__(self, m, args, out):
            return out + self.model.scale

    class Own(Keeping):
        def double(self, m, args, out):
            return out * self.scale

    seen = []
    model = Own()
    model.a.register_forward_hook(model.double)
    model.b.register_forward_hook(Adding(model))
    model.b.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    x = torch.randn(2, 4)
    adapted = byhand.randomise(ag.trace(model, x).splice("b", METHOD).unfreeze("scale").compile())
    with torch.no_grad():
        adapted.scale.mul_(-3)
    seen.clear()
    h = adapted.a.forward(x) * adapted.scale
    hand = (adapted.b.adapter(nn.functional.linear(h, model.b.weight, model.b.bias)) + adapted.scale) * adapted.scale
    assert torch.equal(adapted(x), hand)
    assert seen == [type(adapted.b)]
    assert not torch.equal(adapted.scale, model.scale)
