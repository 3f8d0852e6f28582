"""One graph of each kind of place where a body may stand, for the tests of what goes on working with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import byhand
import torch
from models import WIDTH, llama
from torch import Tensor, nn

import adaptergraph as ag

BODY = ag.Bottleneck(4)
PARALLEL = ag.Bottleneck(4, parallel=True)


def deep_llama(layers: int = 2, **more: object) -> nn.Module:
    """A Llama in eval mode, with random values everywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = llama().config.to_dict() | {"num_hidden_layers": layers, **more}
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def ids(rows: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """What a Llama is called with."""
    return torch.randint(2, 39, (rows, length), generator=torch.Generator().manual_seed(seed))


def layers_of(graph: ag.Graph) -> list[str]:
    """The paths of the layers."""
    names = (n for n, m in graph.imported.modules.items() if m.cls == "LlamaDecoderLayer")
    return list(names)


def add_tap(site: ag.Site) -> ag.Node:
    """A body of a later layer that reads what the first layer gives."""
    tapped = site.graph["model.layers.0"]
    return site.output + ag.dense(ag.tanh(ag.dense(tapped, 4, name="down")), WIDTH, name="up")


def add_ladder(site: ag.Site) -> ag.Node:
    """A side network that reads what every layer gives."""
    state = None
    for i, path in enumerate(layers_of(site.graph)):
        step = ag.dense(site.graph[path], 4, name=f"step_{i}")
        state = step if state is None else ag.tanh(state + step, name=f"state_{i}")
    return site.output + ag.dense(state, WIDTH, name="up")


KINDS: dict[str, Callable[[ag.Graph], ag.Graph]] = {
    "serial": lambda g: g.splice("model.layers.*.mlp.down_proj", BODY),
    "span": lambda g: g.splice(
        ag.span("model.layers.*.post_attention_layernorm", "model.layers.*.mlp.down_proj"), PARALLEL
    ),
    "tap": lambda g: g.splice("model.layers.1.mlp.down_proj", add_tap),
    "ladder": lambda g: g.splice("model.norm", add_ladder),
    "mid": lambda g: g.splice("model.layers.*/add", BODY),
}
NEW = [kind for kind in KINDS if kind != "serial"]


def adapted(kind: str, base: nn.Module | None = None) -> nn.Module:
    """A Llama with large random bodies of one kind."""
    base = deep_llama() if base is None else base
    graph = ag.trace(base, input_ids=ids(), use_cache=False)
    return byhand.randomise(KINDS[kind](graph).compile(base), 0.3)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that are there, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trainer_arguments(directory: object, steps: int, **more: Any) -> Any:
    """For a Hugging Face Trainer on the CPU that takes these steps in silence, two rows at a time."""
    from transformers import TrainingArguments

    return TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **more,
    )
