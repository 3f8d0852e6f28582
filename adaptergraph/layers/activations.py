"""The activations as functions of their own; each is also `ag.activation(x, "its name")`. Floor 2."""

from __future__ import annotations

from ..node import Node
from .making import activated, spelt

__all__ = [
    "celu",
    "elu",
    "exp",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "log_softmax",
    "log_sumexp",
    "mish",
    "relu6",
    "selu",
    "softplus",
    "softsign",
]


@spelt
def celu(x: Node, *, alpha: float = 1.0, name: str | None = None) -> Node:
    """max(x, 0) + min(α (exp(x / α) - 1), 0)."""
    return activated("celu", x, name, alpha=alpha)


@spelt
def elu(x: Node, *, alpha: float = 1.0, name: str | None = None) -> Node:
    """X above zero, α (exp(x) - 1) below. Clevert et al. 2015, https://arxiv.org/abs/1511.07289

    >>> import adaptergraph as ag
    >>> ag.elu(ag.input("x", shape=("batch", 8)), alpha=0.5)
    <unnamed: elu batch × 8>
    """
    return activated("elu", x, name, alpha=alpha)


@spelt
def exp(x: Node, *, name: str | None = None) -> Node:
    """The exponential function."""
    return activated("exp", x, name)


@spelt
def hard_sigmoid(x: Node, *, name: str | None = None) -> Node:
    """Torch's: x / 6 + 1/2, between 0 and 1 (Axon's slope is 0.2)."""
    return activated("hard_sigmoid", x, name)


@spelt
def hard_silu(x: Node, *, name: str | None = None) -> Node:
    """X hard_sigmoid(x), with torch's slope; also called hard swish."""
    return activated("hard_silu", x, name)


@spelt
def hard_tanh(x: Node, *, min_val: float = -1.0, max_val: float = 1.0, name: str | None = None) -> Node:
    """X between two limits."""
    return activated("hard_tanh", x, name, min_val=min_val, max_val=max_val)


@spelt
def leaky_relu(x: Node, *, negative_slope: float = 0.01, name: str | None = None) -> Node:
    """X above zero, `negative_slope` x below."""
    return activated("leaky_relu", x, name, negative_slope=negative_slope)


@spelt
def linear(x: Node, *, name: str | None = None) -> Node:
    """X itself."""
    return activated("linear", x, name)


@spelt
def log_sigmoid(x: Node, *, name: str | None = None) -> Node:
    """The logarithm of the sigmoid."""
    return activated("log_sigmoid", x, name)


@spelt
def log_softmax(x: Node, *, dim: int = -1, name: str | None = None) -> Node:
    """The logarithm of softmax over `dim`."""
    return activated("log_softmax", x, name, dim=dim)


@spelt
def log_sumexp(x: Node, *, dim: int = -1, name: str | None = None) -> Node:
    """The logarithm of the sum of exp(x) over `dim`, which stays with size one.

    >>> import adaptergraph as ag
    >>> ag.log_sumexp(ag.input("x", shape=("batch", 8)))
    <unnamed: log_sumexp batch × 1>
    """
    return activated("log_sumexp", x, name, dim=dim)


@spelt
def mish(x: Node, *, name: str | None = None) -> Node:
    """X tanh(softplus(x)). Misra 2019, https://arxiv.org/abs/1908.08681"""
    return activated("mish", x, name)


@spelt
def relu6(x: Node, *, name: str | None = None) -> Node:
    """X between 0 and 6."""
    return activated("relu6", x, name)


@spelt
def selu(x: Node, *, name: str | None = None) -> Node:
    """The scaled elu of self-normalising nets. Klambauer et al. 2017, https://arxiv.org/abs/1706.02515"""
    return activated("selu", x, name)


@spelt
def softplus(x: Node, *, beta: float = 1.0, threshold: float = 20.0, name: str | None = None) -> Node:
    """log(1 + exp(β x)) / β; x itself where β x is above the threshold."""
    return activated("softplus", x, name, beta=beta, threshold=threshold)


@spelt
def softsign(x: Node, *, name: str | None = None) -> Node:
    """X / (1 + |x|)."""
    return activated("softsign", x, name)
