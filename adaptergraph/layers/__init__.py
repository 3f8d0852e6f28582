"""The layers of a declared graph: rows of a table (`table.py`) behind Axon's functional calls (`calls.py`)."""

from .calls import *  # noqa: F403
from .calls import __all__
from .table import OPS

__all__ = [*__all__, "OPS"]
