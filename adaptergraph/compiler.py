"""`graph.compile()`: one meaning, two ways to run. Floor 4."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GraphError, check_flag, here
from .graph import Graph
from .hosting.attachment import keep_values, taken_off_on_error
from .hosting.sites import attach, check_host
from .lower import lower
from .state import load_values, shared_copy, values_from
from .tasks import give_tasks, has_switch, only_task, refuse_tasks


@torch.inference_mode(False)
def compile_graph(
    graph: Graph,
    host: nn.Module | None,
    *,
    inplace: bool,
    seed: int,
    state: Mapping[str, Tensor] | str | os.PathLike[str] | None,
    device: Any,
    dtype: Any,
    task: str | None = None,
) -> nn.Module:
    """See `Graph.compile`."""
    _check_options(graph, host, inplace, seed, state, device, dtype)
    if task is not None:
        graph = only_task(graph, task)
    what = "state"
    if isinstance(state, str | os.PathLike):
        # read first: a file that cannot be read changes nothing
        what, state = repr(os.fspath(state)), values_from(state)
    model = (
        _hosted(graph, host, inplace, seed, device, dtype)
        if graph.imported
        else _declared(graph, host, inplace, seed, device, dtype)
    )
    with taken_off_on_error(model):
        if has_switch(graph):
            give_tasks(model)
        else:
            refuse_tasks(model)
        if state is not None:
            if inplace:
                keep_values(model, state)
            load_values(model, state, what, _needed(graph))
    return model


def _check_options(graph: Graph, host: Any, inplace: Any, seed: Any, state: Any, device: Any, dtype: Any) -> None:
    """Refuses what no option of compile can be."""
    check_flag(inplace, "inplace")
    said, hint = "", ""
    if host is not None and not isinstance(host, nn.Module):
        kind = "a class" if isinstance(host, type) else f"a {type(host).__name__}"
        said, hint = f"compile attaches bodies to a model, not to {kind}", "graph.compile(model), or graph.compile()"
    elif isinstance(seed, bool) or not isinstance(seed, int):
        said, hint = f"seed is a whole number, not {seed!r}", "graph.compile(seed=0)"
    elif not isinstance(state, Mapping | str | os.PathLike | None):
        said = f"state is a mapping of tensors or the path of a safetensors file, not a {type(state).__name__}"
        hint = "graph.compile(state=model.state_dict())"
    elif dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        said, hint = f"dtype is a dtype of torch for numbers with a fraction, not {dtype!r}", "dtype=torch.float32"
    if said:
        raise GraphError(said, source=here(), hint=hint)
    try:
        if device is not None:
            torch.empty(0, device=torch.device(device))
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise GraphError(
            f"device {device!r} is not there",
            sides=[("torch says", str(error).splitlines()[0][:90])],
            source=here(),
            hint="as torch calls it: 'cpu', 'cuda', 'cuda:1', 'mps', 'meta'",
        ) from None


def _needed(graph: Graph) -> list[str]:
    """What a state must hold: frozen hosts that have no values of their own."""
    if graph.imported is not None:
        return []
    return [name for name, trained in graph.trained.items() if not trained and name not in graph.body_params]


def _declared(graph: Graph, host: Any, inplace: bool, seed: int, device: Any, dtype: Any) -> nn.Module:
    if host is not None or inplace:
        raise GraphError("a declared graph has no host to attach to", source=here(), hint="graph.compile()")
    return lower(graph, seed=seed, device=device, dtype=dtype)


def _hosted(graph: Graph, host: Any, inplace: bool, seed: int, device: Any, dtype: Any) -> nn.Module:
    assert graph.imported is not None
    model = host if host is not None else graph.imported.host
    if model is None:
        raise GraphError(
            f"this graph came from a file: it says what {graph.imported.cls} is, but has none",
            source=here(),
            hint="give it the model: graph.compile(model)",
        )
    check_host(model, graph)
    if not inplace:
        tied = graph.imported.tied
        names = {n: graph.trained[tied.get(n, n)] for n, _ in model.named_parameters(remove_duplicate=False)}
        model = shared_copy(model, names)
    attach(model, graph, seed=seed, keep=inplace, device=device, dtype=dtype)
    return model
