"""What each module becomes: one of the elastic layers where that computes the same, otherwise a view of its own tensors and sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import layers
from ..layers import ElasticLayer
from .axes import Axes
from .sizes import leading
from .structure import Structure, atoms, mix, restrict, size
from .verify import Place

#: By the class whose ``forward`` a module runs: the elastic layer that takes its place.
LAYERS: dict[type[nn.Module], type[ElasticLayer]] = {
    layer.dense_class: layer
    for layer in vars(layers).values()
    if isinstance(layer, type) and issubclass(layer, ElasticLayer) and hasattr(layer, "dense_class")
}


_KNOWN_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


@dataclasses.dataclass
class Form:
    """What a module becomes.

    Attributes:
        layer: the class that takes its place, or ``None``.
        axes: of a layer, by the names of its constructor.
        tensors: of a view, the axes of each parameter and buffer.
        sizes: attributes and the axes that they follow; a list for a tuple's elements.
        produced: the axes of the units that the module makes.
        newborn: of a view, what newborn units get.
        mixed: of a view, whether newborn units change what it gives.
    """

    layer: type[ElasticLayer] | None = None
    axes: dict[str, Structure] = dataclasses.field(default_factory=dict)
    tensors: dict[str, list[Structure]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    produced: list[Structure] = dataclasses.field(default_factory=list)
    newborn: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    mixed: bool = False


def form_of(module: nn.Module, axes: Axes, follows: Mapping[Place, Structure]) -> Form:
    """What a module becomes."""
    tensors = {key: tensor for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    own = {key: axes.tensors[axes.names[id(tensor)]] for key, tensor in tensors.items() if axes.names.get(id(tensor)) in axes.tensors}
    sizes = _sizes(module, follows)
    if not any(_elastic(axis, axes) for tensor in own.values() for axis in tensor) and not _elastic_norm(module, axes):
        return Form(sizes=sizes)
    layer = _layer(module, axes)
    if layer is not None:
        arguments = _arguments(module, own, axes)
        others = [name for name in sizes if not isinstance(getattr(layer, name, None), property)]
        if arguments is not None and not others:
            first = next(iter(arguments.values()))
            return Form(layer, arguments, produced=[first])

    if module in axes.normalised and isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm) and getattr(module, "num_groups", 1) == 1:
        mix(axes.normalised[module], "a norm runs over it")  # as it is, it counts zeros
        restrict(axes.normalised[module], "a norm runs over it")

    def name(key: str) -> str:
        return axes.names[id(tensors[key])]

    newborn = {key: _newborn(name(key), tensor, axes) for key, tensor in own.items()}
    produced = [axis for key, tensor in own.items() for axis, birth in zip(tensor, newborn[key], strict=True) if birth != "zero"]
    mixed = any(_mixes(name(key), tensor, axes) for key, tensor in own.items())
    return Form(tensors=own, sizes=sizes, produced=produced, newborn=newborn, mixed=mixed)


def _mixes(name: str, tensor: list[Structure], axes: Axes) -> bool:
    """Whether it is unknown what zeros in a weight do, since code computes another from it first."""
    matrix = sum(size(axis) > 1 for axis in tensor) > 1
    return matrix and any(_elastic(a, axes) for a in tensor) and not any(known == name for known, _ in (*axes.consumed, *axes.produced))


def _elastic(axis: Structure, axes: Axes) -> bool:
    return any(axes.elastic(atom) for atom in atoms(axis))


def _elastic_norm(module: nn.Module, axes: Axes) -> bool:
    return module in axes.normalised and _elastic(axes.normalised[module], axes)


def _sizes(module: nn.Module, follows: Mapping[Place, Structure]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (owner, name, index), axis in follows.items():
        if owner is not module:
            continue
        if index is None:
            found[name] = axis
        else:
            items = found.setdefault(name, [None] * len(module.__dict__[name]))
            items[index] = axis
    return found


def _layer(module: nn.Module, axes: Axes) -> type[ElasticLayer] | None:
    """The layer that computes what the module does, if its tensors are used by nobody else."""
    hooked = bool(module._forward_pre_hooks) and "weight" not in module._parameters  # a hook computes it, as the old weight_norm does
    if hooked or getattr(module, "parametrizations", None):
        return None
    dense = next((cls for cls in type(module).__mro__ if cls in LAYERS), None)
    if dense is None or type(module).forward is not dense.forward:
        return None
    layer = LAYERS[dense]
    tensors = {key: t for key, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if not set(tensors) <= _KNOWN_TENSORS:
        return None
    for tensor in tensors.values():
        name = axes.names.get(id(tensor))
        readers = axes.readers.get(name or "", {})
        if any(id(tensor) not in {id(t) for t in (*r._parameters.values(), *r._buffers.values())} for r in readers):
            return None
    return layer


def _arguments(module: nn.Module, own: Mapping[str, list[Structure]], axes: Axes) -> dict[str, Structure] | None:
    """The axes of a layer by the names of its constructor, that of the produced units first; ``None`` if it cannot have such axes."""
    if isinstance(module, nn.Linear):
        return {"out_dim": own["weight"][0], "in_dim": own["weight"][1]}
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return None
        return {"out_dim": own["weight"][1], "in_dim": own["weight"][0]}
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, own["weight"], axes)
    axis = axes.normalised.get(module)
    if axis is None:
        axis = next(iter(own.values()))[0]
    if (
        isinstance(module, nn.GroupNorm)
        and module.num_groups > 1
        and not _whole_groups(axis, module.num_channels // module.num_groups, axes)
    ):
        return None
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and any(_elastic(a, axes) for tensor in own.values() for a in tensor[1:]):
        return None
    return {"dim": axis}


def _convolution(module: nn.modules.conv._ConvNd, weight: list[Structure], axes: Axes) -> dict[str, Structure] | None:
    into, out = (0, 1) if module.transposed else (1, 0)
    if module.groups == 1:
        return {"out_dim": weight[out], "in_dim": weight[into]}
    entered = axes.entered.get(module)
    first_width = size(weight[0]) // module.groups
    if entered is None or _elastic(weight[1], axes) or not _whole_groups(weight[0], first_width, axes):
        return None
    groups = leading(weight[0], module.groups)
    if groups is None:
        return None
    if module.transposed:
        return {"out_dim": (*groups, *weight[1]), "in_dim": weight[0]}
    return {"out_dim": weight[0], "in_dim": (*groups, *weight[1])}


def _whole_groups(axis: Structure, width: int, axes: Axes) -> bool:
    """Whether units of an axis are groups of ``width`` or several of them."""
    return all(stretch.inner % width == 0 for stretch in axes.stretches(axis))


def _newborn(name: str, tensor: list[Structure], axes: Axes) -> list[str]:
    return ["zero" if (name, index) in axes.consumed else "draw" for index in range(len(tensor))]
