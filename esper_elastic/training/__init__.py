"""Training under decisions: a network that changes its own architecture while it trains, under a hand that keeps it safe.

:class:`Trainer` is the loop; :class:`AdaptationDecision` says what is to change; policies and other sources decide; :class:`Safety` and
:class:`Governor` hold them; :class:`Monitor` keeps the record.
"""

from .controller import AdaptationResult, Controller
from .decisions import AdaptationDecision, DecisionSource
from .governor import Governor
from .monitor import Monitor
from .policies import DisableLeast, GrowOnPlateau, PruneLeast, Schedule, SkipVanishing, When
from .safety import Safety, Verdict
from .sources import DecisionFile
from .state import TrainingState
from .trainer import Trainer

__all__ = [
    "AdaptationDecision",
    "AdaptationResult",
    "Controller",
    "DecisionSource",
    "DisableLeast",
    "Governor",
    "GrowOnPlateau",
    "DecisionFile",
    "Monitor",
    "PruneLeast",
    "Safety",
    "Schedule",
    "SkipVanishing",
    "Trainer",
    "TrainingState",
    "Verdict",
    "When",
]
