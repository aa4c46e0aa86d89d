"""The controller: takes decisions from any thread, and carries them out between two steps.

One decision, or a list of them that belong together, is a request. A request succeeds as a whole or leaves everything as it was, and its
result says what became of it; nothing is raised for one that fails. Widths and switches that are due at one boundary are published in one
commit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import nn

from ..control import ControlBlock, ElasticDim
from ..errors import ElasticError, TrainingError
from ..model import known
from ..surgery import ModelSurgeon
from ..surgery.transaction import transaction
from ..surgery.undo import UndoLog, save_objects, save_values
from .decisions import AdaptationDecision
from .mechanisms import step_for
from .requests import AdaptationResult, Request, Served, read, require, verdict_of
from .safety import Guardian, Verdict
from .step import NeedsCommit, Step
from .width_steps import save_units

__all__ = ["AdaptationResult", "Controller", "Request"]

LOGGER = logging.getLogger("esper_elastic.training")


class _TakesSurgery(Exception):
    """Metadata cannot serve a step."""


class _Tried(Exception):
    """Ends a trial: all of it is dropped."""


def _spare(decision: AdaptationDecision) -> AdaptationDecision:
    """A decision whose layer a trial may write to."""
    if not isinstance(decision.layer_spec, nn.Module):
        return decision
    return AdaptationDecision.parse(dataclasses.replace(decision, layer_spec=copy.deepcopy(decision.layer_spec)))


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
        self._log: UndoLog | None = None

    # From any thread

    def submit(self, decision: Any, *, source: str = "") -> Future[AdaptationResult]:
        """Ask for a change at the next boundary, from any thread.

        Args:
            decision: in any form that :meth:`AdaptationDecision.parse` takes, or a list of them that succeed or vanish together.
            source: who asks, for the record.

        Returns:
            a future of the result, which is set by the thread that trains. Do not wait for it in that thread.
        """
        future: Future[AdaptationResult] = Future()
        self._waiting.put(Request(self._next(), decision, source, future))
        return future

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
        return self._serve([Request(self._next(), decision, source)])[0]

    def refuse(self, decision: Any, error: ElasticError) -> AdaptationResult:
        """Record that a decision is not heard, and why."""
        served = Served(Request(self._next(), decision, "", Future()))
        served.failed(error)
        return self._finished(served)

    def dismiss(self, error: ElasticError) -> None:
        """Refuse what waits: training has ended where nothing may change."""
        for request in self._take_waiting():
            served = Served(request)
            served.failed(error)
            self._finished(served)

    def drain(self) -> list[AdaptationResult]:
        """Carry out what has been submitted, in order: what waits now, not what is submitted meanwhile."""
        return self._serve(self._take_waiting())

    def _take_waiting(self) -> list[Request]:
        """What waits and was not cancelled; from here on it cannot be."""
        taken = [self._waiting.get() for _ in range(self._waiting.qsize())]
        return [request for request in taken if request.future is None or request.future.set_running_or_notify_cancel()]

    def preflight(self, decision: Any) -> Verdict:
        """Whether a request would be carried out now, and the limit that decides. For several decisions, the first refusal.

        Call it where :meth:`apply` may be called: what metadata serves is staged and dropped, what takes surgery is made and undone.
        """
        trial = Served(Request(0, decision, ""))
        account = self.guardian.state_dict()
        try:
            trial.decisions = tuple(_spare(each) for each in read(decision))
            self._judge(trial)
            self._try(trial)
        except _Tried:
            return Verdict(True, mechanism=trial.mechanism)
        except Exception as error:
            return verdict_of(error)
        finally:
            self.guardian.load_state_dict(account)
        raise AssertionError("a trial ends by being dropped")

    def _try(self, trial: Served) -> None:
        block = self._block()
        try:
            if block is not None:
                with block.batch():
                    self._stage_steps(trial, trying=True)
                    raise _Tried
        except (_TakesSurgery, NeedsCommit):
            trial.clear()
        transaction(self.model, example_inputs=self.surgeon.example_inputs, **self.followers)(self._operate)(trial, trying=True)

    # Serving

    def _serve(self, requests: list[Request]) -> list[AdaptationResult]:
        left = [Served(request) for request in reversed(requests)]
        results: list[AdaptationResult] = []
        try:
            while left:
                served = self._by_metadata(left) or [self._by_surgery(left.pop())]
                results += [self._finished(each) for each in served]
        finally:
            for request in requests:  # whoever waits is not left waiting by what interrupted this
                if request.future is not None and not request.future.done():
                    request.future.set_exception(TrainingError(f"request {request.number}: interrupted before it was carried out."))
        return results

    def _by_metadata(self, left: list[Served]) -> list[Served]:
        """Serve requests from the end of ``left``, in one commit, up to the first that metadata cannot serve."""
        block = self._block()
        if block is None:
            return []
        account, served = self.guardian.state_dict(), list[Served]()
        self._log = None
        try:
            with block.batch():
                while left and self._stage(left[-1], block):
                    served.append(left.pop())
        except BaseException as error:  # of the commit, for all of them
            self.guardian.load_state_dict(account)
            if self._log is not None:
                self._log.unwind()
            if not isinstance(error, Exception):
                raise
            staged = [each for each in served if each.result is None]
            if len(staged) == 1:
                staged[0].failed(error, undone=True)
            for each in staged if len(staged) > 1 else ():
                each.clear()
                if not self._by_metadata([each]):
                    self._by_surgery(each)
        for each in served:
            if each.result is None:
                each.succeeded()
        return served

    def _stage(self, served: Served, block: ControlBlock) -> bool:
        """Stage a request in the open batch, or refuse it; returns whether metadata can serve it."""
        try:
            self._take_up(served)
            with block.batch():
                self._stage_steps(served)
            self.guardian.note(served.steps, self.step, self.epoch)
        except (_TakesSurgery, NeedsCommit):
            served.clear()
            return False
        except Exception as error:
            served.failed(error)
        return True

    def _stage_steps(self, served: Served, trying: bool = False) -> None:
        for decision in served.decisions:
            step = step_for(decision, self.model, self.surgeon)
            if step.mechanism != "metadata":
                raise _TakesSurgery
            self._carry_out(step, served, trying)

    def _by_surgery(self, served: Served) -> Served:
        """Serve a request in a transaction."""
        try:
            self._take_up(served)
            first = step_for(served.decisions[0], self.model, self.surgeon)
            require(self.guardian.weigh(first, self.model, self.step, self.epoch))
            block = self._block()
            if block is not None:
                block._require_owner()
            transaction(self.model, example_inputs=self.surgeon.example_inputs, **self.followers)(self._operate)(served)
            self.guardian.note(served.steps, self.step, self.epoch)
            served.succeeded()
        except Exception as error:
            served.failed(error, undone=bool(served.steps))
        return served

    def _operate(self, served: Served, trying: bool = False) -> None:
        """Carry out a request in a transaction; to try it, and be undone, without telling anybody."""
        self.guardian.recount(self.model)
        account = self.guardian.state_dict()
        for decision in served.decisions:
            self._carry_out(step_for(decision, self.model, self.surgeon), served, trying)
        self.guardian.load_state_dict(account)
        require(self.guardian.check(self.model))
        if trying:
            raise _Tried

    def _take_up(self, served: Served) -> None:
        if served.decisions:
            return
        served.begun = time.perf_counter()
        served.decisions = read(served.request.given)
        self.taken_up(served.request, served.decisions)
        self._judge(served)

    def _judge(self, served: Served) -> None:
        for decision in served.decisions:
            require(self.guardian.judge(decision, self.step))

    def _carry_out(self, step: Step, served: Served, trying: bool = False) -> None:
        require(self.guardian.weigh(step, self.model, self.step, self.epoch, served.steps))
        if not trying:
            self.before_change(step)
        served.steps.append(step)
        if step.writes is not None:
            save = functools.partial(self._save, step.writes, step.writes.block._batch is not None)
            step.writes.block.stage(step.writes, step.writes.staged, save)
        served.details.append(step.carry_out())

    def _save(self, dim: ElasticDim, in_batch: bool) -> None:
        """Note what a batch, or a step of a transaction, is about to write: the commit by itself undoes no write to a weight."""
        if not in_batch:
            save_units(dim, save_values, save_objects)
            return
        if self._log is None:
            self._log = UndoLog()
            self._log.record_random_numbers()
        save_units(dim, self._log.save_values, self._log.record)

    def _finished(self, served: Served) -> AdaptationResult:
        result = served.result
        assert result is not None
        try:
            self.done(result)
        except Exception:
            LOGGER.exception("request %d: its result could not be recorded", result.request)
        if served.request.future is not None:
            served.request.future.set_result(result)
        return result

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
