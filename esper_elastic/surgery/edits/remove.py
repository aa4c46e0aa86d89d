"""Removing a layer: what takes its place, who takes over what it did, and every reference to it cleaned up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...control import Axis
from ...convert.restore import as_it_was
from ...errors import TopologyError
from ..elastic.elastic import let_go
from ..trial.calls import TensorSpec
from ..undo import added, removed
from .bridges import Pass, Projection
from .edit import Edit
from .edited import edits_of, release, set_removed
from .folding import fold, foldable, neighbours
from .holder import EDITS, Edits, first_tensor, gate_name
from .insert import NEUTRAL, channel_axis, declared
from .joining import active_part, active_shape, axis_of, follow, same
from .skip import Skip, drop_skip

#: What a layer's input and output run along.
_Axes = tuple[Axis | None, Axis | None]


def remove_layer(edit: Edit, path: str) -> None:
    """Remove a module and bridge the gap: a neighbour takes over what it did, or its input goes on as it is, or through a projection."""
    layer = edit.layer(path)
    edit.check_called(path)
    if isinstance(layer, Skip):
        raise TopologyError(f"{path!r} is a skip connection: use remove_skip_connection.")
    folded = _fold(edit, path, layer)
    axes = axis_of(edit, path, "in"), axis_of(edit, path, "out")
    bridge = Pass() if folded is not None else _bridge_for(edit, path, layer, axes)
    if folded is None:
        edit.details["function_kept"] = isinstance(layer, NEUTRAL)
    passes = "its input goes on as it is" if isinstance(bridge, Pass) else "a projection takes its place"
    _drop_skips(edit, path, layer)
    names = edit.names_of(layer)
    for name in names:
        _take_out(edit, name, bridge)
    edit.replace(layer, bridge)
    near = edit.neighbour(layer, edit.module(path.rpartition(".")[0]))
    for parameter in bridge.parameters():
        added(parameter, near)
    kept = {id(p) for p in edit.model.parameters()}
    for parameter in layer.parameters():
        if id(parameter) not in kept:
            removed(parameter)
    let_go(layer, edit.model)
    edit.touch(path.rpartition(".")[0])
    edit.done(path, f"removed; {folded or passes}")


# Bridges


def _bridge_for(edit: Edit, path: str, layer: nn.Module, axes: _Axes) -> Pass | Projection:
    """What stands in for a layer: its input where shapes agree, otherwise a projection.

    Raises:
        TopologyError: nothing can.
    """
    call = edit.call(path)
    if call is None:
        return _bridge_unseen(edit, path, layer, axes)
    length = len(call.result) if type(call.result) is tuple else None
    first, second = _floating(call.args or call.kwargs), _floating(call.result if length is None else call.result[:1])
    if first is None or second is None or not isinstance(call.result, tuple | TensorSpec):
        raise TopologyError(
            f"{path!r} ({type(layer).__name__}): cannot bridge it: expected a layer that takes a floating tensor and gives one, or a tuple "
            "that begins with one. Remove the module around it."
        )
    if first == second and same(*axes):
        return Pass(length)
    if len(first) != len(second) or first[0] != second[0]:
        raise TopologyError(
            f"{path!r} ({type(layer).__name__}): cannot bridge from shape {first} to {second}. Remove the module around it."
        )
    index = channel_axis(layer, len(first))
    have, want = (active_shape(shape, index, axis)[index] for shape, axis in zip((first, second), axes, strict=True))  # type: ignore[index]
    bridge = Projection(have, want, first, second, index == -1, length, not same(*axes)).to(**edit.like(layer))
    bridge.train(layer.training)
    if bridge.map is not None:
        _fit(edit, layer, bridge, axes)
        follow(bridge.map, *axes)
    return bridge


def _bridge_unseen(edit: Edit, path: str, layer: nn.Module, axes: _Axes) -> Pass | Projection:
    """What stands in for a layer of which nothing is known but what it says of itself."""
    edit.warn(f"the shapes that {path} takes and gives are unknown without example inputs")
    sizes = declared(layer, "in"), declared(layer, "out")
    have, want = (size if axis is None else axis.active for size, axis in zip(sizes, axes, strict=True))
    if have is None or want is None or (have == want and same(*axes)):
        return Pass()
    rank = layer.weight.dim() if isinstance(layer.weight, Tensor) else 2
    index = channel_axis(layer, rank)
    ones = (1,) * rank
    bridge = Projection(have, want, ones, ones, index == -1, mapped=True).to(**edit.like(layer)).train(layer.training)
    assert bridge.map is not None
    follow(bridge.map, *axes)
    return bridge


def _floating(specs: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor in a tree of specs, if it is one of floating point."""
    first = next((leaf for leaf in pytree.tree_leaves(specs) if isinstance(leaf, TensorSpec)), None)
    return first.shape if first is not None and first.dtype.is_floating_point else None


class _Seen(Exception):
    """Ends a run where the layer has been seen: with what it took and what it gave."""


class _Watched:
    """Mixed in before a layer's own class for one run."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Seen((args, kwargs), super().__call__(*args, **kwargs))  # type: ignore[misc]


def _fit(edit: Edit, layer: Any, bridge: Projection, axes: _Axes) -> None:
    """Fit a projection to what a layer does, by least squares on one calibration batch; where none is known it stays as drawn."""
    if edit.repeats:
        return
    if edit.batch is None:
        edit.warn("no input of the model is known: the projection in the layer's place starts with random weights")
        return
    kind, seen = type(layer), None
    try:
        with as_it_was(edit.model), torch.no_grad():
            for module in edit.model.modules():
                module.training = False
            layer.__class__ = type(kind.__name__, (_Watched, kind), {})
            edit.model(*edit.batch[0], **edit.batch[1])
    except _Seen as found:
        seen = first_tensor(found.args[0]), first_tensor(found.args[1])
    finally:
        layer.__class__ = kind
    if seen is None or seen[0] is None or seen[1] is None:
        edit.warn("the layer did not run on the calibration batch: the projection in its place starts with random weights")
        return
    index = -1 if bridge.last else 1
    given = active_part(bridge.resample(seen[0]), index, axes[0]), active_part(seen[1], index, axes[1])
    x, y = (tensor.movedim(index, -1).flatten(0, -2).double() for tensor in given)
    with torch.no_grad():
        solved = torch.linalg.lstsq(torch.cat([x, x.new_ones(len(x), 1)], 1).cpu(), y.cpu(), driver="gelsd").solution.T
        assert isinstance(bridge.map, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and bridge.map.bias is not None
        bridge.map.weight.copy_(solved[:, :-1].reshape(bridge.map.weight.shape))
        bridge.map.bias.copy_(solved[:, -1])


def _fold(edit: Edit, path: str, layer: nn.Module) -> str | None:
    """Let a neighbour take over what a linear layer did, where one does nothing but pass values to it, or take them from it."""
    run = edit.run_around(path) if foldable(layer) else None
    return None if run is None else fold(layer, *neighbours(run, layer))


# References


def _take_out(edit: Edit, path: str, bridge: Pass | Projection) -> None:
    """Take a child out of its parent, which finds the bridge in its place."""
    parent_path, _, name = path.rpartition(".")
    parent = edit.module(parent_path)
    if isinstance(parent, Edits):
        _take_out_of_edits(edit, parent, parent_path, name, bridge)
        return
    goes_on = isinstance(bridge, Pass) and bridge.length is None and isinstance(parent, nn.Sequential)
    places = [child for child in parent._modules if child != EDITS]
    edits = edits_of(parent, parent_path)
    if not edits.places:
        edits.places = places
    del parent._modules[name]
    if goes_on:
        edits.bridges[name] = None
    else:
        key = f"bridge_{name}"
        edits._modules[key] = bridge
        edits.bridges[name] = key
    set_removed(parent, parent_path)


def _take_out_of_edits(edit: Edit, edits: Edits, path: str, name: str, bridge: Pass | Projection) -> None:
    if isinstance(bridge, Projection):
        edits._modules[name] = bridge
        return
    del edits._modules[name]
    gate = edits._parameters.pop(gate_name(name), None)
    if gate is not None:
        removed(gate)
    for names in (edits.before, edits.after):
        if name in names:
            names.remove(name)
    for child, key in list(edits.bridges.items()):  # the bridge of an earlier removal cannot be removed but in a sequence
        if key == name:
            edits._modules[name] = bridge
            edits.bridges[child] = name
    release(edit.module(path.rpartition(".")[0]))


def _drop_skips(edit: Edit, path: str, layer: nn.Module) -> None:
    """Drop skips that begin or end inside of a layer."""
    inside = {id(module) for module in layer.modules()}
    carriers = [carrier for module in layer.modules() if isinstance(module, Edits) for carrier in module.taps]
    for name, module in list(edit.model.named_modules()):
        if isinstance(module, Skip) and (id(module) in inside or module.carrier in carriers):
            drop_skip(edit, name, module)
            edit.steps.append(f"{name}: removed with {path}, where it begins or ends")
