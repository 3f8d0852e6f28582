"""How a module gets bodies without being replaced: its class is swapped for a subclass of the same name. Floor 4.

That subclass has a `forward` of its own: steps on the arguments, the inner forward (the class's, or one that a library
put on the instance), steps on the output. So hooks, hidden-state capture, checkpointing and a direct `.forward()` call
all see the adapted value, `isinstance` holds, and no state-dict key changes. All state is plain data on the instance.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import BadSplice, GraphError, here
from . import frames
from .frames import Key, Token
from .program import PLAN, SELF, Program
from .steps import Visit, at_entry, at_exit, refuse_arguments, refuse_output

# a forward on the instance that takes the place of the class's own; one around ours stays where it is, at "forward"
INNER = "_adaptergraph_inner"


@dataclass(slots=True)
class Plan:
    """What a hosted module does beside its own forward.

    Attributes:
        visits: the steps of a call: one that is meant for every call, or one for each call of a forward.
        counter: where the calls are counted, if there are several.
        token: the model whose frames its steps read and write; None if they need none.
        opens: a frame is open while it runs.
        program: its forward as lowered code, which stops at operations; None for the module's own.
        hidden: children that iteration over a container skips.
        keeps_statistics: a frozen normalisation layer, which stays in eval.
        path: of the module in its model, for messages.
        around: called with the module and the keyword arguments of each call; gives what the call runs in.
    """

    visits: tuple[Visit, ...] = (Visit(),)
    counter: Key | None = None
    token: Token | None = None
    opens: bool = False
    program: Program | None = None
    hidden: frozenset[str] = field(default_factory=frozenset)
    keeps_statistics: bool = False
    path: str = ""
    around: Callable[[nn.Module, dict[str, Any]], AbstractContextManager[None]] | None = None


_HOSTED: dict[tuple[type, type], type] = {}
_ORIGINAL: dict[type, type] = {}


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a hosted module; None for any other."""
    return module.__dict__.get(PLAN)


def host(module: nn.Module, mixin: type = object) -> Plan:
    """Swaps the class of a module, once, and returns its plan; with a mixin its class has these methods too."""
    plan = plan_of(module)
    if plan is None:
        _give_class(module, hosted_class(type(module), mixin))
        plan = module.__dict__[PLAN] = Plan()
        own = replaced_forward(module)
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__[INNER] = own
    elif mixin is not object:
        _give_class(module, hosted_class(_ORIGINAL[type(module)], mixin))
    return plan


def replaced_forward(module: nn.Module) -> Any:
    """The forward that a library put on an instance in place of its class's; None where it is the class's own.

    A library that takes its own off may leave the class's on the instance.
    """
    own = module.__dict__.get("forward")
    cls: Any = _ORIGINAL.get(type(module), type(module))
    plain = getattr(own, "__func__", None) is cls.forward and getattr(own, "__self__", None) is module
    return None if plain else own


def _give_class(module: nn.Module, cls: type) -> None:
    # some modules take no attribute any more
    object.__setattr__(module, "__class__", cls)


def unhost(module: nn.Module) -> None:
    """Gives a module its own class back, and the forward that stood on the instance."""
    plan = module.__dict__.pop(PLAN)
    _give_class(module, _ORIGINAL[type(module)])
    for name in plan.hidden:
        module._modules.pop(name, None)
    # what a library put around our forward still calls ours, which from now on runs the inner one alone
    if INNER in module.__dict__ and "forward" not in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(INNER)


def has_other_class(module: nn.Module) -> bool:
    """Whether a hosted module was given one more class after ours, as sharding and parametrizations do."""
    return type(module) not in _ORIGINAL


def add_child(owner: nn.Module, name: str, child: nn.Module) -> None:
    """Adds a child; a container that iterates over its children does not see it."""
    if isinstance(owner, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        plan = host(owner)
        plan.hidden |= {name}
    owner._modules[name] = child


def keep_frozen_statistics(model: nn.Module, trained: Mapping[str, bool], frozen: bool = False) -> list[str]:
    """Keeps normalisation layers whose parameters are all frozen in eval, whatever `train()` says.

    Args:
        trained: by parameter name.
        frozen: what a layer without parameters counts as.
    """
    kept = []
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or module.running_mean is None:
            continue
        own = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)]
        if not any(trained.get(p, False) for p in own) if own else frozen:
            host(module).keeps_statistics = True
            module.training = False
            kept.append(path)
    return kept


# ---------------------------------------------------------------------- what cannot be a host


def refuse_host(module: nn.Module, name: str) -> None:
    """Refuses modules whose forward would run a body as one more layer, or would lose it.

    Raises:
        BadSplice: and names the module.
    """
    refuse_remade(module, name)
    cls = _ORIGINAL.get(type(module), type(module))
    waiting, seen = ["forward", "__iter__"], set(dir(nn.Module)) - {"forward"}
    while waiting:
        method = waiting.pop()
        function = inspect.unwrap(getattr(cls, method, None))  # type: ignore[arg-type]
        if method in seen or not isinstance(function, types.FunctionType) or function in _OVERRIDDEN:
            continue
        seen.add(method)
        names = _names(function.__code__)
        if names & {"children", "named_children", "_modules"}:
            raise BadSplice(
                f"{name!r} ({cls.__name__}) runs whatever children it has: a body would be one more of them",
                node=name,
                source=here(),
                hint="splice at its last child",
            )
        waiting += names


def refuse_remade(module: nn.Module, name: str) -> None:
    """Refuses a module that is made anew with each copy, without what was put on it.

    Raises:
        BadSplice: and names the module.
    """
    cls = _ORIGINAL.get(type(module), type(module))
    if isinstance(module, torch._dynamo.OptimizedModule):
        raise BadSplice(
            f"{name!r} went through torch.compile, which wraps it anew when it is copied: a body would be lost",
            node=name,
            source=here(),
            hint=f"name the module inside it: {f'{name}._orig_mod'!r}",
        )
    if isinstance(module, fx.GraphModule) and cls.__deepcopy__ is fx.GraphModule.__deepcopy__:  # type: ignore[attr-defined]
        raise BadSplice(
            f"{name!r} is an fx.GraphModule, which writes its forward anew when it is copied: a body would be lost",
            node=name,
            source=here(),
            hint="splice at a module inside it",
        )


# what these do with their children is done without the bodies on the swapped class
_OVERRIDDEN = [
    vars(container)[name]
    for container in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    for name in ("__iter__", "__len__", "__getitem__", "keys", "items", "values")
    if name in vars(container)
]


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))


# ---------------------------------------------------------------------- the swapped class


class _Unannounced(nn.Module):
    """Before a class that refuses a subclass of this name, or without a keyword: ours is no new class to it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def hosted_class(cls: Any, mixin: type = object, name: str = "") -> type:
    """The subclass of a module's class on which bodies run; one for each class and mixin.

    Raises:
        BadSplice: the metaclass of the class refuses a subclass; the message names the module, if its name is given.
    """
    if (cls, mixin) in _HOSTED:
        return _HOSTED[cls, mixin]
    # another descriptor may give another forward to each module
    plain = isinstance(inspect.getattr_static(cls, "forward"), types.FunctionType)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(PLAN)
        if plan is None:
            return inner(self, None, args, kwargs)
        if plan.around is not None:
            with plan.around(self, kwargs):
                return run(self, plan, inner, args, kwargs)
        return run(self, plan, inner, args, kwargs)

    def inner(self: Any, plan: Plan | None, args: Any, kwargs: Any) -> Any:
        own = self.__dict__.get(INNER)
        if own is not None:
            return own(*args, **kwargs)
        if plan is not None and plan.program is not None:
            return plan.program(self, args, kwargs)
        return cls.forward(self, *args, **kwargs) if plain else super(hosted, self).forward(*args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        if "forward" in self.__dict__:
            # a library may have written past __setattr__
            _set_forward(self, hosted, self.__dict__["forward"])
        cls.train(self, mode)
        if self.__dict__[PLAN].keeps_statistics:
            self.training = False
        return self

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name == "forward":
            _set_forward(self, hosted, value)
        else:
            cls.__setattr__(self, name, value)

    def delete_attribute(self: Any, name: str) -> None:
        inner = name == "forward" and name not in self.__dict__ and INNER in self.__dict__
        cls.__delattr__(self, INNER if inner else name)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """For copy and pickle: the swapped class has no name of its own in any module."""
        make, args, *rest = super(hosted, self).__reduce_ex__(protocol)
        if type(self) is not hosted:
            return (make, args, *rest)
        if args and args[0] is hosted:
            args = (cls, *args[1:])
        return (_remade, (make, args, mixin), *rest)

    members = {"forward": forward, "train": train, "__setattr__": set_attribute, "__delattr__": delete_attribute}
    members |= {"__reduce_ex__": reduce_ex, SELF: property(lambda self: self), **_containers(cls)}
    members |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    hosted: Any = _subclass(cls, mixin, members, name)
    _HOSTED[cls, mixin] = hosted
    _ORIGINAL[hosted] = cls
    return hosted


def _subclass(cls: Any, mixin: type, members: dict[str, Any], name: str) -> type:
    bases = (cls, *[mixin] * (mixin is not object))
    fill = lambda space: space.update(members)  # noqa: E731
    # a class may have to see its subclasses, as layers that wrap their forwards to checkpoint themselves
    try:
        return types.new_class(cls.__name__, bases, exec_body=fill)
    except Exception as refused:
        error = refused
    try:
        return types.new_class(cls.__name__, (_Unannounced, *bases), exec_body=fill)
    except Exception:
        raise BadSplice(
            f"{f'{name!r} ({cls.__name__})' if name else cls.__name__} cannot be a host: its class takes no subclass",
            node=name or None,
            sides=[("it raises", f"{type(error).__name__}: {error}")],
            source=here(),
            hint="splice at a module inside it, or around it",
        ) from error


def _set_forward(self: Any, hosted: type, value: Any) -> None:
    """Files a forward that is put on a hosted instance: around ours, inside ours, or none."""
    # a class may wrap the forward of its subclasses, as layers that checkpoint themselves do
    function = vars(hosted)["forward"]
    state = self.__dict__
    if any(part is function for part in parts_of(value)):
        state["forward"] = value
        if getattr(value, "__func__", None) is function:
            del state["forward"]
        return
    # it does not call ours: the host's own computation is another one now, or the class's again
    state.pop("forward", None)
    state.pop(INNER, None)
    if getattr(value, "__func__", None) is not _ORIGINAL[hosted].forward:  # type: ignore[attr-defined]
        state[INNER] = value


def parts_of(function: Any) -> Iterator[Any]:
    """A callable, what it wraps, closes over or reads by a global name, what these are bound to, hold or refer to."""
    waiting, seen = [function], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, functools.partial):
            waiting += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            waiting += [part.__func__, part.__self__]
        elif isinstance(part, types.FunctionType):
            waiting += [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values(), *_globals_of(part)]
            for cell in part.__closure__ or ():
                with suppress(ValueError):
                    waiting.append(cell.cell_contents)
        elif isinstance(part, weakref.ref):
            waiting.append(part())
        elif type(part) in (list, tuple, set, dict):
            waiting += part.values() if isinstance(part, dict) else part
        else:
            continue
        waiting += [part.__wrapped__] if hasattr(part, "__wrapped__") else []


def _globals_of(function: types.FunctionType) -> Iterator[Any]:
    """What a function reads by a global name; of other functions, those of its own file."""
    space = function.__globals__
    for name in _global_names(function.__code__):
        value = space.get(name)
        if not isinstance(value, types.FunctionType) or value.__globals__ is space:
            yield value


@functools.lru_cache(maxsize=256)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The global names that code reads, also in the functions that it makes."""
    inner = [_global_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    return tuple(dict.fromkeys(itertools.chain(own, *inner)))


def _containers(cls: Any) -> dict[str, Any]:
    """How a container with bodies shows its children: without the bodies."""

    def getitem(self: Any, index: Any) -> Any:
        items = list(_visible(self))
        if not isinstance(index, slice):
            return items[index][1]
        return cls(OrderedDict(items[index])) if issubclass(cls, nn.Sequential) else cls(m for _, m in items[index])

    length = {"__len__": lambda self: len(list(_visible(self)))}
    names = lambda self: iter([n for n, _ in _visible(self)])  # noqa: E731
    if issubclass(cls, nn.Sequential | nn.ModuleList):
        return {**length, "__iter__": lambda self: iter([m for _, m in _visible(self)]), "__getitem__": getitem}
    if issubclass(cls, nn.ModuleDict):
        items = lambda self: list(_visible(self))  # noqa: E731
        values = lambda self: [m for _, m in _visible(self)]  # noqa: E731
        return {**length, "__iter__": names, "keys": names, "items": items, "values": values}
    return {}


def _visible(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    hidden = self.__dict__[PLAN].hidden
    return ((n, m) for n, m in self._modules.items() if n not in hidden and m is not None)


def _remade(make: Any, args: Any, mixin: type = object) -> Any:
    module = make(*args)
    _give_class(module, hosted_class(type(module), mixin))
    return module


# ---------------------------------------------------------------------- one call


def run(self: Any, plan: Plan, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """One call of a hosted module."""
    if plan.token is None:
        return _visit(self, plan, inner, args, kwargs)
    frames.keep_for_recompute()
    if not plan.opens:
        return _visit(self, plan, inner, args, kwargs)
    outer = frames.HERE.frame
    frames.HERE.frame = frames.Frame(plan.token, outer)
    try:
        return _visit(self, plan, inner, args, kwargs)
    finally:
        frames.HERE.frame = outer


def _visit(self: Any, plan: Plan, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    token = plan.token
    visit = plan.visits[0] if plan.counter is None else _counted(plan, plan.counter)
    for step in visit.entry:
        try:
            args, kwargs = at_entry(self, token, step, args, kwargs)
        except Exception:
            refuse_arguments(plan.path, step, args, kwargs)
            raise
    out = inner(self, plan, args, kwargs)
    for step in visit.exit:
        try:
            out = at_exit(self, token, step, out, args, kwargs)
        except Exception:
            refuse_output(plan.path, step, out)
            refuse_arguments(plan.path, step, args, kwargs)
            raise
    return out


def _counted(plan: Plan, counter: Key) -> Visit:
    number = frames.count(plan.token, counter)
    if number >= len(plan.visits):
        raise GraphError(
            f"{counter.name!r} is called more often than in the traced forward: {len(plan.visits)} times",
            node=counter.name,
            hint="trace the model with the arguments that it is called with now",
        )
    return plan.visits[number]
