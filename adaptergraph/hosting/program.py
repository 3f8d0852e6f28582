"""The lowered forward of one module, and what its code calls. Floor 4.

`self` is the module itself in that code, so that children, keys, hooks and mode are what they were.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..errors import GraphError
from . import frames
from .steps import done

PLAN = "_adaptergraph_plan"
# on the swapped class: the module itself, for code that can only name its attributes
SELF = "_adaptergraph_self"
AGAIN = "trace the model as it is called and set now, or splice at a module instead of an operation"
_FUNCTIONS: dict[str, Callable[..., Any]] = {}


class Unlowered(Exception):
    """Why a forward cannot be lowered, and what would make it possible."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.remedy = remedy


class OtherWay(Exception):
    """A call would take another way than the one that was lowered; its args: what is another one, as it is, and was."""


@dataclass(frozen=True, slots=True)
class Other:
    """An argument that is neither a tensor nor a plain value, such as a cache: only its kind is known."""

    kind: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a lowered forward."""

    name: str
    default: Any = inspect.Parameter.empty


class Missing:
    """Stands for what is not there."""

    def __repr__(self) -> str:
        return "not there"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = Missing()


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that lowered code has as it was.

    Attributes:
        place: how to come to it from the module: names of attributes, in lists and dicts 1-tuples of a key, and at last
            perhaps `len` or `type`.
        value: what it was; `MISSING` for an attribute that was asked for and was not there.
    """

    place: tuple[Any, ...]
    value: Any

    def now(self, module: nn.Module) -> Any:
        """What it is."""
        value: Any = module
        for step in self.place:
            if isinstance(step, tuple):
                key = step[0]
                if not (key in value if isinstance(value, dict) else key < len(value)):
                    return MISSING
                value = value[key]
            elif callable(step):
                value = step(value)
            else:
                value = getattr(value, step, MISSING)
        return value

    def __str__(self) -> str:
        path, of = "", ""
        for step in self.place:
            if callable(step):
                of = {len: "the length of ", type: "the kind of "}[step]
            else:
                path += f"[{step[0]!r}]" if isinstance(step, tuple) else f".{step}"
        return f"{of}the attribute {path.removeprefix('.')!r}"


class Program:
    """The lowered forward of a module, in both modes; equal programs share their functions.

    Attributes:
        positional: the parameters that may be given by position.
        parameters: all that the code takes, in its order.
        takes_more: further keyword arguments go to the children that the forward gives them to.
        settings: what the code has as it was when it was lowered.
        ways: by the arguments that are None where they were given when it was traced, the code in eval and in training,
            or why there is none.
    """

    def __init__(
        self,
        positional: tuple[str, ...],
        parameters: tuple[Parameter, ...],
        takes_more: bool,
        settings: Sequence[Setting],
        ways: Mapping[tuple[str, ...], Mapping[bool, fx.Graph] | str],
    ) -> None:
        self.positional = positional
        self.parameters = parameters
        self.takes_more = takes_more
        self.settings = settings
        self.ways = dict(ways)
        self.functions = {
            left_out: {mode: _function(graph) for mode, graph in way.items()}
            for left_out, way in ways.items()
            if not isinstance(way, str)
        }
        places = {p.name: i for i, p in enumerate(parameters)}
        self.optional = [(places[names[0]], names[0]) for names in ways if len(names) == 1]

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        try:
            self._check(module)
            flat, more = self._bound(args, kwargs)
            left_out = tuple(name for place, name in self.optional if flat[place] is None)
            if left_out not in self.functions:
                raise self._refused(left_out)
            return self.functions[left_out][module.training](module, more, *flat)
        except OtherWay as other:
            path, (what, now, traced) = module.__dict__[PLAN].path, other.args
            raise GraphError(
                f"in {path!r}, {what} is {_shown(now)} here, but the forward was lowered for {_shown(traced)}",
                node=path,
                hint=AGAIN,
            ) from None

    def _check(self, module: nn.Module) -> None:
        """Looks whether all settings are what they were."""
        state = module.__dict__
        for setting in self.settings:
            place, value = setting.place, setting.value
            now = state[place[0]] if len(place) == 1 and place[0] in state else setting.now(module)
            if now is not value and _differ(now, value):
                raise OtherWay(str(setting), now, value)

    def _bound(self, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        """The arguments in the order of the parameters, and the further ones."""
        if len(args) > len(self.positional):
            raise GraphError(f"{len(args)} arguments by position, where {len(self.positional)} are taken")
        given = dict(zip(self.positional, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise GraphError(f"the argument {min(twice)!r} is given twice, by position and by name")
        given |= kwargs
        flat = [given.pop(p.name, p.default) for p in self.parameters]
        for parameter, value in zip(self.parameters, flat, strict=True):
            if value is inspect.Parameter.empty:
                raise GraphError(f"the argument {parameter.name!r} is not given")
        if given and not self.takes_more:
            raise GraphError(f"there is no argument {next(iter(given))!r}")
        return flat, given

    def _refused(self, left_out: tuple[str, ...]) -> GraphError:
        """Why there is no code for a call without these arguments."""
        one = next(((n,) for n in left_out if isinstance(self.ways[n,], str)), left_out)
        names = " and ".join(map(repr, one))
        them = f"the arguments {names} are" if len(one) > 1 else f"the argument {names} is"
        return GraphError(
            f"{them} None here, but the forward was lowered for a value",
            sides=[("without", str(self.ways[one]))],
            hint="give it, or splice at a module instead of an operation",
        )

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __reduce__(self) -> Any:
        return Program, (self.positional, self.parameters, self.takes_more, self.settings, self.ways)


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """The generated function; one for all graphs of the same code."""
    code = graph.python_code("self")
    key = code.src + "".join(sorted(f"{k}:{id(v)}" for k, v in code.globals.items()))
    if key not in _FUNCTIONS:
        empty = fx.Graph()
        empty.output(None)
        carrier = fx.GraphModule(nn.Module(), empty, "Program")
        carrier._graph = graph
        carrier.recompile()
        _FUNCTIONS[key] = type(carrier).forward
    return _FUNCTIONS[key]


# ---------------------------------------------------------------------- what generated code calls


def at_operation(host: Any, slot: int, value: Tensor) -> Tensor:
    """The steps of a host at one operation of its forward."""
    plan = host.__dict__[PLAN]
    visit = plan.visits[0]
    if plan.counter is not None:
        frame = frames.find(plan.token, plan.counter.hops)
        assert frame is not None
        visit = plan.visits[frame.counts[plan.counter.number] - 1]
    for step in visit.inside[slot]:
        value = done(host, plan.token, step, value, (), {})
    return value


def call_with(module: Any, more: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a child with what the host was given beside the arguments it names."""
    return module(*args, **kwargs, **more)


def same(value: Any, traced: Any, what: str) -> None:
    """Refuses a call that would take another way through the forward than the one that was lowered.

    Raises:
        OtherWay: what is another one; `...` stands for any value but None.
    """
    if (value is None) != (traced is None) or (traced is not None and traced is not ... and _differ(value, traced)):
        raise OtherWay(what, value, traced)


def kind_of(value: Any) -> str:
    """The class of a value, as code can write it down."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def branches(value: Any, traced: bool, what: str) -> None:
    """Refuses a call that would take the other branch.

    The value may be a symbol of torch.compile, which knows no `!=` of truth values.
    """
    if (not value) if traced else value:
        raise OtherWay(what, bool(value), traced)


def _differ(value: Any, traced: Any) -> bool:
    return isinstance(value, Tensor) or value != traced


def _shown(value: Any) -> str:
    if value is ...:
        return "a value"
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else textwrap.shorten(repr(value), 80)
