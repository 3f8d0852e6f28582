"""The layers of a declared graph: rows of a table (`table.py`) behind Axon's functional calls, a file a family."""

from . import activations as _activations
from . import calls as _calls
from . import combinators as _combinators
from . import convolution as _convolution
from . import naming as _naming
from . import normalization as _normalization
from . import pooling as _pooling
from . import recurrent as _recurrent
from .activations import *  # noqa: F403
from .calls import *  # noqa: F403
from .combinators import *  # noqa: F403
from .convolution import *  # noqa: F403
from .naming import *  # noqa: F403
from .normalization import *  # noqa: F403
from .pooling import *  # noqa: F403
from .recurrent import *  # noqa: F403

__all__ = [
    *_activations.__all__,
    *_calls.__all__,
    *_combinators.__all__,
    *_convolution.__all__,
    *_naming.__all__,
    *_normalization.__all__,
    *_pooling.__all__,
    *_recurrent.__all__,
]
