"""Patterns, predicates and handles to names. Floor 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import GraphError, Source, UnknownNode, here, nearest, suggestion
from .names import path_of
from .node import Node

if TYPE_CHECKING:
    from .graph import Graph

Entry: TypeAlias = "str | Callable[[Node], bool] | Node | Selection | Span"
Selector: TypeAlias = "Entry | Sequence[Entry]"

_TOKEN = re.compile(r"\*\*|\*|\{([^{}\[\]]*)\}|\[([^{}\[\]]*)\]|[^*{}\[\]]+")
_RANGE = re.compile(r"(\d+)(?:\.\.|-)(\d+)")


@dataclass(frozen=True, slots=True)
class Span:
    """A site from the input of one host to the output of another; made by `ag.span`."""

    first: str
    last: str

    def __repr__(self) -> str:
        return f"ag.span({self.first!r}, {self.last!r})"


def span(first: str, last: str) -> Span:
    """A selector for a site that begins before one host and ends after another, as around a whole feed-forward.

    A body there reads the input of `first` and stands at the output of `last`: a parallel adapter around two layers.
    With patterns the hosts are paired in order, so both must select equally many.

    Raises:
        GraphError: it is not given two strings.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(ag.relu(ag.dense(x, 16, name="up")), 8, name="down")).freeze()
    >>> parallel = graph.splice(ag.span("up", "down"), ag.Bottleneck(2, parallel=True))
    >>> parallel["down.adapter.down"].inputs
    ('x',)
    """
    for value in (first, last):
        if not isinstance(value, str):
            raise GraphError(f"span takes the names or patterns of two hosts, not {value!r}", source=here())
    return Span(first, last)


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a selector: `*` in one segment, `**` any segments, `{a,b}`, `{0..11}`, `[0-5]`.

    >>> bool(pattern("encoder.layer.{0..3}.**.dense").fullmatch("encoder.layer.2.output.dense"))
    True
    """
    parts, end = [], 0
    for token in _TOKEN.finditer(text):
        if token.start() != end:
            break
        end = token.end()
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
    if end != len(text):
        raise GraphError(
            f"the selector {text!r} has a bracket that is not closed, or one inside another",
            source=here(),
            hint="write {a,b} for alternatives, {0..11} or [0-5] for a range of numbers",
        )
    body = "".join(parts)
    # `a.**.b` also matches `a.b`: `**` is any number of segments, none included
    body = body.replace(r"\.**\.", r"\.(?:[^/]*\.)?")
    body = re.sub(r"^\*\*\\\.", r"(?:[^/]*\\.)?", body)
    body = re.sub(r"\\\.\*\*(?=/|$)", r"(?:\\.[^/]*)?", body)
    return re.compile(body.replace("**", "[^/]*"))


def _alternatives(inside: str, text: str) -> str:
    return f"({'|'.join(map(_word, _words(inside, text)))})"


def _numbers(inside: str, text: str) -> str:
    return f"({'|'.join(_range(inside, text))})"


def _words(inside: str, text: str) -> list[str]:
    """The alternatives between braces, ranges written out."""
    words = [word.strip() for word in inside.split(",")]
    return [w for word in words for w in (_range(word, text) if _RANGE.fullmatch(word) else [word])]


def _word(word: str) -> str:
    return re.escape(word).replace(r"\*", "[^./]*")


def _range(inside: str, text: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if not numbers:
        raise GraphError(
            f"[{inside}] in the selector {text!r} is no range of numbers",
            source=here(),
            hint="write [0-5] for a range, {a,b} for alternatives; a dot before a number: layer.0",
        )
    first, last = int(numbers[1]), int(numbers[2])
    if last < first or last - first > 100_000:
        raise GraphError(
            f"the range {numbers[0]} in the selector {text!r} is empty or too long",
            source=here(),
            hint="the smaller number first: [0-11]",
        )
    return [str(n) for n in range(first, last + 1)]


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
        """Keeps the names whose output node has this op or shape (None matches any size), or for which fn is true.

        Raises:
            UnknownNode: none is left.
        """
        if shape is not None and not isinstance(shape, tuple):
            raise GraphError(f"a shape is a tuple of sizes, not {shape!r}", source=here())

        def keep(name: str) -> bool:
            if op is not None and self.graph.op_of(name) != op:
                return False
            if shape is None and fn is None:
                return True
            # a module that is never called has no output
            node = self.graph[name] if self.graph.calls_of(name) else None
            if node is None or (shape is not None and not _fits(shape, node.shape)):
                return False
            return fn is None or bool(fn(node))

        names = [n for n in self.names if keep(n)]
        if not names:
            ops = list(dict.fromkeys(map(self.graph.op_of, self.names)))
            raise UnknownNode(
                f"none of the {len(self.names)} selected nodes is left",
                sides=[("selected", _shown(self.names)), ("their ops", ", ".join(ops))],
                source=here(),
                hint=suggestion(op, ops) if op is not None and op not in ops else None,
            )
        return Selection(self.graph, names, here(), self.text)

    def expect(self, count: int) -> Selection:
        """The same selection, or an error when it has not exactly `count` names."""
        if len(self.names) != count:
            raise UnknownNode(
                f"{self.text} selects {len(self.names)} nodes, expected {count}",
                source=here(),
                sides=[("selected", _shown(self.names))],
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
        return f"<Selection of {len(self.names)}: {_shown(self.names)}>"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")


def _fits(wanted: tuple[Any, ...], shape: tuple[Any, ...] | None) -> bool:
    if shape is None or len(shape) != len(wanted):
        return False
    return all(want is None or want == have for want, have in zip(wanted, shape, strict=True))


def entries_of(at: Any) -> list[Any]:
    """The entries of a selector: one string, predicate, handle or selection is a list of one.

    Raises:
        GraphError: it is none of these.
        UnknownNode: the list is empty.
    """
    if isinstance(at, str | Node | Selection | Span) or callable(at):
        return [at]
    if not isinstance(at, Iterable):
        raise GraphError(f"a selector is a string, a predicate or a list of these, not {at!r}", source=here())
    entries = list(at)
    if not entries:
        raise UnknownNode("the list of selectors is empty: it selects no node", source=here())
    return entries


def select(graph: Graph, at: Any) -> Selection:
    """See `Graph.select`."""
    entries = entries_of(at)
    text = ", ".join(repr(e) if isinstance(e, str) else "predicate" if callable(e) else str(e) for e in entries)
    return in_graph_order(graph, (name for entry in entries for name in hits(graph, entry)), text)


def in_graph_order(graph: Graph, names: Iterable[str], text: str) -> Selection:
    """These names, each once, in topological order, inner containers first."""
    order = {name: i for i, name in enumerate(graph)}

    def rank(name: str) -> tuple[int, int]:
        values = graph.calls_of(name)
        return (order[values[0]] if values else len(order), -name.count("."))

    return Selection(graph, sorted(dict.fromkeys(names), key=rank), here(), text)


def hits(graph: Graph, entry: Any) -> list[str]:
    """The names that one entry of a selector means."""
    if isinstance(entry, Span):
        entry = entry.last
    if isinstance(entry, Node):
        entry = entry.name
    if isinstance(entry, Selection):
        for name in entry:
            graph.calls_of(name)
        return list(entry)
    if callable(entry):
        names = [n.name for n in graph.nodes() if n.name and n.op not in ("input", "output") and _asked(entry, n)]
        if not names:
            raise UnknownNode(
                "the predicate selects no node",
                source=here(),
                hint='it is asked once for each node: graph.select(lambda node: node.op == "linear")',
            )
        return names
    if not isinstance(entry, str):
        raise GraphError(f"a selector is a string, a predicate or a list of these, not {entry!r}", source=here())
    if not is_pattern(entry):
        # `blocks.1:attn` for `blocks.1:1:attn`, as in patterns; a number counts the outputs themselves
        called, colon, label = entry.partition(":")
        named = colon and not label.rpartition(":")[2].isdigit()
        longer = (
            [n for n in graph.selectable if n.startswith(called + ":") and n.endswith(":" + label)] if named else []
        )
        if not longer or entry in longer:
            graph.calls_of(entry)
            return [entry]
        return longer
    known: Sequence[str] = graph.selectable
    if graph.imported is not None:
        # an operation, a call or an output is meant only where the pattern says so
        for mark in (m for m in "/@:" if m not in entry):
            known = [n for n in known if mark not in n]
    return match(entry, known, near=graph.selectable)


def _asked(predicate: Callable[[Node], bool], node: Node) -> bool:
    try:
        return bool(predicate(node))
    except Exception as error:
        kind, why = type(predicate).__name__, str(error).partition("\n")[0]
        raise GraphError(
            f"the predicate fails at {node.name!r}: {type(error).__name__}: {why}",
            node=node.name,
            source=here(),
            hint="a predicate takes a node and says whether it is meant"
            + ("" if kind in ("function", "method") else f"; a {kind} is selected by its name"),
        ) from error


def match(text: str, names: Sequence[str], what: str = "node", near: Sequence[str] = ()) -> list[str]:
    """The names that a selector matches.

    Args:
        near: the names that may be meant where none matches; the same if it is empty.

    Raises:
        UnknownNode: it matches nothing, or one of its alternatives does; the nearest names are in the message.
    """
    if not is_pattern(text):
        if text not in names:
            raise no_match(text, names, what)
        return [text]
    found = [m for m in map(pattern(text).fullmatch, names) if m]
    if not found:
        raise no_match(text, near or names, what)
    _refuse_idle(text, found, names, what)
    return [m[0] for m in found]


def _refuse_idle(text: str, found: list[re.Match[str]], names: Sequence[str], what: str) -> None:
    """Each alternative between braces must match something, as each entry of a list must."""
    tokens = [t for t in _TOKEN.finditer(text) if t.group()[0] in "{["]
    for number, token in enumerate(tokens, 1):
        words = _words(token.group()[1:-1].replace("-", ".."), text) if token.group()[0] == "[" else None
        words = words or _words(token.group()[1:-1], text)
        used = {m[number] for m in found}
        idle = [w for w in words if w not in used and not any(re.fullmatch(_word(w), u) for u in used)]
        # what an earlier alternative took may fit a later one too
        idle = [
            w for w in idle if not any(map(pattern(text[: token.start()] + w + text[token.end() :]).fullmatch, names))
        ]
        if idle:
            known = sorted(used)
            close = nearest(idle[0], {s for name in names for s in re.split(r"[./@:]", name)} - used - {idle[0]})
            shown = ", ".join(idle[:5]) + (" …" if len(idle) > 5 else "")
            raise UnknownNode(
                f"{text!r} selects no {what} for {shown}",
                node=text,
                sides=[("it selects", ", ".join(known[:8]) + (" …" if len(known) > 8 else ""))],
                source=here(),
                hint=f"leave {'it' if len(idle) == 1 else 'them'} out"
                + (f", or did you mean {close[0]!r}?" if close and not idle[0].isdigit() else ""),
            )


def no_match(text: str, names: Sequence[str], what: str = "node") -> UnknownNode:
    """The error for a selector without a match, with the selector that was probably meant."""
    mended = re.sub(r"\*\*\.(?:\*\*\.)+", "**.", _mended(text, names) or "")
    found = _beside(text, names) or list(filter(None, [mended]))
    found = found or nearest(text.replace("*", ""), names, 3)
    sides = []
    for better in found:
        count = sum(1 for n in names if pattern(better).fullmatch(n))
        sides.append(("nearest", f"{better!r} selects {count}" if is_pattern(better) else repr(better)))
    verb = f"selects no {what}" if is_pattern(text) else f"is no {what} of this graph"
    return UnknownNode(
        f"{text!r} {verb}",
        node=text,
        sides=sides,
        source=here(),
        hint="use the nearest name" if sides else "print(graph.summary(fold=False)) lists every name",
    )


def one_name(name: object) -> str:
    """What is asked of a graph in brackets. Raises: UnknownNode, it is no name."""
    if not isinstance(name, str):
        raise UnknownNode(
            f"graph[…] takes the name of one node, not {name!r}",
            source=here(),
            hint="graph.select(…) takes patterns and lists of them; list(graph) gives every name",
        )
    return name


def unknown(graph: Graph, name: str) -> UnknownNode:
    """The error for a name that is none: the nearest ones, or which outputs of that module the model reads."""
    from .collect import alive

    if is_pattern(name):
        return _no_name(graph, name)
    path, called = path_of(name), name.partition(":")[0]
    if graph.imported is None or ":" not in name or "/" in name or graph.imported.values(called) is None:
        return no_match(name, graph.selectable)
    calls, read = graph.imported.modules[path].calls, alive(graph)
    labels = dict.fromkeys(label for call in calls for label, node, _ in call.parts if node in read)
    one = any(call.output and not call.parts for call in calls)
    return UnknownNode(
        f"the model reads no output {name.partition(':')[2]!r} of {path!r}",
        node=name,
        sides=[("gives", path, "one tensor")] if one else [("reads", f"{path}:{label}") for label in list(labels)[:6]],
        source=here(),
        hint=f"{path!r} is the name of that tensor"
        if one
        else f"mend the name; if {path!r} gives such a value, nothing reads it: a body there would change nothing",
    )


def _no_name(graph: Graph, text: str) -> UnknownNode:
    """The error for a pattern where one name is asked for."""
    try:
        found = select(graph, text).names
    except UnknownNode:
        found = ()
    return UnknownNode(
        f"{text!r} is a pattern, and here is a place for the name of one node",
        node=text,
        sides=[("it selects", _shown(found) or "nothing")],
        source=here(),
        hint=f"graph.select({text!r}) for all of them" + (f", {found[0]!r} for the first" if found else ""),
    )


def _beside(text: str, names: Sequence[str]) -> list[str]:
    """What there is where a selector asks for an operation, a call or an output that is not there.

    These follow the marks `/`, `@` and `:` in a name; an output may have further colons of its own.
    """
    for mark, tail in (("/", r"([^/@:]+)"), (":", r"([^/@]+)"), ("@", r"(\d+)")):
        head, cut, asked = text.partition(mark)
        if not cut:
            continue
        whole = re.compile(f"(?:{pattern(head).pattern}){re.escape(mark)}(?P<tail>{tail})")
        tails = list(dict.fromkeys(m["tail"] for m in map(whole.fullmatch, names) if m))
        close = nearest(asked, tails)
        if mark == "/" and not close and any(map(pattern(f"**/{asked}").fullmatch, names)):
            return [f"**/{asked}"]
        if tails:
            return [f"{head}{mark}{tail}" for tail in close or tails[:6]]
        # there are none: what was meant is the host itself
        if any(map(pattern(head).fullmatch, names)):
            return [head]
    return []


def _mended(text: str, names: Sequence[str]) -> str | None:
    """The selector with its unknown words replaced by the nearest known ones, and what was left out put in.

    The last word stays, if it is known. None if nothing would be selected.
    """
    vocabulary = {segment for name in names for segment in re.split(r"[./]", name)}
    folded = {word.lower(): word for word in vocabulary}
    # dots inside brackets separate nothing
    words = re.split(r"([./](?![^{\[]*[}\]]))", text)
    for i, word in enumerate(words):
        if word in ("", ".", "/") or is_pattern(word) or word in vocabulary:
            continue
        close = nearest(word, vocabulary) or [folded[w] for w in nearest(word.lower(), folded)]
        if not close and (word.isdigit() or i == len(words) - 1):
            return None
        words[i] = close[0] if close else "**"
    mended = "".join(words)
    if any(map(pattern(mended).fullmatch, names)):
        return mended
    # every word is known, only not in this place: allow any path between the words
    head, dot, last = mended.rpartition(".")
    operations = [f"{head}/{last}"] if dot else [f"/{mended}", f"**/{mended}"]
    for loose in (*operations, f"**{mended}" if mended.startswith(("/", ".")) else f"**.{mended}"):
        if not mended.startswith("**") and any(map(pattern(loose).fullmatch, names)):
            return loose
    words = re.split(r"\.(?![^{\[]*[}\]])", mended)
    last = f"**.{words[-1]}"
    return _widened(words, names) or (last if any(map(pattern(last).fullmatch, names)) else None)


def _widened(words: Sequence[str], names: Sequence[str]) -> str | None:
    """The selector with what was left out between two of its words, or before each of them."""
    # before `*` is as good as after it
    places = [i for i, word in enumerate(words) if word not in ("*", "**")]
    for gaps in (*([i] for i in reversed(places) if i), places):
        parts = [
            r"(?:[^/]*\.)?"
            if word == "**"
            else (rf"(?:(?P<gap{i}>[^/@:]+?)\.)??" if i in gaps else "") + rf"(?:{pattern(word).pattern})\."
            for i, word in enumerate(words)
        ]
        whole = re.compile("".join(parts).removesuffix(r"\."))
        found = [m.groupdict() for m in map(whole.fullmatch, names) if m]
        if found:
            between = [{m.get(f"gap{i}") for m in found} for i in range(len(words))]
            put = [middle.pop() if len(middle) == 1 else "**" for middle in between]
            return ".".join(part for pair in zip(put, words, strict=True) for part in pair if part)
    return None
