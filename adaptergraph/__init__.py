"""See a frozen model as a named graph, splice trainable adapters into it, check it, draw it, compile it, train it."""

from . import blocks
from .adapter import Adapter
from .errors import BadSplice, DuplicateName, GraphError, ShapeMismatch, StateMismatch, UnknownNode
from .fit import fit
from .graph import Diff, Graph
from .hosting.sites import detach, graph_of
from .layers import *  # noqa: F403
from .layers import __all__ as _layers
from .methods import Bottleneck, Fusion, Stack, Sum, Switch
from .node import Node
from .places import places
from .plan import plan_table
from .saving.branches import load_branch
from .saving.storage import adapter_state, apply, load, save
from .select import Selection, span
from .splicing.site import Site
from .tasks import set_task, task
from .tracing.trace import trace

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BadSplice",
    "Bottleneck",
    "Diff",
    "DuplicateName",
    "Fusion",
    "Graph",
    "GraphError",
    "Node",
    "Selection",
    "ShapeMismatch",
    "Site",
    "Stack",
    "StateMismatch",
    "Sum",
    "Switch",
    "UnknownNode",
    "adapter_state",
    "apply",
    "blocks",
    "detach",
    "fit",
    "graph_of",
    "load",
    "load_branch",
    "places",
    "plan_table",
    "save",
    "set_task",
    "span",
    "task",
    "trace",
    *_layers,
]
