"""Decisions on widths: resize, grow, prune. By metadata up to the capacity, by the surgeon beyond it and on plain layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import followers, importance
from ..control import ElasticDim
from ..errors import CapacityError, DecisionError
from ..layers import ElasticLayer
from ..layers.units import distinct, places
from ..model import known
from ..surgery import ModelSurgeon
from ..surgery.specs.specs import shown
from .cost import of_width
from .decisions import AdaptationDecision
from .names import find, paths_of, unknown
from .step import NeedsCommit, Step, require_only
from .surgery_steps import axis_of, modify, units_of

#: What grow and prune make of a width without being told.
GROW, PRUNE = 1.25, 0.75

_SCORES: dict[str, Callable[[ElasticDim], Tensor]] = {
    "magnitude": importance.magnitude,
    "taylor": importance.taylor,
    "batch_norm_scale": importance.batch_norm_scale,
}


def width_step(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """Another width of a dim, by its name or that of a layer which gives its units, or of a plain layer."""
    assert decision.layer_name is not None
    if decision.parameters:
        require_only(decision, _WIDTH_WORDS[decision.adaptation_type])
    dims, _ = known(model)
    name = decision.layer_name
    dim = dims.get(name)
    if dim is None:
        name, dim = _dim_of(decision.layer_name, model, dims)
    if dim is None:
        return _width_of_plain(decision, name, model, surgeon)
    before = dim.staged
    width = _target(decision, before, dim.multiple_of, dim.minimum)
    _require_direction(decision, before, width)
    direction = (width > before) - (width < before)
    if width > dim.capacity:
        return _beyond_capacity(decision, name, dim, width, model, surgeon)
    dim.admit(width)
    if decision.adaptation_type == "prune" and width < before:
        _require_score(decision, dim)
    carry_out = functools.partial(_CHANGES[decision.adaptation_type], decision, name, dim, before, width)
    writes = None if decision.adaptation_type == "resize" else dim
    return Step(decision, "metadata", name, carry_out, direction, functools.partial(of_width, dim, before, width), width, writes)


def _resize(decision: AdaptationDecision, name: str, dim: ElasticDim, before: int, width: int) -> dict[str, Any]:
    dim.resize(width)
    return {"name": name, "from": before, "to": width}


def _grow(decision: AdaptationDecision, name: str, dim: ElasticDim, before: int, width: int) -> dict[str, Any]:
    init = decision.parameters.get("init", "zero")
    dim.grow(width, init=init, exact=decision.parameters.get("exact", True))
    return {"name": name, "from": before, "to": width, "init": init}


def _prune(decision: AdaptationDecision, name: str, dim: ElasticDim, before: int, width: int) -> dict[str, Any]:
    kept = decision.parameters.get("keep")
    by = decision.parameters.get("by", "magnitude")
    if kept is None and width < before:
        kept = importance.top(_SCORES[by](dim), width)
    if kept is not None:
        dim.keep(kept)
    return {"name": name, "from": before, "to": width} | ({} if "keep" in decision.parameters else {"by": by})


_WIDTH_WORDS = {
    "resize": {"width", "factor", "delta", "preserve"},
    "grow": {"width", "factor", "delta", "preserve", "init", "exact"},
    "prune": {"width", "factor", "delta", "keep", "by"},
}
_CHANGES = {"resize": _resize, "grow": _grow, "prune": _prune}


def _require_direction(decision: AdaptationDecision, before: int, width: int) -> None:
    """Refuse to grow to less, to prune to more, and words of theirs that say nothing."""
    kind, given = decision.adaptation_type, decision.parameters
    if kind == "grow" and width < before:
        raise DecisionError(
            f"decision: {decision}: expected a width of at least {before}, got {width}. Prune or resize to have fewer units."
        )
    if kind == "prune" and width > before:
        raise DecisionError(f"decision: {decision}: expected a width of at most {before}, got {width}. Grow or resize to have more units.")
    if type(given.get("init", "zero")) is not str:
        raise DecisionError(f"decision: {decision}: init: expected a name, got {shown(given['init'])}.")
    for word in ("exact", "preserve"):
        if type(given.get(word, True)) is not bool:
            raise DecisionError(f"decision: {decision}: {word}: expected True or False, got {shown(given[word])}.")
    by = given.get("by", "magnitude")
    if type(by) is not str or by not in _SCORES:
        raise DecisionError(f"decision: {decision}: by: expected one of {', '.join(_SCORES)}, got {shown(by)}. Or name the units to keep.")


def _require_score(decision: AdaptationDecision, dim: ElasticDim) -> None:
    """Scores are of units as they are, which those of an open batch are not yet."""
    batch = dim.block._batch
    if batch is not None and dim in batch.values and decision.parameters.get("keep") is None:
        raise NeedsCommit


def save_units(dim: ElasticDim, save_values: Callable[..., None], save_objects: Callable[..., None]) -> None:
    """Report all that holds units of a dim: weights, buffers, gradients, the state of optimizers with the dicts that hold it."""
    for place in distinct(places(dim, dim.label)):
        save_values(place.tensor)
        if place.tensor.is_leaf and place.tensor.grad is not None:
            save_values(place.tensor.grad)
        for follower in followers.followers_of(place.tensor):
            state: dict[str, Any] = follower.state[place.tensor]  # type: ignore[attr-defined]
            save_objects(state)
            save_values(*(each for each in state.values() if isinstance(each, Tensor)))


def _target(decision: AdaptationDecision, before: int, multiple: int, minimum: int) -> int:
    """The width that a decision asks for."""
    given = decision.parameters
    said = [word for word in ("width", "factor", "delta", "keep") if given.get(word) is not None]
    if len(said) > 1:
        raise DecisionError(f"decision: {decision}: expected one of width, factor, delta and keep, got {' and '.join(said)}.")
    if not said:
        if decision.adaptation_type == "resize":
            raise DecisionError(f"decision: {decision}: expected width, factor or delta among the parameters, got none.")
        share = GROW if decision.adaptation_type == "grow" else PRUNE
        return max(_rounded(before * share, before, multiple), minimum)
    word = said[0]
    value = given[word]
    if word == "keep":
        if type(value) not in (list, tuple, range) and not (type(value) is Tensor and value.dim() == 1):
            raise DecisionError(f"decision: {decision}: keep: expected a list of the indices of units, got {shown(value)}.")
        return len(value)
    if word == "factor":
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value <= 1024:
            raise DecisionError(f"decision: {decision}: factor: expected a number above 0 and at most 1024, got {shown(value)}.")
        return max(_rounded(before * value, before, multiple), minimum)
    if type(value) is not int or abs(value) > 2**31:
        raise DecisionError(f"decision: {decision}: {word}: expected an integer, got {shown(value)}.")
    return value if word == "width" else before + value


def _rounded(wanted: float, before: int, multiple: int) -> int:
    """The multiple nearest to ``wanted``, one away from ``before`` at least if another is wanted."""
    width = round(wanted / multiple) * multiple
    if width == before and wanted != before:
        width += multiple if wanted > before else -multiple
    return width


def _dim_of(name: str, model: nn.Module, dims: Mapping[str, ElasticDim]) -> tuple[str, ElasticDim | None]:
    """A dim by its name, or as the one that a layer gives; or the path of a plain layer. What is spelled in full goes first."""
    paths = paths_of(model)
    found = find(name, {**paths, **dims}, "dim or layer")
    if found is None:
        found = next((key for key, dim in dims.items() if dim.name == name), None)
    if found is None:
        unknown(name, {**dims, **paths}, "dim or layer")
    if found in dims:
        return found, dims[found]
    layer = paths[found]
    if not isinstance(layer, ElasticLayer):
        return found, None
    axis = axis_of(layer)
    own = axis.dims if axis is not None else []
    named = {id(dim): key for key, dim in dims.items()}
    free = [dim for dim in own if dim.rigid is None and id(dim) in named]
    if len(own) == len(free) == 1:
        return named[id(own[0])], own[0]
    if len(free) > 1:
        several = ", ".join(named[id(dim)] for dim in free)
        raise DecisionError(
            f"decision: {name!r}: expected one dim, got a layer whose units are those of several: {several}. Name one of those."
        )
    reason = next((f", since {dim.rigid}" for dim in own if dim.rigid is not None), "")
    raise DecisionError(f"decision: {name!r}: expected a layer whose width can change, got one whose width is fixed{reason}.")


def _width_of_plain(decision: AdaptationDecision, path: str, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    layer = model.get_submodule(path)
    attribute = units_of(layer)
    if attribute is None:
        raise DecisionError(f"decision: {decision}: {path}: a {type(layer).__name__} has no units of its own. Name a layer with weights.")
    if any(word in decision.parameters for word in ("keep", "by", "init")):
        raise DecisionError(
            f"decision: {decision}: {path} is no elastic layer: which units stay cannot be chosen. ee.elasticize the model first."
        )
    before = getattr(layer, attribute)
    width = _target(decision, before, 1, 1)
    _require_direction(decision, before, width)
    return modify(decision, path, {attribute: width}, model, surgeon)


def _beyond_capacity(decision: AdaptationDecision, name: str, dim: ElasticDim, width: int, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """More units than there is room for: the surgeon makes room."""
    path = name.partition(":")[0]
    layer: Any = model.get_submodule(path) if path in paths_of(model) else None
    attribute = units_of(layer) if layer is not None else None
    axis = axis_of(layer) if layer is not None else None
    if decision.parameters.get("init", "zero") != "zero":
        raise CapacityError(
            f"{dim.label}: cannot activate {width} units: capacity is {dim.capacity}, and units beyond it begin at zero. "
            "Leave out init, or grow in two steps."
        )
    if attribute is None or axis is None or len(axis.segments) != 1 or axis.segments[0].dim is not dim:
        raise CapacityError(
            f"{dim.label}: cannot activate {width} units: capacity is {dim.capacity}, and no single layer gives its units, "
            "whose room could be made larger. Choose a width up to the capacity."
        )
    return modify(decision, path, {attribute: width * axis.segments[0].inner}, model, surgeon)
