"""The arithmetic of layers that are no single torch call; generated code calls these by name. Floor 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


class Attention(nn.Module):
    """Scaled dot-product attention of already projected queries, keys and values (Vaswani et al. 2017, section 3.2).

    Splits the last dimension into heads and joins it again; the mask is true (or 0.0) where a key may be seen.
    """

    def __init__(self, num_heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for x in (query, key, value))
        if mask is not None and mask.dim() == 2:
            mask = mask[:, None, None, :]
        if mask is not None and not mask.dtype.is_floating_point:
            mask = mask.bool()
        dropout = self.dropout if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=self.causal)
        return out.transpose(-3, -2).flatten(-2)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"num_heads={self.num_heads}, dropout={self.dropout}, causal={self.causal}"
