"""Policies: rules that decide. Each looks at where a run stands between two steps and says what to change; nothing changes here.

They are sources of decisions like any other (:class:`DecisionSource`), and are composed by giving several to the trainer, or by
:class:`When`. What they have gathered is part of a checkpoint.
"""

from .grow import GrowOnPlateau
from .least import DisableLeast, PruneLeast
from .vanishing import SkipVanishing
from .when import Schedule, When

__all__ = ["DisableLeast", "GrowOnPlateau", "PruneLeast", "Schedule", "SkipVanishing", "When"]
