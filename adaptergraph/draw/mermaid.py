"""View → a Mermaid flowchart, which GitHub and most notebooks draw."""

from __future__ import annotations

from ..view import Box, Frame, Link, View, legend, number, per_member, shape_text

_CLASSES = """\
  classDef frozen fill:#E8EDF2,stroke:#B4C0CC,color:#475462
  classDef trained fill:#FF8A1F,stroke:#B24F00,color:#241000
  classDef partly fill:#E8EDF2,stroke:#B24F00,color:#B24F00
  classDef added stroke-width:4px
  classDef marked stroke:#1F2933,stroke-width:4px
  classDef plain fill:#FFFFFF,stroke:#B4C0CC,color:#475462"""


def to_mermaid(view: View) -> str:
    """The text of a flowchart.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> print(ag.Graph(ag.dense(x, 4, name="fc")).mermaid().splitlines()[0])
    flowchart LR
    """
    ids = {box.name: f"n{i}" for i, box in enumerate(view.boxes())}
    frozen, new = legend(view.totals)
    lines = [f"flowchart {'TB' if view.tall else 'LR'}", _CLASSES]
    title = _escaped(" + ".join([view.title, *view.added]))
    lines.append(f"  %% {title} · {_escaped(frozen)} · {_escaped(new)}")
    depth = 1
    for i, (kind, item) in enumerate(view.rows):
        pad = "  " * depth
        if isinstance(item, Box):
            lines.append(f"{pad}{ids[item.name]}{_shape(item)}:::{_class(item)}")
        elif kind == "start":
            lines += [f'{pad}subgraph f{i}["{_frame(item)}"]', f"{pad}  direction {'TB' if view.tall else 'LR'}"]
            depth += 1
        else:
            depth -= 1
            lines.append("  " * depth + "end")
    lines += [f"  {ids[link.source]} {_arrow(link)} {ids[link.target]}" for link in view.links]
    rewired = [str(i) for i, link in enumerate(view.links) if link.rewired]
    if rewired:
        lines.append(f"  linkStyle {','.join(rewired)} stroke:#FF8A1F,stroke-width:3px")
    return "\n".join(lines) + "\n"


def _shape(box: Box) -> str:
    words = [("+ " if box.added else "") + box.title]
    if box.count > 1:
        words.append(f"× {box.count}")
    if box.kind in ("input", "output"):
        words.append(shape_text(box.shape))
    elif box.detail and box.detail != box.title:
        words.append(box.detail)
    if box.sums.total:
        words.append(number(box.sums.total))
    if box.note:
        words.append(box.note)
    text = "<br/>".join(_escaped(word) for word in words if word)
    if box.kind in ("input", "output"):
        return f'[/"{text}"/]'
    if box.kind == "join" and len(box.title) == 1:
        return f'(("{text}"))'
    return f'["{text}"]'


def _class(box: Box) -> str:
    if not box.sums.total:
        kind = "plain"
    elif not box.sums.trained:
        kind = "frozen"
    else:
        kind = "partly" if box.sums.frozen else "trained"
    return kind + (",added" if box.added else "") + (",marked" if box.marked else "")


def _frame(frame: Frame) -> str:
    if frame.kind == "run":
        words = [f"× {frame.count}", frame.title, *(part for part in per_member(frame.sums) if part)]
    else:
        words = [("+ " if frame.added else "") + frame.title, *(legend(frame.sums) if frame.sums.total else ())]
    return _escaped(" · ".join(words))


def _arrow(link: Link) -> str:
    line = "-->" if link.kind == "plain" else "-.->"
    return f'{line}|"{_escaped(link.label)}"|' if link.label else line


def _escaped(text: str) -> str:
    """Text in quotes: nothing in it can end the quotes or be taken for HTML."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    for char, entity in (("#", "#35;"), ("&", "#38;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        plain = plain.replace(char, entity)
    return plain
