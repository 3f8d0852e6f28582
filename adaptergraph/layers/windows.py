"""Sizes of windows that slide over spatial dimensions: what `padding`, `kernel_size`, `stride` mean. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import GraphError, here
from ..node import Node

Sizes = int | tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]


def spatial(x: Any, op: str, name: str | None) -> int:
    """How many spatial dimensions a node has: `batch × channels × spatial…`.

    Raises:
        GraphError: it has none, or more than three.
    """
    rank = len(x.shape or ()) if isinstance(x, Node) else 3
    if not 3 <= rank <= 5:
        label = x.name or x.op
        shape = " × ".join("?" if d is None else str(d) for d in x.shape or ())
        raise GraphError(
            f"{op} reads batch × channels × one to three spatial sizes, and {label!r} is {shape or 'a scalar'}",
            node=name,
            sides=[("reads", label, shape)],
            source=here(),
            hint="channels come first, as everywhere in torch: ag.transpose or ag.reshape brings them there",
        )
    return rank - 2


def check_sizes(value: Any, dims: int, what: str, name: str | None, least: int = 1) -> Sizes:
    """A whole number, or one for each spatial dimension."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    good = all(isinstance(s, int) and not isinstance(s, bool) and s >= least for s in sizes)
    if not good or (isinstance(value, list | tuple) and len(sizes) != dims):
        raise GraphError(
            f"{what} is a whole number of at least {least}, or {dims} of them, not {value!r}",
            node=name,
            source=here(),
        )
    return sizes if isinstance(value, list | tuple) else value


def check_padding(value: Any, dims: int, name: str | None) -> Any:
    """`"valid"`, `"same"`, a number, a number for each spatial dimension, or a pair (before, after) for each.

    Raises:
        GraphError: it is something else.
    """
    if value in ("valid", "same") and isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and len(value) == dims and all(isinstance(v, list | tuple) for v in value):
        return tuple(check_sizes(list(pair), 2, "a pair of padding", name, 0) for pair in value)
    if isinstance(value, str) or value is None:
        raise GraphError(
            f"padding is 'valid', 'same', numbers or pairs of numbers, not {value!r}", node=name, source=here()
        )
    return check_sizes(value, dims, "padding", name, 0)


def each(value: Sizes, dims: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * dims


def pairs(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """Padding before and after each spatial dimension; `"same"` is k - 1 in total, an odd one at the end."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in totals)
    if isinstance(padding, int):
        return ((padding, padding),) * len(kernel)
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)


def even(around: Pairs) -> tuple[int, ...] | None:
    """The padding that torch's own layers take, when both sides are the same everywhere."""
    return tuple(a for a, _ in around) if all(a == b for a, b in around) else None


def pad(x: Tensor, around: Sequence[Sequence[int]], value: float = 0.0) -> Tensor:
    """Values around the last dimensions, one pair (before, after) for each."""
    if not any(before or after for before, after in around):
        return x
    return F.pad(x, [n for pair in reversed(around) for n in pair], value=value)
