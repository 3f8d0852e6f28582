"""Nodes that bring several branches together again: AdapterFusion's attention, and the switch of tasks. Floor 2."""

from __future__ import annotations

from collections.abc import Sequence

from ..node import Node
from .making import make


def stack(xs: Sequence[Node], *, name: str | None = None) -> Node:
    """Nodes of one shape `… × d` along a new dimension: `… × n × d`."""
    return make("stack", xs, name, {})


def scores(query: Node, keys: Node, *, temperature: Node | None, scale: float, name: str | None = None) -> Node:
    """`scale · query · key / temperature` for each of n keys: `… × n`."""
    given = [query, keys, *([] if temperature is None else [temperature])]
    return make("scores", given, name, {"scale": scale})


def mix(weights: Node, values: Node, *, name: str | None = None) -> Node:
    """The weighted sum of n values: `… × d`."""
    return make("mix", [weights, values], name, {})


def switch(x: Node, branches: Sequence[Node], *, tasks: Sequence[str], name: str | None = None) -> Node:
    """One of the branches over x, chosen by task when the model is called."""
    return make("switch", [x, *branches], name, {"tasks": tuple(tasks)})
