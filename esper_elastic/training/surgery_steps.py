"""Decisions that the surgeon carries out; and another size of a layer that turns out to need none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..control import Axis
from ..errors import DecisionError
from ..layers import ElasticLayer
from ..surgery import ModelSurgeon, SurgeryResult
from ..surgery.specs.specs import shown
from .cost import SIZES, of_change, of_insertion, of_own, of_width, size_of
from .decisions import AdaptationDecision
from .names import paths_of, resolve
from .step import Step, require_only

#: The largest size that surgery gives a layer.
MOST_UNITS = 2**20

_UNITS_OF: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "out_channels"),
    (nn.Linear, "out_features"),
    (nn.Embedding, "embedding_dim"),
    (nn.modules.batchnorm._BatchNorm, "num_features"),
)


def axis_of(layer: Any) -> Axis | None:
    """The axis of the units that a layer gives."""
    found: Axis | None = getattr(layer, "dim", None) or getattr(layer, "out_dim", None)
    return found


def units_of(layer: nn.Module) -> str | None:
    """What the constructor of a layer calls the number of its units."""
    return next((name for kinds, name in _UNITS_OF if isinstance(layer, kinds)), None)


def add_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """A layer before or after another one."""
    require_only(decision, {"preserve"})
    side, path = _position(decision, model)
    layer = decision.layer_spec
    assert layer is not None
    position = f"{side}_{path}"
    edit = functools.partial(surgeon.add_layer, model, position, layer, **_preserve(decision))
    return Step(decision, "surgery", path, functools.partial(_operate, edit), 1, functools.partial(of_insertion, layer, model))


def _position(decision: AdaptationDecision, model: nn.Module) -> tuple[str, str]:
    position = decision.position if decision.position is not None else "after"
    side, _, path = position.partition("_")
    if side not in ("after", "before") or not (path or decision.layer_name):
        raise DecisionError(f'decision: {decision}: position: expected "after_<path>" or "before_<path>", got {shown(position)}.')
    return side, resolve(path or decision.layer_name or "", paths_of(model), "layer")


def remove_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """A layer gone."""
    require_only(decision, set())
    path = _layer(decision, model)
    return Step(decision, "surgery", path, functools.partial(_operate, functools.partial(surgeon.remove_layer, model, path)), -1)


def modify_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """A layer with other arguments."""
    path = _layer(decision, model)
    config = {name: value for name, value in decision.parameters.items() if name != "preserve"}
    if not config:
        raise DecisionError(f"decision: {decision}: parameters: expected the new configuration, got none.")
    layer: Any = model.get_submodule(path)
    if isinstance(layer, ElasticLayer) and set(config) == {units_of(layer)}:
        step = _within_capacity(decision, path, layer, *config.values())
        if step is not None:
            return step
    return modify(decision, path, config, model, surgeon)


def _within_capacity(decision: AdaptationDecision, path: str, layer: Any, size: Any) -> Step | None:
    """Another number of units for which there is room: newborn ones keep the function, surplus ones fall asleep."""
    axis = axis_of(layer)
    if axis is None or len(axis.segments) != 1 or type(size) is not int:
        return None
    ((dim, _, inner),) = axis.segments
    before, width = dim.staged, size // inner
    if size % inner or width > dim.capacity or dim.rigid is not None:
        return None
    dim.admit(width)

    def carry_out() -> dict[str, Any]:
        if width > before:
            dim.grow(width, exact=bool(decision.parameters.get("preserve", True)))
        else:
            dim.resize(width)
        return {"name": path, "from": before, "to": width}

    direction = (width > before) - (width < before)
    return Step(decision, "metadata", path, carry_out, direction, functools.partial(of_width, dim, before, width), width, dim)


def modify(decision: AdaptationDecision, path: str, config: dict[str, Any], model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """Other arguments of a layer, by the surgeon."""
    layer: Any = model.get_submodule(path)
    sizes = {name: size for name, size in config.items() if name in SIZES and type(size) is int}
    for name, size in sizes.items():
        if not 0 < size <= MOST_UNITS:
            raise DecisionError(f"decision: {decision}: {path}: {name}: expected an integer from 1 to {MOST_UNITS}, got {shown(size)}.")
    changes = [size - size_of(layer, name) for name, size in sizes.items()]
    cost = functools.partial(of_change, model, path, config, surgeon.example_inputs)
    direction = _sign(max(changes, key=abs, default=0)) or _sign(of_own(layer, config).allocated)
    edit = functools.partial(surgeon.modify_layer, model, path, config, **_preserve(decision))
    return Step(decision, "surgery", path, functools.partial(_operate, edit), direction, cost, min(sizes.values(), default=None))


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def add_skip(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """A skip from one layer to another."""
    require_only(decision, {"preserve", "from_layer", "to_layer"})
    given, paths = decision.parameters, paths_of(model)
    source, target = given.get("from_layer", decision.layer_name), given.get("to_layer", decision.position)
    if type(source) is not str or type(target) is not str:
        raise DecisionError(
            f"decision: {decision}: expected where the skip begins (layer_name) and where it ends (position), "
            f"got {shown(source)} and {shown(target)}."
        )
    target = target.removeprefix("after_") if target not in paths else target
    source, target = resolve(source, paths, "layer"), resolve(target, paths, "layer")
    edit = functools.partial(surgeon.add_skip_connection, model, source, target, **_preserve(decision))
    return Step(decision, "surgery", source, functools.partial(_operate, edit), 1)


def remove_skip(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """A skip gone."""
    require_only(decision, set())
    path = _layer(decision, model)
    edit = functools.partial(surgeon.remove_skip_connection, model, path)
    return Step(decision, "surgery", path, functools.partial(_operate, edit), -1)


def _operate(edit: Callable[[], SurgeryResult]) -> dict[str, Any]:
    result = edit()
    if not result:
        assert result.error is not None
        raise result.error
    return result.details


def _layer(decision: AdaptationDecision, model: nn.Module) -> str:
    assert decision.layer_name is not None
    return resolve(decision.layer_name, paths_of(model), "layer")


def _preserve(decision: AdaptationDecision) -> dict[str, Any]:
    return {"preserve": decision.parameters["preserve"]} if "preserve" in decision.parameters else {}
