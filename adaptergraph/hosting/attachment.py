"""What was done to a model that has bodies, and how all of it is undone. Floor 4."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphError, here, shortened
from ..graph import Graph
from ..lower import CompiledGraph
from ..names import path_of
from .hosted import Plan, has_other_class, plan_of, unhost
from .program import PLAN

ATTACHED = "_adaptergraph"


@dataclass(slots=True)
class Attachment:
    """What was done to a model, for `graph_of`, files and `detach`.

    Attributes:
        graph: what the model now is.
        trained_before: `requires_grad` of the parameters it had.
        before: values of what training or a given state may change of it, when bodies were attached to itself.
        modes: `training` of the modules it had.
        hosts: the modules whose class was swapped.
        plans: the plans of hosts that had one, as parts of what a declared graph was compiled to.
        hooked: handles of hooks that turn a fused path off.
        nested: encoders that were kept from packing their input, and whether they did before.
    """

    graph: Graph
    trained_before: dict[str, bool]
    modes: dict[str, bool]
    before: dict[str, Tensor] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    hooked: list[Any] = field(default_factory=list)
    nested: dict[str, bool] = field(default_factory=dict)


def inside(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` wrapped."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def attachment(model: nn.Module) -> Attachment | None:
    """The record of what was attached to a model."""
    return inside(model).__dict__.get(ATTACHED)


def refuse_hosted(model: nn.Module) -> None:
    """Refuses a model that has bodies, or shares a module with one that has: the other would lose what is its own.

    What a declared graph was compiled to is whole by itself, and may be a part of any model.

    Raises:
        GraphError: and names the module.
    """
    if ATTACHED in model.__dict__:
        raise GraphError(
            f"this {type(model).__name__} has bodies already",
            source=here(),
            hint="ag.detach(model) takes them off; a copy is compiled before bodies are attached in place",
        )
    declared = {id(part) for m in model.modules() if isinstance(m, CompiledGraph) for part in m.modules()}
    for path, module in model.named_modules():
        if plan_of(module) is None or id(module) in declared:
            continue
        cls = type(module).__name__
        raise GraphError(
            f"{(path or cls)!r} ({cls}) is part of another adapted model already",
            node=path,
            source=here(),
            hint="ag.detach(…) that model first, or adapt a copy of it: its graph.compile() without inplace=True",
        )


# ---------------------------------------------------------------------- taking everything off


def take_off(model: nn.Module, record: Attachment) -> None:
    """Undoes all that was done to a model, also where only a part of it was done."""
    _give_back(model, record)
    for handle in record.hooked:
        handle.remove()
    for name, used in record.nested.items():
        model.get_submodule(name).use_nested_tensor = used  # type: ignore[assignment]
    for body in record.graph.bodies.values():
        owner = model.get_submodule(path_of(body.host))
        hosted = plan_of(owner)
        if hosted is not None:
            hosted.hidden -= {body.child}
        owner._modules.pop(body.child, None)
    for name in record.hosts:
        unhost(model.get_submodule(name))
    for name, plan in record.plans.items():
        model.get_submodule(name).__dict__[PLAN] = plan
    for name, module in model.named_modules():
        module.training = record.modes.get(name, module.training)
    del model.__dict__[ATTACHED]


def _give_back(model: nn.Module, record: Attachment) -> None:
    own = values_of(model)
    # what was made in inference mode is changed in it only; others can be, too
    with torch.inference_mode():
        for name, value in record.before.items():
            # a model on the meta device had no values
            if not value.is_meta:
                own[name].copy_(value)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(record.trained_before.get(name, parameter.requires_grad))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model by name, all names of shared ones."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


@contextmanager
def taken_off_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever goes wrong inside, an imported model is left as it was before bodies were attached to it."""
    try:
        yield
    except BaseException:
        record = attachment(model)
        if record is not None:
            take_off(model, record)
        raise


def keep_values(model: nn.Module, names: Iterable[str]) -> None:
    """Remembers the values of these parameters and buffers of the host too, which are about to be overwritten."""
    record, own = attachment(model), values_of(model)
    assert record is not None
    bodies = tuple(f"{name}." for name in record.graph.bodies)
    for name in names:
        if name in own and name not in record.before and not name.startswith(bodies):
            record.before[name] = own[name].detach().clone()


# ---------------------------------------------------------------------- what was changed since


def refuse_changed(model: nn.Module, record: Attachment) -> None:
    """Refuses a model of which something cannot be given back.

    Raises:
        GraphError: it lists every host and every parameter that is not what it was.
    """
    rows = _changed_modules(model, record)
    rows += _changed_tensors(model, record, {row[0] for row in rows})
    if rows:
        cls, count = type(model).__name__, len(rows)
        raise GraphError(
            f"this {cls} was changed after the bodies were attached: {count} difference{'s' * (count > 1)}",
            node=rows[0][0],
            sides=shortened(rows),
            source=here(),
            hint="undo first what changed it (sharding, a parametrization, prune.remove), put back what was replaced, "
            "and give parameters with a new name their requires_grad; nothing is taken off yet",
        )


def _changed_modules(model: nn.Module, record: Attachment) -> list[tuple[str, ...]]:
    """Hosts that are others now, and modules around them with another class: sharding these shards the bodies too."""
    assert record.graph.imported is not None
    modules = dict(model.named_modules(remove_duplicate=False))
    hosts = [*record.hosts, *record.plans]
    paths = [*hosts, *(path_of(body.host) for body in record.graph.bodies.values())]
    parts = [path.split(".") for path in paths]
    around = (".".join(p[:i]) for p in parts for i in range(len(p) + 1))
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys([*hosts, *around]):
        module, was = modules.get(name), record.graph.imported.modules[name].cls
        if module is None:
            rows.append((name, f"was {was}", "is gone"))
            continue
        cls = type(module).__name__
        if plan_of(module) is None and name in hosts:
            rows.append((name, f"was {was}", f"is another {cls} without the bodies"))
        elif has_other_class(module) if plan_of(module) is not None else cls != was:
            rows.append((name or cls, f"was {was}", f"has the class {cls}"))
    return rows


def _changed_tensors(model: nn.Module, record: Attachment, known: set[str]) -> list[tuple[str, ...]]:
    """Values that have no place to go back to, and parameters that have their frozen state under another name."""
    own, modules = values_of(model), {n for n, _ in model.named_modules(remove_duplicate=False)}
    bodies = tuple(f"{name}." for name in record.graph.bodies)
    added = [n for n in own if n not in record.trained_before and not n.startswith(bodies)]
    rows: list[tuple[str, ...]] = []
    for name, value in record.before.items():
        if name.rpartition(".")[0] in known:
            continue
        if name not in own:
            rows.append((name, f"was {tuple(value.shape)}", "is gone"))
        elif own[name].shape != value.shape:
            rows.append((name, f"was {tuple(value.shape)}", f"is {tuple(own[name].shape)}"))
    known |= {row[0] for row in rows}
    for name, trained in record.trained_before.items():
        owner = name.rpartition(".")[0]
        if isinstance(own.get(name), nn.Parameter) or known & {name, owner} or owner not in modules:
            continue
        below = [n for n in added if n.startswith(f"{owner}." if owner else "") and isinstance(own[n], nn.Parameter)]
        kept = [n for n in below if own[n].requires_grad != trained]
        if kept:
            rows.append((name, f"was {'trained' if trained else 'frozen'}", f"is {', '.join(kept[:3])} now"))
        elif trained and name in own:
            rows.append((name, "was a parameter", "is a buffer"))
    return rows


def warn_of_rounding(model: nn.Module, record: Attachment) -> None:
    """Says which tensors cannot be given back bit for bit, because the model was converted since."""
    assert record.graph.imported is not None
    was = {n: p.dtype for n, p in record.graph.imported.params.items()} | {n: v.dtype for n, v in record.before.items()}
    now = {n: v.dtype for n, v in values_of(model).items()}
    rounded = {n: d for n, d in was.items() if n in now and not _holds(now[n], d)}
    if rounded:
        text = GraphError(
            f"this {type(model).__name__} was converted after the bodies were attached: "
            f"{len(rounded)} of its tensors are given back rounded",
            sides=shortened([(n, f"was {d}", f"is {now[n]}") for n, d in rounded.items()], 3),
            hint="load their values again; graph.compile() without inplace=True makes a copy to convert",
        )
        warnings.warn(str(text), stacklevel=3)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of the other dtype is one of this dtype."""
    if dtype == other or not (other.is_floating_point or other.is_complex):
        # a conversion of a model leaves whole numbers as they are
        return True
    mine, theirs = torch.finfo(dtype), torch.finfo(other)
    return mine.eps <= theirs.eps and mine.max >= theirs.max
