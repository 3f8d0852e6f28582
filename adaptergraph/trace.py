"""`nn.Module` → `Graph`: the model is run once on fake tensors, under hooks and a torch-function mode. Floor 4.

A trace is a map, not a program: it says what reads what, and is never replayed. The model is left as it was found.
"""

from __future__ import annotations

import gc
import inspect
import re
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from .errors import GraphError, here
from .graph import Graph
from .imported import Call, Imported, Module
from .names import path_of
from .node import Node, Param
from .shapes import quiet


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """The graph of a model: named modules, the operations between them, shapes; all frozen.

    Args:
        model: any module; it is run once, in eval mode, on fake tensors, and left exactly as it was.
        args, kwargs: what its forward takes, for example a tokenized sentence. Only shapes and dtypes matter.

    Raises:
        GraphError: the forward fails with these arguments, or needs real data that a meta model has not.

    >>> import adaptergraph as ag
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> ag.trace(model, torch.ones(1, 8))
    <Graph: imported Sequential, 4 nodes, outputs 2>
    """
    if not isinstance(model, nn.Module):
        raise GraphError(f"trace takes an nn.Module, not {type(model).__name__}", source=here())
    if "_adaptergraph" in model.__dict__:
        raise GraphError(
            f"this {type(model).__name__} has bodies already",
            source=here(),
            hint="add to its graph instead: ag.graph_of(model).splice(…).compile()",
        )
    errors: list[Exception] = []
    for attempt in (_fake, _bfloat16, _real):
        try:
            recorder = attempt(model, args, kwargs, errors)
        except GraphError:
            raise
        except Exception as error:
            # the frames of the traceback hold tensors of the run
            errors.append(error.with_traceback(None))
            continue
        if recorder is not None:
            return _Finish(model, recorder, args, kwargs).graph()
    raise _failed(model, args, kwargs, errors[-1]) from errors[-1]


def _failed(model: nn.Module, args: Any, kwargs: Any, error: Exception) -> GraphError:
    text = str(error).strip().splitlines()
    given = [(k, _describe(v)) for k, v in (*enumerate(args), *kwargs.items())]
    return GraphError(
        f"the forward of {type(model).__name__} fails with these arguments",
        sides=[
            *((f"argument {k}", text) for k, text in given),
            ("it raises", f"{type(error).__name__}: {text[0] if text else ''}"),
        ],
        source=here(),
        hint="call the model with the same arguments first; ag.trace needs what model(…) needs",
    )


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype} on {value.device}" if isinstance(value, Tensor) else repr(value)[:60]


# ---------------------------------------------------------------------- running the model once


def _fake(model: nn.Module, args: Any, kwargs: Any, errors: list[Exception]) -> _Recorder:
    with _without_leaks(model) as recorder:
        _run(recorder, model, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
    return recorder


def _bfloat16(model: nn.Module, args: Any, kwargs: Any, errors: list[Exception]) -> _Recorder | None:
    """Some fake kernels (grouped matrix products) know bfloat16 only; shapes are the same."""
    if "bf16" not in str(errors[-1]).lower() and "bfloat16" not in str(errors[-1]).lower():
        return None
    with _without_leaks(model, torch.bfloat16) as recorder:
        _run(recorder, model, args, kwargs, FakeTensorMode(allow_non_fake_inputs=True))
    return recorder


def _real(model: nn.Module, args: Any, kwargs: Any, errors: list[Exception]) -> _Recorder:
    """A forward that looks at values (`.item()`) is run on the real tensors, if there are any."""
    if any(p.is_meta for p in model.parameters()):
        raise errors[0]
    kept = {id(b): (b, b.clone()) for b in model.buffers()}
    recorder = _Recorder(model, None)
    try:
        _run(recorder, model, args, kwargs, None)
        recorder.forget()
        return recorder
    finally:
        for buffer, values in kept.values():
            if buffer.shape != values.shape or not torch.equal(buffer, values):
                buffer.data = values


def _run(recorder: _Recorder, model: nn.Module, args: Any, kwargs: Any, mode: FakeTensorMode | None) -> None:
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_undisturbed(model))
        if mode is not None:
            faked = _Faker(mode, recorder.dtype)
            faked.swap(model)
            args, kwargs = faked.tree(args), faked.tree(kwargs)
            recorder.parameters = {id(faked(p)): n for n, p in recorder.named}
            stack.enter_context(mode)
        else:
            recorder.parameters = {id(p): n for n, p in recorder.named}
        model.eval()
        recorder.arguments(args, kwargs)
        stack.enter_context(recorder.hooks())
        stack.enter_context(_Operations(recorder))
        recorder.done(model(*args, **kwargs))


class _Faker:
    """Fake twins of tensors, one for each tensor."""

    def __init__(self, mode: FakeTensorMode, dtype: torch.dtype | None) -> None:
        self.mode = mode
        self.dtype = dtype
        self.made: dict[int, Any] = {}

    def __call__(self, tensor: Tensor) -> Any:
        if id(tensor) not in self.made:
            dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            with self.mode:
                device = "cpu" if tensor.is_meta else tensor.device
                twin = (
                    torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
                    if (tensor.layout == torch.strided)
                    else self.mode.from_tensor(tensor)
                )
                if isinstance(tensor, nn.Parameter):
                    twin = nn.Parameter(twin, requires_grad=False)
            self.made[id(tensor)] = (tensor, twin)
        return self.made[id(tensor)][1]

    def swap(self, model: nn.Module) -> None:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = self(tensor)

    def tree(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self(value)
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self.tree(v) for v in value)
        if type(value) is dict:
            return {k: self.tree(v) for k, v in value.items()}
        return value


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Every module's attributes, tables and mode are afterwards what they were before."""
    tables = ("_parameters", "_buffers", "_modules")
    before = [(m, dict(vars(m)), {t: dict(getattr(m, t)) for t in tables}) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for table, items in contents.items():
                getattr(module, table).clear()
                getattr(module, table).update(items)


@contextmanager
def _without_leaks(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[_Recorder]:
    """A forward that caches tensors must not keep fake ones: caches are cleared, anything else is an error."""
    recorder = _Recorder(model, dtype)
    try:
        yield recorder
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        _clear_caches(recorder.forget(), model)


def _clear_caches(seen: list[weakref.ref[Tensor]], model: nn.Module) -> None:
    if not _alive(seen):
        return
    gc.collect()
    left = _alive(seen)
    if not left:
        return
    for cached in [o for o in gc.get_objects() if isinstance(o, _lru_cache_wrapper)]:
        if any(_holds(cached, t) for t in left):
            cached.cache_clear()
    left.clear()
    gc.collect()
    left = _alive(seen)
    if left:
        owners = {type(o).__name__ for t in left for o in gc.get_referrers(t) if o is not left}
        raise GraphError(
            f"the forward of {type(model).__name__} keeps tensors between calls, in: {', '.join(sorted(owners))}",
            source=here(),
            hint="call the model once on real tensors before ag.trace, so that its cache is filled",
        )


def _alive(refs: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [t for t in (ref() for ref in refs) if t is not None]


def _holds(owner: Any, tensor: Tensor, depth: int = 4) -> bool:
    level = [owner]
    for _ in range(depth):
        level = [r for o in level for r in gc.get_referents(o) if not isinstance(r, type | nn.Module)]
        if any(r is tensor for r in level):
            return True
        if len(level) > 20_000:
            return False
    return False


# ---------------------------------------------------------------------- what happened


@dataclass(slots=True, eq=False)
class _Record:
    """One event: an input, an operation, or a call of a module without children."""

    kind: str
    op: str
    scope: str
    path: str = ""
    index: int = 0
    reads: list[tuple[_Record, Any]] = field(default_factory=list)
    params: dict[str, None] = field(default_factory=dict)
    outs: dict[Any, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    into: _Record | None = None
    name: str = ""

    def final(self) -> _Record:
        record = self
        while record.into is not None:
            record = record.into
        return record

    @property
    def main(self) -> Any:
        """The key of the first float tensor it gives, or else of its first tensor."""
        floats = [k for k, (_, dtype) in self.outs.items() if dtype.is_floating_point]
        return (floats or [*self.outs, None])[0]


@dataclass(slots=True, eq=False)
class _Frame:
    """A module call that is running."""

    path: str
    index: int
    scope: str
    records: list[_Record] = field(default_factory=list)
    calls_children: bool = False


class _Recorder:
    """The events of one run, and which event each tensor came from."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.model = model
        self.paths = {id(m): n for n, m in model.named_modules()}
        self.named = list(model.named_parameters(remove_duplicate=False))
        self.parameters: dict[int, str] = {}
        self.dtype = dtype
        self.values: dict[int, tuple[_Record, Any]] = {}
        self.storages: dict[int, list[Tensor]] = {}
        self.alive: list[Any] = []
        self.frames = [_Frame("", 0, "")]
        self.calls: dict[str, list[Any]] = {}
        self.root: list[_Record] = []
        self.inputs: list[_Record] = []
        self.paused = False
        self.results: list[tuple[tuple[Any, ...], tuple[_Record, Any]]] = []

    def forget(self) -> list[weakref.ref[Tensor]]:
        """Lets go of every tensor, and says which there were."""
        refs = [weakref.ref(t) for t in self.alive if isinstance(t, Tensor)]
        self.alive, self.storages, self.values, self.parameters = [], {}, {}, {}
        return refs

    def arguments(self, args: Any, kwargs: Any) -> None:
        """Every tensor among the arguments is an input, called as forward's signature calls it."""
        for name, value in _bound(self.model, args, kwargs).items():
            for path, tensor in tensors(value):
                key = ":".join([name, *(str(p).lstrip(".") for p in path)])
                record = _Record("input", "input", "", path=key)
                record.outs[()] = (tuple(tensor.shape), tensor.dtype)
                self.bind(tensor, record, ())
                self.inputs.append(record)

    def bind(self, tensor: Tensor, record: _Record, key: Any) -> None:
        self.values[id(tensor)] = (record, key)
        self.alive.append(tensor)
        self.storages.setdefault(_storage(tensor), []).append(tensor)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self.leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        path = self.paths[id(module)]
        index = len(self.calls.setdefault(path, []))
        self.calls[path].append(None)
        self.frames[-1].calls_children = True
        self.frames.append(_Frame(path, index, f"{path}@{index}" if index else path))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        frame = self.frames.pop()
        caller = self.frames[-1]
        given = [t for _, t in tensors((args, kwargs))]

        def fresh(tensor: Tensor) -> Tensor:
            """A tensor of its own where a module hands on what it was given."""
            same = any(tensor is g for g in given) and not self.made_in(tensor, frame)
            return tensor.view_as(tensor) if same else tensor

        self.paused = True
        output = replaced(output, fresh)
        self.paused = False
        outs = list(tensors(output))
        if not frame.calls_children:
            record = self.leaf(module, frame, caller, given, outs)
            caller.records.append(record)
        else:
            caller.records += frame.records
            for path, tensor in outs:
                if id(tensor) not in self.values:
                    self.passed_on(tensor, frame, caller, given)
        path, value = next(((p, t) for p, t in outs if t.dtype.is_floating_point), (None, None))
        inputs = self.float_inputs(module, args, kwargs)
        found = self.values[id(value)] if value is not None else None
        self.calls[frame.path][frame.index] = (found, path, inputs)
        return output

    def made_in(self, tensor: Tensor, frame: _Frame) -> bool:
        value = self.values.get(id(tensor))
        return value is not None and any(value[0] is r for r in frame.records)

    def leaf(self, module: nn.Module, frame: _Frame, caller: _Frame, given: list[Tensor], outs: list[Any]) -> _Record:
        """A call without calls inside is one node, whatever operations it was made of."""
        record = _Record("module", type(module).__name__, caller.scope, frame.path, frame.index)
        for tensor in given:
            if id(tensor) in self.values:
                record.reads.append(self.values[id(tensor)])
        for inner in frame.records:
            record.reads += [read for read in inner.reads if read[0] not in frame.records]
            record.params.update(inner.params)
        for inner in frame.records:
            inner.into = record
        for path, tensor in outs:
            record.outs[path] = (tuple(tensor.shape), tensor.dtype)
            self.bind(tensor, record, path)
        return record

    def passed_on(self, tensor: Tensor, frame: _Frame, caller: _Frame, given: list[Tensor]) -> None:
        """A value that a module hands on, or made where no operation was seen: named as an operation of its own."""
        record = _Record("op", "identity", frame.scope)
        record.reads = [self.values[id(g)] for g in given if id(g) in self.values]
        record.outs[()] = (tuple(tensor.shape), tensor.dtype)
        self.bind(tensor, record, ())
        caller.records.append(record)

    def float_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        try:
            bound = _bound(module, args, kwargs)
        except TypeError:
            return []
        return [
            (name, self.values[id(v)])
            for name, v in bound.items()
            if isinstance(v, Tensor) and v.dtype.is_floating_point and id(v) in self.values
        ]

    def operation(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs a torch function and notes what it read, made and changed in place."""
        if self.paused:
            return func(*args, **kwargs)
        given = [t for _, t in tensors((args, kwargs))]
        versions = [t._version for t in given]
        result = func(*args, **kwargs)
        mutated = [t for t, v in zip(given, versions, strict=True) if t._version != v]
        outs = list(tensors(result))
        if not outs and not mutated:
            return result
        frame = self.frames[-1]
        record = _Record("op", _op_name(func), frame.scope)
        for tensor in given:
            if id(tensor) in self.values:
                record.reads.append(self.values[id(tensor)])
            elif id(tensor) in self.parameters:
                record.params[self.parameters[id(tensor)]] = None

        def fresh(tensor: Tensor) -> Tensor:
            same = any(tensor is g for g in given) and not any(tensor is m for m in mutated)
            return tensor.view_as(tensor) if same else tensor

        if not mutated and outs:
            result = replaced(result, fresh)
            outs = list(tensors(result))
        for path, tensor in outs:
            record.outs[path] = (tuple(tensor.shape), tensor.dtype)
            self.bind(tensor, record, path)
        for tensor in mutated:
            key = next((p for p, t in outs if t is tensor), "changed")
            record.outs.setdefault(key, (tuple(tensor.shape), tensor.dtype))
            for alias in list(self.storages.get(_storage(tensor), [])):
                if self.values[id(alias)][0] is not record:
                    record.reads.append(self.values[id(alias)])
                    self.values[id(alias)] = (record, key)
            if id(tensor) not in self.values:
                self.bind(tensor, record, key)
        frame.records.append(record)
        return result

    def done(self, returned: Any) -> None:
        """The events of the whole run, and which of them give what the model returns."""
        self.root = self.frames[0].records
        self.results = [(p, self.values[id(t)]) for p, t in tensors(returned) if id(t) in self.values]


class _Operations(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.operation(func, args, kwargs or {})


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _op_name(func: Any) -> str:
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "get")
    return re.sub(r"\W+", "_", name.strip("_") if name.startswith("__") else name) or "op"


def _bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}_{i}": v for i, v in enumerate(value)})
        else:
            named[name] = value
    return named


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in a structure and the way to each: an index, a key, or `.name` for an attribute."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, (*path, i))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, (*path, key))
    elif is_dataclass(value) and not isinstance(value, type):
        for f in dataclass_fields(value):
            yield from tensors(getattr(value, f.name, None), (*path, "." + f.name))


def replaced(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The same structure, tensors replaced where `fn` gives another one."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        items = [replaced(v, fn) for v in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        value[:] = [replaced(v, fn) for v in value]
    elif isinstance(value, Mapping):
        for key in list(value):
            new = replaced(value[key], fn)
            if new is not value[key]:
                value[key] = new  # type: ignore[index]
    elif is_dataclass(value) and not isinstance(value, type):
        for f in dataclass_fields(value):
            old = getattr(value, f.name, None)
            new = replaced(old, fn)
            if new is not old:
                setattr(value, f.name, new)
    return value


# ---------------------------------------------------------------------- from events to a graph


class _Finish:
    """Names for the events, edges between the names, and the tables beside them."""

    def __init__(self, model: nn.Module, recorder: _Recorder, args: Any, kwargs: Any) -> None:
        self.model = model
        self.recorder = recorder
        self.example = _example(model, args, kwargs)
        self.nodes: dict[str, Node] = {}
        self.scopes: dict[str, str] = {}
        self.readers: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def graph(self) -> Graph:
        own: dict[str, dict[str, Param]] = {}
        params, tied, first = {}, {}, {}
        for name, tensor in self.recorder.named:
            if id(tensor) in first:
                tied[name] = first[id(tensor)]
                continue
            first[id(tensor)] = name
            params[name] = Param(tuple(tensor.shape), tensor.dtype)
            owner, _, last = name.rpartition(".")
            own.setdefault(owner, {})[last] = params[name]
        modules = {path for _, path in self.recorder.paths.items()}
        for record in self.recorder.inputs:
            record.name = f"/{record.path}" if record.path in modules else record.path
            self.add(record, [], {})
        for record in self.recorder.root:
            self.name(record)
            if record.outs:
                reads = [self.edge(r, k) for r, k in record.reads]
                self.add(record, reads, own.get(record.path, {}) if record.kind == "module" else {})
            for param in record.params:
                if param.rpartition(".")[0] != record.path or record.kind == "op":
                    self.readers.setdefault(param, record.name)
        imported = Imported(
            cls=type(self.model).__name__,
            modules={p: self.module(p, m) for p, m in self.model.named_modules()},
            params=params,
            tied=tied,
            readers=self.readers,
            scopes=self.scopes,
            example=self.example,
            host=self.model,
        )
        return Graph._of(nodes=self.nodes, outputs=self.outputs(), imported=imported).check()

    def name(self, record: _Record) -> None:
        if record.kind == "module":
            record.name = f"{record.path}@{record.index}" if record.index else record.path
            return
        stem = f"{record.scope}/{record.op}"
        count = self.counts.get(stem, 0)
        self.counts[stem] = count + 1
        record.name = f"{stem}_{count}" if count else stem

    def add(self, record: _Record, reads: list[str], params: Mapping[str, Param]) -> None:
        shape, dtype = record.outs[record.main]
        own = next(iter(params.values()), None)
        if self.recorder.dtype is not None and dtype == self.recorder.dtype:
            dtype = own.dtype if own is not None else next(self.model.parameters()).dtype
        inputs = tuple(dict.fromkeys(r for r in reads if r != record.name))
        name = record.name or type(self.model).__name__
        record.name = name
        self.nodes[name] = Node(record.op, inputs, name, shape, dtype, params=params)
        if record.kind != "input":
            self.scopes[name] = path_of(record.scope)

    def edge(self, record: _Record, key: Any) -> str:
        """The name of a value; a further output of a node becomes a node of its own."""
        final = record.final()
        if final is not record or key not in final.outs or key == final.main:
            return final.name
        label = ":".join([final.name, *(str(k).lstrip(".") for k in (key if isinstance(key, tuple) else (key,)))])
        label = re.sub(r"[^\w.@/:]", "_", label)
        if label not in self.nodes:
            shape, dtype = final.outs[key]
            self.nodes[label] = Node("output", (final.name,), label, shape, dtype)
            self.scopes[label] = path_of(final.scope)
        return label

    def module(self, path: str, module: nn.Module) -> Module:
        calls = []
        for made in self.recorder.calls.get(path, ()):
            found, where, inputs = made if made is not None else (None, None, [])
            output = self.edge(*found) if found is not None else None
            named = tuple((name, self.edge(*value)) for name, value in inputs)
            calls.append(Call(output, tuple(where or ()), named))
        return Module(type(module).__name__, tuple(calls))

    def outputs(self) -> Any:
        found = {":".join(str(k).lstrip(".") for k in path): self.edge(*v) for path, v in self.recorder.results}
        if not found:
            raise GraphError(f"the forward of {type(self.model).__name__} returns no tensor", source=here())
        return next(iter(found.values())) if list(found) == [""] else found


def _example(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments as shapes and plain values, for tracing again; None where that is not enough."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError

    try:
        return {name: plain(value) for name, value in _bound(model, args, kwargs).items()}
    except TypeError:
        return None
