"""Large graphs: no recursion, and work that grows with the nodes. Counts of visits only; seconds are in benchmarks/."""

import sys
from collections import Counter
from contextlib import contextmanager

import pytest

import adaptergraph as ag
import adaptergraph.lower
import adaptergraph.node
import adaptergraph.rewrite
import adaptergraph.splicing.draft


def chain(count):
    h = ag.input("x", shape=("batch", 4))
    for i in range(count):
        h = ag.relu(h, name=f"r.{i}") if i % 20 else ag.dense(h, 4, name=f"fc.{i}")
    return ag.Graph(h)


@contextmanager
def little_recursion(frames=500):
    """As many further frames as torch itself needs, far fewer than a graph has nodes."""
    depth, frame = 0, sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def test_twenty_thousand_nodes_need_no_recursion():
    count = 20_000
    with little_recursion():
        graph = chain(count)
        assert len(graph) == count + 1
        frozen = graph.freeze()
        assert not any(frozen.trained.values())
        places = graph.select("fc.*").expect(count // 20)
        spliced = frozen.splice(places, ag.Bottleneck(2))
        assert len(spliced.bodies) == count // 20
        assert spliced.check() is spliced
        assert spliced.unsplice() == frozen
        assert ag.Graph.from_json(spliced.to_json()) == spliced
        model = spliced.compile(device="meta")
        assert len(list(model.parameters())) == 2 * (count // 20) + 4 * (count // 20)
        assert len(graph.truncate("fc.10000")) == 10_002


VISITS = [
    (adaptergraph.node.Node, "param_names", lambda g: g.freeze().trained),
    (adaptergraph.lower, "_made", lambda g: g.compile(device="meta")),
    (adaptergraph.lower, "_call", lambda g: g.compile(device="meta")),
    (adaptergraph.splicing.draft.Draft, "repoint", lambda g: g.splice("fc.*", ag.Bottleneck(2))),
    (adaptergraph.splicing.draft.Draft, "add", lambda g: g.splice("fc.*", ag.Bottleneck(2))),
    (adaptergraph.splicing.draft, "replace", lambda g: g.splice("fc.*", ag.Bottleneck(2))),
    (adaptergraph.rewrite._Draft, "keep", lambda g: g.map_nodes(lambda n: n)),
    (adaptergraph.rewrite._Draft, "put", lambda g: g.rewrite_nodes(lambda n: lambda i, o: ag.tanh(o))),
    (adaptergraph.node.Node, "same", lambda g: g.splice("fc.*", ag.Bottleneck(2)).unsplice() == g),
]


@pytest.mark.parametrize(("owner", "name", "verb"), VISITS, ids=lambda v: v if isinstance(v, str) else "")
def test_visits_grow_with_the_nodes(owner, name, verb, monkeypatch):
    calls = Counter()
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls[size] += 1
        return original(*args, **kwargs)

    for size in (400, 4000):
        graph = chain(size)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, counted)
            verb(graph)
    assert calls[400] > 0
    assert calls[4000] <= 10.5 * calls[400]


def test_a_chain_of_bodies_at_one_host_is_linear(monkeypatch):
    calls = Counter()
    original = adaptergraph.splicing.draft.replace

    def counted(*args, **kwargs):
        calls[size] += 1
        return original(*args, **kwargs)

    for size in (10, 100):
        graph = chain(size)
        for i in range(size // 10):
            graph = graph.splice("fc.0", ag.Bottleneck(2), name=f"a{i}")
        with monkeypatch.context() as patched:
            patched.setattr(adaptergraph.splicing.draft, "replace", counted)
            graph.splice("fc.0", ag.Bottleneck(2), name="last")
    assert calls[100] <= calls[10] + 12
