"""The words for what can go wrong: one base class, five kinds, one layout for every message.

A message says what and which node, shows both sides aligned, then where the user wrote it, then what to do.
"""

from __future__ import annotations

import difflib
import linecache
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["BadSplice", "DuplicateName", "GraphError", "ShapeMismatch", "StateMismatch", "UnknownNode"]

_PACKAGE = __name__.partition(".")[0]


class Source(NamedTuple):
    """The line of the user's code that made a node or asked for a splice."""

    file: str
    line: int

    @property
    def text(self) -> str:
        """The text of that line, read only when somebody asks; empty when the file is gone."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 100 else self.text[:99] + "…"
        return f"{Path(self.file).name}:{self.line}    {text}".rstrip()


def here() -> Source | None:
    """The nearest calling line outside this package."""
    frame = sys._getframe(1)
    while frame is not None:
        package, file = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_filename
        # code without a file is made by some library, unless somebody types it
        typed = package == "__main__" or not file.startswith("<")
        if package not in (_PACKAGE, "accelerate", "contextlib", "pydantic", "torch") and typed:
            return Source(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def shortened(rows: Sequence[Sequence[str]], most: int = 12) -> list[Sequence[str]]:
    """The first rows of what differs, and how many more there are."""
    return [*rows[:most], *([(f"… and {len(rows) - most} more",)] if len(rows) > most else [])]


def quoted(names: Sequence[str], most: int = 2) -> str:
    """The first of these names, as they are written in a list.

    >>> quoted(["a", "b", "c"])
    "'a', 'b', …"
    """
    return ", ".join([*map(repr, names[:most]), *["…"] * (len(names) > most)])


class GraphError(Exception):
    """Something about a graph, a splice or a file that cannot be right.

    Args:
        message: what is wrong, with the name of the node.
        node: the name of the node, for tools.
        sides: rows of two or three columns that are printed aligned under the message.
        source: the user's line.
        hint: what to do about it.

    >>> raise GraphError("input 'x' is missing", node="x", hint="call model(x=...)")
    Traceback (most recent call last):
    adaptergraph.errors.GraphError: input 'x' is missing
      to fix      call model(x=...)
    """

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        sides: Iterable[Sequence[str]] = (),
        source: Source | None = None,
        hint: str | None = None,
    ) -> None:
        self.node = node
        self.source = source
        self.hint = hint
        lines = [message, *_aligned([tuple(row) for row in sides])]
        if source is not None:
            lines.append(f"  written at  {source}")
        if hint:
            lines.append("  to fix      " + hint.replace("\n", "\n              "))
        super().__init__("\n".join(lines))


class UnknownNode(GraphError):
    """A name or pattern that selects nothing."""


class DuplicateName(GraphError):
    """Two different nodes with one name."""


class ShapeMismatch(GraphError):
    """Shapes or dtypes that do not fit."""


class BadSplice(GraphError):
    """A change to a graph that cannot work where it is asked for."""


class StateMismatch(GraphError):
    """Tensors or files that do not belong to this model."""


def check_flag(value: Any, what: str, name: str | None = None) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise GraphError(f"{what} is True or False, not {value!r}", node=name, source=here())
    return value


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    # the last cell of a row may be as long as it likes
    columns = range(max(map(len, rows)))
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in columns]
    return ["    " + "   ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows]


def nearest(word: str, words: Iterable[str], count: int = 1) -> list[str]:
    """The words that are spelt most like `word`, best first.

    >>> nearest("reluu", ["relu", "gelu", "tanh"])
    ['relu']
    """
    return difflib.get_close_matches(word, list(dict.fromkeys(words)), n=count, cutoff=0.5)


def suggestion(word: str, words: Iterable[str]) -> str:
    """A `did you mean` for a misspelt word, or the list of what there is.

    >>> suggestion("Relu", ["elu", "relu"])
    "did you mean 'relu'?"
    """
    word, words = str(word), list(words)
    # without regard to case: `Relu` would be nearer to `elu` than to `relu`
    folded = {w.lower(): w for w in reversed(words)}
    close = nearest(word.lower(), reversed(folded))
    if close:
        return f"did you mean {folded[close[0]]!r}?"
    return "one of: " + ", ".join(map(str, words[:30])) + (" …" if len(words) > 30 else "")
