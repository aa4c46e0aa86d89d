"""One decision, ready to be carried out on one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from ..control import ElasticDim
from ..errors import DecisionError
from .cost import Cost
from .decisions import AdaptationDecision

Mechanism = Literal["metadata", "surgery"]


class NeedsCommit(Exception):
    """A step that reads what an open batch has staged and not yet done."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision, ready to be carried out on one model.

    Attributes:
        decision: that it carries out.
        mechanism: ``"metadata"``, a write to the control block, or ``"surgery"``.
        name: of what changes, as the model has it.
        carry_out: makes the change and returns its details.
        direction: 1 for what adds capacity, -1 for what removes some, else 0.
        cost: what it adds, computed when asked.
        width: of the dim afterwards, if it is one that changes; of several the smallest.
        writes: the dim whose units are initialised or moved, which neither a batch nor a transaction undoes by itself.
    """

    decision: AdaptationDecision
    mechanism: Mechanism
    name: str
    carry_out: Callable[[], dict[str, Any]]
    direction: int = 0
    cost: Callable[[], Cost] = Cost
    width: int | None = None
    writes: ElasticDim | None = None


def require_only(decision: AdaptationDecision, words: set[str]) -> None:
    """Refuse parameters that a decision does not take."""
    unknown = next((word for word in decision.parameters if word not in words), None)
    if unknown is not None:
        expected = ", ".join(sorted(words)) or "none"
        raise DecisionError(f"decision: {decision}: parameters: expected {expected}, got {unknown!r}.")
