"""Bodies at the sites of a live model: attached, taken off again. Floor 4."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadSplice, GraphError, StateMismatch, here
from .graph import Body, Graph
from .hosted import (
    Step,
    add_child,
    has_other_class,
    host,
    hosted_class,
    keep_frozen_statistics,
    plan_of,
    refuse_host,
    unhost,
)
from .imported import Call
from .lower import CompiledGraph, body_graph, lower
from .node import Param
from .switch import Switch

_ATTACHED = "_adaptergraph"


@dataclass(slots=True)
class Attachment:
    """What was done to a model, for `graph_of`, files and `detach`.

    Attributes:
        graph: what the model now is.
        trained_before: `requires_grad` of the parameters it had.
        before: values of what training may change of it, when bodies were attached to the model itself.
        modes: `training` of the modules it had.
        hosts: the modules whose class was swapped.
        hooked: handles of hooks that turn a fused path off.
        nested: encoders that were kept from packing their input, and whether they did before.
    """

    graph: Graph
    trained_before: dict[str, bool]
    modes: dict[str, bool]
    before: dict[str, Tensor] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)
    hooked: list[Any] = field(default_factory=list)
    nested: dict[str, bool] = field(default_factory=dict)


def attach(
    model: nn.Module,
    graph: Graph,
    *,
    seed: int = 0,
    keep: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts the bodies of an imported graph on its model (see `check_host`), all or none.

    Args:
        keep: remember the values that training may change, so that `detach` can give them back.

    Raises:
        BadSplice: a body cannot be attached.
    """
    assert graph.imported is not None
    steps = {name: _step(model, graph, body) for name, body in graph.bodies.items()}
    made = {
        name: lower(
            body_graph(graph, name),
            seed=seed,
            prefix=f"{name}.",
            checked=False,
            device=device or _device(model, body.host),
            dtype=dtype,
        )
        for name, body in graph.bodies.items()
    }
    own = dict(model.named_parameters(remove_duplicate=False))
    record = Attachment(
        graph, {n: p.requires_grad for n, p in own.items()}, {n: m.training for n, m in model.named_modules()}
    )
    if keep:
        changing = {n: p for n, p in own.items() if graph.trained.get(n, False)} | dict(model.named_buffers())
        record.before = {n: v.detach().clone() for n, v in changing.items()}
    _attach(model, record, steps, made)
    model.__dict__[_ATTACHED] = record


def _attach(
    model: nn.Module, record: Attachment, steps: Mapping[str, Step], made: Mapping[str, CompiledGraph | Switch]
) -> None:
    graph = record.graph
    assert graph.imported is not None
    plain = [n for n, m in model.named_modules() if plan_of(m) is None]
    keep_frozen_statistics(model, graph.trained, frozen=True)
    for body in graph.bodies.values():
        module, child = model.get_submodule(body.host), made[body.name]
        plan = host(module)
        plan.path = graph.imported.modules[body.host].calls[0].path
        plan.steps = (*plan.steps, steps[body.name])
        add_child(module, steps[body.name].child, child)
        keep_frozen_statistics(child, {n: graph.trained[f"{body.name}.{n}"] for n, _ in child.named_parameters()})
        child.train(module.training)
        _turn_off_fused_paths(model, body.host, record)
    record.hosts = [n for n in plain if plan_of(model.get_submodule(n)) is not None]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(graph.trained[name])


def _step(model: nn.Module, graph: Graph, body: Body) -> Step:
    """What a host is to do for a body, or why it cannot."""
    assert graph.imported is not None
    module = model.get_submodule(body.host)
    name = body.name.removeprefix(body.host + ".")
    if name in module.__dict__ or any(hasattr(t, name) for t in (module, type(module))):
        raise BadSplice(
            f"{body.host!r} ({type(module).__name__}) has an attribute {name!r} already",
            node=body.name,
            source=here(),
            hint=f"call the body something else: graph.splice(…, name={name + '_2'!r})",
        )
    refuse_host(module, body.host)
    hosted_class(type(module))
    calls = graph.imported.modules[body.host].calls
    if len({call.path for call in calls}) > 1:
        raise BadSplice(
            f"{body.host!r} returns another structure from call to call: a body cannot find its tensor",
            node=body.name,
            source=here(),
        )
    return Step(name, _arguments(module, graph, body, calls[0]))


def _arguments(module: nn.Module, graph: Graph, body: Body, call: Call) -> tuple[tuple[int | None, str], ...]:
    """Where a body finds the host's inputs that it reads: position and name in the host's own arguments."""
    read = body.calls[0][0]
    nodes = [n for n in graph.nodes() if n.body == body.name and "@" not in (n.name or "")]
    outside = dict.fromkeys(i for n in nodes for i in n.inputs if graph._nodes[i].body != body.name and i != read)
    # an input may pass other bodies on its way here
    before = {written: value for b in graph.bodies.values() for value, written in b.calls}
    parameters = inspect.signature(module.forward).parameters
    found = []
    for value in outside:
        while value in before:
            value = before[value]
        argument = next(a for a, v in call.inputs if v == value)
        found.append((_position(parameters, argument), argument))
    return tuple(found)


def _position(parameters: Mapping[str, inspect.Parameter], argument: str) -> int | None:
    for index, (name, parameter) in enumerate(parameters.items()):
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD):
            return None
        if name == argument:
            return index
        if parameter.kind is parameter.VAR_POSITIONAL and argument.removeprefix(f"{name}_").isdigit():
            return index + int(argument.removeprefix(f"{name}_"))
    return None


def _device(model: nn.Module, path: str) -> torch.device | None:
    """Where the host's tensors are, or those of the nearest module around it that has any."""
    for module in reversed(_line(model, path)):
        tensor = next(chain(module.parameters(), module.buffers()), None)
        if tensor is not None:
            return tensor.device
    return None


def _line(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules from the model down to this path."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def _turn_off_fused_paths(model: nn.Module, path: str, record: Attachment) -> None:
    """In eval, torch's encoder layers run one kernel that reads their children's weights without calling them.

    An encoder packs a padded batch for that kernel only; its layers cannot run without the kernel on what it packed.
    """
    *around, module = _line(model, path)
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in around):
        record.hooked.append(module.register_forward_hook(_no_fused_path))
    parts = path.split(".")
    for i, encoder in enumerate(around):
        if isinstance(encoder, nn.TransformerEncoder):
            record.nested.setdefault(".".join(parts[:i]), encoder.use_nested_tensor)
            encoder.use_nested_tensor = False


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
    for name in {**graph.imported.params, **params}:
        theirs, mine = graph.imported.params.get(name), params.get(name)
        if theirs != mine:
            wrong.append((name, f"graph {_show(theirs)}", f"model {_show(mine)}"))
    if wrong:
        shown = wrong[:12] + ([(f"… and {len(wrong) - 12} more",)] if len(wrong) > 12 else [])
        raise StateMismatch(
            f"this {type(model).__name__} is not the model of the graph: {len(wrong)} differences",
            sides=shown,
            source=here(),
            hint="trace the model again",
        )


def _show(param: Param | None) -> str:
    return "has none" if param is None else f"{param.shape} {param.dtype}"


def attachment(model: nn.Module) -> Attachment | None:
    """The record of what was attached to a model."""
    return _inside(model).__dict__.get(_ATTACHED)


def graph_of(model: nn.Module) -> Graph:
    """The graph that a compiled model is.

    Raises:
        GraphError: the model was not made by `graph.compile`.

    >>> import adaptergraph as ag
    >>> ag.graph_of(ag.Adapter.build(8, 2).compile()) == ag.Adapter.build(8, 2)
    True
    """
    model = _inside(model)
    if _ATTACHED in model.__dict__:
        return model.__dict__[_ATTACHED].graph
    if isinstance(model, CompiledGraph):
        return model._source
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
        GraphError: nothing is attached, or a host got one more class since.
    """
    model = _inside(model)
    record = attachment(model)
    if record is None:
        raise GraphError(f"nothing is attached to this {type(model).__name__}", source=here())
    for name in record.hosts:
        if has_other_class(model.get_submodule(name)):
            raise GraphError(
                f"the class of {name!r} was changed after the bodies were attached",
                node=name,
                source=here(),
                hint="undo first what changed it (sharding, a parametrization)",
            )
    for handle in record.hooked:
        handle.remove()
    for name, used in record.nested.items():
        model.get_submodule(name).use_nested_tensor = used  # type: ignore[assignment]
    for body in record.graph.bodies.values():
        owner, child = model.get_submodule(body.host), body.name.removeprefix(body.host + ".")
        plan = plan_of(owner)
        assert plan is not None
        plan.steps = tuple(step for step in plan.steps if step.child != child)
        plan.hidden -= {child}
        owner._modules.pop(child, None)
    for name in record.hosts:
        unhost(model.get_submodule(name))
    _give_back(model, record)
    del model.__dict__[_ATTACHED]
    return model


def _give_back(model: nn.Module, record: Attachment) -> None:
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, value in record.before.items():
            own[name].copy_(value)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(record.trained_before.get(name, parameter.requires_grad))
        parameter.grad = None
    for name, module in model.named_modules():
        module.training = record.modes.get(name, module.training)


def _inside(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
