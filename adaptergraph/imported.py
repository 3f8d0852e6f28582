"""What `ag.trace` found in a model beside its nodes: modules, calls, parameters. Floor 1, plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .node import Param

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: where its first float tensor sits in what it returned, and which node that is."""

    output: str | None
    path: tuple[str | int, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the model: its class, and its calls in order; none for a module that is never called."""

    cls: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Imported:
    """The model an imported graph was traced from.

    Attributes:
        cls: the class of the model.
        modules: every module by its path, containers too; the model itself is `""`.
        params: shape and dtype of every parameter by its first name.
        tied: further names of tied parameters, and the first name of each.
        readers: for a parameter that no module of its own reads, the node that does.
        scopes: for each node the module whose forward runs it.
        example: the arguments of the traced call, as shapes, for tracing again; None if they were more than tensors
            and plain values.
        host: the model; None for a graph from a file.
    """

    cls: str
    modules: Mapping[str, Module]
    params: Mapping[str, Param]
    tied: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    scopes: Mapping[str, str] = field(default_factory=dict)
    example: Any = None
    host: torch.nn.Module | None = field(default=None, compare=False, repr=False)

    def without_host(self) -> Imported:
        """The same without the model: for pickle and files."""
        return replace(self, host=None)
