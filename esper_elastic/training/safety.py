"""What a run allows: thresholds, rates, sizes. Asked before a decision is carried out, answered without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import DecisionError
from ..summary import parameters_in_use
from .cost import staged
from .decisions import TOPOLOGY, TYPES, AdaptationDecision
from .mechanisms import Step

#: A model may always grow to this many parameters, and otherwise to this many times those that it began with.
ALWAYS, TIMES = 2**27, 8


@dataclasses.dataclass(frozen=True)
class Safety:
    """Limits of a run. The defaults keep out what cannot be meant; narrow them for runs that nobody watches.

    Args:
        additions_per_epoch: how often in an epoch capacity may be added: by grow, enable, resize upwards, a layer or a skip. Of several
            decisions in one request each counts.
        removals_per_epoch: how often it may be taken away.
        cooldown_steps: training steps between one change and the next; those of one decision count as one.
        cooldown_of_layer: training steps between two changes of the same dim, block or layer.
        minimum_width: units that every dim keeps.
        max_parameters: parameters that the model may have in use. By default eight times those it began with, or 134 million.
        max_bytes: of memory for parameters, gradients and optimizer state as they are allocated; not limited by default.
        min_confidence: of a decision, from 0 to 1.
        min_urgency: of a decision, from 0 to 1.
        widths_from: the first step at which widths and switches may change.
        topology_from: the first step at which layers and skips may come, go or change.
        allowed: the types of decisions that are heard at all.

    Raises:
        DecisionError: a limit is of another type or out of bounds.
    """

    additions_per_epoch: int | None = None
    removals_per_epoch: int | None = None
    cooldown_steps: int = 0
    cooldown_of_layer: int = 0
    minimum_width: int = 1
    max_parameters: int | None = None
    max_bytes: int | None = None
    min_confidence: float = 0.0
    min_urgency: float = 0.0
    widths_from: int = 0
    topology_from: int = 0
    allowed: frozenset[str] = frozenset(TYPES)

    def __post_init__(self) -> None:
        given: Any = self.allowed
        listed = given if isinstance(given, set | frozenset | list | tuple) else [given]
        unknown = [kind for kind in listed if type(kind) is not str or kind not in TYPES]
        if unknown:
            raise DecisionError(f"Safety: allowed: expected types of decisions ({', '.join(TYPES)}), got {unknown[0]!r}.")
        object.__setattr__(self, "allowed", frozenset(listed))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("min_confidence", "min_urgency"):
                if type(value) not in (int, float) or not 0 <= value <= 1:
                    raise DecisionError(f"Safety: {field.name}: expected a number from 0 to 1, got {value!r}.")
            elif field.name != "allowed" and not (value is None and field.default is None) and (type(value) is not int or value < 0):
                raise DecisionError(f"Safety: {field.name}: expected an integer of at least 0, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a decision may be carried out now; truthy if so.

    Attributes:
        allowed: the verdict.
        factor: the limit that decided it, as ``"cooldown_steps"``; ``""`` where none did.
        reason: in words, with the numbers.
        mechanism: that would serve it, if it is known.
    """

    allowed: bool
    factor: str = ""
    reason: str = ""
    mechanism: str | None = None

    def __bool__(self) -> bool:
        return self.allowed


#: What is allowed, by the mechanism that serves it.
_ALLOWED = {served: Verdict(True, mechanism=served) for served in (None, "metadata", "surgery")}


class Guardian:
    """Keeps account of a run's changes and holds decisions against its limits.

    Attributes:
        limits: of the run.
        active: parameters in use, and
        allocated: parameters that the model held, when they were last counted: at the start, and with each change that allocates.
        most: parameters that it may have in use.
    """

    def __init__(self, limits: Safety, model: nn.Module, state_tensors: int = 2) -> None:
        self.limits = limits
        self.active, self.allocated = count(model)
        self.most = limits.max_parameters if limits.max_parameters is not None else max(ALWAYS, TIMES * self.active)
        self._copies = 2 + state_tensors
        self._item = max((parameter.element_size() for parameter in model.parameters()), default=4)
        self._epoch = 0
        self._additions = self._removals = 0
        self._last: int | None = None
        self._last_of: dict[str, int] = {}

    def judge(self, decision: AdaptationDecision, step: int) -> Verdict:
        """What can be said of a decision without looking at the model."""
        limits, kind = self.limits, decision.adaptation_type
        if kind not in limits.allowed:
            return Verdict(False, "allowed", f"{kind} is not among what this run allows: {', '.join(sorted(limits.allowed)) or 'nothing'}")
        if decision.confidence < limits.min_confidence:
            return Verdict(False, "min_confidence", f"confidence {decision.confidence:.3g} is below {limits.min_confidence:.3g}")
        if decision.urgency < limits.min_urgency:
            return Verdict(False, "min_urgency", f"urgency {decision.urgency:.3g} is below {limits.min_urgency:.3g}")
        first = limits.topology_from if kind in TOPOLOGY else limits.widths_from
        if step < first:
            return Verdict(
                False, "topology_from" if kind in TOPOLOGY else "widths_from", f"{kind} opens at step {first}, and this is step {step}"
            )
        if self._last is not None and step - self._last < limits.cooldown_steps:
            return Verdict(False, "cooldown_steps", f"{step - self._last} of {limits.cooldown_steps} steps since the last change")
        return _ALLOWED[None]

    def weigh(self, step_: Step, model: nn.Module, step: int, epoch: int, before: Sequence[Step] = ()) -> Verdict:
        """What can be said of a step: rates, minimum and sizes. Counts in Python integers, before anything is allocated.

        Args:
            step_: to be weighed.
            model: as it is now; what an open batch has staged counts as done.
            step: of training.
            epoch: of training.
            before: the steps of the same request that are done.
        """
        limits, served = self.limits, step_.mechanism
        last = self._last_of.get(step_.name)
        if last is not None and step - last < limits.cooldown_of_layer:
            return Verdict(
                False, "cooldown_of_layer", f"{step - last} of {limits.cooldown_of_layer} steps since {step_.name} changed", served
            )
        self._begin(epoch)
        for sign, name, done in ((1, "additions_per_epoch", self._additions), (-1, "removals_per_epoch", self._removals)):
            most = getattr(limits, name)
            if step_.direction == sign and most is not None:
                done += sum(each.direction == sign for each in before)
                if done >= most:
                    return Verdict(False, name, f"{done} of {most} in epoch {epoch}", served)
        if step_.direction < 0 and step_.width is not None and step_.width < limits.minimum_width:
            return Verdict(
                False, "minimum_width", f"{step_.name} would have {step_.width} units, of at least {limits.minimum_width}", served
            )
        if step_.direction > 0 and not (served == "metadata" and self.roomy):
            self.recount(model)
            return self._fits(*step_.cost(), served)
        return _ALLOWED[served]

    @property
    def roomy(self) -> bool:
        """Whether the model may use all that it holds, so that no width can be too large."""
        return self.allocated <= self.most

    def _fits(self, active: int, allocated: int, served: str | None) -> Verdict:
        if active > 0 and self.active + active > self.most:
            return Verdict(False, "max_parameters", f"{self.active:,} and {active:,} parameters in use, of at most {self.most:,}", served)
        most = self.limits.max_bytes
        if most is not None and allocated > 0:
            wanted = (self.allocated + allocated) * self._item * self._copies
            if wanted > most:
                return Verdict(
                    False, "max_bytes", f"{wanted:,} bytes for parameters, gradients and optimizer state, of at most {most:,}", served
                )
        return Verdict(True, mechanism=served)

    def recount(self, model: nn.Module) -> None:
        """Count a model as it is now."""
        self.active, self.allocated = count(model)

    def check(self, model: nn.Module) -> Verdict:
        """Hold a model as surgery has left it against the limits of size; what was counted before it is what it began with."""
        active, allocated = count(model)
        verdict = self._fits(active - self.active, allocated - self.allocated, "surgery")
        if verdict:
            self.active, self.allocated = active, allocated
        return verdict

    def note(self, steps: list[Step], step: int, epoch: int) -> None:
        """Take account of a change that was made."""
        self._begin(epoch)
        self._last = step
        for each in steps:
            self._last_of[each.name] = step
        self._additions += sum(each.direction > 0 for each in steps)
        self._removals += sum(each.direction < 0 for each in steps)

    def _begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._epoch, self._additions, self._removals = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What it keeps account of, as JSON-able data."""
        return {
            "active": self.active,
            "allocated": self.allocated,
            "most": self.most,
            "epoch": self._epoch,
            "additions": self._additions,
            "removals": self._removals,
            "last": self._last,
            "last_of": dict(self._last_of),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.active, self.allocated, self.most = state["active"], state["allocated"], state["most"]
        self._epoch, self._additions, self._removals = state["epoch"], state["additions"], state["removals"]
        self._last, self._last_of = state["last"], dict(state["last_of"])


def count(model: nn.Module) -> tuple[int, int]:
    """The parameters of ``model`` in use, as an open batch will leave them, and those that it holds."""
    return parameters_in_use(model, staged), sum(parameter.numel() for parameter in model.parameters())
