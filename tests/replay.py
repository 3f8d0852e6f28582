"""What a trace recorded, run again event by event on real values: a check that its edges are true and complete.

`recorded(model, args, kwargs)` traces with a recorder that also keeps what each event ran, and on which values.
`Recording.run` then evaluates the events one after the other, each from the values that its edges name and from nothing
else: what an operation writes into is copied first, so that a value that changes in place reaches a later reader only
along an edge.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import adaptergraph as ag
from adaptergraph.tracing.calls import Record
from adaptergraph.tracing.parts import tensors
from adaptergraph.tracing.record import Recorder

TRACE = sys.modules["adaptergraph.tracing.trace"]


class Ref(NamedTuple):
    """The value that an event gave."""

    record: Record
    key: Any


class Held(NamedTuple):
    """A tensor that a module of the model holds."""

    path: str
    table: str
    name: str


class Outside(NamedTuple):
    """A tensor that was there before and belongs to no module."""

    tensor: Tensor


@dataclasses.dataclass(eq=False)
class View:
    """A value that changed because another one over the same memory was written into."""

    key: Any
    old: Any
    place: Any
    written: Any
    written_place: Any


@dataclasses.dataclass(eq=False)
class Step:
    """What one event ran.

    Attributes:
        run: a torch function, or the path of a module.
        args: positional and keyword arguments, tensors as Ref, Held or Outside.
        changed: where among the arguments the tensors stand that it wrote into, by key.
        views: further values that this changed.
    """

    run: Callable[..., Any] | str
    args: Any
    changed: dict[Any, Any] = dataclasses.field(default_factory=dict)
    views: list[View] = dataclasses.field(default_factory=list)


class Keeping(Recorder):
    """A recorder that keeps what each event ran."""

    last: Keeping

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Keeping.last = self
        self.steps: dict[Record, Step] = {}
        self.holders: dict[int, Held] = {}
        self.keeping: list[Tensor] = []
        self.entered: list[Any] = []
        self.now: Any = None
        self.unknown: list[str] = []

    def arguments(self, args: Any, kwargs: Any) -> None:
        for path, module in self.model.named_modules():
            tables = {"_parameters": module._parameters, "_buffers": module._buffers, "": vars(module)}
            for table, values in tables.items():
                for name, tensor in values.items():
                    if isinstance(tensor, Tensor):
                        self.holders.setdefault(id(tensor), Held(path, table, name))
                        self.keeping.append(tensor)
        self.fake = any(type(t).__name__ == "FakeTensor" for _, t in tensors((args, kwargs)))
        super().arguments(args, kwargs)

    def forget(self) -> Any:
        self.keeping, self.entered, self.now = [], [], None
        return super().forget()

    def ref(self, tensor: Tensor) -> Ref | Held | Outside:
        if id(tensor) in self.values:
            return Ref(*self.values[id(tensor)])
        if id(tensor) in self.holders:
            return self.holders[id(tensor)]
        if type(tensor).__name__ == "FakeTensor":
            self.unknown.append(f"{self.frames[-1].path or 'the model'}: {tuple(tensor.shape)} {tensor.dtype}")
        self.keeping.append(tensor)
        return Outside(tensor)

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        packed = mapped((args, kwargs), self.ref)
        outer, self.now = self.now, (Step(func, packed), (args, kwargs))
        records = self.frames[-1].records
        before = len(records)
        result = super().operation(func, args, kwargs)
        if len(records) > before:
            self.steps[records[-1]] = self.now[0]
        self.now = outer
        return result

    def changed(self, tensor: Tensor, record: Record, key: Any) -> None:
        step, given = self.now
        step.changed[key] = next(path for path, t in tensors(given) if t is tensor)
        before = dict(self.values)
        super().changed(tensor, record, key)
        for alias in self.storages[tensor.untyped_storage()._cdata]:
            now, was = self.values.get(id(alias)), before.get(id(alias))
            if now is not None and now[0] is record and now != was and now[1] != key and alias is not tensor:
                old = Ref(*was) if was else self.holders[id(alias)]
                step.views.append(View(now[1], old, place(alias), key, place(tensor)))

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entered.append(mapped((args, kwargs), self.ref))
        super().enter(module, args, kwargs)

    def passed_on(self, tensor: Tensor, frame: Any, caller: Any) -> None:
        inner = frame.returned.get(id(tensor), tensor)
        held = self.holders.get(id(inner), Outside(inner))
        super().passed_on(tensor, frame, caller)
        record = caller.records[-1]
        if record.op == "unseen":
            self.unknown.append(record.scope)
            return
        (origin,) = [Ref(*r) for r in record.reads] or [held]
        self.steps[record] = Step(lambda value: value, ((origin,), {}))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        packed = self.entered.pop()
        records = self.frames[-2].records
        before = len(records)
        super().leave(module, args, kwargs, output)
        for record in records[before:]:
            if record.kind == "module" and record not in self.steps:
                self.steps[record] = Step(record.path, packed)


def place(tensor: Tensor) -> Any:
    """Where a tensor's elements lie in its memory."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def copied(tensor: Tensor) -> Tensor:
    """The same values, strides and offset over memory of its own."""
    memory = tensor.detach().untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(memory, *place(tensor))


def at(structure: Any, path: Any) -> Any:
    """What stands at the end of a path as `tensors` gives it."""
    for key in path:
        structure = getattr(structure, key[1:]) if isinstance(key, str) and key[:1] == "." else structure[key]
    return structure


def mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    """The same structure with tensors, or what stands for them, replaced."""
    if isinstance(value, Tensor | Ref | Held | Outside):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(v, fn) for v in value))
    if type(value) in (list, tuple, torch.Size):
        return tuple(mapped(v, fn) for v in value) if type(value) is not list else [mapped(v, fn) for v in value]
    if type(value) is slice:
        return slice(*(mapped(v, fn) for v in (value.start, value.stop, value.step)))
    if type(value) is dict:
        return {k: mapped(v, fn) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and [*tensors(value)]:
        return dataclasses.replace(
            value, **{f.name: mapped(getattr(value, f.name), fn) for f in dataclasses.fields(value)}
        )
    return value


class Recording:
    """The graph of a model, what was recorded, and the values of one run again."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.model = model
        with mock.patch.object(TRACE, "Recorder", Keeping):
            self.graph = ag.trace(model, *args, **kwargs)
        self.recorder = Keeping.last
        del Keeping.last
        self.values: dict[tuple[Record, Any], Any] = {}

    def value(self, ref: Any) -> Tensor:
        """The real tensor that a reference stands for."""
        if isinstance(ref, Ref):
            return self.values[ref]
        if isinstance(ref, Outside):
            return ref.tensor
        module = self.model.get_submodule(ref.path)
        return (getattr(module, ref.table) if ref.table else vars(module))[ref.name]

    def run(self, args: Any, kwargs: Any) -> None:
        """Evaluates every event on real arguments."""
        given = dict(self.inputs(args, kwargs))
        for record in self.recorder.inputs:
            self.values[record, ()] = given[record.path]
        with torch.no_grad():
            for record, step in self.recorder.steps.items():
                self.step(record, step)

    def inputs(self, args: Any, kwargs: Any) -> Any:
        from adaptergraph.tracing.record import bound

        for name, value in bound(self.model, args, kwargs).items():
            for path, tensor in tensors(value):
                yield ":".join([name, *(str(p).lstrip(".") for p in path)]), tensor

    def step(self, record: Record, step: Step) -> None:
        copies: dict[int, Tensor] = {}

        def fetch(ref: Any) -> Tensor:
            tensor = self.value(ref)
            return (
                copies.setdefault(id(tensor), copied(tensor)) if step.changed or isinstance(step.run, str) else tensor
            )

        args, kwargs = mapped(step.args, fetch)
        run = self.model.get_submodule(step.run) if isinstance(step.run, str) else step.run
        result = run(*args, **kwargs)
        for path, tensor in tensors(result):
            self.values[record, path] = tensor
        for key, path in step.changed.items():
            self.values[record, key] = at((args, kwargs), path)
        for view in step.views:
            self.values[record, view.key] = self.seen_through(record, view)

    def seen_through(self, record: Record, view: View) -> Tensor:
        """The value of a view after another view of the same memory was written into."""
        old, new = self.value(view.old), self.values[record, view.written]
        ends = [
            o + sum((n - 1) * s for n, s in zip(*rest, strict=True)) for o, *rest in (view.place, view.written_place)
        ]
        memory = torch.zeros(max(ends) + 1, dtype=new.dtype)

        def window(where: Any) -> Tensor:
            offset, shape, stride = where
            return memory.as_strided(shape, stride, offset)

        window(view.place).copy_(old)
        window(view.written_place).copy_(new)
        return window(view.place)


def recorded(model: nn.Module, args: Any, kwargs: Any) -> Recording:
    """Traces a model and keeps what was run."""
    return Recording(model, args, kwargs)


def references(args: Any) -> list[Any]:
    """What stands for tensors among the arguments of a step."""
    found: list[Any] = []
    mapped(args, lambda ref: (found.append(ref), ref)[1])
    return found
