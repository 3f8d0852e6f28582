"""Names while a graph is being written: namespaces, and nodes that use the weights of another. Floor 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from ..errors import GraphError, ShapeMismatch, here
from ..names import check_name
from ..node import Node, format_shape

__all__ = ["block", "namespace"]

_SPACE: ContextVar[str] = ContextVar("space", default="")


def current_space() -> str:
    """The namespace that is open here, with a dot behind; empty for none."""
    return _SPACE.get()


def scoped(name: str) -> str:
    """A name as it is in the namespace that is open here."""
    return _SPACE.get() + name


def namespace(name: str, fn: Callable[[], Any] | None = None) -> Any:
    """Puts a prefix before the name of every node made inside; inputs keep theirs.

    Args:
        name: the prefix; dots are hierarchy, and namespaces nest.
        fn: called inside, and its result returned; without it, a context manager.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> with ag.namespace("encoder"):
    ...     h = ag.relu(ag.dense(x, 4, name="fc"))
    >>> list(ag.Graph(ag.namespace("head", lambda: ag.dense(h, 2))))
    ['x', 'encoder.fc', 'encoder.relu_0', 'head.dense_0']
    """
    check_name(name, here())
    if fn is None:
        return _inside(name)
    if not callable(fn):
        raise GraphError(f"namespace {name!r} takes a function that makes nodes, not {fn!r}", node=name, source=here())
    with _inside(name):
        return fn()


@contextmanager
def _inside(name: str) -> Iterator[None]:
    token = _SPACE.set(f"{_SPACE.get()}{name}.")
    try:
        yield
    finally:
        _SPACE.reset(token)


def shared(node: Node, share: Any) -> Node:
    """A node that uses the weights of another one of the same kind.

    Raises:
        GraphError: `share` is no node, of another op, or made with other options.
        ShapeMismatch: its weights do not fit.
    """
    source = node.source
    if not isinstance(share, Node):
        raise GraphError(f"share= takes a node, whose weights are used again, not {share!r}", source=source)
    label = share.name or share.op
    if node.name is not None:
        raise GraphError(
            f"{node.name!r} shares the weights of {label!r} and is named after it",
            node=node.name,
            source=source,
            hint="leave name= out",
        )
    if share.op != node.op:
        behind = [i for i in share.inputs if isinstance(i, Node) and i.op == node.op]
        hint = "share= the layer before its activation" if behind else f"share= a {node.op} node"
        raise GraphError(
            f"{node.op} cannot share the weights of {label!r}, which is {share.op}",
            node=share.name,
            source=source,
            hint=hint,
        )
    if dict(node.params) != dict(share.params):
        mine, theirs = _shapes(node), _shapes(share)
        raise ShapeMismatch(
            f"{node.op} cannot share the weights of {label!r}: they do not fit",
            node=share.name,
            sides=[(p, f"shared {theirs.get(p, '–')}", f"needed {mine.get(p, '–')}") for p in {**theirs, **mine}],
            source=source,
            hint="shared layers read the same last size and have the same own size",
        )
    other = _settings(share.options)
    wrong = [k for k, v in _settings(node.options).items() if repr(other.get(k)) != repr(v)]
    if wrong:
        raise GraphError(
            f"{node.op} shares the weights of {label!r}, but is made with another {wrong[0]}",
            node=share.name,
            sides=[("first", str(other.get(wrong[0]))), ("this", str(node.options[wrong[0]]))],
            source=source,
            hint="make both with the same options, or leave share= out",
        )
    return replace(node, options=share.options, shares=share.shares or share, name=None)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if not k.endswith("_init") and not callable(v)}


def _shapes(node: Node) -> dict[str, str]:
    return {name: format_shape(p.shape) for name, p in node.params.items()}


def block(fn: Callable[..., Any], *, name: str | None = None) -> Callable[..., Any]:
    """A callable that makes the nodes of `fn` with one set of weights, each time it is called.

    The first call names the nodes; those of further calls are `fc@1`, `fc@2`, …, and use the same parameters.

    Args:
        fn: takes nodes (and anything else), returns a node or a tuple of nodes.
        name: a namespace for them.

    Raises:
        GraphError: a further call of `fn` makes other layers than the first.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> tower = ag.block(lambda h: ag.relu(ag.dense(h, 8, name="fc")))
    >>> graph = ag.Graph(tower(tower(x)))
    >>> list(graph), list(graph.params)
    (['x', 'fc', 'relu_0', 'fc@1', 'relu_0@1'], ['fc.weight', 'fc.bias'])
    """
    if not callable(fn):
        raise GraphError(f"block takes a function that makes nodes, not {fn!r}", source=here())
    first: list[Node] = []

    def call(*args: Any, **options: Any) -> Any:
        given = [a for a in (*args, *options.values()) if isinstance(a, Node)]
        inside: AbstractContextManager[None] = _inside(name) if name is not None else _nothing()
        with inside:
            result = fn(*args, **options)
        roots = _roots(result, fn)
        order = _between(roots, given)
        if not first:
            first.extend(order)
            return result
        # what both calls reach was made outside of the block
        outside = {id(n) for n in first} & {id(n) for n in order}
        before, now = ([n for n in nodes if id(n) not in outside] for nodes in (first, order))
        again = _paired(before, now, fn)
        new = [again.get(id(root), root) for root in roots]
        return new[0] if isinstance(result, Node) else tuple(new)

    return call


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _roots(result: Any, fn: Any) -> list[Node]:
    roots = [result] if isinstance(result, Node) else list(result) if isinstance(result, tuple | list) else []
    if not roots or not all(isinstance(r, Node) for r in roots):
        raise GraphError(f"a block returns a node or a tuple of nodes, not {result!r}", source=here())
    return roots


def _between(roots: list[Node], given: list[Node]) -> list[Node]:
    """What a call made: from its arguments to its result, inputs first."""
    stop = {id(n) for n in given}
    order: dict[int, Node] = {}

    def known(node: Node) -> bool:
        return id(node) in order or id(node) in stop or node.graph is not None or node.op == "input"

    stack = list(reversed(roots))
    while stack:
        node = stack[-1]
        waiting = [] if known(node) else [i for i in node.inputs if not known(i)]
        if not waiting:
            stack.pop()
            if not known(node):
                order[id(node)] = node
        stack += reversed(waiting)
    return list(order.values())


def _paired(first: list[Node], order: list[Node], fn: Any) -> dict[int, Node]:
    """The nodes of a further call as further calls of the nodes of the first."""
    if [n.op for n in first] != [n.op for n in order]:
        raise GraphError(
            f"the block {getattr(fn, '__name__', fn)!r} makes other layers than at its first call",
            sides=[("first", " ".join(n.op for n in first)), ("now", " ".join(n.op for n in order))],
            source=here(),
            hint="make the same layers each time",
        )
    again: dict[int, Node] = {}
    for one, two in zip(first, order, strict=True):
        if not two.inputs:
            again[id(two)] = one
            continue
        inputs = tuple(again.get(id(i), i) for i in two.inputs)
        again[id(two)] = replace(shared(replace(two, name=None), one), inputs=inputs)
    return again
