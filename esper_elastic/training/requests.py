"""Requests and what becomes of them: read, on their way, done or refused."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import Future
from typing import Any

from ..errors import CapacityError, DecisionError, ElasticError, SafetyError, SurgeryError, TrainingError
from .decisions import AdaptationDecision
from .safety import Verdict
from .step import Mechanism, Step

#: Decisions of one request.
MOST_STEPS = 256


@dataclasses.dataclass(frozen=True)
class AdaptationResult:
    """What became of a request; truthy if it was carried out.

    Attributes:
        success: whether the model has changed as decided.
        decisions: of the request; empty if it could not be read.
        mechanism: that served it: ``"metadata"``, ``"surgery"`` where any part of it was, or ``None``.
        details: of each decision, in order.
        milliseconds: from taking it up to its commit or refusal.
        verdict: of the run's limits.
        error: why it was not carried out.
        undone: whether it had begun, and was rolled back.
        request: its number in the run.
    """

    success: bool
    decisions: tuple[AdaptationDecision, ...]
    mechanism: Mechanism | None
    details: tuple[dict[str, Any], ...]
    milliseconds: float
    verdict: Verdict
    error: ElasticError | None = None
    undone: bool = False
    request: int = 0

    def __bool__(self) -> bool:
        return self.success

    def __str__(self) -> str:
        said = " + ".join(map(str, self.decisions)) or "a request"
        if self.success:
            return f"{said}: {self.mechanism}, {self.milliseconds:.3g} ms"
        return f"{said}: {'rolled back' if self.undone else 'refused'}: {self.error}"


@dataclasses.dataclass(frozen=True)
class Request:
    """What was submitted, and by whom; ``future`` where somebody waits for the result."""

    number: int
    given: Any
    source: str
    future: Future[AdaptationResult] | None = None


class Served:
    """A request on its way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.begun = time.perf_counter()
        self.decisions: tuple[AdaptationDecision, ...] = ()
        self.steps: list[Step] = []
        self.details: list[dict[str, Any]] = []
        self.result: AdaptationResult | None = None

    @property
    def mechanism(self) -> Mechanism:
        """That its steps take."""
        return "surgery" if any(step.mechanism == "surgery" for step in self.steps) else "metadata"

    def clear(self) -> None:
        """Forget what was staged, to begin again."""
        self.steps.clear()
        self.details.clear()

    def succeeded(self) -> None:
        """It has been published."""
        self._end(self.mechanism, tuple(self.details), Verdict(True, mechanism=self.mechanism))

    def failed(self, error: Exception, undone: bool = False) -> None:
        """It has been refused, or undone."""
        verdict = verdict_of(error)
        if not isinstance(error, ElasticError):
            said = TrainingError(f"{' + '.join(map(str, self.decisions)) or 'a request'}: {type(error).__name__}: {error}")
            said.__cause__ = error
            error = said
        self._end(None, (), verdict, error, undone)

    def _end(
        self,
        mechanism: Mechanism | None,
        details: tuple[Any, ...],
        verdict: Verdict,
        error: ElasticError | None = None,
        undone: bool = False,
    ) -> None:
        milliseconds = 1e3 * (time.perf_counter() - self.begun)
        number = self.request.number
        self.result = AdaptationResult(error is None, self.decisions, mechanism, details, milliseconds, verdict, error, undone, number)


class Refused(SafetyError):
    """A limit of the run, with its verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"safety: {verdict.factor}: {verdict.reason}.")
        self.verdict = verdict


def require(verdict: Verdict) -> None:
    """Go on if the verdict is to.

    Raises:
        SafetyError: it is not, with the verdict.
    """
    if not verdict:
        raise Refused(verdict)


def verdict_of(error: Exception) -> Verdict:
    """What an error says of a request, and whose it is: for the record."""
    if isinstance(error, Refused):
        return error.verdict
    kinds = ((DecisionError, "decision"), (SafetyError, "safety"), (SurgeryError, "surgeon"), (CapacityError, "capacity"))
    return Verdict(False, next((name for kind, name in kinds if isinstance(error, kind)), "error"), str(error))


def read(given: Any) -> tuple[AdaptationDecision, ...]:
    """The decisions of a request.

    Raises:
        DecisionError: one is none, or there are none or too many.
    """
    if isinstance(given, str | bytes | bytearray) and given.lstrip()[:1] in ("[", b"["):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise DecisionError(f"decision: expected JSON, got text that is none: {str(error)[:200]}.") from None
    several = given if isinstance(given, list | tuple) else [given]
    if not 1 <= len(several) <= MOST_STEPS:
        raise DecisionError(f"decision: expected from 1 to {MOST_STEPS} decisions, got {len(several)}.")
    return tuple(AdaptationDecision.parse(each) for each in several)
