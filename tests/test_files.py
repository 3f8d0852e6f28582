"""Many writers in one folder, writers that die, and disks that say no: what is there is always one adapter, whole."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_storage import IDS, METHOD, base, graph, randomised

import adaptergraph as ag

NAMES = ["adapter.json", "adapter.safetensors"]


def filled(value):
    """A model whose trained values are all the same: two saves that are mixed would show."""
    model = graph().compile()
    with torch.no_grad():
        for p in ag.adapter_state(model).values():
            p.fill_(value)
    return model


def read(folder):
    """The one value that all tensors of the folder hold."""
    values = {float(v) for p in ag.adapter_state(ag.load(graph(), folder)).values() for v in p.unique()}
    assert len(values) == 1, "tensors of two saves are mixed"
    return values.pop()


def belong_together(folder):
    """The two files are of one save, as anybody can check who reads the checksum, and nothing else is there."""
    raw = (folder / "adapter.safetensors").read_bytes()
    said = json.loads((folder / "adapter.json").read_text())["checksum"]
    return said == "sha256:" + hashlib.sha256(raw).hexdigest() and sorted(os.listdir(folder)) == NAMES


# ---------------------------------------------------------------------- many writers

WRITER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import adaptergraph as ag
from test_files import filled
model = filled(float(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    ag.save(model, sys.argv[1])
"""


def test_two_processes_save_while_a_third_reads(tmp_path):
    folder = ag.save(filled(0.0), tmp_path / "adapter")
    script = WRITER.format(tests=str(Path(__file__).parent))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", script, str(folder), n], **pipes) for n in "12"]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = []
    while any(writer.poll() is None for writer in writers):
        seen.append(read(folder))
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert {1.0, 2.0} <= set(seen) <= {0.0, 1.0, 2.0}
    assert read(folder) in (1.0, 2.0)
    assert belong_together(folder)


def test_threads_save_into_one_folder_that_is_not_there_yet(tmp_path):
    models = [filled(float(n)) for n in range(4)]
    wrong = []

    def work(model):
        try:
            for _ in range(20):
                ag.save(model, tmp_path / "new" / "adapter")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert read(tmp_path / "new" / "adapter") in (0.0, 1.0, 2.0, 3.0)
    assert belong_together(tmp_path / "new" / "adapter")


def mixed(tmp_path, method=METHOD):
    """A folder as it is between the two replacements of a save: the text is of the new adapter, the tensors are not."""
    old, folder = ag.save(filled(1.0), tmp_path / "old"), tmp_path / "mixed"
    new = ag.save(graph(method=method).compile(), tmp_path / "new")
    shutil.copytree(old, folder)
    shutil.copy(new / "adapter.json", folder)
    return folder


@pytest.mark.parametrize("method", [METHOD, ag.Bottleneck(8)], ids=["of the same splices", "of other splices"])
def test_between_the_two_replacements_the_tensors_decide(tmp_path, method):
    folder = mixed(tmp_path, method)
    assert not belong_together(folder)
    assert read(folder) == 1.0
    assert ag.graph_of(ag.load(base(), folder)) == graph()
    ag.save(filled(2.0), folder)
    assert read(folder) == 2.0
    assert belong_together(folder)


def test_a_writer_that_comes_second_leaves_the_text_of_the_tensors_that_are_there(tmp_path, monkeypatch):
    """The order that two writers can come in: text A, text B, tensors B, tensors A."""
    folder = ag.save(filled(0.0), tmp_path / "adapter")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(Path(target).name)
        real(source, target)
        if len(calls) == 1:
            ag.save(filled(2.0), folder)

    monkeypatch.setattr(os, "replace", replace)
    ag.save(filled(1.0), folder)
    assert calls == ["adapter.json", *NAMES, "adapter.safetensors", "adapter.json"]
    assert read(folder) == 1.0
    assert belong_together(folder)


@pytest.mark.parametrize("where", ["size of the header", "text", "checksum", "tensors", "end"])
def test_damaged_tensors_are_refused_also_where_they_would_decide(tmp_path, where):
    folder = mixed(tmp_path)
    raw = bytearray((folder / "adapter.safetensors").read_bytes())
    at = {
        "size of the header": 3,
        "text": raw.index(b"gelu"),
        "checksum": raw.index(b"sha256:", raw.index(b'"checksum":')) + 8,
        "tensors": len(raw) - 9,
        "end": None,
    }[where]
    if at is None:
        del raw[-1]
    else:
        raw[at] ^= 1
    (folder / "adapter.safetensors").write_bytes(raw)
    with pytest.raises(ag.StateMismatch, match=r"is damaged, or not the file that belongs to adapter\.json"):
        ag.load(base(), folder)


# ---------------------------------------------------------------------- what dead writers leave


def test_drafts_are_not_read_and_the_dead_ones_are_removed(tmp_path):
    folder = ag.save(filled(1.0), tmp_path)
    dead, alive = (f".adapter.safetensors.{letter * 32}" for letter in "ab")
    others = [".adapter.json.mine", f"adapter.json.{'a' * 32}", f".other.json.{'a' * 32}"]
    for name in (dead, alive, *others):
        (folder / name).write_bytes(b"half")
        if name != alive:
            os.utime(folder / name, (time.time() - 7200,) * 2)
    assert read(folder) == 1.0
    ag.save(filled(2.0), folder)
    assert sorted(os.listdir(folder)) == sorted([*NAMES, alive, *others])
    assert read(folder) == 2.0


# ---------------------------------------------------------------------- disks that say no


@pytest.mark.parametrize("limit", [0, 300, 1500, 3000])
def test_a_full_disk_leaves_the_old_adapter(tmp_path, limit):
    folder = ag.save(filled(1.0), tmp_path / "adapter")
    assert min((folder / name).stat().st_size for name in NAMES) > 1500
    assert max((folder / name).stat().st_size for name in NAMES) > 3000
    before = {name: (folder / name).read_bytes() for name in NAMES}
    model = filled(2.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ag.GraphError) as caught:
            ag.save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"cannot write into {str(folder)!r}: File too large\n")
    assert caught.value.hint == "give a folder that can be made and written to, on a disk with space left"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert read(folder) == 1.0


def make(tmp_path, what):
    """A path that no adapter can be written to."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    for name in NAMES:
        (tmp_path / name.partition(".")[2] / name).mkdir(parents=True)
    return tmp_path / what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("file", "file' is a file, not a folder\n.*\n  to fix      ag.save writes into a folder"),
        ("file/below", "cannot write into '.*file/below': Not a directory\n.*\n  to fix      give a folder that can"),
        ("link", "link' is a link to what is not there, not a folder\n.*\n  to fix      ag.save writes into a folder"),
        ("n" * 300, "cannot write into '.*nnn': File name too long\n"),
        ("nul\0", r"cannot write into '.*nul\\x00': embedded null byte\n"),
        ("json", "adapter.json' is a folder, not a file\n.*\n  to fix      ag.save writes a file of this name: move"),
        ("safetensors", "adapter.safetensors' is a folder, not a file\n"),
    ],
)
def test_a_path_that_cannot_be_written(tmp_path, what, message):
    folder = make(tmp_path, what)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(ag.GraphError, match=message):
        ag.save(filled(1.0), folder)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert (tmp_path / "file").read_text() == "mine"


def fused():
    return ag.trace(base(), IDS).splice("layer.*.fc", ag.Fusion({"a": METHOD})).compile()


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: ag.load(base(), folder),
        lambda folder: ag.load_branch(fused(), folder, "a"),
        lambda folder: ag.apply(ag.trace(base(), IDS), folder / "adapter.json"),
    ],
    ids=["load", "load_branch", "apply"],
)
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("file", "Not a directory"),
        ("link", "No such file or directory"),
        ("n" * 300, "File name too long"),
        ("nul\0", "embedded null byte"),
        ("json", "Is a directory"),
    ],
)
def test_a_path_that_cannot_be_read(tmp_path, call, what, reason):
    with pytest.raises(ag.GraphError) as caught:
        call(make(tmp_path, what))
    assert str(caught.value).startswith("cannot read '")
    assert f"adapter.json': {reason}\n" in str(caught.value)
    assert caught.value.hint == "a folder of ag.save holds adapter.json and adapter.safetensors"


def test_tensors_that_are_a_folder_cannot_be_read(tmp_path):
    folder = ag.save(filled(1.0), tmp_path)
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").mkdir()
    with pytest.raises(ag.GraphError, match=r"cannot read '.*adapter.safetensors': Is a directory"):
        ag.load(base(), folder)


def test_a_checksum_that_is_right_does_not_make_tensors_of_anything(tmp_path):
    folder = ag.save(randomised(graph().compile()), tmp_path)
    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    text = json.loads((folder / "adapter.json").read_text())
    text["checksum"] = "sha256:" + hashlib.sha256(b"no tensors").hexdigest()
    (folder / "adapter.json").write_text(json.dumps(text))
    with pytest.raises(ag.StateMismatch, match=r"is damaged, or not the file that belongs to adapter\.json"):
        ag.load(base(), folder)


@pytest.mark.parametrize("text", ["[]", "{", "7"])
def test_a_whole_tensors_file_whose_text_describes_nothing_is_damaged(tmp_path, text):
    folder = ag.save(filled(1.0), tmp_path)
    state = safetensors.torch.load((folder / "adapter.safetensors").read_bytes())
    blank = "sha256:" + "0" * 64
    raw = safetensors.torch.save(state, {"adaptergraph": text, "checksum": blank})
    whole = raw.replace(blank.encode(), b"sha256:" + hashlib.sha256(raw).hexdigest().encode(), 1)
    (folder / "adapter.safetensors").write_bytes(whole)
    with pytest.raises(ag.StateMismatch, match=r"is damaged, or not the file that belongs to adapter\.json"):
        ag.load(base(), folder)
