"""Ten models of Hugging Face and five kinds of adapters; as a script: each in two processes."""

from __future__ import annotations

import sys

import byhand
import torch
import torch.multiprocessing as multiprocessing
from cells import Cell
from kinds import gradients
from models import loss
from torch import nn
from two_processes import one_of_two

import adaptergraph as ag

LAYERS = {
    "bert": ("bert.encoder.layer",),
    "roberta": ("roberta.encoder.layer",),
    "distilbert": ("distilbert.transformer.layer",),
    "gpt2": ("transformer.h",),
    "llama": ("model.layers",),
    "mixtral": ("model.layers",),
    "mamba": ("backbone.layers",),
    "t5": ("encoder.block", "decoder.block"),
    "vit": ("vit.layers",),
    "whisper": ("model.encoder.layers", "model.decoder.layers"),
}
FIVE = ("serial", "parallel", "low_rank", "ladder", "sums")
WHOLE = [Cell(name, kind) for name in LAYERS for kind in FIVE]
HOWS = ("ddp", "fsdp layers", "fsdp hosts")


def without_dropout(model):
    """The model with every dropout at zero."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def labelled(case, rows):
    """As many rows of what a model is called with, and labels."""
    torch.manual_seed(4)
    found = []
    while len(found) < rows:
        _, batch = case.call()
        first = next(iter(batch.values()))
        if "LM" in type(case.model()).__name__:
            batch["labels"] = batch["input_ids"]
        elif "decoder_input_ids" in batch:
            batch["labels"] = batch["decoder_input_ids"]
        else:
            batch["labels"] = torch.randint(0, 2, (len(first),))
        found += [{n: t[i] for n, t in batch.items()} for i in range(len(first))]
    return found[:rows]


def sharded(model, cell, how):
    """The model over both processes."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp hosts":
        for path in dict.fromkeys(body.host.partition("/")[0] for body in ag.graph_of(model).bodies.values()):
            fully_shard(model.get_submodule(path))
    for path in LAYERS[cell.name]:
        for layer in model.get_submodule(path):
            if not isinstance(layer, FSDPModule):
                fully_shard(layer)
    return fully_shard(model)


def compared(rank, cell, how):
    """One kind of body, in one process and in two."""
    case = cell.case
    _, batch = case.args()
    batch = {n: torch.cat([t, t.flip(0)]) for n, t in batch.items()}
    base = case.model()
    graph = cell.splice(ag.trace(base, **batch))
    alone, model = (byhand.randomise(graph.compile(), 0.3) for _ in range(2))
    loss(alone(**batch)).backward()
    expected = gradients(alone)
    both = sharded(model, cell, how)
    loss(both(**{n: t[2 * rank : 2 * rank + 2] for n, t in batch.items()})).backward()
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model).items()}
    assert found.keys() == expected.keys() != set(), (str(cell), how, found.keys() ^ expected.keys())
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{cell} {how} {n}: {m}"
        )


def work(rank, directory):
    """One of the two processes."""
    with one_of_two(rank, directory):
        for cell in WHOLE:
            for how in HOWS:
                compared(rank, cell, how)
                if rank == 0:
                    print(how, cell, flush=True)


if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
