"""Methods: frozen values that say what is added at a site. One file per family, one `apply` each. Floor 3."""

from .base import METHODS
from .bottleneck import Bottleneck
from .combine import Fusion, Stack, Sum, Switch

__all__ = ["METHODS", "Bottleneck", "Fusion", "Stack", "Sum", "Switch"]
