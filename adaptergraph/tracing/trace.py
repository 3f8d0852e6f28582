"""`nn.Module` → `Graph`: the model is run once on fake tensors, under hooks and a torch-function mode. Floor 4.

A trace is a map, not a program: it says what reads what, and is never replayed. The model is left as it was found.
"""

from __future__ import annotations

import functools
import gc
import random
import re
import sys
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.nn.parameter import is_lazy

from ..errors import GraphError, here
from ..graph import Graph, leaves
from ..hosting.attachment import refuse_hosted
from ..imported import Aside, Call, Imported, Module
from ..node import Node, Param
from ..shapes import quiet, uncollected
from .arguments import described, example_of
from .calls import Made, Record
from .fakes import Faker, Fakes, OtherDtype, clear_caches, copy_over
from .identity import Event, Events, asking, goes_another_way, moves_memory, unlike_itself
from .parts import PLAIN, tensors
from .record import Operations, Recorder

# random states and how torch.compile behaves are of the whole process: each run puts back what it found
_ONE_AT_A_TIME = threading.RLock()


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """The graph of a model: named modules, the operations between them, shapes; all frozen.

    Args:
        model: any module; it is run once, in eval mode, on fake tensors, and left exactly as it was. While that takes
            its parameters are fake ones: no other thread may run it then.
        args, kwargs: what its forward takes, for example a tokenized sentence. Of tensors only shapes and dtypes
            matter, unless the forward looks at their values. The graph has what runs in eval with these arguments: a
            module that is called only while training, or where an `if` takes its other way, is none of it.

    Raises:
        GraphError: the forward fails with these arguments, or needs real data that a meta model has not; or the model
            has bodies already, or shares a module with one that has; or it asks whether two tensors are one object, and
            goes another way where a body would make two of them, or for the address of memory that a body replaces.

    >>> import adaptergraph as ag
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> ag.trace(model, torch.ones(1, 8))
    <Graph: imported Sequential, 4 nodes, outputs 2>
    """
    _refuse(model)
    with uncollected():
        asked = asking(model.modules())
        recorder = _compared(model, args, kwargs, asked) if asked else recorded(model, args, kwargs, Recorder)
        if recorder.moved:
            raise moves_memory(model, recorder.moved[0])
        return _Finish(model, recorder, args, kwargs).graph()


def _compared(model: nn.Module, args: Any, kwargs: Any, asked: list[str]) -> Recorder:
    """What a recorder saw, if the model does the same where each tensor is the very object it was before.

    Raises:
        GraphError: it does not, or cannot be compared as it does something else in each run.
    """

    def make(model: nn.Module, apart: bool) -> Recorder:
        recorder = Recorder(model)
        recorder.events, recorder.apart = Events(), apart
        return recorder

    def run(apart: bool) -> tuple[Recorder, list[Event]]:
        recorder = recorded(model, args, kwargs, partial(make, apart=apart))
        assert recorder.events is not None
        return recorder, recorder.events.found

    # what a library computes once for all runs is there in the second pair of them
    for _ in range(2):
        (_, own), (recorder, traced) = run(False), run(True)
        if own == traced:
            return recorder
    for before, apart in ((own, False), (traced, True)):
        if before != (again := run(apart)[1]):
            raise unlike_itself(model, asked, before, again)
    raise goes_another_way(model, asked, own, traced)


def recorded(model: nn.Module, args: Any, kwargs: Any, make: Callable[..., Recorder]) -> Recorder:
    """Runs a model once, on fake tensors if that can be, and gives what a recorder of this kind saw.

    Raises:
        GraphError: the forward fails with these arguments.
    """
    errors: list[_Error] = []
    with _ONE_AT_A_TIME:
        for attempt in (_fake, _real):
            recorder = attempt(model, args, kwargs, errors, make)
            if recorder is not None:
                return recorder
    error, path = next((e for e in errors if isinstance(e[0], OtherDtype)), errors[-1])
    raise _failed(model, args, kwargs, error, path) from error


def _refuse(model: Any) -> None:
    """Models that cannot be traced, whatever the arguments."""
    if not isinstance(model, nn.Module):
        raise GraphError(f"trace takes an nn.Module, not {type(model).__name__}", source=here())
    cls = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise GraphError(
            "this model went through torch.compile, which hides its modules",
            source=here(),
            hint="trace the model itself, then compile the adapted one: torch.compile(graph.compile())",
        )
    for path, module in model.named_modules():
        where = f", in {path!r}" if path else ""
        if "_adaptergraph" in module.__dict__:
            raise GraphError(
                f"this {cls} has bodies already{where}",
                source=here(),
                hint="add to its graph instead, with what it has learnt: "
                "ag.graph_of(model).splice(…).compile(state=ag.adapter_state(model))",
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise GraphError(
                f"this {cls} is TorchScript{where}, which hides what its forward does",
                source=here(),
                hint="trace the module it was made of, before torch.jit.script or torch.jit.trace",
            )
        if type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise GraphError(
                f"this {cls} is wrapped in {type(module).__name__}{where}",
                source=here(),
                hint="trace the model inside it (model.module), then wrap the compiled one",
            )
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if is_lazy(parameter):
                raise GraphError(
                    f"parameter {full!r} of this {cls} has no shape yet",
                    source=here(),
                    hint="call the model once with these arguments, then trace it",
                )
            if type(parameter).__name__ == "DTensor":
                raise GraphError(
                    f"parameter {full!r} of this {cls} is sharded",
                    source=here(),
                    hint="trace and compile the whole model first, then fully_shard the compiled one",
                )
    refuse_hosted(model)


_Error = tuple[Exception, str]
_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def _failed(model: nn.Module, args: Any, kwargs: Any, error: Exception, path: str) -> GraphError:
    """What to say when the forward cannot be run."""
    cls = type(model).__name__
    place = [("in", f"{path} ({type(model.get_submodule(path)).__name__})")] if path else []
    given = [(k, v) for k, v in (*enumerate(args), *kwargs.items())]
    rows = [(f"argument {k}", described(v)) for k, v in given]
    if isinstance(error, _VALUES):
        who, hint = "the model", "load the weights first, or trace a small model of the same class with weights"
        for name, value in given:
            if isinstance(value, Tensor) and value.is_meta:
                who, hint = f"argument {name}", "trace it with arguments on a real device"
        return GraphError(
            f"the forward of {cls} looks at the values of tensors, and {who} has none",
            sides=[*rows, *place],
            source=here(),
            hint=hint,
        )
    text = str(error).strip().splitlines()
    homes = dict.fromkeys(str(p.device) for p in model.parameters() if not p.is_meta)
    away = [k for k, v in given if isinstance(v, Tensor) and not v.is_meta and homes and str(v.device) not in homes]
    hint = "call the model with the same arguments first; ag.trace needs what model(…) needs"
    if away:
        hint = (
            f"the parameters are on {', '.join(homes)}: move argument {away[0]} there with .to({next(iter(homes))!r})"
        )
    elif isinstance(error, OtherDtype):
        wrong = [k for k, v in given if isinstance(v, Tensor) and v.dtype == error.given]
        if wrong:
            hint = f"the parameters are {error.wanted}: give argument {wrong[0]} as that, with .to({error.wanted})"
    elif any(isinstance(v, Mapping) for v in args):
        hint = "arguments by name need two stars: ag.trace(model, **batch)"
    elif not any(True for _ in tensors((args, kwargs))):
        hint = "there is no tensor among them: give what model(…) takes, for example what a tokenizer returns"
    elif len(given) == len(args) == 1 and isinstance(args[0], list | tuple):
        hint = "several arguments need a star: ag.trace(model, *batch); by name two: ag.trace(model, **batch)"
    return GraphError(
        f"the forward of {cls} fails with these arguments",
        sides=[*rows, *place, ("it raises", f"{type(error).__name__}: {text[0] if text else ''}")],
        source=here(),
        hint=hint,
    )


# ---------------------------------------------------------------------- running the model once


def _fake(model: nn.Module, args: Any, kwargs: Any, errors: list[_Error], make: Any) -> Recorder | None:
    return _attempt(model, args, kwargs, errors, make(model), Fakes())


def _real(model: nn.Module, args: Any, kwargs: Any, errors: list[_Error], make: Any) -> Recorder | None:
    """A forward that looks at values (`.item()`) is run on the real tensors, if there are any."""
    if any(t.is_meta or isinstance(t, FakeTensor) for t in (*_held(model), *(t for _, t in tensors((args, kwargs))))):
        return None
    kept = [(t, t.clone()) for t in _held(model) if not isinstance(t, nn.Parameter)]
    recorder = _attempt(model, args, kwargs, errors, make(model), None)
    with torch.no_grad():
        for tensor, values in kept:
            if tensor.shape != values.shape:
                tensor.data = values
            elif not torch.equal(tensor, values):
                tensor.copy_(values)
    return recorder


def _attempt(
    model: nn.Module, args: Any, kwargs: Any, errors: list[_Error], recorder: Recorder, mode: Fakes | None
) -> Recorder | None:
    """One run; if it fails, what it raised is added to the errors."""
    failed = False
    try:
        _run(recorder, model, args, kwargs, mode)
    except Exception as error:
        failed = True
        errors.append((error, recorder.failed[1] if recorder.failed else ""))
        recorder.failed = None
        part: BaseException | None = error
        while part is not None:
            # the frames of a traceback hold tensors of the run, and so does the object that lacks an attribute
            part.__traceback__ = None
            if isinstance(part, AttributeError):
                part.obj = None
            part = part.__cause__ or part.__context__
    _clear_caches(recorder.forget(), model)
    return None if failed else recorder


def _run(recorder: Recorder, model: nn.Module, args: Any, kwargs: Any, mode: Fakes | None) -> None:
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_drawn_again())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_undisturbed(recorder.modules.values()))
        stack.callback(recorder.empty)
        if mode is not None:
            faked = Faker(mode)
            faked.swap(recorder.modules.values())
            args, kwargs = mapped(args, faked.given), mapped(kwargs, faked.given)
            recorder.parameters = {id(faked(p)): n for n, p in recorder.named}
            for twin in (*faked.twins.values(), *faked.further):
                recorder.hold(twin)
            stack.enter_context(mode)
        else:
            recorder.real = True
            args, kwargs = mapped(args, torch.clone), mapped(kwargs, torch.clone)
            recorder.parameters = {id(p): n for n, p in recorder.named}
            for tensor in _held(model):
                recorder.hold(tensor)
        model.eval()
        recorder.arguments(args, kwargs)
        recorder.watch()
        stack.enter_context(Operations(recorder))
        recorder.done(model(*args, **kwargs))


def _held(model: nn.Module) -> list[Tensor]:
    """Every tensor that is a parameter, a buffer or an attribute of a module."""
    tables = [t for m in model.modules() for t in (m._parameters, m._buffers, vars(m))]
    return list({id(t): t for table in tables for t in table.values() if isinstance(t, Tensor)}.values())


def mapped(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """The same arguments with other tensors."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(mapped(v, fn) for v in value)
    if type(value) is dict:
        return {k: mapped(v, fn) for k, v in value.items()}
    return value if type(value) in PLAIN else copy_over(value, fn)


@contextmanager
def _undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Every module's attributes, what its dicts, lists and sets hold, and its mode are afterwards what they were."""
    plain = (dict, OrderedDict, defaultdict, list, set)
    attributes = [(vars(m), dict(vars(m))) for m in modules]
    # most are empty, and stay so
    held: list[Any] = [
        (v, _contents(v) if v else ()) for table, _ in attributes for v in table.values() if type(v) in plain
    ]
    try:
        yield
    finally:
        for value, contents in [*held, *attributes]:
            if value or contents:
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(contents)


@contextmanager
def _drawn_again() -> Iterator[None]:
    """The generators of Python and of numpy are afterwards where they were, so each run draws the same from them."""
    state, numpy = random.getstate(), sys.modules.get("numpy.random")
    own = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.set_state(own)


def _contents(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _clear_caches(seen: list[weakref.ref[Tensor]], model: nn.Module) -> None:
    """A forward that caches tensors must not keep fake ones: caches are cleared, anything else is an error."""
    if not _alive(seen):
        return
    gc.collect()
    left = _alive(seen)
    if not left:
        return
    clear_caches(left)
    left.clear()
    if _alive(seen):
        gc.collect()
    left = _alive(seen)
    if left:
        owners = {type(o).__name__ for t in left for o in gc.get_referrers(t) if o is not left}
        raise GraphError(
            f"the forward of {type(model).__name__} keeps tensors between calls, in: {', '.join(sorted(owners))}",
            source=here(),
            hint="these hold fake tensors now: empty them, call the model once on real ones, and trace it again",
        )


def _alive(refs: list[weakref.ref[Tensor]]) -> list[FakeTensor]:
    return [t for t in (ref() for ref in refs) if isinstance(t, FakeTensor)]


# ---------------------------------------------------------------------- from events to a graph


def _rank(value: tuple[Record, Any]) -> int:
    """How many dimensions the value of an event has."""
    record, key = value
    return len(record.outs[key][0])


class _Finish:
    """Names for the events, edges between the names, and the tables beside them."""

    def __init__(self, model: nn.Module, recorder: Recorder, args: Any, kwargs: Any) -> None:
        self.model = model
        self.recorder = recorder
        self.example = example_of(model, args, kwargs)
        copied = functools.cache(lambda tensor: tensor.detach().clone())
        self.given = mapped(args, copied), mapped(kwargs, copied)
        self.nodes: dict[str, Node] = {}
        self.scopes: dict[str, str] = {}
        self.readers: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.parts: dict[tuple[Record, Any], str] = {}
        self.without: set[tuple[Record, Any]] = set()

    def graph(self) -> Graph:
        axes = self.recorder.axes
        axes.settle()
        self.without = axes.assume_last(_rank) if not axes.convolutions else set()
        own: dict[str, dict[str, Param]] = {}
        params: dict[str, Param] = {}
        tied: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in self.recorder.named:
            if id(tensor) in first:
                tied[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            params[name] = Param(tuple(tensor.shape), tensor.dtype)
            owner, _, last = name.rpartition(".")
            own.setdefault(owner, {})[last] = params[name]
        for record in self.recorder.inputs:
            record.name = f"/{record.path}" if record.path in self.recorder.modules else record.path
            self.add(record, [], {})
        for record in self.recorder.root:
            self.name(record)
            if record.outs or record.silent:
                reads = [self.edge(r, k) for r, k in record.reads]
                self.add(record, reads, own.get(record.path, {}) if record.kind == "module" else {})
            for param in record.params:
                if param.rpartition(".")[0] != record.path or record.kind == "op":
                    self.readers.setdefault(param, record.name)
        outputs = self.outputs()
        for made in (made for calls in self.recorder.calls.values() for made in calls if made is not None):
            for _, value in made.inputs:
                self.edge(*value)
        called = {p: self.module(p, m) for p, m in self.recorder.modules.items()}
        imported = Imported(
            cls=type(self.model).__name__,
            modules=called,
            params=params,
            tied=tied,
            readers=self.readers,
            scopes=self.scopes,
            asides=tuple(dict.fromkeys(self.asides())),
            kept=tuple(self.kept(outputs)),
            walked=self.recorder.walks.found,
            overwritten=tuple(self.overwritten()),
            example=self.example,
            given=self.given,
            host=self.model,
        )
        return Graph._of(nodes=self.nodes, outputs=outputs, imported=imported).check()

    def name(self, record: Record) -> None:
        if record.kind == "module":
            record.name = f"{record.path}@{record.index}" if record.index else record.path
            return
        stem = f"{record.scope}/{record.op}"
        count = self.counts.get(stem, 0)
        self.counts[stem] = count + 1
        record.name = f"{stem}_{count}" if count else stem

    def add(self, record: Record, reads: list[str], params: Mapping[str, Param]) -> None:
        inputs = tuple(dict.fromkeys(r for r in reads if r != record.name))
        name = record.name or type(self.model).__name__
        record.name = name
        shape, dtype = (None, None) if record.silent else record.outs[record.main]
        axis = self.axis(record, record.main, shape)
        self.nodes[name] = Node(record.op, inputs, name, shape, dtype, params=params, axis=axis)
        if record.kind != "input":
            self.scopes[name] = record.scope

    def axis(self, record: Record, key: Any, shape: Sequence[int] | None) -> int | None:
        """Where a value has its features: without convolutions in the last dimension, unless it has none.

        A vector has none: the one dimension of a score for each row is the batch.
        """
        axes = self.recorder.axes
        last = len(shape or ()) > 1 and not axes.convolutions and (record, key) not in self.without
        return axes.known.get((record, key), -1 if last else None)

    def edge(self, record: Record, key: Any) -> str:
        """The name of a value; a further output of a node becomes a node of its own."""
        if (record, key) not in self.parts:
            final = record.final()
            whole = final is record and key == final.main
            self.parts[record, key] = final.name if whole else self.part(record, final, key)
        return self.parts[record, key]

    def part(self, record: Record, final: Record, key: Any) -> str:
        """The node of a further output."""
        inner = [] if final is record else [record.op]
        path = [] if key == () else key if isinstance(key, tuple) else [key]
        label = ":".join([final.name, *inner, *(str(k).lstrip(".") for k in path)])
        label = re.sub(r"[^\w.@/:]", "_", label)
        while label in self.nodes:
            # two operations of one name, inside one node
            label += "_"
        shape, dtype = record.outs[key]
        axis = self.axis(record, key, shape)
        self.nodes[label] = Node("output", (final.name,), label, shape, dtype, axis=axis)
        self.scopes[label] = final.scope
        return label

    def module(self, path: str, module: nn.Module) -> Module:
        return Module(type(module).__name__, tuple(map(self.call, self.recorder.calls.get(path, ()))))

    def call(self, made: Made | None) -> Call:
        if made is None:
            return Call(None)
        known = [(p, self.edge(*v)) for p, v in made.parts if p == made.first or self.is_read(*v)]
        output = next((name for p, name in known if p == made.first), None)
        parts = tuple((":".join(str(k).lstrip(".") for k in p), name, p) for p, name in known if p)
        inputs = tuple((name, self.edge(*value)) for name, value in made.inputs)
        return Call(output, made.first or (), inputs, made.caller, parts)

    def is_read(self, record: Record, key: Any) -> bool:
        """Whether a value is a node already: the main output of one, or an output that something reads."""
        return (record.final() is record and key == record.main) or (record, key) in self.parts

    def asides(self) -> Iterator[Aside]:
        """What came to its reader past the entry or exit of a module that is given or returns it."""
        known = [(scope, value) for scope, value, _ in self.recorder.claims]
        given = [(scope, value, passed) for scope, value, past in self.recorder.claims for passed in sorted(past)]
        ways = [(Counter(known), Counter(given))]
        for record in self.recorder.root:
            if record.past:
                read = ((record.name, value, passed) for value, past in record.past for passed in sorted(past))
                ways.append((Counter((record.name, value) for value in record.reads), Counter(read)))
        for scope, value, caller in self.recorder.shown:
            if self.is_read(*value):
                yield Aside(scope, "exit", self.edge(*value), caller)
        for reads, past in ways:
            for (reader, value, (scope, at, always)), times in past.items():
                if self.is_read(*value) and self.may_stand(scope, at, always, value):
                    whole = not always and times == reads[reader, value]
                    yield Aside(scope, at, None if always else self.edge(*value), reader, whole)
        for operation, reader in self.recorder.tied:
            yield Aside(operation.name, "exit", None, reader)

    def kept(self, outputs: Any) -> list[tuple[str, str]]:
        """What somebody may read when the forward has returned, beside what it returns, and the call whose it is."""
        found: dict[str, dict[str, None]] = {}
        for value, scope in self.recorder.kept:
            name = self.edge(*value) if self.is_read(*value) else value[0].final().name
            found.setdefault(name, {})[scope] = None
        out = set(leaves(outputs))
        names = [name for name, node in self.nodes.items() if name in found and node.op != "input" and name not in out]
        return [(name, scope) for name in names for scope in found[name]]

    def overwritten(self) -> list[str]:
        """The values that are no longer in their memory when the forward has returned."""
        found = {self.edge(*v) for v in self.recorder.overwritten if self.is_read(*v)}
        return [name for name in self.nodes if name in found]

    def may_stand(self, scope: str, at: str, always: bool, value: tuple[Record, Any]) -> bool:
        """Whether a body at this entry or exit replaces this value, or changes what is read all the same."""
        path, _, index = scope.partition("@")
        made = self.recorder.calls[path][int(index or 0)]
        if always or made is None:
            return always
        return value in (v for _, v in (made.inputs if at == "entry" else made.parts))

    def outputs(self) -> Any:
        found = {":".join(str(k).lstrip(".") for k in path): self.edge(*v) for path, v in self.recorder.results}
        if not found:
            raise GraphError(
                f"the forward of {type(self.model).__name__} returns no tensor",
                source=here(),
                hint="return a tensor, or a tuple, list, dict or dataclass with one",
            )
        return next(iter(found.values())) if list(found) == [""] else found
