"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from models import CASES, MORE, Case, snapshot
from torch import nn

import adaptergraph as ag

torch.set_num_threads(1)


class Traced(NamedTuple):
    """A model, and its graph."""

    case: Case
    model: nn.Module
    graph: ag.Graph


@pytest.fixture(scope="session")
def zoo() -> dict[str, Traced]:
    """Models that were traced already, for the whole session."""
    return {}


@pytest.fixture
def traced(zoo: dict[str, Traced]) -> Iterator[Callable[[str], Traced]]:
    """`traced("bert")`: a model and its graph. The model is shared, and whatever a test does must not change it."""
    before = {}

    def get(name: str) -> Traced:
        if name not in zoo:
            case = (CASES | MORE)[name]
            model = case.model()
            args, kwargs = case.args()
            zoo[name] = Traced(case, model, ag.trace(model, *args, **kwargs))
        before.setdefault(name, snapshot(zoo[name].model))
        return zoo[name]

    yield get
    for name, state in before.items():
        assert snapshot(zoo[name].model) == state, f"the shared model {name!r} was changed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--axon-golden PATH`: another file of real outputs of Axon, of the same format."""
    parser.addoption("--axon-golden", default=None, help="a file like tests/golden/axon.json")
