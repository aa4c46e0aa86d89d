"""Adding a layer: where it goes, what weights it starts with, and what follows if it gives another number of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...control import Axis
from ...errors import SurgeryError, TopologyError
from ..specs.specs import LayerSpec
from ..undo import added, save_objects, save_values
from .edit import Edit, fake_shape
from .edited import edits_of
from .holder import gate_name
from .joining import active_shape, axis_beyond, follow, widen_identity

_SIDES = ("before", "after")

_IDENTITY = "starts as the identity"

#: Layers that keep the function of a network in evaluation as they are.
NEUTRAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def add_layer(edit: Edit, position: str, layer: nn.Module | LayerSpec) -> None:
    """Insert a layer before or after a module and what has been inserted there: ``"before_<path>"`` or ``"after_<path>"``."""
    side, path = parse_position(position)
    host = edit.layer(path)
    edit.check_called(path)
    made = layer.build() if isinstance(layer, LayerSpec) else layer
    _check_layer(edit, made)
    like = edit.like(host)
    save_objects(made)
    made.to(**like)
    axis = axis_beyond(edit, path, "in" if side == "before" else "out")
    edits = edits_of(host, path)
    name = edits.free_name(side)
    full = f"{path}.edits.{name}"
    place = edits.before if side == "before" else edits.after
    place.insert(0 if side == "before" else len(place), name)

    shape = edit.shape_in(path) if side == "before" else edit.shape_out(path)
    if shape is not None:
        shape = active_shape(shape, channel_axis(made, len(shape)), axis)
    have, want = _channel_change(made, shape, host, side, like)
    units: list[int | None] = list(range(have))  # of the input, that each unit of the output is to pass on
    if have != want:
        _require_plain_place(made, have, want, axis)
        edits._modules[name] = stand_in = _square(made, have, shape).to(**like)  # what depends on it depends on the layer
        _mark(stand_in)
        edit.touch(path)
        edit.resize(f"{full}.weight", 0, want)
        units = _units_of(stand_in)
    edits._modules[name] = made
    made.train(host.training)
    kept = "weights as given"
    if edit.preserve and not isinstance(made, NEUTRAL):
        if make_identity(made, units if have != want else None):
            kept = _IDENTITY
        elif _gateable(made, shape, have, want, like):
            _require_plain_order(made, units)
            edits.register_parameter(gate_name(name), nn.Parameter(torch.zeros((), **like)))
            kept = "added to its input through a gate that starts at zero"
        else:
            kept = "cannot start as the identity: it changes the resolution"
            edit.details["function_kept"] = False
    follow(made, axis, axis)
    if kept == _IDENTITY:
        widen_identity(made)
    near = edit.neighbour(host)
    for parameter in (*made.parameters(), *(p for p in [edits._parameters.get(gate_name(name))] if p is not None)):
        added(parameter, near)
    edit.touch(path)
    edit.done(full, f"insert {type(made).__name__} {side} {path}; {kept}")


def _require_plain_place(layer: nn.Module, have: int, want: int, axis: Axis | None) -> None:
    if axis is not None:
        raise TopologyError(
            f"layer: {type(layer).__name__} takes {have} channels and gives {want}, where {axis!r} runs: in an elastic model a new layer "
            "gives as many as it takes, and follows that dim. Insert one that does, and grow the dim."
        )


def _require_plain_order(layer: nn.Module, units: list[int | None]) -> None:
    """A gate adds to an input whose units come first, new ones behind them."""
    kept = [unit for unit in units if unit is not None]
    if units[: len(kept)] != list(range(len(kept))):
        raise TopologyError(
            f"layer: {type(layer).__name__} gives other channels where code takes them in several parts, each of which is to grow: only a "
            "linear layer or convolution can start as the identity there. Insert one, or pass preserve=False."
        )


def parse_position(position: Any) -> tuple[str, str]:
    """``"after_conv2"`` as ``("after", "conv2")``.

    Raises:
        SurgeryError: it is no position.
    """
    if isinstance(position, str):
        side, underscore, path = position.partition("_")
        if side in _SIDES and underscore and path:
            return side, path
    raise SurgeryError(f"position: expected 'before_<path>' or 'after_<path>' of a module, as 'after_layer1.0.conv1', got {position!r}.")


def _check_layer(edit: Edit, layer: Any) -> None:
    if not isinstance(layer, nn.Module):
        raise SurgeryError(f"layer: expected an nn.Module or a LayerSpec, got {type(layer).__name__}.")
    if layer is edit.model or any(part is edit.model for part in layer.modules()):
        raise TopologyError(f"layer: {type(layer).__name__} holds the model that it is to be inserted into.")
    known = {id(module): path for path, module in edit.paths.items()}
    for part in layer.modules():
        if id(part) in known:
            raise TopologyError(f"layer: it is in the model already, as {known[id(part)]!r}. Insert a copy (copy.deepcopy).")
    tensors = {id(p): name for name, p in edit.model.named_parameters()}
    shared = next((tensors[id(p)] for p in layer.parameters() if id(p) in tensors), None)
    if shared is not None:
        raise TopologyError(f"layer: it shares the parameter {shared!r} with the model. Insert a layer with parameters of its own.")


# Weights that keep the function


def make_identity(layer: Any, units: list[int | None] | None = None) -> bool:
    """Overwrite the weights of a linear layer or convolution so that it passes on its input, beside what its further rows give.

    Args:
        layer: of any kind.
        units: per unit of the output, the unit of the input that it is to be, or ``None`` for what the layer makes of it. By default all
            units of the input, in order.

    Returns:
        whether that is possible; otherwise nothing has changed.
    """
    if getattr(layer, "parametrizations", None):
        return False
    if type(layer) is nn.PReLU:
        save_values(layer.weight)
        with torch.no_grad():
            layer.weight.fill_(1)
        return True
    if type(layer) is nn.Linear and (units is not None or layer.out_features == layer.in_features):
        _write_identity(layer.weight, layer.bias, units or list(range(layer.in_features)), ())
        return True
    if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and keeps_size(layer):
        square = layer.in_channels == layer.out_channels
        if square if units is None else layer.groups == 1:
            _write_identity(layer.weight, layer.bias, units or list(range(layer.in_channels)), tuple(k // 2 for k in layer.kernel_size))
            return True
    return False


def keeps_size(conv: Any) -> bool:
    """Whether a convolution gives as many pixels as it takes, each under the centre of its window."""
    if any(s != 1 for s in conv.stride) or any(k % 2 == 0 for k in conv.kernel_size) or conv.padding_mode != "zeros":
        return False
    if conv.padding == "same":
        return True
    if conv.padding == "valid":
        return all(k == 1 for k in conv.kernel_size)
    return all(2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))


def _write_identity(weight: Tensor, bias: Tensor | None, units: list[int | None], centre: tuple[int, ...]) -> None:
    """Let rows pass on units of the input, and leave those that are to pass on none as they are."""
    rows = torch.tensor([row for row, unit in enumerate(units) if unit is not None], device=weight.device)
    sources = torch.tensor([unit for unit in units if unit is not None], device=weight.device)
    save_values(weight, *([] if bias is None else [bias]))
    with torch.no_grad():
        weight[rows] = 0
        place: Any = (rows, sources % weight.shape[1], *centre)  # of a group, the units of its own
        weight[place] = 1
        if bias is not None:
            bias[rows] = 0


def _gateable(layer: nn.Module, shape: tuple[int, ...] | None, have: int, want: int, like: dict[str, Any]) -> bool:
    if shape is None:
        return True
    out = fake_shape(layer, shape, **like)
    return len(out) == len(shape) and sum(a != b for a, b in zip(shape, out, strict=True)) == (have != want)


# Channels


def _channel_change(layer: nn.Module, shape: tuple[int, ...] | None, host: nn.Module, side: str, like: dict[str, Any]) -> tuple[int, int]:
    """How many channels a layer takes and gives; equal numbers where it changes none, or nothing but the resolution.

    Raises:
        TopologyError: it does not take what the place has.
    """
    declared_in = next((n for part in layer.modules() if (n := declared(part, "in")) is not None), None)
    if shape is None:
        given = declared(host, "out" if side == "after" else "in")
        declared_out = next((n for part in reversed(list(layer.modules())) if (n := declared(part, "out")) is not None), None)
        if declared_in is not None and given is not None and given != declared_in:
            raise TopologyError(f"layer: {layer} takes {declared_in} channels, but {type(host).__name__} has {given} there.")
        if declared_in is None or declared_out is None:
            return 0, 0
        return declared_in, declared_out
    out = fake_shape(layer, shape, **like)
    axis = channel_axis(layer, len(shape))
    if len(out) != len(shape):
        return 0, 0
    return shape[axis], out[axis]


def declared(module: nn.Module, side: str) -> int | None:
    """The number of channels or features that a layer says it takes (``"in"``) or gives (``"out"``)."""
    for name in (f"{side}_channels", f"{side}_features", "num_features", "num_channels"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def channel_axis(layer: nn.Module, rank: int) -> int:
    """Where the channels of a layer's input and output lie: second (``1``), as of convolutions, or last (``-1``), as of linear layers."""
    kinds = [type(part) for part in layer.modules()]
    if any(issubclass(kind, _CHANNELS_SECOND) for kind in kinds):
        return 1
    return -1 if rank <= 3 or any(issubclass(kind, _CHANNELS_LAST) for kind in kinds) else 1


_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def _square(layer: nn.Module, channels: int, shape: tuple[int, ...] | None) -> nn.Module:
    """A layer over as many channels as it gives, to find out what depends on them."""
    rank = len(shape) if shape is not None else next((p.dim() for p in layer.parameters() if p.dim() > 1), 2)
    if channel_axis(layer, rank) == -1:
        return nn.Linear(channels, channels, bias=False)
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]
    made: nn.Module = kind(channels, channels, 1, bias=False)
    return made


def _mark(stand_in: Any) -> None:
    """Write to each row which unit it is, in numbers that any type holds, larger than what new rows are drawn from."""
    with torch.no_grad():
        units = torch.arange(len(stand_in.weight), device=stand_in.weight.device)
        columns = stand_in.weight.flatten(1)
        columns[:, 1:2] = (2 + units // _DIGIT).to(columns)[:, None]
        columns[:, 0] = (2 + units % _DIGIT).to(columns)


_DIGIT = 128


def _units_of(stand_in: Any) -> list[int | None]:
    """Which unit each row of a marked layer was before it was resized; ``None`` for new ones."""
    rows = stand_in.weight.detach().flatten(1)[:, :2].double().tolist()
    return [round(row[0]) - 2 + _DIGIT * (round(row[-1]) - 2 if len(row) > 1 else 0) if row[0] >= 1.5 else None for row in rows]
