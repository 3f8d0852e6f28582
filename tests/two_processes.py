"""Run by test_many.py: adapted models in two processes, whose gradients must be those of one on the whole batch."""

import contextlib
import os
import sys

import pytest
import torch
import torch.multiprocessing as multiprocessing
from kinds import KINDS, adapted, gradients, ids
from torch import distributed

import adaptergraph as ag

HOWS = ("ddp", "fsdp layers", "fsdp hosts")


def loss(model, rows):
    """The mean over rows that are equally many in each process."""
    return model(input_ids=rows, use_cache=False).logits.pow(2).mean()


def sharded(model, how):
    """The model over both processes."""
    from torch.distributed.fsdp import fully_shard

    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if how == "fsdp hosts":
        for path in dict.fromkeys(body.host.partition("/")[0] for body in ag.graph_of(model).bodies.values()):
            fully_shard(model.get_submodule(path))
    for layer in model.model.layers:
        if type(layer).__name__ == "LlamaDecoderLayer":
            fully_shard(layer)
    return fully_shard(model)


def compared(rank, how, kind, rows):
    """One kind of body, in one process and in two."""
    alone, model = adapted(kind), adapted(kind)
    loss(alone, rows).backward()
    expected = gradients(alone)
    both = sharded(model, how)
    loss(both, rows[2 * rank : 2 * rank + 2]).backward()
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model).items()}
    assert found.keys() == expected.keys(), (kind, found.keys() ^ expected.keys())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if how == "ddp":
        return
    with pytest.raises(ag.GraphError, match="was changed after the bodies were attached"):
        ag.detach(model)


@contextlib.contextmanager
def one_of_two(rank, directory):
    """What runs in one of two processes that know one another."""
    torch.set_num_threads(1)
    store = distributed.FileStore(os.path.join(directory, "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    yield
    distributed.destroy_process_group()


def work(rank, directory):
    """One of the two processes."""
    with one_of_two(rank, directory):
        for how in HOWS:
            for kind in KINDS:
                compared(rank, how, kind, ids(4, 7))
                if rank == 0:
                    print(how, kind, flush=True)


if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
