"""Where the literature puts adapters, as a table; which modules of a graph that means, its structure says. Floor 6."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from .collect import alive
from .errors import GraphError, UnknownNode, here, suggestion
from .graph import Graph
from .names import path_of
from .select import Selection, in_graph_order
from .structure import CORE, PROJECTION, RESIDUAL, WHOLE, Structure

# a body after one of these may as well come after steps without weights: a weighted sum over experts, a reshape
OUTPUTS = ("attention output", "ffn output")


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table.

    Attributes:
        roles: what is looked for; every one of them must be there.
        doc: what that is, in one line.
        paper: where it was proposed.
        without: roles whose places are left out.
    """

    roles: tuple[str, ...]
    doc: str
    paper: str
    without: tuple[str, ...] = ()


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "houlsby": Preset(OUTPUTS, "after attention and after the feed-forward layer", "arxiv.org/abs/1902.00751"),
        "pfeiffer": Preset(("ffn output",), "after the feed-forward layer", "arxiv.org/abs/2005.00247"),
        "attention": Preset(("attention output",), "after attention", "arxiv.org/abs/2110.04366"),
        "ffn": Preset(("ffn output",), "after the feed-forward layer", "arxiv.org/abs/2110.04366"),
        "ffn-input": Preset(("ffn input",), "the first projections of it, gates too", "arxiv.org/abs/2110.04366"),
        "lora-attention": Preset(("query", "value"), "what makes queries and values", "arxiv.org/abs/2106.09685"),
        "lora-qkvo": Preset(
            ("query", "key", "value", "attention output"), "all of attention", "arxiv.org/abs/2106.09685"
        ),
        "all-linear": Preset(("projection",), "all but the heads", "arxiv.org/abs/2305.14314", without=("head",)),
    }
)


def places(graph: Graph, preset: str) -> Selection:
    """The modules at which a placement of the literature puts its bodies, found by the structure of the graph.

    No name of a model or module is known here, so this works on an architecture that nobody listed, declared or
    imported. Bodies that are there already change nothing. What each preset finds, how, and where it cannot:
    `docs/places.md`.

    Args:
        graph: declared, or the result of `ag.trace`.
        preset: `"houlsby"` (attention output and feed-forward output), `"pfeiffer"` and `"ffn"` (feed-forward output),
            `"attention"` (its output), `"ffn-input"` (the first projections of the feed-forward layer),
            `"lora-attention"` (queries and values; one place where they are fused), `"lora-qkvo"`, `"all-linear"`
            (every projection but those that make the outputs of the model).

    Raises:
        GraphError: there is no such preset.
        UnknownNode: one of its roles is played by no module; the message says what there is instead.

    >>> import adaptergraph as ag
    >>> x = ag.input("x", shape=("batch", "seq", 64))
    >>> graph = ag.Graph(ag.blocks.transformer_layer(x, 4, 256)).freeze()
    >>> ag.places(graph, "houlsby")
    <Selection of 2: layer.attention.output, layer.ffn.down>
    >>> graph.splice(ag.places(graph, "pfeiffer"), ag.Bottleneck(8)).bodies.keys()
    dict_keys(['layer.ffn.down.adapter'])
    """
    if not isinstance(graph, Graph):
        raise GraphError(
            f"places are found in a Graph, not in {type(graph).__name__}",
            source=here(),
            hint="trace the model first: ag.places(ag.trace(model, …), …)",
        )
    if not isinstance(preset, str) or preset not in PRESETS:
        raise GraphError(
            f"there is no preset {preset!r}",
            source=here(),
            hint=suggestion(preset, PRESETS) if isinstance(preset, str) else "one of: " + ", ".join(PRESETS),
        )
    structure = Structure(graph)
    found: list[str] = []
    for role in PRESETS[preset].roles:
        there = _found(graph, structure, role, PRESETS[preset].without)
        if not there:
            raise _missing(graph, structure, preset, role)
        found += there
    return in_graph_order(graph, found, f"places {preset!r}")


def _found(graph: Graph, structure: Structure, role: str, without: Sequence[str]) -> list[str]:
    names = [name for name in structure.playing(role) if not any(structure.plays(other, name) for other in without)]
    found = [place for name in names if (place := _place(graph, structure, name, exact=role not in OUTPUTS))]
    if graph.imported is None:
        return found
    # a model may run layers of which nothing comes, as one that reads its hidden states before the last layer
    read = alive(graph)
    return [place for place in found if not read.isdisjoint(graph.calls_of(place))]


def _place(graph: Graph, structure: Structure, name: str, exact: bool) -> str | None:
    """The module that gives a value; None if only an operation inside a forward does.

    Unless it must be exact, the module may still do to it what needs no further weights.
    """
    if graph.imported is None:
        return path_of(name)
    inside = "/" in name
    path = graph.imported.scopes[name] if inside else path_of(name)
    module = graph.imported.modules.get(path)
    outputs = [call.output for call in module.calls] if path and module is not None else []
    if not outputs or None in outputs:
        return None
    if inside:
        hosts = [structure.host(output) for output in outputs if output]
        if not any(host == name if exact else name in structure.near[host] for host in hosts):
            return None
    return path


def _missing(graph: Graph, structure: Structure, preset: str, role: str) -> UnknownNode:
    kinds = Counter(structure.kind.values())
    sides: list[tuple[str, ...]] = [(f"{kind}s", str(kinds[kind])) for kind in (CORE, RESIDUAL, PROJECTION)]
    hint = "name modules with a selector: graph.splice('**.<name>', …); print(graph.summary()) shows them"
    inside = [n for n in structure.playing(role) if not structure.plays("head", n)]
    whole = [n for n, kind in structure.kind.items() if kind == WHOLE]
    if inside and graph.imported is not None:
        around = graph.imported.scopes[inside[0]]
        sides.append((role, inside[0], f"an operation in the forward of {around!r}, no module ({len(inside)} in all)"))
    elif whole and role not in OUTPUTS:
        sides.append(("in one module", whole[0], f"{structure.nodes[whole[0]].op} with all its projections"))
    others = [p for p, row in PRESETS.items() if all(_found(graph, structure, r, row.without) for r in row.roles)]
    if others:
        hint += "\nplaces here are found by: " + ", ".join(others)
    return UnknownNode(
        f"the preset {preset!r} ({PRESETS[preset].doc}) finds no {role} in this graph",
        sides=sides,
        source=here(),
        hint=hint,
    )
