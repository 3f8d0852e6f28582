"""What is frozen stays: absent from the optimizer, and the same bits after a hundred steps."""

import pytest
import torch
from torch import nn

import adaptergraph as ag

STEPS = 100


def network():
    """An embedding, norms with statistics, convolution, recurrence and a layer that is called twice."""
    ids = ag.input("ids", shape=("batch", 6), dtype=torch.int64)
    h = ag.embedding(ids, 20, 8, name="embed")
    h, _ = ag.gru(h, 8, name="gru")
    h = ag.batch_norm(ag.transpose(h, (0, 2, 1), name="turned"), name="bn")
    h = ag.relu(ag.conv(h, 8, kernel_size=3, padding="same", name="conv"), name="act")
    h = ag.layer_norm(ag.flatten(h, name="flat"), name="norm")
    first = ag.dense(h, 48, name="twice")
    h = ag.module(first, nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8)), name="inner")
    return ag.Graph(ag.dense(h, 3, name="head"))


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (64, 6), generator=generator)
    return ids, ids.sum(-1) % 3


def tensors(model):
    """Every parameter and buffer."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def by_hand(model):
    """A loop as people write it, all parameters given to the optimizer."""
    ids, labels = batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model.train()
    for step in range(STEPS):
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        nn.functional.cross_entropy(model(ids[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return {id(p) for p in optimizer.state}


def by_fit(model):
    ids, labels = batches()
    made = []

    def optimizer(parameters, lr):
        made.append(torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1))
        return made[0]

    loss = nn.functional.cross_entropy
    data = {"ids": ids, "labels": labels}
    ag.fit(model, data, loss=loss, steps=STEPS, lr=0.01, optimizer=optimizer, progress=False)
    return {id(p) for group in made[0].param_groups for p in group["params"]}


@pytest.mark.parametrize("train", [by_hand, by_fit])
@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.freeze().splice("{gru.sequence,conv,twice}", ag.Bottleneck(3, activation="gelu")),
        lambda g: g.freeze("embed").freeze("bn").freeze("inner.1"),
        lambda g: g.freeze().unfreeze("**.bias"),
        lambda g: g.freeze().unfreeze("head").splice("embed", ag.Bottleneck(2)),
    ],
    ids=["adapters", "patterns add up", "biases", "head and one adapter"],
)
def test_a_hundred_steps_move_what_is_trained_and_nothing_else(change, train):
    graph = change(network())
    model = graph.compile()
    before = tensors(model)
    held = train(model)
    named = dict(model.named_parameters())
    assert held == {id(named[n]) for n, trained in graph.trained.items() if trained}
    after = tensors(model)
    frozen = [n for n, trained in graph.trained.items() if not trained]
    assert frozen
    for name in frozen:
        assert torch.equal(after[name], before[name]), name
        assert named[name].grad is None, name
    for name, trained in graph.trained.items():
        assert not trained or not torch.equal(after[name], before[name]), name
    # a BatchNorm all of whose parameters are frozen keeps its statistics too
    for norm in ("bn", "inner.1"):
        still = not any(graph.trained[f"{norm}.{p}"] for p in ("weight", "bias"))
        for part in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(after[f"{norm}.{part}"], before[f"{norm}.{part}"]) is still, (norm, part)


def test_a_frozen_embedding_has_no_gradient_at_all():
    """A sparse gradient would not be zero for rows that were not seen."""
    graph = network().freeze("embed")
    model = graph.compile().train()
    ids, labels = batches()
    nn.functional.cross_entropy(model(ids), labels).backward()
    assert model.embed.weight.grad is None
    assert model.gru.weight_ih_l0.grad is not None
