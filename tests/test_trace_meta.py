"""A model of seventy billion parameters on the meta device: a map, a plan, a table, a picture and a recipe of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import json, re, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import adaptergraph as ag

with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, vocab_size=128256,
    ))
ids = torch.ones(2, 128, dtype=torch.long)
graph = ag.trace(model, input_ids=ids, attention_mask=ids)
adapted = graph.splice("model.layers.*.mlp.down_proj", ag.Bottleneck(64))
adapted.draw(sys.argv[1])
plan = adapted.plan()
# not getrusage: a child that was made by vfork inherits the peak of its parent there
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
print(json.dumps({
    "graph": len(graph),
    "modules": len(graph.imported.modules),
    "params": sum(p.size for p in graph.params.values()),
    "trained": sum(p.size for n, p in adapted.params.items() if adapted.trained[n]),
    "plan": str(plan),
    "table": str(adapted.summary()),
    "recipe": adapted.recipe(),
    "meta": all(p.is_meta for p in model.parameters()),
    "gigabytes": int(peak[1]) / 2**20,
}, default=str))
"""


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script printed, in a process of its own so that its memory can be measured."""
    picture = tmp_path_factory.mktemp("meta") / "llama.svg"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(picture)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return {**json.loads(run.stdout.splitlines()[-1]), "picture": picture}


def test_seventy_billion_parameters_are_traced_without_memory(found):
    attention, ffn, norms = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28_672, 2 * 8192
    assert found["params"] == 80 * (attention + ffn + norms) + 2 * 128_256 * 8192 + 8192
    assert found["modules"] > 1000
    assert found["graph"] > 4000
    assert found["meta"]
    assert found["gigabytes"] < 1


def test_a_plan_a_table_a_picture_and_a_recipe_come_out_of_it(found):
    assert found["trained"] == 80 * (2 * 8192 * 64 + 64 + 8192)
    assert "frozen 70.6 B" in found["table"]
    assert "80 × adapter" in found["table"]
    assert f"{found['params'] + found['trained']:,}" in found["plan"]
    assert Path(found["picture"]).read_text().count("<svg") == 1
    assert "down_proj" in json.dumps(found["recipe"])
