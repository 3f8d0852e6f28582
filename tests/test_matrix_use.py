"""Each kind of adapter in use: generating, saving, other precisions, tracers, and what other libraries add."""

from __future__ import annotations

import copy
import re

import byhand
import pytest
import torch
from cells import ALL, CELLS, KINDS, Cell, Hand, wrap_after
from models import keys, loss, run, tensors
from test_hosted import same
from torch import nn
from whole import LAYERS, WHOLE

import adaptergraph as ag

# their sums are values inside a forward, which is written anew
LOWERED = ("gpt2", "llama", "mixtral", "vit", "whisper")
GENERATING = [c for c in CELLS if c.name in ("llama", "gpt2", "t5", "whisper", "mixtral", "mamba")]
MORE = WHOLE + [Cell(n, k) for n in ("bert", "llama", "vit") for k in ("cross", "before")]


def large(traced, cell, deviation=0.5):
    """The case, an adapted model with large bodies, and the one written by hand."""
    case, _, graph = traced(cell.name)
    model = byhand.randomise(cell.splice(graph).compile(), deviation)
    return case, model, cell.by_hand(model)[0]


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize("cell", GENERATING, ids=str)
def test_generating_equals_the_model_written_by_hand(traced, cell):
    case, model, hand = large(traced, cell)
    _, kwargs = case.args()
    first = "input_features" if "input_features" in kwargs else "input_ids"
    asked = {first: kwargs[first], "max_new_tokens": 6, "min_new_tokens": 6}
    for more in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached = model.generate(**asked, **more, use_cache=True)
        assert torch.equal(cached, model.generate(**asked, **more, use_cache=False))
        assert torch.equal(cached, hand.generate(**asked, **more, use_cache=True))
    scores = [
        one.generate(**asked, do_sample=False, output_logits=True, return_dict_in_generate=True).logits
        for one in (model, hand)
    ]
    same(*scores)
    plain = case.model().generate(**asked, do_sample=False, output_logits=True, return_dict_in_generate=True).logits
    assert not torch.equal(scores[0][0], plain[0])


class FromEncoder:
    """A body in the decoder that reads the mean of a module in the encoder."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, site):
        tapped = ag.nx(site.graph[site.graph.value_of(self.layer).name], mean_of_words)
        return site.output + ag.dense(tapped, site.output.shape[-1], name="b")


def mean_of_words(states):
    return states.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "tap", "at"),
    [
        ("t5", "encoder.block.0", "decoder.block.1.layer.2.DenseReluDense.wo"),
        ("whisper", "model.encoder.layers.0", "model.decoder.layers.1.fc2"),
    ],
)
def test_a_decoder_that_is_called_by_itself_cannot_read_from_the_encoder(traced, name, tap, at):
    case, _, graph = traced(name)
    model = byhand.randomise(graph.splice(at, FromEncoder(tap)).compile())
    hand = case.model().requires_grad_(False)
    body = Hand(model.get_submodule(at + ".adapter"), None)
    seen = []
    wrap_after(hand.get_submodule(tap), lambda value, given: seen.append(value) or value)
    wrap_after(hand.get_submodule(at), lambda value, given: value + body.b(mean_of_words(seen[-1])))
    same(run(model, case), run(hand, case))
    _, kwargs = case.args()
    first = next(iter(kwargs))
    with pytest.raises(ag.GraphError, match="was not computed in this forward") as error:
        model.generate(**{first: kwargs[first]}, max_new_tokens=3, do_sample=False)
    assert "call the model as a whole" in str(error.value)
    same(run(model, case), run(hand, case))


def test_operations_that_cannot_be_reached_are_refused_with_the_reason():
    case = ALL["t5"]
    _, kwargs = case.args()
    operation = "encoder.block.0.layer.0.SelfAttention/reshape"
    graph = ag.trace(case.model(), **kwargs, use_cache=False).splice(operation, ag.Bottleneck(4))
    with pytest.raises(ag.BadSplice, match="cannot be reached") as error:
        graph.compile()
    assert "it asks for the kind of a value: isinstance or the like" in str(error.value)
    assert operation.partition("/")[0] in str(error.value)


def test_an_operation_that_gives_several_values_is_no_host():
    case = ALL["gpt2"]
    _, kwargs = case.args()
    graph = ag.trace(case.model(), **kwargs, use_cache=False)
    with pytest.raises(ag.BadSplice, match="gives several values, of which none is its own"):
        graph.splice("transformer.h.0.attn/split", ag.Bottleneck(4))


# ---------------------------------------------------------------------- files of the host's own library


@pytest.mark.parametrize("cell", MORE, ids=str)
def test_save_pretrained_keeps_the_base_and_the_bodies(traced, tmp_path, cell):
    case, model, _ = large(traced, cell)
    # under the names that the model has, which some models write otherwise
    model.save_pretrained(tmp_path, save_original_format=False)
    again = type(case.model()).from_pretrained(tmp_path).eval()
    base = case.model()
    assert type(again) is type(base)
    same(run(again, case), run(base, case))
    from safetensors.torch import load_file

    _, kwargs = case.args()
    back = cell.splice(ag.trace(again, **kwargs)).compile(state=load_file(tmp_path / "model.safetensors"))
    same(run(back, case), run(model, case))


# ---------------------------------------------------------------------- precision and modes


@pytest.mark.parametrize("cell", MORE, ids=str)
def test_autocast_and_inference_mode(traced, cell):
    case, model, hand = large(traced, cell)
    with torch.inference_mode():
        out = run(model, case)
        same(out, run(hand, case))
    assert all(t.is_inference() for t in tensors(out))
    with torch.autocast("cpu", torch.bfloat16):
        same(run(model, case), run(hand, case))
        for one in (model, hand):
            loss(run(one, case)).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("cell", MORE, ids=str)
def test_a_half_precision_host_has_bodies_of_full_precision(cell):
    base = cell.case.model().to(torch.bfloat16)
    _, kwargs = cell.case.args()
    kwargs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in kwargs.items()}
    graph = cell.splice(ag.trace(base, **kwargs))
    model = byhand.randomise(graph.compile(), 0.3)
    bodies = tuple(f"{n}." for n in graph.bodies)
    assert {p.dtype for n, p in model.named_parameters() if n.startswith(bodies)} == {torch.float32}
    hand, hands = cell.by_hand(model)
    hand.to(torch.bfloat16)
    outputs = [one(**kwargs) for one in (model, hand)]
    same(*outputs)
    assert [t.dtype for t in tensors(outputs[0])] == [t.dtype for t in tensors(base(**kwargs))]
    for out in outputs:
        loss(out).backward()
    for name, body in hands.items():
        for part, parameter in body.named_parameters():
            grad = model.get_submodule(name).get_parameter(part).grad
            assert grad.dtype == torch.float32
            # gradients that several readers add up in bfloat16 are added in another order
            assert torch.allclose(grad, parameter.grad, rtol=0.05, atol=0.02 * parameter.grad.abs().max().item())


# ---------------------------------------------------------------------- tracers


@pytest.mark.parametrize("kind", KINDS)
def test_tracers_of_a_whole_model_see_the_bodies(traced, kind):
    cell = Cell("convnet", kind)
    case, model, hand = large(traced, cell)
    _, kwargs = case.args()
    x = kwargs["pixel_values"]
    expected = hand(x)
    for traced_model in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        for _ in range(2):
            assert torch.allclose(traced_model(x), expected, atol=1e-6)
    symbolic = torch.fx.symbolic_trace(model)
    if kind in ("parallel", "ladder", "cross"):
        # fx calls torch's own layers as they are, without the model around them that their bodies read from
        with pytest.raises(ag.GraphError, match="was not computed in this forward"):
            symbolic(x)
        symbolic = torch.fx.GraphModule(model, Through().trace(model))
    assert torch.allclose(symbolic(x), expected, atol=1e-6)


class Through(torch.fx.Tracer):
    """Follows every module that has a body."""

    def is_leaf_module(self, m, module_qualified_name):
        return "_adaptergraph_plan" not in vars(m) and super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize("cell", [Cell(n, k) for n in LAYERS for k in ("serial", "low_rank", "before")], ids=str)
def test_tracers_of_one_adapted_leaf(traced, cell):
    _, model, hand = large(traced, cell)
    for body in ag.graph_of(model).bodies.values():
        leaf, own = model.get_submodule(body.host), hand.get_submodule(body.host)
        if next(own.children(), None) is not None:
            continue
        x = torch.randn(3, leaf.in_features if hasattr(leaf, "in_features") else leaf.weight.shape[0])
        expected = own(x)
        torch.testing.assert_close(torch.jit.trace(leaf, x)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(leaf)(x), expected)


# ---------------------------------------------------------------------- a second library's adapters on top


@pytest.mark.parametrize("cell", MORE, ids=str)
def test_lora_of_another_library_on_top(traced, cell):
    """It wraps layers, some of which have bodies; values and gradients of both are those of the same by hand."""
    peft = pytest.importorskip("peft")
    case, model, _ = large(traced, cell)
    hand, hands = cell.by_hand(model)
    names = [n for n in re.findall(r"\w+", cell.places.low_rank.rpartition(".")[2]) if n != "0"]
    if cell.name == "llama":
        names.append("down_proj")
    config = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=True)
    before = tensors(run(model, case))
    models = []
    for one in (model, hand):
        torch.manual_seed(5)
        models.append(peft.get_peft_model(one, config))
    for body in hands.values():
        # it froze those that are modules of the model
        body.requires_grad_(False)
    found = [n for n, m in models[0].named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert found == [n for n, m in models[1].named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    torch.testing.assert_close(tensors(run(models[0], case)), before)
    for one in models:
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    outputs = [run(one, case) for one in models]
    same(*outputs)
    for out in outputs:
        loss(out).backward()
    theirs = dict(models[1].named_parameters())
    trained = [n for n, p in models[0].named_parameters() if p.grad is not None and "lora_" in n]
    assert trained
    for name in trained:
        assert torch.allclose(models[0].get_parameter(name).grad, theirs[name].grad, rtol=1e-4, atol=1e-5), name


# ---------------------------------------------------------------------- hooks that were there before


class Pass:
    """Made into an accelerate hook that adds one to what a module returns."""

    def __new__(cls):
        from accelerate.hooks import ModelHook

        class Hook(ModelHook):
            def post_forward(self, module, output):
                return byhand.on_first_float(output, lambda value: value + 1)

        return Hook()


@pytest.mark.parametrize("cell", MORE, ids=str)
def test_a_model_that_accelerate_dispatched(cell):
    """As `device_map` does: every module has a forward of accelerate's on the instance when it is traced."""
    from accelerate import dispatch_model

    case = cell.case
    base = case.model()
    dispatch_model(base, {"": "cpu"}, main_device="cpu", force_hooks=True)
    hooked = [n for n, m in base.named_modules() if "_hf_hook" in vars(m)]
    assert hooked
    _, kwargs = case.args()
    graph = cell.splice(ag.trace(base, **kwargs))
    if cell.kind == "sums" and cell.name in LOWERED:
        with pytest.raises(ag.BadSplice, match="it was replaced on the module itself"):
            graph.compile()
        return
    model = byhand.randomise(graph.compile())
    hand, _ = cell.by_hand(model)
    same(run(model, case), run(hand, case))
    same(run(copy.deepcopy(model), case), run(hand, case))
    assert keys(ag.detach(model)) == keys(case.model())
    same(run(model, case), run(case.model(), case))


@pytest.mark.parametrize(
    "cell", [Cell(n, k) for n in ("bert", "llama", "gpt2") for k in KINDS if k != "low_rank"], ids=str
)
def test_hooks_on_the_layers_before_they_were_traced(cell):
    """A hook on each layer is a part of the layer; bodies at or in it run as by hand, or the place is refused."""
    from accelerate.hooks import add_hook_to_module

    case = cell.case
    _, kwargs = case.args()

    def hooked():
        model = case.model()
        for layer in cell.places.layers:
            if layer.rpartition(".")[2].isdigit():
                add_hook_to_module(model.get_submodule(layer), Pass())
        return model

    graph = cell.splice(ag.trace(hooked(), **kwargs))
    lowered = cell.kind == "sums" and cell.name != "bert"
    if lowered:
        with pytest.raises(ag.BadSplice, match="it was replaced on the module itself"):
            graph.compile()
        return
    model = byhand.randomise(graph.compile())
    hand, _ = cell.by_hand(model, hooked())
    same(run(model, case), run(hand, case))


# ---------------------------------------------------------------------- a base of small integers


class Narrow(nn.Module):
    """A linear layer whose weight is kept as bytes and widened when it runs: gradients go through it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("bytes", (linear.weight.detach() / scale).round().to(torch.int8))

    @property
    def weight(self):
        return self.bytes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def narrowed(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Narrow(child))
    return model


def dynamically_quantised(model):
    """torch's own int8 layers; they give no gradients, and torch says so in a warning."""
    # Mamba reads the weights of these layers itself
    layers = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(("dt_proj", "lm_head"))
    }
    return torch.ao.quantization.quantize_dynamic(model, layers, dtype=torch.qint8)


@pytest.mark.parametrize("quantised", [narrowed, dynamically_quantised])
@pytest.mark.parametrize("cell", MORE, ids=str)
def test_a_quantised_base(cell, quantised):
    case = cell.case
    _, kwargs = case.args()
    base = quantised(case.model())
    model = byhand.randomise(cell.splice(ag.trace(base, **kwargs)).compile())
    hand, hands = cell.by_hand(model, quantised(case.model()))
    outputs = [run(one, case) for one in (model, hand)]
    same(*outputs)
    same(run(copy.deepcopy(model), case), outputs[0])
    if quantised is narrowed:
        for out in outputs:
            loss(out).backward()
        for name, body in hands.items():
            for part, parameter in body.named_parameters():
                grad = model.get_submodule(name).get_parameter(part).grad
                assert torch.allclose(grad, parameter.grad, rtol=1e-4, atol=1e-5)
    assert keys(ag.detach(model)) == keys(base)
    same(run(model, case), run(base, case))
