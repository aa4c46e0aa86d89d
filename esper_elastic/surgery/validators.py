"""``SurgeryValidator``: what can be wrong with a model after surgery, said in sentences rather than raised.

Validators judge and touch nothing: neither tensors, buffers, modes and gradients nor random generators, also when they are interrupted.
What needs an input is a warning where none is known.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .. import followers
from ..errors import SurgeryError
from . import integrity
from .gradients import gradient_errors
from .trial.calls import Calls
from .trial.inputs import known_inputs
from .trial.memory import memory_of
from .trial.trial import look
from .trial.twins import unwrapped


@dataclasses.dataclass(frozen=True)
class ValidationResult:
    """What a validator found. True if the model is valid; prints as lines.

    Attributes:
        is_valid: whether there are no errors.
        errors: what is wrong.
        warnings: what may be, or could not be looked at.
    """

    is_valid: bool
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.is_valid

    def __str__(self) -> str:
        lines = [*(f"error: {error}" for error in self.errors), *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(["valid" if self.is_valid else "invalid", *lines])


class SurgeryValidator:
    """Checks of a whole model.

    Args:
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments. Left out, they are those that
            ``elasticize`` recorded, or small ones derived from the first layer.
    """

    def __init__(self, example_inputs: Any = None) -> None:
        self.example_inputs = example_inputs

    def validate_graph_integrity(self, model: nn.Module) -> ValidationResult:
        """Whether modules and tensors hang together.

        Errors: a cycle, a child or tensor of the wrong kind, a module registered twice under one parent or referred to after its removal,
        a tensor without values among others, shapes that attributes contradict, parameters that share memory, a ``state_dict`` that the
        model itself would not load. Warnings: modules that no forward calls, new ties, modules that are used but not registered.

        Effects:
            None on the model; nothing is copied.

        Raises:
            SurgeryError: ``model`` is no module.
        """
        model = _require_module(model, "validate_graph_integrity")
        broken = integrity.guarded(integrity.tree_errors, model)
        if broken:  # what follows walks the tree
            return _result(broken, [])
        memory = memory_of(model)
        checks = (integrity.tensor_errors, integrity.size_errors, integrity.storage_errors, integrity.state_errors)
        errors = [sentence for check in checks for sentence in integrity.guarded(check, model)]
        stale = [
            entry if isinstance(entry, tuple) else (True, entry) for entry in integrity.guarded(integrity.stale_modules, model, memory)
        ]
        errors += [sentence for removed, sentence in stale if removed]
        notes = [sentence for removed, sentence in stale if not removed]
        notes += integrity.guarded(integrity.tie_warnings, model, memory)
        calls = None if errors else self._look(model)[0]
        if calls is not None:
            notes += integrity.guarded(integrity.uncalled_warnings, model, calls)
        memory.seen.update(model.modules())
        return _result(errors, notes)

    def validate_dimension_compatibility(self, model: nn.Module) -> ValidationResult:
        """Whether the model runs on the inputs known of it, tried on tensors without values.

        The error names the first op that disagrees, the module that called it, and the shapes that it was given. Where no input is known,
        or code decides by the values of tensors, there is a warning.

        Effects:
            None on the model; nothing is computed.

        Raises:
            SurgeryError: ``model`` is no module.
        """
        model = _require_module(model, "validate_dimension_compatibility")
        _, error, note = self._look(model)
        return _result([error] if error else [], [note] if note else [])

    def validate_gradient_flow(self, model: nn.Module, optimizer: Optimizer | None = None) -> ValidationResult:
        """Whether each trainable parameter that the forward uses gets a finite gradient, in proportion, and has one optimizer group.

        Args:
            model: in the modes that it is to be trained in.
            optimizer: that steps it; by default those that are known to hold its parameters, if any.

        Effects:
            None on the model. A copy of its tensors makes a forward and backward pass on a batch of four at most.

        Raises:
            SurgeryError: ``model`` is no module.
        """
        inner = _require_module(model, "validate_gradient_flow")
        try:
            errors, notes = _membership(inner, optimizer)
        except Exception as failure:
            return _result([f"the optimizer's groups could not be looked at: {type(failure).__name__}: {failure}"], [])
        calls, error, note = self._look(inner)
        if error:
            return _result([*errors, error], notes)
        try:
            inputs = known_inputs(inner, self.example_inputs)
            if inputs is None:
                return _result(errors, [*notes, note])
            if any(tensor.is_meta for tensor in (*inner.parameters(), *inner.buffers())):
                return _result(errors, [*notes, "the model is on the meta device: its gradients were not looked at."])
            wrong, more = gradient_errors(inner, inputs, calls)
        except Exception as failure:
            wrong, more = [f"the gradients could not be looked at: {type(failure).__name__}: {failure}"], []
        return _result(errors + wrong, notes + more)

    def _look(self, model: nn.Module) -> tuple[Calls | None, str, str]:
        """The calls of a model, or an error, or a warning."""
        try:
            calls, failure = look(model, self.example_inputs)
        except Exception as error:
            return None, f"the trial run could not be made: {type(error).__name__}: {error}", ""
        if calls is not None:
            return calls, "", ""
        if failure is None:
            return None, "", "no input of the model is known: it was not tried. Pass example_inputs."
        return (None, f"{failure}.", "") if failure.decided else (None, "", f"could not be tried: {failure}.")


def _membership(model: nn.Module, optimizer: Optimizer | None) -> tuple[list[str], list[str]]:
    """Trainable parameters that are in no group of the optimizer, or in several; entries of it that the model has not."""
    trainable = {id(p): name for name, p in model.named_parameters() if isinstance(p, Tensor) and p.requires_grad}
    optimizers = [optimizer] if optimizer is not None else followers.known_optimizers(list(model.parameters()))
    errors: list[str] = []
    notes: list[str] = []
    if not optimizers:
        return errors, notes
    counts: dict[int, int] = {}
    strangers = 0
    known = {id(p) for p in model.parameters()}
    for each in optimizers:
        for group in each.param_groups:
            for parameter in group["params"]:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
                strangers += id(parameter) not in known
    for key, name in trainable.items():
        count = counts.get(key, 0)
        if count == 0:
            errors.append(f"{name}: trainable, but in no group of the optimizer: it would never be stepped. Add it to an existing group.")
        elif count > 1:
            errors.append(f"{name}: in {count} places of the optimizer's groups: it would be stepped {count} times. Leave it in one.")
    if strangers and optimizer is not None:
        notes.append(f"the optimizer holds {strangers} parameter{'s' if strangers > 1 else ''} that the model has not.")
    return errors, notes


def _require_module(model: Any, where: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"{where}: model: expected an nn.Module, got {type(model).__name__}.")
    return unwrapped(model)


def _result(errors: list[str], notes: list[str]) -> ValidationResult:
    return ValidationResult(not errors, tuple(errors), tuple(note for note in notes if note))
