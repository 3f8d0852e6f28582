"""One immutable node of a graph. Floor 1: knows names, shapes and the user's line, nothing of torch's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import GraphError, Source, here
from .names import path_of

if TYPE_CHECKING:
    import torch

    from .graph import Graph

Dim: TypeAlias = "str | int | None"
Shape: TypeAlias = "tuple[Dim, ...]"
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Param:
    """Shape and dtype of one parameter; its values live in the compiled module."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def trainable(self) -> bool:
        """Whether it can have a gradient: quantised weights are whole numbers."""
        return self.dtype.is_floating_point or self.dtype.is_complex


class _NoAttribute(GraphError, AttributeError):
    """A `GraphError` for what is asked of a node as if it were a tensor; `hasattr` sees that it is not there."""


def _no_tensor(node: Node, asked: str, instead: str, own: str = "", kind: type[GraphError] = GraphError) -> GraphError:
    """The error for a node that is used as a tensor: its value is there only when the model runs."""
    return kind(
        f"{node!r} is a node of a graph, not a tensor: {asked}",
        node=node.name,
        source=here(),
        hint=f"{own}ag.nx([x], lambda x: {instead}) for any function of tensors, ag.module(x, module) for a module;\n"
        "+, -, * and the calls of ag make nodes: x * 0.5, ag.relu(x), ag.constant(…)",
    )


def _refused(sign: str, instead: str) -> Callable[..., Any]:
    """An operator that nodes do not know."""

    def refuse(node: Node, *_: Any) -> Any:
        raise _no_tensor(node, f"it does not know {sign}", instead)

    return refuse


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Node:
    """A named operation: what it does, what it reads, what comes out.

    Nodes are made by the calls of `adaptergraph.layers` and by `ag.trace`, not by hand. `inputs` are nodes while a
    graph is being written and names once it is a `Graph`; `graph["name"]` is a node that knows its graph and can be
    used in further calls. `a + b`, `a - b`, `a * b` make nodes, where one side may be a number.

    Attributes:
        op: what it does: a row of the table of layers, or the class or function of an imported node.
        inputs: what it reads.
        name: its module path; None until the graph fixes it.
        shape: of its value: sizes, names of sizes, or None for an unknown size.
        dtype: of its value.
        options: the op's options.
        params: its own parameters by their name in the module.
        body: the body it belongs to, or None for a host.
        source: the user's line.
        shares: while a graph is being written, the node whose weights this one uses; then its name says so.
        space: while a graph is being written, the namespace in which a graph names it.
        axis: the dimension of its features, counted from the end, so that -1 is the last; None where it is not known.
    """

    op: str
    inputs: tuple[Any, ...] = ()
    name: str | None = None
    shape: Shape | None = None
    dtype: torch.dtype | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)
    body: str | None = None
    source: Source | None = None
    graph: Graph | None = None
    shares: Node | None = None
    space: str = ""
    axis: int | None = None

    @property
    def path(self) -> str:
        """The module that holds this node's parameters."""
        return path_of(self.name or "")

    def param_names(self) -> list[str]:
        """Full names of its parameters, as in `state_dict()`."""
        return [f"{self.path}.{p}" if p else self.path for p in self.params]

    def same(self, other: Node) -> bool:
        """Equal in everything that means something; the user's line does not."""
        return (
            self.op == other.op
            and self.inputs == other.inputs
            and self.shape == other.shape
            and self.dtype == other.dtype
            and self.body == other.body
            and self.params == other.params
            and _equal(dict(self.options), dict(other.options))
        )

    def __repr__(self) -> str:
        return f"<{self.name or 'unnamed'}: {self.op} {format_shape(self.shape)}>"

    def __add__(self, other: Node | float) -> Node:
        return _calculated("add", self, other)

    def __radd__(self, other: Node | float) -> Node:
        return _calculated("add", other, self)

    def __sub__(self, other: Node | float) -> Node:
        return _calculated("subtract", self, other)

    def __rsub__(self, other: Node | float) -> Node:
        return _calculated("subtract", other, self)

    def __mul__(self, other: Node | float) -> Node:
        return _calculated("multiply", self, other)

    def __rmul__(self, other: Node | float) -> Node:
        return _calculated("multiply", other, self)

    __truediv__ = __rtruediv__ = _refused("/", "x / 2")
    __matmul__ = __rmatmul__ = _refused("@", "x @ weight")
    __pow__ = __rpow__ = _refused("**", "x ** 2")
    __neg__ = _refused("a minus before it", "-x")
    __abs__ = _refused("abs()", "abs(x)")
    __getitem__ = _refused("[…]", "x[…]")
    __lt__ = __le__ = __gt__ = __ge__ = _refused("comparisons", "x > 0")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in type(self).__slots__:
            raise AttributeError(name)
        raise _no_tensor(self, f"it has no {name!r}", f"x.{name}(…)", kind=_NoAttribute)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refused: a function of torch that is given a node."""
        from .layers import __all__ as names

        name = function.__name__
        given = [*args, *(kwargs or {}).values()]
        flat = [part for value in given for part in (value if isinstance(value, list | tuple) else [value])]
        node = next(part for part in flat if isinstance(part, Node))
        # ag.linear is an activation, the one that does nothing
        own = f"ag.{name}(…) is that as a node;\n" if name in names and name != "linear" else ""
        raise _no_tensor(node, f"torch's {name} cannot take it", f"{name}(x, …)", own)


def reading(node: Node, inputs: Sequence[Node]) -> Node:
    """The same node for other values, which may have other shapes than those it reads.

    Raises:
        ShapeMismatch: it does not take these values, or would need other parameters for them.
    """
    from .layers.making import reading

    return reading(node, inputs)


def _calculated(op: str, left: Node | float, right: Node | float) -> Node:
    """One of these is a node; a number beside it becomes a constant."""
    from . import layers

    number = int | float
    values = [layers.constant(v) if isinstance(v, number) and not isinstance(v, bool) else v for v in (left, right)]
    return getattr(layers, op)(values)


def _equal(a: Any, b: Any) -> bool:
    """Whether two options are the same value: `1` is not `True`, and tensors are compared number by number."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    # a tensor here is the value of a constant, whose shape and dtype have been compared already
    result = a == b
    return result if isinstance(result, bool) else bool(result.all())


def check_present(op: str, read: Node, source: Source | None) -> None:
    """An input that may be missing is read by the two ops that say what stands in its place.

    Raises:
        GraphError: another op reads it; both are named.
    """
    if read.op == "input" and read.options.get("optional") and op not in ("optional", "or_else"):
        raise GraphError(
            f"{op} reads {read.name!r}, which is optional and may be missing",
            node=read.name,
            sides=[("reads", read.name or "", format_shape(read.shape), "optional")],
            source=source,
            hint=f"say what stands in its place: ag.optional({read.name}, default=…) or ag.or_else({read.name}, node)",
        )


def format_shape(shape: Shape | None) -> str:
    """A shape as people read it.

    >>> format_shape(("batch", None, 768))
    'batch × ? × 768'
    """
    if shape is None:
        return "–"
    return " × ".join("?" if d is None else str(d) for d in shape) or "scalar"
