"""A view → a file or a notebook picture: by pygraphviz, else by `dot` on the PATH, else as text with a word of help."""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from pathlib import Path

from ..errors import GraphError, here
from ..view import View
from .dot import to_dot
from .mermaid import to_mermaid
from .table import Table

FORMATS = ("svg", "png", "pdf", "dot", "mmd")
_TEXT = {"dot": to_dot, "mmd": to_mermaid}
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")


class Picture:
    """A picture that a notebook shows; elsewhere it prints as a table."""

    def __init__(self, view: View) -> None:
        self.view = view

    def _repr_svg_(self) -> str | None:
        return svg_of(self.view)

    def __repr__(self) -> str:
        return str(Table(self.view))


def write(view: View, path: str | Path) -> Path:
    """Draws into a file, whole or not at all. Returns what was written: without Graphviz that is a `.dot` file.

    Raises:
        GraphError: the suffix is no format, or the folder does not exist.
    """
    if not isinstance(path, str | os.PathLike) or Path(path).is_dir():
        what = f"the folder {str(path)!r}" if isinstance(path, str | os.PathLike) else repr(path)
        raise GraphError(
            f"a picture is drawn into a file, not into {what}", source=here(), hint="graph.draw('model.svg')"
        )
    target = Path(path)
    form = target.suffix.lstrip(".").lower() or "svg"
    if form not in FORMATS:
        raise GraphError(
            f"{target.suffix!r} is no format of a picture: {target}",
            source=here(),
            hint="end the name in " + ", ".join(f".{name}" for name in FORMATS),
        )
    target = target if target.suffix else target.with_suffix(".svg")
    if not target.parent.is_dir():
        raise GraphError(
            f"the folder {str(target.parent)!r} does not exist: no picture can be written there",
            source=here(),
            hint=f"make it first: Path({str(target.parent)!r}).mkdir(parents=True)",
        )
    if form in _TEXT:
        return _put(target, _TEXT[form](view).encode())
    if form == "png" and not _has_fonts():
        warnings.warn("no font is installed: the text of a PNG will be empty boxes; .svg needs none", stacklevel=4)
    drawn = _drawn(to_dot(view), form)
    if drawn is not None:
        return _put(target, drawn)
    texts = [_put(target.with_suffix(f".{name}"), text(view).encode()) for name, text in _TEXT.items()]
    print(
        f"Graphviz not found: wrote {texts[0].name} and {texts[1].name}. "
        "To draw here: pip install 'adaptergraph[draw]' (no root needed)."
    )
    return texts[0]


def svg_of(view: View) -> str | None:
    """The picture as SVG text; None without Graphviz."""
    drawn = _drawn(to_dot(view), "svg")
    return drawn.decode() if drawn is not None else None


def _drawn(text: str, form: str) -> bytes | None:
    """What Graphviz makes of DOT text; None if there is no Graphviz."""
    try:
        import pygraphviz
    except ImportError:
        pass
    else:
        drawn: bytes = pygraphviz.AGraph(string=text).draw(prog="dot", format=form)
        return drawn
    import graphviz

    try:
        made: bytes = graphviz.Source(text).pipe(format=form)
    except graphviz.ExecutableNotFound:
        return None
    return made


def _put(target: Path, content: bytes) -> Path:
    """Writes a file whole or not at all."""
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return target


def _has_fonts() -> bool:
    """Whether text can be drawn into pixels here."""
    if sys.platform in ("darwin", "win32"):
        return True
    folders = [Path(folder).expanduser() for folder in _FONT_FOLDERS]
    return any(next(folder.rglob("*.[topTOP][tTfF][fFbB]"), None) for folder in folders if folder.is_dir())
