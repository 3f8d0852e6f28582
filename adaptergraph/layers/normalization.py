"""Normalisation and the dropouts of convolutional nets, on torch's own modules. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import GraphError, here
from ..node import Node
from ..shapes import Value
from .making import check_rate, check_size, make, spelt
from .table import Op, _last, add_rows
from .windows import spatial

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "feature_alpha_dropout",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "spatial_dropout",
]

_BATCH: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE: Any = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_DROPOUT: Any = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}


def _channels(x: Sequence[Value]) -> int:
    if len(x[0].shape) < 2:
        raise ValueError("it reads batch × channels × …")
    return int(x[0].shape[1])  # type: ignore[arg-type]


def _batch_norm(x: Sequence[Value], eps: float, momentum: float) -> nn.Module:
    channels = _channels(x)
    if len(x[0].shape) > 5:
        raise ValueError("it reads batch × channels and at most three spatial sizes")
    return _BATCH[len(x[0].shape)](channels, eps=eps, momentum=momentum, dtype=x[0].dtype)


def _instance_norm(x: Sequence[Value], eps: float) -> nn.Module:
    return _INSTANCE[len(x[0].shape)](_channels(x), eps=eps, affine=True, dtype=x[0].dtype)


def _group_norm(x: Sequence[Value], groups: int, eps: float) -> nn.Module:
    return nn.GroupNorm(groups, _channels(x), eps=eps, dtype=x[0].dtype)


def _rms_norm(x: Sequence[Value], eps: float) -> nn.Module:
    return nn.RMSNorm(_last(x), eps=eps, dtype=x[0].dtype)


add_rows(
    Op("rms_norm", "divides by the root of the mean square", module=_rms_norm, floats=1),
    Op("batch_norm", "normalises each channel over the batch", module=_batch_norm, floats=1),
    Op("group_norm", "normalises groups of channels", module=_group_norm, floats=1),
    Op("instance_norm", "normalises each channel of each sample", module=_instance_norm, floats=1),
    Op("spatial_dropout", "zeroes whole channels", module=lambda x, rate: _DROPOUT[len(x[0].shape)](rate), floats=1),
    Op("alpha_dropout", "dropout that keeps mean and variance", module=lambda x, rate: nn.AlphaDropout(rate), floats=1),
    Op(
        "feature_alpha_dropout",
        "alpha dropout of whole channels",
        module=lambda x, rate: nn.FeatureAlphaDropout(rate),
        floats=1,
    ),
)


@spelt
def rms_norm(x: Node, *, eps: float = 1e-6, share: Node | None = None, name: str | None = None) -> Node:
    """Divides by the root of the mean square of the last dimension (`nn.RMSNorm`): the scale starts at one.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467

    >>> import adaptergraph as ag
    >>> list(ag.Graph(ag.rms_norm(ag.input("x", shape=("batch", 8)), name="norm")).params)
    ['norm.weight']
    """
    return make("rms_norm", [x], name, {"eps": _eps(eps, name)}, share=share)


@spelt
def batch_norm(
    x: Node, *, eps: float = 1e-5, momentum: float = 0.1, share: Node | None = None, name: str | None = None
) -> Node:
    """Normalises each channel over the batch (`nn.BatchNorm1d`, `2d`, `3d`), of `batch × channels × spatial…`.

    Its running mean and variance are buffers: `running = (1 - momentum)·running + momentum·batch`. When all its
    parameters are frozen, it keeps them, whatever `train()` says. Ioffe and Szegedy 2015,
    https://arxiv.org/abs/1502.03167

    Args:
        momentum: the share of the new batch, as in torch (Axon's is the share of the old).

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 4, 8, 8))
    >>> sorted(ag.Graph(ag.batch_norm(x, name="bn")).compile().state_dict())
    ['bn.bias', 'bn.num_batches_tracked', 'bn.running_mean', 'bn.running_var', 'bn.weight']
    """
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        raise GraphError(f"momentum is a number from 0 to 1, not {momentum!r}", node=name, source=here())
    return make("batch_norm", [x], name, {"eps": _eps(eps, name), "momentum": float(momentum)}, share=share)


@spelt
def group_norm(x: Node, groups: int, *, eps: float = 1e-5, share: Node | None = None, name: str | None = None) -> Node:
    """Normalises channels in groups (`nn.GroupNorm`), of `batch × channels × …`.

    Wu and He 2018, https://arxiv.org/abs/1803.08494

    Raises:
        ShapeMismatch: the channels are no multiple of `groups`.
    """
    return make(
        "group_norm", [x], name, {"groups": check_size(groups, "groups", name), "eps": _eps(eps, name)}, share=share
    )


@spelt
def instance_norm(x: Node, *, eps: float = 1e-5, share: Node | None = None, name: str | None = None) -> Node:
    """Normalises each channel of each sample (`nn.InstanceNorm1d`, `2d`, `3d`), while training and after.

    Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022
    """
    spatial(x, "instance_norm", name)
    return make("instance_norm", [x], name, {"eps": _eps(eps, name)}, share=share)


@spelt
def spatial_dropout(x: Node, *, rate: float = 0.5, name: str | None = None) -> Node:
    """Zeroes whole channels while training (`nn.Dropout1d`, `2d`, `3d`), of `batch × channels × spatial…`."""
    spatial(x, "spatial_dropout", name)
    return make("spatial_dropout", [x], name, {"rate": check_rate(rate, name)})


@spelt
def alpha_dropout(x: Node, *, rate: float = 0.5, name: str | None = None) -> Node:
    """Dropout that keeps mean and variance, for `selu` (Klambauer et al. 2017, https://arxiv.org/abs/1706.02515)."""
    return make("alpha_dropout", [x], name, {"rate": check_rate(rate, name)})


@spelt
def feature_alpha_dropout(x: Node, *, rate: float = 0.5, name: str | None = None) -> Node:
    """Alpha dropout of whole channels (`nn.FeatureAlphaDropout`), of `batch × channels × spatial…`."""
    spatial(x, "feature_alpha_dropout", name)
    return make("feature_alpha_dropout", [x], name, {"rate": check_rate(rate, name)})


def _eps(value: Any, name: str | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise GraphError(f"eps is a small positive number, not {value!r}", node=name, source=here())
    return float(value)
