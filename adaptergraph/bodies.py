"""What was added to a graph: bodies, and the splices they came from. Floor 1, plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .names import path_of


@dataclass(frozen=True, slots=True)
class Body:
    """What was added at one site: the nodes called `name.…`, between the value they replace and the value they make.

    Attributes:
        name: `<host>.<name>`, where its modules live; see `names.body_name` for hosts that are part of a module.
        host: the node, container, operation or call it was added at.
        where: `"after"` (replaces the output), `"around"` (sees the input too, replaces the output) or `"before"`
            (replaces the input).
        calls: for each call of the host, the value that was replaced and the value that replaces it.
    """

    name: str
    host: str
    where: str
    calls: tuple[tuple[str, str], ...]

    @property
    def child(self) -> str:
        """Its name as a child of the module it is at."""
        return self.name.removeprefix(path_of(self.host)).removeprefix(".")

    def is_below(self, name: str) -> bool:
        """Whether it is at the host of this name, or inside it."""
        return self.host == name or (path_of(self.host) + ".").startswith(name + ".")


@dataclass(frozen=True, slots=True)
class Splice:
    """One call of `graph.splice`, as asked for: what a file stores, and what `unsplice` undoes."""

    at: Any
    method: Any
    name: str
    where: str
    hosts: tuple[str, ...]
