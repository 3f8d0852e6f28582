"""The ops of a declared graph as rows: how a module or function is made from options. Floor 2.

A new layer is one row and one typed function: in `calls.py` with its row here, or both in the file of its family.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import GraphError, here, suggestion
from ..shapes import Value
from . import functions as fn


@dataclass(frozen=True, slots=True)
class Op:
    """One row: `module` makes an nn.Module with parameters or state, `function` is called with the inputs.

    Attributes:
        name: Axon's name.
        doc: one line.
        module: `(values of the inputs, **options) -> nn.Module`.
        function: `(*tensors, **options) -> tensor`.
        fold: the function takes two inputs; more are folded from the left.
        floats: how many of its inputs, from the first, must hold floats.
    """

    name: str
    doc: str
    module: Callable[..., nn.Module] | None = None
    function: Callable[..., Any] | None = None
    fold: bool = False
    floats: int = 0


def _dense(x: Sequence[Value], size: int, bias: bool) -> nn.Module:
    return nn.Linear(_last(x), size, bias=bias, dtype=x[0].dtype)


def _layer_norm(x: Sequence[Value], eps: float) -> nn.Module:
    return nn.LayerNorm(_last(x), eps=eps, dtype=x[0].dtype)


def _last(x: Sequence[Value]) -> int:
    if not x[0].shape:
        raise ValueError("a scalar has no features")
    return int(x[0].shape[-1])  # type: ignore[arg-type]


# by name: the function, and the options it has
ACTIVATIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "celu": (F.celu, ("alpha",)),
    "elu": (F.elu, ("alpha",)),
    "exp": (torch.exp, ()),
    "gelu": (F.gelu, ("approximate",)),
    "hard_sigmoid": (F.hardsigmoid, ()),
    "hard_silu": (F.hardswish, ()),
    "hard_tanh": (F.hardtanh, ("min_val", "max_val")),
    "leaky_relu": (F.leaky_relu, ("negative_slope",)),
    "linear": (fn.linear, ()),
    "log_sigmoid": (F.logsigmoid, ()),
    "log_softmax": (F.log_softmax, ("dim",)),
    "log_sumexp": (fn.log_sumexp, ("dim",)),
    "mish": (F.mish, ()),
    "relu": (F.relu, ()),
    "relu6": (F.relu6, ()),
    "selu": (F.selu, ()),
    "sigmoid": (torch.sigmoid, ()),
    "silu": (F.silu, ()),
    "softmax": (F.softmax, ("dim",)),
    "softplus": (F.softplus, ("beta", "threshold")),
    "softsign": (F.softsign, ()),
    "tanh": (torch.tanh, ()),
}

# what others call them, in small letters
_SYNONYMS = {
    **dict.fromkeys(("none", "identity"), "it is called 'linear' here"),
    "swish": "it is called 'silu' here",
    **dict.fromkeys(("hard_swish", "hardswish"), "it is called 'hard_silu' here"),
    **dict.fromkeys(
        ("gelu_new", "gelu_pytorch_tanh", "gelu_tanh", "gelu_fast"),
        "'gelu' is the exact one; ag.gelu(x, approximate=\"tanh\") approximates it in a body of your own",
    ),
}

_ROWS = [
    Op("dense", "x W^T + b over the last dimension", module=_dense, floats=1),
    Op("embedding", "rows of a table by index", module=lambda x, vocab_size, size: nn.Embedding(vocab_size, size)),
    Op("layer_norm", "normalises the last dimension", module=_layer_norm, floats=1),
    Op("dropout", "zeroes a share of the values while training", module=lambda x, rate: nn.Dropout(rate), floats=1),
    Op("attention", "scaled dot-product attention in heads", module=lambda x, **o: fn.Attention(**o), floats=3),
    Op("add", "sum", function=operator.add, fold=True),
    Op("add_alike", "sum of two values of one shape", function=fn.add_alike),
    Op("subtract", "difference", function=operator.sub, fold=True),
    Op("multiply", "product", function=operator.mul, fold=True),
    Op("concatenate", "side by side", function=fn.concatenate),
    Op("stack", "along a new dimension before the last", function=fn.stack),
    Op("scores", "a query against each of several keys", function=fn.scores, floats=2),
    Op("mix", "weighted sum of several values", function=fn.mix, floats=2),
    Op("switch", "one of several branches, by task", function=fn.switch),
    Op("reshape", "another shape", function=fn.reshape),
    Op("transpose", "dimensions in another order", function=fn.transpose),
    Op("contiguous", "in memory in the order of the dimensions", function=fn.contiguous),
    Op("flatten", "all but the batch in one dimension", function=fn.flatten),
    *(Op(name, f"the activation {name}", function=f, floats=1) for name, (f, _) in ACTIVATIONS.items()),
]
OPS: dict[str, Op] = {row.name: row for row in _ROWS}


def add_rows(*rows: Op) -> None:
    """Rows of a family of layers that has a file of its own."""
    OPS.update((row.name, row) for row in rows)


def check_activation(name: Any) -> str:
    """An activation's name, or an error with the nearest one."""
    if isinstance(name, str) and name in ACTIVATIONS:
        return name
    if isinstance(name, str):
        hint = _SYNONYMS.get(name.lower()) or suggestion(name, ACTIVATIONS)
    else:
        hint = _SYNONYMS["none"] if name is None else "a name: " + ", ".join(ACTIVATIONS)
    raise GraphError(f"unknown activation {name!r}", source=here(), hint=hint)


def runnable(op: str, options: Mapping[str, Any]) -> Callable[[Sequence[Value]], Any]:
    """For an op: what makes its module or function from the values it reads."""
    if op == "module":
        return lambda values: options["module"]
    if op in ("nx", "layer"):
        return lambda values: fn.Function(options["fn"], options.get("options", {}))
    if op == "optional":
        # its default is a matter of the graph, which knows the sizes
        return lambda values: fn.linear
    row = OPS[op]
    given = {k: v for k, v in options.items() if not k.endswith("_init")}
    if row.module is not None:
        return partial(row.module, **given)
    assert row.function is not None
    function = partial(row.function, **given)
    return lambda values: (lambda *xs: reduce(function, xs)) if row.fold else function
