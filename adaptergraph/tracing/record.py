"""What happens while a model runs once: which module or operation made which tensor from which. Floor 4."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from .arguments import bound, by_name
from .memory import another, can_be_viewed, overlap, place, storage, version
from .parts import PLAIN, replaced, tensors
from .ways import NOTHING, Passed, Ways

_numbers = itertools.count()
# of memory that is written into so many tensors are told apart; further ones are trusted to be arguments and results
_CROWD = 32


@dataclass(slots=True, eq=False)
class Record:
    """One event: an input, an operation, or a call of a module without children.

    `past` says which of the values that it reads came to it past entries and exits of modules.
    """

    kind: str
    op: str
    scope: str
    path: str = ""
    index: int = 0
    reads: list[tuple[Record, Any]] = field(default_factory=list)
    params: dict[str, None] = field(default_factory=dict)
    outs: dict[Any, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    into: Record | None = None
    name: str = ""
    past: list[tuple[tuple[Record, Any], frozenset[Passed]]] = field(default_factory=list)
    number: int = field(default_factory=_numbers.__next__)

    def final(self) -> Record:
        """The event this one is a part of, or itself."""
        record = self
        while record.into is not None:
            record = record.into
        return record

    @property
    def main(self) -> Any:
        """The key of the first float tensor it gives, or else of its first tensor."""
        floats = (k for k, (_, dtype) in self.outs.items() if dtype.is_floating_point)
        return next(floats, next(iter(self.outs), None))


@dataclass(slots=True, eq=False)
class _Frame:
    """A module call that is running."""

    path: str
    index: int
    scope: str
    outer: _Frame | None = None
    versions: dict[int, int] = field(default_factory=dict)
    reads: list[Any] = field(default_factory=list)
    past: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    calls_children: bool = False
    given: list[tuple[Tensor, Tensor, Any]] = field(default_factory=list)
    lent: list[Tensor] = field(default_factory=list)
    returned: dict[int, Tensor] = field(default_factory=dict)
    number: int = field(default_factory=_numbers.__next__)


@dataclass(slots=True, eq=False)
class Made:
    """One call of a module that returned: who made it, where its first float tensor sits, all it returned and read."""

    caller: str
    first: tuple[Any, ...] | None
    parts: list[tuple[tuple[Any, ...], tuple[Record, Any]]]
    inputs: list[tuple[str, Any]]


class Recorder:
    """The events of one run, and which event each tensor came from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.paths = {id(m): n for n, m in self.modules.items()}
        self.signatures: dict[int, inspect.Signature] = {}
        self.named = list(model.named_parameters(remove_duplicate=False))
        self.parameters: dict[int, str] = {}
        self.values: dict[int, tuple[Record, Any]] = {}
        self.storages: dict[int, list[Tensor]] = {}
        self.written: set[int] = set()
        self.alive: list[Tensor] = []
        self.owned: set[int] = set()
        self.ways = Ways()
        self.claims: list[tuple[str, tuple[Record, Any], frozenset[Passed]]] = []
        self.frames = [_Frame("", 0, "")]
        self.calls: dict[str, list[Any]] = {}
        self.root: list[Record] = []
        self.inputs: list[Record] = []
        self.paused = False
        self.hidden = False
        self.failed: tuple[BaseException, str] | None = None
        self.results: list[tuple[tuple[Any, ...], tuple[Record, Any]]] = []
        # on the real tensors of a model the forward may look at values
        self.real = False
        # values, and the calls whose tensors they are
        self.kept: list[tuple[tuple[Record, Any], str]] = []
        self.seen: list[weakref.ref[Tensor]] = []

    def forget(self) -> list[weakref.ref[Tensor]]:
        """Lets go of every tensor, and says which there were."""
        self.seen += [weakref.ref(t) for t in self.alive]
        self.alive, self.storages, self.values, self.parameters, self.ways = [], {}, {}, {}, Ways()
        # the frames of its traceback hold tensors
        self.failed = None
        return self.seen

    def arguments(self, args: Any, kwargs: Any) -> None:
        """Every tensor among the arguments is an input, called as forward's signature calls it."""
        for name, value in bound(self.model, args, kwargs).items():
            for path, tensor in tensors(value):
                key = ":".join([name, *(str(p).lstrip(".") for p in path)])
                record = Record("input", "input", "", path=key)
                record.outs[()] = (tuple(tensor.shape), tensor.dtype)
                self.bind(tensor, record, ())
                self.inputs.append(record)

    def hold(self, tensor: Tensor) -> None:
        """A tensor of the model itself: it has no event, but may share memory with one that is written into."""
        self.owned.add(id(tensor))
        self.alive.append(tensor)
        self.storages.setdefault(storage(tensor), []).append(tensor)

    def bind(self, tensor: Tensor, record: Record, key: Any) -> None:
        """From now on this tensor is what the event gave."""
        self.stand_for(tensor, (record, key), self.frames[-1])

    def stand_for(
        self, tensor: Tensor, value: tuple[Record, Any], frame: _Frame, past: frozenset[Passed] = NOTHING
    ) -> None:
        """From now on this tensor is this value, in this call."""
        self.values[id(tensor)] = value
        self.ways.give(tensor, frame, past)
        self.alive.append(tensor)
        self.storages.setdefault(storage(tensor), []).append(tensor)

    def watch(self) -> None:
        """Puts a forward on every module that says when it begins and ends; a body will run in the same place.

        So a direct call of `module.forward` counts as a call, and what hooks do happens outside.
        """
        known: dict[int, inspect.Signature] = {}
        for module in self.modules.values():
            forward = module.forward
            function = id(getattr(forward, "__func__", forward))
            if function not in known:
                known[function] = inspect.signature(forward)
            self.signatures[id(module)] = known[function]
            vars(module)["forward"] = self.watched(module, forward)

    def watched(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that says when it begins and ends."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                self.enter(module, args, kwargs)
                own_args, own_kwargs = self.given(args, kwargs)
            depth = len(self.frames)
            try:
                output = forward(*own_args, **own_kwargs)
            except BaseException as error:
                # the caller may go on without it
                if self.failed is None or self.failed[0] is not error:
                    self.failed = (error, self.frames[depth - 1].path)
                self.frames[depth - 2].records += self.frames[depth - 1].records
                del self.frames[depth - 1 :]
                raise
            output = self.own(output)
            with torch._C.DisableTorchFunction():
                self.leave(module, args, kwargs, output)
            return output

        return run

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is about to run."""
        path = self.paths[id(module)]
        index = len(self.calls.setdefault(path, []))
        self.calls[path].append(None)
        self.frames[-1].calls_children = True
        caller = self.frames[-1]
        given = [t for _, t in tensors((args, kwargs))]
        reads = [(origin, self.past(t, caller)) for t in given if (origin := self.origin(t, caller)) is not None]
        frame = _Frame(path, index, f"{path}@{index}" if index else path, caller)
        frame.versions = {id(t): version(t) for t in given}
        frame.reads = [origin for origin, _ in reads]
        frame.past = [(origin, past) for origin, past in reads if past]
        self.frames.append(frame)

    def given(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of the call that has begun, with tensors of its own as a body before it would give them."""
        frame = self.frames[-1]
        assert frame.outer is not None
        caller, own = frame.outer, dict[int, Tensor]()

        def fresh(value: Any) -> Any:
            known = isinstance(value, Tensor) and id(value) in self.values
            if not known or not value.dtype.is_floating_point or not can_be_viewed(value):
                return value
            known_as, past = self.values[id(value)], self.past(value, caller) - {(frame.scope, "entry", False)}
            self.claims.append((frame.scope, known_as, past))
            if self.is_crowded(value):
                self.ways.give(value, frame, past)
                frame.lent.append(value)
                return value
            if id(value) not in own:
                own[id(value)] = new = another(value)
                self.ways.derive(new, value, (frame.scope, "entry"))
                self.stand_for(new, known_as, frame, past)
                frame.given.append((value, new, (storage(new), place(new))))
            return own[id(value)]

        return tuple(map(fresh, args)), {name: fresh(value) for name, value in kwargs.items()}

    def is_crowded(self, tensor: Tensor) -> bool:
        """Whether so many tensors show the memory of this one that the next write would take long."""
        memory = storage(tensor)
        return memory in self.written and len(self.storages[memory]) >= _CROWD

    def own(self, output: Any) -> Any:
        """What a module returns, with tensors of its own: those that it keeps are others than those that it returns."""
        frame, own = self.frames[-1], dict[int, Tensor]()

        def fresh(tensor: Tensor) -> Tensor:
            if not can_be_viewed(tensor) or (self.made_in(tensor, frame) and self.is_crowded(tensor)):
                return tensor
            if id(tensor) not in own:
                own[id(tensor)] = new = another(tensor)
                frame.returned[id(new)] = tensor
                self.ways.derive(new, tensor, (frame.scope, "exit"))
            return own[id(tensor)]

        self.paused = True
        output = replaced(output, fresh)
        self.paused = False
        return output

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run."""
        frame = self.frames.pop()
        caller = self.frames[-1]
        for tensor, own, form in frame.given:
            if (storage(own), place(own)) != form:
                # it was given another form or memory in place, also for those who gave it
                tensor.data = own
                self.stand_for(tensor, self.values[id(own)], frame, frozenset({(frame.scope, "entry", True)}))
        for tensor in frame.lent:
            self.ways.give(tensor, caller)
        outs = list(tensors(output))
        if not frame.calls_children:
            caller.records.append(self.leaf(module, frame, caller, outs))
        else:
            caller.records += frame.records
            for _, tensor in outs:
                self.returns(tensor, frame, caller)
        inputs = self.float_inputs(module, args, kwargs, frame)
        first = next((p for p, t in outs if t.dtype.is_floating_point), None)
        parts = [(p, self.values[id(t)]) for p, t in outs]
        self.calls[frame.path][frame.index] = Made(caller.scope, first, parts, inputs)

    def returns(self, tensor: Tensor, frame: _Frame, caller: _Frame) -> None:
        """A call with calls inside returned a tensor."""
        if id(tensor) in self.values and id(tensor) not in frame.returned:
            self.ways.give(tensor, caller)
            return
        inner = frame.returned.get(id(tensor), tensor)
        if not self.made_in(inner, frame):
            self.passed_on(tensor, frame, caller)
            return
        value, past = self.values[id(inner)], self.past(inner, frame) - {(frame.scope, "exit", False)}
        self.stand_for(tensor, value, caller, past)
        self.claims.append((frame.scope, value, past))

    def made_in(self, tensor: Tensor, frame: _Frame) -> bool:
        """Whether an event inside this call gave the tensor."""
        value = self.values.get(id(tensor))
        return value is not None and value[0].number > frame.number

    def leaf(self, module: nn.Module, frame: _Frame, caller: _Frame, outs: list[Any]) -> Record:
        """A call without calls inside is one node, whatever operations it was made of."""
        record = Record("module", type(module).__name__, caller.scope, frame.path, frame.index)
        record.reads += frame.reads
        record.past += frame.past
        for inner in frame.records:
            record.reads += [read for read in inner.reads if read[0].number < frame.number]
            record.past += [(read, past) for read, past in inner.past if read[0].number < frame.number]
            record.params.update(inner.params)
        for _, tensor in outs:
            self.reads(record, frame.returned.get(id(tensor), tensor), frame)
        for inner in frame.records:
            inner.into = record
        for path, tensor in outs:
            record.outs[path] = (tuple(tensor.shape), tensor.dtype)
            inner = frame.returned.get(id(tensor), tensor)
            if self.made_in(inner, frame):
                # the module may keep it
                self.values[id(inner)] = (record, path)
            self.bind(tensor, record, path)
        return record

    def passed_on(self, tensor: Tensor, frame: _Frame, caller: _Frame) -> None:
        """A value that a module hands on, or made where no operation was seen: named as an operation of its own."""
        record = Record("op", "identity", frame.scope)
        inner = frame.returned.get(id(tensor), tensor)
        if id(inner) in self.parameters:
            record.params[self.parameters[id(inner)]] = None
        elif id(inner) in self.values:
            self.reads(record, inner, frame)
        elif self.made_unseen(inner):
            record.op, record.reads = "unseen", self.earlier(frame)
        record.outs[()] = (tuple(tensor.shape), tensor.dtype)
        self.bind(tensor, record, ())
        caller.records.append(record)

    def past(self, tensor: Tensor, reader: _Frame) -> frozenset[Passed]:
        """The entries and exits of modules past which a tensor came to the call that reads it."""
        value = self.values.get(id(tensor))
        return NOTHING if value is None else self.ways.past(tensor, reader, value[0].number)

    def reads(self, record: Record, tensor: Tensor, frame: _Frame) -> None:
        """An event in a call reads a tensor that was there before the call, or an operation any tensor."""
        value = self.values.get(id(tensor))
        if value is None or (record.kind == "module" and self.made_in(tensor, frame)):
            return
        record.reads.append(value)
        if past := self.past(tensor, frame):
            record.past.append((value, past))

    def origin(self, tensor: Tensor, frame: _Frame) -> Any:
        """The event that gave a tensor; None for one that was there before the run."""
        if self.made_unseen(tensor):
            record = Record("op", "unseen", frame.scope, reads=self.earlier(frame))
            record.outs[()] = (tuple(tensor.shape), tensor.dtype)
            self.bind(tensor, record, ())
            frame.records.append(record)
        return self.values.get(id(tensor))

    def made_unseen(self, tensor: Tensor) -> bool:
        """Whether code made it that torch does not show: inside `torch.func`, or of an extension."""
        known = id(tensor) in self.values or id(tensor) in self.owned
        return not known and (self.hidden or isinstance(tensor, FakeTensor))

    def earlier(self, frame: _Frame) -> list[Any]:
        """All that code in this call can have read."""
        return [*frame.reads, *((r, r.main) for r in frame.records if r.outs)]

    def float_inputs(self, module: nn.Module, args: Any, kwargs: Any, frame: _Frame) -> list[tuple[str, Any]]:
        """The float tensors among the arguments by name, without those that the forward overwrote."""
        try:
            named = by_name(self.signatures[id(module)], args, kwargs)
        except TypeError:
            return []
        return [
            (name, self.values[id(v)])
            for name, v in named.items()
            if isinstance(v, Tensor)
            and v.dtype.is_floating_point
            and id(v) in self.values
            and version(v) == frame.versions.get(id(v))
        ]

    def operation(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a torch function and notes what it read, made and changed in place."""
        inside = torch._C._functorch.peek_interpreter_stack() is not None
        self.hidden |= inside
        if self.paused or inside:
            return func(*args, **kwargs)
        values = (v for v in (*args, *kwargs.values()) if type(v) not in PLAIN)
        given = [t for value in values for _, t in tensors(value)]
        versions = [version(t) for t in given]
        result = func(*args, **kwargs)
        outs = list(tensors(result))
        mutated = [t for t, v in zip(given, versions, strict=True) if version(t) != v]
        if len(mutated) > 1:
            mutated = _written(func, args, kwargs, mutated, outs)
        elif _replaces(func):
            mutated = [args[0]]
        if not outs and not mutated:
            self.kept += [self.held(t) for t in given if self.real and id(t) in self.values]
            return result
        frame = self.frames[-1]
        record = Record("op", op_name(func), frame.scope)
        for tensor in given:
            if self.origin(tensor, frame) is not None:
                self.reads(record, tensor, frame)
            elif id(tensor) in self.parameters:
                record.params[self.parameters[id(tensor)]] = None

        def fresh(tensor: Tensor) -> Tensor:
            return another(tensor) if any(tensor is g for g in given) else tensor

        if not mutated and any(t is g for _, t in outs for g in given):
            result = replaced(result, fresh)
            outs = list(tensors(result))
        memory = {storage(t): t for t in reversed(given)}
        for path, tensor in outs:
            record.outs[path] = (tuple(tensor.shape), tensor.dtype)
            if storage(tensor) in memory:
                self.ways.derive(tensor, memory[storage(tensor)])
            if id(tensor) in self.values and any(tensor is t for t in mutated):
                self.values[id(tensor)] = (record, path)
            else:
                self.bind(tensor, record, path)
        for number, tensor in enumerate(mutated):
            further = ("changed", number) if number else "changed"
            self.changed(tensor, record, next((p for p, t in outs if t is tensor), further))
        frame.records.append(record)
        return result

    def changed(self, tensor: Tensor, record: Record, key: Any) -> None:
        """An event wrote into a tensor: whatever shares that memory has a new value."""
        record.outs.setdefault(key, (tuple(tensor.shape), tensor.dtype))
        if all(tensor is not t for t in self.storages.get(storage(tensor), ())) or id(tensor) not in self.values:
            self.bind(tensor, record, key)
        self.written.add(storage(tensor))
        writer = self.frames[-1]
        keys = {place(tensor): key}
        for number, alias in enumerate(self.storages[storage(tensor)]):
            if not overlap(alias, tensor):
                continue
            self.ways.written(alias, tensor, writer)
            old, where = self.values.get(id(alias)), place(alias)
            if old is not None and old[0] is record:
                continue
            if where is None or where not in keys:
                # another view: what was not written comes from the value that it had
                if old is not None:
                    record.reads.append(old)
                keys[where] = ("view", number)
                record.outs[keys[where]] = (tuple(alias.shape), alias.dtype)
            self.values[id(alias)] = (record, keys[where])

    def done(self, returned: Any) -> None:
        """The events of the whole run, which of them give what the model returns, and what is kept beside that."""
        self.root = self.frames[0].records
        self.results = [(p, self.values[id(t)]) for p, t in tensors(returned) if id(t) in self.values]
        known = [(weakref.ref(t), self.held(t)) for t in self.alive if id(t) in self.values]
        self.forget()
        self.kept += [held for ref, held in known if ref() is not None]

    def held(self, tensor: Tensor) -> tuple[tuple[Record, Any], str]:
        """The value of a tensor, and the call to which the tensor belongs."""
        return self.values[id(tensor)], self.ways.owners[id(tensor)][0].scope


class Operations(TorchFunctionMode):
    """Shows every torch function to a recorder, and every call of a TorchScript function as one."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __enter__(self) -> Any:
        self.call = call = torch.jit.ScriptFunction.__call__
        thread, recorder = threading.get_ident(), self.recorder

        def seen(script: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return call(script, *args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                return call(script, *args, **kwargs)

            run.__name__ = script.name
            with torch._C.DisableTorchFunction():
                return recorder.operation(run, args, kwargs)

        torch.jit.ScriptFunction.__call__ = seen  # type: ignore[assignment,method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.jit.ScriptFunction.__call__ = self.call  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.operation(func, args, kwargs or {})


def _written(func: Any, args: Any, kwargs: Any, changed: list[Tensor], outs: list[Any]) -> list[Tensor]:
    """Those that a function wrote into: tensors over one storage count their changes together."""
    target = [args[0]] if func is Tensor.__setitem__ else []
    target += [t for _, t in tensors(kwargs.get("out"))] + [t for _, t in outs]
    return [t for t in changed if any(t is g for g in target)] or changed


def _replaces(func: Any) -> bool:
    """Whether a function gives its first argument other memory, which no version counts."""
    return getattr(func, "__self__", None) is Tensor.data and func.__name__ == "__set__"


_NO_WORD = re.compile(r"\W+")


def op_name(func: Any) -> str:
    """What an operation is called in a graph."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "get")
    return _NO_WORD.sub("_", name.strip("_") if name.startswith("__") else name) or "op"
