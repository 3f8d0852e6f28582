"""Patterns to names. Floor 1: knows strings only, not what the names stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import GraphError, Source, UnknownNode, here, nearest

if TYPE_CHECKING:
    from .graph import Graph
    from .node import Node

Selector: TypeAlias = "str | Callable[[Node], bool] | Selection | Sequence[str | Callable[[Node], bool] | Selection]"

_TOKEN = re.compile(r"\*\*|\*|\{([^{}]*)\}|\[([^\]]*)\]|[^*{}\[\]]+")
_RANGE = re.compile(r"(\d+)(?:\.\.|-)(\d+)")


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a selector: `*` in one segment, `**` any segments, `{a,b}`, `{0..11}`, `[0-5]`.

    >>> bool(pattern("encoder.layer.{0..3}.**.dense").fullmatch("encoder.layer.2.output.dense"))
    True
    """
    if text.count("{") != text.count("}") or text.count("[") != text.count("]"):
        raise GraphError(f"the selector {text!r} has a bracket that is not closed", source=here())
    parts = []
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word == "**":
            parts.append("**")
        elif word == "*":
            parts.append(r"[^./]*")
        elif word[0] == "{":
            parts.append(_alternatives(token.group(1), text))
        elif word[0] == "[":
            parts.append(_numbers(token.group(2), text))
        else:
            parts.append(re.escape(word))
    body = "".join(parts)
    # `a.**.b` also matches `a.b`: `**` is any number of segments, none included
    body = body.replace(r"\.**\.", r"\.(?:[^/]*\.)?")
    body = re.sub(r"^\*\*\\\.", r"(?:[^/]*\\.)?", body)
    body = re.sub(r"\\\.\*\*$", r"(?:\\.[^/]*)?", body)
    return re.compile(body.replace("**", "[^/]*"))


def _alternatives(inside: str, text: str) -> str:
    words = []
    for word in inside.split(","):
        numbers = _RANGE.fullmatch(word.strip())
        words.append(_range(numbers, text) if numbers else re.escape(word.strip()).replace(r"\*", "[^./]*"))
    return f"(?:{'|'.join(words)})"


def _numbers(inside: str, text: str) -> str:
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        raise GraphError(
            f"[{inside}] in the selector {text!r} is no range of numbers",
            source=here(),
            hint="write [0-5] for a range, {a,b} for alternatives",
        )
    return _range(numbers, text)


def _range(numbers: re.Match[str], text: str) -> str:
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first > 100_000:
        raise GraphError(f"the range {numbers[0]} in the selector {text!r} is empty or too long", source=here())
    return f"(?:{'|'.join(map(str, range(first, last + 1)))})"


def is_pattern(text: str) -> bool:
    """Whether a selector can stand for several names."""
    return any(c in text for c in "*{[")


class Selection(Sequence[str]):
    """Names of a graph in topological order, the result of `graph.select`.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(ag.dense(x, 8, name="a.fc"), 8, name="b.fc"))
    >>> graph.select("*.fc").expect(2)
    <Selection of 2: a.fc, b.fc>
    """

    def __init__(self, graph: Graph, names: Iterable[str], source: Source | None, text: str) -> None:
        self.graph = graph
        self.names = tuple(names)
        self.source = source
        self.text = text

    def where(
        self,
        fn: Callable[[Node], bool] | None = None,
        *,
        op: str | None = None,
        shape: tuple[Any, ...] | None = None,
    ) -> Selection:
        """Keeps the names whose output node has this op or shape (None matches any size), or for which fn is true."""

        def keep(name: str) -> bool:
            node = self.graph.output_of(name)
            if op is not None and self.graph.op_of(name) != op:
                return False
            if shape is not None:
                mine = node.shape
                if mine is None or len(mine) != len(shape):
                    return False
                if any(want is not None and want != have for want, have in zip(shape, mine, strict=True)):
                    return False
            return fn is None or bool(fn(node))

        return Selection(self.graph, [n for n in self.names if keep(n)], here(), self.text)

    def expect(self, count: int) -> Selection:
        """The same selection, or an error when it has not exactly `count` names."""
        if len(self.names) != count:
            shown = ", ".join(self.names[:6]) + (" …" if len(self.names) > 6 else "")
            raise UnknownNode(
                f"{self.text} selects {len(self.names)} nodes, expected {count}",
                source=here(),
                sides=[("selected", shown or "nothing")],
                hint="narrow or widen the pattern, or expect another number",
            )
        return self

    def draw(self, path: Any = None) -> Any:
        """Draws the graph with the selected nodes marked."""
        return self.graph.draw(path, mark=self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:6]) + (" …" if len(self.names) > 6 else "")
        return f"<Selection of {len(self.names)}: {shown}>"


def match(texts: Iterable[str], names: Sequence[str], what: str = "node") -> dict[str, list[str]]:
    """For each selector the names it matches; a selector without a match is an error with the nearest names."""
    known = set(names)
    found = {}
    for text in texts:
        if is_pattern(text):
            expression = pattern(text)
            hits = [name for name in names if expression.fullmatch(name)]
        else:
            hits = [text] if text in known else []
        if not hits:
            raise no_match(text, names, what)
        found[text] = hits
    return found


def no_match(text: str, names: Sequence[str], what: str = "node") -> UnknownNode:
    """The error for a selector without a match, with the selector that was probably meant."""
    sides = []
    better = _mended(text, names)
    if better:
        hits = sum(1 for n in names if pattern(better).fullmatch(n))
        sides.append(("nearest", f"{better!r} selects {hits}" if is_pattern(better) else repr(better)))
    else:
        sides += [("nearest", repr(name)) for name in nearest(text.replace("*", ""), names, 3)]
    verb = f"selects no {what}" if is_pattern(text) else f"is no {what} of this graph"
    return UnknownNode(
        f"{text!r} {verb}",
        node=text,
        sides=sides,
        source=here(),
        hint="use the nearest name" if sides else "print(graph.summary(fold=False)) lists every name",
    )


def _mended(text: str, names: Sequence[str]) -> str | None:
    """The selector with its unknown words replaced by the nearest known ones, if that selects something."""
    vocabulary = {segment for name in names for segment in re.split(r"[./]", name)}
    words = re.split(r"([./])", text)
    changed = False
    for i, word in enumerate(words):
        if word in ("", ".", "/") or is_pattern(word) or word in vocabulary:
            continue
        close = nearest(word, vocabulary)
        if not close:
            return None
        words[i] = close[0]
        changed = True
    mended = "".join(words)
    if changed and any(pattern(mended).fullmatch(n) for n in names):
        return mended
    # every word is known, only not in this place: allow any path between the words
    loose = "**." + text if not text.startswith("**") else None
    if loose and any(pattern(loose).fullmatch(n) for n in names):
        return loose
    return None
