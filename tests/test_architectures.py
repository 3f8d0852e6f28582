"""Importing all of them: what holds of one model must hold of every architecture in the table."""

from __future__ import annotations

import gc
import re
import warnings

import networkx
import pytest
import torch
from architectures import ARCHITECTURES, HUGGING
from models import on_path, snapshot, tensors
from replay import Outside, Ref, recorded, references
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import adaptergraph as ag

REAL = {"longformer", "vilt", "llava"}

NEVER_CALLED = {
    "bert": "bert.encoder.layer.{i}.attention.self.dropout",
    "roberta": "roberta.encoder.layer.{i}.attention.self.dropout",
    "distilbert": "distilbert.transformer.layer.{i}.attention.dropout",
    "electra": "electra.encoder.layer.{i}.attention.self.dropout",
    "deberta": "deberta.encoder.rel_embeddings",
    "deberta_v2": "deberta.encoder.rel_embeddings",
    "xlnet": "transformer.layer.{i}.dropout",
    "funnel": "funnel.encoder.attention_structure",
    "gpt2": "transformer.h.{i}.attn.attn_dropout",
    "opt": "model",
    "falcon": "transformer.h.{i}.self_attention.attention_dropout",
    "mamba": "backbone.layers.{i}.mixer.{conv1d,act,dt_proj}",
    "mamba2": "backbone.layers.{i}.mixer.{act,conv1d}",
    "t5": "shared",
    "mt5": "shared",
    "bart": "model.shared",
    "mbart": "model.shared",
    "pegasus": "model.shared",
    "marian": "model.shared",
    "resnet": "resnet.encoder.stages.{i}.layers",
    "siglip": "vision_model.head.attention.out_proj",
    "nn.TransformerEncoder": "layers.{i}.self_attn.out_proj",
    "nn.TransformerEncoder (train)": "layers.{i}.self_attn.out_proj",
    "nn.MultiheadAttention": "attention.out_proj",
}
CALLED_TWICE = {
    "roberta": "classifier.dropout",
    "electra": "classifier.dropout",
    "mpnet": "classifier.dropout",
    "longformer": "classifier.dropout",
    "modernbert": "model.rotary_emb",
    "albert": "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
    "t5": "encoder.dropout",
    "mt5": "decoder.dropout",
    "vit": "vit.layers.0.dropout",
    "deit": "deit.layers.1.dropout",
    "beit": "beit.layers.0.drop_path",
    "dinov2": "dinov2.encoder.layer.0.drop_path",
    "swin": "swin.encoder.layers.0.blocks.1.dropout",
    "segformer": "segformer.stages.0.blocks.0.drop_path",
    "blip": "vision_model.post_layernorm",
}


@pytest.fixture(autouse=True, scope="module")
def every_child_is_called():
    """The fused kernels of torch's own encoder call no child."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request):
    """Each architecture in turn, all tests of one together: what was recorded of it is made once and then dropped."""
    return request.param


@pytest.fixture(scope="module")
def recording(name):
    """What was recorded of an architecture, and every event's value in one real run."""
    architecture = ARCHITECTURES[name]
    found = recorded(architecture.model(), *architecture.args())
    found.model.eval()
    found.run(*architecture.args())
    return found


def real_run(model, args, kwargs):
    """What a model returns, and what each call of each of its modules returned."""
    calls, handles = {}, []
    for path, module in model.named_modules():

        def hook(module, args, output, path=path):
            floats = [t.clone() for t in tensors(output) if t.is_floating_point()]
            calls.setdefault(path, []).append(floats[0] if floats else None)

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        output = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return output, calls


def same(a, b):
    """Equal to the last bit; a NaN is equal to itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_the_table_is_as_long_as_we_say():
    assert len(HUGGING) >= 55
    assert len([n for n in ARCHITECTURES if n not in HUGGING]) == 6


def first_of(made):
    """The event and output of the first float tensor that a call returned."""
    return next((value for path, value in made.parts if path == made.first), None)


def test_what_was_recorded_runs_again_bit_for_bit(name, recording):
    recorder = recording.recorder
    assert not recorder.unknown, "a tensor that no event gave"
    assert recorder.fake == (name not in REAL)
    output, calls = real_run(recording.model, *ARCHITECTURES[name].args())
    results = [(path, recording.values[ref]) for path, ref in recorder.results]
    assert len(results) == len(tensors(output))
    for path, value in results:
        assert same(value, on_path(output, path))
    # the calls of every module, containers too
    assert {p: len(c) for p, c in recorder.calls.items()} == {p: len(c) for p, c in calls.items()}
    for path, made in recorder.calls.items():
        for found, real in zip(map(first_of, made), calls[path], strict=True):
            assert (found is None) == (real is None)
            assert found is None or same(recording.values[found], real), path


def test_every_value_that_is_read_is_an_edge(name, recording):
    graph, recorder = recording.graph, recording.recorder
    reads, olds = {}, {}
    for record, step in recorder.steps.items():
        refs = list(references(step.args))
        assert not any(isinstance(ref, Outside) for ref in refs) or name in REAL
        final = record.final().name
        reads.setdefault(final, set()).update(r.record.final().name for r in refs if isinstance(r, Ref))
        olds.setdefault(final, set()).update(v.old.record.final().name for v in step.views if isinstance(v.old, Ref))
        for ref in refs:
            if isinstance(ref, Ref) and ref.record.final() is not ref.record and record.into is None:
                # what a leaf made inside is, for those who read it, what the leaf gave
                whole = ref.record.final()
                assert same(recording.values[ref], recording.values[whole, whole.main])
    seen = set()
    for node in graph.nodes():
        if node.op == "input" or ":" in node.name:
            continue
        seen.add(node.name)
        named = {graph._nodes[i].inputs[0] if graph._nodes[i].op == "output" else i for i in node.inputs}
        expected = reads[node.name] - {node.name}
        assert expected <= named, node.name
        assert named <= expected | olds[node.name], node.name
    assert len(seen) > 2


def test_outputs_depend_on_inputs_and_containers_on_inner_nodes(name, recording):
    graph = recording.graph
    net, inputs = graph.to_networkx(), set(graph.inputs)
    args, kwargs = ARCHITECTURES[name].args()
    assert len(inputs) == len(tensors((args, kwargs)))
    for output in graph.output_names():
        assert inputs & networkx.ancestors(net, output)
    for path, module in graph.imported.modules.items():
        for index, call in enumerate(module.calls):
            if call.output is None:
                continue
            node = graph[call.output]
            value = recording.values[first_of(recording.recorder.calls[path][index])]
            assert (node.shape, node.dtype.is_floating_point) == (tuple(value.shape), True)
            children = [p for p in graph.imported.modules if p.startswith(f"{path}.") or (not path and p)]
            if any(graph.imported.modules[c].calls for c in children):
                scope = graph.imported.scopes[call.output]
                assert not path or scope.startswith(path), (path, call.output)


def test_which_modules_are_called_how_often(name, recording):
    graph = recording.graph
    model = recording.model
    kinds = (nn.ModuleList, nn.ModuleDict)
    modules = graph.imported.modules
    never = {p for p, m in modules.items() if not m.calls and not isinstance(model.get_submodule(p), kinds)}
    more = {p for p, m in modules.items() if len(m.calls) > 1}
    if name in NEVER_CALLED:
        assert {path for path in modules if matches(NEVER_CALLED[name], path)} == never
    if name in CALLED_TWICE:
        assert CALLED_TWICE[name] in more
    readers = graph.imported.readers
    for path in never:
        for parameter in dict(model.get_submodule(path).named_parameters(recurse=False)):
            first = graph.imported.tied.get(f"{path}.{parameter}", f"{path}.{parameter}")
            # whoever reads its weight instead is known, unless nobody does
            reader = readers.get(first)
            assert reader is None or reader in graph


def matches(pattern, path):
    """Whether a path is one of `a.{0,1}.{b,c}`."""
    parts = re.split(r"(\{[^}]*\})", pattern.replace("{i}", "{0,1}"))
    text = "".join(f"({p[1:-1].replace(',', '|')})" if p.startswith("{") else re.escape(p) for p in parts)
    return re.fullmatch(text, path) is not None


def test_nothing_of_a_trace_stays(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    args, kwargs = architecture.args()
    torch.manual_seed(3)
    with torch.no_grad():
        before = [t.clone() for t in tensors(model(*args, **kwargs))]
    state, random = snapshot(model), torch.get_rng_state()
    given = [t.clone() for t in tensors((args, kwargs))]
    there = fakes()
    graph = ag.trace(model, *args, **kwargs)
    assert snapshot(model) == state
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(tensors((args, kwargs)), given, strict=True))
    assert len(fakes()) == len(there)
    del there
    torch.manual_seed(3)
    with torch.no_grad():
        after = tensors(model(*args, **kwargs))
    assert all(same(a, b) for a, b in zip(after, before, strict=True))
    # another model of the class, never traced: whatever the process keeps for both is as it was
    fresh = architecture.model()
    torch.manual_seed(3)
    with torch.no_grad():
        again = tensors(fresh(*args, **kwargs))
    assert all(same(a, b) for a, b in zip(again, before, strict=True))
    assert not any(graph.trained.values())


def fakes():
    """Fake tensors that are alive in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [o for o in gc.get_objects() if type(o) is FakeTensor]
