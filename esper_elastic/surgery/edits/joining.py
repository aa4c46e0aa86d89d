"""How what an edit brings into an elastic model comes to follow its dims: the axis at a place, and layers bound to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...control import Axis
from ...errors import SurgeryError, TopologyError
from ...layers import ElasticLayer, ElasticView, Switchable
from ...model import control_block, dims, resize
from ...ops.reference import active_slice
from ..elastic.channels import axes_at
from ..elastic.elastic import govern, make_elastic
from ..undo import save_values
from .edit import Edit
from .holder import EDITS, Carrier, Edits


def begin(edit: Edit) -> None:
    """Note at which widths an edit is made; where it repeats another one, set those of that one.

    Raises:
        SurgeryError: what the journal says of widths does not suit the model.
    """
    if not edit.elastic:
        return
    wanted = edit.said.get("widths", {})
    if not isinstance(wanted, Mapping):
        raise SurgeryError(f"widths: expected a dict from names of dims, as an edit of an elastic model has noted, got {wanted!r}.")
    resize(edit.model, wanted)
    edit.widths = {name: dim.active for name, dim in dims(edit.model).items()}


def settle(edit: Edit) -> None:
    """Put what has come into blocks under their switches, and all of it on one control block."""
    if edit.elastic and any(isinstance(module, ElasticLayer | Switchable) for module in edit.model.modules()):
        govern(edit.model)
        control_block(edit.model)


def axis_beyond(edit: Edit, path: str, side: str) -> Axis | None:
    """The axis of what enters a module, before all that edits have put before it, or of what leaves it, behind all they have put after it.

    Returns:
        ``None`` where it is not elastic, or not certain.
    """
    if not edit.elastic:
        return None
    edits = edit.module(path)._modules.get(EDITS)
    if isinstance(edits, Edits):
        names = edits.before if side == "in" else [name for name in reversed(edits.after) if not _is_skip(edits._modules[name])]
        path = f"{path}.{EDITS}.{names[0]}" if names else path
    return axis_of(edit, path, side)


def axis_of(edit: Edit, path: str, side: str) -> Axis | None:
    """The axis of what a module's own forward takes or gives; ``None`` where it is not elastic, or not certain."""
    if not edit.elastic:
        return None
    for recorded in (edit.run_around, edit.run_of_all):
        found = axes_at(edit.model, path, side, lambda recorded=recorded: recorded(path))  # type: ignore[misc]
        if found is not None:
            return found
    return None


def same(one: Axis | None, other: Axis | None) -> bool:
    """Whether two places have the same units, as far as dims tell."""
    return one is other or (one is not None and other is not None and one.segments == other.segments)


def active_shape(shape: tuple[int, ...] | None, index: int, axis: Axis | None) -> tuple[int, ...] | None:
    """A shape with the active units alone along the axis that runs there."""
    if shape is None or axis is None:
        return shape
    index %= len(shape)
    return (*shape[:index], axis.active, *shape[index + 1 :]) if shape[index] == _shown(axis) else shape


def active_part(tensor: Tensor, index: int, axis: Axis | None) -> Tensor:
    """The active units of an activation in either layout."""
    if axis is None or tensor.shape[index] == axis.active:
        return tensor
    return active_slice(tensor, index % tensor.dim(), axis)


def _is_skip(module: Any) -> bool:
    return isinstance(getattr(module, "carrier", None), Carrier)


def _shown(axis: Axis) -> int:
    static = any(user.layout == "static" for dim in axis.dims for user in dim.users())
    return axis.capacity if static else axis.active


# Layers


def follow(layer: nn.Module, in_axis: Axis | None, out_axis: Axis | None) -> None:
    """Bind a layer to the axes of the place that it comes to; where there are none it stays as it is.

    Raises:
        TopologyError: it has no elastic form, or has dims of its own.
        CapacityError: its sizes are not those of the axes.
    """
    if in_axis is None and out_axis is None:
        return
    own = [part for part in layer.modules() if isinstance(part, ElasticLayer)]
    if not own:
        make_elastic(layer, in_axis=in_axis, out_axis=out_axis)
        return
    entering: Any = getattr(own[0], "dim", None) or getattr(own[0], "in_dim", None)
    leaving: Any = getattr(own[-1], "dim", None) or getattr(own[-1], "out_dim", None)
    if isinstance(own[0], ElasticView) or not same(entering, in_axis) or not same(leaving, out_axis):
        raise TopologyError(
            f"layer: {type(layer).__name__} is elastic, with dims that are not those of the place, {in_axis!r}. Give a plain layer, which "
            "will follow them, or make it with these dims."
        )


def widen_identity(layer: nn.Module) -> None:
    """Let a layer that passes on its active units pass on the dormant ones too, when they are woken."""
    if not isinstance(layer, ElasticLayer):
        return
    tensors: Any = layer
    weight, bias = tensors.weight.detach(), tensors.bias
    centre = tuple(size // 2 for size in weight.shape[2:])
    save_values(weight, *([] if bias is None else [bias.detach()]))
    weight.zero_()
    units = torch.arange(weight.shape[0], device=weight.device)
    weight[(units, units % weight.shape[1], *centre)] = 1
    if bias is not None:
        bias.detach().zero_()


def silence(module: nn.Module) -> None:
    """Let every parameter be zero, in active and dormant units."""
    parameters = [parameter.detach() for parameter in module.parameters()]
    save_values(*parameters)
    for parameter in parameters:
        parameter.zero_()
