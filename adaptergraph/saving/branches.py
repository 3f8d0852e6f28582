"""An adapter that was trained alone, read into one branch of a combination. Floor 5."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..bodies import Splice
from ..errors import GraphError, here, suggestion
from ..graph import Graph
from ..hosting.sites import graph_of
from ..names import body_name
from ..state import load_values, put_back_on_error
from .exchange import SpliceText, method_from_json
from .storage import HostText, check_host, folder_of, mismatch, read_files, without_splices


def load_branch(model: nn.Module, folder: str | os.PathLike[str], branch: str) -> nn.Module:
    """Reads an adapter that was trained alone into one branch of a model's `Fusion`, `Switch`, `Stack` or `Sum`.

    The adapter's bodies become the branches of this name at the same hosts; everything is checked first, then all of
    them are read, or none. Parameters of the host that were trained along, such as a classifier, are not read and may
    have other shapes: the model has its own.

    Args:
        model: a compiled model of the same host.
        folder: what `ag.save` wrote.
        branch: the name of the branch: `"a"` of `ag.Fusion({"a": …})`, `"0"` of `ag.Stack(…)`.

    Returns:
        The model.

    Raises:
        StateMismatch: the files are damaged, belong to another host, or to another method than the branch; every
            mismatch is named.
        GraphError: the files are not there, or the model has no such branch.

    >>> import adaptergraph as ag, tempfile
    >>> x = ag.input("x", shape=("batch", 8))
    >>> graph = ag.Graph(ag.dense(x, 8, name="fc")).freeze()
    >>> folder = ag.save(graph.splice("fc", ag.Bottleneck(2)).compile(), tempfile.mkdtemp())
    >>> fused = graph.splice("fc", ag.Fusion({"a": ag.Bottleneck(2), "b": ag.Bottleneck(2)})).compile()
    >>> ag.load_branch(fused, folder, "a") is fused
    True
    """
    graph = graph_of(model)
    data, state = read_files(folder_of(folder, model, "load_branch"))
    if not isinstance(branch, str):
        raise GraphError(
            f"a branch is one name, not {branch!r}", source=here(), hint="the name in ag.Switch({name: …})"
        )
    host = without_splices(graph)
    own = host.imported.params if host.imported is not None else host.params
    # what was trained along is not read, so it may be another one here
    known = data.model_copy(update={"host": _frozen_part(data.host, data.tensors)})
    shapes = {n: list(p.shape) for n, p in own.items() if n not in (data.tensors or ())}
    check_host(shapes, known, type(model).__name__)
    where = _paired(_with_branch(graph, branch), data.splices, branch, folder)
    values = {
        new + name.removeprefix(old): tensor
        for old, new in where.items()
        for name, tensor in state.items()
        if name.startswith(old)
    }
    missing = [n for n in graph.body_params if n.startswith(tuple(where.values())) and n not in values]
    if missing:
        rows = [(name, "branch has it", "file has none") for name in sorted(missing)]
        mismatch(f"the adapter in {str(folder)!r} does not fit the branch {branch!r}", rows, "save the adapter again")
    with put_back_on_error(model, values):
        load_values(model, values, str(folder))
    return model


def _frozen_part(host: HostText | None, trained: Iterable[str] | None) -> HostText:
    """What a file says of its host, without the parameters that it holds itself."""
    assert host is not None
    kept = {name: shape for name, shape in host.parameters.items() if name not in set(trained or ())}
    return host.model_copy(update={"parameters": kept})


def _with_branch(graph: Graph, branch: str) -> list[Splice]:
    """The splices whose method has a branch of this name."""
    combined = [s for s in graph.splices if hasattr(s.method, "branches")]
    found = [s for s in combined if branch in s.method.branches]
    if not found:
        names = dict.fromkeys(n for s in combined for n in s.method.branches)
        raise GraphError(
            f"the model has no branch {branch!r}",
            source=here(),
            hint=suggestion(branch, names) if names else "combine methods: ag.Fusion, ag.Switch, ag.Stack, ag.Sum",
        )
    return found


def _put(splice: Splice, branch: str) -> tuple[Any, str]:
    """A branch's method, and where at the hosts it is put."""
    return splice.method.branches[branch], splice.where


def _words(method: Any, where: str) -> str:
    return f"{method or 'none'}" + (f", {where}" if where != "after" else "")


def _paired(
    mine: list[Splice], theirs: Iterable[SpliceText], branch: str, folder: str | os.PathLike[str]
) -> Mapping[str, str]:
    """For each body of the file the branch that it becomes: both as prefixes of names."""
    free = {(splice.name, host): splice for splice in mine for host in splice.hosts}
    pairs: dict[str, str] = {}
    wrong: list[tuple[str, str, str]] = []
    methods: dict[str, None] = {}
    for splice in theirs:
        method = method_from_json(splice.method)
        methods[f"ag.{method}"] = None
        for host in splice.hosts or ():
            there = [n for n, at in free if at == host]
            name = min(there, key=lambda n: free[n, host].where != splice.where, default=None)
            own = (None, "after") if name is None else _put(free.pop((name, host)), branch)
            if own != (method, splice.where):
                wrong.append((host, f"branch {_words(*own)}", f"file {_words(method, splice.where)}"))
            pairs[f"{body_name(host, splice.name)}."] = f"{body_name(host, str(name))}.{branch}."
    wrong += [(host, f"branch {_words(*_put(splice, branch))}", "file none") for (_, host), splice in free.items()]
    if wrong:
        made = " and ".join(methods) or "nothing"
        hint = f"make the branch as the adapter was made, at the same nodes: {branch!r} is to be {made}"
        mismatch(f"the adapter in {str(folder)!r} does not fit the branch {branch!r}", wrong, hint)
    return pairs
