"""What a graph costs before it is run, and what adapters of each size would add to it. Floor 6."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cost import NUMBERS, Cost, declared, imported
from .errors import GraphError, here
from .graph import Graph
from .methods import Bottleneck
from .select import Selector, entries_of


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
        return Cost("total", "", **{key: sum(getattr(row, key) for row in self.rows) for key in NUMBERS})

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
        if any(getattr(row, key) for key in NUMBERS):
            groups.setdefault((re.sub(r"(?<![A-Za-z])\d+", "*", row.name), row.op), []).append(row)
    return [
        found[0]
        if len(found) == 1
        else Cost(f"{name} × {len(found)}", op, **{key: sum(getattr(r, key) for r in found) for key in NUMBERS})
        for (name, op), found in groups.items()
    ]


def plan(graph: Graph, sizes: Mapping[str, int]) -> Plan:
    """See `Graph.plan`."""
    if graph.imported is None:
        return Plan(dict(sizes), declared(graph, sizes), traced=False)
    rows, shapes = imported(graph, sizes)
    return Plan(shapes, rows, traced=True)


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
        GraphError: it is given no graph, no placement, no list of sizes or no function of a size, or a placement is
            called `all`.

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
    if not isinstance(graph, Graph):
        hint = "ag.graph_of(model) of a compiled one, or ag.trace(model, …)"
        raise GraphError(f"plan_table takes a graph, not a {type(graph).__name__}", source=here(), hint=hint)
    if not callable(method):
        hint = "method=lambda size: ag.Bottleneck(size, scale='learned')"
        raise GraphError(f"method= is a function of a size, not {method!r}", source=here(), hint=hint)
    if not isinstance(at, Mapping) or not at or "all" in at or not isinstance(sizes, Sequence) or not sizes:
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
