"""``recalibrate``: batch-norm statistics of a model as it stands, after its widths changed.

Running statistics belong to the widths under which they were gathered: a unit that loses some of its inputs has another mean and variance.
Here they are taken anew from batches, without training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CalibrationError


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Set the running statistics of every batch norm to their plain average over ``batches``, at the present widths.

    Batch norms are set, elastic and plain, that batches reach. Those under a switch that is off, those that keep no statistics and those
    that ``momentum=0`` freezes stay as they are. In a model without any to set, nothing happens.

    Args:
        model: in any mode. While it runs, batch norms that are set are in training mode and all else is in eval mode, so that dropout
            does not blur what inference will see.
        batches: each what the model takes: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. A few
            hundred examples are enough for most models.
        forward: runs one batch, where that is not so. For the pairs of a data loader: ``lambda model, batch: model(batch[0])``.

    Effects:
        Writes the active running statistics, and counts the batches in ``num_batches_tracked``, as if training had begun here. Dormant
        statistics are left as they are, modes and momenta are restored, no gradient is computed.

    Raises:
        CalibrationError: ``batches`` is empty. Whatever a batch raises passes through; either way the model is as it was.

    Source: Yu, Huang: Universally Slimmable Networks and Improved Training Techniques (ICCV 2019), post-statistics of batch
        normalization.
    """
    norms = _that_move(model)
    if not norms:
        return
    before = [_Statistics.of(norm) for norm in norms]
    try:
        with _calibrating(model, norms):
            for norm in norms:
                norm.reset_running_stats()
            count = 0
            for batch in batches:
                _run(model, batch) if forward is None else forward(model, batch)
                count += 1
        if count == 0:
            raise CalibrationError(
                f"recalibrate: batches of {type(model).__name__}: expected at least one, got none. Has an iterator been used up already?"
            )
    except BaseException:
        for norm, statistics in zip(norms, before, strict=True):
            statistics.restore(norm)
        raise
    for norm, statistics in zip(norms, before, strict=True):
        if not int(_counter(norm)):
            statistics.restore(norm)


def _that_move(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose statistics move in training; under a switch that is off, no batch will reach them."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and module.num_batches_tracked is not None
        and module.momentum != 0
    ]


def _counter(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


class _Statistics(NamedTuple):
    """What a batch norm kept, at capacity."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, norm: _BatchNorm) -> _Statistics:
        return cls({name: tensor.clone() for name, tensor in norm._buffers.items() if tensor is not None})

    def restore(self, norm: _BatchNorm) -> None:
        for name, tensor in self.tensors.items():
            getattr(norm, name).copy_(tensor)


@contextlib.contextmanager
def _calibrating(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """``norms`` in training mode and averaging, everything else in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for norm in norms:
            norm.training, norm.momentum = True, None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
