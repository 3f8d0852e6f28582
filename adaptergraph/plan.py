"""What a graph costs before it is run: parameters, FLOPs and memory, and what adapters of each size would add. Floor 6.

Nothing is computed: the graph runs once on tensors without values, and what autograd would keep is added up.
"""

from __future__ import annotations

import gc
import io
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .errors import GraphError, here
from .exchange import dtype_from
from .graph import Graph
from .layers.table import OPS, runnable
from .lower import lower
from .methods import Bottleneck
from .node import Node, Param, format_shape
from .select import Selector, entries_of
from .shapes import Value, quiet
from .sites import attach
from .state import shared_copy
from .trace import _Faker, _holds

_ADAMW = 2 * 4  # two float32 moments for each trained parameter


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts every attention kernel but the one of the CPU
_KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


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


_NUMBERS = [f.name for f in fields(Cost)[2:]]


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What a graph costs at given sizes; the result of `graph.plan`. `print(plan)` is a table.

    The totals are attributes of the same names as those of a `Cost`.

    Attributes:
        sizes: of the named dimensions; of an imported graph, the shapes of the tensors it was traced with.
        rows: one `Cost` for each node or module, in the order of the graph.
        traced: whether the sizes are those of a traced call.
    """

    sizes: Mapping[str, Any]
    rows: tuple[Cost, ...]
    traced: bool

    @property
    def total(self) -> Cost:
        """The sum of all rows."""
        return Cost("total", "", **{key: sum(getattr(row, key) for row in self.rows) for key in _NUMBERS})

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        return self.total.parameters

    @property
    def trained(self) -> int:
        """How many of them training changes."""
        return self.total.trained

    @property
    def trained_share(self) -> float:
        """Trained parameters by all parameters, 0 to 1."""
        return self.trained / self.parameters if self.parameters else 0.0

    @property
    def flops(self) -> int:
        """FLOPs of one forward; a multiply-add is two."""
        return self.total.flops

    @property
    def activations(self) -> int:
        """Bytes that autograd keeps for the backward of one forward."""
        return self.total.activations

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of trained parameters."""
        return self.total.gradients

    @property
    def optimizer(self) -> int:
        """Bytes of AdamW's state."""
        return self.total.optimizer

    def __repr__(self) -> str:
        return f"<Plan: {self.trained:,} of {self.parameters:,} parameters trained, {_short(self.flops)}FLOPs>"

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True, padding=(0, 1))
        total = _cells(self.total)
        table.add_column("node", total[0], no_wrap=True)
        for head, foot in zip(("parameters", "trained", "FLOPs", "activations", "optimizer"), total[1:], strict=True):
            table.add_column(head, foot, justify="right", no_wrap=True)
        for row in _folded(self.rows):
            table.add_row(*_cells(row))
        console = Console(width=100, file=io.StringIO(), color_system=None, highlight=False, markup=False)
        console.print(table)
        for line in self._lines():
            console.print(line)
        written = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in written.splitlines() if line.strip())

    def _lines(self) -> Iterator[str]:
        what = "at the sizes of the traced call:" if self.traced else "at"
        yield f"{what} {', '.join(f'{k} = {v}' for k, v in self.sizes.items())}".rstrip()
        yield f"trained: {self.trained:,} of {self.parameters:,} parameters, {100 * self.trained_share:.2f} %"
        together = self.activations + self.gradients + self.optimizer
        yield f"for training: {_short(together)}B, of which gradients {_short(self.gradients)}B"


def _cells(row: Cost) -> list[str]:
    numbers = [f"{row.parameters:,}", f"{row.trained:,}"]
    sizes = [_short(row.flops), f"{_short(row.activations)}B", f"{_short(row.optimizer)}B"]
    name = row.name if len(row.name) <= 34 else "…" + row.name[-33:]
    return [name, *("" if cell in ("0", "0 ", "0 B") else cell for cell in numbers + sizes)]


def _short(number: float) -> str:
    """A number with a decimal prefix, ready for its unit.

    >>> _short(2_379_264), _short(12)
    ('2.38 M', '12 ')
    """
    power = min(5, (len(str(int(number))) - 1) // 3)
    digits = 3 - len(str(int(number / 1000**power))) if power else 0
    return f"{number / 1000**power:.{max(0, digits)}f} {' kMGTP'[power].strip()}"


def _folded(rows: Sequence[Cost]) -> list[Cost]:
    """One row for all nodes whose names differ in numbers only; rows that cost nothing are left out."""
    groups: dict[tuple[str, str], list[Cost]] = {}
    for row in rows:
        if any(getattr(row, key) for key in _NUMBERS):
            groups.setdefault((re.sub(r"(?<![A-Za-z])\d+", "*", row.name), row.op), []).append(row)
    return [
        found[0]
        if len(found) == 1
        else Cost(f"{name} × {len(found)}", op, **{key: sum(getattr(r, key) for r in found) for key in _NUMBERS})
        for (name, op), found in groups.items()
    ]


# ---------------------------------------------------------------------- running on tensors without values


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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _Faker(mode, None).swap(model)
    tied = graph.imported.tied if graph.imported is not None else {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(graph.trained[tied.get(name, name)])
    try:
        with quiet(), torch.random.fork_rng(devices=[]), mode:
            yield
    finally:
        own = {id(t) for t in (*model.parameters(), *model.buffers())}
        objects = gc.get_objects()
        left = [t for t in objects if type(t) is FakeTensor and t.fake_mode is mode and id(t) not in own]
        for cached in [o for o in objects if type(o) is _lru_cache_wrapper] if left else ():
            if cached.cache_info().currsize and any(_holds(cached, t) for t in left):
                cached.cache_clear()


def plan(graph: Graph, sizes: Mapping[str, int]) -> Plan:
    """See `Graph.plan`."""
    return _imported(graph, sizes) if graph.imported is not None else _declared(graph, sizes)


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


def _declared(graph: Graph, sizes: Mapping[str, int]) -> Plan:
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
    return Plan(dict(sizes), tuple(rows), traced=False)


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


def _imported(graph: Graph, sizes: Mapping[str, int]) -> Plan:
    imported = graph.imported
    assert imported is not None
    if sizes:
        raise GraphError(
            f"an imported graph is planned at the sizes it was traced with: it has no size {next(iter(sizes))!r}",
            source=here(),
            hint="trace the model with arguments of that size, then graph.plan()",
        )
    if imported.host is None or imported.example is None:
        what = "came from a file and has no model" if imported.host is None else "was traced with other than tensors"
        raise GraphError(
            f"this graph {what}, and a plan runs the model",
            source=here(),
            hint="trace the model with tensors, and plan that graph",
        )
    # nothing of the model is copied but its module tree: the parameters are shared, and then swapped
    model = shared_copy(imported.host, {})
    attach(model, graph, device="meta")
    model.train()
    names = {path: path or imported.cls for path, _ in model.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(_weightless(model, graph))
        meter = _Meter(model)
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, name=names[path]: meter.enter(name))
            module.register_forward_hook(lambda m, a, out: meter.leave())
        given = {
            name: torch.zeros(v["shape"], dtype=dtype_from(v["dtype"])) if "shape" in v else v["value"]
            for name, v in imported.example.items()
        }
        stack.enter_context(meter.on())
        try:
            model(**given)
        except Exception as error:
            raise _failed(meter.running[-1] or imported.cls, error) from error
        given.clear()
    own: dict[str, dict[str, Param]] = {}
    for name, param in graph.params.items():
        own.setdefault(names[name.rpartition(".")[0]], {})[name] = param
    rows = [meter.cost(n, type(m).__name__, own.get(n, {}), graph) for n, m in _named(model, names)]
    shapes = {n: format_shape(tuple(v["shape"])) for n, v in imported.example.items() if "shape" in v}
    return Plan(shapes, tuple(rows), traced=True)


def _named(model: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[str, nn.Module]]:
    return ((names[path], module) for path, module in model.named_modules())


# ---------------------------------------------------------------------- adapters of each size


@dataclass(frozen=True, slots=True)
class Added:
    """What one size at one placement adds.

    Attributes:
        at: the label of the placement.
        sites: how many bodies there are.
        size: of each.
        parameters: of all of them.
        share: `parameters` by the parameters of the hosts, 0 to 1.
    """

    at: str
    sites: int
    size: int
    parameters: int
    share: float


@dataclass(frozen=True, slots=True, repr=False)
class PlanTable:
    """Parameters by placement and size; the result of `ag.plan_table`. Prints as a Markdown table.

    Attributes:
        host_parameters: what the percentages are of.
        rows: one `Added` for each placement and size.
    """

    host_parameters: int
    rows: tuple[Added, ...]

    def __str__(self) -> str:
        sizes = list(dict.fromkeys(row.size for row in self.rows))
        lines = [["at", "sites", *map(str, sizes)], ["---", *("--:" for _ in ("sites", *sizes))]]
        for at in dict.fromkeys(row.at for row in self.rows):
            cells = [row for row in self.rows if row.at == at]
            counts = [f"{row.parameters:,} ({100 * row.share:.2f} %)" for row in cells]
            lines.append([at, str(cells[0].sites), *counts])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    __repr__ = __str__


def plan_table(
    graph: Graph,
    *,
    at: Mapping[str, Selector],
    sizes: Sequence[int] = (8, 32, 64, 128, 256),
    method: Callable[[int], Any] = Bottleneck,
) -> PlanTable:
    """What adapters of each size at each placement add to this graph: true numbers in the place of a rule of thumb.

    Each cell is counted by really splicing. The percentage is of the host's parameters, which stay as they are.

    Args:
        graph: declared or imported; bodies that are there already are not counted.
        at: label → selector, for example `{"attention": "**.attention.output.dense", "ffn": "**.ffn.down"}`. With two
            or more there is a further row `all`.
        sizes: the columns; what `method` is called with.
        method: makes what is spliced from a size, for example `lambda r: ag.Bottleneck(r, scale="learned")`.

    Raises:
        UnknownNode: a selector selects nothing.
        GraphError: there is no placement or no size, or a placement is called `all`.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 768))
    >>> graph = ag.Graph(ag.dense(ag.dense(x, 768, name="a"), 768, name="b"))
    >>> ag.plan_table(graph, at={"first": "a", "second": "b"}, sizes=[8, 64])
    | at | sites | 8 | 64 |
    | --- | --: | --: | --: |
    | first | 1 | 13,064 (1.11 %) | 99,136 (8.39 %) |
    | second | 1 | 13,064 (1.11 %) | 99,136 (8.39 %) |
    | all | 2 | 26,128 (2.21 %) | 198,272 (16.79 %) |
    """
    if not isinstance(at, Mapping) or not at or "all" in at or not sizes:
        raise GraphError(
            "a table of plans needs sizes, and placements by label; `all` is the row of all of them",
            sides=[("at", repr(at)), ("sizes", repr(sizes))],
            source=here(),
            hint="at={'attention': '**.attention.output.dense', 'ffn': '**.ffn.down'}",
        )
    places: dict[str, Any] = {label: graph.select(where) for label, where in at.items()}
    if len(places) > 1:
        places["all"] = [entry for where in at.values() for entry in entries_of(where)]
    host = sum(p.size for n, p in graph.params.items() if n not in graph.body_params)
    name = "adapter"
    while any(body.endswith(f".{name}") for body in graph.bodies):
        name += "_"
    rows = []
    for label, where in places.items():
        for size in sizes:
            spliced = graph.splice(where, method(size), name=name)
            added = sum(spliced.params[p].size for p in spliced.body_params - graph.body_params)
            rows.append(Added(label, len(spliced.bodies) - len(graph.bodies), size, added, added / host))
    return PlanTable(host, tuple(rows))
