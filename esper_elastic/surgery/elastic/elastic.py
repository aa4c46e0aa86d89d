"""Edits of elastic layers: a plain layer made elastic on given axes, units within and beyond capacity, a bias, a window.

A layer keeps its identity and those of its parameters. Values that are written in place, and storage that is swapped, are reported to
:mod:`undo`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ... import followers
from ...control import Axis, ControlBlock, DerivedAxis, ElasticDim
from ...convert.dynamic import become_layer, elastic_class
from ...convert.forms import LAYERS
from ...errors import SurgeryError, TopologyError
from ...layers import ElasticLayer, ElasticView, Switchable
from ...layers.base import write_active
from ...layers.units import distinct, places
from ...layers.view import Size
from ...model import put_in_layout
from ..undo import added, removed, save_objects, save_values
from ..widths.tensors import replace_storage, zeros
from .capacity import reallocate

_FIXED = "nothing else in the model would follow it"

#: Layers without sizes of their own, which give the channels that they take.
_PASSING = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


def make_elastic(layer: nn.Module, *, in_axis: Axis | None = None, out_axis: Axis | None = None) -> nn.Module:
    """Let a plain layer follow the dims of the model that it is put into.

    Args:
        layer: one that has an elastic form, an activation or other layer without sizes, or an ``nn.Sequential`` of such.
        in_axis: that its input's channels run along; ``None`` where nothing in the model follows them, which keeps them as they are.
        out_axis: likewise of its output.

    Returns:
        the layer.

    Effects:
        It is another class now, with the same identity, parameters and hooks; what it computes is bit for bit the same. Parameters have
        the shape of the axes' capacity, dormant parts finite values of the same law. Within a sequence new dims come to be, free to change.

    Raises:
        TopologyError: it has no elastic form. Nothing has changed.
        CapacityError: its sizes are not the active ones of the axes. Nothing has changed.
    """
    save_objects(layer)
    done = _Made()
    _make(layer, in_axis, out_axis, done)
    layout = next((user.layout for axis in (in_axis, out_axis) if axis is not None for dim in axis.dims for user in dim.users()), "compact")
    for module, donor in done.donors:
        _take_storage(module, donor)
        become_layer(module, elastic_class(module, type(donor)), donor)
        put_in_layout(module, layout)
    return layer


@dataclasses.dataclass
class _Made:
    """Elastic twins of plain layers, made before anything is touched."""

    donors: list[tuple[nn.Module, ElasticLayer]] = dataclasses.field(default_factory=list)


def _make(layer: nn.Module, in_axis: Axis | None, out_axis: Axis | None, done: _Made) -> Axis | None:
    """The axis of what a layer gives."""
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
        return _make_chain(layer, in_axis, out_axis, done)
    dense = next((kind for kind in type(layer).__mro__ if kind in LAYERS), None)
    if dense is None or type(layer).forward is not dense.forward or getattr(layer, "parametrizations", None):
        _require_without_sizes(layer, in_axis, out_axis)
        return in_axis if in_axis is not None else out_axis
    arguments = _arguments(layer, in_axis, out_axis)
    elastic: Any = LAYERS[dense]
    donor = elastic.from_dense(layer, **arguments)
    done.donors.append((layer, donor))
    made: Axis = donor._widths.axes[0]
    return made


def _make_chain(layers: nn.Sequential, in_axis: Axis | None, out_axis: Axis | None, done: _Made) -> Axis | None:
    makers = [layer for layer in layers if _makes_units(layer)]
    axis = in_axis
    for layer in layers:
        if not _makes_units(layer):
            axis = _make(layer, axis, axis, done) if makers else _make(layer, axis, out_axis, done)
        elif layer is makers[-1]:
            axis = _make(layer, axis, out_axis, done)
        else:
            axis = _make(layer, axis, _own_dim(layer), done)
    return axis


def _makes_units(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding) or (
        isinstance(layer, nn.Sequential) and any(_makes_units(each) for each in layer)
    )


def _own_dim(layer: nn.Module) -> Axis | None:
    """A free dim for the units of a layer that only its sequence uses; with groups they follow the input."""
    if isinstance(layer, nn.Sequential):
        return _own_dim([each for each in layer if _makes_units(each)][-1])
    if isinstance(layer, nn.Linear):
        return ElasticDim(layer.out_features)
    if isinstance(layer, nn.Embedding):
        return ElasticDim(layer.embedding_dim)
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1:
        return ElasticDim(layer.out_channels)
    return None


def _arguments(layer: Any, in_axis: Axis | None, out_axis: Axis | None) -> dict[str, Axis]:
    if isinstance(layer, nn.Linear):
        return {"in_dim": in_axis or _fixed(layer.in_features), "out_dim": out_axis or _fixed(layer.out_features)}
    if isinstance(layer, nn.Embedding):
        return {"in_dim": in_axis or _fixed(layer.num_embeddings), "out_dim": out_axis or _fixed(layer.embedding_dim)}
    if isinstance(layer, nn.modules.conv._ConvNd):
        given = {name: axis for name, axis in (("in_dim", in_axis), ("out_dim", out_axis)) if axis is not None}
        if layer.groups == 1:
            return {"in_dim": _fixed(layer.in_channels), "out_dim": _fixed(layer.out_channels)} | given
        return given or {"in_dim": _fixed(layer.in_channels)}
    if in_axis is not None and out_axis is not None and in_axis.segments != out_axis.segments:
        raise TopologyError(
            f"{type(layer).__name__}: expected one axis, as it gives the units that it takes, got {in_axis!r}, {out_axis!r}."
        )
    sizes = {name: getattr(layer, name, None) for name in ("num_features", "num_channels", "normalized_shape")}
    size: Any = next(value for value in sizes.values() if value is not None)
    return {"dim": in_axis or out_axis or _fixed(size if isinstance(size, int) else size[0])}


def _require_without_sizes(layer: nn.Module, in_axis: Axis | None, out_axis: Axis | None) -> None:
    """Refuse a layer that does not take any width, or whose units are not those that enter it."""
    passes = isinstance(layer, _PASSING) or type(layer).__module__ == nn.ReLU.__module__
    own = [parameter for parameter in (*layer.parameters(), *layer.buffers()) if parameter.numel() > 1]
    if own or not passes:
        raise TopologyError(
            f"{type(layer).__name__}: has no elastic form, so it cannot follow the dims of the model. Expected one of "
            f"{', '.join(sorted(kind.__name__ for kind in LAYERS))}, an activation, a pooling or dropout layer, or a Sequential of these."
        )
    if in_axis is not None and out_axis is not None and in_axis.segments != out_axis.segments:
        raise TopologyError(f"{type(layer).__name__}: gives the units that it takes, but they are on two axes: {in_axis!r}, {out_axis!r}.")


def _fixed(size: int) -> ElasticDim:
    dim = ElasticDim(size, minimum=size)
    dim.rigid = _FIXED
    return dim


def _take_storage(module: nn.Module, donor: ElasticLayer) -> None:
    """Let the tensors of a module be as large as those of its elastic twin."""
    for name, axes in donor.tensor_axes().items():
        tensor = module._parameters.get(name, module._buffers.get(name))
        storage = donor.storage(name)
        if tensor is None or storage is None or storage.shape == tensor.shape:
            continue

        def write(made: Tensor, old: Tensor, axes: tuple[Axis | None, ...] = axes) -> None:
            write_active(made, axes, old)

        replace_storage(tensor, storage.detach(), write)


# Switches and dims around an edit


def govern(model: nn.Module) -> None:
    """Put what edits have brought into blocks under their switches."""
    for module in model.modules():
        if isinstance(module, Switchable):
            module.govern_inside()


def let_go(module: nn.Module, model: nn.Module) -> None:
    """Give what has left a model dims of its own, as wide as those that it shared with the model, so that neither follows the other."""
    staying = {id(part) for part in model.modules()}
    leaving = {id(part): part for part in module.modules() if isinstance(part, ElasticLayer) and id(part) not in staying}
    shared = [dim for layer in leaving.values() for axis in layer._widths.axes for dim in axis.dims]
    shared = [dim for dim in shared if any(id(user) not in leaving for user in dim.users())]
    own = {dim: _copy_of(dim) for dim in shared}
    for layer in leaving.values():
        _exchange(layer, own)
    for dim in own:
        dim._users = [reference for reference in dim._users if id(reference()) not in leaving]


def _copy_of(dim: ElasticDim) -> ElasticDim:
    made = ElasticDim(dim.active, dim.capacity, minimum=dim.minimum, multiple_of=dim.multiple_of, name=dim.name)
    made.rigid, made.compact_only, made.mixed = dim.rigid, dim.compact_only, dim.mixed
    return made


def _exchange(layer: Any, own: dict[ElasticDim, ElasticDim]) -> None:
    """Let a layer have other dims in the places of those that ``own`` names."""
    known: dict[int, Axis] = {}

    def renewed(value: Any) -> Any:
        if isinstance(value, Axis) and any(dim in own for dim in value.dims):
            if id(value) not in known:
                parts = [segment._replace(dim=own.get(segment.dim, segment.dim)) for segment in value.segments]
                known[id(value)] = parts[0].dim if isinstance(value, ElasticDim) else DerivedAxis(tuple(parts))
            return known[id(value)]
        if isinstance(value, Size):
            return Size(renewed(value.axis), value.over)
        if isinstance(value, tuple):
            return tuple(renewed(item) for item in value)
        return {key: renewed(item) for key, item in value.items()} if type(value) is dict else value

    for name, value in vars(layer).items():
        if isinstance(value, Axis) or name in ("_axes", "_sizes"):
            vars(layer)[name] = renewed(value)
    layer._widths.axes = renewed(layer._widths.axes)
    dims = {dim for axis in layer._widths.axes for dim in axis.dims}
    ControlBlock.merge(dim.block for dim in dims)
    for dim in dims:
        dim.attach(layer)
    layer.bind_control()


# Units


@dataclasses.dataclass
class Changed:
    """What a change of units has done.

    Attributes:
        paths: of the layers that have the dim.
        steps: what was done, a line each.
        function_kept: whether the network computes what it did.
    """

    paths: list[str]
    steps: list[str]
    function_kept: bool


#: Which of a layer's axes an argument of its constructor is the size of.
_SIDES = {
    "out_channels": "out_dim",
    "out_features": "out_dim",
    "embedding_dim": "out_dim",
    "in_channels": "in_dim",
    "in_features": "in_dim",
}
_SIDES |= {"num_embeddings": "in_dim", "num_features": "dim", "num_channels": "dim", "normalized_shape": "dim"}


def grow_units(model: nn.Module, path: str, name: str, size: int, preserve: bool = True) -> Changed:
    """Give a dim of an elastic layer another width, beyond its capacity too.

    Args:
        model: that holds every layer of the dim.
        path: of the layer.
        name: of the size, as the layer's constructor has it.
        size: to be active.
        preserve: whether growth has to keep the function; where it cannot, it is refused.

    Effects:
        Fewer units: the last ones go to sleep. More: the newborn are initialised as ``ElasticDim.grow`` does. Beyond capacity: the dim
        first gets the capacity that is asked for, see :func:`reallocate`.

    Raises:
        SurgeryError: the size is that of several dims, or splits a unit. Nothing has changed.
        CapacityError: the width is not one that the dim takes, or the function cannot be kept. Nothing has changed.
        OptimizerError: an unguarded optimizer holds state for the parameters. Nothing has changed.
    """
    layer: Any = model.get_submodule(path)
    where = f"{path!r} ({type(layer).__name__}): {name}"
    axis = _axis_of(layer, name)
    if axis is None:
        raise TopologyError(f"{where}: expected an elastic layer with that size. Resize the dims of the model: ee.dims(model).")
    if len(axis.segments) > 1:
        parts = ", ".join(dim.label for dim in axis.dims)
        raise TopologyError(f"{where}: it is made of several dims side by side ({parts}). Change the layers that make them.")
    dim, _, inner = axis.segments[0]
    if size % inner:
        raise SurgeryError(
            f"{where}: expected a multiple of {inner}, as many as one unit of {dim.label} has here, got {size}. "
            f"The nearest: {size - size % inner} and {size - size % inner + inner}."
        )
    before, n = dim.active, size // inner
    dim.admit(n, max(n, dim.capacity))
    users = {id(user) for user in dim.users()}
    paths = [each for each, module in model.named_modules() if id(module) in users]
    if n == before:
        return Changed([], [], True)
    steps = []
    if n < before:
        dim.resize(n)
        steps.append(f"{dim.label}: {before} -> {n} units active")
        return Changed(paths, steps, False)
    if n > dim.capacity:
        steps.append(f"{dim.label}: capacity {dim.capacity} -> {n}")
        reallocate(model, dim, n)
    _save_newborn(dim, n)
    dim.grow(n, exact=preserve)
    steps.append(f"{dim.label}: {before} -> {n} units active")
    return Changed(paths, steps, preserve)


def _axis_of(layer: Any, name: str) -> Axis | None:
    if not isinstance(layer, ElasticView):
        return getattr(layer, _SIDES[name], None)
    own = layer.tensor_axes().get("weight", ())
    index = {"out_dim": 0, "in_dim": 1, "dim": 0}[_SIDES[name]]
    if isinstance(layer, nn.Embedding | nn.modules.conv._ConvTransposeNd):
        index = 1 - index
    return own[index] if index < len(own) else None


def _save_newborn(dim: ElasticDim, n: int) -> None:
    """Report what ``grow`` is about to write: values, gradients and state of the units that it wakes."""
    active = dim.active
    for place in distinct(places(dim, f"{dim.label}: grow")):
        tensors = [place.tensor, place.tensor.grad if place.tensor.is_leaf else None]
        for follower in followers.followers_of(place.tensor):
            tensors += follower.state.get(place.tensor, {}).values()  # type: ignore[attr-defined]
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            if tensor.shape == place.tensor.shape:
                save_values(place.units(tensor).narrow(place.unit_axis, active, n - active))
            elif tensor.dim() == place.tensor.dim():
                save_values(tensor)


# One layer


def add_bias(layer: Any) -> nn.Parameter:
    """Give a linear layer or convolution, elastic or plain, a bias of zeros, at capacity.

    Raises:
        TopologyError: other code reads its tensors, so that it is not known what a bias would do.
    """
    if isinstance(layer, ElasticView):
        raise TopologyError(f"{layer._widths.label}: bias: cannot be added, since other code reads the tensors of the layer.")
    if isinstance(layer, ElasticLayer):
        size = layer.out_dim.capacity  # type: ignore[union-attr]
    else:
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    bias = nn.Parameter(layer.weight.detach().new_zeros(size))
    layer.register_parameter("bias", bias)
    added(bias, layer.weight)
    return bias


def drop_bias(layer: Any) -> None:
    """Take the bias of a linear layer or convolution, elastic or plain, away."""
    if isinstance(layer, ElasticView):
        raise TopologyError(f"{layer._widths.label}: bias: cannot be removed, since other code reads the tensors of the layer.")
    removed(layer._parameters["bias"])
    layer._parameters["bias"] = None


def set_kernel(conv: Any, size: tuple[int, ...]) -> None:
    """Give a convolution, elastic or plain, another window: what overlaps stays, counted from the centres of both, and the rest is zero."""
    weight: Tensor = conv._parameters["weight"]  # a view's attribute of that name is its active part
    before = tuple(weight.shape[2:])
    offsets = [(new - 1) // 2 - (old - 1) // 2 for new, old in zip(size, before, strict=True)]
    lengths = [min(a - max(0, at), b - max(0, -at)) for at, a, b in zip(offsets, size, before, strict=True)]
    new = tuple(slice(max(0, at), max(0, at) + length) for at, length in zip(offsets, lengths, strict=True))
    old = tuple(slice(max(0, -at), max(0, -at) + length) for at, length in zip(offsets, lengths, strict=True))

    def write(made: Tensor, kept: Tensor) -> None:
        made[(slice(None), slice(None), *new)] = kept[(slice(None), slice(None), *old)]

    with torch.no_grad():
        storage = zeros(weight, (*weight.shape[:2], *size))
        write(storage, weight)
    replace_storage(weight, storage, write)
    conv.kernel_size = size


def require_plain_groups(layer: nn.Module, path: str, name: str) -> None:
    """Refuse another number of groups of an elastic layer.

    Raises:
        TopologyError: it is one.
    """
    if isinstance(layer, ElasticLayer):
        raise TopologyError(
            f"{path!r} ({type(layer).__name__}): {name}: in an elastic layer the number of groups follows a dim, and the width of each is "
            "fixed. Resize the dim; for groups of another width, ee.export the model, edit it and make it elastic again."
        )
