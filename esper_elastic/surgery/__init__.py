"""Changing the structure of live models: edits, validators, and transactions that undo exactly what fails."""

from .journal import journal, replay
from .specs.specs import LayerSpec
from .surgeon import EditPlan, ModelSurgeon, SurgeryResult
from .transaction import Transaction, transaction
from .validators import SurgeryValidator, ValidationResult

__all__ = [
    "EditPlan",
    "LayerSpec",
    "ModelSurgeon",
    "SurgeryResult",
    "SurgeryValidator",
    "Transaction",
    "ValidationResult",
    "journal",
    "replay",
    "transaction",
]
