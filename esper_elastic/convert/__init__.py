"""From plain models to elastic ones and back."""

from .export import export

__all__ = ["export"]
