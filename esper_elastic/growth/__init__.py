"""Birth and pruning of units, and what the two are decided by.

``ElasticDim.grow`` and ``ElasticDim.keep`` check everything before they touch anything, then write in place, over the full capacity of
every axis that crosses the dim: a unit of another dim that sleeps now must find its part initialised and aligned when it wakes. Widths are
published by the control block, which this package asks and never writes. :func:`observe` gathers scores of units, and what
``grow(n, init="gradmax")`` starts newborn ones from.
"""

from ..control import install_verb
from .grow import grow
from .keep import keep
from .observe import Observation, observe

__all__ = ["Observation", "grow", "keep", "observe"]

install_verb("grow", grow)
install_verb("keep", keep)
