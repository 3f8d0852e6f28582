"""Axon's first model and Edifice's adapter, in our calls: declared, printed, drawn, compiled, run.

In Elixir the model is

    Axon.input("input", shape: {nil, 784}) |> Axon.dense(128) |> Axon.relu() |> Axon.batch_norm()
    |> Axon.dropout(rate: 0.8) |> Axon.dense(64) |> Axon.tanh() |> Axon.dense(10) |> Axon.activation(:softmax)

and the adapter is `Adapter.wrap(layer, hidden_size: 64, bottleneck_size: 16)`.
"""

from pathlib import Path

import torch
from torch import nn

import adaptergraph as ag
from adaptergraph import Adapter

out = Path("out")
out.mkdir(exist_ok=True)

# one immutable node for each call; shapes are known at once
x = ag.input("input", shape=("batch", 784))
x = ag.relu(ag.dense(x, 128, name="dense_0"))
x = ag.module(x, nn.BatchNorm1d(128), name="batch_norm")
x = ag.dropout(x, rate=0.8)
x = ag.tanh(ag.dense(x, 64, name="dense_1"))
plain = ag.Graph(ag.softmax(ag.dense(x, 10, name="dense_2")))
print(plain.summary())

# Edifice's wrap: x + up(relu(down(x))), the wrapped layers frozen
x = Adapter.wrap(x, hidden_size=64, bottleneck_size=16)
graph = ag.Graph(ag.softmax(ag.dense(x, 10, name="dense_2"))).freeze()
print(graph.summary())
print("picture:", graph.draw(out / "declare.svg"))

# straight-line code that a person can read
model = graph.compile(seed=0)
print(model.code)
print("trained:", ", ".join(name for name, p in model.named_parameters() if p.requires_grad))

# a fresh adapter is the identity: the model with it says what the model without it says
images = torch.rand(4, 784)
same = torch.equal(model.eval()(images), plain.compile(seed=0).eval()(images))
print("equal to the model without adapter, bit for bit:", same)
