"""Adapters on disk: `adapter.safetensors` and `adapter.json`, written atomically, read all or nothing. Floor 5."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import GraphError, StateMismatch, check_flag, here, nearest, quoted, shortened
from ..graph import Graph
from ..hosting.attachment import attachment, inside, taken_off_on_error
from ..hosting.sites import graph_of
from ..names import body_name
from ..splicing.hosts import hosts_of
from ..state import load_values, put_back_on_error
from ..tracing.arguments import from_example
from ..tracing.trace import trace
from .complete import changeable, refuse_left_out
from .exchange import (
    ParamText,
    SpliceText,
    Strict,
    ValueText,
    argument,
    dtype_from,
    method_from_json,
    parsed,
    selector_from_json,
    splice_to_json,
)
from .files import read_file, write_files

TENSORS = "adapter.safetensors"
JSON = "adapter.json"
_BLANK = "sha256:" + 64 * "0"
_HINT = f"a folder of ag.save holds {JSON} and {TENSORS}"


class SampleText(Strict):
    """A few values of a frozen parameter, and the dtype that they were rounded to."""

    dtype: str
    values: list[float]


class HostText(Strict):
    """What an adapter was made for: the shapes of all host parameters, and what the model was called with."""

    cls: str
    parameters: dict[str, list[int]]
    structure: str | None = None
    values: dict[str, SampleText] | None = None
    example: dict[str, ParamText | ValueText] | None = None


class AdapterText(Strict):
    """`adapter.json`; without the last four entries it is a recipe."""

    format: Literal["adaptergraph.adapter/1"]
    splices: list[SpliceText] = []
    unfrozen: list[str] = []
    frozen: list[str] = []
    host: HostText | None = None
    tensors: dict[str, list[int]] | None = None
    checksum: str | None = None
    versions: dict[str, str] | None = None


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What training can change in a compiled model, by key: bodies, unfrozen host parameters, and their buffers.

    A parameter that the graph does not know, such as one that another library added, is left out with a warning.

    Raises:
        GraphError: the model was not made by `graph.compile`, or was changed since: what is not there, of another
            shape, or trained although it is frozen in the graph, is listed.

    >>> import adaptergraph as ag
    >>> list(adapter_state(ag.Adapter.build(8, 2).compile()))
    ['adapter.down.weight', 'adapter.down.bias', 'adapter.up.weight', 'adapter.up.bias']
    """
    graph, state = graph_of(model), inside(model).state_dict()
    changed = changeable(graph)
    wrong: list[tuple[str, ...]] = []
    for name in changed:
        shape = graph.params[name].shape
        if name not in state:
            wrong.append((name, f"graph {shape}", "model has none"))
        elif tuple(state[name].shape) != shape:
            wrong.append((name, f"graph {shape}", f"model {tuple(state[name].shape)}"))
    if wrong:
        cls, count = type(inside(model)).__name__, len(wrong)
        raise GraphError(
            f"this {cls} was changed after it was compiled: {count} tensor{'s' * (count > 1)} of its adapter",
            node=wrong[0][0],
            sides=wrong[:12] + ([(f"… and {count - 12} more",)] if count > 12 else []),
            source=here(),
            hint="put back what was replaced, and undo parametrizations and pruning (prune.remove)",
        )
    refuse_left_out(model)
    return {name: state[name].detach() for name in [*changed, *_buffers(model, changed)] if name in state}


def _buffers(model: nn.Module, changed: list[str]) -> list[str]:
    """The buffers beside these parameters."""
    owners = dict.fromkeys(n.rpartition(".")[0] for n in changed)
    return [
        f"{o}.{n}" if o else n for o in owners for n, _ in inside(model).get_submodule(o).named_buffers(recurse=False)
    ]


def recipe(graph: Graph) -> str:
    """See `Graph.recipe`."""
    return json.dumps(_recipe(graph), indent=1, ensure_ascii=False)


def _recipe(graph: Graph) -> dict[str, Any]:
    default = graph.imported is None
    return {
        "format": "adaptergraph.adapter/1",
        "splices": [splice_to_json(s) for s in graph.splices],
        "unfrozen": [n for n, t in graph.trained.items() if t and not default and n not in graph.body_params],
        "frozen": [n for n, t in graph.trained.items() if not t and (default or n in graph.body_params)],
    }


def apply(graph: Graph, recipe: str | Path | Mapping[str, Any]) -> Graph:
    """The graph with the splices of a recipe: what `graph.recipe()` gave, the path of an `adapter.json`, or a dict.

    Raises:
        GraphError: it is no recipe.
        StateMismatch: a selector means other hosts in this graph than in the one the recipe came from.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", 8))
    >>> base = ag.Graph(ag.relu(ag.dense(x, 8, name="fc"))).freeze()
    >>> spliced = base.splice("fc", ag.Bottleneck(2))
    >>> ag.apply(base, spliced.recipe()) == spliced
    True
    """
    if not isinstance(graph, Graph) or not isinstance(recipe, str | Path | Mapping):
        raise GraphError(
            f"apply takes a graph and a recipe, not a {type(graph).__name__} and a {type(recipe).__name__}",
            source=here(),
            hint="ag.apply(ag.trace(model, …), recipe): a recipe is what graph.recipe() gives, a path or a dict",
        )
    if isinstance(recipe, Mapping):
        text: str | bytes = json.dumps(recipe)
    elif isinstance(recipe, Path) or not recipe.lstrip().startswith("{"):
        text = read_file(Path(recipe), _HINT)
    else:
        text = recipe
    return _apply(graph, parsed(AdapterText, text, "the recipe"))


def _apply(graph: Graph, data: AdapterText) -> Graph:
    for item in data.splices:
        at = selector_from_json(item.at)
        hosts = tuple(hosts_of(graph, at, item.where, here()))
        if item.hosts is not None and hosts != tuple(item.hosts):
            raise StateMismatch(
                f"the selector {item.at!r} means other nodes here than where the adapter was made",
                sides=[("there", ", ".join(item.hosts)), ("here", ", ".join(hosts))],
                source=here(),
                hint="load it on a base with the modules of the one it was made on",
            )
        graph = graph.splice(at, method_from_json(item.method), name=item.name, where=item.where)
    bodies = [n for n in data.frozen if n in graph.body_params]
    if data.unfrozen:
        graph = graph.unfreeze(data.unfrozen)
    if bodies:
        graph = graph.freeze(bodies, bodies=True)
    if len(bodies) < len(data.frozen):
        graph = graph.freeze([n for n in data.frozen if n not in bodies])
    return graph


# ---------------------------------------------------------------------- writing


def save(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes what training can change of a compiled model: `adapter.safetensors` and `adapter.json`.

    The change is atomic: if the process dies at any moment, the disk is full, or others save into the folder at the
    same time, it holds the old adapter or a new one, whole. `adapter.safetensors` decides which: its header carries the
    text of `adapter.json` too, for whoever reads while one of the two files is new and the other is not yet.

    Args:
        model: from `graph.compile`.
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        GraphError: the model was not made by `graph.compile`, a method is a function of yours, something is trained
            that is frozen in the graph (see `adapter_state`), or the folder cannot be written; the reason is named.
    """
    target = folder_of(folder, model, "save")
    _refuse_uncompiled(model, folder)
    graph = graph_of(model)
    state = adapter_state(model)
    meta = [n for n, t in state.items() if t.is_meta]
    if meta:
        raise GraphError(
            f"parameter {meta[0]!r} is on the meta device: there is nothing to save",
            source=here(),
            hint="give the model values first: graph.compile(state=…), or a base with weights",
        )
    host = without_splices(graph)
    own = host.imported.params if host.imported is not None else host.params
    text = _recipe(graph) | {
        "host": {
            "cls": host.imported.cls if host.imported is not None else "Graph",
            "parameters": {n: list(p.shape) for n, p in own.items()},
            "structure": _structure(host),
            "values": _values(model, graph),
            "example": host.imported.example if host.imported is not None else None,
        },
        "tensors": {n: list(t.shape) for n, t in state.items()},
        "versions": {"adaptergraph": _version(), "torch": torch.__version__, "safetensors": safetensors.__version__},
    }
    raw = _packed(state, text)
    write_files(target, {JSON: _described(text, raw), TENSORS: raw})
    _mend(target)
    return target


def folder_of(folder: Any, model: Any, verb: str) -> Path:
    """The folder that a verb was given.

    Raises:
        GraphError: it is no path, or stands where the model belongs.
    """
    if isinstance(folder, str | os.PathLike):
        return Path(folder)
    swapped = isinstance(model, str | os.PathLike) and isinstance(folder, nn.Module | Graph)
    raise GraphError(
        f"the folder of {verb} is a {type(folder).__name__}, not a path",
        source=here(),
        hint=f"ag.{verb}(model, {os.fspath(model)!r})" if swapped else "a path, such as 'adapter'",
    )


def _refuse_uncompiled(model: Any, folder: Any) -> None:
    """Says which steps are missing before something can be saved."""
    if isinstance(model, Graph):
        what, missing = "a graph has no values to save", "model = graph.compile()"
    elif isinstance(model, nn.Module) and _is_plain(model):
        what = f"this {type(model).__name__} was not compiled from a graph"
        missing = "model = ag.trace(model, …).splice(at, method).compile()"
    else:
        return
    hint = f"{missing}, train it, then ag.save(model, {os.fspath(folder)!r})"
    raise GraphError(what, source=here(), hint=hint)


def _version() -> str:
    from .. import __version__

    return __version__


def _checksum(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _packed(state: Mapping[str, Tensor], text: Mapping[str, Any]) -> bytes:
    """The tensors file: in its header it carries the text, and the checksum of the file with that checksum blank."""
    about = {"adaptergraph": json.dumps(text, ensure_ascii=False), "checksum": _BLANK}
    # copies, because safetensors refuses tensors that share storage
    raw = safetensors.torch.save({n: t.to("cpu", copy=True).contiguous() for n, t in state.items()}, about)
    return raw.replace(_BLANK.encode(), _checksum(raw).encode(), 1)


def _unpacked(raw: bytes) -> dict[str, Any] | None:
    """The text that a tensors file carries, if the file is whole."""
    try:
        about = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        text, checksum = json.loads(about["adaptergraph"]), about["checksum"].encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(text, dict) or _checksum(raw.replace(checksum, _BLANK.encode(), 1)).encode() != checksum:
        return None
    return text


def _described(text: Mapping[str, Any], raw: bytes) -> bytes:
    """`adapter.json` for a tensors file."""
    return json.dumps({**text, "checksum": _checksum(raw)}, indent=1, ensure_ascii=False).encode()


def _mend(folder: Path) -> None:
    """Writes `adapter.json` again while it is not that of the tensors file, because others save here too."""
    while True:
        described, raw = (read_file(folder / name, _HINT) for name in (JSON, TENSORS))
        text = _unpacked(raw)
        if text is None or described == _described(text, raw):
            return
        write_files(folder, {JSON: _described(text, raw)})


# ---------------------------------------------------------------------- reading


def load(host: nn.Module | Graph, folder: str | os.PathLike[str], *, inplace: bool = False) -> nn.Module:
    """The adapted model that `save` wrote, on a host: a fresh base model, its graph, or a compiled model.

    Everything is checked first; then everything is changed, or nothing.

    Args:
        host: a plain model (it is traced with the shapes of the first time), a graph, or a compiled model with the same
            bodies, whose values are replaced.
        folder: what `save` was given.
        inplace: attach to the plain model itself instead of a copy that shares its frozen parameters.

    Raises:
        StateMismatch: the files are damaged, or belong to another model; every mismatch is named.
        GraphError: the files are not there, or are no adapter.
    """
    check_flag(inplace, "inplace")
    data, state = read_files(folder_of(folder, host, "load"))
    if isinstance(host, Graph):
        graph, model = host, None
    elif isinstance(host, nn.Module):
        model = host if attachment(host) is not None or not _is_plain(host) else None
        graph = graph_of(host) if model is not None else _traced(host, data)
    else:
        raise GraphError(
            f"load takes a model or a graph, not {type(host).__name__}",
            source=here(),
            hint="ag.load(model, folder) or ag.load(graph, folder)",
        )
    spliced = _fitting(graph, data)
    _check_tensors(spliced, data, state)
    if model is not None:
        _warn_of_another_base(model, spliced, data)
        with put_back_on_error(model, state):
            load_values(model, state, str(folder))
        return model
    base = spliced.imported.host if spliced.imported is not None else None
    if base is not None:
        # before bodies are attached: a warning may be raised as an error
        _warn_of_another_base(base, spliced, data)
    model = spliced.compile(inplace=inplace)
    with taken_off_on_error(model):
        if base is None:
            _warn_of_another_base(model, spliced, data)
        load_values(model, state, str(folder))
    return model


def _is_plain(model: nn.Module) -> bool:
    try:
        graph_of(model)
    except GraphError:
        return True
    return False


def read_files(folder: Path) -> tuple[AdapterText, dict[str, Tensor]]:
    """What an adapter's two files say, once they are known to belong together."""
    if folder.name in (JSON, TENSORS) and folder.is_file():
        raise GraphError(
            f"{str(folder)!r} is one of the two files of an adapter",
            source=here(),
            hint=f"give the folder {str(folder.parent)!r}",
        )
    data: AdapterText = parsed(AdapterText, read_file(folder / JSON, _HINT), str(folder / JSON))
    if data.checksum is None or data.tensors is None or data.host is None:
        raise GraphError(
            f"{folder / JSON} is a recipe, without tensors", source=here(), hint="ag.apply(graph, recipe) applies it"
        )
    raw = read_file(folder / TENSORS, _HINT)
    found = _checksum(raw)
    if found != data.checksum and (text := _unpacked(raw)) is not None:
        # it is whole, and of another save than the JSON file: a writer was stopped in between, or is at it now
        data = parsed(AdapterText, _described(text, raw), str(folder / TENSORS))
    try:
        if found == data.checksum:
            return data, safetensors.torch.load(raw)
    except safetensors.SafetensorError:
        pass
    raise StateMismatch(
        f"{folder / TENSORS} is damaged, or not the file that belongs to {JSON}",
        sides=[
            (JSON, "says", f"{str(data.checksum)[:23]}…"),
            (TENSORS, f"{len(raw):,} bytes", f"{found[:23]}…"),
        ],
        source=here(),
        hint="copy both files again",
    )


def _traced(model: nn.Module, data: AdapterText) -> Graph:
    assert data.host is not None
    if data.host.example is None:
        raise GraphError(
            "the adapter does not say what the model is called with",
            source=here(),
            hint="trace it yourself: ag.load(ag.trace(model, …), folder)",
        )
    check_host({n: list(p.shape) for n, p in model.named_parameters()}, data, type(model).__name__)
    args, kwargs = from_example(model, {name: argument(value) for name, value in data.host.example.items()})
    return trace(model, *args, **kwargs)


def _fitting(graph: Graph, data: AdapterText) -> Graph:
    """The graph with the adapter's splices, if it is a graph of the adapter's host."""
    host = without_splices(graph)
    own = host.imported.params if host.imported is not None else host.params
    name = host.imported.cls if host.imported is not None else "Graph"
    check_host({n: list(p.shape) for n, p in own.items()}, data, name)
    spliced = _apply(host, data)
    if graph.splices and graph != spliced:
        _refuse_other_graph(graph, spliced)
    return spliced


def _refuse_other_graph(graph: Graph, adapter: Graph) -> None:
    """Says in what two spliced graphs of one host differ."""
    what, hint = "has other splices than the adapter", "load onto the graph without splices: graph.unsplice()"
    sides: list[tuple[str, ...]] = [("graph", _spoken(graph)), ("adapter", _spoken(adapter))]
    if sides[0][1] == sides[1][1]:
        words = {True: "trained", False: "frozen"}
        differing = [n for n, t in graph.trained.items() if adapter.trained.get(n, t) != t]
        what, hint = "does not train what the adapter trains", f"the same freeze and unfreeze as there, or {hint}"
        sides = [(n, f"graph {words[graph.trained[n]]}", f"adapter {words[adapter.trained[n]]}") for n in differing]
    raise StateMismatch(f"the graph {what}", sides=shortened(sides), source=here(), hint=hint)


def _spoken(graph: Graph) -> str:
    return ", ".join(f"{s.at!r}: {s.method}, {s.where}, name={s.name!r}" for s in graph.splices)


def without_splices(graph: Graph) -> Graph:
    """The graph that was spliced; bodies that were declared by hand are part of it."""
    bodies = [body_name(host, splice.name) for splice in graph.splices for host in splice.hosts]
    return graph.unsplice(bodies) if bodies else graph


def check_host(own: Mapping[str, list[int]], data: AdapterText, name: str) -> None:
    """Whether the shapes of a host's parameters, by name, are those that the adapter was made with.

    Raises:
        StateMismatch: they are not; each one is listed.
    """
    assert data.host is not None
    theirs = data.host.parameters
    wrong = [
        (n, f"adapter {theirs.get(n, 'has none')}", f"host {own.get(n, 'has none')}")
        for n in dict.fromkeys([*theirs, *own])
        if theirs.get(n) != own.get(n)
    ]
    if wrong:
        mismatch(f"the adapter was made for a {data.host.cls} with other parameters than this {name}", wrong)


def _check_tensors(graph: Graph, data: AdapterText, state: Mapping[str, Tensor]) -> None:
    needed = {n: list(graph.params[n].shape) for n in changeable(graph)}
    wrong, unfrozen = [], []
    for name, shape in needed.items():
        if name not in state:
            wrong.append((name, f"model {shape}", "file has none"))
            unfrozen += [name] * (name not in graph.body_params)
        elif list(state[name].shape) != shape:
            wrong.append((name, f"model {shape}", f"file {list(state[name].shape)}"))
    owners = {n.rpartition(".")[0] for n in needed}
    for name in state:
        if name not in needed and (name in graph.params or name.rpartition(".")[0] not in owners):
            close = nearest(name, needed)
            wrong.append(
                (name, f"nearest {close[0]}" if close else "model has none", f"file {list(state[name].shape)}")
            )
    if wrong and len(wrong) == len(unfrozen):
        hint = f"they were frozen when it was saved: graph.freeze([{quoted(unfrozen)}])"
        mismatch("the graph trains more of the host than the adapter", wrong, hint)
    if wrong:
        mismatch("the tensors of the adapter do not fit", wrong)


def _structure(host: Graph) -> str:
    """A fingerprint of which modules or ops the host is made of."""
    if host.imported is not None:
        parts: list[Any] = [(path, module.cls) for path, module in host.imported.modules.items()]
    else:
        parts = [(node.name, node.op, node.inputs) for node in host.nodes()]
    return _checksum(json.dumps(parts).encode())


def _values(model: nn.Module, graph: Graph) -> dict[str, dict[str, Any]] | None:
    """Eight values of each frozen parameter, which tell another base from the same one in another dtype."""
    own = dict(model.named_parameters())
    names = [n for n in graph.params if n in own and not graph.trained[n] and n not in graph.body_params]
    frozen = {n: own[n].detach() for n in names if own[n].numel()}
    if any(t.is_meta for t in frozen.values()):
        return None
    found = {}
    for name, tensor in frozen.items():
        flat = tensor.flatten()
        picked = flat[torch.linspace(0, flat.numel() - 1, 8, device=flat.device).long()].to("cpu", torch.float32)
        values = [float(f"{value:.9g}") for value in picked.tolist()]
        found[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "values": values}
    return found


def _other_values(mine: Mapping[str, Any], theirs: Mapping[str, SampleText]) -> list[tuple[str, str, str]]:
    """The parameters whose values differ by more than rounding to the two dtypes, with the first that does."""
    rows = []
    for name in (n for n in mine if n in theirs):
        pairs = zip(theirs[name].values, mine[name]["values"], strict=False)
        dtypes = dtype_from(theirs[name].dtype), dtype_from(mine[name]["dtype"])
        first = next(((there, here) for there, here in pairs if not _rounded(there, here, dtypes)), None)
        if first is not None:
            rows.append((name, f"there {first[0]:.6g}", f"here {first[1]:.6g}"))
    return rows


def _rounded(one: float, other: float, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether two numbers can be one number, rounded to two dtypes."""
    slack = 0.0
    for dtype in dtypes:
        if dtype.is_floating_point:
            about = torch.finfo(dtype)
            # the values were read as float32
            slack += max(about.eps, torch.finfo(torch.float32).eps) * max(
                min(abs(one), abs(other)), about.smallest_normal
            )
    return one == other or abs(one - other) <= slack or (math.isnan(one) and math.isnan(other))


def _warn_of_another_base(model: nn.Module, graph: Graph, data: AdapterText) -> None:
    """Shapes that fit do not make it the same base; whether it serves is for the user to say."""
    assert data.host is not None
    trained_on = f"the adapter was trained on a {data.host.cls} with"
    if data.host.structure is not None and data.host.structure != _structure(without_splices(graph)):
        warnings.warn(f"{trained_on} modules of other classes", stacklevel=3)
        return
    rows = _other_values(_values(model, graph) or {}, data.host.values or {})
    if rows:
        text = GraphError(
            f"{trained_on} other frozen weights than these, in {len(rows)} of its parameters",
            sides=shortened(rows, 3),
            hint="load it onto the checkpoint that it was trained on; if you changed the base on purpose, train again",
        )
        warnings.warn(str(text), stacklevel=3)


def mismatch(
    message: str, wrong: list[tuple[str, str, str]], hint: str = "load it onto the base it was saved from"
) -> None:
    """Refuses files, with what differs: names, and both sides."""
    raise StateMismatch(f"{message} ({len(wrong)} differences)", sides=shortened(wrong), source=here(), hint=hint)
