"""Changing a layer in place: its channels with everything coupled to them, its window, its groups, its bias, its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...convert.arguments import nearest
from ...errors import SurgeryError, TopologyError
from ...layers import ElasticLayer
from ..elastic.elastic import add_bias, drop_bias, grow_units, require_plain_groups, set_kernel
from ..specs.specs import LayerSpec
from ..undo import added, removed
from ..widths.tensors import replace_storage
from .edit import Edit

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

#: Which axis of which tensor a number of units is, by the name that the layer's constructor has for it.
_UNITS: dict[str, int] = {"out_channels": 0, "out_features": 0, "in_channels": 1, "in_features": 1, "num_features": 0, "num_channels": 0}
_UNITS |= {"embedding_dim": 1, "num_embeddings": 0}


def modify_layer(edit: Edit, path: str, config: Mapping[str, Any]) -> None:
    """Change what a layer was constructed with."""
    layer = edit.layer(path)
    if not isinstance(config, Mapping) or not config:
        raise SurgeryError(f"modify_layer: new_config: expected a dict of what to change, as {{'out_channels': 96}}, got {config!r}.")
    changes = dict(config)
    allowed = _allowed(layer)
    for name in changes:
        if name not in allowed:
            listed = ", ".join(sorted(allowed)) or "nothing"
            raise SurgeryError(
                f"{path!r} ({type(layer).__name__}): new_config: {name!r} is nothing that can be changed here. "
                f"{nearest(str(name), sorted(allowed))} Of this layer: {listed}."
            )
    edit.check_called(path)
    edit.name = path
    _check_own(edit, path, layer, changes)
    follows = "kernel_size" in changes and "padding" not in changes
    padding = _padding_for(path, layer, changes) if follows else None
    for name in sorted(changes, key=list(allowed).index):  # units first, which are tried on the way
        allowed[name](edit, path, name, changes[name])
    if follows:
        _set_window(edit, path, "padding", padding)
    dense: Any = next((kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.modules.")), nn.Module)
    if type(layer).forward is not dense.forward and not isinstance(layer, ElasticLayer):
        edit.details["function_kept"] = False  # code of its own, which may make anything of new weights
    edit.touch(path)


_Change = Callable[[Edit, str, str, Any], None]


def _allowed(layer: nn.Module) -> dict[str, _Change]:
    """What can be changed of a layer, in the order in which it is done."""
    if isinstance(layer, _CONVS):
        changes: dict[str, _Change] = {"out_channels": _units, "in_channels": _units, "groups": _groups, "kernel_size": _kernel}
        return changes | {"stride": _window, "padding": _window, "dilation": _window, "bias": _bias}
    if isinstance(layer, nn.Linear):
        return {"out_features": _units, "in_features": _units, "bias": _bias}
    if isinstance(layer, nn.Embedding):
        return {"embedding_dim": _units, "num_embeddings": _units}
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return {"num_features": _units, "eps": _number, "momentum": _number}
    if isinstance(layer, nn.GroupNorm):
        return {"num_channels": _units, "num_groups": _norm_groups, "eps": _number}
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": _normalized, "eps": _number}
    if isinstance(layer, _DROPOUTS):
        return {"p": _rate}
    if _is_activation(layer):
        return {"activation": _activation}
    return {}


def _is_activation(layer: nn.Module) -> bool:
    return type(layer).__module__ == nn.ReLU.__module__ and not isinstance(layer, nn.MultiheadAttention)


def _check_own(edit: Edit, path: str, layer: nn.Module, changes: Mapping[str, Any]) -> None:
    """Refuse what would change other modules than this one without their knowing.

    Raises:
        TopologyError: a tensor of the layer is computed, shared, or read by other code.
    """
    where = f"{path!r} ({type(layer).__name__})"
    if getattr(layer, "parametrizations", None) or (
        layer._forward_pre_hooks and hasattr(layer, "weight") and "weight" not in layer._parameters
    ):
        raise TopologyError(f"{where}: its weight is computed from other tensors. Remove the parametrization first.")
    if set(changes) <= {"p", "activation", "eps", "momentum"} | _UNITS.keys():
        return  # units are changed for all who share them
    own = {id(p): name for name, p in layer.named_parameters(recurse=False)}
    for other_path, other in edit.paths.items():
        for name, parameter in other.named_parameters(recurse=False):
            if other is not layer and id(parameter) in own:
                raise TopologyError(f"{where}: its {own[id(parameter)]} is shared with {other_path}.{name}. Give it one of its own first.")
    for name in own.values():
        reader = edit.other_reader(path, name)
        if reader is not None:
            raise TopologyError(f"{where}: its {name} is read by {reader}, outside of its own forward, which would not know of the change.")


# Units


def _units(edit: Edit, path: str, name: str, size: Any) -> None:
    layer: Any = edit.module(path)
    size = _integer(path, name, size)
    if isinstance(layer, ElasticLayer):
        _grow_units(edit, path, name, size)
        return
    if size == getattr(layer, name):
        return
    tensor, axis = _axis(layer, name)
    if getattr(layer, "_parameters", {}).get(tensor) is None and getattr(layer, "_buffers", {}).get(tensor) is None:
        raise TopologyError(f"{path!r} ({type(layer).__name__}): it has no tensors of its own. Change the layer that makes its units.")
    before = getattr(layer, name)
    edit.done(path, f"{name} {before} -> {size}")
    edit.resize(f"{path}.{tensor}", axis, size, returned=True)


def _grow_units(edit: Edit, path: str, name: str, size: int) -> None:
    changed = grow_units(edit.model, path, name, size, edit.preserve)
    edit.steps.extend(changed.steps)
    edit.touch(*changed.paths)
    if not changed.function_kept:
        edit.details["function_kept"] = False


def _axis(layer: Any, name: str) -> tuple[str, int]:
    axis = _UNITS[name]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        axis = 1 - axis
    tensor = "weight" if getattr(layer, "weight", None) is not None else "running_mean"
    return tensor, axis


def _normalized(edit: Edit, path: str, name: str, size: Any) -> None:
    layer: Any = edit.module(path)
    if len(layer.normalized_shape) != 1 or (layer.weight is None and not isinstance(layer, ElasticLayer)):
        raise TopologyError(f"{path!r}: expected a norm with weights over one axis, got {layer}. Change the layer that makes its units.")
    given = size[0] if isinstance(size, list | tuple) and len(size) == 1 else size
    size = _integer(path, name, given)
    if isinstance(layer, ElasticLayer):
        _grow_units(edit, path, name, size)
        return
    before = layer.normalized_shape[0]
    if size != before:
        edit.done(path, f"{name} {before} -> {size}")
        edit.resize(f"{path}.weight", 0, size, returned=True)


def _integer(path: str, name: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= 1 << 20:
        raise SurgeryError(f"{path!r}: {name}: expected an integer from {least} to {1 << 20}, got {value!r}.")
    return value


# Windows of convolutions


def _groups(edit: Edit, path: str, name: str, groups: Any) -> None:
    conv: Any = edit.module(path)
    require_plain_groups(conv, path, name)
    groups = _integer(path, name, groups)
    into, out, present = conv.in_channels, conv.out_channels, conv.groups
    if into % groups or out % groups:
        raise SurgeryError(f"{path!r}: groups: expected a divisor of {into} and {out} channels, got {groups}.")
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        raise TopologyError(f"{path!r}: groups of a transposed convolution cannot be changed.")
    if groups == present:
        return

    def regroup(weight: Tensor) -> Tensor:
        """Each output with the inputs of its new group; pairs that were in no group together begin at zero."""
        dense = weight.new_zeros(out, into, *weight.shape[2:])
        rows, columns = out // present, into // present
        for group in range(present):
            dense[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = weight[group * rows : (group + 1) * rows]
        rows, columns = out // groups, into // groups
        return torch.cat([dense[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])

    def write(made: Tensor, old: Tensor) -> None:
        made.copy_(regroup(old))

    if present % groups:
        edit.details["function_kept"] = False
    replace_storage(conv.weight, regroup(conv.weight.detach()), write)
    conv.groups = groups
    edit.done(path, f"groups {present} -> {groups}")


def _kernel(edit: Edit, path: str, name: str, size: Any) -> None:
    conv: Any = edit.module(path)
    size = _window_of(path, name, size, len(conv.kernel_size))
    before = conv.kernel_size
    if size == before:
        return
    set_kernel(conv, size)
    if any(a < b for a, b in zip(size, before, strict=True)):
        edit.details["function_kept"] = False
    edit.done(path, f"kernel_size {before} -> {size}")


def _window_of(path: str, name: str, value: Any, rank: int, least: int = 1) -> tuple[int, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,) * rank
    if len(items) != rank or any(type(item) is not int or not least <= item <= 1024 for item in items):
        raise SurgeryError(f"{path!r}: {name}: expected an integer from {least} to 1024, or {rank} of them, got {value!r}.")
    return items


def _padding_for(path: str, conv: Any, changes: Mapping[str, Any]) -> Any:
    """The padding with which a convolution of another window gives as many pixels as it did."""
    rank = len(conv.kernel_size)
    kernel = _window_of(path, "kernel_size", changes["kernel_size"], rank)
    dilation = _window_of(path, "dilation", changes.get("dilation", conv.dilation), rank)
    if isinstance(conv.padding, str):
        return conv.padding
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    total = [2 * p + new - old for p, new, old in zip(conv.padding, reach, before, strict=True)]
    if all(n >= 0 and n % 2 == 0 for n in total):
        return tuple(n // 2 for n in total)
    stride = _window_of(path, "stride", changes.get("stride", conv.stride), rank)
    if total == reach and set(stride) == {1} and not isinstance(conv, nn.modules.conv._ConvTransposeNd):
        return "same"
    raise SurgeryError(
        f"{path!r}: kernel_size: no padding lets a window of {kernel} give as many pixels as {conv.kernel_size} with padding "
        f"{conv.padding} does. Give a padding too."
    )


def _window(edit: Edit, path: str, name: str, value: Any) -> None:
    conv: Any = edit.module(path)
    before = getattr(conv, name)
    if name == "padding" and isinstance(value, str):
        if value not in ("same", "valid") or isinstance(conv, nn.modules.conv._ConvTransposeNd):
            raise SurgeryError(f"{path!r}: padding: expected integers, 'same' or 'valid', got {value!r}.")
    else:
        value = _window_of(path, name, value, len(conv.kernel_size), 0 if name == "padding" else 1)
    if value != before:
        _set_window(edit, path, name, value)
        edit.details["function_kept"] = False


def _set_window(edit: Edit, path: str, name: str, value: Any) -> None:
    conv: Any = edit.module(path)
    before = getattr(conv, name)
    if value == before:
        return
    setattr(conv, name, value)
    kind: Any = next(kind for kind in _CONVS if isinstance(conv, kind))
    options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
    try:
        twin = kind(1, 1, conv.kernel_size, device="meta", **options)
    except ValueError as error:
        raise SurgeryError(f"{path!r}: {name}: {error}. Got {value!r}.") from error
    conv._reversed_padding_repeated_twice = twin._reversed_padding_repeated_twice
    edit.done(path, f"{name} {before} -> {value}")


def _bias(edit: Edit, path: str, name: str, value: Any) -> None:
    layer: Any = edit.module(path)
    if type(value) is not bool:
        raise SurgeryError(f"{path!r}: bias: expected True or False, got {value!r}.")
    if value == (layer.bias is not None):
        return
    if value:
        add_bias(layer)
        edit.done(path, "bias added, at zero")
    else:
        drop_bias(layer)
        edit.details["function_kept"] = False
        edit.done(path, "bias removed")


# Norms, dropout, activations


def _norm_groups(edit: Edit, path: str, name: str, groups: Any) -> None:
    norm: Any = edit.module(path)
    require_plain_groups(norm, path, name)
    groups = _integer(path, name, groups)
    if norm.num_channels % groups:
        raise SurgeryError(f"{path!r}: num_groups: expected a divisor of {norm.num_channels} channels, got {groups}.")
    _set(edit, path, name, groups)


def _number(edit: Edit, path: str, name: str, value: Any) -> None:
    optional = name == "momentum" or isinstance(edit.module(path), nn.RMSNorm)
    if not (value is None and optional) and (type(value) not in (int, float) or not 0 <= value <= 1):
        raise SurgeryError(f"{path!r}: {name}: expected a number from 0 to 1, got {value!r}.")
    _set(edit, path, name, value)


def _rate(edit: Edit, path: str, name: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise SurgeryError(f"{path!r}: p: expected a probability from 0 to 1, got {value!r}.")
    _set(edit, path, name, float(value), keeps=True)


def _set(edit: Edit, path: str, name: str, value: Any, keeps: bool = False) -> None:
    layer: Any = edit.module(path)
    before = getattr(layer, name)
    if value != before:
        setattr(layer, name, value)
        if not keeps:
            edit.details["function_kept"] = False
        edit.done(path, f"{name} {before} -> {value}")


def _activation(edit: Edit, path: str, name: str, value: Any) -> None:
    """Another activation in the place of one, under each of its names, with its hooks."""
    layer = edit.module(path)
    spec = value if isinstance(value, LayerSpec) else LayerSpec(_activation_kind(path, value))
    made = spec.build()
    if not _is_activation(made):
        raise SurgeryError(
            f"{path!r}: activation: expected an activation, got {spec.kind}. Use remove_layer and add_layer for other layers."
        )
    made.to(**edit.like(layer)).train(layer.training)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
        setattr(made, hooks, getattr(layer, hooks))
    near = edit.neighbour(edit.module(path.rpartition(".")[0]))
    edit.replace(layer, made)
    for parameter in layer.parameters():
        removed(parameter)
    for parameter in made.parameters():
        added(parameter, near)
    edit.details["function_kept"] = False
    edit.done(path, f"{type(layer).__name__} -> {type(made).__name__}")


def _activation_kind(path: str, value: Any) -> str:
    """The class name of an activation, from however it is spelled."""
    known = {kind.__name__.lower(): kind.__name__ for kind in vars(nn.modules.activation).values() if isinstance(kind, type)}
    if not isinstance(value, str) or value.lower().replace("_", "") not in known:
        raise SurgeryError(f"{path!r}: activation: expected the name of an activation, as 'gelu', got {value!r}.")
    return known[value.lower().replace("_", "")]
