"""The forward of one module written down as code that stops at some of its operations. Floor 4.

Before the code is used it is run beside the module's own forward.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..tracing.fakes import copy_over
from ..tracing.parts import tensors
from .following import MORE, Tracer, is_object
from .program import SELF, Other, Parameter, Program, Unlowered, at_operation, call_with, same
from .settings import Setting, settings_of
from .source import Source, refuse_catching

# the number that tells operations of one kind apart
_KIND = re.compile(r"_\d+$")


def lowered(module: nn.Module, operations: Mapping[str, int], traced: Sequence[str], args: Any, kwargs: Any) -> Program:
    """The forward of a module as code that stops at operations of it.

    Args:
        module: not hosted yet.
        operations: the operations by their name in the module's own forward, and the number each is called by.
        traced: all operations of a call of it, in order, when the model was traced.
        args, kwargs: of a call of the module, with real tensors; on meta only shapes are compared.

    Raises:
        Unlowered: it cannot be followed, or what it computes is not what the module computes.
    """
    forward = type(module).forward
    signature = inspect.signature(forward)
    source = Source(module, inspect.unwrap(forward))
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
            why = f"it asks whether {name!r} is None, which is a {value.kind} that cannot be made again"
            optional = signature.parameters[name].default is None
            remedy = "for many models, ag.trace(model, …, use_cache=False) leaves out a cache"
            raise Unlowered(why, f"trace without it: {remedy}" if optional else "")
    values = {n: None if isinstance(v, Other) else v for n, v in values.items()}
    more = {n: None if isinstance(v, Other) else v for n, v in more.items()}
    defaults = {n: p.default for n, p in signature.parameters.items() if n in values}
    refuse_catching(inspect.unwrap(forward), type(module))
    if any(n not in values or not (values[n] is None or is_object(values[n])) for n in source.kinds):
        raise Unlowered("it asks for the kind of a value: isinstance or the like")
    looked_at = source.asked.union(source.handed, source.kinds)
    fixed = {n: None if value is None else ... for n, value in values.items() if n in looked_at}
    parameters = tuple(Parameter(n, defaults[n]) for n in values) + tuple(Parameter(n, None) for n in more)
    positional = tuple(n for n in values if kinds[n] is not inspect.Parameter.KEYWORD_ONLY)
    values |= more
    way = _Way(module, forward, rest is not None, operations, traced)
    code = way.followed(values, fixed)
    ways: dict[tuple[str, ...], dict[bool, fx.Graph] | str] = {(): code}
    # such as a mask: some calls have none, or the trace made one that the model does not make
    needed = _needed(code)
    for left_out in itertools.chain.from_iterable(itertools.combinations(needed, i + 1) for i in range(len(needed))):
        if any(isinstance(ways.get((name,)), str) for name in left_out):
            continue
        none = dict.fromkeys(left_out)
        try:
            ways[left_out] = way.followed({**values, **none}, {**fixed, **none})
        except Unlowered as error:
            ways[left_out] = str(error)
    return Program(positional, parameters, rest is not None, list(way.settings.values()), ways)


def _needed(code: Mapping[bool, fx.Graph]) -> list[str]:
    """The arguments without which a forward takes another way."""
    nodes = (node for graph in code.values() for node in graph.nodes if node.target is same)
    checked = (node.args for node in nodes if node.args[1] is ...)
    return list(dict.fromkeys(value.target for value, *_ in checked if value.op == "placeholder"))


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Gives a module back as it was: attributes, and what its buffers hold.

    Raises:
        Unlowered: its forward leaves something on it or on a module inside.
    """
    buffers = [(b, b.clone()) for b in module.buffers()]
    before = [(vars(m), dict(vars(m))) for m in module.modules()]
    held = [
        (number, name, value, copy.copy(value))
        for number, (_, known) in enumerate(before)
        for name, value in known.items()
        if type(value) in (dict, list)
    ]
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
        for number, name, value, contents in held:
            now, then = _parts(value), _parts(contents)
            if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
                left |= {name} if number == 0 or any(isinstance(part, fx.Proxy) for part in now) else set()
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
    if left:
        raise Unlowered(f"it sets the attribute {min(left)!r}")


def _parts(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


@dataclass(frozen=True, slots=True)
class _Way:
    """How the forward of one module is followed.

    Attributes:
        more: it takes further keyword arguments.
        operations: those to stop at, and the number each is called by.
        traced: all operations of a call of it, in order, when the model was traced.
        settings: what it read that code has as it was, by place; on all ways that were followed.
    """

    module: nn.Module
    forward: Callable[..., Any]
    more: bool
    operations: Mapping[str, int]
    traced: Sequence[str]
    settings: dict[Any, Setting] = field(default_factory=dict)

    def followed(self, values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[bool, fx.Graph]:
        """The code in eval and in training.

        Args:
            values: the arguments.
            fixed: those that are a value in each call (`...`) or None in each call.

        Raises:
            Unlowered: it cannot be followed with them.
        """
        was = self.module.training
        graphs = {}
        try:
            for mode in (False, True):
                self.module.training = mode
                graphs[mode] = self._in_mode(values, fixed)
        finally:
            self.module.training = was
        return graphs

    def _in_mode(self, values: Mapping[str, Any], fixed: Mapping[str, Any]) -> fx.Graph:
        given = _own(values)
        try:
            with _unchanged(self.module), _at_random():
                found, expected = settings_of(self.module, lambda: self.forward(self.module, **given))
        except Unlowered:
            raise
        except Exception as error:
            raise Unlowered(f"it fails on values of the traced shapes: {error}") from error
        self.settings.update((setting.place, setting) for setting in found)
        try:
            tracer, graph = self._follow(values, fixed, fixes_dtypes=False)
        except Unlowered:
            # a function may have to know a dtype
            tracer, graph = self._follow(values, fixed, fixes_dtypes=True)
        output = next(n for n in graph.nodes if n.op == "output")
        _refuse_kind(expected)
        _compare((expected, given), (fx.node.map_arg(output.args[0], lambda n: tracer.values[n]), tracer.given))
        _guard(graph, {n for n, v in tracer.given.items() if v is not None} - set(fixed))
        _hand_on(graph)
        same_as = counterparts(self.traced, list(tracer.operations))
        for name, slot in self.operations.items():
            _stop(graph, tracer, name, same_as.get(name), slot)
        graph.lint()
        return graph

    def _follow(
        self, values: Mapping[str, Any], fixed: Mapping[str, Any], fixes_dtypes: bool
    ) -> tuple[Tracer, fx.Graph]:
        tracer = Tracer(self.module, _own(values), fixed, self.more, fixes_dtypes)
        try:
            with _unchanged(self.module), _at_random():
                return tracer, tracer.follow(self.module, self.forward)
        except Unlowered:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise Unlowered(f"it cannot be followed: {why}") from error


@contextmanager
def _at_random() -> Iterator[None]:
    """Without gradients, and with the same random numbers each time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def counterparts(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """Which operation of one run of a forward is which of another run, as far as that is beyond doubt.

    Two runs may part somewhere, as where one has a mask: the operations before are the same ones, and so are those
    after the last difference. One that could be either of two is none.

    >>> counterparts(["view", "mul", "add", "add_1", "view_1"], ["view", "mul", "add", "view_1"])
    {'view': 'view', 'mul': 'mul', 'view_1': 'view_1'}
    """
    mine, theirs = [[_KIND.sub("", n) for n in some] for some in (names, others)]
    if mine == theirs:
        return dict(zip(names, others, strict=True))
    before, after = _in_common(mine, theirs), _in_common(mine[::-1], theirs[::-1])
    doubtful = max(0, before + after - min(len(mine), len(theirs)))
    before, after = before - doubtful, after - doubtful
    last = zip(names[len(names) - after :], others[len(others) - after :], strict=True)
    return dict([*zip(names[:before], others[:before], strict=True), *last])


def _in_common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many of the first are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in tensors and objects of their own, which a forward may write to."""
    return {n: v.clone() if isinstance(v, Tensor) else copy_over(v, torch.clone) for n, v in values.items()}


def _compare(expected: Any, found: Any) -> None:
    """Whether lowered code computes and writes into its arguments, bit for bit, what the module does."""
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
        if MORE not in node.kwargs:
            continue
        kwargs = {k: v for k, v in node.kwargs.items() if k != MORE}
        if node.op != "call_module":
            raise Unlowered("it gives its further keyword arguments to a function")
        with graph.inserting_before(node):
            child = graph.create_node("get_attr", node.target)
            call = graph.create_node("call_function", call_with, (child, more, *node.args), kwargs)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    if len(more.users) != sum(n.target is call_with for n in graph.nodes):
        raise Unlowered("it looks at its further keyword arguments")


def _stop(graph: fx.Graph, tracer: Tracer, name: str, own: str | None, slot: int) -> None:
    """Hands the value of an operation over to the steps of the host.

    Args:
        name: of the operation when the model was traced.
        own: on the way that is followed; None where no operation of it is certainly this one.
    """
    if own is None:
        raise Unlowered(f"it runs other operations than when it was traced: {name!r} may not be one of them")
    node = tracer.operations[own]
    if node.op not in ("call_function", "call_method") or list(tracer.operations.values()).count(node) != 1:
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
