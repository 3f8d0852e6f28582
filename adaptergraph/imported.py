"""What `ag.trace` found in a model beside its nodes: modules, calls, parameters. Floor 1, plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from .names import path_of
from .node import Param

if TYPE_CHECKING:
    import torch

Path: TypeAlias = "tuple[str | int, ...]"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        output: the node of the first float tensor it returned.
        path: where that tensor sits in what it returned; empty when it returned a tensor.
        inputs: the float tensors among its arguments: name of the argument, and node.
        caller: the call that made it, as `path` or `path@1`; `""` is the model's own.
        parts: the tensors in what it returned that are read: label, node, and where it sits; none for one tensor.
    """

    output: str | None
    path: Path = ()
    inputs: tuple[tuple[str, str], ...] = ()
    caller: str = ""
    parts: tuple[tuple[str, str, Path], ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the model: its class, and its calls in order; none for a module that is never called."""

    cls: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True)
class Aside:
    """A value that came to its reader past a module: one that the module kept on an attribute, say, and returned too.

    Attributes:
        scope: the call past which it came, or the operation: it gave another tensor over memory that was written into.
        at: past its `"entry"` or its `"exit"`.
        value: the node that the value is; None where any body there would change what is read in a way that no edge can
            say: of memory that somebody wrote into, and of what a call was given and kept.
        reader: the node that reads it, or a call that is given or returns it; `""` is the model's own.
        whole: the value comes to the reader in no other way, so that the graph can say what it reads.
    """

    scope: str
    at: str
    value: str | None
    reader: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Imported:
    """The model an imported graph was traced from.

    Attributes:
        cls: the class of the model.
        modules: every module by its path, containers too; the model itself is `""`.
        params: shape and dtype of every parameter by its first name.
        tied: further names of tied parameters, and the first name of each.
        readers: for a parameter that no module of its own reads, the node that does.
        scopes: for each node the call whose forward runs it, as `path` or `path@1`.
        asides: which values came to their readers past the entry or exit of a module.
        kept: values that somebody may read beside the model's outputs: held on an attribute or in an object when the
            forward had returned, or looked at as numbers; and for each the call whose tensor that is.
        walked: modules over whose children, or if true over all that is at or below them, a forward walks, and computes
            with what it finds.
        overwritten: values over which the model writes others in their memory: whoever reads one later reads a copy.
        example: the arguments of the traced call, as shapes, for tracing again; None if they were more than tensors
            and plain values.
        given: the arguments of the traced call themselves; None for a graph from a file.
        host: the model; None for a graph from a file.
    """

    cls: str
    modules: Mapping[str, Module]
    params: Mapping[str, Param]
    tied: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    scopes: Mapping[str, str] = field(default_factory=dict)
    asides: tuple[Aside, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    walked: Mapping[str, bool] = field(default_factory=dict)
    overwritten: tuple[str, ...] = ()
    example: Any = None
    given: tuple[Any, Any] | None = field(default=None, compare=False, repr=False)
    host: torch.nn.Module | None = field(default=None, compare=False, repr=False)

    def call(self, scope: str) -> Call:
        """The call of a module that is written `path` or `path@1`."""
        _, at, index = scope.partition("@")
        return self.modules[path_of(scope)].calls[int(index) if at else 0]

    def names(self) -> Iterator[str]:
        """Every name that `values` knows beside the nodes' own: modules, calls, outputs, operations of a first call."""
        yield from filter(None, self.modules)
        several = {path for path, module in self.modules.items() if len(module.calls) > 1}
        for name in self.scopes:
            if "@" not in name and path_of(name) in several:
                yield name.replace("/", "@0/")
        for path, module in self.modules.items():
            for i, call in enumerate(module.calls if path else ()):
                for place in (path, f"{path}@{i}") if path in several else (path,):
                    yield place
                    yield from (f"{place}:{label}" for label, _, _ in call.parts)

    def values(self, name: str) -> tuple[str, ...] | None:
        """What a module or an operation of its forward gives, at every call; None if the name is none of these.

        `name@1` is one call, `name:1` one of several outputs, `name/add` an operation, `name@1/add` that of one call.
        """
        path = path_of(name)
        module, part = self.modules.get(path), name[len(path) :]
        if module is None or not name:
            return None
        head, slash, operation = part.partition("/")
        call, colon, label = head.partition(":")
        index = call.removeprefix("@")
        if (colon and not label) or (call and index not in map(str, range(len(module.calls)))):
            return None
        numbers = [int(index)] if call else range(len(module.calls))
        if slash:
            names = (f"{path}@{i}/{operation}" if i else f"{path}/{operation}" for i in numbers)
            return tuple(n for n in names if n in self.scopes) or None
        calls = [module.calls[i] for i in numbers]
        if not label:
            return tuple(c.output for c in calls if c.output) if path else None
        return tuple(node for c in calls for own, node, _ in c.parts if own == label) or None

    def past(self, scope: str, at: str, value: str) -> list[Aside]:
        """Who reads a value past the entry or exit of a call."""
        return [a for a in self.asides if a.scope == scope and a.at == at and a.value in (value, None)]

    def walked_over(self, path: str) -> str | None:
        """The module over which a forward walks and comes to what is a child of this one; None if it comes to none."""
        above = (p for p, deep in self.walked.items() if deep and f"{path}.".startswith(f"{p}." if p else ""))
        return path if path in self.walked else next(above, None)

    def around(self, scope: str) -> Iterator[str]:
        """A call, the call that made it, and so on up to the model's own, which is `""`."""
        yield scope
        while scope:
            scope = self.call(scope).caller
            yield scope

    def without_host(self) -> Imported:
        """The same without the model and its arguments: for pickle and files."""
        return replace(self, host=None, given=None)
