"""Follows a forward with stand-ins for its arguments, its children as they are. Floor 4.

Nothing that a call may give differently is fixed, or else a check in the code refuses such a call.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..axes import op_name
from ..tracing.memory import version
from ..tracing.parts import tensors
from .program import Unlowered, branches, kind_of, same

MORE = "_adaptergraph_more"
_OF_GRADIENTS = ("requires_grad", "grad_fn", "is_leaf")


class _Proxy(fx.Proxy):
    """A stand-in that knows the value it stands for: of tensors the dtype and rank, of anything else all."""

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values[self.node]  # type: ignore[attr-defined]
        if value is None:
            raise Unlowered(f"a function that it calls asks for the {name} of {self.node.name!r}, which is None")
        if isinstance(value, Tensor) and name in _OF_GRADIENTS:
            raise Unlowered(f"it asks {name!r}, which is another one in training")
        if isinstance(value, Tensor) and name == "ndim":
            return self.dim()
        if isinstance(value, Tensor) and name == "layout":
            return value.layout
        asked: Any = super().__getattr__(name)
        if callable(getattr(value, name, None)):
            return asked
        if name == "dtype" and self.tracer.fixes_dtypes:  # type: ignore[attr-defined]
            self.tracer.checked(asked.node, value.dtype, f"{self.node.name}.dtype")  # type: ignore[attr-defined]
            return value.dtype
        return _Proxy(asked.node, self.tracer)

    def _kind(self) -> type:
        """What `isinstance` sees: of an object, such as a cache, its own class, which no call may change."""
        value = self.tracer.values.get(self.node)  # type: ignore[attr-defined]
        if not is_object(value):
            return _Proxy
        if self.node not in self.tracer.kinds:  # type: ignore[attr-defined]
            self.tracer.kinds.add(self.node)  # type: ignore[attr-defined]
            asked: Any = self.tracer.create_proxy("call_function", kind_of, (self,), {})
            self.tracer.checked(asked.node, kind_of(value), f"the kind of {_told(self.node)!r}")  # type: ignore[attr-defined]
        return type(value)

    __class__ = property(_kind)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __index__(self) -> int:
        """A number that a call gives, such as of steps; sizes stay what each call makes them."""
        value = self.tracer.values[self.node]  # type: ignore[attr-defined]
        if self.node.op != "placeholder" or type(value) is not int:
            raise Unlowered("it needs a size as a plain number")
        self.tracer.checked(self.node, value, f"the argument {self.node.name!r}")  # type: ignore[attr-defined]
        return value

    def dim(self) -> int:
        """The number of dimensions, which no call may change."""
        asked: Any = self.tracer.create_proxy("call_method", "dim", (self,), {})
        return self.counted(asked, f"the number of dimensions of {self.node.name}")

    def counted(self, asked: Any, what: str) -> int:
        """A whole number that the code checks in each call."""
        value = self.tracer.values[asked.node]  # type: ignore[attr-defined]
        self.tracer.checked(asked.node, value, what)  # type: ignore[attr-defined]
        return value

    def __iter__(self) -> Iterator[Any]:
        value = self.tracer.values[self.node]  # type: ignore[attr-defined]
        if isinstance(value, tuple | list | torch.Size):
            return iter([operator.getitem(self, i) for i in range(self.__len__())])
        return super().__iter__()

    def __len__(self) -> int:
        value = self.tracer.values[self.node]  # type: ignore[attr-defined]
        if isinstance(value, tuple | list | torch.Size):
            asked: Any = self.tracer.create_proxy("call_function", len, (self,), {})
            return self.counted(asked, f"the length of {self.node.name}")
        raise Unlowered("it asks for the length of a value")


def _in_place(name: str) -> Callable[[_Proxy, Any], _Proxy]:
    """An operator such as `+=`, which fx would take for `+`."""
    return lambda self, other: self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})  # type: ignore[return-value]


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class Tracer(fx.Tracer):
    """Follows a forward with stand-ins while it computes what they stand for, and says which operation each call is."""

    proxy_buffer_attributes = True

    def __init__(
        self, module: nn.Module, values: Mapping[str, Any], fixed: Mapping[str, Any], more: bool, fixes_dtypes: bool
    ) -> None:
        super().__init__()
        self.fixes_dtypes = fixes_dtypes
        self.given = dict(values)
        self.fixed = fixed
        self.more = more
        self.values: dict[fx.Node, Any] = {}
        self.operations: dict[str, fx.Node] = {}
        self.changed: set[fx.Node] = set()
        # objects whose kind the code checks
        self.kinds: set[fx.Node] = set()
        self.counts: dict[str, int] = {}
        self.thread = threading.get_ident()
        self.running = False

    def follow(self, module: nn.Module, forward: Callable[..., Any]) -> fx.Graph:
        self.forward = forward
        self.owned = {id(t) for t in (*module.parameters(), *module.buffers())}
        with torch.enable_grad(), _Unseen(self):
            self.around = _context()
            graph = self.trace(module)
        graph._tracer_cls = None
        return graph

    # fx asks for these

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        more = self.create_proxy("placeholder", MORE, (), {})
        given: dict[str, Any] = {name: self.create_proxy("placeholder", name, (), {}) for name in self.given}
        for name, value in self.fixed.items():
            self.checked(given[name].node, value, f"the argument {name!r}")
        given |= {name: None for name, value in self.fixed.items() if value is None}
        extra = {MORE: more} if self.more else {}
        return (lambda root: self.forward(root, **given, **extra)), [self.root]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.aside():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self.aside() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) not in self.owned and a not in self.tensor_attrs:
            raise Unlowered("it reads a tensor that belongs to no module")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.values[obj.node]
        if not is_plain(value):
            raise Unlowered(f"it branches on what a value is ({obj.node.name})")
        self.checked(obj.node, bool(value), f"what it branches on ({_told(obj.node)})", branches)
        return bool(value)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "placeholder":
            self.values[node] = {} if target == MORE else self.given[target]
        elif kind != "output":
            if not self.running and _context() != self.around:
                raise Unlowered("it runs a part of itself without gradients, or in another precision")
            self.running = True
            try:
                with torch.no_grad():
                    self.values[node] = self.value(node)
            finally:
                self.running = False
        return node

    # what they stand for

    def aside(self) -> bool:
        """Whether this is no part of the forward that is followed."""
        return self.running or threading.get_ident() != self.thread

    def value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            kwargs = {k: v for k, v in kwargs.items() if k != MORE}
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        with _Named(self, node):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def checked(self, node: fx.Node, value: Any, what: str, check: Callable[..., None] = same) -> None:
        """Lets the code refuse a call in which this is something else."""
        before = self.running
        self.running = True
        self.create_node("call_function", check, (node, value, what), {})
        self.running = before


_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _told(value: Any) -> str:
    """A value as the forward may have written it."""
    if not isinstance(value, fx.Node):
        return repr(value)
    args = [_told(arg) for arg in value.args]
    if value.target is getattr:
        return f"{args[0]}.{value.args[1]}"
    if value.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if value.op == "call_method":
        return f"{args[0]}.{value.target}({', '.join(args[1:])})"
    name = getattr(value.target, "__name__", "")
    return f"{args[0]} {_SIGNS[name]} {args[1]}" if name in _SIGNS and len(args) == 2 else value.name


class _Named(TorchFunctionMode):
    """Names the operations of one node as a trace names them."""

    def __init__(self, tracer: Tracer, node: fx.Node) -> None:
        super().__init__()
        self.tracer = tracer
        self.node = node

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for _, t in tensors((args, kwargs or {}))]
        versions = [version(t) for t in given]
        result = func(*args, **(kwargs or {}))
        mutated = any(version(t) != v for t, v in zip(given, versions, strict=True))
        if mutated or next(tensors(result), None) is not None:
            name = op_name(func)
            count = self.tracer.counts.get(name, 0)
            self.tracer.counts[name] = count + 1
            self.tracer.operations[f"{name}_{count}" if count else name] = self.node
            if mutated:
                self.tracer.changed.add(self.node)
        return result


class _Unseen(TorchFunctionMode):
    """Lets operations that read no stand-in be a part of the code too: on buffers, of new and of random tensors."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        found = any(issubclass(t, fx.Proxy) for t in types)
        if found or self.tracer.aside() or func.__name__ == "__get__" or func.__module__ == "torch._C":
            return func(*args, **given)
        if torch.overrides.is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", func.__name__, args, given)
        return self.tracer.create_proxy("call_function", func, args, given)


def _context() -> tuple[Any, ...]:
    """What a `with` block around a part of a forward would change."""
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), nesting


def is_object(value: Any) -> bool:
    """Whether this is neither a tensor nor a plain value nor a structure of these."""
    return not (is_plain(value) or isinstance(value, Tensor | tuple | list | dict) or callable(value))


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
