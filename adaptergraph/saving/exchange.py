"""Graphs and methods as JSON text and back. Floor 5.

Nothing in a file is run: ops are looked up in the table, names are checked, shapes are computed again and compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

import pydantic
import torch

from ..bodies import Body, Splice
from ..collect import Code
from ..errors import GraphError, here, suggestion
from ..graph import Graph
from ..imported import Aside, Call, Imported, Module
from ..layers.table import OPS, runnable
from ..methods import METHODS
from ..names import body_name, check_imported_name, check_input_name, check_name, path_of
from ..node import Node, Param, format_shape
from ..select import Span
from ..shapes import Spec, Value, infer, uncollected
from ..splicing.site import HALF
from .consistency import HINT, check_consistency, wrong

FURTHER = re.compile(r"[1-9]\d{0,8}", re.ASCII)
Name = str
Size = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
Dims = list[str | Size | None]


class Strict(pydantic.BaseModel):
    """A part of a file: unknown keys and wrong kinds of values are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class ParamText(Strict):
    """Shape and dtype of a parameter, or of an argument."""

    shape: list[Size]
    dtype: str


class ValueText(Strict):
    """An argument that is no tensor."""

    value: str | bool | int | float | None


class NodeText(Strict):
    """One node."""

    name: Name
    op: str
    inputs: list[Name] = []
    shape: Dims | None = None
    dtype: str | None = None
    options: dict[str, Any] = {}
    params: dict[str, ParamText] = {}
    body: Name | None = None


class BodyText(Strict):
    """One body."""

    name: Name
    host: Name
    where: Literal["after", "around", "before"]
    calls: list[tuple[Name, Name]]


class SpanText(Strict):
    """A selector from one host to another."""

    span: tuple[str, str]


class SpliceText(Strict):
    """One splice: the selector, the method and the hosts it meant."""

    at: str | SpanText | list[str | SpanText]
    method: dict[str, Any]
    name: str = "adapter"
    where: Literal["after", "around", "before"] = "after"
    hosts: list[Name] | None = None


class CallText(Strict):
    """One call of a module."""

    output: Name | None = None
    path: list[str | int] = []
    inputs: list[tuple[str, Name]] = []
    caller: str = ""
    parts: list[tuple[str, Name, list[str | int]]] = []


class ModuleText(Strict):
    """One module of an imported model."""

    cls: str
    calls: list[CallText] = []


class ImportedText(Strict):
    """What is known of an imported model beside its nodes."""

    cls: str
    modules: dict[str, ModuleText]
    params: dict[Name, ParamText]
    tied: dict[Name, Name] = {}
    readers: dict[Name, Name] = {}
    scopes: dict[Name, str] = {}
    asides: list[tuple[str, Literal["entry", "exit"], Name | None, str, bool]] = []
    kept: list[tuple[Name, Name]] = []
    walked: dict[str, bool] = {}
    axes: dict[Name, int | None] | None = None
    overwritten: list[Name] = []
    example: dict[str, ParamText | ValueText] | None = None


class GraphText(Strict):
    """A whole graph."""

    format: Literal["adaptergraph.graph/1"]
    nodes: list[NodeText]
    outputs: Any
    bodies: list[BodyText] = []
    splices: list[SpliceText] = []
    trained: dict[Name, bool] = {}
    imported: ImportedText | None = None


def parsed(kind: type[Strict], text: str | bytes, what: str) -> Any:
    """Reads JSON text as this kind of file.

    Raises:
        GraphError: it is no JSON, or not of this kind; the place in the file is named.
    """
    try:
        return kind.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise GraphError(f"{what} is not readable: {place}: {first['msg']}", source=here(), hint=HINT) from None


# ---------------------------------------------------------------------- methods


def method_to_json(method: Any) -> dict[str, Any]:
    """A method as plain data: its name and what is not the default.

    >>> import adaptergraph as ag
    >>> method_to_json(ag.Bottleneck(8, activation="gelu"))
    {'method': 'Bottleneck', 'size': 8, 'activation': 'gelu'}
    """
    if METHODS.get(type(method).__name__) is not type(method):
        name = method.name if isinstance(method, Code) else getattr(method, "__qualname__", type(method).__name__)
        raise GraphError(
            f"the method {name!r} is code of yours, which has no name in a file",
            source=here(),
            hint="keep the splice in your code: safetensors.torch.save_file(ag.adapter_state(model), path), and later "
            "graph.splice(…).compile(state=path)",
        )
    kind: Any = type(method)
    options = {f.name: (getattr(method, f.name), f.default) for f in fields(kind)}
    changed = {name: _nested(value) for name, (value, default) in options.items() if value != default}
    return {"method": type(method).__name__, **changed}


def _nested(value: Any) -> Any:
    """An option of a method; the options of a combination are methods themselves."""
    if isinstance(value, Mapping):
        return {name: method_to_json(branch) for name, branch in value.items()}
    if isinstance(value, tuple):
        return [_nested(v) for v in value]
    return value if value is None or isinstance(value, str | bool | int | float) else method_to_json(value)


def _from_nested(value: Any) -> Any:
    if isinstance(value, Mapping):
        is_method = isinstance(value.get("method"), str)
        return method_from_json(value) if is_method else {n: _from_nested(v) for n, v in value.items()}
    return [_from_nested(v) for v in value] if isinstance(value, list) else value


def method_from_json(data: Mapping[str, Any]) -> Any:
    """The method that `method_to_json` wrote."""
    options = dict(data)
    name = options.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise GraphError(f"there is no method {name!r}", source=here(), hint=suggestion(str(name), METHODS))
    return METHODS[name](**{option: _from_nested(value) for option, value in options.items()})


def _selector(at: Any) -> Any:
    if isinstance(at, Span):
        return {"span": [at.first, at.last]}
    return at if isinstance(at, str) else [_selector(entry) for entry in at]


def selector_from_json(at: Any) -> Any:
    """The selector of a splice in a file."""
    if isinstance(at, SpanText):
        return Span(*at.span)
    return at if isinstance(at, str) else [selector_from_json(entry) for entry in at]


def splice_to_json(splice: Splice) -> dict[str, Any]:
    """One splice as plain data."""
    return {
        "at": _selector(splice.at),
        "method": method_to_json(splice.method),
        "name": splice.name,
        "where": splice.where,
        "hosts": list(splice.hosts),
    }


# ---------------------------------------------------------------------- graphs


def graph_to_json(graph: Graph) -> str:
    """See `Graph.to_json`."""
    data: dict[str, Any] = {
        "format": "adaptergraph.graph/1",
        "nodes": [_node_to_json(n) for n in graph.nodes()],
        "outputs": graph.outputs,
        "bodies": [{"name": b.name, "host": b.host, "where": b.where, "calls": b.calls} for b in graph.bodies.values()],
        "splices": [splice_to_json(s) for s in graph.splices],
        "trained": dict(graph._overrides),
    }
    if graph.imported is not None:
        data["imported"] = {**_imported_to_json(graph.imported), "axes": _axes(graph)}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _node_to_json(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.inputs:
        data["inputs"] = node.inputs
    if node.shape is not None:
        if not all(isinstance(d, str | int | None) for d in node.shape):
            raise _nameless(node, f"is a nested tensor of shape {node.shape}")
        data["shape"] = node.shape
    if node.dtype is not None:
        data["dtype"] = _dtype(node.dtype)
    if node.options:
        data["options"] = {k: _option(v, node) for k, v in node.options.items()}
    if node.params:
        data["params"] = {k: _param(p) for k, p in node.params.items()}
    if node.body is not None:
        data["body"] = node.body
    return data


def _option(value: Any, node: Node) -> Any:
    if isinstance(value, torch.Tensor) and _is_plain(value):
        return {"tensor": value.tolist(), "dtype": _dtype(value.dtype)}
    if isinstance(value, tuple | list):
        return [_option(v, node) for v in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, torch.Tensor):
        kind = ", quantized" if value.is_quantized else f", {value.layout}, on {value.device.type}"
        raise _nameless(node, f"holds tensor {tuple(value.shape)} of {value.dtype}{kind}")
    raise _nameless(node, f"holds {value!r}")


def _is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor is a list of lists of numbers."""
    return value.layout is torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)


def _nameless(node: Node, what: str) -> GraphError:
    return GraphError(
        f"node {node.name!r} {what}, which has no name in a file",
        node=node.name,
        source=node.source or here(),
        hint="write that part with layers of adaptergraph, or keep this graph in code",
    )


def _imported_to_json(imported: Imported) -> dict[str, Any]:
    def call(c: Call) -> dict[str, Any]:
        return {"output": c.output, "path": c.path, "inputs": c.inputs, "caller": c.caller, "parts": c.parts}

    return {
        "cls": imported.cls,
        "modules": {p: {"cls": m.cls, "calls": [call(c) for c in m.calls]} for p, m in imported.modules.items()},
        "params": {n: _param(p) for n, p in imported.params.items()},
        "tied": dict(imported.tied),
        "readers": dict(imported.readers),
        "scopes": dict(imported.scopes),
        "asides": [(a.scope, a.at, a.value, a.reader, a.whole) for a in imported.asides],
        "kept": list(imported.kept),
        "walked": dict(imported.walked),
        "overwritten": list(imported.overwritten),
        "example": imported.example,
    }


def _axes(graph: Graph) -> dict[str, int | None]:
    """Where values of the model have their features, if not last; None where that is not known."""
    hosts = (node for node in graph.nodes() if node.body is None and node.shape)
    return {node.name or "": node.axis for node in hosts if node.axis != -1}


def _param(param: Param) -> dict[str, Any]:
    return {"shape": param.shape, "dtype": _dtype(param.dtype)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from(text: str) -> torch.dtype:
    """A dtype by its name in torch."""
    dtype = getattr(torch, text, None) if text.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"there is no dtype {text!r}", source=here(), hint="as torch calls it: 'float32'")
    return dtype


@uncollected()
def graph_from_json(text: str) -> Graph:
    """See `Graph.from_json`."""
    data: GraphText = parsed(GraphText, text, "the graph")
    imported = data.imported
    axes = None if imported is None else imported.axes
    table: dict[str, Node] = {}
    items: dict[str, NodeText] = {}
    bodies: dict[str, Body] = {}
    seen: dict[str, Node] = {}  # as bodies see them: on a half-precision model they compute in float32
    spliced = {body_name(host, s.name) for s in data.splices for host in s.hosts or ()}
    made = {written: read for b in data.bodies if b.name in spliced for read, written in b.calls}
    for item in data.nodes:
        hosted = imported is not None and item.body is None
        (check_imported_name if hosted else _check_own_name)(item.name)
        if item.name in table:
            raise GraphError(f"the graph is not readable: two nodes are called {item.name!r}", node=item.name)
        missing = [i for i in item.inputs if i not in table]
        if missing:
            raise GraphError(f"the graph is not readable: {item.name!r} reads {missing[0]!r}, which is not before it")
        if hosted:
            node = _host_node(item, axes)
        else:
            node = _own_node(item, seen)
            first = items.get(path_of(item.name)) if imported is not None else None
            if first is not None:
                _check_further(item, first)
                node = replace(node, axis=table[first.name].axis)
        if made.get(item.name) in table:
            node = replace(node, axis=table[made[item.name]].axis)
        table[item.name], items[item.name] = node, item
        seen[item.name] = replace(node, dtype=torch.float32) if hosted and node.dtype in HALF else node
    for name in axes or ():
        if name not in table or table[name].body is not None or not table[name].shape:
            raise wrong(f"axes: {name!r} is no tensor of the model", name)
    for b in data.bodies:
        if b.name in bodies:
            raise wrong(f"two bodies are called {b.name!r}", b.name)
        bodies[b.name] = Body(b.name, b.host, b.where, tuple((r, w) for r, w in b.calls))
    outputs: Any = _outputs(data.outputs)
    graph = Graph._of(
        nodes=table,
        outputs=outputs,
        bodies=bodies,
        splices=tuple(
            Splice(selector_from_json(s.at), method_from_json(s.method), s.name, s.where, tuple(s.hosts or ()))
            for s in data.splices
        ),
        imported=_imported_from_json(imported) if imported is not None else None,
        overrides=data.trained,
    )
    check_consistency(graph.check())
    return graph


def _outputs(value: Any) -> Any:
    if isinstance(value, dict) and value:
        return {key: _outputs(part) for key, part in value.items()}
    if isinstance(value, list) and value:
        return tuple(map(_outputs, value))
    if not isinstance(value, str):
        raise GraphError(f"the graph is not readable: outputs: {value!r} is no name of a node", source=here())
    return value


def _check_own_name(name: str) -> None:
    path, at, call = name.partition("@")
    check_name(path)
    if at and not FURTHER.fullmatch(call):
        raise wrong(f"{name!r} is no name of a further call", name, hint="the second call of 'fc' is 'fc@1'")


def _value(value: Any) -> Any:
    return tuple(_value(v) for v in value) if isinstance(value, list) else value


def _host_node(item: NodeText, axes: Mapping[str, int | None] | None) -> Node:
    if not item.op.isidentifier():
        raise GraphError(f"the graph is not readable: {item.op!r} is no op", node=item.name)
    if item.options:
        raise wrong(f"{item.name!r} is a node of the model, which has no options", item.name)
    params = {k: Param(tuple(p.shape), dtype_from(p.dtype)) for k, p in item.params.items()}
    shape = None if item.shape is None else tuple(item.shape)
    dtype = None if item.dtype is None else dtype_from(item.dtype)
    # a file from before the features were told says nothing of any
    axis = None if axes is None or not shape else axes.get(item.name, -1)
    if axis is not None and not -len(shape or ()) <= axis < 0:
        raise wrong(f"axes: {item.name!r} has no dimension {axis}: {format_shape(shape)}", item.name)
    return Node(item.op, tuple(item.inputs), item.name, shape, dtype, params=params, axis=axis)


def _check_further(item: NodeText, first: NodeText) -> None:
    """A node of a body at a further call of its host in a model is the same as at the first, whatever it reads."""
    same = [(i.op, i.options, i.params, i.body) for i in (item, first)]
    if same[0] != same[1]:
        raise wrong(f"{item.name!r} is not what {first.name!r} is at the first call", item.name)


def _own_node(item: NodeText, table: Mapping[str, Node]) -> Node:
    """A node of ours: its op is a row of the table, and its shape is computed again."""
    options = {k: _value(v) for k, v in item.options.items()}
    shape = None if item.shape is None else tuple(item.shape)
    dtype = None if item.dtype is None else dtype_from(item.dtype)
    params: Mapping[str, Param] = {}
    axis = None
    if item.op == "input":
        check_input_name(item.name)
        shape, dtype = shape or (), dtype or torch.float32
        if item.inputs or not set(options) <= {"optional"}:
            raise GraphError(f"the graph is not readable: the input {item.name!r} has {options}", node=item.name)
    elif item.op == "param":
        params = {"": _parameter(item, shape, dtype)}
    elif item.op == "constant":
        options = {"value": _constant(item, shape, dtype)}
    elif item.op in OPS:
        found, params, axis = _computed(item, options, table)
        if found != (shape, dtype):
            raise GraphError(
                f"the graph is not readable: {item.name!r} cannot give {shape}",
                node=item.name,
                sides=[("file", str(shape), str(dtype)), ("computed", str(found[0]), str(found[1]))],
            )
    else:
        raise GraphError(
            f"the graph is not readable: there is no op {item.op!r}", node=item.name, hint=suggestion(item.op, OPS)
        )
    if {k: Param(tuple(p.shape), dtype_from(p.dtype)) for k, p in item.params.items()} != dict(params):
        raise wrong(f"{item.name!r} has other parameters than its op {item.op!r} makes", item.name)
    return Node(item.op, tuple(item.inputs), item.name, shape, dtype, options, params, item.body, axis=axis)


def _parameter(item: NodeText, shape: Any, dtype: torch.dtype | None) -> Param:
    sizes = tuple(d for d in shape or () if isinstance(d, int))
    if shape is None or dtype is None or len(sizes) != len(shape) or item.inputs:
        raise wrong(f"the parameter {item.name!r} has the shape {shape}, and reads {item.inputs}", item.name)
    return Param(sizes, dtype)


def _constant(item: NodeText, shape: Any, dtype: torch.dtype | None) -> torch.Tensor:
    given = item.options.get("value")
    try:
        value = torch.tensor(given["tensor"], dtype=dtype_from(str(given["dtype"])))  # type: ignore[index]
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        text = str(error).strip().splitlines() or [""]
        raise wrong(
            f"the constant {item.name!r} is no tensor", item.name, [("it raises", type(error).__name__, text[0])]
        ) from None
    if (tuple(value.shape), value.dtype) != (shape, dtype) or item.inputs:
        raise wrong(
            f"the constant {item.name!r} holds {tuple(value.shape)} {value.dtype}, not {shape} {dtype}", item.name
        )
    return value


def _computed(
    item: NodeText, options: Mapping[str, Any], table: Mapping[str, Node]
) -> tuple[tuple[Any, Any], Mapping[str, Param], int | None]:
    """Shape and dtype, parameters and the dimension of the features of a node, from what it reads."""
    if item.op == "item":
        value: Value | None = _part(item, options, table)
        params: Mapping[str, Param] = {}
    else:
        spec = _spec(item.op, options, [table[i] for i in item.inputs], item.name)
        value, params = spec.value, spec.params
    return ((None, None), params, None) if value is None else ((value.shape, value.dtype), params, value.axis)


def _spec(op: str, options: Mapping[str, Any], inputs: list[Node], name: str | None) -> Spec:
    missing = [i for i in inputs if i.shape is None]
    if missing:
        raise GraphError(f"the graph is not readable: {name!r} reads {missing[0].name!r}, which is no tensor")
    return infer(op, runnable(op, options), inputs, options, None, name)


def _part(item: NodeText, options: Mapping[str, Any], table: Mapping[str, Node]) -> Value:
    """One output of a node that has several."""
    owner = table[item.inputs[0]] if len(item.inputs) == 1 else None
    several = owner is not None and owner.shape is None and owner.op in OPS
    parts = _spec(owner.op, owner.options, [table[i] for i in owner.inputs], owner.name).parts if several else ()  # type: ignore[union-attr]
    index = options.get("index")
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(parts):
        raise GraphError(f"the graph is not readable: {item.name!r} is no output of {item.inputs}", node=item.name)
    return parts[index]


def argument(item: ParamText | ValueText) -> dict[str, Any]:
    """An argument of the traced call."""
    if isinstance(item, ParamText):
        dtype_from(item.dtype)
    return item.model_dump()


def _imported_from_json(data: ImportedText) -> Imported:
    def call(c: CallText) -> Call:
        parts = tuple((label, node, tuple(path)) for label, node, path in c.parts)
        return Call(c.output, tuple(c.path), tuple((a, v) for a, v in c.inputs), c.caller, parts)

    return Imported(
        cls=data.cls,
        modules={p: Module(m.cls, tuple(call(c) for c in m.calls)) for p, m in data.modules.items()},
        params={n: Param(tuple(p.shape), dtype_from(p.dtype)) for n, p in data.params.items()},
        tied=data.tied,
        readers=data.readers,
        scopes=data.scopes,
        asides=tuple(Aside(*a) for a in data.asides),
        kept=tuple(data.kept),
        walked=data.walked,
        overwritten=tuple(data.overwritten),
        example=None if data.example is None else {n: argument(v) for n, v in data.example.items()},
    )
