"""Starting values by Axon's names; any callable that fills a tensor in place serves too. Floor 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import init

from ..errors import GraphError, here, suggestion

INITIALIZERS: dict[str, Callable[[Tensor], Any]] = {
    "zeros": init.zeros_,
    "ones": init.ones_,
    "uniform": lambda t: init.uniform_(t, -0.01, 0.01),
    "normal": lambda t: init.normal_(t, 0.0, 0.01),
    "truncated_normal": lambda t: init.trunc_normal_(t, 0.0, 0.01, -0.02, 0.02),
    "identity": init.eye_,
    "near_identity": lambda t: init.eye_(t).masked_fill_(t == 0, 1e-6),
    "lecun_uniform": lambda t: init.kaiming_uniform_(t, nonlinearity="linear"),
    "lecun_normal": lambda t: init.kaiming_normal_(t, nonlinearity="linear"),
    "he_uniform": init.kaiming_uniform_,
    "he_normal": init.kaiming_normal_,
    "glorot_uniform": init.xavier_uniform_,
    "glorot_normal": init.xavier_normal_,
    "orthogonal": init.orthogonal_,
}


# these look at both sizes of a matrix
_MATRIX = frozenset(INITIALIZERS) - {"zeros", "ones", "uniform", "normal", "truncated_normal"}
_TWO = frozenset({"identity", "near_identity"})


def check_initializer(value: Any, shape: tuple[int, ...], what: str) -> Any:
    """A number (normal with this deviation), a name of the table or a callable; anything else is an error."""
    if callable(value):
        return value
    if isinstance(value, float) and value > 0:
        return value
    if isinstance(value, str) and value in INITIALIZERS:
        if (value in _MATRIX and len(shape) < 2) or (value in _TWO and len(shape) != 2):
            raise GraphError(
                f"the initializer {value!r} fills matrices, not {what} of shape {shape}",
                source=here(),
                hint="'zeros', 'ones', a deviation such as 0.02, or a function that fills the tensor in place",
            )
        return value
    hint = suggestion(value, INITIALIZERS) if isinstance(value, str) else None
    raise GraphError(f"unknown initializer {value!r}", source=here(), hint=hint)


def initialise(tensor: Tensor, value: Any) -> None:
    """Fills a parameter in place; a float is the standard deviation of a normal distribution."""
    with torch.no_grad():
        if isinstance(value, float):
            init.normal_(tensor, 0.0, value)
        else:
            (INITIALIZERS[value] if isinstance(value, str) else value)(tensor)
