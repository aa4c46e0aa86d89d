"""From plain models to elastic ones and back."""

from .elasticize import PLAN, elasticize, example_of, plan, plan_of
from .export import export
from .plan import Plan

__all__ = ["PLAN", "Plan", "elasticize", "example_of", "export", "plan", "plan_of"]
