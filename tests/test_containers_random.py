"""Random models whose modules hand dicts on, write into them and return them, or others that hold the same values.

Wherever a body is let in, the compiled model computes what its graph says; the graph is evaluated edge by edge. A
caller's dict is written into where the model itself writes into it, and nowhere else.
"""

from __future__ import annotations

import random

import pytest
import torch
from byhand import randomise
from test_attributes_random import WIDTH, Weight, evaluated, give_forwards
from torch import nn

import adaptergraph as ag

KEYS = "abc"
RESULTS = ["{0}", "{0}", "{0}", "dict({0})", "{{'a': {0}['b'], 'b': {0}['a'], 'c': {0}['c']}}"]


class Writes(nn.Module):
    """Writes into its dict and returns it."""

    def __init__(self):
        super().__init__()
        self.fc = Weight()

    def forward(self, d):
        d["b"] = self.fc(d["a"])
        return d


class Tells(Writes):
    """Writes into its dict and returns a new one."""

    def forward(self, d):
        d["a"] = self.fc(d["a"])
        return {"c": d["a"], "a": d["b"], "b": d["c"]}


class Block(nn.Module):
    """Layers, children that take a dict, and instructions that become the text of its forward."""

    def __init__(self, rng, depth):
        super().__init__()
        makes = [Writes, Tells, *[lambda: Block(rng, depth - 1)] * (3 if depth else 0)]
        self.layers = nn.ModuleList(Weight() for _ in range(2))
        self.inner = nn.ModuleList(rng.choice(makes)() for _ in range(rng.randint(1, 2)))
        self.steps = [(rng.choice("llccctak"), rng.random(), rng.random()) for _ in range(rng.randint(3, 7))]
        self.steps.append(("c", rng.random(), rng.random()))
        self.result = rng.choice(RESULTS)

    def text(self, name):
        lines, dicts = [f"def {name}(self, d):"], ["d"]
        for kind, a, b in self.steps:
            one, other = dicts[int(a * len(dicts))], dicts[int(b * len(dicts))]
            key, value = KEYS[int(a * 30) % 3], f"{other}['{KEYS[int(b * 30) % 3]}']"
            if kind == "c":
                lines.append(f"    e{len(dicts)} = self.inner[{int(b * len(self.inner))}]({one})")
                dicts.append(f"e{len(dicts)}")
            elif kind == "k":
                lines.append(f"    e{len(dicts)} = dict({one})")
                dicts.append(f"e{len(dicts)}")
            elif kind == "l":
                lines.append(f"    {one}['{key}'] = self.layers[{int(a * 2)}]({value})")
            elif kind == "t":
                lines.append(f"    {one}['{key}'] = torch.tanh({value})")
            else:
                lines.append(f"    {one}['{key}'] = {one}['{key}'] + {value}")
        return "\n".join([*lines, f"    return {self.result.format(dicts[-1])}"])


class Model(nn.Module):
    """Makes the dict itself, or is given it."""

    def __init__(self, block, given):
        super().__init__()
        self.block, self.given = block, given

    def forward(self, x):
        d = x if self.given else {"a": x, "b": torch.tanh(x), "c": x + x}
        e = self.block(d)
        return torch.tanh(e["a"]) + d["a"], e["b"] + d["b"], e["c"] + d["c"]


def written(seed, folder):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Model(Block(rng, 2), given=seed % 2 == 1)
    give_forwards([m for m in model.modules() if isinstance(m, Block)], folder / "forwards.py")
    return model, rng


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-3


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_what_is_compiled_is_what_the_graph_says(seed, tmp_path):
    base, rng = written(seed, tmp_path)
    values = {k: torch.randn(2, WIDTH) for k in KEYS}
    given = (lambda: dict(values)) if base.given else (lambda: values["a"])
    graph = ag.trace(base, given())

    def says(graph, model, values):
        return evaluated(graph, model, {f"x:{k}": v for k, v in values.items()} if base.given else values["a"])

    same(says(graph, base, values), base(given()))
    modules = [n for n, m in graph.imported.modules.items() if n and m.calls]
    labels = [f"{n}:{p[0]}" for n in modules for p in graph.imported.modules[n].calls[0].parts]
    places = [*modules, *labels, *(n for n in graph if "/" in n and graph._nodes[n].op in ("add", "tanh"))]
    ran = 0
    for _ in range(40):
        adapted = graph
        if ran == 6:
            break
        try:
            for number in range(rng.randint(1, 3)):
                adapted = adapted.splice(rng.choice(places), ag.Bottleneck(2), name=f"body{number}")
            model = randomise(adapted.compile(), 1.0)
        except ag.GraphError:
            continue
        assert adapted.unsplice() == graph
        d = given()
        same(says(adapted, model, values), model(d))
        if base.given:
            plain = dict(values)
            base(plain)
            assert all((d[k] is values[k]) == (plain[k] is values[k]) for k in KEYS)
        ran += 1
    assert ran, "nothing but refusals: the model says nothing"
