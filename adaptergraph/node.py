"""One immutable node of a graph. Floor 1: knows names, shapes and the user's line, nothing of torch's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import Source
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
        size = 1
        for dim in self.shape:
            size *= dim
        return size


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Node:
    """A named operation: what it does, what it reads, what comes out.

    Nodes are made by the calls of `adaptergraph.layers` and by `ag.trace`, not by hand. `inputs` are nodes while a graph
    is being written and names once it is a `Graph`; `graph["name"]` is a node that knows its graph and can be used in
    further calls. `a + b`, `a - b` and `a * b` make nodes.

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
            and self.options == other.options
            and self.params == other.params
        )

    def __repr__(self) -> str:
        return f"<{self.name or 'unnamed'}: {self.op} {format_shape(self.shape)}>"

    def __add__(self, other: Node) -> Node:
        from .layers import add

        return add([self, other])

    def __sub__(self, other: Node) -> Node:
        from .layers import subtract

        return subtract([self, other])

    def __mul__(self, other: Node) -> Node:
        from .layers import multiply

        return multiply([self, other])


def format_shape(shape: Shape | None) -> str:
    """A shape as people read it.

    >>> format_shape(("batch", None, 768))
    'batch × ? × 768'
    """
    if shape is None:
        return "–"
    return " × ".join("?" if d is None else str(d) for d in shape) or "scalar"
