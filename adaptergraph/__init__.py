"""See a frozen model as a named graph, splice trainable adapters into it, check it, draw it, compile it, train it."""

from . import blocks
from .adapter import Adapter
from .errors import BadSplice, DuplicateName, GraphError, ShapeMismatch, StateMismatch, UnknownNode
from .fit import fit
from .graph import Diff, Graph
from .layers import *  # noqa: F403
from .layers import __all__ as _layers
from .methods import Bottleneck
from .node import Node
from .plan import plan_table
from .select import Selection
from .sites import detach, graph_of
from .storage import adapter_state, apply, load, save
from .surgery import Site
from .trace import trace

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BadSplice",
    "Bottleneck",
    "Diff",
    "DuplicateName",
    "Graph",
    "GraphError",
    "Node",
    "Selection",
    "ShapeMismatch",
    "Site",
    "StateMismatch",
    "UnknownNode",
    "adapter_state",
    "apply",
    "blocks",
    "detach",
    "fit",
    "graph_of",
    "load",
    "plan_table",
    "save",
    "trace",
    *_layers,
]
