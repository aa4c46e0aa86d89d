"""``transaction``: edits that succeed or vanish together, with everything that hangs on the model.

A transaction notes what there is, at its start, in an :class:`~esper_elastic.surgery.undo.UndoLog`. How it ends is the business of
:class:`contextlib.ExitStack`: it publishes, which is ours and may fail, and then unwinds the log, which is built in and finds it empty if
publishing came to its last line. So there is no line of this package at which an exception leaves a model half edited.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import TransactionError
from ..model import forgetting
from .edits.holder import emptying
from .following import Following, join_waiting
from .surroundings import hooks_of_all_modules, surroundings
from .trial.twins import unwrapped
from .undo import UndoLog, Write, open_here, open_transactions
from .validators import SurgeryValidator

#: How many failing calls a rollback passes over without running a line of this package.
_PASSES = 8


def transaction(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    schedulers: Any = (),
    scaler: Any = None,
    ema: Any = None,
    validate: bool = True,
    example_inputs: Any = None,
) -> Transaction:
    """A context in which edits of ``model`` succeed or vanish together.

    Any exception inside, or in what happens at the end, is re-raised, with everything as it was at the start: structure, classes, the
    order of modules, parameters, buffers, gradients, hooks, optimizers with groups and state, schedulers, scaler, EMA, control block, and
    the random generators of this process. The next steps are bit for bit those of a model that was never touched.

    Inside another transaction of the same thread it is a savepoint: it undoes its own changes alone, goes along with what was given to the
    outer one on the same model, and vanishes with that one. The outermost one on a model validates.

    Args:
        model: that is edited.
        optimizer: one or several, that step its parameters. Without, those that are known to have stepped them.
        schedulers: one or several, of learning rates.
        scaler: of gradients.
        ema: an average of the weights: a module such as ``AveragedModel``, a dict of tensors by name, or an object that holds one.
        validate: check graph, dimensions and optimizer groups at the end.
        example_inputs: for the trial run of the check: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Effects:
        Notes references, at a cost by the number of modules and tensors; copies values only of what is written in place. Parameters that
        entered or left the model enter or leave optimizer groups and EMA. A transaction covers edits: an optimizer that holds parameters
        of the model cannot step inside.

    Raises:
        TransactionError: an argument is of the wrong kind; at the end, the model is not valid, or could not be put back.
    """
    if not isinstance(model, nn.Module):
        raise TransactionError(f"transaction: model: expected a torch.nn.Module, got {type(model).__name__}.")
    model = unwrapped(model)
    optimizers = _several(optimizer)
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise TransactionError(
                f"transaction: optimizer: expected a torch.optim.Optimizer or a list of them, got {type(each).__name__}."
            )
    scheduled = _several(schedulers)
    for each in scheduled:
        if not (hasattr(each, "step") and hasattr(each, "__dict__")) or isinstance(each, Optimizer | nn.Module):
            raise TransactionError(f"transaction: schedulers: expected schedulers of the learning rate, got {type(each).__name__}.")
    if scaler is not None and not (hasattr(scaler, "scale") and hasattr(scaler, "update")):
        raise TransactionError(f"transaction: scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}.")
    return Transaction(model, optimizers, scheduled, scaler, ema, validate, example_inputs)


def twins(model: nn.Module) -> list[nn.Module]:
    """Modules that an open transaction of this thread holds as averages of ``model``, built like it: edits are repeated on them."""
    return next((list(each._following.twins) for each in open_here() if isinstance(each, Transaction) and each.model is model), [])


class Transaction(contextlib.ExitStack, contextlib.ContextDecorator):
    """See :func:`transaction`, which makes it. It is entered once.

    ``Transaction(...)(function)(...)`` calls a function inside. A ``with`` in this package would not do: whatever is raised again at each
    of its lines is raised before the ``with`` comes to its end, and nothing would be undone.

    Attributes:
        model: that is edited.
        log: what undoes it.
        thread: that entered it.
        warnings: what the validators said without objecting, once it has ended.
    """

    log: UndoLog
    thread: int

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        schedulers: list[Any],
        scaler: Any,
        ema: Any,
        validate: bool,
        example_inputs: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.warnings: list[str] = []
        self._given = (optimizers, schedulers, scaler, ema)
        self._validate = validate
        self._example_inputs = example_inputs
        self._entered = False
        self._outermost = True
        self._following: Following

    def __enter__(self) -> Self:
        if self._entered:
            raise TransactionError("transaction: it was entered before. Call transaction(...) again for another one.")
        self._require_usable()
        self._entered = True
        self.log, self.thread = UndoLog(), threading.get_ident()
        outside = open_here()
        optimizers, schedulers, scaler, ema = self._given
        outer = next((each for each in reversed(outside) if isinstance(each, Transaction) and each.model is self.model), None)
        self._outermost = outer is None
        self._following = Following(self.model, optimizers, ema) if outer is None else outer._following
        things = [self.model, *optimizers, *schedulers, *(each for each in (scaler, ema) if each is not None)]
        for log in (*(each.log for each in outside), self.log):
            log.add(*forgetting(self.model))
            log.record(self._following, *things)
            log.save_values(*_numbers(self._following.optimizers, schedulers, scaler))
            log.record(*hooks_of_all_modules())
        if outer is not None and (optimizers or ema is not None):
            self._following.add(optimizers, ema)
        self.log.record_random_numbers()
        self.log.add(*emptying(self.model))
        self.log.begin_with(*surroundings())  # a mode that is left on would see the calls that put the rest back
        self.log.failed += (
            functools.partial(nn.Module.register_forward_pre_hook, self.model, _refuse_use),
            functools.partial(self.push, self._say_that_rollback_failed),
        )
        # What runs last is pushed first. From `unwind` on all of it is built in.
        if outer is None:
            self.callback(vars(self._following).clear)
        self.callback(self.log._known.clear)
        self.callback(open_transactions.remove, self)
        self.callback(self.log.despair)
        for _ in range(_PASSES):
            self.callback(self.log.go_on)
        self.callback(self.log.unwind)
        self.push(self._publish)
        return open_transactions.append(self) or self  # type: ignore[func-returns-value]  # no line is between it and the body

    def _publish(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Make the edits definite: the log is dropped by the last statement, and whatever is raised before it is undone with the edits."""
        if kind is not None:
            return
        if threading.get_ident() != self.thread:
            raise TransactionError("transaction: it was entered by another thread, and ends where it began. Nothing has changed.")
        if open_here()[-1] is not self:
            raise TransactionError("transaction: another one that was entered inside is still open. End that first. Nothing has changed.")
        if self._outermost:
            self._following.settle()
            if self._validate:
                self._require_valid()
        for call in emptying(self.model):
            call()
        self.log.forget()

    def _require_valid(self) -> None:
        validator = SurgeryValidator(self._example_inputs)
        errors = self._following.wrong_groups()
        for check in (validator.validate_graph_integrity, validator.validate_dimension_compatibility):
            result = check(self.model)
            self.warnings += result.warnings
            if not result.is_valid:
                errors += result.errors
        if errors:
            raise TransactionError(
                f"transaction: {type(self.model).__name__} would not be valid, and is as it was before: {'; '.join(map(str, errors))}."
            )

    def settle(self) -> None:
        """Bring optimizers and averages in line with the model now; else it is done at the end."""
        self._following.settle()

    # Reports

    def added(self, parameter: Tensor, near: Tensor | None) -> None:
        self._following.added(parameter, near)

    def removed(self, parameter: Tensor) -> None:
        self._following.removed(parameter)

    def moved(self, parameter: Tensor, shape: tuple[int, ...], write: Write) -> None:
        self._following.moved(parameter, shape, write)

    def rewritten(self, parameter: Tensor) -> None:
        self._following.rewritten(parameter)

    # Misuse and failure

    def _covers(self, optimizer: Optimizer) -> bool:
        """Whether a step of ``optimizer`` would write to what the transaction is to put back."""
        own = {id(parameter) for parameter in self.model.parameters()}
        return optimizer in self.log or any(
            parameter in self.log or id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]
        )

    def _require_usable(self) -> None:
        if any(hook is _refuse_use for hook in self.model._forward_pre_hooks.values()):
            _refuse_use(self.model, ())
        here = threading.get_ident()
        for each in list(open_transactions):
            if each.thread != here and (self.model in each.log or any(module is each.model for module in self.model.modules())):  # type: ignore[attr-defined]
                raise TransactionError(
                    f"transaction: {type(self.model).__name__} is being edited by another thread, in a transaction that is still open. "
                    "Wait for its end."
                )

    def _say_that_rollback_failed(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        raise TransactionError(
            f"transaction: {type(self.model).__name__} could not be put back as it was: {type(error).__name__}: {error}. Its parts may not "
            "fit each other any more: build it anew and load a checkpoint."
        ) from error


def _refuse_use(module: nn.Module, args: Any) -> None:
    """A forward pre-hook of models that a rollback left in an unknown state."""
    raise TransactionError(
        f"transaction: {type(module).__name__} cannot be used: a transaction on it failed and it could not be put back as it was. "
        "Build it anew and load a checkpoint."
    )


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before each step of any optimizer: a transaction covers edits, not training; what was edited before may have to join."""
    for each in list(open_transactions):
        if isinstance(each, Transaction) and each._covers(optimizer):
            raise TransactionError(
                f"transaction: {type(optimizer).__name__}.step() inside a transaction on {type(each.model).__name__}: expected edits "
                "alone, since a step is not undone. Step after the transaction."
            )
    join_waiting(optimizer)


register_optimizer_step_pre_hook(_before_step)


def _several(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple | set | frozenset) else [given]


def _numbers(optimizers: list[Optimizer], schedulers: list[Any], scaler: Any) -> list[Tensor]:
    """Learning rates, scales and the like that are kept as tensors: whoever sets them writes in place."""
    values = [value for optimizer in optimizers for group in optimizer.param_groups for value in group.values()]
    values += [value for each in (*schedulers, scaler) if each is not None for value in getattr(each, "__dict__", {}).values()]
    return [value for value in values if isinstance(value, Tensor)]
