"""Skip connections: a module's output brought along and added to the output of one further on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import TopologyError
from ..elastic.elastic import let_go
from ..undo import added, removed
from .edit import Edit
from .edited import edits_of, release
from .holder import Carrier, Edits
from .insert import channel_axis, declared
from .joining import active_shape, axis_beyond, follow, same, silence


class Skip(nn.Module):
    """Adds what a carrier brings to its input, through a projection or a gate that start at zero.

    What differs in resolution is pooled (or repeated, where it is the smaller one) at run time; a source with axes that the target has not,
    as of a convolution before a classifier, is averaged over them.

    Args:
        carrier: that the source puts its output in.
        source: path of the source.
        projection: a convolution or linear layer over the channels; ``None`` where they are as many.
        axes: where the channels of the source and of the target lie: second (``1``) or last (``-1``).
    """

    def __init__(self, carrier: Carrier, source: str, projection: nn.Module | None, axes: tuple[int, int]) -> None:
        super().__init__()
        self.carrier = carrier
        self.source = source
        self.axes = axes
        self.projection = projection
        if projection is None:
            self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` and what has been brought.

        Raises:
            TopologyError: the source has not run in this pass.
        """
        brought = self.carrier.take()
        if brought is None:
            raise TopologyError(
                f"skip from {self.source!r}: its source has not run before its target in this pass. Does the model's code take another "
                "path now, or recompute a part that holds the target alone? Remove the skip (remove_skip_connection) or move it."
            )
        if brought.shape != x.shape:
            start, end = self.axes
            brought = _fit(brought.movedim(start, 1), x.movedim(end, 1).shape).movedim(1, end)
        return x + (self.gate * brought if self.projection is None else self.projection(brought))

    def extra_repr(self) -> str:
        return f"from {self.source}"


def _fit(brought: Tensor, shape: torch.Size) -> Tensor:
    """``(batch, channels, *)`` at the rank and resolution of ``shape``, whose channels come second too."""
    if brought.dim() > len(shape):
        brought = brought.mean(tuple(range(len(shape), brought.dim())))
    while brought.dim() < len(shape):
        brought = brought.unsqueeze(-1)
    have, want = brought.shape[2:], shape[2:]
    if have == want:
        return brought
    if all(one >= other for one, other in zip(have, want, strict=True)):
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(want) - 1]
        return pool(brought, tuple(want))
    return F.interpolate(brought, size=tuple(want), mode="nearest")


def add_skip_connection(edit: Edit, source: str, target: str) -> None:
    """Add the output of ``source`` to that of ``target``."""
    start, end = edit.module(source), edit.module(target)
    if start is end or edit.inside(target, source):
        relation = "is" if start is end else "lies inside of"
        raise TopologyError(
            f"skip from {source!r} to {target!r}: the target {relation} the source, whose output would have to come before its own."
        )
    edit.check_called(source)
    edit.check_called(target)
    first, second = edit.shape_out(source), edit.shape_out(target)
    along, into = axis_beyond(edit, source, "out"), axis_beyond(edit, target, "out")
    axes = (1, 1)
    if first != second or first is None or not same(along, into):
        axes = _axis(start, first), _axis(end, second)
    have = _channels(start, active_shape(first, axes[0], along), axes[0])
    want = _channels(end, active_shape(second, axes[1], into), axes[1])
    if have is None or want is None:
        edit.warn(f"the channels of {source if have is None else target!r} are unknown without example inputs: taken to be as many")
        have = want = 1
    carrier = Carrier()
    like = edit.like(end)
    projection = None
    if have != want or not same(along, into):
        projection = _projection(have, want, axes[1], second, end).to(**like)
        follow(projection, along, into)
    skip = Skip(carrier, source, projection, axes).to(**like)
    skip.train(end.training)
    if edit.preserve:
        silence(skip)
    elif projection is None:
        nn.init.ones_(skip.gate)
    edits_of(start, source).taps.append(carrier)
    arrival = edits_of(end, target)
    name = arrival.free_name("skip")
    arrival._modules[name] = skip
    arrival.after.append(name)
    for parameter in skip.parameters():
        added(parameter, edit.neighbour(end))
    how = "a gate" if projection is None else str(projection)
    edit.done(f"{target}.edits.{name}", f"add the output of {source} to that of {target} through {how}")
    edit.touch(source, target)


def remove_skip_connection(edit: Edit, path: str) -> None:
    """Remove a skip that :func:`add_skip_connection` made."""
    skip = edit.module(path)
    if not isinstance(skip, Skip):
        known = [name for name, module in edit.model.named_modules() if isinstance(module, Skip)]
        listed = ", ".join(known) if known else "none"
        raise TopologyError(
            f"{path!r}: expected a skip that add_skip_connection made, got {type(skip).__name__}. Skips of this model: {listed}. "
            "An addition in the model's own code cannot be taken out."
        )
    drop_skip(edit, path, skip)
    edit.done(path, f"remove the skip from {skip.source}")


def drop_skip(edit: Edit, path: str, skip: Skip) -> None:
    """Take a skip and the tap at its source out of the model."""
    for name, module in list(edit.model.named_modules()):
        if isinstance(module, Edits) and skip.carrier in module.taps:
            module.taps.remove(skip.carrier)
            owner = name.rpartition(".")[0]
            edit.touch(owner)
            release(edit.module(owner))
    arrival_path, _, name = path.rpartition(".")
    arrival: Any = edit.module(arrival_path)
    del arrival._modules[name]
    arrival.after.remove(name)
    host = arrival_path.rpartition(".")[0]
    edit.touch(host)
    release(edit.module(host))
    for parameter in skip.parameters():
        removed(parameter)
    let_go(skip, edit.model)


def _axis(module: nn.Module, shape: tuple[int, ...] | None) -> int:
    return 1 if shape is not None and len(shape) == 2 else channel_axis(module, 4 if shape is None else len(shape))


def _channels(module: nn.Module, shape: tuple[int, ...] | None, axis: int) -> int | None:
    if shape is not None:
        return shape[axis]
    return next((n for part in reversed(list(module.modules())) if (n := declared(part, "out")) is not None), None)


def _projection(have: int, want: int, axis: int, shape: tuple[int, ...] | None, target: nn.Module) -> nn.Module:
    if axis == -1 or (shape is not None and len(shape) == 2):
        return nn.Linear(have, want, bias=False)
    convs = [module for module in target.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    rank = len(shape) - 2 if shape is not None else convs[-1].weight.dim() - 2 if convs else 0
    if rank == 0:
        return nn.Linear(have, want, bias=False)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    made: nn.Module = kind(have, want, 1, bias=False)
    return made
