"""What cannot be traced is said by name, with a way out, and the model is afterwards what it was."""

from __future__ import annotations

import gc

import pytest
import torch
from models import snapshot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import adaptergraph as ag


class Choosing(nn.Module):
    """Looks at a value."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.fc(x)
        return h * 2 if h.sum().item() > 0 else h


class Picking(nn.Module):
    """The size of what it returns depends on values."""

    def forward(self, x):
        return x[x > 0]


class Broken(nn.Module):
    """Fails by itself, after it changed something."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.seen = []

    def forward(self, x):
        self.count += 1
        self.seen.append(self.fc(x))
        self.extra = x
        raise RuntimeError("the tide is out")


class Outer(nn.Module):
    """Has the failing one two levels down."""

    def __init__(self, inner):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(inner, nn.ReLU())])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def lines(model, *args, **kwargs):
    """What a refused trace says; afterwards the model is what it was, and nothing is left in the process."""
    gc.collect()
    there = sum(isinstance(o, FakeTensor) for o in gc.get_objects())
    before, random = snapshot(model), torch.get_rng_state()
    modules = [(m, dict(vars(m)), {k: list(v) for k, v in vars(m).items() if type(v) is list}) for m in model.modules()]
    call = torch.jit.ScriptFunction.__call__
    with pytest.raises(ag.GraphError) as refused:
        ag.trace(model, *args, **kwargs)
    text = str(refused.value)
    assert "test_trace_errors.py" in text
    assert "to fix" in text
    del refused
    assert snapshot(model) == before
    for module, attributes, lists in modules:
        assert {k: id(v) for k, v in vars(module).items()} == {k: id(v) for k, v in attributes.items()}
        assert {k: list(vars(module)[k]) for k in lists} == lists
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not _get_current_function_mode_stack()
    assert not _get_current_dispatch_mode_stack()
    assert torch.jit.ScriptFunction.__call__ is call
    gc.collect()
    assert sum(isinstance(o, FakeTensor) for o in gc.get_objects()) <= there
    return text


@pytest.mark.parametrize("model", [Choosing, lambda: Outer(Choosing()), lambda: Outer(Picking())])
def test_values_that_a_model_on_meta_has_not(model):
    model = model().to("meta")
    text = lines(model, torch.ones(2, 4))
    assert text.startswith(
        f"the forward of {type(model).__name__} looks at the values of tensors, and the model has none"
    )
    assert "load the weights first" in text
    if isinstance(model, Outer):
        assert f"in           layers.1.0 ({type(model.layers[1][0]).__name__})" in text


def test_values_that_an_argument_on_meta_has_not():
    text = lines(Choosing(), torch.ones(2, 4, device="meta"))
    assert "looks at the values of tensors, and argument 0 has none" in text
    assert "arguments on a real device" in text


@pytest.mark.parametrize("meta", ["model", "argument", "both", "neither"])
def test_shapes_are_enough_where_no_value_is_looked_at(meta):
    model, x = Outer(nn.Linear(4, 3)), torch.ones(2, 4)
    expected = ag.trace(model, x)
    if meta in ("model", "both"):
        model = model.to("meta")
    graph = ag.trace(model, x.to("meta") if meta in ("argument", "both") else x)
    assert graph == expected


def test_a_forward_that_fails_by_itself():
    text = lines(Outer(Broken()), torch.ones(2, 4))
    assert text.startswith("the forward of Outer fails with these arguments")
    assert "argument 0   (2, 4) torch.float32 on cpu" in text
    assert "in           layers.1.0 (Broken)" in text
    assert "it raises    RuntimeError: the tide is out" in text


@pytest.mark.parametrize(
    ("args", "kwargs", "parts"),
    [
        ((torch.ones(2, 5),), {}, ["argument 0   (2, 5)", "in           layers.0 (Linear)", "RuntimeError"]),
        ((), {}, ["TypeError", "missing a required argument: 'x'", "there is no tensor among them"]),
        ((torch.ones(2, 4),), {"y": 1}, ["argument y   1", "unexpected keyword argument 'y'"]),
        (({"x": torch.ones(2, 4)},), {}, ["arguments by name need two stars: ag.trace(model, **batch)"]),
        (
            ([torch.ones(2, 4)],),
            {},
            ["argument 0   [<(2, 4) torch.float32>]", "several arguments need a star: ag.trace("],
        ),
        (
            ((torch.ones(2, 4),),),
            {},
            ["argument 0   (<(2, 4) torch.float32>,)", "by name two: ag.trace(model, **batch)"],
        ),
        (("hello",), {}, ["argument 0   'hello'", "there is no tensor among them", "tokenizer"]),
        (([[1.0, 2.0]],), {}, ["argument 0   [[1.0, 2.0]]", "there is no tensor among them"]),
    ],
)
def test_wrong_example_inputs(args, kwargs, parts):
    text = lines(Outer(nn.Linear(4, 4)), *args, **kwargs)
    assert text.startswith("the forward of Outer fails with these arguments")
    for part in parts:
        assert part in text


class Asking(nn.Module):
    """Asks what it is given for its size before anything else."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        rows = x.size(0)
        return self.fc(x) * rows


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"x": torch.ones(2, 4)}, "arguments by name need two stars: ag.trace(model, **batch)"),
        ([torch.ones(2, 4)], "several arguments need a star: ag.trace(model, *batch)"),
        ((torch.ones(2, 4),), "several arguments need a star: ag.trace(model, *batch)"),
    ],
    ids=["dict", "list", "tuple"],
)
def test_a_batch_without_its_stars(given, hint):
    text = lines(Asking(), given)
    assert text.startswith("the forward of Asking fails with these arguments")
    assert f"AttributeError: '{type(given).__name__}' object has no attribute 'size'" in text
    assert hint in text


def test_arguments_on_another_device_than_the_model():
    model = Outer(nn.Linear(4, 4))
    with FakeTensorMode():
        # a device that need not be here
        x = torch.empty(2, 4, device="cuda")
        for linear in (model.layers[0], model.layers[1][0]):
            for name, parameter in linear.named_parameters():
                setattr(linear, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
    before = {n: p.device for n, p in model.named_parameters()}
    with pytest.raises(ag.GraphError) as refused:
        ag.trace(model, torch.ones(2, 4))
    text = str(refused.value)
    assert "argument 0   (2, 4) torch.float32 on cpu" in text
    assert "the parameters are on cuda:0: move argument 0 there with .to('cuda:0')" in text
    assert {n: p.device for n, p in model.named_parameters()} == before
    assert len(ag.trace(model, x)) == 4


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 4))])
def test_torchscript(make):
    model = make(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ag.GraphError, match=r"this \w+ is TorchScript, which hides what its forward does"):
        ag.trace(model, torch.ones(2, 4))
    model = nn.Sequential(nn.Linear(4, 4), model)
    with pytest.raises(ag.GraphError, match="this Sequential is TorchScript, in '1'"):
        ag.trace(model, torch.ones(2, 4))
    assert torch.isfinite(model(torch.ones(2, 4))).all()


def test_a_parameter_without_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(ag.GraphError, match=r"parameter '0\.weight' of this Sequential has no shape yet"):
        ag.trace(model, torch.ones(2, 3))
    model(torch.ones(2, 3))
    assert ag.trace(model, torch.ones(2, 3))["0"].inputs == ("input",)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_models_that_are_wrapped(alone):
    inner = Outer(nn.Linear(4, 4))
    wrapped = nn.parallel.DistributedDataParallel(inner)
    text = lines(wrapped, torch.ones(2, 4))
    assert text.startswith("this DistributedDataParallel is wrapped in DistributedDataParallel")
    assert "trace the model inside it (model.module)" in text
    assert lines(nn.DataParallel(inner), torch.ones(2, 4)).startswith("this DataParallel is wrapped in DataParallel")
    assert ag.trace(wrapped.module, torch.ones(2, 4)) == ag.trace(Outer(nn.Linear(4, 4)), torch.ones(2, 4))


def test_models_that_are_sharded(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Outer(nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    state = {n: type(p) for n, p in model.named_parameters()}
    with pytest.raises(ag.GraphError, match=r"parameter 'layers\.0\.weight' of this \w+ is sharded"):
        ag.trace(model, torch.ones(2, 4))
    assert {n: type(p) for n, p in model.named_parameters()} == state
    assert torch.isfinite(model(torch.ones(2, 4))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_example_of_another_dtype_than_the_parameters(dtype, device):
    """What torch itself refuses, with values; fake kernels take it."""
    x = torch.ones(2, 4, device=device).to(dtype)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4)).to(device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)
    with pytest.raises(ag.GraphError) as error:
        ag.trace(model, x)
    text = str(error.value)
    assert "the forward of Sequential fails with these arguments" in text
    assert f"linear is given {dtype}, and reads '1.weight', which is torch.float32" in text
    assert "1 (Linear)" in text
    hint = "the parameters are torch.float32: give argument 0 as that, with .to(torch.float32)"
    assert error.value.hint == hint


def test_dtypes_that_the_forward_itself_brings_together_are_fine():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.to(self.fc.weight.dtype))

    class Mixes(Casts):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x.to(torch.bfloat16))

    for model in (Casts(), Mixes()):
        model(torch.ones(2, 4, dtype=torch.float64))
        assert "fc" in ag.trace(model, torch.ones(2, 4, dtype=torch.float64))
