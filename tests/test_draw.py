"""Tables, DOT, Mermaid and pictures.

The texts are compared with `golden/draw/*`; `ADAPTERGRAPH_GOLDEN=write pytest tests/test_draw.py` writes them anew.
Never a picture: two Graphvizes draw the same text differently.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from models import CASES
from torch import nn

import adaptergraph as ag
from adaptergraph.draw import render
from adaptergraph.draw.dot import FROZEN, TRAINED

GOLDEN = Path(__file__).parent / "golden" / "draw"


def declared() -> ag.Graph:
    h = ag.input("x", shape=("batch", 16))
    for i in range(3):
        h = ag.gelu(ag.dense(h, 16, name=f"layer.{i}.fc"), name=f"layer.{i}.act")
    graph = ag.Graph(ag.dense(h, 2, name="head")).freeze().unfreeze("head")
    return graph.splice("layer.{1..2}.fc", ag.Bottleneck(4))


def tiny() -> ag.Graph:
    """A BERT of four layers, with bodies in the last two."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    ids = torch.ones(1, 6, dtype=torch.long)
    graph = ag.trace(BertForSequenceClassification(config), input_ids=ids, attention_mask=ids.clone())
    return graph.unfreeze("classifier").splice("bert.encoder.layer.{2..3}.**.output.dense", ag.Bottleneck(4))


@pytest.fixture(scope="module")
def bert() -> ag.Graph:
    return tiny()


def compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("ADAPTERGRAPH_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# ---------------------------------------------------------------------- golden texts


def test_declared_graph_as_text():
    graph = declared()
    compare("declared.txt", f"{graph.summary()}\n")
    compare("declared_nodes.txt", f"{graph.summary(fold=False)}\n")
    compare("declared.dot", graph.dot())
    compare("declared_open.dot", graph.dot(open=("layer.1.fc.adapter",)))
    compare("declared.mmd", graph.mermaid())


def test_traced_model_as_text(bert):
    compare("bert.txt", f"{bert.summary()}\n")
    compare("bert.dot", bert.dot())
    compare("bert_open.dot", bert.dot(open=("bert.encoder.layer.2",)))
    compare("bert.mmd", bert.mermaid())


def test_the_same_text_in_another_process():
    code = "import test_draw; print(test_draw.declared().dot(), test_draw.declared().mermaid())"
    here = Path(__file__).parent
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] != ""


# ---------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fold", [True, False])
def test_no_line_is_wider_than_a_hundred_columns(traced, name, fold):
    text = str(traced(name).graph.summary(fold=fold))
    assert max(map(len, text.splitlines())) <= 100


def test_long_names_are_shortened_in_the_middle():
    x = ag.input("x", shape=("batch", "a_very_long_dimension", 8))
    name = "a_long_name." * 12 + "fc"
    text = str(ag.Graph(ag.dense(x, 8, name=name)).summary())
    assert max(map(len, text.splitlines())) <= 100
    line = next(line for line in text.splitlines() if "dense" in line)
    assert re.search(r"a_long_name\.a_.*…\S*\.fc ", line)


def test_the_table_has_a_line_for_every_node(bert):
    lines = str(bert.summary(fold=False)).splitlines()
    assert sum(not line.startswith(" ╭") and "╰" not in line for line in lines) - 8 == len(bert) + 1


def test_the_table_reads_without_colours(bert):
    text = str(bert.summary())
    assert "\x1b" not in text
    assert repr(bert.summary()) == text
    assert re.search(r"^ │ \+ output\.dense\.adapter +32 → 4 → 32 +1×6×32 +292  trained$", text, re.M)
    assert re.search(r"^   ?  classifier +Linear 32 → 2 +1×2 +66  trained$", text, re.M)
    assert re.search(r"^ ╰ +each 8\.54 K frozen  \+ 584 new$", text, re.M)
    assert "graph.summary(fold=False) shows all" in text


def test_rich_prints_the_same_table_in_colour(bert):
    from rich.console import Console

    plain, colour = io.StringIO(), io.StringIO()
    Console(file=plain, width=100).print(bert.summary())
    Console(file=colour, width=100, force_terminal=True, color_system="truecolor").print(bert.summary())
    assert [line.rstrip() for line in plain.getvalue().splitlines()] == str(bert.summary()).splitlines()
    assert "\x1b[" in colour.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", colour.getvalue()) == plain.getvalue()


def test_a_graph_without_parameters_has_no_bar():
    text = str(ag.Graph(ag.relu(ag.input("x", shape=("batch", 8)))).summary())
    assert "█" not in text
    assert "nothing trained" in text


def test_rich_and_graphviz_are_imported_only_when_used():
    code = (
        "import sys, adaptergraph as ag\n"
        "g = ag.Graph(ag.dense(ag.input('x', shape=('b', 4)), 2))\n"
        "str(g.summary()), g.dot(), g.mermaid()\n"
        "print([m for m in ('rich', 'graphviz', 'pygraphviz') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# ---------------------------------------------------------------------- DOT and Mermaid


def node_lines(text: str) -> dict[str, str]:
    return dict(re.findall(r'^ *"((?:[^"\\]|\\.)+)" (\[.*tooltip=.*\])$', text, re.M))


def test_fill_says_trained_and_a_border_says_added(bert):
    nodes = node_lines(bert.dot())
    body = nodes["bert.encoder.layer.2.output.dense.adapter"]
    assert f'BGCOLOR="{TRAINED}"' in body
    assert 'BORDER="3"' in body
    assert "<B>+ adapter</B>" in body
    assert f'BGCOLOR="{TRAINED}"' in nodes["classifier"]
    assert 'BORDER="1"' in nodes["classifier"]
    assert f'BGCOLOR="{FROZEN}"' in nodes["bert.embeddings"]
    frozen = node_lines(bert.freeze("**", bodies=True).dot())["bert.encoder.layer.2.output.dense.adapter"]
    assert f'BGCOLOR="{FROZEN}"' in frozen
    assert 'BORDER="3"' in frozen


def test_nothing_else_is_orange(bert):
    frozen = bert.unsplice().freeze()
    assert TRAINED not in frozen.dot()


def test_an_opened_body_is_an_hourglass(bert):
    nodes = node_lines(bert.dot(open=("bert.encoder.layer.2",)))
    name = "bert.encoder.layer.2.output.dense.adapter"
    assert nodes[f"{name}.down"].startswith("[shape=invtrapezium")
    assert nodes[f"{name}.up"].startswith("[shape=trapezium")
    assert nodes[f"{name}.residual"].startswith("[shape=circle")


def test_every_node_says_its_name_op_and_shape(bert):
    nodes = node_lines(bert.dot())
    assert 'tooltip="bert.pooler\\nBertPooler\\n1 × 32"' in nodes["bert.pooler"]
    assert len(nodes) >= 15


def test_the_bar_is_true_to_scale_but_never_thinner_than_six_pixels():
    x = ag.input("x", shape=("batch", 100))
    graph = ag.Graph(ag.dense(ag.dense(x, 1000, name="a"), 1, name="b")).freeze().unfreeze("b.bias")
    widths = re.findall(r'WIDTH="(\d+)" FIXEDSIZE="TRUE" BGCOLOR="(#\w+)"', graph.dot())
    assert widths == [("614", "#B4C0CC"), ("6", TRAINED)]


def test_what_is_partly_trained_stays_grey_and_says_how_much():
    graph = ag.Graph(ag.dense(ag.input("x", shape=("batch", 8)), 8, name="fc")).freeze("fc.weight")
    fc = node_lines(graph.dot())["fc"]
    assert f'BGCOLOR="{FROZEN}"' in fc
    assert "8 trained" in fc
    assert "class n1 partly" in graph.mermaid()
    assert "8 trained" in str(graph.summary())


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def test_words_of_the_model_cannot_break_the_text(tmp_path):
    x = ag.input("x", shape=('"]; a -> b [<b>&\\', 4))
    evil = type('A<b>&"\n}\\ --> [x]', (Odd,), {})
    for graph in (ag.Graph(ag.dense(x, 2)), ag.trace(evil(), torch.ones(1, 4))):
        ElementTree.parse(graph.draw(tmp_path / "evil.svg"))
        assert max(map(len, str(graph.summary()).splitlines())) <= 100
        front, title, _, *lines = graph.mermaid().splitlines()
        assert front == "---"
        assert json.loads(title.removeprefix("title: "))
        for line in lines:
            assert "<b>" not in line
            assert line.count('"') % 2 == 0
        assert "<b>" not in re.sub(r'"(?:[^"\\]|\\.)*"', "", graph.dot())


def test_marked_boxes_have_a_dark_border(bert):
    text = bert.draw(mark=bert.select("**.query")).view
    marked = [box.name for box in text.boxes() if box.marked]
    assert marked == ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.2.attention.self.query"]


def test_residuals_have_room_below_the_words_of_any_frame(bert, tmp_path):
    plain = bert.unsplice()
    plain.select("bert.encoder.layer.1.**.dense").draw(tmp_path / "block.dot")
    for text in (plain.dot(), (tmp_path / "block.dot").read_text()):
        captions = [line for line in text.splitlines() if "labelloc=t, labeljust=l, label=<<TABLE" in line]
        assert captions
        assert all('<TD HEIGHT="20"></TD>' in line for line in captions)
    # where the picture goes down, they are drawn at the side
    assert 'HEIGHT="20"' not in bert.dot(open=("bert.encoder.layer.1",))


def test_a_body_that_is_no_chain_says_its_method(bert):
    graph = bert.unsplice().splice(
        "bert.encoder.layer.3.output.dense", ag.Switch({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)})
    )
    graph = graph.splice("bert.pooler.dense", lambda site: site.output + ag.tanh(ag.dense(site.output, 32)), name="own")
    assert "+ adapter<br/>Switch · 9 nodes<br/>" in graph.mermaid()
    assert re.search(r"output\.dense\.adapter +Switch · 9 nodes", str(graph.summary()))
    assert "+ own<br/>" in graph.mermaid()


def test_a_selection_draws_itself(bert, tmp_path):
    path = bert.select("**.pooler").draw(tmp_path / "selection.dot")
    assert 'BORDER="4" COLOR="#1F2933"' in node_lines(path.read_text())["bert.pooler"]
    assert "1 marked" in path.read_text()


def test_mermaid_has_a_class_for_each_box_and_orange_links(bert):
    text = bert.mermaid()
    boxes = re.findall(r"^ +(n\d+)[\[(]", text, re.M)
    classed = re.findall(r"n\d+", " ".join(re.findall(r"^  class (\S+) (?!added|marked)", text, re.M)))
    assert sorted(boxes) == sorted(classed)
    assert text.count("subgraph") == text.count("\n  end") == 1
    links = re.findall(r"^  n\d+ -.*> .*n\d+$|^  n\d+ -\.-> n\d+$", text, re.M)
    orange = re.search(r"linkStyle ([\d,]+) stroke:#FF8A1F", text)
    assert orange is not None
    assert all(int(i) < len(links) for i in orange[1].split(","))


def test_the_page_about_pictures_shows_what_is_printed():
    page = (Path(__file__).parent.parent / "docs" / "pictures.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"```(\w+)\n(.*?)\n```", page, re.DOTALL))
    names: dict[str, ag.Graph] = {}
    exec(found["python"].replace("print(graph.summary())", ""), {}, names)
    assert found["text"] == str(names["graph"].summary())
    assert found["mermaid"] + "\n" == names["graph"].mermaid()


# ---------------------------------------------------------------------- files


def test_pygraphviz_draws_a_picture_with_the_right_words(bert, tmp_path):
    pytest.importorskip("pygraphviz")
    path = bert.draw(tmp_path / "bert.svg")
    assert path == tmp_path / "bert.svg"
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    words = " ".join(root.itertext()).replace("\xa0", " ")
    for expected in ("BertForSequenceClassification", "+ 4 × adapter", "× 2", "bert.encoder.layer.2 … 3", "+ adapter"):
        assert expected in words


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.dot", b"digraph")])
def test_the_suffix_says_the_format(tmp_path, name, start):
    assert declared().draw(tmp_path / name).read_bytes().startswith(start)


def test_mermaid_files_and_the_default_suffix(tmp_path):
    assert declared().draw(str(tmp_path / "a.mmd")).read_text().startswith("---\ntitle: ")
    assert declared().draw(tmp_path / "a") == tmp_path / "a.svg"


def test_another_format_is_refused(tmp_path):
    with pytest.raises(ag.GraphError, match=r"'.gif' is no format of a picture: .*a\.gif") as error:
        declared().draw(tmp_path / "a.gif")
    assert "end the name in .svg, .png, .pdf, .dot, .mmd" in str(error.value)
    assert error.value.source.file == __file__


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ag.GraphError, match=r"the folder '.*nowhere' does not exist"):
        declared().draw(tmp_path / "nowhere" / "a.svg")


def test_an_unknown_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ag.UnknownNode, match=r"nearest +'head'"):
        declared().draw(tmp_path / "a.svg", open=("haed",))
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = declared().draw(tmp_path / "a.dot")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(render.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ag.Graph(ag.input("y", shape=("batch", 1))).draw(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def without(monkeypatch, *names: str) -> None:
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name in names:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_graphviz_the_texts_are_written(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "pygraphviz")
    monkeypatch.setenv("PATH", str(tmp_path))
    graph = declared()
    path = graph.draw(tmp_path / "a.svg")
    assert path == tmp_path / "a.dot"
    assert capsys.readouterr().out == (
        "Graphviz not found: wrote a.dot and a.mmd. To draw here: pip install 'adaptergraph[draw]' (no root needed).\n"
    )
    assert path.read_text() == graph.dot()
    assert (tmp_path / "a.mmd").read_text() == graph.mermaid()
    assert graph._repr_svg_() is None
    assert graph.draw()._repr_svg_() is None


def test_dot_on_the_path_draws_too(tmp_path, monkeypatch):
    """A `dot` that answers with what it was given."""
    without(monkeypatch, "pygraphviz")
    fake = tmp_path / "dot"
    fake.write_text('#!/bin/sh\necho "<!-- $@ -->"\ncat\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    text = declared().draw(tmp_path / "a.svg").read_text()
    assert text.startswith("<!-- -Kdot -Tsvg -->\ndigraph adaptergraph {")


def test_a_png_without_fonts_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "_FONT_FOLDERS", (str(tmp_path),))
    monkeypatch.setattr(render.sys, "platform", "linux")
    with pytest.warns(UserWarning, match="no font is installed"):
        declared().draw(tmp_path / "a.png")
    (tmp_path / "sans").mkdir()
    (tmp_path / "sans" / "a.ttf").touch()
    assert render._has_fonts()


def test_a_notebook_shows_the_picture_and_a_terminal_the_table():
    pytest.importorskip("pygraphviz")
    picture = declared().draw()
    assert "<svg" in picture._repr_svg_()
    assert repr(picture) == str(declared().summary())
    assert "<svg" in declared()._repr_svg_()
