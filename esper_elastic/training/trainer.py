"""``Trainer``: a training loop between whose steps the network may change.

Owns the order of things in a step and at its boundary. What is decided, whether it may happen, how it is done and how it is recorded is
the business of the files beside this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import growth
from ..convert.restore import generators_kept
from ..errors import TrainingError
from ..model import known
from ..surgery import ModelSurgeon
from ..surgery.trial.twins import unwrapped
from . import checkpoints, resumption
from .average import Average
from .bar import bar
from .controller import AdaptationResult, Controller
from .decisions import DecisionSource, name_of
from .epochs import Batches, Epochs
from .events import Evaluated, Event, Restored, Resumed, RunEnded, Saved, SnapshotTaken
from .governor import Governor, Watch
from .inputs import inputs_of_shape, runs_on
from .mechanisms import Step
from .monitor import Monitor
from .record import Record
from .safety import Guardian, Safety, Verdict
from .state import TrainingState
from .update import Update

Loss = Callable[[Any, Any], Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Trainer:
    """Trains a model, and changes it between steps as it is told.

    Args:
        model: elastic, plain, or compiled.
        optimizer: that trains it. Without one, decisions can be applied, and :meth:`fit` refuses.
        loss: ``loss(outputs, targets)``, for batches ``(inputs, targets)``; override :meth:`compute_loss` for others.
        schedulers: one or several, stepped with the optimizer.
        scaler: of gradients, ``torch.amp.GradScaler``.
        ema: an average of the weights, as :func:`esper_elastic.transaction` takes one; with ``update_parameters`` it is updated each step.
        autocast: the dtype of a mixed-precision forward; ``None`` for none.
        accumulate: batches whose gradients make one step.
        clip_norm: the norm that gradients are clipped to.
        sources: whoever decides: policies and others; asked at every boundary, in order.
        safety: limits of the run.
        governor: takes changes back that the loss does not survive; ``None`` for none.
        monitor: takes the events; by default one that writes into ``directory``.
        directory: of the run: ``events.jsonl`` and checkpoints.
        example_inputs: of the model, for trials of edits.
        input_shape: of one input tensor, with or without the batch, where no example input is at hand.
        checkpoint_every: steps between checkpoints; ``None`` for those that :meth:`save` is called for.
        keep_checkpoints: how many stay.
        report_every: steps between events of progress.

    Attributes:
        state: where the run stands.
        update: what makes a step, with its settings.
        controller: that takes decisions.
        monitor: that has the events.

    A step: forward, backward, as often as gradients accumulate; clipping, optimizer, scaler, schedulers, average. Then the boundary:
    the governor looks at the loss, decisions are taken and carried out, a checkpoint is written. Nothing changes in between.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        loss: Loss | None = None,
        *,
        schedulers: Any = (),
        scaler: Any = None,
        ema: Any = None,
        autocast: torch.dtype | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        sources: Sequence[DecisionSource] = (),
        safety: Safety | None = None,
        governor: Governor | None = None,
        monitor: Monitor | None = None,
        directory: str | os.PathLike[str] | None = None,
        example_inputs: Any = None,
        input_shape: Sequence[int] | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int = 2,
        report_every: int = 10,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TrainingError(f"Trainer: model: expected a torch.nn.Module, got {type(model).__name__}.")
        for name, value in (("accumulate", accumulate), ("keep_checkpoints", keep_checkpoints), ("report_every", report_every)):
            if type(value) is not int or value < 1:
                raise TrainingError(f"Trainer: {name}: expected an integer of at least 1, got {value!r}.")
        if checkpoint_every is not None and (type(checkpoint_every) is not int or checkpoint_every < 1 or directory is None):
            raise TrainingError(f"Trainer: checkpoint_every: expected an integer of at least 1, and a directory, got {checkpoint_every!r}.")
        self.model = model
        self._root = root = unwrapped(model)
        self.optimizer = optimizer
        self.loss = loss
        self.schedulers = list(schedulers) if isinstance(schedulers, list | tuple) else [schedulers]
        self.scaler = scaler
        self.ema = ema
        self.sources = list(sources)
        self.directory = None if directory is None else Path(directory)
        self.checkpoint_every = checkpoint_every
        self.keep_checkpoints = keep_checkpoints
        self.report_every = report_every
        self.state = TrainingState(root, optimizer)
        self.monitor = monitor if monitor is not None else Monitor(self.directory)
        self.record = Record(self.monitor, self.state)
        followers = {"optimizer": optimizer, "schedulers": tuple(self.schedulers), "scaler": scaler, "ema": ema}
        if example_inputs is None and input_shape is not None:
            example_inputs = inputs_of_shape(root, input_shape)
        self.controller = Controller(
            root,
            ModelSurgeon(example_inputs),
            Guardian(safety if safety is not None else Safety(), root),
            followers,
            taken_up=self.record.requested,
            before_change=self._before_change,
            done=self._done,
        )
        self._watch = None if governor is None else Watch(governor, [optimizer, *self.schedulers, scaler, ema])
        self._average = None if ema is None else Average(root, ema)
        self._save_due = False
        self.update = Update(
            model,
            optimizer,
            lambda batch: self.compute_loss(batch),
            schedulers=self.schedulers,
            scaler=scaler,
            ema=ema,
            autocast=autocast,
            accumulate=accumulate,
            clip_norm=clip_norm,
        )
        self._observing = contextlib.ExitStack()
        self._epochs = Epochs(self.state)
        self._evaluated = -1
        self._inside = self._started = False
        self._trained_by: int | None = None

    # Training

    def fit(
        self,
        data: Batches,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int | None = None,
        progress: bool = False,
    ) -> TrainingState:
        """Train until the run has made ``steps`` steps or ``epochs`` epochs in all, what was done before a resumption included.

        Args:
            data: an iterable that gives the batches of an epoch each time, such as a ``DataLoader``; or a function of the epoch's number.
            epochs: of the whole run.
            steps: of the optimizer, of the whole run.
            evaluate: called with the model in evaluation mode, without gradients; its numbers are recorded.
            evaluate_every: steps between evaluations; by default at the end of each epoch.
            progress: whether to show a bar, which needs rich.

        Returns:
            where the run stands.

        Raises:
            TrainingError: there is no optimizer or loss, or nothing says when to end.
        """
        if self.optimizer is None:
            raise TrainingError("Trainer.fit: optimizer: expected one, got None. Give it to the Trainer.")
        if epochs is None and steps is None:
            raise TrainingError("Trainer.fit: expected epochs or steps, got neither.")
        self._begin()
        reason = "interrupted"
        self._trained_by = threading.get_ident()
        try:
            with bar(steps, progress) as advance:
                while (epochs is None or self.state.epoch < epochs) and (steps is None or self.state.step < steps):
                    for batch in self._epochs.left(data):
                        if not self._step(batch):
                            continue
                        self._between_steps(evaluate, evaluate_every)
                        advance(self.state)
                        if self.state.step == steps:
                            break
                    else:
                        self._end_epoch(evaluate if evaluate_every is None else None)
            if evaluate is not None and self._evaluated != self.state.step:
                self._evaluate(evaluate)
            reason = "done"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._inside = False
            self._observing.close()
            self.update.clear()
            self._trained_by = None
            if reason == "done":
                self.controller.drain()  # what was asked for meanwhile is not left waiting
            else:
                self.controller.dismiss(TrainingError(f"Trainer: training ended within a step: {reason}. Ask again."))
            self._emit(RunEnded(self.state.step, time.time(), reason))
            self.monitor.flush()
        return self.state

    def compute_loss(self, batch: Any) -> Tensor:
        """The loss of one batch, ``(inputs, targets)``. Override it for batches or losses of another kind."""
        if self.loss is None:
            raise TrainingError("Trainer.compute_loss: loss: expected loss(outputs, targets), got None. Give it to the Trainer.")
        inputs, targets = batch
        return self.loss(self.model(inputs), targets)

    def _step(self, batch: Any) -> bool:
        """Forward and backward of one batch; the step of the optimizer if the window is full. Returns whether it was."""
        if self.update.empty:
            self._observe()
        self._inside = True
        if not self.update.add(batch):
            return False
        self._observing.close()
        state = self.state
        state.loss, seconds = self.update.step()
        state.step += 1
        state.losses.append(state.loss)
        state.step_seconds.append(seconds)
        self._inside = False
        return True

    def _observe(self) -> None:
        """Observe the step that begins, if a source asks for that."""
        self.state.observed = None
        wanted = {source.observes(self.state) for source in self.sources if hasattr(source, "observes")} - {None}
        if wanted:
            self.state.observed = self._observing.enter_context(growth.observe(self._root, gradmax="gradmax" in wanted))

    # The boundary

    def _between_steps(self, evaluate: Evaluate | None, evaluate_every: int | None) -> None:
        """What happens at the boundary of two steps, where alone the network may change."""
        state, controller = self.state, self.controller
        controller.step, controller.epoch = state.step, state.epoch
        if self._watch is not None:
            self._govern(self._watch)
        for source in self.sources:
            for decision in source.decisions(state):
                controller.submit(decision, source=name_of(source))
        if not controller.idle:
            controller.drain()
        self.record.stepped()
        if state.step % self.report_every == 0:
            self.record.progress(self.report_every)
        if evaluate is not None and evaluate_every is not None and state.step % evaluate_every == 0:
            self._evaluate(evaluate)
        if self.checkpoint_every is not None:
            self._save_due |= state.step % self.checkpoint_every == 0
            if self._save_due and not (self._watch is not None and self._watch.watching):
                self.save()

    def _evaluate(self, evaluate: Evaluate) -> None:
        """Measure, in evaluation mode, with the random numbers that training goes on with untouched."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), generators_kept():
                metrics = {str(name): float(value) for name, value in evaluate(self.model).items()}
        finally:
            for module, training in modes:
                module.training = training
        self._evaluated = self.state.step
        self.state.metrics = metrics
        self._emit(Evaluated(self.state.step, time.time(), metrics))

    def _govern(self, watch: Watch) -> None:
        reason = watch.verdict(self.state)
        if reason is None:
            return
        begun = time.perf_counter()
        restored = watch.restore(self.state)
        if restored is None:
            return
        snapshot, request = restored
        self.record.forget()
        self.controller.guardian.recount(self._root)
        if self._average is not None:
            self._average.refresh()
        self._emit(Restored(self.state.step, time.time(), request, snapshot.step, reason, 1e3 * (time.perf_counter() - begun)))

    def _before_change(self, step: Step) -> None:
        if self._watch is None:
            return
        taken = self._watch.before_change(self.state)
        if taken is not None:
            self._emit(SnapshotTaken(self.state.step, time.time(), taken.milliseconds, taken.bytes))

    def _done(self, result: AdaptationResult) -> None:
        if result:
            if self._average is not None:
                self._take_along(self._average, result)
            if self._watch is not None:
                self._watch.changed(self.state, result.request)
        self.record.done(result)
        for source in self.sources:
            if hasattr(source, "outcome"):
                source.outcome(result)

    def _take_along(self, average: Average, result: AdaptationResult) -> None:
        """Have the average of the weights follow what metadata did; surgery has taken it along, and new parameters are looked up."""
        if result.mechanism == "surgery":
            average.refresh()
            return
        average.follow_widths()
        if any(decision.adaptation_type in ("grow", "prune") for decision in result.decisions):
            average.take_buffers()

    # Decisions

    def request(self, decision: Any, *, source: str = "") -> Future[AdaptationResult]:
        """Ask for a change at the next boundary, from any thread; see :meth:`Controller.submit`."""
        return self.controller.submit(decision, source=source)

    def preflight(self, decision: Any) -> Verdict:
        """Whether a decision would be allowed now, and the limit that decides; nothing changes."""
        return self.controller.preflight(decision)

    def apply_architecture_modification(self, model: nn.Module, decision: Any) -> AdaptationResult:
        """Carry out a decision on ``model``: the trainer's own, or any other, which then has no optimizer that follows.

        Between two steps it is done now. While another thread trains, it is asked for, and waited for until the next boundary.

        Returns:
            a truthy or falsy result, which is recorded. Nothing is raised for a decision that fails, and the model is as it was then.
            Within a step, in the thread that trains, every decision fails.
        """
        if unwrapped(model) is not self._root:
            return self._controller_of(unwrapped(model)).apply(decision)
        if self._trained_by not in (None, threading.get_ident()):
            return self._wait_for(decision)
        if self._inside:
            return self.controller.refuse(decision, TrainingError("Trainer: a step is under way. Ask for the next boundary: request(...)."))
        self.controller.step, self.controller.epoch = self.state.step, self.state.epoch
        return self.controller.apply(decision)

    async def _apply_architecture_modification(self, model: nn.Module, decision: Any) -> AdaptationResult:
        """:meth:`apply_architecture_modification` for asynchronous callers, which do not block while another thread trains."""
        if unwrapped(model) is self._root and self._trained_by not in (None, threading.get_ident()):
            return await asyncio.to_thread(self._wait_for, decision)
        return self.apply_architecture_modification(model, decision)

    def _wait_for(self, decision: Any) -> AdaptationResult:
        """Have a decision carried out by the thread that trains; refused, if that ends before it has come to it."""
        asked = self.request(decision)
        while True:
            try:
                return asked.result(timeout=0.1)
            except TimeoutError:
                if self._trained_by is None and asked.cancel():
                    return self.controller.refuse(decision, TrainingError("Trainer: training ended before the next boundary. Ask again."))

    def _controller_of(self, model: nn.Module) -> Controller:
        """One for a model that this trainer does not train, which may take other inputs."""
        guardian, inputs = Guardian(self.controller.guardian.limits, model), self.controller.surgeon.example_inputs
        surgeon = self.controller.surgeon if inputs is None or runs_on(model, inputs) else ModelSurgeon()
        return Controller(model, surgeon, guardian, taken_up=self.record.requested, done=self.record.done)

    def _end_epoch(self, evaluate: Evaluate | None) -> None:
        if evaluate is not None:
            self._evaluate(evaluate)
        self.state.epoch, self.state.batch = self.state.epoch + 1, 0

    # Checkpoints

    def save(self) -> Path:
        """Write a checkpoint of the run into its directory, between two steps.

        Effects: what a governor was watching is let go, and its snapshot with it, so that the run goes on as one that is resumed does.

        Returns:
            the checkpoint's folder.

        Raises:
            TrainingError: the run has no directory, or a step is under way.
            CheckpointError: it could not be written; older ones are as they were.
        """
        if self.directory is None or self._inside:
            raise TrainingError("Trainer.save: expected a run with a directory, between two steps. Give directory= to the Trainer.")
        begun = time.perf_counter()
        self._save_due = False
        if self._watch is not None:
            self._watch.forget()
        content, tensors = resumption.content_of(self)
        modules = {"model": self.model, "optimizer": self.optimizer}
        path = checkpoints.write(self.directory, self.state.step, modules, content, tensors, self.keep_checkpoints)
        self._emit(Saved(self.state.step, time.time(), path.name, 1e3 * (time.perf_counter() - begun)))
        self.monitor.flush()
        return path

    def resume(self, path: str | os.PathLike[str] | None = None, *, modules: Mapping[str, nn.Module] | None = None) -> bool:
        """Go on from a checkpoint, as if the run had never stopped: call it before :meth:`fit`, on a trainer made as the first one was.

        Args:
            path: of a checkpoint; by default the newest in the run's directory.
            modules: for edits that inserted what no :class:`LayerSpec` describes, as in :func:`esper_elastic.load`.

        Returns:
            whether there was one.

        Raises:
            CheckpointError: it does not fit this trainer.
        """
        found = Path(path) if path is not None else None if self.directory is None else checkpoints.latest(self.directory)
        if found is None:
            return False
        resumption.resume(self, found, modules)
        self._started = True
        if self._average is not None:
            self._average.refresh()
        self._emit(Resumed(self.state.step, time.time(), found.name))
        return True

    def parts(self) -> dict[str, Any]:
        """What of the run has a state of its own, by name."""
        parts: dict[str, Any] = {
            "state": self.state,
            "guardian": self.controller.guardian,
            "controller": self.controller,
            "record": self.record,
            "epochs": self._epochs,
            "monitor": self.monitor,
        }
        if self._watch is not None:
            parts["governor"] = self._watch
        if self.scaler is not None:
            parts["scaler"] = self.scaler
        for kind, several in (("scheduler", self.schedulers), ("source", self.sources)):
            parts |= {f"{kind}:{number}": part for number, part in enumerate(several) if hasattr(part, "state_dict")}
        return parts

    # Beginning and telling

    def _begin(self) -> None:
        for entry in (*known(self._root)[0].values(), *(block.switch for block in known(self._root)[1].values())):
            if entry.block.owner != threading.get_ident():
                entry.block.adopt()
        self._evaluated = -1
        if self._started:
            return
        self._started = True
        limits = {name: value for name, value in vars(self.controller.guardian.limits).items() if name != "allowed"}
        optimizer, sources = type(self.optimizer).__name__, [name_of(source) for source in self.sources]
        self.record.started({"accumulate": self.update.accumulate, "optimizer": optimizer, "sources": sources, "safety": limits})

    def _emit(self, event: Event) -> None:
        self.monitor.emit(event)
