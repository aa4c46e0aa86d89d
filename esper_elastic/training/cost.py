"""What a step would add to a model, in Python integers, before anything of it is allocated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..control import Axis, ElasticDim
from ..errors import SurgeryError, TopologyError
from ..layers import ElasticLayer
from ..surgery.edits.edit import Edit
from ..surgery.specs.specs import LayerSpec
from ..surgery.widths import widths


class Cost(NamedTuple):
    """What changes in size.

    Attributes:
        active: parameters in use that it adds; negative where it takes some away.
        allocated: parameters that the model will hold more.
    """

    active: int = 0
    allocated: int = 0


def of_width(dim: ElasticDim, before: int, after: int) -> Cost:
    """Another width of a dim within its capacity."""
    found = {(id(binding.layer), binding.name): binding for binding in dim.bindings if isinstance(binding.tensor, nn.Parameter)}
    shared = {id(binding.tensor): binding for binding in found.values()}
    active = 0
    for binding in shared.values():
        axes = binding.layer.tensor_axes()[binding.name]
        active += _elements(binding.tensor, axes, dim, after) - _elements(binding.tensor, axes, dim, before)
    return Cost(active, 0)


def _elements(tensor: Tensor, axes: tuple[Axis | None, ...], dim: ElasticDim, width: int, capacity: int | None = None) -> int:
    """The elements of a tensor in use if ``dim`` had ``width`` units; those allocated if it had ``capacity``."""
    count = 1
    for size, axis in zip(tensor.shape, axes, strict=True):
        if axis is None:
            count *= size
        elif capacity is None:
            count *= sum((width if segment.dim is dim else segment.dim.staged) * segment.inner for segment in axis.segments)
        else:
            count *= sum((capacity if segment.dim is dim else segment.dim.capacity) * segment.inner for segment in axis.segments)
    return count


def of_layer(layer: LayerSpec | nn.Module) -> Cost:
    """One more layer. What other layers gain if it changes the number of channels is not counted here."""
    if isinstance(layer, LayerSpec):
        return Cost(layer.elements, layer.elements)
    count = sum(parameter.numel() for parameter in layer.parameters())
    return Cost(count, count)


def of_units(model: nn.Module, path: str, before: int, after: int, example_inputs: Any) -> Cost:
    """Another number of units of a layer and of all that is coupled with it.

    Effects: where growth could matter, runs the model on tensors without values, which surgery remembers.

    Raises:
        TopologyError: its units cannot change.
    """
    layer: Any = model.get_submodule(path)
    if after <= before:
        return Cost(min(0, math.prod(layer.weight.shape) * (after - before) // before), 0)
    if isinstance(layer, ElasticLayer):
        return _beyond_capacity(layer, before, after)
    edit = Edit(model, example_inputs, preserve=False, repeats=None)
    weight = next((name for name in ("weight", "running_mean") if getattr(layer, name, None) is not None), None)
    if weight is None:
        raise TopologyError(f"{path!r} ({type(layer).__name__}): it has no tensors of its own. Change the layer that makes its units.")
    axis = 1 if isinstance(layer, nn.Embedding | nn.modules.conv._ConvTransposeNd) else 0
    coupled = widths.find(edit.model, f"{path}.{weight}", axis, edit.inputs, size=after, returned=True, calls=edit.calls)
    factors: dict[str, list[tuple[int, int, int]]] = {}
    for binding in coupled.bindings:
        moving = sum(inner for moves, inner in binding.stretches if moves)
        factors.setdefault(f"{binding.path}.{binding.tensor}".lstrip("."), []).append((binding.axis, moving, coupled.multiple_of))
    added = 0
    for name, moved in factors.items():
        tensor = dict(model.named_parameters()).get(name)
        if tensor is None:
            continue
        shape = list(tensor.shape)
        for index, moving, multiple in moved:
            shape[index] += moving * ((after - before) // multiple)
        added += math.prod(shape) - tensor.numel()
    return Cost(added, added)


def _beyond_capacity(layer: Any, before: int, after: int) -> Cost:
    """More units than an elastic dim has room for: every tensor of it is allocated anew."""
    axis: Axis | None = getattr(layer, "dim", None) or getattr(layer, "out_dim", None)
    if axis is None or len(axis.segments) != 1:
        raise SurgeryError(f"{layer._widths.label}: its units are those of several dims. Change one of those.")
    ((dim, _, inner),) = axis.segments
    width = after // inner
    active = of_width(dim, dim.staged, width).active
    shared = {id(b.tensor): b for b in dim.bindings if isinstance(b.tensor, nn.Parameter)}
    allocated = sum(
        _elements(b.tensor, b.layer.tensor_axes()[b.name], dim, width, max(width, dim.capacity)) - b.tensor.numel() for b in shared.values()
    )
    return Cost(active, allocated)
