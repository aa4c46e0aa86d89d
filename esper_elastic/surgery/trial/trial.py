"""Trial runs: whether a model, or a part of it, still runs on what it was last called with, without computing anything.

A part whose results have the same specs as before is closed: the rest of the model cannot notice what happened inside. So an edit is tried
on the smallest module around it that is closed, and the calls known of the model follow without a run of the whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from ...errors import SurgeryError
from .calls import Calls, CallSpec, Failure, TensorSpec, spec_of
from .inputs import known_inputs
from .memory import memory_of, stamp_of
from .recording import attempt, record
from .twins import unwrapped

__all__ = ["CallSpec", "Calls", "Failure", "Outcome", "TensorSpec", "calls_of", "record", "smallest_closed", "trial"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial went; true if the module ran.

    Attributes:
        path: of the module that was tried.
        ok: whether it ran.
        same: whether its results have the specs that they had before.
        decided: whether the trial says anything: nothing is known where no input is, or where code decides by the values of tensors.
        failure: why it did not run, if something failed.
        error: the same in words, or what changed in the results; ``""`` if nothing did.
        calls: those of the whole model as it is now, where the trial tells.
    """

    path: str
    ok: bool
    same: bool
    decided: bool
    failure: Failure | None = None
    error: str = ""
    calls: Calls | None = dataclasses.field(default=None, repr=False)
    _parts: tuple[Calls, ...] = dataclasses.field(default=(), repr=False)

    def __bool__(self) -> bool:
        return self.ok


def calls_of(model: nn.Module, given: Any = None) -> Calls | None:
    """The calls of ``model`` on the inputs known of it, remembered for as long as its structure stays as it is.

    Args:
        model: any module.
        given: example inputs, where others than those recorded or derived are wanted.

    Returns:
        the calls, or ``None`` where no input is known or the model does not run on it.
    """
    return look(model, given)[0]


def look(model: nn.Module, given: Any = None) -> tuple[Calls | None, Failure | None]:
    """The calls of ``model``, or why it failed; neither where no input is known."""
    model = unwrapped(model)
    inputs = known_inputs(model, given)
    if inputs is None:
        return None, None
    memory, stamp, key = memory_of(model), stamp_of(model), _key(inputs)
    memory.seen.update(model.modules())
    known = memory.calls(stamp, key)
    if known is not None:
        return known, None
    calls, failure = attempt(model, *inputs)
    if calls is not None:
        memory.keep_calls(stamp, key, calls)
    return calls, failure


def trial(model: nn.Module, path: str = "", calls: Calls | None = None) -> Outcome:
    """Run the module at ``path`` on tensors without values, on the specs that it was last called with.

    Args:
        model: the whole model.
        path: of the module to run, in the modes that it and what is below it are in.
        calls: what was known before it changed; by default the calls known of the model.

    Effects:
        None on the model.
    """
    model = unwrapped(model)
    if calls is None:
        calls, failure = look(model)
        if calls is None:
            return (
                _failed("", failure) if failure is not None else Outcome(path, False, False, False, error="no input of the model is known")
            )
    path = calls.canonical(path)
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise SurgeryError(f"trial: {type(model).__name__} has no module {path!r}: {error}.") from error
    before = calls.of(path)
    if not before:
        return Outcome(path, False, False, False, error=f"{path or 'the model'}: no forward called it")
    parts: list[Calls] = []
    difference = ""
    tried: list[tuple[Any, Calls]] = []
    for call in before:
        part = next((known for specs, known in tried if specs == (call.args, call.kwargs)), None)
        if part is None:
            inputs: Any = (call.args, call.kwargs) if call.repeatable else None if path else known_inputs(model)
            if inputs is None:
                return Outcome(
                    path, False, False, False, error=f"{path or 'the model'}: called with an object whose contents are not known"
                )
            part, failure = attempt(module, *inputs, within=(model, path))
            if part is None:
                return _failed(path, failure)
            tried.append(((call.args, call.kwargs), part))
        parts.append(part)
        now = part.of(path)[-1].result
        if now != call.result:
            difference = difference or f"{path or 'the model'}: gives {_words(now)}, gave {_words(call.result)}"
    return Outcome(path, True, not difference, True, error=difference, _parts=tuple(parts))


def smallest_closed(model: nn.Module, path: str, calls: Calls | None = None) -> Outcome:
    """Try the smallest module around ``path`` whose results are what they were, or else the whole model.

    Args:
        model: whose modules changed nowhere but below ``path`` since ``calls`` were taken.
        path: of the module that holds all that changed.
        calls: what was known before; by default the calls known of the model.

    Returns:
        the outcome of the last trial. If it is true, the calls known of the model are those of its present structure.
    """
    model = unwrapped(model)
    if calls is None:
        return trial(model, "")
    where = path
    while where in calls.open:  # what runs alone would not get what it is brought
        where = where.rpartition(".")[0]
    while True:
        outcome = trial(model, where, calls)
        if where and outcome.failure is not None:
            where = ""  # what is called may be called otherwise now: the whole model has the last word
            continue
        if outcome.ok and (outcome.same or not where):
            return dataclasses.replace(outcome, calls=_remember(model, outcome, calls))
        if not where:
            return outcome
        where = where.rpartition(".")[0]


def _remember(model: nn.Module, outcome: Outcome, calls: Calls) -> Calls:
    calls = calls.with_parts(outcome.path, list(outcome._parts)) if outcome.path else outcome._parts[0]
    memory_of(model).keep_calls(stamp_of(model), _key((calls.args, calls.kwargs)), calls)
    return calls


def _failed(path: str, failure: Failure | None) -> Outcome:
    decided = failure is None or failure.decided
    return Outcome(path, False, False, decided, failure, str(failure))


def _key(inputs: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf if isinstance(leaf, TensorSpec) else spec_of(leaf), inputs)


def _words(result: Any) -> str:
    leaves = [str(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, TensorSpec)]
    return ", ".join(leaves[:4]) + (", ..." if len(leaves) > 4 else "") if leaves else repr(result)
