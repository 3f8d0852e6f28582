"""A forward that imports something lazily: what is imported is the same as without a trace."""

from __future__ import annotations

import gc
import importlib
import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import adaptergraph as ag

CONSTANTS = """
import torch

ONE = torch.tensor(1.0)
TABLE = torch.arange(4) * ONE


def scaled(x, scale=torch.tensor(2.0)):
    return x * scale
"""
LOAD = importlib._bootstrap._load_unlocked


@pytest.fixture
def lazy(tmp_path, monkeypatch):
    """A package that is not imported yet, and imports a module of its own that makes tensors."""
    package = tmp_path / "lazily"
    package.mkdir()
    (package / "__init__.py").write_text("from .constants import ONE, TABLE, scaled\n")
    (package / "constants.py").write_text(CONSTANTS)
    (tmp_path / "lazily_broken.py").write_text(
        "import torch\nONE = torch.tensor(1.0)\nraise ValueError('no such tide')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.startswith("lazily")]:
        del sys.modules[name]


class Importing(nn.Module):
    """Looks at values too if asked to, so that it is traced on its real tensors."""

    def __init__(self, way, looks=False):
        super().__init__()
        self.fc, self.way, self.looks = nn.Linear(4, 4), way, looks

    def forward(self, x):
        h = self.fc(x)
        if self.looks and h.sum().item() > 1e9:
            h = h * 2
        return self.way(h)


def by_statement(h):
    import lazily

    return lazily.scaled(h)


def by_function(h):
    return importlib.import_module("lazily.constants").scaled(h)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("way", [by_statement, by_function])
def test_what_a_forward_imports_is_real(lazy, way, looks):
    model, x = Importing(way, looks).eval(), torch.randn(2, 4)
    first = ag.trace(model, x)
    module = sys.modules["lazily.constants"]
    assert [type(t) for t in (module.ONE, module.TABLE, module.scaled.__defaults__[0])] == [Tensor] * 3
    assert module.TABLE.tolist() == [0, 1, 2, 3]
    assert torch.equal(model(x), model.fc(x) * 2)
    # nothing that the import did is an operation of the forward
    assert first == ag.trace(model, x)
    assert importlib._bootstrap._load_unlocked is LOAD


def test_what_a_module_of_a_declared_graph_imports_is_real(lazy):
    graph = ag.Graph(ag.module(ag.input("x", shape=("batch", 4)), Importing(by_statement), name="m"))
    assert type(sys.modules["lazily.constants"].TABLE) is Tensor
    model, x = graph.compile(), torch.randn(2, 4)
    assert torch.equal(model(x), model.m.fc(x) * 2)


def test_what_is_imported_while_a_plan_is_made_is_real(lazy):
    class InTraining(nn.Linear):
        def forward(self, x):
            return by_statement(super().forward(x)) if self.training else super().forward(x) * 2

    plan = ag.trace(InTraining(4, 4), torch.randn(2, 4)).plan()
    assert type(sys.modules["lazily.constants"].TABLE) is Tensor
    assert plan.flops == 2 * 2 * 4 * 4


def test_an_import_that_fails_leaves_nothing(lazy):
    def broken(h):
        import lazily_broken  # noqa: F401

    def fakes():
        gc.collect()
        return sum(isinstance(o, FakeTensor) for o in gc.get_objects())

    before = fakes()
    with pytest.raises(ag.GraphError, match="no such tide"):
        ag.trace(Importing(broken), torch.randn(2, 4))
    assert "lazily_broken" not in sys.modules
    assert importlib._bootstrap._load_unlocked is LOAD
    assert fakes() <= before


def test_of_two_threads_one_traces_after_the_other(lazy):
    """What both change for the time of a trace, of the whole process, is afterwards what it was."""
    running, begun, ended = threading.Event(), threading.Event(), threading.Event()
    x, found, compiled = torch.randn(2, 4), [], []

    def first(h):
        running.set()
        # the other would begin its run by now, and end it after this one
        begun.wait(0.5)
        return h

    def last(h):
        begun.set()
        assert ended.wait(60)
        return by_statement(h)

    def second():
        assert running.wait(60)
        found.append(ag.trace(Importing(last), x))

    thread = threading.Thread(target=second)
    thread.start()
    ag.trace(Importing(first), x)
    ended.set()
    thread.join()
    assert len(found) == 1
    assert type(sys.modules["lazily.constants"].ONE) is Tensor
    assert Importing(by_statement)(x).shape == (2, 4)
    # torch.compile compiles again
    torch.compile(torch.sin, backend=lambda graph, _: compiled.append(graph) or graph.forward)(x)
    assert len(compiled) == 1
    assert importlib._bootstrap._load_unlocked is LOAD
