"""What a step would add to a model, in Python integers, before anything of it is allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..control import Axis, ElasticDim, Switch
from ..control.block import Entry
from ..errors import SurgeryError, TopologyError
from ..layers import ElasticLayer
from ..summary import parameters_in_use
from ..surgery.edits.edit import Edit
from ..surgery.specs.specs import BUDGET, LayerSpec
from ..surgery.widths import widths

#: Which axis of a plain layer's weight a size of its constructor is, and which axis of an elastic one.
SIZES: dict[str, tuple[int, str]] = {
    "out_channels": (0, "out_dim"),
    "out_features": (0, "out_dim"),
    "in_channels": (1, "in_dim"),
    "in_features": (1, "in_dim"),
    "embedding_dim": (1, "out_dim"),
    "num_embeddings": (0, "in_dim"),
    "num_features": (0, "dim"),
    "num_channels": (0, "dim"),
    "normalized_shape": (0, "dim"),
}


class Cost(NamedTuple):
    """What changes in size.

    Attributes:
        active: parameters in use that it adds; negative where it takes some away.
        allocated: parameters that the model will hold more.
    """

    active: int = 0
    allocated: int = 0


def staged(entry: Entry) -> int:
    """The value of a dim or switch that the next commit will leave."""
    return entry.staged


def of_width(dim: ElasticDim, before: int, after: int) -> Cost:
    """Another width of a dim within its capacity."""
    active = 0
    for uses in _uses_of(dim).values():
        awake = [(tensor, axes) for tensor, axes, layer in uses if all(switch.staged for switch in layer._widths.switches)]
        now, then = (max((_elements(*use, dim, width) for use in awake), default=0) for width in (before, after))
        active += then - now
    return Cost(active, 0)


def of_switch(model: nn.Module, switch: Switch, on: bool) -> Cost:
    """A block switched on or off."""
    return Cost(parameters_in_use(model, lambda entry: on if entry is switch else entry.staged) - parameters_in_use(model, staged), 0)


def of_layer(layer: LayerSpec | nn.Module) -> Cost:
    """One more layer. What other layers gain if it changes the number of channels is not counted here."""
    if isinstance(layer, LayerSpec):
        with torch.device("meta"):
            layer = layer.build()
    count = sum(parameter.numel() for parameter in layer.parameters())
    return Cost(count, count)


def of_insertion(layer: LayerSpec | nn.Module, model: nn.Module) -> Cost:
    """One more layer, and what those behind it gain if it gives more channels than it takes, where that could be a great deal.

    What is counted of those behind it is a bound, so it counts only beyond what a layer itself may have: less is found by counting the
    model that has it.
    """
    active, allocated = of_layer(layer)
    taken, given = (_declared(layer, side) for side in ("in", "out"))
    if taken is not None and given is not None and given > taken:
        tensors = [tensor for tensor in model.parameters() if any(size % taken == 0 for size in tensor.shape)]
        behind = sum(tensor.numel() for tensor in tensors) * (given - taken) // taken
        if behind > BUDGET:
            return Cost(active + behind, allocated + behind)
    return Cost(active, allocated)


def of_change(model: nn.Module, path: str, config: Mapping[str, Any], example_inputs: Any) -> Cost:
    """A layer made with other arguments: sizes with all that is coupled with them, window, groups, bias. What is no size costs nothing.

    Effects: where sizes grow, runs the model on tensors without values, which surgery remembers.

    Raises:
        SurgeryError: a size cannot change.
    """
    layer: Any = model.get_submodule(path)
    total = of_own(layer, config)
    for name, size in config.items():
        if name in SIZES and type(size) is int and size != size_of(layer, name):
            found = of_units(model, path, name, size, example_inputs)
            total = Cost(total.active + found.active, total.allocated + found.allocated)
    return total


def size_of(layer: Any, name: str) -> int:
    """A size of a layer, of an elastic one that which is active."""
    axis = _axis(layer, name)
    if axis is not None:
        return sum(segment.dim.staged * segment.inner for segment in axis.segments)
    size: Any = getattr(layer, name, 0)
    return size if type(size) is int else math.prod(size)


def of_units(model: nn.Module, path: str, name: str, after: int, example_inputs: Any) -> Cost:
    """Another size of a layer, ``name`` as its constructor has it, and of all that is coupled with it.

    Effects: runs a plain model on tensors without values, which surgery remembers.

    Raises:
        SurgeryError: its size cannot change.
    """
    layer: Any = model.get_submodule(path)
    if isinstance(layer, ElasticLayer):
        return _of_elastic_units(layer, name, after)
    edit = Edit(model, example_inputs, preserve=False, repeats=None)
    tensor_name = next((each for each in ("weight", "running_mean") if getattr(layer, each, None) is not None), None)
    if tensor_name is None:
        raise TopologyError(f"{path!r} ({type(layer).__name__}): it has no tensors of its own. Change the layer that makes its units.")
    axis = SIZES[name][0]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        axis = 1 - axis
    before = getattr(layer, tensor_name).shape[axis]
    coupled = widths.find(edit.model, f"{path}.{tensor_name}", axis, edit.inputs, size=after, returned=True, calls=edit.calls)
    steps = (after - before) // coupled.multiple_of
    shapes: dict[str, list[int]] = {}
    parameters = dict(model.named_parameters())
    for binding in coupled.bindings:
        full = f"{binding.path}.{binding.tensor}".lstrip(".")
        if full in parameters:
            shape = shapes.setdefault(full, list(parameters[full].shape))
            shape[binding.axis] += steps * sum(inner for moves, inner in binding.stretches if moves)
    added = sum(math.prod(shape) - parameters[full].numel() for full, shape in shapes.items())
    return Cost(added, added)


def _of_elastic_units(layer: Any, name: str, after: int) -> Cost:
    """Other units of an elastic dim; if it has no room for them, every tensor of it is allocated anew."""
    axis = _axis(layer, name)
    if axis is None or len(axis.segments) != 1:
        raise SurgeryError(f"{layer._widths.label}: its units are those of several dims. Change one of those.")
    ((dim, _, inner),) = axis.segments
    width = after // inner
    allocated = 0
    if width > dim.capacity:
        for uses in _uses_of(dim).values():
            allocated += max(_elements(tensor, axes, dim, width, width) - tensor.numel() for tensor, axes, _ in uses)
    return Cost(of_width(dim, dim.staged, width).active, allocated)


def of_own(layer: Any, config: Mapping[str, Any]) -> Cost:
    """What window, groups and bias of a layer add to its own tensors, as large as its other sizes in ``config`` make them."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return Cost()
    used = _elements(weight, layer.tensor_axes()["weight"]) if isinstance(layer, ElasticLayer) else weight.numel()
    factor = _of_window(layer, config.get("kernel_size"))
    groups = config.get("groups")
    if type(groups) is int and groups > 0 and hasattr(layer, "groups"):
        factor *= Fraction(layer.groups, groups)
    biases = [0, 0]
    if type(config.get("bias")) is bool and config["bias"] != (layer.bias is not None):
        name = next((name for name in ("out_channels", "out_features") if hasattr(layer, name)), "")
        biases = [size if config["bias"] else -size for size in _sizes(layer, name, config)]
    added = []
    for held, count in enumerate((used, weight.numel())):
        now = Fraction(count)
        for name in SIZES.keys() & config.keys():
            if type(config[name]) is int and (before := _sizes(layer, name, {})[held]):
                now *= Fraction(_sizes(layer, name, config)[held], before)
        added.append(round(now * (factor - 1)) + biases[held])
    return Cost(*added)


def _of_window(layer: Any, kernel: Any) -> Fraction:
    """How many times as many weights another window has."""
    before = getattr(layer, "kernel_size", None)
    if kernel is None or type(before) is not tuple:
        return Fraction(1)
    items = kernel if type(kernel) in (list, tuple) else [kernel] * len(before)
    if len(items) != len(before) or any(type(item) is not int or not 0 < item < 2**20 for item in items):
        return Fraction(1)  # which surgery refuses
    return Fraction(math.prod(items), math.prod(before))


def _sizes(layer: Any, name: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """A size of a layer with other arguments, as it is in use and as it is held."""
    axis, size = _axis(layer, name), size_of(layer, name)
    after = config.get(name, size)
    return after, after if axis is None else max(after, axis.capacity)


_Uses = list[tuple[Tensor, tuple[Axis | None, ...], Any]]


def _uses_of(dim: ElasticDim) -> dict[int, _Uses]:
    """Each parameter that a dim runs through, as every layer that holds it sees it."""
    found: dict[int, _Uses] = {}
    for layer in dim.users():
        for name, axes in layer.tensor_axes().items():
            tensor = layer.storage(name)
            if isinstance(tensor, nn.Parameter) and any(axis is not None and dim in axis.dims for axis in axes):
                found.setdefault(id(tensor), []).append((tensor, axes, layer))
    return found


def _elements(
    tensor: Tensor, axes: tuple[Axis | None, ...], dim: ElasticDim | None = None, width: int = 0, capacity: int | None = None
) -> int:
    """The elements of a tensor in use if ``dim`` had ``width`` units; those allocated if it had ``capacity``."""
    size: Callable[[ElasticDim], int]
    if capacity is None:
        size = lambda each: width if each is dim else each.staged  # noqa: E731
    else:
        size = lambda each: capacity if each is dim else each.capacity  # noqa: E731
    count = 1
    for length, axis in zip(tensor.shape, axes, strict=True):
        count *= length if axis is None else sum(size(segment.dim) * segment.inner for segment in axis.segments)
    return count


def _axis(layer: Any, name: str) -> Axis | None:
    """The axis of an elastic layer that a size of its constructor is; those that a plain class became know it by their weight."""
    if not isinstance(layer, ElasticLayer) or name not in SIZES:
        return None
    index, side = SIZES[name]
    found: Axis | None = getattr(layer, side, None)
    if found is None:
        axes = layer.tensor_axes().get("weight", ())
        index = 1 - index if isinstance(layer, nn.modules.conv._ConvTransposeNd) else index
        found = axes[index] if index < len(axes) else None
    return found


def _declared(layer: LayerSpec | nn.Module, side: str) -> int | None:
    """The channels or features that a layer says it takes or gives."""
    given: Any = layer.arguments.get if isinstance(layer, LayerSpec) else lambda name: getattr(layer, name, None)
    return next((size for name in (f"{side}_channels", f"{side}_features") if type(size := given(name)) is int and size > 0), None)
