"""Random models whose modules hand values on as arguments, results, attributes and by writing into them.

Wherever a body is let in, the compiled model computes what its graph says; the graph is evaluated edge by edge.
"""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from byhand import randomise
from test_attributes import Keeping, bottleneck
from torch import Tensor, nn

import adaptergraph as ag

WIDTH = 6
FORMS = {"one": ("{}", ""), "list": ("[{}]", "[0]"), "dict": ("{{'h': {}}}", "['h']")}


class Weight(nn.Module):
    """A leaf that keeps nothing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)

    def forward(self, x):
        return x @ self.weight


class KeepsInput(Weight):
    def forward(self, x):
        self.saved = x
        return x @ self.weight


class Block(nn.Module):
    """Children, and instructions that become the text of its forward."""

    def __init__(self, rng, depth, writes, everyone):
        super().__init__()
        self.everyone = everyone
        everyone.append(self)
        makes = [Weight, Keeping, KeepsInput, *[lambda: Block(rng, depth - 1, writes, everyone)] * (3 if depth else 0)]
        self.inner = nn.ModuleList(rng.choice(makes)() for _ in range(rng.randint(1, 3)))
        everyone += [m for m in self.inner if isinstance(m, Keeping | KeepsInput)]
        kinds = ["call"] * 5 + ["keep", "read"] * 2 + ["add", "mul", "tanh", "list"] + ["write"] * writes
        self.steps = [(rng.choice(kinds), rng.random(), rng.random()) for _ in range(rng.randint(2, 6))]
        self.steps.append(("call", rng.random(), 1.0))
        self.form, self.result = rng.choice([*FORMS, "one"]), rng.choice([1.0, 1.0, rng.random()])
        self.unread: set[int] = set()

    def rehearse(self, kept):
        """Notes which attributes are not there yet when they are read."""
        for number, (kind, a, _) in enumerate(self.steps):
            place = int(a * len(self.everyone))
            if kind == "call":
                child = self.inner[int(a * len(self.inner))]
                if isinstance(child, Block):
                    child.rehearse(kept)
                elif type(child) is not Weight:
                    kept.add((self.everyone.index(child), "saved"))
            elif kind in ("keep", "list"):
                kept.add((place, "saved" if kind == "keep" else "held"))
            elif kind == "read" and (place, "saved") not in kept:
                self.unread.add(number)

    def text(self, name):
        lines, values = [f"def {name}(self, x):"], ["x"]

        def new(text):
            values.append(f"v{len(values)}")
            lines.append(f"    {values[-1]} = {text}")

        for number, (kind, a, b) in enumerate(self.steps):
            value = values[min(int(b * (len(values) + 2)), len(values) - 1)]
            other = f"self.everyone[{int(a * len(self.everyone))}]"
            if kind == "call":
                index = int(a * len(self.inner))
                new(f"self.inner[{index}]({value}){FORMS[getattr(self.inner[index], 'form', 'one')][1]}")
            elif kind == "read" and number not in self.unread:
                new(f"{other}.saved")
            elif kind in ("keep", "list"):
                lines.append(f"    {other}." + (f"saved = {value}" if kind == "keep" else f"held = [{value}]"))
            elif kind in ("add", "mul"):
                new(f"{values[int(a * len(values))]} {'+' if kind == 'add' else '*'} {value}")
            elif kind == "tanh":
                new(f"torch.tanh({value})")
            elif kind == "write":
                lines.append(f"    {value}.add_(1)")
        given = values[min(int(self.result * len(values)), len(values) - 1)]
        return "\n".join([*lines, f"    return {FORMS[self.form][0].format(given)}"])


def written(seed, folder):
    """A model with forwards as text, which lowering can read."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Block(rng, 2, seed % 3 == 0, [])
    model.rehearse(set())
    give_forwards([m for m in model.modules() if isinstance(m, Block)], folder / "forwards.py")
    return model, rng


def give_forwards(blocks, path):
    """Each block gets a class of its own, with the forward that it writes, in a file that can be read."""
    path.write_text("import torch\n\n\n" + "\n\n\n".join(b.text(f"forward{i}") for i, b in enumerate(blocks)) + "\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for number, block in enumerate(blocks):
        block.__class__ = type(f"Block{number}", (type(block),), {"forward": getattr(module, f"forward{number}")})


def evaluated(graph, model, x):
    values, own = {}, dict(model.named_modules())
    for node in graph.nodes():
        given = [values[i] for i in node.inputs]
        body = graph.bodies.get(node.body or "")
        if body is not None:
            read = {w: r for r, w in body.calls}.get(node.name)
            values[node.name] = values[read] + bottleneck(own[body.name], values[read]) if read else None
        elif node.op in ("input", "output", "identity"):
            values[node.name] = given[0] if given else x[node.name] if isinstance(x, dict) else x
        elif "/" not in node.name:
            values[node.name] = given[0] @ own[node.path].weight
        else:
            a, b = given[0], given[-1]
            values[node.name] = {"add": a + b, "mul": a * b, "tanh": torch.tanh(a), "add_": a + 1}[node.op]
    outputs = graph.outputs if isinstance(graph.outputs, dict) else {"": graph.outputs}
    return [values[n] for n in outputs.values()]


def found(output):
    return [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)


def forget(model):
    for module in model.modules():
        vars(module).pop("saved", None), vars(module).pop("held", None)


@pytest.mark.parametrize("seed", range(60))
@torch.no_grad()
def test_what_is_compiled_is_what_the_graph_says(seed, tmp_path):
    base, rng = written(seed, tmp_path)
    x = torch.randn(2, WIDTH)
    graph = ag.trace(base, x)
    for a, b in zip(evaluated(graph, base, x), found(base(x.clone())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    forget(base)
    modules = [n for n, m in graph.imported.modules.items() if n and m.calls]
    places = modules + [n for n in graph if "/" in n and graph._nodes[n].op in ("add", "mul", "tanh")]
    ran = 0
    for _ in range(40):
        adapted = graph
        if ran == 6:
            break
        try:
            for number in range(rng.randint(1, 3)):
                at = rng.choice(places)
                where = None if "/" in at else rng.choice([None, None, "before"])
                adapted = adapted.splice(at, ag.Bottleneck(2), where=where, name=f"body{number}")
            model = randomise(adapted.compile(), 1.0)
        except ag.BadSplice:
            continue
        assert adapted.unsplice() == graph
        results = found(model(x.clone()))
        for a, b in zip(evaluated(adapted, model, x), results, strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm() + 1e-3
        ran += 1
    assert ran, "nothing but refusals: the model says nothing"


@pytest.mark.parametrize("seed", range(0, 60, 3))
@torch.no_grad()
def test_a_body_that_is_refused_as_unread_would_change_nothing(seed, tmp_path, monkeypatch):
    base, _ = written(seed + seed // 3 % 3, tmp_path)
    x = torch.randn(2, WIDTH)
    graph = ag.trace(base, x)
    expected = found(base(x.clone()))
    forget(base)
    places = [n for n, m in graph.imported.modules.items() if n and m.calls]
    for at in [*places, *(n for n in graph if "/" in n and graph._nodes[n].op in ("add", "mul", "tanh"))]:
        for where in ("after",) if "/" in at else ("after", "before"):
            try:
                graph.splice(at, ag.Bottleneck(2), where=where)
            except ag.BadSplice as error:
                if "would change nothing" not in str(error):
                    continue
                with monkeypatch.context() as patched:
                    patched.setattr("adaptergraph.splicing.surgery.refuse_unread", lambda *given: None)
                    let_in = graph.splice(at, ag.Bottleneck(2), where=where)
                try:
                    model = randomise(let_in.compile(), 1.0)
                except ag.BadSplice:
                    continue
                for a, b in zip(found(model(x.clone())), expected, strict=True):
                    assert torch.equal(a, b)
