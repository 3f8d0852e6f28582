"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021) as a method. Floor 3."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

from pydantic import Field

from .. import layers
from ..adapter import bottleneck, check_choices
from ..errors import GraphError, ShapeMismatch, here
from ..features import size_of
from ..layers.making import check_rate, make
from ..layers.table import check_activation
from ..node import Node, format_shape
from ..splicing.site import Site
from .base import method

PositiveInt = Annotated[int, Field(gt=0)]


@method
class Bottleneck:
    """`x + scale · up(act(down(x)))` after a node, as in Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

    A fresh one is the identity, bit for bit: `up` starts at zero, unless `init` says otherwise. With `parallel=True` it
    stands around a node or container and reads its input: `output + scale · up(act(down(input)))`, He et al. 2022,
    https://arxiv.org/abs/2110.04366

    Args:
        size: features of the bottleneck; 64 if neither this nor `reduction` is given.
        reduction: instead of a size, the host's features divided by this.
        activation: name of an activation.
        dropout: after the activation, while training.
        scale: a number, or `"learned"`: one parameter that starts at one.
        init: how the weights start, see `Adapter.wrap`: `"zeros"`, `"normal"`, `"houlsby"`, `"bert"` or `"lora"`.
        layer_norm: a norm `"before"` down or `"after"` up.
        hidden_size: features of the host; it is known, and a wrong one is an error.
        parallel: read the host's input instead of its output.

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
    parallel: bool = False

    def __post_init__(self) -> None:
        if self.size is None and self.reduction is None:
            object.__setattr__(self, "size", 64)
        elif self.size is not None and self.reduction is not None:
            raise GraphError("Bottleneck takes a size or a reduction, not both", source=here())
        check_activation(self.activation)
        check_rate(self.dropout)
        check_choices(scale=self.scale, init=self.init, residual=True, layer_norm=self.layer_norm)

    @classmethod
    def houlsby(cls, size: int = 64, **options: Any) -> Bottleneck:
        """Houlsby et al. 2019: gelu; one after the attention and one after the feed-forward output projection.

        >>> import adaptergraph as ag
        >>> ag.Bottleneck.houlsby()
        Bottleneck(64, activation='gelu')
        """
        return cls(size, **{"activation": "gelu", **options})

    @classmethod
    def pfeiffer(cls, reduction: int = 16, **options: Any) -> Bottleneck:
        """Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247: features / 16, relu; after the feed-forward output.

        >>> import adaptergraph as ag
        >>> ag.Bottleneck.pfeiffer()
        Bottleneck(reduction=16)
        """
        return cls(reduction=reduction, **options)

    @property
    def where(self) -> str:
        """Where it stands: around its host if it reads the host's input."""
        return "around" if self.parallel else "after"

    def apply(self, site: Site) -> Node:
        """The adapted value of the site."""
        added = self.contribution(site)
        if self.parallel:
            return make("add_alike", [site.output, added], "residual", {})
        return layers.add([site.output, added], name="residual")

    def contribution(self, site: Site) -> Node:
        """What it adds to the site's value."""
        x = site.input if self.parallel else site.output
        features = size_of(x)
        reduced = features // self.reduction if self.reduction and isinstance(features, int) else 1
        added = bottleneck(
            x,
            self.hidden_size,
            self.size or max(1, reduced),
            activation=self.activation,
            dropout=self.dropout,
            scale=self.scale,
            init=self.init,
            layer_norm=self.layer_norm,
            residual=False,
            like=site.output,
        )
        if added.shape != site.output.shape:
            raise ShapeMismatch(
                f"a body around {site.name!r} cannot add to what it gives: the host changes places, not features alone",
                node=site.name,
                sides=[
                    ("reads", x.name or "", format_shape(x.shape)),
                    ("host", site.name, format_shape(site.output.shape)),
                    ("body", added.name or "", format_shape(added.shape)),
                ],
                source=site.source,
                hint="splice it around a layer that keeps the places, or after this one, without parallel=True",
            )
        return added


def _parallel(cls: Any, size: int = 64, **options: Any) -> Bottleneck:
    """He et al. 2022, https://arxiv.org/abs/2110.04366: `output + scale · up(act(down(input)))`, their scale of 4.

    Splice it at a sub-layer as a whole, such as `layer.ffn`.

    >>> import adaptergraph as ag
    >>> ag.Bottleneck.parallel(8)
    Bottleneck(8, scale=4.0, parallel=True)
    """
    return cls(size, **{"scale": 4.0, "parallel": True, **options})


# the preset has the name of the option: on the class this, on an instance its value
Bottleneck.parallel = classmethod(_parallel)  # type: ignore[assignment]
