"""The arithmetic of layers that are no single torch call; generated code calls these by name. Floor 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeMismatch
from ..node import format_shape


def linear(x: Tensor) -> Tensor:
    """The value itself."""
    return x


def log_sumexp(x: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of the sum of exp(x); the dimension stays, with size one."""
    return torch.logsumexp(x, dim, keepdim=True)


def flatten(x: Tensor) -> Tensor:
    """Everything but the batch in one dimension."""
    return x.flatten(1)


def reshape(x: Tensor, sizes: tuple[int | tuple[int], ...]) -> Tensor:
    """Another shape; `(0,)` stands for the size of dimension 0 of x."""
    return x.reshape([x.shape[s[0]] if isinstance(s, tuple) else s for s in sizes])


def concatenate(*xs: Tensor, dim: int = -1) -> Tensor:
    """The inputs side by side."""
    return torch.cat(xs, dim)


def transpose(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The dimensions in another order."""
    return x.permute(dims)


def contiguous(x: Tensor) -> Tensor:
    """The same numbers, in memory in the order of the dimensions."""
    return x.contiguous()


def add_alike(x: Tensor, more: Tensor) -> Tensor:
    """The sum of two values of one shape.

    Raises:
        ShapeMismatch: theirs differ, also where torch would broadcast.
    """
    # symbolic tracing has no shapes
    if not isinstance(x, torch.fx.Proxy) and x.shape != more.shape:
        raise ShapeMismatch(
            "a body around its host cannot add to what it gives: the host changes places, not features alone",
            sides=[("host", format_shape(tuple(x.shape))), ("body", format_shape(tuple(more.shape)))],
            hint="splice it around a layer that keeps the places at all sizes, or after the host without parallel=True",
        )
    return x + more


def stack(*xs: Tensor) -> Tensor:
    """The inputs, all of one shape, along a new dimension before the last."""
    return torch.stack(xs, -2)


def scores(query: Tensor, keys: Tensor, temperature: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale · query · key / temperature` for each of the keys: `… × d` and `… × n × d` to `… × n`."""
    found = (keys @ query.unsqueeze(-1)).squeeze(-1) * scale
    return found if temperature is None else found / temperature


def mix(weights: Tensor, values: Tensor) -> Tensor:
    """The weighted sum of values: `… × n` and `… × n × d` to `… × d`."""
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def switch(x: Tensor, *branches: Tensor, tasks: tuple[str, ...]) -> Tensor:
    """One of the branches, each of which gives what x is; a compiled model runs only the one that is chosen."""
    return branches[0]


class Function(nn.Module):
    """A function of the user's as a module, so that generated code can call whatever it is."""

    def __init__(self, fn: Callable[..., Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.fn = fn
        self.options = dict(options)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(*inputs, **self.options)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        options = [f"{k}={v!r}" for k, v in self.options.items()]
        return ", ".join([getattr(self.fn, "__name__", repr(self.fn)), *options])


class Attention(nn.Module):
    """Scaled dot-product attention of already projected queries, keys and values (Vaswani et al. 2017, section 3.2).

    Splits the last dimension into heads and joins it again. The mask is true, or a number that is added to the scores.
    """

    def __init__(self, num_heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for x in (query, key, value))
        causal = self.causal and mask is None
        if mask is not None:
            mask = self.seen(mask, q.shape[-2], k.shape[-2])
        dropout = self.dropout if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return out.transpose(-3, -2).flatten(-2)

    def seen(self, mask: Tensor, queries: int, keys: int) -> Tensor:
        """A mask of `batch × keys` or `batch × queries × keys` with a dimension for the heads, and causal if asked."""
        if mask.dim() == 2:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask[:, None]
        if not mask.dtype.is_floating_point:
            mask = mask.bool()
        if not self.causal:
            return mask
        before = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
        return mask & before if mask.dtype == torch.bool else mask.masked_fill(~before, float("-inf"))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, causal={self.causal}"
