"""The controller: takes decisions from any thread, and carries them out between two steps.

One decision, or a list of them that belong together, is a request. A request succeeds as a whole or leaves everything as it was, and its
result says what became of it; nothing is raised for one that fails. Widths and switches that are due at one boundary are published in one
commit.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import nn

from ..control import ControlBlock
from ..errors import CapacityError, DecisionError, ElasticError, SafetyError, SurgeryError, TrainingError
from ..model import known
from ..surgery import ModelSurgeon
from ..surgery.transaction import transaction
from .decisions import AdaptationDecision
from .mechanisms import Mechanism, Step, step_for
from .safety import Guardian, Verdict

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
    """What was submitted, and by whom."""

    number: int
    given: Any
    source: str
    future: Future[AdaptationResult]


class _Served:
    """A request on its way."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.begun = time.perf_counter()
        self.decisions: tuple[AdaptationDecision, ...] = ()
        self.steps: list[Step] = []
        self.details: list[dict[str, Any]] = []
        self.result: AdaptationResult | None = None

    def succeeded(self) -> None:
        """It has been published."""
        mechanism: Mechanism = "surgery" if any(step.mechanism == "surgery" for step in self.steps) else "metadata"
        self._end(mechanism, tuple(self.details), Verdict(True, mechanism=mechanism))

    def failed(self, error: Exception) -> None:
        """It has been refused, or undone."""
        verdict = error.verdict if isinstance(error, _Refused) else Verdict(False, _judge_of(error), str(error))
        if not isinstance(error, ElasticError):
            said = TrainingError(f"{' + '.join(map(str, self.decisions)) or 'a request'}: {type(error).__name__}: {error}")
            said.__cause__ = error
            error = said
        self._end(None, (), verdict, error, bool(self.steps))

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


class _Refused(SafetyError):
    """A limit of the run, with its verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"safety: {verdict.factor}: {verdict.reason}.")
        self.verdict = verdict


class _TakesSurgery(Exception):
    """Metadata cannot serve a step."""


def _require(verdict: Verdict) -> None:
    if not verdict:
        raise _Refused(verdict)


def _judge_of(error: Exception) -> str:
    """Who refused: for the record."""
    for kind, name in ((DecisionError, "decision"), (SafetyError, "safety"), (SurgeryError, "surgeon"), (CapacityError, "capacity")):
        if isinstance(error, kind):
            return name
    return "error"


def _read(given: Any) -> tuple[AdaptationDecision, ...]:
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


class Controller:
    """Applies decisions to one model.

    Args:
        model: that changes.
        surgeon: for what metadata cannot express.
        guardian: of the run's limits.
        followers: what :func:`esper_elastic.transaction` is given beside the model: ``optimizer``, ``schedulers``, ``scaler``, ``ema``.
        taken_up: called with each request that could be read, and its decisions.
        before_change: called with each step before it is carried out; what it raises refuses the request.
        done: called with each result, before whoever waits for it is told.
    """

    def __init__(
        self,
        model: nn.Module,
        surgeon: ModelSurgeon,
        guardian: Guardian,
        followers: dict[str, Any] | None = None,
        *,
        taken_up: Callable[[Request, tuple[AdaptationDecision, ...]], None] = lambda request, decisions: None,
        before_change: Callable[[Step], None] = lambda step: None,
        done: Callable[[AdaptationResult], None] = lambda result: None,
    ) -> None:
        self.model = model
        self.surgeon = surgeon
        self.guardian = guardian
        self.followers = followers or {}
        self.taken_up = taken_up
        self.before_change = before_change
        self.done = done
        self.step = self.epoch = 0
        self._number = 0
        self._numbering = threading.Lock()
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()

    # From any thread

    def submit(self, decision: Any, *, source: str = "") -> Future[AdaptationResult]:
        """Ask for a change at the next boundary, from any thread.

        Args:
            decision: in any form that :meth:`AdaptationDecision.parse` takes, or a list of them that succeed or vanish together.
            source: who asks, for the record.

        Returns:
            a future of the result, which is set by the thread that trains. Do not wait for it in that thread.
        """
        request = Request(self._next(), decision, source, Future())
        self._waiting.put(request)
        return request.future

    def _next(self) -> int:
        with self._numbering:
            self._number += 1
            return self._number

    # Between two steps

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return self._waiting.empty()

    def apply(self, decision: Any, *, source: str = "") -> AdaptationResult:
        """Carry out one request now. Call it in the thread that trains, between two steps."""
        request = Request(self._next(), decision, source, Future())
        return self._serve([request])[0]

    def refuse(self, decision: Any, error: ElasticError) -> AdaptationResult:
        """Record that a decision is not heard, and why."""
        served = _Served(Request(self._next(), decision, "", Future()))
        served.failed(error)
        return self._finished(served)

    def drain(self) -> list[AdaptationResult]:
        """Carry out what has been submitted, in order: what waits now, not what is submitted meanwhile."""
        waiting: list[Request] = []
        for _ in range(self._waiting.qsize()):
            request = self._waiting.get()
            if request.future.set_running_or_notify_cancel():
                waiting.append(request)
        return self._serve(waiting) if waiting else []

    def preflight(self, decision: Any) -> Verdict:
        """Whether a request would be allowed now, and the limit that decides; nothing changes. For a list, the first refusal."""
        try:
            for each in _read(decision):
                verdict = self.guardian.judge(each, self.step)
                if verdict:
                    verdict = self.guardian.weigh(step_for(each, self.model, self.surgeon), self.model, self.step, self.epoch)
                if not verdict:
                    return verdict
        except ElasticError as error:
            return Verdict(False, "decision", str(error))
        return verdict

    # Serving

    def _serve(self, requests: list[Request]) -> list[AdaptationResult]:
        left = [_Served(request) for request in reversed(requests)]
        served: list[_Served] = []
        while left:
            served += self._by_metadata(left)
            if left:
                served.append(self._by_surgery(left.pop()))
        return [self._finished(each) for each in served]

    def _by_metadata(self, left: list[_Served]) -> list[_Served]:
        """Serve requests from the end of ``left``, in one commit, up to the first that metadata cannot serve."""
        block = self._block()
        if block is None:
            return []
        account, served = self.guardian.state_dict(), list[_Served]()
        one_by_one = not self.guardian.roomy  # what is in use is counted before each
        try:
            with block.batch():
                while left and not (one_by_one and served):
                    if not self._stage(left[-1], block):
                        break
                    served.append(left.pop())
        except Exception as error:  # of the commit, for all of them
            self.guardian.load_state_dict(account)
            staged = [each for each in served if each.result is None]
            for each in staged:
                if len(staged) == 1:
                    each.failed(error)
                else:
                    each.steps.clear()
                    each.details.clear()
                    self._by_metadata([each])
        for each in served:
            if each.result is None:
                each.succeeded()
        return served

    def _stage(self, served: _Served, block: ControlBlock) -> bool:
        """Stage a request in the open batch, or refuse it; returns whether metadata can serve it."""
        try:
            self._take_up(served)
            with block.batch():
                for decision in served.decisions:
                    step = step_for(decision, self.model, self.surgeon)
                    if step.mechanism != "metadata":
                        raise _TakesSurgery
                    self._carry_out(step, served)
            self.guardian.note(served.steps, self.step, self.epoch)
        except _TakesSurgery:
            served.steps.clear()
            served.details.clear()
            return False
        except Exception as error:
            served.failed(error)
        return True

    def _by_surgery(self, served: _Served) -> _Served:
        """Serve a request in a transaction."""
        try:
            self._take_up(served)
            transaction(self.model, example_inputs=self.surgeon.example_inputs, **self.followers)(self._operate)(served)
            self.guardian.note(served.steps, self.step, self.epoch)
            served.succeeded()
        except Exception as error:
            served.failed(error)
        return served

    def _operate(self, served: _Served) -> None:
        for decision in served.decisions:
            self._carry_out(step_for(decision, self.model, self.surgeon), served)
        self.guardian.check(self.model)

    def _take_up(self, served: _Served) -> None:
        if served.decisions:
            return
        served.begun = time.perf_counter()
        served.decisions = _read(served.request.given)
        self.taken_up(served.request, served.decisions)
        for decision in served.decisions:
            _require(self.guardian.judge(decision, self.step))

    def _carry_out(self, step: Step, served: _Served) -> None:
        _require(self.guardian.weigh(step, self.model, self.step, self.epoch))
        self.before_change(step)
        served.steps.append(step)
        served.details.append(step.carry_out())

    def _finished(self, served: _Served) -> AdaptationResult:
        assert served.result is not None
        self.done(served.result)
        served.request.future.set_result(served.result)
        return served.result

    def _block(self) -> ControlBlock | None:
        dims, blocks = known(self.model)
        entry: Any = next(iter(dims.values()), None) or next((block.switch for block in blocks.values()), None)
        return None if entry is None else entry.block

    # State

    def state_dict(self) -> dict[str, Any]:
        """The number of the last request, as JSON-able data. What waits belongs to whoever submitted it."""
        return {"number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._number = state["number"]
