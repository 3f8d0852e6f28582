"""Whether what is saved is all that was trained. Floor 5."""

from __future__ import annotations

import warnings

from torch import nn

from ..errors import GraphError, here, quoted, shortened
from ..graph import Graph
from ..hosting.attachment import inside
from ..hosting.sites import graph_of


def changeable(graph: Graph) -> list[str]:
    """The parameters that training can change, as the graph says: those of bodies, and of hosts what is unfrozen."""
    return [n for n in graph.params if n in graph.body_params or graph.trained[n]]


def refuse_left_out(model: nn.Module) -> None:
    """Whether a compiled model has other trained parameters than those that its graph says are trained.

    Parameters that the graph does not know get a warning: they belong to a module that was put into the model later, as
    other libraries do, which save them in a way of their own.

    Raises:
        GraphError: a frozen parameter of the graph is trained; each one is named.
    """
    graph, own = graph_of(model), dict(inside(model).named_parameters(remove_duplicate=False))
    tied = graph.imported.tied if graph.imported is not None else {}
    saved = {id(own[n]) for n in changeable(graph) if n in own}
    known = {id(p): n for n, p in reversed(own.items()) if tied.get(n, n) in graph.params}
    trained = [n for n, p in own.items() if p.requires_grad and known.get(id(p)) == n and id(p) not in saved]
    cls = type(inside(model)).__name__
    if trained:
        raise GraphError(
            f"{_parameters(len(trained))} of this {cls} would be left out: trained, but frozen in its graph",
            node=trained[0],
            sides=shortened([(n, "graph frozen", "model requires_grad=True") for n in trained]),
            source=here(),
            hint=f"graph.unfreeze([{quoted(trained)}]) before graph.compile();\n"
            "what is trained already comes along: ag.graph_of(model).unfreeze([…]).compile(state=model.state_dict());\n"
            "a new module goes into the model before ag.trace; requires_grad_(False) for what is not to be kept",
        )
    unknown = sorted((n for n, p in own.items() if id(p) not in known), key=lambda n: not own[n].requires_grad)
    if unknown:
        text = GraphError(
            f"left out are {_parameters(len(unknown))} of this {cls} that its graph does not know",
            sides=shortened([(n, "trained" if own[n].requires_grad else "frozen") for n in unknown], 6),
            source=here(),
            hint="the library that added them saves them; a new module of yours goes into the model before ag.trace",
        )
        warnings.warn(str(text), stacklevel=3)


def _parameters(count: int) -> str:
    return f"{count} parameter{'s' * (count > 1)}"
