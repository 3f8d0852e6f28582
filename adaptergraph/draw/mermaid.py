"""View → a Mermaid flowchart, which GitHub and most notebooks draw."""

from __future__ import annotations

import json

from ..view import Box, Frame, Link, View, holds, legend, number, plain, shape_text

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
    >>> print(ag.Graph(ag.dense(x, 4, name="fc")).mermaid())
    ---
    title: "declared graph · frozen 0 · trained 36 (100.0 %)"
    ---
    flowchart LR
    ...
      n0[/"x<br/>batch × 8"/]
      n1["fc<br/>8 → 4<br/>36"]
      n2[/"output<br/>batch × 4"/]
      n0 --> n1
      n1 --> n2
    ...
    """
    ids = {box.name: f"n{i}" for i, box in enumerate(view.boxes())}
    frozen, new = legend(view.totals)
    title = plain(f"{' + '.join([view.title, *view.added])} · {frozen} · {new}")
    # the title is a string of YAML, which reads JSON's quotes
    lines = ["---", f"title: {json.dumps(title, ensure_ascii=False)}", "---"]
    lines += [f"flowchart {'TB' if view.tall else 'LR'}", _CLASSES]
    depth = 1
    for i, (kind, item) in enumerate(view.rows):
        pad = "  " * depth
        if isinstance(item, Box):
            lines.append(f"{pad}{ids[item.name]}{_shape(item)}")
        elif kind == "start":
            lines += [f'{pad}subgraph f{i}["{_frame(item)}"]', f"{pad}  direction {'TB' if view.tall else 'LR'}"]
            depth += 1
        else:
            depth -= 1
            lines.append("  " * depth + "end")
    lines += [f"  {ids[link.source]} {_arrow(link)} {ids[link.target]}" for link in view.links]
    lines += _classes(view, ids)
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


def _classes(view: View, ids: dict[str, str]) -> list[str]:
    """One line for each class, with the boxes that have it."""
    members: dict[str, list[str]] = {}
    for box in view.boxes():
        members.setdefault(_class(box), []).append(ids[box.name])
    members["added"] = [ids[box.name] for box in view.boxes() if box.added]
    members["marked"] = [ids[box.name] for box in view.boxes() if box.marked]
    return [f"  class {','.join(names)} {kind}" for kind, names in members.items() if names]


def _class(box: Box) -> str:
    if not box.sums.trained:
        return "frozen" if box.sums.total else "plain"
    return "partly" if box.sums.frozen else "trained"


def _frame(frame: Frame) -> str:
    many = f"× {frame.count}" if frame.kind == "run" else ""
    title = ("+ " if frame.added else "") + frame.title
    return _escaped(" · ".join(word for word in (many, title, *holds(frame.sums, frame.count)) if word))


def _arrow(link: Link) -> str:
    line = "-->" if link.kind == "plain" else "-.->"
    return f'{line}|"{_escaped(link.label)}"|' if link.label else line


def _escaped(text: str) -> str:
    """Text in quotes: nothing in it can end the quotes or be taken for HTML."""
    safe = plain(text)
    for char, entity in (("#", "#35;"), ("&", "#38;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        safe = safe.replace(char, entity)
    return safe
