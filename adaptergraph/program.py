"""The forward of one module as lowered code that stops at some of its operations. Floor 4.

The forward is followed once with stand-ins for its arguments, its children as they are: nothing that a call may give
differently is fixed, or else a check in the code refuses such a call. Before the code is used it is run beside the
module's own forward. `self` is the module itself, so that children, keys, hooks and mode are what they were.
"""

from __future__ import annotations

import ast
import copy
import inspect
import operator
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from . import frames
from .errors import GraphError
from .record import op_name, tensors, version
from .steps import done

PLAN = "_adaptergraph_plan"
# on the swapped class: the module itself, for code that can only name its attributes
SELF = "_adaptergraph_self"
_MORE = "_adaptergraph_more"
_FUNCTIONS: dict[str, Callable[..., Any]] = {}


class Unlowered(Exception):
    """Why a forward cannot be lowered."""


@dataclass(frozen=True, slots=True)
class Other:
    """An argument that is neither a tensor nor a plain value, such as a cache: only its kind is known."""

    kind: str


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a lowered forward."""

    name: str
    default: Any = inspect.Parameter.empty


class Program:
    """The lowered forward of a module, in both modes; equal programs share their functions.

    Attributes:
        positional: the parameters that may be given by position.
        parameters: all that the code takes, in its order.
        takes_more: further keyword arguments go to the children that the forward gives them to.
        settings: plain attributes of the module that the code was lowered with.
        graphs: the code in eval and in training.
    """

    def __init__(
        self,
        positional: tuple[str, ...],
        parameters: tuple[Parameter, ...],
        takes_more: bool,
        settings: Mapping[str, Any],
        graphs: Mapping[bool, fx.Graph],
    ) -> None:
        self.positional = positional
        self.parameters = parameters
        self.takes_more = takes_more
        self.settings = dict(settings)
        self.graphs = dict(graphs)
        self.functions = {mode: _function(graph) for mode, graph in self.graphs.items()}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        for name, value in self.settings.items():
            same(module.__dict__.get(name), value, f"the attribute {name!r}")
        if len(args) > len(self.positional):
            raise GraphError(f"{len(args)} arguments by position, where {len(self.positional)} are taken")
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        flat = [given.pop(p.name, p.default) for p in self.parameters]
        for parameter, value in zip(self.parameters, flat, strict=True):
            if value is inspect.Parameter.empty:
                raise GraphError(f"the argument {parameter.name!r} is not given")
        if given and not self.takes_more:
            raise GraphError(f"there is no argument {next(iter(given))!r}")
        return self.functions[module.training](module, given, *flat)

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __reduce__(self) -> Any:
        return Program, (self.positional, self.parameters, self.takes_more, self.settings, self.graphs)


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
    """Refuses a call that would take another way through the forward than the one that was lowered."""
    if (value is None) != (traced is None) or (traced is not None and traced is not ... and value != traced):
        raise GraphError(
            f"{what} is {value!r} here, but the forward was lowered for {'a value' if traced is ... else repr(traced)}",
            hint="trace the model with the arguments that it is called with now, or splice at a module instead of an "
            "operation",
        )


# ---------------------------------------------------------------------- following a forward


class _Proxy(fx.Proxy):
    """A stand-in that knows the value it stands for: of tensors the dtype, device and rank, of anything else all."""

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values[self.node]  # type: ignore[attr-defined]
        if isinstance(value, Tensor) and name in ("dtype", "device", "ndim", "is_cuda", "is_meta", "layout"):
            if name == "dtype":
                asked: Any = fx.Proxy.__getattr__(self, name)
                self.tracer.checked(asked.node, value.dtype, f"{self.node.name}.dtype")  # type: ignore[attr-defined]
            return self.dim() if name == "ndim" else getattr(value, name)
        if value is None:
            raise Unlowered(f"a function that it calls asks for the {name} of {self.node.name!r}, which is None")
        return super().__getattr__(name)

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


class _Tracer(fx.Tracer):
    """Follows a forward with stand-ins while it computes what they stand for, and says which operation each call is."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, values: Mapping[str, Any], fixed: Mapping[str, Any], more: bool) -> None:
        super().__init__()
        self.given = dict(values)
        self.fixed = fixed
        self.more = more
        self.values: dict[fx.Node, Any] = {}
        self.operations: dict[str, fx.Node] = {}
        self.changed: set[fx.Node] = set()
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
        more = self.create_proxy("placeholder", _MORE, (), {})
        given: dict[str, Any] = {name: self.create_proxy("placeholder", name, (), {}) for name in self.given}
        for name, value in self.fixed.items():
            self.checked(given[name].node, value, f"the argument {name!r}")
        given |= {name: None for name, value in self.fixed.items() if value is None}
        extra = {_MORE: more} if self.more else {}
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
        if not _is_plain(value):
            raise Unlowered(f"it branches on what a value is ({obj.node.name})")
        self.checked(obj.node, value, obj.node.name)
        return bool(value)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "placeholder":
            self.values[node] = {} if target == _MORE else self.given[target]
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
            kwargs = {k: v for k, v in kwargs.items() if k != _MORE}
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        with _Named(self, node):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def checked(self, node: fx.Node, value: Any, what: str) -> None:
        """Lets the code refuse a call in which this is something else."""
        before = self.running
        self.running = True
        self.create_node("call_function", same, (node, value, what), {})
        self.running = before


class _Named(TorchFunctionMode):
    """Names the operations of one node as a trace names them."""

    def __init__(self, tracer: _Tracer, node: fx.Node) -> None:
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

    def __init__(self, tracer: _Tracer) -> None:
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


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


# ---------------------------------------------------------------------- lowering


def lowered(module: nn.Module, operations: Mapping[str, int], args: Any, kwargs: Any) -> Program:
    """The forward of a module as code that stops at operations of it.

    Args:
        module: not hosted yet.
        operations: the operations by their name in the module's own forward, and the number each is called by.
        args, kwargs: of a call of the module, with real tensors; on meta only shapes are compared.

    Raises:
        Unlowered: it cannot be followed, or what it computes is not what the module computes.
    """
    forward = type(module).forward
    signature = inspect.signature(forward)
    source = _Source(module, inspect.unwrap(forward))
    kinds = {p.name: p.kind for p in list(signature.parameters.values())[1:]}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values():
        raise Unlowered("it takes any number of arguments by position")
    bound = signature.bind(module, *args, **kwargs)
    bound.apply_defaults()
    values = dict(list(bound.arguments.items())[1:])
    rest = next((n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), None)
    more = values.pop(rest) if rest else {}
    for name, value in values.items():
        if isinstance(value, Other) and name in source.asked:
            raise Unlowered(f"it asks whether {name!r} is None, which is a {value.kind} that cannot be made again")
    values = {n: None if isinstance(v, Other) else v for n, v in values.items()}
    more = {n: None if isinstance(v, Other) else v for n, v in more.items()}
    defaults = {n: p.default for n, p in signature.parameters.items() if n in values}
    fixed = {n: None if values[n] is None else ... for n in values if n in source.asked}
    read = _names(inspect.unwrap(forward).__code__, type(module))
    settings = {n: v for n, v in vars(module).items() if n in read and n != "training" and _is_plain(v)}
    fixed |= {n: ... for n in source.handed if values.get(n) is not None}
    if any(values.get(n, ...) is not None for n in source.kinds):
        raise Unlowered("it asks for the kind of a value: isinstance or the like")
    fixed |= dict.fromkeys(source.kinds)
    parameters = tuple(Parameter(n, defaults[n]) for n in values) + tuple(Parameter(n, None) for n in more)
    positional = tuple(n for n in values if kinds[n] is not inspect.Parameter.KEYWORD_ONLY)
    was = module.training
    graphs = {}
    try:
        for mode in (False, True):
            module.training = mode
            with _unchanged(module):
                graphs[mode] = _followed(module, forward, {**values, **more}, fixed, rest is not None, operations)
    finally:
        module.training = was
    return Program(positional, parameters, rest is not None, settings, graphs)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Gives a module back as it was: attributes, and what its buffers hold.

    Raises:
        Unlowered: its forward leaves something on it or on a module inside.
    """
    buffers = [(b, b.clone()) for b in module.buffers()]
    before = [(vars(m), dict(vars(m))) for m in module.modules()]
    left: set[str] = set()
    try:
        yield
    finally:
        for number, (state, known) in enumerate(before):
            changed = [n for n, v in state.items() if n not in known or known[n] is not v]
            left.update(n for n in changed if (number == 0 and n != "training") or isinstance(state[n], fx.Proxy))
            if changed:
                state.clear()
                state.update(known)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
    if left:
        raise Unlowered(f"it sets the attribute {min(left)!r}")


def _names(code: types.CodeType, cls: type) -> set[str]:
    """The attributes that a function reads, and the methods of a class that it calls."""
    waiting, found = [code], set[str]()
    while waiting:
        part = waiting.pop()
        waiting += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        for name in set(part.co_names) - found:
            found.add(name)
            member = inspect.getattr_static(cls, name, None)
            member = member.fget if isinstance(member, property) else member
            if isinstance(member, types.FunctionType) and member not in vars(nn.Module).values():
                waiting.append(inspect.unwrap(member).__code__)
    return found


# what changes from call to call and cannot be seen in the arguments
_ASKS = ("is_grad_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled")
_KINDS = ("isinstance", "is_tensor", "type", "hasattr")


class _Source:
    """What can be read off the text of a forward.

    Attributes:
        asked: names that it compares with None.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
        except (OSError, TypeError, SyntaxError):
            raise Unlowered("its source is not there to be read") from None
        # what may be compared with None: here, or in a function that it is handed to
        self.asked: set[str] = set()
        self.handed: set[str] = set()
        self.kinds: list[str] = []
        arguments: ast.arguments = tree.body[0].args  # type: ignore[attr-defined]
        own, rest = arguments.args[0].arg if arguments.args else "", arguments.kwarg and arguments.kwarg.arg
        handed_on = {id(k.value) for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords if not k.arg}
        for node in ast.walk(tree):
            if isinstance(node, ast.With):
                raise Unlowered("it runs a part of itself in a `with` block")
            if isinstance(node, ast.Name) and node.id == rest and id(node) not in handed_on:
                raise Unlowered("it looks at its further keyword arguments")
            if isinstance(node, ast.Attribute):
                if node.attr in _ASKS:
                    raise Unlowered(f"it asks {node.attr!r}")
                if node.attr == "training" and not (isinstance(node.value, ast.Name) and node.value.id == own):
                    raise Unlowered("it asks for the mode of another module")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if called in _KINDS and node.args and not _is_own(node.args[0]):
                    self.kinds.append(node.args[0].id if isinstance(node.args[0], ast.Name) else "")
            if isinstance(node, ast.Compare) and any(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
                if not any(isinstance(n, ast.Constant) for n in (node.left, *node.comparators)):
                    raise Unlowered("it asks whether two values are the same object")
                self.asked |= {n.id for n in (node.left, *node.comparators) if isinstance(n, ast.Name)}
            if isinstance(node, ast.Call) and not _is_own(node.func):
                given = (*node.args, *(k.value for k in node.keywords))
                self.handed |= {n.id for n in given if isinstance(n, ast.Name)}


def _is_own(called: ast.expr) -> bool:
    """Whether what is called is a part of the module itself, such as a child."""
    while isinstance(called, ast.Attribute | ast.Subscript):
        called = called.value
    return isinstance(called, ast.Name) and called.id == "self"


def _followed(
    module: nn.Module,
    forward: Callable[..., Any],
    values: Mapping[str, Any],
    fixed: Mapping[str, Any],
    more: bool,
    operations: Mapping[str, int],
) -> fx.Graph:
    tracer = _Tracer(module, copy.copy(values), fixed, more)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with _unchanged(module):
                expected = forward(module, **_own(values))
        except Unlowered:
            raise
        except Exception as error:
            raise Unlowered(f"it fails on values of the traced shapes: {error}") from error
        torch.manual_seed(0)
        tracer.given = _own(values)
        try:
            graph = tracer.follow(module, forward)
        except Unlowered:
            raise
        except Exception as error:
            raise Unlowered(f"it cannot be followed: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    output = next(n for n in graph.nodes if n.op == "output")
    _compare(expected, fx.node.map_arg(output.args[0], lambda n: tracer.values[n]))
    _guard(graph, {n for n, v in tracer.given.items() if v is not None} - set(fixed))
    _hand_on(graph)
    _stop(graph, tracer, operations)
    graph.lint()
    return graph


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in tensors of their own, which a forward may write to."""
    clone = lambda v: v.clone() if isinstance(v, Tensor) else v  # noqa: E731
    return {n: tuple(map(clone, v)) if type(v) is tuple else clone(v) for n, v in values.items()}


def _compare(expected: Any, found: Any) -> None:
    """Whether lowered code computes what the module computes, bit for bit."""
    _refuse_kind(expected)
    one, two = list(tensors(expected)), list(tensors(found))
    if [p for p, _ in one] != [p for p, _ in two]:
        raise Unlowered("the code returns another structure than it does")
    for (_, a), (_, b) in zip(one, two, strict=True):
        if a.shape != b.shape or (not a.is_meta and not torch.equal(a.nan_to_num(), b.nan_to_num())):
            raise Unlowered("the code computes something else than it does")


def _refuse_kind(value: Any) -> None:
    """Generated code returns plain containers only."""
    if isinstance(value, Mapping | tuple | list) and type(value) not in (tuple, list, dict):
        raise Unlowered(f"it returns a {type(value).__name__}, which code cannot write down")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ():
        _refuse_kind(part)


def _guard(graph: fx.Graph, given: set[str]) -> None:
    """Where an argument goes to a function and not to children alone, a call without it takes another way."""
    arguments = [n for n in graph.nodes if n.op == "placeholder"]
    for node in arguments:
        if node.target in given and any(user.op != "call_module" for user in node.users):
            with graph.inserting_after(arguments[-1]):
                what: Any = (node, ..., f"the argument {node.target!r}")
                graph.create_node("call_function", same, what, {})


def _hand_on(graph: fx.Graph) -> None:
    """Further keyword arguments go where the forward gives its own."""
    more = next(n for n in graph.nodes if n.op == "placeholder")
    for node in list(graph.nodes):
        if _MORE not in node.kwargs:
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k != _MORE}
        if node.op != "call_module":
            raise Unlowered("it gives its further keyword arguments to a function")
        with graph.inserting_before(node):
            child = graph.create_node("get_attr", node.target)
            call = graph.create_node("call_function", call_with, (child, more, *node.args), kwargs)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    if len(more.users) != sum(n.target is call_with for n in graph.nodes):
        raise Unlowered("it looks at its further keyword arguments")


def _stop(graph: fx.Graph, tracer: _Tracer, operations: Mapping[str, int]) -> None:
    """Hands the values of some operations over to the steps of the host."""
    for name, slot in operations.items():
        node = tracer.operations.get(name)
        if (
            node is None
            or node.op not in ("call_function", "call_method")
            or list(tracer.operations.values()).count(node) != 1
        ):
            raise Unlowered(f"the operation {name!r} is a part of something larger in it")
        if not isinstance(tracer.values[node], Tensor):
            raise Unlowered(f"the operation {name!r} gives several values in it")
        if node in tracer.changed and any(len(i.users) > 1 for i in node.all_input_nodes[:1]):
            raise Unlowered(f"the operation {name!r} changes a tensor that is read elsewhere too")
        with graph.inserting_after(node):
            host = graph.create_node("get_attr", SELF)
        with graph.inserting_after(host):
            stop = graph.create_node("call_function", at_operation, (host, slot, node))
        for user in [u for u in node.users if u is not stop]:
            user.replace_input_with(node, stop)
