"""``ModelSurgeon``: edits of a live model's structure, each of which succeeds as a whole or leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import ElasticError, SurgeryError
from .compiled import forget_compiled, plain_path
from .edits import joining
from .edits.edit import Edit
from .edits.insert import add_layer
from .edits.modify import modify_layer
from .edits.remove import remove_layer
from .edits.skip import add_skip_connection, remove_skip_connection
from .journal import FORMAT, describe, layer_of, record
from .specs.specs import LayerSpec
from .transaction import transaction, twins
from .trial.twins import unwrapped

_Body = Callable[[Edit], None]


@dataclasses.dataclass(frozen=True)
class SurgeryResult:
    """What became of an edit; truthy if it was made.

    Attributes:
        success: whether the model has changed.
        operation: name of the method.
        details: ``"name"``, the path of what was made or changed; ``"steps"``, what was done; ``"function_kept"``, whether the network
            computes what it did (in evaluation, up to rounding); ``"warnings"``, what could not be checked.
        duration_ms: how long it took.
        error: why it was refused.
    """

    success: bool
    operation: str
    details: dict[str, Any]
    duration_ms: float
    error: SurgeryError | ElasticError | None = None

    def __bool__(self) -> bool:
        return self.success

    def __str__(self) -> str:
        if not self.success:
            return f"{self.operation}: refused: {self.error}"
        return "\n".join([f"{self.operation}: {self.details['name']} ({self.duration_ms:.1f} ms)", *_lines(self.details)])


@dataclasses.dataclass(frozen=True)
class EditPlan:
    """What an edit would do; prints itself.

    Attributes:
        operation: name of the method that would do it.
        arguments: its arguments.
        possible: whether it would succeed.
        details: as of :class:`SurgeryResult`.
        error: why it would be refused.
    """

    operation: str
    arguments: dict[str, Any]
    possible: bool
    details: dict[str, Any]
    error: SurgeryError | ElasticError | None = None

    def __bool__(self) -> bool:
        return self.possible

    def __str__(self) -> str:
        spelled = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        if not self.possible:
            return f"{self.operation}({spelled}) would be refused: {self.error}"
        return "\n".join([f"{self.operation}({spelled}) would make {self.details['name']}:", *_lines(self.details)])


def _lines(details: Mapping[str, Any]) -> list[str]:
    kept = "kept" if details.get("function_kept") else "changed"
    lines = [*(f"  {step}" for step in details.get("steps", ())), f"  function {kept}"]
    return lines + [f"  warning: {warning}" for warning in details.get("warnings", ())]


class _Planned(Exception):
    """Ends an edit that was only planned: its transaction undoes it."""


class ModelSurgeon:
    """Edits the structure of live models, plain and elastic ones.

    Each method edits the model in place, in a transaction of its own (see :func:`esper_elastic.transaction`; inside of one that is open on
    the model, as part of it), and returns a :class:`SurgeryResult`. A refusal is falsy, says why, and leaves the model as it was. Modules,
    parameters and optimizer state that are kept stay the objects that they were; no existing key of ``state_dict`` shifts. To every
    method ``x`` belongs ``plan_x``, which returns what it would do.

    Args:
        example_inputs: of the models that are edited: a tensor, a tuple of arguments or a dict of keyword arguments. Without, those that
            :func:`esper_elastic.elasticize` was given, else inputs derived from the model's first layer; where none are known, edits are
            made without a trial, and say so in a warning.
    """

    def __init__(self, example_inputs: Any = None) -> None:
        self.example_inputs = example_inputs

    def add_layer(self, model: nn.Module, position: str, layer: nn.Module | LayerSpec, *, preserve: bool = True) -> SurgeryResult:
        """Insert a layer directly before or after a module.

        Args:
            model: to be edited.
            position: ``"after_<path>"`` or ``"before_<path>"``, as ``"after_layer1.0.conv1"``.
            layer: a module, which becomes part of the model as it is, or a :class:`LayerSpec`. If it gives another number of channels,
                everything behind it is adapted, with new columns at zero.
            preserve: whether the network goes on computing what it does: linear layers and convolutions start as the identity, others are
                added to their input through a gate that starts at zero.
        """
        return self._edit("add_layer", model, {"position": position, "layer": layer, "preserve": preserve})

    def remove_layer(self, model: nn.Module, layer_name: str) -> SurgeryResult:
        """Remove a module and bridge the gap.

        A linear map is folded into a neighbouring one; otherwise the removed layer's input goes on as it is where shapes agree, and
        through a projection, fitted by least squares on the example inputs, where they do not.
        """
        return self._edit("remove_layer", model, {"layer_name": layer_name})

    def modify_layer(self, model: nn.Module, layer_name: str, new_config: Mapping[str, Any], *, preserve: bool = True) -> SurgeryResult:
        """Change what a layer was constructed with, keeping what overlaps.

        Args:
            model: to be edited.
            layer_name: path of the layer.
            new_config: arguments of its constructor: channels or features (all coupled layers follow), ``kernel_size``, ``stride``,
                ``padding``, ``dilation``, ``groups``, ``bias``; ``num_groups``, ``eps``, ``momentum`` of norms; ``p`` of dropout;
                ``"activation"`` with the name of another one.
            preserve: whether growth has to keep the function; where it cannot, the edit is refused.
        """
        return self._edit("modify_layer", model, {"layer_name": layer_name, "new_config": new_config, "preserve": preserve})

    def add_skip_connection(self, model: nn.Module, from_layer: str, to_layer: str, *, preserve: bool = True) -> SurgeryResult:
        """Add the output of one module to the output of one that runs later, through a gate or projection that starts at zero."""
        return self._edit("add_skip_connection", model, {"from_layer": from_layer, "to_layer": to_layer, "preserve": preserve})

    def remove_skip_connection(self, model: nn.Module, name: str) -> SurgeryResult:
        """Remove a skip by the path that :meth:`add_skip_connection` gave it."""
        return self._edit("remove_skip_connection", model, {"name": name})

    def plan_add_layer(self, model: nn.Module, position: str, layer: nn.Module | LayerSpec, *, preserve: bool = True) -> EditPlan:
        """What :meth:`add_layer` would do; the model and the layer stay as they are."""
        return self._plan("add_layer", model, {"position": position, "layer": layer, "preserve": preserve})

    def plan_remove_layer(self, model: nn.Module, layer_name: str) -> EditPlan:
        """What :meth:`remove_layer` would do; the model stays as it is."""
        return self._plan("remove_layer", model, {"layer_name": layer_name})

    def plan_modify_layer(self, model: nn.Module, layer_name: str, new_config: Mapping[str, Any], *, preserve: bool = True) -> EditPlan:
        """What :meth:`modify_layer` would do; the model stays as it is."""
        return self._plan("modify_layer", model, {"layer_name": layer_name, "new_config": new_config, "preserve": preserve})

    def plan_add_skip_connection(self, model: nn.Module, from_layer: str, to_layer: str, *, preserve: bool = True) -> EditPlan:
        """What :meth:`add_skip_connection` would do; the model stays as it is."""
        return self._plan("add_skip_connection", model, {"from_layer": from_layer, "to_layer": to_layer, "preserve": preserve})

    def plan_remove_skip_connection(self, model: nn.Module, name: str) -> EditPlan:
        """What :meth:`remove_skip_connection` would do; the model stays as it is."""
        return self._plan("remove_skip_connection", model, {"name": name})

    def perform(self, model: nn.Module, entry: Mapping[str, Any], modules: Mapping[str, nn.Module] | None = None) -> SurgeryResult:
        """Repeat the edit of a journal entry, with what it decided then.

        Args:
            model: to be edited.
            entry: of a journal that has been checked.
            modules: by the path that the entry gives, modules that are no data.
        """
        arguments = dict(entry["arguments"])
        if "layer" in arguments:
            arguments["layer"] = layer_of(dict(entry), modules or {})
        return self._edit(entry["operation"], model, arguments, repeats=entry.get("details", {}))

    # How edits are made

    def _plan(self, operation: str, model: nn.Module, arguments: dict[str, Any]) -> EditPlan:
        given = dict(arguments)
        if isinstance(arguments.get("layer"), nn.Module):
            given["layer"] = copy.deepcopy(arguments["layer"])
        result = self._edit(operation, model, given, planned=True)
        return EditPlan(operation, arguments, result.success, result.details, result.error)

    def _edit(
        self, operation: str, model: nn.Module, arguments: dict[str, Any], *, repeats: dict[str, Any] | None = None, planned: bool = False
    ) -> SurgeryResult:
        start = time.perf_counter()
        edit: Edit | None = None
        error: ElasticError | None = None
        try:
            root = root_of(model)
            edit = self._make_edit(root, arguments, repeats)
            entry = _entry(operation, _named(arguments, plain_path))
            transaction(root, validate=False)(self._make)(operation, edit, _named(arguments, edit.registered), entry, planned)
        except _Planned:
            pass
        except ElasticError as refused:
            error = refused
        details = edit.details if edit is not None and error is None else {}
        return SurgeryResult(error is None, operation, details, 1e3 * (time.perf_counter() - start), error)

    def _make(self, operation: str, edit: Edit, arguments: dict[str, Any], entry: dict[str, Any], planned: bool) -> None:
        self._carry_out(operation, edit, arguments)
        edit.try_out()
        edit.details |= {"name": edit.name, "steps": edit.steps, "warnings": edit.warnings}
        edit.details.setdefault("function_kept", bool(arguments.get("preserve", True)))
        if planned:
            raise _Planned
        record(edit.model, entry | {"name": plain_path(edit.name), "details": edit.to_journal()})
        forget_compiled(edit.model)

    def _make_edit(self, root: nn.Module, arguments: Mapping[str, Any], repeats: dict[str, Any] | None) -> Edit:
        preserve = arguments.get("preserve", True)
        if type(preserve) is not bool:
            raise SurgeryError(f"preserve: expected True or False, got {preserve!r}.")
        return Edit(root, self.example_inputs, preserve=preserve, repeats=repeats)

    def _carry_out(self, operation: str, edit: Edit, arguments: Mapping[str, Any]) -> None:
        """Make an edit, and the same one on every average of the model, with the same random numbers."""
        averages = twins(edit.model)
        layer = arguments.get("layer")
        spare = [copy.deepcopy(layer) if isinstance(layer, nn.Module) else layer for _ in averages]
        state = torch.get_rng_state() if averages else None
        _perform(operation, edit, arguments)
        for twin, own in zip(averages, spare, strict=True):
            after = torch.get_rng_state()
            assert state is not None
            torch.set_rng_state(state)
            same = Edit(twin, self.example_inputs, preserve=edit.preserve, repeats=edit.to_journal())
            known = {name for name, _ in twin.named_parameters()}
            _perform(operation, same, {**arguments, "layer": own})
            born = dict(edit.model.named_parameters())
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    if name not in known:
                        parameter.copy_(born[name])
            torch.set_rng_state(after)


_BODIES: dict[str, Callable[[Edit, Mapping[str, Any]], None]] = {
    "add_layer": lambda edit, given: add_layer(edit, given["position"], given["layer"]),
    "remove_layer": lambda edit, given: remove_layer(edit, given["layer_name"]),
    "modify_layer": lambda edit, given: modify_layer(edit, given["layer_name"], given["new_config"]),
    "add_skip_connection": lambda edit, given: add_skip_connection(edit, given["from_layer"], given["to_layer"]),
    "remove_skip_connection": lambda edit, given: remove_skip_connection(edit, given["name"]),
}


def _perform(operation: str, edit: Edit, arguments: Mapping[str, Any]) -> None:
    joining.begin(edit)
    _BODIES[operation](edit, arguments)
    joining.settle(edit)


def _entry(operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the journal says of an edit before it is made: a layer may be given other weights and sizes by it."""
    layer = arguments.get("layer")
    described = {"layer": describe(layer)} if isinstance(layer, nn.Module | LayerSpec) else {}
    return {"format": FORMAT, "operation": operation, "arguments": {**arguments, **described}}


def _named(arguments: Mapping[str, Any], name: Callable[[str], str]) -> dict[str, Any]:
    """Arguments with other names for the modules among them."""
    made = dict(arguments)
    for key in ("layer_name", "from_layer", "to_layer", "name"):
        if isinstance(made.get(key), str):
            made[key] = name(made[key])
    if isinstance(made.get("position"), str):
        side, underscore, path = made["position"].partition("_")
        made["position"] = f"{side}{underscore}{name(path)}"
    return made


def root_of(model: nn.Module) -> nn.Module:
    """The model itself, where a compiled one is given.

    Raises:
        SurgeryError: it is no module, or one that keeps account of the parameters of what it wraps.
    """
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"model: expected an nn.Module, got {type(model).__name__}.")
    if type(model).__name__ in _ACCOUNTANTS:
        raise SurgeryError(
            f"model: {type(model).__name__} would not know of the parameters that an edit adds or removes. Edit what is "
            "inside (model.module) and wrap it anew."
        )
    return unwrapped(model)


_ACCOUNTANTS = ("DistributedDataParallel", "FullyShardedDataParallel")
