"""Bodies at the sites of a live model: attached, taken off again. Floor 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadSplice, GraphError, StateMismatch, here
from .graph import Body, Graph
from .hosted import Step, add_child, host, keep_frozen_statistics, plan_of, refuse_iteration, unhost
from .imported import Call
from .lower import CompiledGraph, body_graph, lower
from .node import Param

_ATTACHED = "_adaptergraph"


@dataclass(slots=True)
class Attachment:
    """What was done to a model, for `graph_of`, files and `detach`.

    Attributes:
        graph: what the model now is.
        trained_before: `requires_grad` of the parameters it had.
        before: values of what training may change of it, when bodies were attached to the model itself.
        hooked: handles of hooks that turn a fused path off.
    """

    graph: Graph
    trained_before: dict[str, bool]
    before: dict[str, Tensor] = field(default_factory=dict)
    modes: dict[str, bool] = field(default_factory=dict)
    hooked: list[Any] = field(default_factory=list)


def attach(
    model: nn.Module,
    graph: Graph,
    *,
    seed: int = 0,
    keep: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts the bodies of an imported graph on a model, all or none.

    Args:
        keep: remember the values that training may change, so that `detach` can give them back.

    Raises:
        BadSplice: a body cannot be attached.
        StateMismatch: the model is not the one that was traced.
    """
    assert graph.imported is not None
    check_host(model, graph)
    bodies = {name: _checked(model, graph, body) for name, body in graph.bodies.items()}
    made = {
        name: lower(
            body_graph(graph, name),
            seed=seed,
            prefix=f"{name}.",
            checked=False,
            device=device or _device(module),
            dtype=dtype,
        )
        for name, module in bodies.items()
    }
    _attach(model, graph, bodies, made, keep)


def _attach(
    model: nn.Module, graph: Graph, hosts: Mapping[str, nn.Module], made: Mapping[str, CompiledGraph], keep: bool
) -> None:
    assert graph.imported is not None
    own = dict(model.named_parameters(remove_duplicate=False))
    record = Attachment(graph, {n: p.requires_grad for n, p in own.items()})
    record.modes = {n: m.training for n, m in model.named_modules()}
    if keep:
        trained = [n for n, p in own.items() if graph.trained.get(n, False)]
        buffers = {
            f"{o}.{n}" if o else n: b for o in _owners(trained) for n, b in model.get_submodule(o).named_buffers()
        }
        record.before = {n: v.detach().clone() for n, v in {**{n: own[n] for n in trained}, **buffers}.items()}
    for body in graph.bodies.values():
        module, name = hosts[body.name], body.name.removeprefix(body.host + ".")
        call = graph.imported.modules[body.host].calls[0]
        plan = host(module)
        plan.path = call.path
        plan.steps = (*plan.steps, Step(name, _arguments(module, graph, body, call)))
        add_child(module, name, made[body.name])
        made[body.name].train(module.training)
        fused = _fused_parent(model, body.host)
        if fused is not None:
            record.hooked.append(module.register_forward_hook(_no_fused_path))
    tied = graph.imported.tied
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(graph.trained[tied.get(name, name)])
    keep_frozen_statistics(model, graph.trained, frozen=True)
    model.__dict__[_ATTACHED] = record


def _owners(names: list[str]) -> dict[str, None]:
    return dict.fromkeys(n.rpartition(".")[0] for n in names)


def _checked(model: nn.Module, graph: Graph, body: Body) -> nn.Module:
    module = model.get_submodule(body.host)
    name = body.name.removeprefix(body.host + ".")
    if name in module.__dict__ or any(hasattr(t, name) for t in (module, type(module))):
        raise BadSplice(
            f"{body.host!r} ({type(module).__name__}) has an attribute {name!r} already",
            node=body.name,
            source=here(),
            hint=f"call the body something else: graph.splice(…, name={name + '_2'!r})",
        )
    refuse_iteration(module, body.host)
    paths = {call.path for call in graph.imported.modules[body.host].calls}  # type: ignore[union-attr]
    if len(paths) > 1:
        raise BadSplice(
            f"{body.host!r} returns another structure from call to call: a body cannot find its tensor",
            node=body.name,
            source=here(),
        )
    return module


def _arguments(module: nn.Module, graph: Graph, body: Body, call: Call) -> tuple[tuple[int, str], ...]:
    """Where a body finds the host's inputs that it reads: position and name in the host's own arguments."""
    import inspect

    read = body.calls[0][0]
    nodes = [n for n in graph.nodes() if n.body == body.name and "@" not in (n.name or "")]
    outside = dict.fromkeys(i for n in nodes for i in n.inputs if graph._nodes[i].body != body.name and i != read)
    names = list(inspect.signature(module.forward).parameters)
    found = []
    for value in outside:
        argument = next(a for a, v in call.inputs if v == value)
        found.append((names.index(argument) if argument in names else len(names), argument))
    return tuple(found)


def _device(module: nn.Module) -> torch.device | None:
    tensor = next(module.parameters(), None)
    if tensor is None:
        tensor = next(module.buffers(), None)
    return None if tensor is None else tensor.device


def _fused_parent(model: nn.Module, path: str) -> nn.Module | None:
    """A torch layer whose fused kernel reads its children's weights without calling them."""
    fused = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
    parts = path.split(".")
    for i in range(len(parts)):
        module = model.get_submodule(".".join(parts[:i]))
        if isinstance(module, fused):
            return module
    return None


def _no_fused_path(module: nn.Module, args: Any, output: Any) -> None:
    """Does nothing: torch takes its fused path only where no module has a hook."""


def check_host(model: nn.Module, graph: Graph) -> None:
    """Whether a model is what the graph was traced from: the same modules, the same parameters.

    Raises:
        StateMismatch: with every difference by name.
        GraphError: it has bodies already.
    """
    assert graph.imported is not None
    if _ATTACHED in model.__dict__:
        raise GraphError(
            f"this {type(model).__name__} has bodies already",
            source=here(),
            hint="ag.detach(model) takes them off; or compile a copy: graph.compile()",
        )
    modules = {n: type(m).__name__ for n, m in model.named_modules()}
    params = {n: Param(tuple(p.shape), p.dtype) for n, p in model.named_parameters()}
    wrong: list[tuple[str, ...]] = []
    for name, traced in graph.imported.modules.items():
        if modules.get(name) != traced.cls:
            wrong.append((name or "model", f"graph {traced.cls}", f"model {modules.get(name, 'has none')}"))
    wrong += [
        (name, "graph has none", f"model {cls}") for name, cls in modules.items() if name not in graph.imported.modules
    ]
    for name, param in graph.imported.params.items():
        mine = params.get(name)
        if mine is None or mine.shape != param.shape:
            wrong.append((name, f"graph {param.shape}", f"model {mine.shape if mine else 'has none'}"))
    if wrong:
        shown = wrong[:12] + ([(f"… and {len(wrong) - 12} more",)] if len(wrong) > 12 else [])
        raise StateMismatch(
            f"this {type(model).__name__} is not the model of the graph: {len(wrong)} differences",
            sides=shown,
            source=here(),
            hint="trace the model again",
        )


def attachment(model: nn.Module) -> Attachment | None:
    """The record of what was attached to a model."""
    return model.__dict__.get(_ATTACHED)


def graph_of(model: nn.Module) -> Graph:
    """The graph that a compiled model is.

    Raises:
        GraphError: the model was not made by `graph.compile`.

    >>> import adaptergraph as ag
    >>> ag.graph_of(ag.Adapter.build(8, 2).compile()) == ag.Adapter.build(8, 2)
    True
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    record = attachment(model)
    if record is not None:
        return record.graph
    if isinstance(model, CompiledGraph):
        return model.source
    raise GraphError(
        f"this {type(model).__name__} was not compiled from a graph",
        source=here(),
        hint="ag.trace(model, …) makes a graph of it",
    )


def detach(model: nn.Module) -> nn.Module:
    """Takes all bodies off a model and gives it back: classes, parameters, what is trained.

    A model that bodies were attached to in place gets its values back bit for bit, also of host parameters that were
    unfrozen and trained; save them first (`ag.save`) to keep them.

    Raises:
        GraphError: nothing is attached.
    """
    record = attachment(model)
    if record is None:
        raise GraphError(f"nothing is attached to this {type(model).__name__}", source=here())
    for handle in record.hooked:
        handle.remove()
    for body in record.graph.bodies.values():
        owner = model.get_submodule(body.host)
        owner._modules.pop(body.name.removeprefix(body.host + "."), None)
    for module in list(model.modules()):
        if plan_of(module) is not None:
            unhost(module)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, value in record.before.items():
            own[name].copy_(value)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(record.trained_before[name])
        parameter.grad = None
    for name, module in model.named_modules():
        module.training = record.modes.get(name, module.training)
    del model.__dict__[_ATTACHED]
    return model
