"""Recurrent layers on `nn.LSTM` and `nn.GRU`, batch first. Floor 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphError, ShapeMismatch, check_flag, here
from ..node import Node, format_shape
from ..shapes import Value
from .calls import concatenate
from .combinators import parts_of, values_of
from .making import check_size, make, spelt
from .naming import _inside
from .table import Op, _last, add_rows

__all__ = ["bidirectional", "gru", "lstm", "mask"]


def first_where(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The steps that are seen before the others, in their order; and for each step how many were seen up to it."""
    order = torch.argsort(~seen, dim=1, stable=True)
    return x.take_along_dim(order.unsqueeze(-1), 1), seen.long().cumsum(1)


def last_seen(sequence: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """For each step the output of the last seen one; the starting state before the first."""
    padded = torch.cat([start.unsqueeze(1), sequence], 1)
    return padded.take_along_dim(count.unsqueeze(-1), 1)


class LSTM(nn.LSTM):
    """`nn.LSTM` for one layer: states are `batch × size`, and steps that a mask hides leave everything as it was."""

    def __init__(self, features: int, size: int, bias: bool, dtype: torch.dtype, states: bool, masked: bool) -> None:
        super().__init__(features, size, bias=bias, batch_first=True, dtype=dtype)
        self.states = states
        self.masked = masked

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        zero = x.new_zeros(x.shape[0], self.hidden_size)
        hidden, cell = rest[:2] if self.states else (zero, zero)
        if not self.masked:
            sequence, (h, c) = super().forward(x, (hidden[None], cell[None]))
            return sequence, h[0], c[0]
        seen = rest[-1].bool()
        steps, count = first_where(x, seen)
        # one more feature, true where a step is hidden, shuts the input gate and opens the forget gate: c stays
        hides = (torch.arange(x.shape[1], device=x.device) >= count[:, -1:]).to(x.dtype)
        size = self.hidden_size
        gates = x.new_zeros(4 * size, 1)
        gates[:size], gates[size : 2 * size] = -3e4, 3e4
        into, *others = self.all_weights[0]
        weights = [torch.cat([into, gates], 1), *others]
        steps = torch.cat([steps, hides.unsqueeze(-1)], -1)
        start = (hidden[None], cell[None])
        sequence, _, c = torch.lstm(steps, start, weights, bool(self.bias), 1, 0.0, self.training, False, True)
        out = last_seen(sequence, hidden, count)
        return out, out[:, -1], c[0]


class GRU(nn.GRU):
    """`nn.GRU` for one layer: the state is `batch × size`, and steps that a mask hides leave everything as it was."""

    def __init__(self, features: int, size: int, bias: bool, dtype: torch.dtype, states: bool, masked: bool) -> None:
        super().__init__(features, size, bias=bias, batch_first=True, dtype=dtype)
        self.states = states
        self.masked = masked

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = rest[0] if self.states else x.new_zeros(x.shape[0], self.hidden_size)
        if not self.masked:
            sequence, h = super().forward(x, hidden[None])
            return sequence, h[0]
        steps, count = first_where(x, rest[-1].bool())
        out = last_seen(super().forward(steps, hidden[None])[0], hidden, count)
        return out, out[:, -1]


def _lstm(x: Sequence[Value], size: int, bias: bool, states: bool, masked: bool) -> nn.Module:
    return LSTM(_features(x), size, bias, x[0].dtype, states, masked)


def _gru(x: Sequence[Value], size: int, bias: bool, states: bool, masked: bool) -> nn.Module:
    return GRU(_features(x), size, bias, x[0].dtype, states, masked)


def _features(x: Sequence[Value]) -> int:
    if len(x[0].shape) != 3:
        raise ValueError("it reads batch × steps × features")
    return _last(x)


def is_other(x: Tensor, value: int) -> Tensor:
    """True where x is anything but this value."""
    return x != value


def reverse(x: Tensor, dim: int) -> Tensor:
    """The other way round."""
    return x.flip(dim)


add_rows(
    Op("lstm", "long short-term memory", module=_lstm, floats=1),
    Op("gru", "gated recurrent unit", module=_gru, floats=1),
    Op("mask", "true where a token is", function=is_other),
    Op("reverse", "the other way round", function=reverse),
)


@spelt
def lstm(
    x: Node,
    size: int,
    *,
    state: tuple[Node, Node] | None = None,
    mask: Node | None = None,
    bias: bool = True,
    share: Node | None = None,
    name: str | None = None,
) -> tuple[Node, tuple[Node, Node]]:
    """A long short-term memory (`nn.LSTM`): `batch × steps × features` to `batch × steps × size`.

    Returns the sequence and the last state (hidden, cell), each `batch × size`. They are outputs of one node and called
    `name.sequence`, `name.hidden`, `name.cell`. Hochreiter and Schmidhuber 1997.

    Args:
        size: of the hidden state.
        state: the first (hidden, cell), each `batch × size`; None for zeros.
        mask: `batch × steps`, true where a step is seen; a hidden step leaves state and output as they were.
        share: the node of another lstm, `sequence` say, whose weights this one uses.

    Raises:
        GraphError: an option is no size, or `state` is no pair of nodes.
        ShapeMismatch: x has other dimensions, or state or mask do not fit it.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", "steps", 4))
    >>> sequence, (hidden, cell) = ag.lstm(x, 3, name="enc")
    >>> sequence, hidden
    (<enc.sequence: item batch × steps × 3>, <enc.hidden: item batch × 3>)
    >>> list(ag.Graph((sequence, hidden)))
    ['x', 'enc', 'enc.sequence', 'enc.hidden']
    """
    if state is not None and not (isinstance(state, tuple | list) and len(state) == 2):
        raise GraphError(f"the state of lstm is a pair (hidden, cell), not {state!r}", node=name, source=here())
    node = _recurrent("lstm", x, size, state or (), mask, bias, share, name)
    sequence, hidden, cell = parts_of(node, ("sequence", "hidden", "cell"), values_of(node))
    return sequence, (hidden, cell)


@spelt
def gru(
    x: Node,
    size: int,
    *,
    state: Node | None = None,
    mask: Node | None = None,
    bias: bool = True,
    share: Node | None = None,
    name: str | None = None,
) -> tuple[Node, Node]:
    """A gated recurrent unit (`nn.GRU`): `batch × steps × features` to `batch × steps × size`.

    Returns the sequence and the last hidden state, `batch × size`, called `name.sequence` and `name.hidden`. Options
    and errors as for `lstm`. Cho et al. 2014, https://arxiv.org/abs/1406.1078

    >>> import adaptergraph as ag
    >>> ag.gru(ag.input("x", shape=("batch", 5, 4)), 3)
    (<unnamed: item batch × 5 × 3>, <unnamed: item batch × 3>)
    """
    node = _recurrent("gru", x, size, () if state is None else (state,), mask, bias, share, name)
    sequence, hidden = parts_of(node, ("sequence", "hidden"), values_of(node))
    return sequence, hidden


def _recurrent(
    op: str, x: Node, size: int, state: Sequence[Node], mask: Node | None, bias: bool, share: Any, name: str | None
) -> Node:
    options = {"size": check_size(size, f"the size of {op}", name), "bias": check_flag(bias, "bias", name)}
    options |= {"states": bool(state), "masked": mask is not None}
    given = [x, *state, *([] if mask is None else [mask])]
    if all(isinstance(n, Node) for n in given) and len(x.shape or ()) == 3:
        want = [(x.shape, (*(x.shape or ())[:1], size))] * len(state) + [(None, (x.shape or ())[:2])]
        for node, (_, shape) in zip(given[1:], want if state else want[-1:], strict=False):
            if node.shape != shape:
                raise ShapeMismatch(
                    f"{node.name or node.op!r} does not fit the {op} that reads it",
                    node=name,
                    sides=[
                        ("reads", x.name or x.op, format_shape(x.shape)),
                        ("given", node.name or node.op, format_shape(node.shape)),
                        ("needed", node.name or node.op, format_shape(shape)),
                    ],
                    source=here(),
                    hint="a state is batch × size, a mask batch × seq",
                )
    if isinstance(share, Node) and share.op == "item":
        share = share.inputs[0] if share.graph is None else share.graph[share.inputs[0]]
    return make(op, given, name, options, share=share)


@spelt
def bidirectional(
    x: Node,
    fn: Callable[[Node], Any],
    merge: Callable[[Node, Node], Node] = lambda a, b: concatenate([a, b]),
    *,
    name: str = "bidirectional",
) -> Any:
    """A recurrent layer forwards and one backwards over the steps, with weights of their own, and their results merged.

    Args:
        x: `batch × steps × features`.
        fn: makes the layer: `lambda h: ag.lstm(h, 8)`. Called twice, in the namespaces `name.forwards` and
            `name.backwards`; returns a sequence, or what `lstm` and `gru` return.
        merge: of the two sequences (the second turned back) and of the states; side by side when left out.

    Returns:
        what `fn` returns, merged.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", "steps", 4))
    >>> sequence, (hidden, cell) = ag.bidirectional(x, lambda h: ag.lstm(h, 3))
    >>> sequence, hidden
    (<unnamed: concatenate batch × steps × 6>, <unnamed: concatenate batch × 6>)
    """
    if not callable(fn) or not callable(merge):
        raise GraphError("bidirectional takes a function that makes a layer, and one that merges", source=here())
    with _inside(f"{name}.forwards"):
        ahead = fn(x)
    with _inside(f"{name}.backwards"):
        behind = fn(make("reverse", [x], None, {"dim": 1}))

    def merged(a: Any, b: Any, steps: bool) -> Any:
        if isinstance(a, Node):
            return merge(a, make("reverse", [b], None, {"dim": 1}) if steps else b)
        return tuple(merged(i, j, steps and k == 0) for k, (i, j) in enumerate(zip(a, b, strict=True)))

    return merged(ahead, behind, True)


@spelt
def mask(ids: Node, value: int = 0, *, name: str | None = None) -> Node:
    """True where a token is, false where `value` pads: what `attention` and `lstm` take (Axon's is the opposite).

    >>> import adaptergraph as ag
    >>> ag.mask(ag.input("ids", shape=("batch", "steps"), dtype=torch.int64), 0)
    <unnamed: mask batch × steps>
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GraphError(f"mask takes the number that pads, not {value!r}", node=name, source=here())
    return make("mask", [ids], name, {"value": value})
