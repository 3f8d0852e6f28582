"""Axon's tables: five of the seven models of its golden file crash `Axon.Display.as_table`. Here each has its table."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch

import adaptergraph as ag
from adaptergraph.view import number

GOLDEN = json.loads((Path(__file__).parent / "golden" / "axon.json").read_text())
TABLES = {case["name"]: case for case in GOLDEN["display"]}
# what Axon counts as parameters and torch keeps as buffers or not at all
NO_PARAMETERS = ("mean", "var", "key")


def x(size=6, name="input", dtype=torch.float32):
    return ag.input(name, shape=("batch", size), dtype=dtype)


def moduledoc_model():
    h = ag.dropout(ag.batch_norm(ag.relu(ag.dense(x(784), 128))), rate=0.8)
    return ag.Graph(ag.softmax(ag.dense(ag.tanh(ag.dense(h, 64)), 10)))


def dense_no_bias_only():
    return ag.Graph(ag.dense(ag.relu(ag.dense(x(), 4, bias=False)), 2, bias=False))


def adapter_build():
    return ag.Adapter.build(8, 4)


def adapter_wrap():
    return ag.Graph(ag.Adapter.wrap(ag.dense(x(), 8, name="pretrained_layer"), bottleneck_size=4))


def rewrite_splice_adapters():
    h = ag.relu(ag.dense(x(), 8, name="fc1"), name="act1")
    h = ag.relu(ag.dense(h, 8, name="fc2"), name="act2")
    graph = ag.Graph(ag.dense(h, 3, name="head"))

    def adapted(node):
        name = f"{node.name}_adapter"
        return lambda inputs, output: ag.Adapter.wrap(output, bottleneck_size=4, name=name)

    return graph.rewrite_nodes(lambda node: adapted(node) if node.op == "dense" and node.name != "head" else None)


def multi_input_container():
    a, b = x(name="a"), x(name="b")
    return ag.Graph((ag.add([a, b]), ag.concatenate([a, b])))


def embedding_gru():
    sequence, _ = ag.gru(ag.embedding(x(5, "ids", torch.int64), 7, 4), 3, name="g")
    return ag.Graph(sequence)


def axons_rows(text):
    """For each layer of Axon's (patched) table its output shapes and parameters: how many numbers."""
    rows, current = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 5 or cells[0] == "Layer":
            continue
        named = re.fullmatch(r"(\S+) \( (\w+) \)", cells[0])
        if named:
            current = rows.setdefault(named[1], {"op": named[2], "shape": cells[2], "params": {}})
        found = re.fullmatch(r"(\w+): f32((?:\[\d+\])+)", cells[4])
        if found:
            current["params"][found[1]] = prod(map(int, re.findall(r"\d+", found[2])))
    return rows


def our_rows(graph):
    """The lines of our table by name: op, shape, what stands under params."""
    lines = str(graph.summary(fold=False)).splitlines()
    cells = [re.split(r"\s{2,}", line.strip(" +")) for line in lines]
    return {c[0]: c[1:] for c in cells if len(c) > 3 and c[0] != "node"}


def test_which_tables_axon_cannot_draw():
    failing = [name for name, case in TABLES.items() if case["as_table"].startswith("ERROR")]
    assert failing == [n for n in TABLES if n not in ("dense_no_bias_only", "multi_input_container")]


@pytest.mark.parametrize("name", TABLES)
def test_each_has_a_table_here(name):
    graph = globals()[name]()
    axon, ours = axons_rows(TABLES[name]["as_table_patched"]), our_rows(graph)
    if name == "embedding_gru":
        # Axon draws a gru with its state; its biases are three vectors in one name, torch's kernels are stacked
        assert ours["embedding_0"][:3] == [
            "embedding 7 × 4",
            "batch×5×4",
            number(axon["embedding_0"]["params"]["kernel"]),
        ]
        assert ours["g"][-2] == number(3 * (4 * 3) + 3 * (3 * 3) + 2 * 3 * 3)
        assert "g.sequence" in ours
        return
    layers = {n: row for n, row in axon.items() if row["op"] != "container"}
    names = {n: re.sub(r"_(down|act|up|residual)$", r".\1", n) for n in layers}
    assert {names[n] for n in layers} | {"output", "output 0", "output 1"} >= set(ours) >= {names[n] for n in layers}
    total = 0
    for layer, row in layers.items():
        op, shape, params = ours[names[layer]][:3]
        assert op.split()[0] == row["op"], layer
        assert shape == re.sub(r"^f32\[1\]\[(\d+)\]$", r"batch×\1", row["shape"]), layer
        counted = sum(size for part, size in row["params"].items() if part not in NO_PARAMETERS)
        assert params == (number(counted) if counted else "–"), layer
        total += counted
    assert sum(p.size for p in graph.params.values()) == total
    # in the order in which they are computed, also after a rewrite
    assert [n for n in ours if n in graph] == list(graph)


def test_a_table_says_what_is_trained():
    """Axon's has no such column, and counts the key of dropout as a parameter."""
    graph = rewrite_splice_adapters().freeze()
    trained = {name: row[3] for name, row in our_rows(graph).items() if len(row) > 3}
    assert trained == {
        name: "trained" if "adapter" in name else "frozen"
        for name in our_rows(graph)
        if graph._nodes.get(name) and graph[name].params
    }
    assert "–" in our_rows(moduledoc_model())["dropout_0"]
