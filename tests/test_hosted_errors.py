"""What cannot work is refused with a message that says what, where and what to do; and the model stays what it was."""

from __future__ import annotations

import copy
import re

import byhand
import pytest
import torch
from models import CASES, WIDTH, Block, snapshot, stack
from torch import nn

import adaptergraph as ag

METHOD = ag.Bottleneck(2)


def says(*lines, kind=ag.GraphError):
    """The error of this kind whose message has these pieces in this order."""
    return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(line) for line in lines))


# ---------------------------------------------------------------------- splicing where no body can run


def test_a_module_that_is_never_called_and_whose_weight_another_one_reads(traced):
    graph = traced("encoder").graph
    with says(
        "'layers.0.self_attn.out_proj' (NonDynamicallyQuantizableLinear) is never called; "
        "its weight is read by 'layers.0.self_attn': a body there would never run",
        "written at  test_hosted_errors.py",
        "to fix      splice at 'layers.0.self_attn'",
        kind=ag.BadSplice,
    ):
        graph.splice("layers.0.self_attn.out_proj", METHOD)


@pytest.mark.parametrize(
    ("name", "at", "instead"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.dropout", "bert.encoder.layer.0.attention.self"),
        ("resnet", "resnet.encoder.stages.0.layers", "resnet.encoder.stages.0"),
        ("t5", "shared", ""),
        ("bert", "bert.encoder.layer", "bert.encoder"),
    ],
)
def test_a_module_that_is_never_called(traced, name, at, instead):
    with says(f"{at!r} (", "is never called", "a body there would never run", instead, kind=ag.BadSplice):
        traced(name).graph.splice(at, METHOD)


def test_one_bad_place_among_good_ones_refuses_all(traced):
    with says("'layers.0.self_attn.out_proj'", "is never called", kind=ag.BadSplice):
        traced("encoder").graph.splice(["layers.0.linear1", "layers.0.self_attn.out_proj"], METHOD)


def test_a_module_without_float_output():
    class Best(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    graph = ag.trace(nn.Sequential(nn.Linear(4, 4), Best()), torch.ones(1, 4))
    with says("'1' (Best) returns no float tensor: a body has nothing to work on", kind=ag.BadSplice):
        graph.splice("1", METHOD)


@pytest.mark.parametrize("at", ["ids", "scale"])
def test_an_input(traced, at):
    with says(f"{at!r} is of the kind 'input': a body is added at a layer", kind=ag.BadSplice):
        traced("plain").graph.splice(at, METHOD)


def test_the_model_itself():
    graph = ag.trace(nn.Linear(4, 4), torch.ones(1, 4))
    with says("'Linear' is the model itself", "nn.Sequential", kind=ag.BadSplice):
        graph.splice("Linear", METHOD)


@pytest.mark.parametrize(("name", "at", "count"), [("encoder", "layers.0.self_attn", 3), ("plain", "embed", 0)])
def test_a_host_without_one_clear_input(traced, name, at, count):
    with says(f"the host {at!r} reads {count} float tensors", kind=ag.BadSplice):
        traced(name).graph.splice(at, lambda site: site.output + ag.dense(site.input, WIDTH), where="around")


# ---------------------------------------------------------------------- compiling what cannot be attached


def refused(graph, model, *lines, kind=ag.BadSplice):
    """Both ways to compile are refused, and the model is what it was."""
    before = snapshot(model)
    for inplace in (False, True):
        with says(*lines, kind=kind):
            graph.compile(model, inplace=inplace)
        assert snapshot(model) == before


@pytest.mark.parametrize("name", ["weight", "bias", "in_features", "zero_grad"])
def test_a_body_called_as_an_attribute_of_its_host(name):
    model = stack()
    graph = ag.trace(model, torch.ones(1, 8))
    before = snapshot(model)
    with says(repr(name)):
        graph.splice("0", METHOD, name=name).compile(inplace=True)
    assert snapshot(model) == before


def test_an_attribute_with_the_bodys_name_is_shown_with_a_way_out():
    model = stack()
    graph = ag.trace(model, torch.ones(1, 8)).splice(["2", "0"], METHOD, name="in_features")
    lines = ("'0' (Linear) has an attribute 'in_features' already", "name='in_features_2'")
    refused(graph, model, *lines)


class Walking(nn.Module):
    """Runs whatever children it has."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return self.run(x)

    def run(self, x):
        for child in self.children():
            x = child(x)
        return x


class Listing(Walking):
    """The same in another way."""

    def run(self, x):
        for child in self:
            x = child(x)
        return x

    def __iter__(self):
        return iter(self._modules.values())


class Row(nn.Sequential):
    """A Sequential with a forward of its own, which walks past the methods that hide bodies."""

    def forward(self, x):
        for child in self._modules.values():
            x = child(x)
        return x


@pytest.mark.parametrize("make", [Listing, lambda: Row(nn.Linear(4, 4))], ids=["iter", "sequential"])
def test_a_forward_that_runs_whatever_children_it_has(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    graph = ag.trace(model, torch.ones(1, 4))
    lines = ("'1' (", "runs whatever children it has: a body would be one more of them", "splice at its last child")
    refused(graph.splice("1", METHOD), model, *lines)
    graph.splice("1.*", METHOD).compile()


def test_containers_that_walk_in_a_safe_way_are_hosts():
    class Own(nn.Sequential):
        def forward(self, x):
            for child in self:
                x = child(x)
            return x

    model = nn.Sequential(Own(Block(), Block())).eval()
    adapted = ag.trace(model, torch.ones(1, WIDTH)).splice("0", METHOD).compile()
    x = torch.randn(1, WIDTH)
    assert torch.equal(adapted(x), model(x))


def test_an_fx_graph_module_as_host():
    model = nn.Sequential(torch.fx.symbolic_trace(Block()), nn.ReLU())
    graph = ag.trace(model, torch.ones(1, WIDTH))
    refused(graph.splice("0", METHOD), model, "'0' is an fx.GraphModule", "splice at a module inside it")
    graph.splice("0.down", METHOD).compile()


def test_a_child_that_torch_compile_wrapped():
    """Its wrapper is made anew by each copy; the module inside it is a host like any other."""
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 4)).eval()
    x = torch.randn(3, 4)
    graph = ag.trace(model, x)
    lines = ("'1' went through torch.compile", "written at  test_hosted_errors.py", "'1._orig_mod'")
    refused(graph.splice("1", METHOD), model, *lines)
    tapped = graph.splice("2", lambda site: site.output + site.graph["1"]).compile()
    assert torch.equal(copy.deepcopy(tapped)(x), model(x) + model[1](model[0](x)))
    adapted = byhand.randomise(graph.splice("1._orig_mod", METHOD).compile())
    expected = model[2](adapted[1]._orig_mod.adapter(nn.functional.linear(model[0](x), model[1].weight, model[1].bias)))
    assert torch.equal(adapted(x), expected)
    assert torch.equal(copy.deepcopy(adapted)(x), expected)
    again = graph.splice("1._orig_mod", METHOD).compile(state=ag.adapter_state(adapted))
    assert torch.equal(again(x), expected)


class Changing(nn.Module):
    """Returns a tuple at first and a tensor later."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, more=False):
        return self.fc(x) if more else (self.fc(x), x)


class Twice(nn.Module):
    """Calls its child in both ways."""

    def __init__(self):
        super().__init__()
        self.child = Changing()

    def forward(self, x, more=True):
        first, _ = self.child(x)
        return self.child(first, more)[0] if more else self.child(first)[0]


def test_another_structure_than_in_the_traced_call_is_an_error_when_it_happens():
    model = Twice()
    adapted = ag.trace(model, torch.ones(1, 4), more=False).splice("child", METHOD).compile()
    adapted(torch.ones(2, 4), more=False)
    with says("'child' returns another structure than when it was traced", "a tensor at [0]", "trace the model with"):
        adapted(torch.ones(2, 4), more=True)


# ---------------------------------------------------------------------- the wrong model


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda m: m.append(nn.ReLU()), ("1 differences", "4", "graph has none", "model ReLU")),
        (lambda m: m.pop(3), ("3 differences", "3", "graph Linear", "model has none")),
        (
            lambda m: m.__setitem__(3, nn.Linear(WIDTH, 5)),
            ("2 differences", "3.weight", f"graph (4, {WIDTH})", f"model (5, {WIDTH})"),
        ),
        (lambda m: m.half(), ("10 differences", "0.weight", "torch.float32", "torch.float16")),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))), ("more", "graph has none", "model (1,)")),
        (lambda m: m.__setitem__(0, nn.Conv1d(8, WIDTH, 1)), ("0", "graph Linear", "model Conv1d")),
    ],
    ids=["more", "fewer", "size", "dtype", "parameter", "class"],
)
def test_a_model_that_changed_since_it_was_traced(change, lines):
    model = stack()
    graph = ag.trace(model, torch.ones(1, 8)).splice("2.down", METHOD)
    change(model)
    refused(graph, model, "this Sequential is not the model of the graph", *lines, "trace", kind=ag.StateMismatch)


def test_another_model(traced):
    graph = traced("bert").graph.splice("bert.encoder.layer.0", METHOD)
    with says("this Sequential is not the model of the graph", "and", "more", kind=ag.StateMismatch):
        graph.compile(stack())


def test_values_that_do_not_fit(traced):
    graph = traced("sequential").graph.splice("0", METHOD)
    state = {"0.adapter.dwn.weight": torch.ones(1), "0.bias": torch.ones(3), "3.bias": torch.ones(4)}
    with says(
        "2 tensors of state do not fit the model",
        "0.adapter.dwn.weight   no such parameter",
        "nearest: 0.adapter.down.weight",
        "0.bias",
        "model (32,)",
        "given (3,)",
        kind=ag.StateMismatch,
    ):
        graph.compile(state=state)


# ---------------------------------------------------------------------- twice


def test_attaching_twice_and_detaching_twice():
    model = stack()
    before = snapshot(model)
    graph = ag.trace(model, torch.ones(1, 8)).splice("0", METHOD)
    graph.compile(inplace=True)
    attached = snapshot(model)
    refused(graph, model, "this Sequential has bodies already", "ag.detach(model)", kind=ag.GraphError)
    assert snapshot(model) == attached
    ag.detach(model)
    assert snapshot(model) == before
    with says("nothing is attached to this Sequential", "it may have been detached already"):
        ag.detach(model)
    assert snapshot(model) == before


def test_tracing_an_adapted_model(traced):
    model = traced("sequential").graph.splice("0", METHOD).compile()
    x = torch.ones(1, 8)
    with says("this Sequential has bodies already", "ag.graph_of(model).splice"):
        ag.trace(model, x)
    with says("this Sequential has bodies already, in '0'"):
        ag.trace(nn.Sequential(model, nn.ReLU()), x)
    again = ag.graph_of(model).splice("2", METHOD).compile()
    assert [n for n, _ in again.named_modules() if n.endswith(".adapter")] == ["0.adapter", "2.adapter"]


def test_the_graph_of_a_model_without_bodies():
    with says("this Sequential was not compiled from a graph", "ag.trace(model, …)"):
        ag.graph_of(stack())


def test_a_host_whose_class_was_changed_again_is_not_detached(traced):
    model = traced("sequential").graph.splice("0", METHOD).compile()
    nn.utils.parametrizations.weight_norm(model[0])
    x = torch.ones(1, 8)
    before, expected = snapshot(model), model(x)
    with says("this Sequential was changed after the bodies were attached", "0", "was Linear", "a parametrization"):
        ag.detach(model)
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------- tracing what does not run


def test_a_forward_that_fails_by_itself():
    model = stack()
    before = snapshot(model)
    with says(
        "the forward of Sequential fails with these arguments",
        "argument 0   (1, 9) torch.float32 on cpu",
        "it raises    RuntimeError: ",
        "written at  test_hosted_errors.py",
        "to fix      call the model with the same arguments first",
    ):
        ag.trace(model, torch.ones(1, 9))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("args", "kwargs", "line"),
    [
        ((), {}, "it raises   TypeError"),
        ((torch.ones(1, 8),), {"extra": 1}, "argument extra   1"),
        (("text",), {}, "'text'"),
    ],
)
def test_wrong_arguments(args, kwargs, line):
    with says("the forward of Sequential fails with these arguments", line):
        ag.trace(stack(), *args, **kwargs)


def test_a_model_that_torch_compile_wrapped():
    with says("this model went through torch.compile", "torch.compile(graph.compile())"):
        ag.trace(torch.compile(stack()), torch.ones(1, 8))


def test_a_body_whose_argument_is_not_given():
    class Two(nn.Module):
        def forward(self, x, shift=None):
            return x if shift is None else x + shift

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, x, both=True):
            return self.two(x, shift=x * 2) if both else self.two(x)

    x = torch.ones(1, 4)
    graph = ag.trace(Model(), x)
    adapted = graph.splice("two", lambda s: s.output + ag.dense(s.inputs["shift"], 4), where="around").compile()
    adapted(x)
    with says("a body at 'two' reads its argument 'shift', which is not given in this call"):
        adapted(x, both=False)


def test_what_is_no_module():
    with says("trace takes an nn.Module, not str"):
        ag.trace("bert")  # type: ignore[arg-type]


def test_a_forward_that_returns_no_tensor():
    class Silent(nn.Module):
        def forward(self, x):
            return 3

    with says("the forward of Silent returns no tensor"):
        ag.trace(Silent(), torch.ones(1))


def test_an_error_inside_the_models_forward_leaves_modes_and_hooks_alone():
    case = CASES["bert"]
    model = case.model().train()
    before = snapshot(model)
    with says("the forward of BertForSequenceClassification fails"):
        ag.trace(model, input_ids=torch.ones(2, 600, dtype=torch.long))
    assert snapshot(model) == before
