"""From plain models to elastic ones and back."""

from .elasticize import elasticize, plan
from .export import export
from .plan import Plan

__all__ = ["Plan", "elasticize", "export", "plan"]
