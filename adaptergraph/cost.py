"""What each node costs, counted by running a graph once on tensors without values. Floor 6."""

from __future__ import annotations

import gc
import math
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .errors import GraphError, here
from .graph import Graph
from .hosting.sites import attach
from .imported import Imported
from .layers.table import OPS, runnable
from .loading import Loading
from .lower import lower
from .node import Node, Param, format_shape
from .shapes import Value, quiet
from .state import shared_copy
from .tracing.arguments import from_example
from .tracing.fakes import Faker, Fakes, clear_caches
from .tracing.trace import mapped

_ADAMW = 2 * 4  # two float32 moments for each trained parameter


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _grouped_flops(rows: Any, weights: Any, *rest: Any, **options: Any) -> int:
    return 2 * math.prod(rows) * int(weights[-1])


# what torch does not count: the attention kernel of the CPU, and matrix products of experts
_KERNELS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one node costs; of an imported graph, one module, with the operations in its own forward.

    Attributes:
        name: the node or module; a model's own operations stand under the name of its class.
        op: its op, or class.
        parameters: how many numbers it holds; a tensor with several names counts at the first.
        trained: how many of them training changes.
        flops: of one forward.
        activations: bytes that autograd keeps for the backward of one forward.
        gradients: bytes, of trained parameters.
        optimizer: bytes, of AdamW.
    """

    name: str
    op: str
    parameters: int = 0
    trained: int = 0
    flops: int = 0
    activations: int = 0
    gradients: int = 0
    optimizer: int = 0


NUMBERS = [f.name for f in fields(Cost)[2:]]


class _Meter:
    """Counts FLOPs and kept bytes, and gives them to whoever runs at that moment."""

    def __init__(self, model: nn.Module) -> None:
        self.running = [""]
        self.flops: Counter[str] = Counter()
        self.activations: Counter[str] = Counter()
        # a parameter that is kept for backward is there anyway
        held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
        self.kept = {storage._cdata: storage for storage in held}
        self.counter = FlopCounterMode(display=False, custom_mapping=_KERNELS)
        self.counted = 0

    @contextmanager
    def on(self) -> Iterator[None]:
        with torch.enable_grad(), saved_tensors_hooks(self.keep, lambda nothing: nothing), self.counter:
            yield

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.kept:
            self.kept[storage._cdata] = storage
            self.activations[self.running[-1]] += storage.nbytes()

    def enter(self, name: str) -> None:
        self.settle()
        self.running.append(name)

    def leave(self) -> None:
        self.settle()
        self.running.pop()

    def settle(self) -> None:
        """What was counted since the last time goes to whoever ran."""
        total = self.counter.get_total_flops()
        self.flops[self.running[-1]] += total - self.counted
        self.counted = total

    def cost(self, name: str, op: str, params: Mapping[str, Param], graph: Graph) -> Cost:
        trained = [p for n, p in params.items() if graph.trained[n]]
        return Cost(
            name,
            op,
            sum(p.size for p in params.values()),
            sum(p.size for p in trained),
            self.flops[name],
            self.activations[name],
            sum(p.size * p.dtype.itemsize for p in trained),
            sum(p.size for p in trained) * _ADAMW,
        )


@contextmanager
def _weightless(model: nn.Module, graph: Graph) -> Iterator[None]:
    """The model over tensors without values; afterwards no cache of a library holds one."""
    mode = Fakes()
    Faker(mode).swap(model.modules())
    tied = graph.imported.tied if graph.imported is not None else {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(graph.trained[tied.get(name, name)])
    try:
        with Loading(), quiet(), torch.random.fork_rng(devices=[]), mode:
            yield
    finally:
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        left = [t for t in gc.get_objects() if type(t) is FakeTensor and t.fake_mode is mode and id(t) not in own]
        clear_caches(left)


def _failed(name: str, error: Exception) -> GraphError:
    # the frames of the traceback hold tensors of the run
    traceback.clear_frames(error.__traceback__)
    text = str(error).strip().splitlines() or [""]
    return GraphError(
        f"{name!r} cannot be planned: it does not run on tensors without values",
        node=name,
        sides=[("it raises", f"{type(error).__name__}: {text[0]}")],
        source=here(),
        hint="a forward that looks at values (.item(), a branch on a tensor) has no cost that is known before",
    )


def declared(graph: Graph, sizes: Mapping[str, int]) -> tuple[Cost, ...]:
    """One row for each node of a declared graph."""
    shapes = _shapes(graph, sizes)
    model = lower(graph, device="meta")
    with ExitStack() as stack:
        stack.enter_context(_weightless(model, graph))
        meter = _Meter(model)
        values: dict[str, Any] = {n: torch.zeros(s, dtype=graph.inputs[n].dtype) for n, s in shapes.items()}
        stack.enter_context(meter.on())
        for name, node in graph._nodes.items():
            if node.op != "input":
                meter.enter(name)
                try:
                    values[name] = _run(model, graph, node, [values[i] for i in node.inputs])
                except Exception as error:
                    raise _failed(name, error) from error
                meter.leave()
        values.clear()
    seen: set[str] = set()
    rows = []
    for name, node in graph._nodes.items():
        own = {n: graph.params[n] for n in node.param_names() if n not in seen}
        seen.update(own)
        rows.append(meter.cost(name, node.op, own, graph))
    return tuple(rows)


def _run(model: nn.Module, graph: Graph, node: Node, given: list[Any]) -> Any:
    """One node of a declared graph, as its generated code runs it."""
    row = OPS.get(node.op)
    if node.op in ("param", "constant"):
        return getattr(model.get_submodule(node.path.rpartition(".")[0]), node.path.rpartition(".")[2])
    if node.op == "module" or (row is not None and row.module is not None):
        return model.get_submodule(node.path)(*given)
    reads = [graph._nodes[i] for i in node.inputs]
    return runnable(node.op, node.options)([Value(n.shape or (), n.dtype or torch.float32) for n in reads])(*given)


def _shapes(graph: Graph, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs at these sizes."""
    wanted = {d: n for n, node in graph.inputs.items() for d in node.shape or () if not isinstance(d, int)}
    if None in wanted:
        raise GraphError(
            f"input {wanted[None]!r} has a size without a name, so nobody can say how large it is",
            node=wanted[None],
            source=here(),
            hint="call it something: shape=('batch', …)",
        )
    names = [str(d) for d in wanted]
    missing = [d for d in names if d not in sizes]
    unknown = [d for d in sizes if d not in names]
    wrong = [d for d, size in sizes.items() if isinstance(size, bool) or not isinstance(size, int) or size < 1]
    if missing or unknown or wrong:
        say = [("missing", missing), ("unknown", unknown), ("no size", [f"{d} = {sizes[d]!r}" for d in wrong])]
        raise GraphError(
            "a plan needs the size of every named dimension: " + (", ".join(names) or "this graph has none"),
            sides=[(what, ", ".join(which)) for what, which in say if which],
            source=here(),
            hint=f"graph.plan({', '.join(f'{d}=8' for d in names)})",
        )
    return {n: tuple(sizes.get(d, d) for d in node.shape or ()) for n, node in graph.inputs.items()}  # type: ignore[arg-type]


def imported(graph: Graph, sizes: Mapping[str, int]) -> tuple[tuple[Cost, ...], dict[str, str]]:
    """One row for each module of an imported graph, and the shapes of the traced call."""
    origin = graph.imported
    assert origin is not None
    if sizes:
        raise GraphError(
            f"an imported graph is planned at the sizes it was traced with: it has no size {next(iter(sizes))!r}",
            source=here(),
            hint="trace the model with arguments of that size, then graph.plan()",
        )
    if origin.host is None or (origin.given is None and origin.example is None):
        what = "and has no model" if origin.host is None else "which keeps no arguments but tensors and plain values"
        raise GraphError(
            f"this graph came from a file {what}, and a plan runs the model",
            source=here(),
            hint="trace the model, and plan that graph",
        )
    # nothing of the model is copied but its module tree: the parameters are shared, and then swapped
    model = shared_copy(origin.host, {})
    attach(model, graph, device="meta")
    model.train()
    names = {path: path or origin.cls for path, _ in model.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(_weightless(model, graph))
        meter = _Meter(model)
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, name=names[path]: meter.enter(name))
            module.register_forward_hook(lambda m, a, out: meter.leave())
        args, kwargs = _arguments(model, origin)
        stack.enter_context(meter.on())
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise _failed(meter.running[-1] or origin.cls, error) from error
        del args, kwargs
    own: dict[str, dict[str, Param]] = {}
    for name, param in graph.params.items():
        own.setdefault(names[name.rpartition(".")[0]], {})[name] = param
    rows = [meter.cost(n, type(m).__name__, own.get(n, {}), graph) for n, m in _named(model, names)]
    return tuple(rows), {name: format_shape(node.shape) for name, node in graph.inputs.items()}


def _arguments(model: nn.Module, origin: Imported) -> tuple[Any, Any]:
    """Those of the traced call, over zeros."""
    if origin.given is None:
        return from_example(model, origin.example or {})
    args, kwargs = (mapped(given, lambda t: torch.zeros(t.shape, dtype=t.dtype)) for given in origin.given)
    return args, kwargs


def _named(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    return ((names[path], module) for path, module in model.named_modules())
