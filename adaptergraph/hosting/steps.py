"""What a hosted module does beside its own forward, as plain data, and how one such step is done. Floor 4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import GraphError
from ..imported import Path
from ..tracing.parts import holds, tuple_like, with_field
from . import frames
from .frames import Key, Token


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a host: its position, None if it is given by name only, and its name."""

    position: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that a host does with one of its values: in this order, as far as they are given.

    Attributes:
        at: the argument, or the way to the tensor in the output; not used at an operation.
        fill: take the value of the frame in its place.
        child: run the body of this name on it.
        reads: what else the body is given: arguments of the host, or values of the frame.
        keep: note the result in the frame.
        copied: what is noted is a copy, as the model will write into the value itself.
        owner: the module that has the body, if it is not the host itself.
    """

    at: Argument | Path = ()
    fill: Key | None = None
    child: str | None = None
    reads: tuple[Argument | Key, ...] = ()
    keep: Key | None = None
    copied: bool = False
    owner: Any = None

    @property
    def changes(self) -> bool:
        """Whether it replaces the value."""
        return self.child is not None or self.fill is not None

    @property
    def framed(self) -> bool:
        """Whether it reads or writes a frame."""
        return self.fill is not None or self.keep is not None or any(isinstance(r, Key) for r in self.reads)


@dataclass(frozen=True, slots=True)
class Visit:
    """The steps of one call of a host: at its arguments, at operations of its forward by number, at its output."""

    entry: tuple[Step, ...] = ()
    inside: tuple[tuple[Step, ...], ...] = ()
    exit: tuple[Step, ...] = ()

    def steps(self) -> Iterator[Step]:
        """All of them."""
        yield from (*self.entry, *(step for slot in self.inside for step in slot), *self.exit)


def at_entry(self: nn.Module, token: Token | None, step: Step, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments after one step."""
    assert isinstance(step.at, Argument)
    position, name = step.at.position, step.at.name
    by_position = position is not None and position < len(args)
    value = _argument(args, kwargs, step.at)
    new = done(self, token, step, value, args, kwargs)
    if not step.changes:
        return args, kwargs
    if by_position:
        return (*args[:position], new, *args[position + 1 :]), kwargs  # type: ignore[operator]
    return args, {**kwargs, name: new}


def at_exit(self: nn.Module, token: Token | None, step: Step, out: Any, args: Any, kwargs: Any) -> Any:
    """The output after one step."""
    path = step.at
    assert isinstance(path, tuple)
    if not path:
        new = done(self, token, step, out, args, kwargs)
        return new if step.changes else out
    new = done(self, token, step, _at(out, path), args, kwargs)
    return _put(out, path, new, args, kwargs) if step.changes else out


def done(self: nn.Module, token: Token | None, step: Step, value: Tensor, args: Any, kwargs: Any) -> Tensor:
    """What one step makes of a value."""
    if step.fill is not None:
        value = frames.read(token, step.fill)
    if step.child is not None:
        body = (self if step.owner is None else step.owner)._modules[step.child]
        more = [frames.read(token, r) if isinstance(r, Key) else _argument(args, kwargs, r) for r in step.reads]
        value = body(value, *more)  # type: ignore[misc]
    if step.keep is not None:
        frames.keep(token, step.keep, value.clone() if step.copied else value)
    return value


# ---------------------------------------------------------------------- calls that differ from the traced one

AGAIN = "trace the model with the arguments that it is called with now"


def refuse_arguments(host: str, step: Step, args: Any, kwargs: Any) -> None:
    """Says which argument that a step needs is not given, or is no tensor; all is well where each is one.

    Raises:
        GraphError: and names the host.
    """
    for argument in (step.at, *step.reads):
        if not isinstance(argument, Argument):
            continue
        try:
            found = _kind(_argument(args, kwargs, argument))
        except KeyError:
            found = "not given"
        if found:
            raise GraphError(
                f"a body at {host!r} reads its argument {argument.name!r}, which is {found} in this call",
                node=host,
                hint=AGAIN,
            ) from None


def refuse_output(host: str, step: Step, out: Any) -> None:
    """Says that a host returned no tensor where it returned one when it was traced; all is well where it did.

    Raises:
        GraphError: and names the host.
    """
    path = step.at if isinstance(step.at, tuple) else ()
    try:
        found = _kind(_at(out, path))
    except (AttributeError, IndexError, KeyError, TypeError):
        found = "nothing"
    if found:
        place = "".join(k if isinstance(k, str) and k.startswith(".") else f"[{k!r}]" for k in path)
        raise GraphError(
            f"{host!r} returns another structure than when it was traced",
            node=host,
            sides=[
                ("traced", f"a tensor{' at ' if path else ''}{place}"),
                ("now", f"{type(out).__name__}, {found} there"),
            ],
            hint=AGAIN,
        ) from None


def _kind(value: Any) -> str:
    """What a value is instead of a tensor; nothing for a tensor."""
    return "" if isinstance(value, Tensor) else "None" if value is None else f"a {type(value).__name__}"


def _argument(args: Any, kwargs: Any, argument: Argument) -> Any:
    if argument.position is not None and argument.position < len(args):
        return args[argument.position]
    if argument.name in kwargs:
        return kwargs[argument.name]
    raise KeyError(argument.name)


def _at(out: Any, path: Path) -> Any:
    for key in path:
        if isinstance(out, Tensor):
            raise TypeError("a tensor holds no other")
        out = getattr(out, key[1:]) if isinstance(key, str) and key.startswith(".") else out[key]
    return out


def _put(out: Any, path: Path, value: Any, args: Any, kwargs: Any) -> Any:
    """The same structure with one tensor replaced."""
    key, rest = path[0], path[1:]
    new = _put(_at(out, (key,)), rest, value, args, kwargs) if rest else value
    if isinstance(out, tuple):
        return tuple_like(out, [*out[:key], new, *out[key + 1 :]])  # type: ignore[operator,index]
    if isinstance(key, str) and key.startswith("."):
        return with_field(out, key[1:], new)
    if type(out) in (dict, list) and not holds((*args, *kwargs.values()), out):
        # the module may keep what it returned; what it was given, its caller looks into
        out = out.copy()
    out[key] = new
    return out
