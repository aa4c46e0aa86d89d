"""Skip connections: a module's output brought along and added to the output of one further on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TopologyError
from .edit import Edit
from .edited import Carrier, Edits, edits_of, release
from .undo import added, removed


class Skip(nn.Module):
    """Adds what a carrier brings to its input, through a projection or a gate that start at zero.

    What differs in resolution is pooled (or repeated, where it is the smaller one) at run time; a source with axes that the target has not,
    as of a convolution before a classifier, is averaged over them.

    Args:
        carrier: that the source puts its output in.
        source: path of the source.
        projection: a convolution or linear layer over the channels; ``None`` where they are as many.
        last: whether channels are the last axis, and not the second.
    """

    def __init__(self, carrier: Carrier, source: str, projection: nn.Module | None, last: bool) -> None:
        super().__init__()
        self.carrier = carrier
        self.source = source
        self.last = last
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
                "path now, or recompute a part that holds the target alone? Remove the skip (ModelSurgeon.remove_skip_connection) or move it."
            )
        brought = _fit(brought, x, self.last)
        return x + (self.gate * brought if self.projection is None else self.projection(brought))

    def extra_repr(self) -> str:
        return f"from {self.source}"


def _fit(brought: Tensor, x: Tensor, last: bool) -> Tensor:
    """``brought`` at the rank and resolution of ``x``; its channels stay."""
    if brought.dim() > x.dim():
        start = 1 if last else 2
        brought = brought.mean(tuple(range(start, start + brought.dim() - x.dim())))
    while brought.dim() < x.dim():
        brought = brought.unsqueeze(1 if last else brought.dim())
    if last:
        size, wanted = brought.shape[1:-1], x.shape[1:-1]
        return brought if size == wanted else _resample(brought.movedim(-1, 1), wanted).movedim(1, -1)
    size, wanted = brought.shape[2:], x.shape[2:]
    return brought if size == wanted else _resample(brought, wanted)


def _resample(x: Tensor, size: torch.Size) -> Tensor:
    """``(batch, channels, *)`` pooled to a smaller size, or repeated to a larger one."""
    if all(have >= want for have, want in zip(x.shape[2:], size, strict=True)):
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
        return pool(x, tuple(size))  # type: ignore[no-any-return]
    return F.interpolate(x, size=tuple(size), mode="nearest")


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
    last = _channels_last(end, first, second)
    have, want = _channels(start, first, last), _channels(end, second, last)
    if have is None or want is None:
        edit.warn(f"the channels of {source if have is None else target!r} are unknown without example inputs: taken to be as many")
        have = want = 1
    carrier = Carrier()
    like = edit.like(end)
    projection = None if have == want else _projection(have, want, last, second, end).to(**like)
    skip = Skip(carrier, source, projection, last).to(**like)
    skip.train(end.training)
    if edit.preserve:
        for parameter in skip.parameters():
            nn.init.zeros_(parameter)
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


def _channels_last(target: nn.Module, first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> bool:
    """Whether the channels of a target are its last axis, as those of linear layers and of transformers are."""
    if second is None:
        return not any(isinstance(module, nn.modules.conv._ConvNd) for module in target.modules())
    if len(second) != 3:
        return len(second) < 3
    if first is not None and len(first) == 3 and first[1:] != second[1:]:
        if first[1] == second[1]:
            return True
        if first[2] == second[2]:
            return False
    channelled = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return not any(isinstance(module, channelled) for module in target.modules())


def _channels(module: nn.Module, shape: tuple[int, ...] | None, last: bool) -> int | None:
    if shape is not None:
        return shape[-1] if last or len(shape) < 3 else shape[1]
    for part in reversed(list(module.modules())):
        for name in ("out_channels", "out_features", "num_features", "embedding_dim"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    return None


def _projection(have: int, want: int, last: bool, shape: tuple[int, ...] | None, target: nn.Module) -> nn.Module:
    if last or (shape is not None and len(shape) < 3):
        return nn.Linear(have, want, bias=False)
    rank = (
        len(shape) - 2
        if shape is not None
        else next(m.weight.dim() for m in target.modules() if isinstance(m, nn.modules.conv._ConvNd)) - 2
    )
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    made: nn.Module = kind(have, want, 1, bias=False)
    return made
