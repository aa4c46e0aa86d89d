"""How a decision is served: by metadata where that can do it, else by the surgeon. Found without changing anything.

Owns what a decision's words mean on a model: names, widths, which units stay. Whether it may happen is asked before, in ``safety.py``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from .. import followers, importance
from ..control import Axis, ElasticDim
from ..errors import CapacityError, DecisionError
from ..layers import ElasticLayer
from ..layers.units import distinct, places
from ..model import known
from ..surgery import ModelSurgeon, SurgeryResult
from ..surgery.specs.specs import shown
from .cost import SIZES, Cost, of_change, of_insertion, of_own, of_switch, of_width, size_of
from .decisions import AdaptationDecision

Mechanism = Literal["metadata", "surgery"]

#: What grow and prune make of a width without being told.
GROW, PRUNE = 1.25, 0.75
#: The largest size that surgery gives a layer.
MOST_UNITS = 2**20

_UNITS_OF: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "out_channels"),
    (nn.Linear, "out_features"),
    (nn.Embedding, "embedding_dim"),
    (nn.modules.batchnorm._BatchNorm, "num_features"),
)
_SCORES: dict[str, Callable[[ElasticDim], Tensor]] = {
    "magnitude": importance.magnitude,
    "taylor": importance.taylor,
    "batch_norm_scale": importance.batch_norm_scale,
}


class NeedsCommit(Exception):
    """A step that reads what an open batch has staged and not yet done."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One decision, ready to be carried out on one model.

    Attributes:
        decision: that it carries out.
        mechanism: ``"metadata"``, a write to the control block, or ``"surgery"``.
        name: of what changes, as the model has it.
        carry_out: makes the change and returns its details.
        direction: 1 for what adds capacity, -1 for what removes some, else 0.
        cost: what it adds, computed when asked.
        width: of the dim afterwards, if it is one that changes; of several the smallest.
        writes: the dim whose units are initialised or moved, which neither a batch nor a transaction undoes by itself.
    """

    decision: AdaptationDecision
    mechanism: Mechanism
    name: str
    carry_out: Callable[[], dict[str, Any]]
    direction: int = 0
    cost: Callable[[], Cost] = Cost
    width: int | None = None
    writes: ElasticDim | None = None


def step_for(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """How ``decision`` would be served on ``model`` as it is now, earlier changes of an open batch included.

    Raises:
        DecisionError: it names what the model does not have, or parameters that it cannot take.
        CapacityError: a dim cannot take the width.
        NeedsCommit: what is staged has to be published first.
    """
    return _STEPS[decision.adaptation_type](decision, model, surgeon)


def resolve(name: str, names: Iterable[str], what: str) -> str:
    """The one of ``names`` that ``name`` means: itself, or the only one that it is with underscores in the place of dots.

    Raises:
        DecisionError: it means none, or several.
    """
    found = _resolve(name, names, what)
    if found is None:
        _unknown(name, names, what)
    return found


def _resolve(name: str, names: Iterable[str], what: str) -> str | None:
    names = names if isinstance(names, Mapping) else list(names)
    if name in names:
        return name
    spelled = name.replace(".", "_")
    meant = [each for each in names if each.replace(".", "_") == spelled]
    if len(meant) > 1:
        raise DecisionError(
            f"decision: {what} {name!r}: expected one meaning, got {len(meant)}: {', '.join(meant[:5])}. Write it with dots."
        )
    return meant[0] if meant else None


def _unknown(name: str, names: Iterable[str], what: str) -> NoReturn:
    listed = list(names)
    near = difflib.get_close_matches(name, listed, n=3) or listed[:3]
    hint = f" The nearest: {', '.join(map(repr, near))}." if near else f" It has no {what} at all."
    raise DecisionError(f"decision: {what} {name!r}: the model has none of that name.{hint}")


def _paths(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if path}


# Widths


def _width(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    assert decision.layer_name is not None
    if decision.parameters:
        _require_only(decision, _WIDTH_WORDS[decision.adaptation_type])
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
    paths = _paths(model)
    found = _resolve(name, {**paths, **dims}, "dim or layer")
    if found is None:
        found = next((key for key, dim in dims.items() if dim.name == name), None)
    if found is None:
        _unknown(name, {**dims, **paths}, "dim or layer")
    if found in dims:
        return found, dims[found]
    layer = paths[found]
    if not isinstance(layer, ElasticLayer):
        return found, None
    axis = _axis_of(layer)
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


def _axis_of(layer: Any) -> Axis | None:
    """The axis of the units that a layer gives."""
    found: Axis | None = getattr(layer, "dim", None) or getattr(layer, "out_dim", None)
    return found


def _width_of_plain(decision: AdaptationDecision, path: str, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    layer = model.get_submodule(path)
    attribute = _units_of(layer)
    if attribute is None:
        raise DecisionError(f"decision: {decision}: {path}: a {type(layer).__name__} has no units of its own. Name a layer with weights.")
    if any(word in decision.parameters for word in ("keep", "by", "init")):
        raise DecisionError(
            f"decision: {decision}: {path} is no elastic layer: which units stay cannot be chosen. ee.elasticize the model first."
        )
    before = getattr(layer, attribute)
    width = _target(decision, before, 1, 1)
    _require_direction(decision, before, width)
    return _modify(decision, path, {attribute: width}, model, surgeon)


def _units_of(layer: nn.Module) -> str | None:
    return next((name for kinds, name in _UNITS_OF if isinstance(layer, kinds)), None)


def _beyond_capacity(decision: AdaptationDecision, name: str, dim: ElasticDim, width: int, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """More units than there is room for: the surgeon makes room."""
    path = name.partition(":")[0]
    layer: Any = model.get_submodule(path) if path in _paths(model) else None
    attribute = _units_of(layer) if layer is not None else None
    axis = _axis_of(layer) if layer is not None else None
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
    return _modify(decision, path, {attribute: width * axis.segments[0].inner}, model, surgeon)


# Blocks


def _switch(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    assert decision.layer_name is not None
    _require_only(decision, set())
    _, blocks = known(model)
    name = _resolve(decision.layer_name, blocks, "block")
    if name is None:
        if decision.layer_name in _paths(model):
            raise DecisionError(
                f"decision: {decision}: {decision.layer_name} has no switch. Put it into an ee.ElasticBlock, or remove it (remove_layer)."
            )
        _unknown(decision.layer_name, blocks, "block")
    switch, on = blocks[name].switch, decision.adaptation_type == "enable"

    def carry_out() -> dict[str, Any]:
        before = bool(switch.staged)
        switch.set(on)
        return {"name": name, "from": before, "to": on}

    direction = on - bool(switch.staged)
    return Step(decision, "metadata", name, carry_out, direction, functools.partial(of_switch, model, switch, on))


# Surgery


def _add_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    _require_only(decision, {"preserve"})
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
    return side, resolve(path or decision.layer_name or "", _paths(model), "layer")


def _remove_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    _require_only(decision, set())
    path = _layer(decision, model)
    return Step(decision, "surgery", path, functools.partial(_operate, functools.partial(surgeon.remove_layer, model, path)), -1)


def _modify_layer(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    path = _layer(decision, model)
    config = {name: value for name, value in decision.parameters.items() if name != "preserve"}
    if not config:
        raise DecisionError(f"decision: {decision}: parameters: expected the new configuration, got none.")
    layer: Any = model.get_submodule(path)
    if isinstance(layer, ElasticLayer) and set(config) == {_units_of(layer)}:
        step = _within_capacity(decision, path, layer, *config.values())
        if step is not None:
            return step
    return _modify(decision, path, config, model, surgeon)


def _within_capacity(decision: AdaptationDecision, path: str, layer: Any, size: Any) -> Step | None:
    """Another number of units for which there is room: newborn ones keep the function, surplus ones fall asleep."""
    axis = _axis_of(layer)
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


def _modify(decision: AdaptationDecision, path: str, config: dict[str, Any], model: nn.Module, surgeon: ModelSurgeon) -> Step:
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


def _add_skip(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    _require_only(decision, {"preserve", "from_layer", "to_layer"})
    given, paths = decision.parameters, _paths(model)
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


def _remove_skip(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    _require_only(decision, set())
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
    return resolve(decision.layer_name, _paths(model), "layer")


def _preserve(decision: AdaptationDecision) -> dict[str, Any]:
    return {"preserve": decision.parameters["preserve"]} if "preserve" in decision.parameters else {}


def _require_only(decision: AdaptationDecision, words: set[str]) -> None:
    unknown = next((word for word in decision.parameters if word not in words), None)
    if unknown is not None:
        expected = ", ".join(sorted(words)) or "none"
        raise DecisionError(f"decision: {decision}: parameters: expected {expected}, got {unknown!r}.")


_STEPS: dict[str, Callable[[AdaptationDecision, nn.Module, ModelSurgeon], Step]] = {
    "resize": _width,
    "grow": _width,
    "prune": _width,
    "enable": _switch,
    "disable": _switch,
    "add_layer": _add_layer,
    "remove_layer": _remove_layer,
    "modify_layer": _modify_layer,
    "add_skip_connection": _add_skip,
    "remove_skip_connection": _remove_skip,
}
