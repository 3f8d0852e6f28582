"""How a module gets bodies without being replaced: its class is swapped for a subclass of the same name. Floor 4.

On that subclass `forward` is a data descriptor: the inner forward runs first (the class's own, or one that a library put
on the instance), then the bodies. So hooks, hidden-state capture, checkpointing and a direct `.forward()` call all see
the adapted value, `isinstance` holds, and no state-dict key changes. All state is plain data on the instance.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import BadSplice

PLAN = "_adaptergraph_plan"


@dataclass(slots=True)
class Step:
    """One body at a host: the child to call, and which arguments of the host it reads beside the output."""

    child: str
    arguments: tuple[tuple[int, str], ...] = ()


@dataclass(slots=True)
class Plan:
    """What a hosted module does beside its own forward.

    Attributes:
        steps: the bodies on its output, in order.
        path: where in the output the adapted tensor is; empty when the output is the tensor.
        inner: a forward that stood on the instance before.
        outer: a forward that a library put on the instance afterwards.
        hidden: children that iteration over a container skips.
        keeps_statistics: a frozen normalisation layer, which stays in eval.
    """

    steps: tuple[Step, ...] = ()
    path: tuple[str | int, ...] = ()
    inner: Any = None
    outer: Any = None
    hidden: frozenset[str] = field(default_factory=frozenset)
    keeps_statistics: bool = False


_HOSTED: dict[type, type] = {}
_ORIGINAL: dict[type, type] = {}


def plan_of(module: nn.Module) -> Plan | None:
    """The plan of a hosted module; None for any other."""
    return module.__dict__.get(PLAN)


def host(module: nn.Module) -> Plan:
    """Swaps the class of a module, once, and returns its plan."""
    plan = plan_of(module)
    if plan is None:
        plan = Plan(inner=module.__dict__.pop("forward", None))
        module.__dict__[PLAN] = plan
        module.__class__ = _hosted_class(type(module))
    return plan


def unhost(module: nn.Module) -> None:
    """Gives a module its own class back, and the forward that stood on the instance."""
    plan = plan_of(module)
    if plan is None:
        return
    module.__class__ = _ORIGINAL[type(module)]
    del module.__dict__[PLAN]
    for name in plan.hidden:
        del module._modules[name]
    forward = plan.outer if plan.outer is not None else plan.inner
    if forward is not None:
        module.__dict__["forward"] = forward


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


def refuse_iteration(module: nn.Module, name: str) -> None:
    """A forward that walks over its children by hand would run the body as one more layer."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return
    code = getattr(_ORIGINAL.get(type(module), type(module)).forward, "__code__", None)
    walks = {"children", "named_children", "modules", "named_modules", "_modules"}
    if code is not None and walks & set(code.co_names):
        raise BadSplice(
            f"{name!r} ({type(module).__name__}) runs whatever children it has: a body would be one more of them",
            node=name,
            hint="splice at its last child",
        )


# ---------------------------------------------------------------------- the swapped class


def _hosted_class(cls: type) -> type:
    if cls not in _HOSTED:
        original: Any = cls.forward  # type: ignore[attr-defined]

        @functools.wraps(original)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            plan = self.__dict__[PLAN]
            out = original(self, *args, **kwargs) if plan.inner is None else plan.inner(*args, **kwargs)
            for step in plan.steps:
                out = _adapted(self, step, plan.path, out, args, kwargs)
            return out

        def get(self: Any) -> Any:
            outer = self.__dict__[PLAN].outer
            return forward.__get__(self) if outer is None else outer

        def put(self: Any, value: Any) -> None:
            plan = self.__dict__[PLAN]
            function = getattr(value, "__func__", None)
            if function is forward:
                plan.outer = None
            elif function is original:
                # a library takes its own forward away again
                plan.inner = plan.outer = None
            else:
                plan.outer = value

        def remove(self: Any) -> None:
            self.__dict__[PLAN].outer = None

        def train(self: Any, mode: bool = True) -> Any:
            cls.train(self, mode)  # type: ignore[attr-defined]
            if self.__dict__[PLAN].keeps_statistics:
                self.training = False
            return self

        hosted: Any = types.new_class(cls.__name__, (cls,))
        # after creation: a class may wrap what its subclasses define
        hosted.__module__, hosted.__qualname__, hosted.__doc__ = cls.__module__, cls.__qualname__, cls.__doc__
        hosted.forward = property(get, put, remove)
        hosted.train = train
        hosted.__reduce_ex__ = _reduce_ex
        if issubclass(cls, nn.Sequential | nn.ModuleList):
            hosted.__iter__ = lambda self: iter([m for _, m in _visible(self)])
            hosted.__len__ = lambda self: len(list(_visible(self)))
        elif issubclass(cls, nn.ModuleDict):
            hosted.__iter__ = hosted.keys = lambda self: iter([n for n, _ in _visible(self)])
            hosted.__len__ = lambda self: len(list(_visible(self)))
            hosted.items = lambda self: list(_visible(self))
            hosted.values = lambda self: [m for _, m in _visible(self)]
        _HOSTED[cls] = hosted
        _ORIGINAL[hosted] = cls
    return _HOSTED[cls]


def _adapted(self: Any, step: Step, path: tuple[str | int, ...], out: Any, args: Any, kwargs: Any) -> Any:
    body = self._modules[step.child]
    more = [args[i] if i < len(args) else kwargs[name] for i, name in step.arguments]
    if not path:
        return body(out, *more)
    return _put(out, path, body(_at(out, path), *more))


def _at(out: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        out = getattr(out, key[1:]) if isinstance(key, str) and key.startswith(".") else out[key]
    return out


def _put(out: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The same structure with one tensor replaced."""
    key, rest = path[0], path[1:]
    new = _put(_at(out, (key,)), rest, value) if rest else value
    if isinstance(out, tuple):
        items = [*out[:key], new, *out[key + 1 :]]  # type: ignore[operator,index]
        return type(out)(*items) if hasattr(out, "_fields") else tuple(items)
    if isinstance(key, str) and key.startswith("."):
        setattr(out, key[1:], new)
    else:
        out[key] = new
    return out


def _visible(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    hidden = self.__dict__[PLAN].hidden
    return ((n, m) for n, m in self._modules.items() if n not in hidden and m is not None)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """For copy and pickle: the swapped class has no name of its own in any module."""
    make, args, *rest = super(type(self), self).__reduce_ex__(protocol)
    if args and args[0] is type(self):
        args = (_ORIGINAL[type(self)], *args[1:])
    return (_remade, (make, args), *rest)


def _remade(make: Any, args: Any) -> Any:
    module = make(*args)
    module.__class__ = _hosted_class(type(module))
    return module
