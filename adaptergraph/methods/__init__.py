"""Methods: frozen values that say what is added at a site. One file per family, one `apply` each. Floor 3."""

from .base import METHODS
from .bottleneck import Bottleneck

__all__ = ["METHODS", "Bottleneck"]
