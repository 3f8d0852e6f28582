"""What happens while a model runs once: which module or operation made which tensor from which. Floor 4."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.overrides import TorchFunctionMode

from ..axes import Axes, op_name
from ..loading import Loading
from .arguments import bound, by_name
from .calls import Frame, Made, Record
from .fakes import refuse_other_dtype
from .identity import Events
from .memory import another, can_be_viewed, form, overlap, place, storage, version, written
from .outside import MEMORY, Outside
from .parts import PLAIN, containers, is_fixed, replaced, tensors
from .walks import Walks
from .ways import NOTHING, Line, Passed, Ways, apart

# of memory that is written into so many tensors are told apart; further ones are trusted to be arguments and results
_CROWD = 32


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
        # values whose memory holds others now
        self.overwritten: dict[tuple[Record, Any], None] = {}
        # operations that gave another tensor over memory which somebody then wrote into, and a call that reads it
        self.tied: list[tuple[Record, str]] = []
        self.alive: list[Tensor] = []
        self.owned: set[int] = set()
        self.ways = Ways()
        self.walks = Walks()
        self.axes = Axes()
        self.claims: list[tuple[str, tuple[Record, Any], frozenset[Passed]]] = []
        # the containers that the model was given; what calls hand on in them, or in one of their own that is not copied
        self.lasting: dict[int, Any] = {}
        self.shown: list[tuple[str, tuple[Record, Any], str]] = []
        # dicts and lists with tensors of this run in the place of others, and what was in them before
        self.filled: list[tuple[Any, Any]] = []
        self.frames = [Frame("", 0, "")]
        self.calls: dict[str, list[Any]] = {}
        self.root: list[Record] = []
        self.inputs: list[Record] = []
        self.hidden = False
        self.failed: tuple[BaseException, str] | None = None
        self.results: list[tuple[tuple[Any, ...], tuple[Record, Any]]] = []
        # what is compared with another run; and whether each call gets tensors of its own
        self.events: Events | None = None
        self.apart = True
        # on the real tensors of a model the forward may look at values
        self.real = False
        self.outside = Outside()
        # values, and the calls whose tensors they are
        self.kept: list[tuple[tuple[Record, Any], str]] = []
        self.seen: list[weakref.ref[Tensor]] = []
        # memory whose address was asked for, as a number and with its lines; and the calls between two lines of one
        self.addresses: dict[int, tuple[int, list[Line]]] = {}
        self.moved: list[str] = []

    def forget(self) -> list[weakref.ref[Tensor]]:
        """Lets go of every tensor, and says which there were."""
        self.seen += [weakref.ref(t) for t in self.alive]
        self.alive, self.storages, self.values, self.parameters, self.ways = [], {}, {}, {}, Ways()
        self.lasting, self.addresses = {}, {}
        if self.events is not None:
            self.events.forget()
        # the frames of its traceback hold tensors
        self.failed = None
        return self.seen

    def empty(self) -> None:
        """Takes the tensors of this run out of the dicts and lists that calls were given."""
        for container, before in reversed(self.filled):
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
        self.filled = []

    def arguments(self, args: Any, kwargs: Any) -> None:
        """Every tensor among the arguments is an input, called as forward's signature calls it."""
        if self.events is not None:
            self.events.number(t for _, t in tensors((args, kwargs)))
        self.lasting = {id(c): c for c in containers((args, kwargs))}
        for name, value in bound(self.model, args, kwargs).items():
            for path, tensor in tensors(value):
                key = ":".join([name, *(str(p).lstrip(".") for p in path)])
                record = Record("input", "input", "", path=key)
                record.outs[()] = form(tensor)
                self.bind(tensor, record, ())
                self.inputs.append(record)

    def hold(self, tensor: Tensor) -> None:
        """A tensor of the model itself: it has no event, but may share memory with one that is written into."""
        self.owned.add(id(tensor))
        if self.events is not None:
            self.events.number([tensor])
        self.alive.append(tensor)
        self.storages.setdefault(storage(tensor), []).append(tensor)

    def bind(self, tensor: Tensor, record: Record, key: Any) -> None:
        """From now on this tensor is what the event gave."""
        self.stand_for(tensor, (record, key), self.frames[-1])

    def stand_for(
        self, tensor: Tensor, value: tuple[Record, Any], frame: Frame, past: frozenset[Passed] = NOTHING
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
        self.walks.watch(self.modules)
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
            with torch._C.DisableTorchFunction():
                output = self.own(output, args, kwargs)
                self.leave(module, args, kwargs, output)
            return output

        return run

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A module is about to run."""
        path = self.paths[id(module)]
        self.walks.used(module)
        index = len(self.calls.setdefault(path, []))
        self.calls[path].append(None)
        self.frames[-1].calls_children = True
        caller = self.frames[-1]
        given = [(t, origin) for _, t in tensors((args, kwargs)) if (origin := self.origin(t, caller)) is not None]
        frame = Frame(path, index, f"{path}@{index}" if index else path, caller)
        frame.entered = {id(t): origin for t, origin in given}
        frame.reads = [origin for _, origin in given]
        frame.past = [(origin, past) for t, origin in given if (past := self.past(t, caller))]
        self.frames.append(frame)

    def given(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of the call that has begun, with tensors of its own as a body before it would give them."""
        if not self.apart:
            return args, kwargs
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

    def own(self, output: Any, args: Any, kwargs: Any) -> Any:
        """What a module returns, with tensors of its own: those that it keeps are others than those that it returns.

        A dict or list that it was given stays the same one, as somebody else looks into it too.
        """
        if not self.apart:
            return output
        frame, own = self.frames[-1], dict[int, Tensor]()
        given = {} if isinstance(output, Tensor) else {id(c): c for c in containers((args, kwargs))}
        for container in containers(output if given else None):
            written = id(container) in given and type(container) in (list, dict)
            if written and any(id(t) not in self.values for _, t in tensors(container)):
                self.filled.append((container, container.copy()))

        def fresh(tensor: Tensor) -> Tensor:
            crowded = self.made_in(tensor, frame) and self.is_crowded(tensor)
            if crowded or not can_be_viewed(tensor) or id(tensor) in frame.returned:
                return tensor
            if id(tensor) not in own:
                own[id(tensor)] = new = another(tensor)
                frame.returned[id(new)] = tensor
                self.ways.derive(new, tensor, (frame.scope, "exit"))
            return own[id(tensor)]

        return replaced(output, fresh, given)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run."""
        frame = self.frames.pop()
        caller = self.frames[-1]
        for tensor, own, was in frame.given:
            if (storage(own), place(own)) != was:
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
        for container in containers(output):
            copied = type(container) in (list, dict)
            if id(container) in self.lasting or (not copied and any(container is v for v in vars(module).values())):
                found = (t for _, t in tensors(container) if self.handed_on(t, frame))
                self.shown += [(frame.scope, self.values[id(t)], caller.scope) for t in found]
        inputs = self.float_inputs(module, args, kwargs, frame)
        outs = [(p, t) for p, t in outs if not is_fixed(output, p)]
        first = next((p for p, t in outs if t.dtype.is_floating_point), None)
        parts = [(p, self.values[id(t)]) for p, t in outs]
        self.calls[frame.path][frame.index] = Made(caller.scope, first, parts, inputs)

    def returns(self, tensor: Tensor, frame: Frame, caller: Frame) -> None:
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

    def handed_on(self, tensor: Tensor, frame: Frame) -> bool:
        """Whether what a call returns was there before it."""
        record = self.values.get(id(frame.returned.get(id(tensor), tensor)), (None,))[0]
        while record is not None and record.op == "identity" and record.number > frame.number:
            record = record.reads[0][0] if record.reads else None
        return record is None or record.number < frame.number

    def made_in(self, tensor: Tensor, frame: Frame) -> bool:
        """Whether an event inside this call gave the tensor."""
        value = self.values.get(id(tensor))
        return value is not None and value[0].number > frame.number

    def leaf(self, module: nn.Module, frame: Frame, caller: Frame, outs: list[Any]) -> Record:
        """A call without calls inside is one node, whatever operations it was made of."""
        record = Record("module", type(module).__name__, caller.scope, frame.path, frame.index)
        record.silent = not outs and any(inner.outs for inner in frame.records)
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
            record.outs[path] = form(tensor)
            inner = frame.returned.get(id(tensor), tensor)
            self.axes.hand_on(self.values.get(id(inner)), (record, path))
            if self.made_in(inner, frame):
                # the module may keep it
                self.values[id(inner)] = (record, path)
            self.bind(tensor, record, path)
        return record

    def passed_on(self, tensor: Tensor, frame: Frame, caller: Frame) -> None:
        """A value that a module hands on, or made where no operation was seen: named as an operation of its own."""
        record = Record("op", "identity", frame.scope)
        inner = frame.returned.get(id(tensor), tensor)
        if id(inner) in self.parameters:
            record.params[self.parameters[id(inner)]] = None
        elif id(inner) in self.values:
            self.reads(record, inner, frame)
        elif (unseen := self.unseen(inner, frame)) is not None:
            record.op, record.reads = "unseen", unseen
        record.outs[()] = form(tensor)
        self.axes.hand_on(self.values.get(id(inner)), (record, ()))
        self.bind(tensor, record, ())
        caller.records.append(record)

    def past(self, tensor: Tensor, reader: Frame) -> frozenset[Passed]:
        """The entries and exits of modules past which a tensor came to the call that reads it."""
        value = self.values.get(id(tensor))
        return NOTHING if value is None else self.ways.past(tensor, reader, value[0].number)

    def reads(self, record: Record, tensor: Tensor, frame: Frame) -> None:
        """An event in a call reads a tensor that was there before the call, or an operation any tensor."""
        value = self.values.get(id(tensor))
        if value is None or (record.kind == "module" and self.made_in(tensor, frame)):
            return
        record.reads.append(value)
        if past := self.past(tensor, frame):
            record.past.append((value, past))

    def origin(self, tensor: Tensor, frame: Frame) -> Any:
        """The event that gave a tensor; None for one that was there before the run."""
        if (reads := self.unseen(tensor, frame)) is not None:
            record = Record("op", "unseen", frame.scope, reads=reads)
            record.outs[()] = form(tensor)
            self.bind(tensor, record, ())
            frame.records.append(record)
        return self.values.get(id(tensor))

    def unseen(self, tensor: Tensor, frame: Frame) -> list[Any] | None:
        """What code can have computed a tensor from that no event gave; None if it was there before the run.

        Code of `torch.func` or of an extension reads what it finds; on real values what left torch may come back.
        """
        if id(tensor) in self.values or id(tensor) in self.owned:
            return None
        if self.hidden or isinstance(tensor, FakeTensor):
            return self.earlier(frame)
        if not self.real:
            return None
        alike = (t for t in self.storages.get(storage(tensor), ()) if id(t) in self.values and overlap(t, tensor))
        return list(dict.fromkeys(self.values[id(t)] for t in alike)) or list(self.outside.left) or None

    def earlier(self, frame: Frame) -> list[Any]:
        """All that code in this call can have read."""
        return [*frame.reads, *((r, r.main) for r in frame.records if r.outs)]

    def float_inputs(self, module: nn.Module, args: Any, kwargs: Any, frame: Frame) -> list[tuple[str, Any]]:
        """The float tensors among the arguments by name, as they were when the call began."""
        try:
            named = by_name(self.signatures[id(module)], args, kwargs)
        except TypeError:
            return []
        return [
            (name, frame.entered[id(v)])
            for name, v in named.items()
            if isinstance(v, Tensor) and v.dtype.is_floating_point and id(v) in frame.entered
        ]

    def operation(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a torch function and notes what it read, made and changed in place."""
        inside = torch._C._functorch.peek_interpreter_stack() is not None
        self.hidden |= inside
        if inside:
            return func(*args, **kwargs)
        if func is Tensor.__dlpack__ and not self.real:
            # it would give memory without values
            raise DataDependentOutputException(func)  # type: ignore[arg-type]
        if func is Tensor.data_ptr:
            return self.address(args[0])
        frame = self.frames[-1]
        values = (v for v in (*args, *kwargs.values()) if type(v) not in PLAIN)
        given = [t for value in values for _, t in tensors(value)]
        versions = [version(t) for t in given]
        if self.events is not None:
            self.events.note(frame.scope, op_name(func), given, (*args, *kwargs.values()))
        before = len(frame.records)
        result = func(*args, **kwargs)
        outs = list(tensors(result))
        if self.events is not None:
            self.events.number(t for _, t in outs)
        changed = [t for t, v in zip(given, versions, strict=True) if version(t) != v]
        mutated = written(func, args, kwargs, changed, outs)
        if not outs and not mutated:
            self.looked_at(op_name(func), given, result)
            return result
        if self.walks.under_way:
            list(map(self.walks.used, given))
        record = Record("op", op_name(func), frame.scope)
        if not self.real:
            refuse_other_dtype(record.op, given, self.parameters)
        self.reads_all(record, given, frame)
        if len(frame.records) > before:
            # it called modules, as `torch.cond` does
            record.reads += [(inner, inner.main) for inner in frame.records[before:] if inner.outs]
        if self.outside.left:
            record.reads += self.outside.back(record.op, args, kwargs)
        if self.apart and not mutated and any(t is g for _, t in outs for g in given):
            result = replaced(result, lambda t: another(t) if any(t is g for g in given) else t)
            outs = list(tensors(result))
        record.outs = {path: form(tensor) for path, tensor in outs}
        # a TorchScript function is called as it likes
        if getattr(func, "__module__", None) != __name__:
            results = [((record, path), tensor) for path, tensor in outs]
            self.axes.follow(record.op, args, kwargs, results, lambda t: self.values.get(id(t)))
        self.overwritten.update((self.values[id(t)], None) for t in mutated if id(t) in self.values)
        memory = {storage(t): t for t in reversed(given)}
        for path, tensor in outs:
            if (origin := memory.get(storage(tensor))) is not None and tensor is not origin:
                self.ways.derive(tensor, origin, view=record.number)
            if id(tensor) in self.values and any(tensor is t for t in mutated):
                self.values[id(tensor)] = (record, path)
            else:
                self.bind(tensor, record, path)
        for number, tensor in enumerate(mutated):
            further = ("changed", number) if number else "changed"
            self.changed(tensor, record, next((p for p, t in outs if t is tensor), further))
        frame.records.append(record)
        return result

    def reads_all(self, record: Record, given: list[Tensor], frame: Frame) -> None:
        """An operation is given these tensors."""
        for tensor in given:
            if id(tensor) not in self.values and id(tensor) not in self.owned and tensor.is_nested:
                # torch does not show what makes one
                record.reads += self.earlier(frame)
            elif self.origin(tensor, frame) is not None:
                self.reads(record, tensor, frame)
            elif id(tensor) in self.parameters:
                record.params[self.parameters[id(tensor)]] = None

    def address(self, tensor: Tensor) -> int:
        """Where the memory of a tensor lies, for code that asks; of a fake one, a number that no other memory has."""
        self.looked_at("data_ptr", [tensor], 0)
        line = self.ways.lines.get(id(tensor))
        number, asked = self.addresses.setdefault(storage(tensor), (len(self.addresses) + 1, []))
        if tensor.is_floating_point():
            self.moved += [scope for other in asked if other is not line for scope, _ in apart(other, line)]
            asked.append(line)
        return tensor.data_ptr() if self.real else (number << 40) + int(tensor.storage_offset()) * tensor.itemsize

    def looked_at(self, name: str, given: list[Tensor], result: Any) -> None:
        """An operation gave no tensor: somebody may do something with values, or with memory, that it gave."""
        known = [self.held(t) for t in given if (self.real or name in MEMORY) and id(t) in self.values]
        self.kept += known
        self.outside.note(name, [value for value, _ in known], result)

    def changed(self, tensor: Tensor, record: Record, key: Any) -> None:
        """An event wrote into a tensor: whatever shares that memory has a new value."""
        if key not in record.outs:
            record.outs[key] = form(tensor)
            self.axes.hand_on(self.values.get(id(tensor)), (record, key))
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
            if old is not None:
                self.overwritten[old] = None
            if where is None or where not in keys:
                # another view: what was not written comes from the value that it had
                keys[where] = ("view", number)
                if old is not None:
                    record.reads.append(old)
                    self.axes.hand_on(old, (record, keys[where]))
                record.outs[keys[where]] = form(alias)
            self.values[id(alias)] = (record, keys[where])

    def done(self, returned: Any) -> None:
        """The events of the whole run, which of them give what the model returns, and what is kept beside that."""
        self.root = self.frames[0].records
        self.results = [(p, self.values[id(t)]) for p, t in tensors(returned) if id(t) in self.values]
        known = [(weakref.ref(t), self.held(t)) for t in self.alive if id(t) in self.values]
        self.tied = [(r, self.ways.tied[r.number]) for r in self.root if r.number in self.ways.tied]
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
        self.loading = Loading()

    def __enter__(self) -> Any:
        self.loading.__enter__()
        self.call = call = torch.jit.ScriptFunction.__call__
        thread, recorder = threading.get_ident(), self.recorder

        def seen(script: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or self.loading.under_way:
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
        self.loading.__exit__()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.loading.under_way:
            return func(*args, **(kwargs or {}))
        return self.recorder.operation(func, args, kwargs or {})
