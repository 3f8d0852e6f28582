"""Each sum inside a forward, in every architecture: reached and right, or refused with the reason."""

import pytest
import torch
from architectures import ARCHITECTURES

import adaptergraph as ag
from adaptergraph.names import path_of
from adaptergraph.tracing.parts import tensors

# the residual sum in the middle of a layer, which no module gives and no module alone reads
MID_BLOCK = {
    "gpt2": "transformer.h.0/add",
    "gpt_neo": "transformer.h.0/add",
    "opt": "model.decoder.layers.0/add",
    "llama": "model.layers.0/add",
    "mistral": "model.layers.0/add",
    "mixtral": "model.layers.0/add",
    "qwen2": "model.layers.0/add",
    "qwen3": "model.layers.0/add",
    "gemma2": "model.layers.0/add",
    "phi3": "model.layers.0/add",
    "gpt_oss": "model.layers.0/add",
    "deepseek_v3": "model.layers.0/add",
    "whisper": "model.encoder.layers.0/add",
    "vit": "vit.layers.0/add",
    "dinov2": "dinov2.encoder.layer.0/add",
    "swin": "swin.encoder.layers.0.blocks.0/add",
    "clip": "text_model.encoder.layers.0/add",
}


def floats(output):
    return [t for _, t in tensors(output) if t.is_floating_point()]


def sums(graph):
    """One sum of three or more dimensions for each place in the code."""
    found = {}
    for name, node in graph._nodes.items():
        once = "/" in name and "@" not in name and ":" not in name
        if once and node.op in ("add", "iadd") and node.dtype.is_floating_point and len(node.shape) >= 3:
            found.setdefault((graph.imported.modules[path_of(name)].cls, name.partition("/")[2]), name)
    return list(found.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_are_reached_or_refused(name):
    case = ARCHITECTURES[name]
    model = case.model()
    args, kwargs = case.args()
    graph = ag.trace(model, *args, **kwargs)
    # torch picks other kernels for weights that may want gradients
    model.requires_grad_(False)
    refused = []
    with torch.no_grad():
        torch.manual_seed(0)
        base = floats(model(*args, **kwargs))
        for at in sums(graph):
            if graph[at].axis is None:
                # scores of attention in a model with convolutions, and the states of each channel
                assert graph[at].shape[-1] == graph[at].shape[-2] or (name, graph[at].shape[1:]) == ("mamba", (64, 16))
                with pytest.raises(ag.ShapeMismatch, match="it is not known which dimension of"):
                    graph.splice(at, ag.Bottleneck(2))
                continue
            try:
                adapted = graph.splice(at, ag.Bottleneck(2)).compile()
            except ag.BadSplice as error:
                if not str(error).startswith(f"{at!r} is an operation inside a forward that cannot be reached"):
                    raise
                refused.append(at)
                continue
            torch.manual_seed(0)
            fresh = floats(adapted(*args, **kwargs))
            assert all(map(torch.equal, fresh, base)), at
            for key, parameter in adapted.named_parameters():
                if "adapter_" in key:
                    parameter.normal_()
            torch.manual_seed(0)
            changed = floats(adapted(*args, **kwargs))
            assert not all(map(torch.equal, changed, base)), at
    if name in MID_BLOCK:
        assert MID_BLOCK[name] in graph
        assert MID_BLOCK[name] not in refused
