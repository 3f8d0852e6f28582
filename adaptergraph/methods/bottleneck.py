"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021) as a method. Floor 3."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ..adapter import bottleneck, check_choices
from ..errors import GraphError, here
from ..layers.making import check_rate
from ..layers.table import check_activation
from ..node import Node
from ..surgery import Site
from .base import method

PositiveInt = Annotated[int, Field(gt=0)]


@method
class Bottleneck:
    """`x + scale · up(act(down(x)))` after a node, as in Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

    A fresh one is the identity, bit for bit: `up` starts at zero.

    Args:
        size: features of the bottleneck; 64 if neither this nor `reduction` is given.
        reduction: instead of a size, the host's features divided by this.
        activation: name of an activation.
        dropout: after the activation, while training.
        scale: a number, or `"learned"`: one parameter that starts at one.
        init: `"zeros"` (up starts at zero) or `"normal"` (down N(0, 0.02), up N(0, 1e-3), biases zero).
        layer_norm: a norm `"before"` down or `"after"` up.
        hidden_size: features of the host; it is known, and a wrong one is an error.

    Raises:
        GraphError: an option is unknown or cannot be right; the nearest name is in the message.

    >>> import adaptergraph as ag
    >>> ag.Bottleneck(64, activation="gelu")
    Bottleneck(64, activation='gelu')
    """

    size: PositiveInt | None = None
    _: KW_ONLY
    reduction: PositiveInt | None = None
    activation: str = "relu"
    dropout: float = 0.0
    scale: float | Literal["learned"] = 1.0
    init: str = "zeros"
    layer_norm: Literal["before", "after"] | None = None
    hidden_size: PositiveInt | None = None

    where: ClassVar[str] = "after"

    def __post_init__(self) -> None:
        if self.size is None and self.reduction is None:
            object.__setattr__(self, "size", 64)
        elif self.size is not None and self.reduction is not None:
            raise GraphError("Bottleneck takes a size or a reduction, not both", source=here())
        check_activation(self.activation)
        check_rate(self.dropout)
        check_choices(scale=self.scale, init=self.init, residual=True, layer_norm=self.layer_norm)

    def apply(self, site: Site) -> Node:
        """The adapted value of the site."""
        features = (site.output.shape or (None,))[-1]
        reduced = features // self.reduction if self.reduction and isinstance(features, int) else 1
        return bottleneck(
            site.output,
            self.hidden_size,
            self.size or max(1, reduced),
            activation=self.activation,
            dropout=self.dropout,
            scale=self.scale,
            init=self.init,
            layer_norm=self.layer_norm,
        )

    def __repr__(self) -> str:
        from .base import show

        return show(self)
