"""View → table, DOT, Mermaid, picture. Floor 6: renderers of one view, which know nothing of graphs.

Rich, Graphviz and its Python wrappers are imported only when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..view import view
from .dot import to_dot
from .mermaid import to_mermaid
from .render import Picture, svg_of, write
from .table import Table

if TYPE_CHECKING:
    from ..graph import Graph

__all__ = ["dot", "draw", "mermaid", "summary", "svg"]


def summary(graph: Graph, fold: bool = True) -> Table:
    """The graph as a table; with `fold=False` a line for every node."""
    return Table(view(graph, fold=fold, nodes=not fold))


def dot(graph: Graph, fold: bool = True, open: Sequence[str] = ()) -> str:
    """The graph as Graphviz text."""
    return to_dot(view(graph, fold=fold, open=open))


def mermaid(graph: Graph, fold: bool = True, open: Sequence[str] = ()) -> str:
    """The graph as Mermaid text."""
    return to_mermaid(view(graph, fold=fold, open=open))


def draw(
    graph: Graph,
    path: str | Path | None = None,
    fold: bool = True,
    open: Sequence[str] = (),
    mark: Sequence[str] = (),
) -> Path | Picture:
    """Draws the graph into a file whose suffix says the format; without a path, as something a notebook shows.

    Raises:
        GraphError: another suffix, or a folder that does not exist.
        UnknownNode: a name in `open` or `mark` is not in the graph.
    """
    shown = view(graph, fold=fold, open=open, mark=mark)
    return Picture(shown) if path is None else write(shown, path)


def svg(graph: Graph) -> str | None:
    """The picture as SVG text for a notebook; None without Graphviz."""
    return svg_of(view(graph))
