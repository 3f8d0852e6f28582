"""Bodies at the sites of a live model: attached, taken off again. Floor 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..bodies import Body
from ..errors import BadSplice, GraphError, StateMismatch, here, shortened
from ..graph import Graph
from ..lower import CompiledGraph, body_graph, lower
from ..names import path_of
from ..node import Param
from ..switch import Switch
from .attachment import (
    ATTACHED,
    Attachment,
    attachment,
    inside,
    refuse_changed,
    refuse_hosted,
    take_off,
    taken_off_on_error,
    warn_of_rounding,
)
from .examples import arguments_of
from .frames import Token
from .hosted import (
    add_child,
    host,
    hosted_class,
    keep_frozen_statistics,
    plan_of,
    refuse_host,
    refuse_remade,
    replaced_forward,
)
from .lowering import lowered
from .program import PLAN, Program, Unlowered
from .routes import Route, routes_of


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
        GraphError: it has bodies already, or shares a module with a model that has.
    """
    assert graph.imported is not None
    refuse_hosted(model)
    for body in graph.bodies.values():
        _check_owner(model, body)
    routes = routes_of(graph, model) if graph.bodies else {}
    for path in routes:
        refuse_remade(model.get_submodule(path), path)
        hosted_class(type(model.get_submodule(path)), name=path)
    programs = _programs(model, graph, {p: r.operations for p, r in routes.items() if r.operations})
    made = {
        name: lower(
            body_graph(graph, name),
            seed=seed,
            prefix=f"{name}.",
            checked=False,
            device=device or _device(model, path_of(body.host)),
            dtype=dtype,
        )
        for name, body in graph.bodies.items()
    }
    own = dict(model.named_parameters(remove_duplicate=False))
    _refuse_inference(graph, own)
    record = Attachment(
        graph, {n: p.requires_grad for n, p in own.items()}, {n: m.training for n, m in model.named_modules()}
    )
    if keep:
        changing = {n: p for n, p in own.items() if graph.trained.get(n, False)} | dict(model.named_buffers())
        record.before = {n: v.detach().clone() for n, v in changing.items()}
    plain = [n for n, m in model.named_modules() if plan_of(m) is None]
    model.__dict__[ATTACHED] = record
    with taken_off_on_error(model):
        try:
            _put_on(model, record, made, routes, programs)
        finally:
            record.hosts = [n for n in plain if plan_of(model.get_submodule(n)) is not None]


def _refuse_inference(graph: Graph, own: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in own.items():
        if parameter.is_inference() and graph.trained.get(name, False):
            raise GraphError(
                f"{name!r} was made in torch.inference_mode(), so it cannot be trained",
                node=name,
                source=here(),
                hint="graph.compile() without inplace=True makes a copy that can be; or make the model outside of it",
            )


def _put_on(
    model: nn.Module,
    record: Attachment,
    made: Mapping[str, CompiledGraph | Switch],
    routes: Mapping[str, Route],
    programs: Mapping[str, Program],
) -> None:
    """Everything that changes the model."""
    graph = record.graph
    for path in routes:
        earlier = plan_of(model.get_submodule(path))
        if earlier is not None:
            record.plans[path] = earlier
            model.get_submodule(path).__dict__[PLAN] = replace(earlier)
    keep_frozen_statistics(model, graph.trained, frozen=True)
    for body in graph.bodies.values():
        _add(model, graph, body, made[body.name])
    token = Token()
    for path, route in routes.items():
        plan = host(model.get_submodule(path))
        plan.visits, plan.counter, plan.opens = route.visits, route.counter, route.opens
        plan.token, plan.path = token if route.framed else None, path or type(model).__name__
        plan.program = programs.get(path)
        if path:
            _turn_off_fused_paths(model, path, record)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(graph.trained[name])


def _add(model: nn.Module, graph: Graph, body: Body, child: CompiledGraph | Switch) -> None:
    """Makes a body a child of the module that it is at."""
    owner = model.get_submodule(path_of(body.host))
    add_child(owner, body.child, child)
    keep_frozen_statistics(child, {n: graph.trained[f"{body.name}.{n}"] for n, _ in child.named_parameters()})
    child.train(owner.training)


def _check_owner(model: nn.Module, body: Body) -> None:
    """Whether a module can have a body as its child."""
    module, name = model.get_submodule(path_of(body.host)), body.child
    if name in module.__dict__ or any(hasattr(t, name) for t in (module, type(module))):
        raise BadSplice(
            f"{body.host!r} ({type(module).__name__}) has an attribute {name!r} already",
            node=body.name,
            source=here(),
            hint=f"call the body something else: graph.splice(…, name={name + '_2'!r})",
        )
    refuse_host(module, body.host)


def _programs(model: nn.Module, graph: Graph, operations: Mapping[str, Mapping[str, int]]) -> dict[str, Program]:
    """The lowered forwards of the modules that stop at operations.

    Raises:
        BadSplice: a forward cannot be lowered; the places that work are named.
    """
    assert graph.imported is not None
    if not operations:
        return {}
    if graph.imported.example is None and graph.imported.given is None:
        path, names = next(iter(operations.items()))
        raise _unreached(graph, path, names, "the model was traced with arguments that cannot be made again")
    given = arguments_of(model, graph.imported, operations)
    programs = {}
    for path, names in operations.items():
        module = model.get_submodule(path)
        try:
            if replaced_forward(module) is not None:
                remedy = "take off what a library put there (a hook of accelerate, say), compile, and put it on again"
                raise Unlowered("it was replaced on the module itself", remedy)
            own = (n.partition("/") for n in graph.imported.scopes if ":" not in n)
            traced = [operation for host, _, operation in own if host == path and operation]
            programs[path] = lowered(module, names, traced, *given[path])
        except Unlowered as error:
            raise _unreached(graph, path, names, str(error), error.remedy) from None
    return programs


def _unreached(graph: Graph, path: str, names: Mapping[str, int], why: str, remedy: str = "") -> BadSplice:
    assert graph.imported is not None
    operation = f"{path}/{next(iter(names))}"
    around = [n for n in graph.consumers.get(operation, ()) if "/" not in n and graph._nodes[n].body is None]
    places = [repr(n) for n in dict.fromkeys([*around, *([path] if path else [])])][:3]
    return BadSplice(
        f"{operation!r} is an operation inside a forward that cannot be reached",
        node=operation,
        sides=[("forward of", path or graph.imported.cls, why)],
        source=here(),
        hint=(f"{remedy};\nor " if remedy else "")
        + "splice at a module"
        + (f" near it: {', '.join(places)}" if places else ""),
    )


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
        GraphError: it has bodies already, or shares a module with a model that has.
    """
    assert graph.imported is not None
    refuse_hosted(model)
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
        raise StateMismatch(
            f"this {type(model).__name__} is not the model of the graph: {len(wrong)} differences",
            sides=shortened(wrong),
            source=here(),
            hint="trace the model again",
        )


def _show(param: Param | None) -> str:
    return "has none" if param is None else f"{param.shape} {param.dtype}"


def graph_of(model: nn.Module) -> Graph:
    """The graph that a compiled model is.

    Raises:
        GraphError: the model was not made by `graph.compile`, or is no model.

    >>> import adaptergraph as ag
    >>> ag.graph_of(ag.Adapter.build(8, 2).compile()) == ag.Adapter.build(8, 2)
    True
    """
    refuse_no_model(model)
    model = inside(model)
    if ATTACHED in model.__dict__:
        return model.__dict__[ATTACHED].graph
    if isinstance(model, CompiledGraph):
        return model._source
    raise GraphError(
        f"this {type(model).__name__} was not compiled from a graph",
        source=here(),
        hint="ag.trace(model, …) makes a graph of it, graph.splice(at, method).compile() a model with bodies",
    )


def refuse_no_model(model: Any) -> None:
    """Refuses a graph, or anything else that is not a model."""
    if isinstance(model, Graph):
        raise GraphError(
            "this is a graph, not the model that is compiled from it", source=here(), hint="model = graph.compile()"
        )
    if not isinstance(model, nn.Module):
        raise GraphError(f"{model!r} is no model", source=here(), hint="give what graph.compile() returned")


def detach(model: nn.Module) -> nn.Module:
    """Takes all bodies off a model and gives it back: classes, parameters, what is trained.

    A model that bodies were attached to in place gets its values back bit for bit, also of host parameters that were
    unfrozen and trained; save them first (`ag.save`) to keep them. Its device and dtype stay what they are now: where
    that dtype cannot hold the values (after `.half()`), a warning says so.

    Raises:
        GraphError: nothing is attached; or hosts, or parameters that are given back, were replaced or changed since, as
            sharding, pruning and parametrizations do: all are listed, and the model is left as it is.
    """
    refuse_no_model(model)
    model = inside(model)
    record = attachment(model)
    if record is None:
        raise GraphError(
            f"nothing is attached to this {type(model).__name__}",
            source=here(),
            hint="give the model that graph.compile() returned; it may have been detached already",
        )
    refuse_changed(model, record)
    warn_of_rounding(model, record)
    take_off(model, record)
    for parameter in model.parameters():
        parameter.grad = None
    return model
