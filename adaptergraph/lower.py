"""Graph → `torch.fx.GraphModule`: straight-line code that a person can read. Floor 4.

Graphs of equal structure share one generated class, so that twelve equal bodies are one class to `torch.compile`.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .collect import sizes_of_optional
from .errors import GraphError, ShapeMismatch
from .graph import Graph
from .hosting.hosted import add_child, keep_frozen_statistics, refuse_host
from .layers.initializers import initialise
from .layers.table import OPS, runnable
from .node import Node, Shape, format_shape
from .shapes import Value, uncollected
from .splicing.draft import map_outputs
from .splicing.site import HALF
from .switch import Switch


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a compiled graph expects of its arguments; dtypes follow the model when it is moved."""

    specs: tuple[tuple[str, Shape, torch.dtype], ...]
    optional: frozenset[str] = frozenset()


def check_inputs(inputs: Inputs, *values: Tensor | None) -> None:
    """Enforces the declared shapes and dtypes of the inputs; called first in the generated code."""
    sizes: dict[str, Any] = {}
    for (name, shape, dtype), value in zip(inputs.specs, values, strict=True):
        if value is None and name in inputs.optional:
            continue
        if not isinstance(value, Tensor):
            _plainly(f"input {name!r} is no tensor")
            what = "is missing" if value is None else f"is no tensor but a {type(value).__name__}"
            raise GraphError(f"input {name!r} {what}", node=name, hint=f"call model({name}=…)")
        if value.dtype != dtype and not _cast_later(value, dtype):
            _plainly(f"input {name!r} has another dtype than declared: {dtype}")
            raise ShapeMismatch(
                f"input {name!r} has another dtype than declared",
                node=name,
                sides=[("declared", str(dtype)), ("given", str(value.dtype))],
                hint=f"{name}.to({dtype})",
            )
        fits = len(shape) == value.dim()
        for want_size, size in zip(shape, value.shape, strict=False):
            if isinstance(want_size, str):
                fits = fits and sizes.setdefault(want_size, size) == size
            elif want_size is not None:
                fits = fits and want_size == size
        if not fits:
            _plainly(f"input {name!r} has another shape than declared: {format_shape(shape)}")
            raise ShapeMismatch(
                f"input {name!r} has another shape than declared",
                node=name,
                sides=_both_shapes(shape, value, sizes),
                hint=f"give a tensor of {len(shape)} dimensions with these sizes; a name is one size in all inputs",
            )


def _cast_later(value: Tensor, dtype: torch.dtype) -> bool:
    """Autocast mends it."""
    both_floats = dtype.is_floating_point and value.is_floating_point()
    return both_floats and torch.is_autocast_enabled(value.device.type)


def _plainly(message: str) -> None:
    """The error for `torch.compile(fullgraph=True)`, which can trace no other; without `fullgraph` ours follows."""
    if torch.compiler.is_compiling():
        raise ValueError(message)


def _both_shapes(shape: Shape, value: Tensor, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    rows = [("declared", format_shape(shape)), ("given", format_shape(tuple(value.shape)))]
    return rows + ([("where", ", ".join(f"{k} = {v}" for k, v in sizes.items()))] if sizes else [])


class CompiledGraph(torch.fx.GraphModule):
    """A graph as a torch module: readable `code`, parameters called as its nodes are.

    Copies and pickles keep their class, so that equal graphs stay one class; pickle stores the graph, not code.
    """

    _source: Graph
    _inputs: Inputs

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledGraph:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        keep = {id(self._graph): self._graph, id(self._source): self._source}
        memo.update(keep)
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_graph", "_source")}
        return _shell, (self._source, bool(self._inputs.specs)), state

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # what `half()` or `to(…)` does to parameters it means for inputs too
        specs = tuple((name, shape, fn(torch.empty(0, dtype=d)).dtype) for name, shape, d in self._inputs.specs)
        self._inputs = replace(self._inputs, specs=specs)
        return self


_CLASSES: dict[str, tuple[type[CompiledGraph], dict[str, Any]]] = {}


def _shell(graph: Graph, checked: bool) -> CompiledGraph:
    """A module with the code of a graph and no parameters yet; `checked` code begins with a check of the inputs."""
    program = _program(graph, checked)
    code = program.python_code("self")
    key = code.src + "".join(sorted(f"{k}:{id(v)}" for k, v in code.globals.items()))
    if key not in _CLASSES:
        first = CompiledGraph(nn.Module(), _targetless(program), "CompiledGraph")
        first._graph = program
        first.recompile()
        cls: Any = type(first)
        # fx wraps __call__ to print generated code on errors; ours say more
        del cls.__call__
        cls.__qualname__ = "CompiledGraph"
        cls.__module__ = __name__
        plain = vars(nn.Module()).keys()
        _CLASSES[key] = cls, {k: v for k, v in first.__dict__.items() if k not in plain and k != "_graph"}
    cls, attributes = _CLASSES[key]
    shell = object.__new__(cls)
    nn.Module.__init__(shell)
    shell.__dict__.update(copy.copy(attributes))
    shell.__dict__["_graph"] = program
    shell._source = graph
    specs = ((n, i.shape or (), i.dtype or torch.float32) for n, i in graph.inputs.items())
    optional = frozenset(n for n, i in graph.inputs.items() if i.options.get("optional"))
    shell._inputs = Inputs(tuple(specs) if checked else (), optional=optional)
    return shell


def _targetless(program: torch.fx.Graph) -> torch.fx.Graph:
    """Fx checks that every target exists before there are modules; an empty graph has none."""
    empty = torch.fx.Graph()
    empty.output(None)
    return empty


def _program(graph: Graph, checked: bool) -> torch.fx.Graph:
    """The fx graph: one call for each node, in the graph's order."""
    program = torch.fx.Graph()
    values: dict[str, Any] = {}
    for name in graph.inputs:
        values[name] = program.placeholder(name, default_value=None) if checked else program.placeholder(name)
    given = next(iter(values.values()), None)
    if checked:
        program.call_function(check_inputs, (program.get_attr("_inputs"), *values.values()))
    narrow = not checked and any(n.dtype in HALF for n in graph.inputs.values()) and bool(graph.params)
    if narrow:
        # small updates are lost in half precision: compute in the dtype of the body's own parameters
        own = program.call_function(getattr, (program.get_attr(next(iter(graph.params))), "dtype"))
        values = {n: program.call_method("to", (v, own)) for n, v in values.items()}
    inside = _switched(graph)
    _refuse_readers(graph, inside)
    for name, node in graph._nodes.items():
        if node.op == "optional":
            values[name] = _optional(program, graph, name, values)
        elif node.op == "switch" and node.body in inside:
            given_to = [values[i] for i in _outside(graph, node.body)]
            values[name] = program.call_module(node.body, tuple(given_to))
        elif node.op != "input" and node.body not in inside:
            values[name] = _call(program, node, [values[i] for i in node.inputs])
    outputs: Any = graph.outputs
    if narrow:
        back = program.call_function(getattr, (given, "dtype"))
        values[outputs] = program.call_method("to", (values[outputs], back))
    program.output(map_outputs(outputs, values))
    return program


def _optional(program: torch.fx.Graph, graph: Graph, name: str, values: Mapping[str, Any]) -> Any:
    """A missing input is stood in for by its default, in the sizes that other inputs have."""
    node = graph._nodes[name]
    sizes = sizes_of_optional(graph, name, node)
    given = [program.call_method("size", (values[s[0]], s[1])) if isinstance(s, tuple) else s for s in sizes]
    like = next((values[n] for n, i in graph.inputs.items() if not i.options.get("optional")), None)
    label = re.sub(r"\W", "_", name)
    arguments = (values[node.inputs[0]], tuple(given), node.options["default"], node.dtype, like)
    return program.create_node("call_function", OPS["optional"].function, arguments, name=label)  # type: ignore[arg-type]


def _call(program: torch.fx.Graph, node: Node, inputs: list[Any]) -> Any:
    path = node.path
    label = re.sub(r"\W", "_", node.name or "")
    if node.op in ("param", "constant"):
        return program.create_node("get_attr", path, name=label)
    row = OPS.get(node.op)
    if node.op == "switch":
        raise GraphError(
            f"{node.name!r} is a switch inside a body: it must be the last thing its method does",
            node=node.name,
            source=node.source,
            hint="splice twice: once the Switch, once what comes after it",
        )
    if row is None or row.module is not None:
        return program.create_node("call_module", path, tuple(inputs), name=label)
    options = {k: v for k, v in node.options.items() if not k.endswith("_init")}
    assert row.function is not None
    if not row.fold:
        return program.create_node("call_function", row.function, tuple(inputs), options, name=label)
    result = inputs[0]
    for value in inputs[1:]:
        result = program.create_node("call_function", row.function, (result, value), name=label)
    return result


@uncollected()
def lower(
    graph: Graph,
    *,
    seed: int = 0,
    prefix: str = "",
    checked: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CompiledGraph | Switch:
    """The graph as a module with its starting values; a body that ends in a switch is one module for each task.

    Args:
        seed: with a parameter's name all that its starting value depends on.
        prefix: of those names, when the module becomes part of another one.
        checked: enforce the declared inputs at each call.
        device, dtype: of the new parameters.
    """
    start: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype}
    last = graph._nodes[graph.outputs] if isinstance(graph.outputs, str) else None
    if not checked and last is not None and last.op == "switch":
        return _lowered_switch(graph, last, prefix, start)
    shell = _shell(graph, checked)
    inside = _switched(graph)
    nodes = {node.path: node for node in graph.nodes() if node.op != "input" and node.body not in inside}
    # on the CPU wherever they go: the starting values are the same on every device
    meta = device is not None and torch.device(device).type == "meta"
    made: dict[str, Node | None] = {}
    with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
        # short paths first: `a` before `a.adapter.down`
        for path, node in sorted(nodes.items(), key=lambda item: item[0].count(".")):
            value = _made(graph, node, prefix + path, seed)
            if value is not None:
                _place(shell, path, value, node, made)
    for body, switch in inside.items():
        child = lower(body_graph(graph, body), prefix=f"{prefix}{body}.", checked=False, **start)
        _place(shell, body, child, switch, made)
    for name, parameter in shell.named_parameters():
        parameter.requires_grad_(graph.trained.get(name, True))
    hosts = [name for name in graph.params if name not in graph.body_params]
    all_frozen = bool(hosts) and not any(graph.trained[name] for name in hosts)
    keep_frozen_statistics(shell, graph.trained, frozen=all_frozen)
    return shell if device is None and dtype is None else shell.to(device=device, dtype=dtype)


def _switched(graph: Graph) -> dict[str, Node]:
    """The bodies that end in a switch, and these; each is called as one module."""
    ends = {written: name for name, body in graph.bodies.items() for _, written in body.calls}
    return {ends[n]: node for n, node in graph._nodes.items() if node.op == "switch" and n in ends}


def _refuse_readers(graph: Graph, inside: Mapping[str, Node]) -> None:
    """What is inside a branch is there for its task only: nothing else can read it, and no graph can return it."""
    if not inside:
        return
    written = {value for body in inside for _, value in graph.bodies[body].calls}
    reads = [(f"{n!r} reads", i, node.body) for n, node in graph._nodes.items() for i in node.inputs]
    for who, value, own in [*reads, *(("the graph returns", name, None) for name in graph.output_names())]:
        body = graph._nodes[value].body
        if body is not None and body in inside and body != own and value not in written:
            raise GraphError(
                f"{who} {value!r}, which is in one branch of the switch {body!r}: it is there for one task only",
                node=value,
                hint=f"read what the switch gives: {graph.bodies[body].calls[0][1]!r}",
            )


def _lowered_switch(graph: Graph, switch: Node, prefix: str, start: Mapping[str, Any]) -> Switch:
    """Each branch as a graph of its own, over the same inputs."""
    branches = {}
    for task, output in zip(switch.options["tasks"], switch.inputs[1:], strict=True):
        below = f"{task}."
        short = {n: n.removeprefix(below) for n in graph._nodes if n in graph.inputs or n.startswith(below)}
        nodes = {
            new: replace(graph._nodes[old], name=new, inputs=tuple(short[i] for i in graph._nodes[old].inputs))
            for old, new in short.items()
        }
        branch = Graph._of(nodes=nodes, outputs=short[output])
        branches[task] = lower(branch, prefix=prefix + below, checked=False, **start)
    return Switch(prefix.removesuffix("."), branches)


def _made(graph: Graph, node: Node, name: str, seed: int) -> Any:
    """The module, parameter or buffer of a node; None for one that is a function only."""
    row = OPS.get(node.op)
    if node.op == "constant":
        return node.options["value"].clone()
    if node.op == "param":
        own = node.params[""]
        parameter = nn.Parameter(torch.empty(own.shape, dtype=own.dtype))
        _filled({"init": parameter}, node.options, name, seed)
        return parameter
    if node.op == "module":
        return copy.deepcopy(node.options["module"])
    if row is not None and row.module is None:
        return None
    # a body of a half-precision host has parameters of another dtype than what it reads
    dtype = next((p.dtype for p in node.params.values()), torch.float32)
    values = [Value(graph._nodes[i].shape or (), dtype) for i in node.inputs]
    torch.default_generator.manual_seed(_seed(seed, name))
    module = runnable(node.op, node.options)(values)
    _filled({f"{n}_init": p for n, p in module.named_parameters()}, node.options, name, seed)
    return module


def _filled(parameters: Mapping[str, Any], options: Mapping[str, Any], name: str, seed: int) -> None:
    for key, parameter in parameters.items():
        if options.get(key) is not None:
            torch.default_generator.manual_seed(_seed(seed, f"{name}.{key}"))
            initialise(parameter, options[key])


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _place(root: nn.Module, path: str, value: Any, node: Node, made: dict[str, Node | None]) -> None:
    """Puts a node's tensors where its name says.

    Args:
        made: the modules so far by path: the node they are of, or None for one that was made for a name.
    """
    *parents, last = path.split(".")
    owner, at = root, ""
    for part in parents:
        before, at = at, f"{at}.{part}" if at else part
        if at not in made:
            _refuse_child(owner, part, node, made.get(before))
            add_child(owner, part, nn.Module())
            made[at] = None
        owner = owner._modules[part]  # type: ignore[assignment]
    _refuse_child(owner, last, node, made.get(at))
    if isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    elif isinstance(value, Tensor):
        owner.register_buffer(last, value, persistent=False)
    else:
        add_child(owner, last, value)
        made[path] = node


def _refuse_child(owner: nn.Module, part: str, node: Node, parent: Node | None) -> None:
    if hasattr(owner, part):
        raise GraphError(
            f"node {node.name!r} cannot be below a {type(owner).__name__}, which has {part!r} already",
            node=node.name,
            source=node.source,
            hint=f"call it something else than {part!r}",
        )
    if parent is not None and parent.op == "module":
        refuse_host(owner, parent.name or "")


def _outside(graph: Graph, body: str) -> list[str]:
    """The value that a body replaces, and what else it reads from outside."""
    nodes = [n for n in graph.nodes() if n.body == body and "@" not in (n.name or "")]
    read = (i for n in nodes for i in n.inputs if graph._nodes[i].body != body)
    return list(dict.fromkeys([graph.bodies[body].calls[0][0], *read]))


def _arrives_as(graph: Graph, node: Node) -> torch.dtype | None:
    """In an imported model a body gives the dtype of its host, whatever it computes in."""
    while graph.imported is not None and node.body is not None:
        read = next(r for r, written in graph.bodies[node.body].calls if written == node.name)
        node = graph._nodes[read]
    return node.dtype


def body_graph(graph: Graph, body: str) -> Graph:
    """One body as a graph of its own: what it reads from outside are inputs `x`, `input`, …; names are relative."""
    record = graph.bodies[body]
    read, written = record.calls[0]
    nodes = [n for n in graph.nodes() if n.body == body and "@" not in (n.name or "")]
    outside = _outside(graph, body)
    names = {value: "x" if value == read else f"input_{i}" for i, value in enumerate(outside)}
    table: dict[str, Node] = {}
    for value in outside:
        host = graph._nodes[value]
        table[names[value]] = Node("input", (), names[value], host.shape, _arrives_as(graph, host))
    for node in nodes:
        names[node.name or ""] = (node.name or "").removeprefix(body + ".")
    for node in nodes:
        relative = names[node.name or ""]
        table[relative] = Node(
            node.op,
            tuple(names[i] for i in node.inputs),
            relative,
            node.shape,
            node.dtype,
            node.options,
            node.params,
        )
    return Graph._of(nodes=table, outputs=names[written])
