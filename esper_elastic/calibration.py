"""``recalibrate``: batch-norm statistics of a model as it stands, after its widths changed.

Running statistics belong to the widths under which they were gathered: a unit that loses some of its inputs has another mean and variance.
Here they are taken anew from batches, without training; or, where batches are few, what they say of the change alone is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import CalibrationError
from .layers import ElasticLayer
from .model import dims, resize

Run = Callable[[nn.Module, Any], Any]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    trained_at: Mapping[str, int] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Fit the running statistics of every batch norm to the present widths.

    By default they become their plain average over ``batches``, as if training had begun here: that takes batches that resemble the
    training data, a few hundred examples at least. With ``trained_at``, each batch runs at those widths and at the present ones, and
    statistics move by the difference: means by what is added, variances by what they are multiplied with. What is special about the
    batches is in both and cancels, so that a handful of examples will do.

    Batch norms are set, elastic and plain, that batches reach. Those under a switch that is off, those that keep no statistics and those
    that ``momentum=0`` freezes stay as they are. In a model without any to set, nothing happens.

    Args:
        model: in any mode. While it runs, all but the batch norms that are averaged is in eval mode, so that dropout does not blur what
            inference will see.
        batches: each what the model takes: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        trained_at: names of dims and the widths at which the statistics that the model has now were gathered; other dims have been at
            their present width. ``{name: dim.capacity for name, dim in ee.dims(model).items()}`` after training at full width.
        forward: runs one batch, where that is not so. For the pairs of a data loader: ``lambda model, batch: model(batch[0])``.

    Effects:
        Writes the active running statistics; averaging counts the batches in ``num_batches_tracked``. Dormant statistics are left as they
        are, modes and momenta are restored, no gradient is computed. With ``trained_at``, two commits for each batch.

    Raises:
        CalibrationError: ``batches`` is empty.
        CapacityError: ``trained_at`` names no dim, or a width that it cannot take. Whatever a batch raises passes through; in any case the
            model is as it was.

    Source: Yu, Huang: Universally Slimmable Networks and Improved Training Techniques (ICCV 2019), post-statistics of batch
        normalization.
    """
    norms = _that_move(model)
    if not norms:
        return
    before = [_Statistics.of(norm) for norm in norms]
    run = _run if forward is None else forward
    try:
        if trained_at is None:
            count = _average(model, norms, before, batches, run)
        else:
            count = _move(model, norms, before, batches, run, trained_at)
        if count == 0:
            raise CalibrationError(
                f"recalibrate: batches of {type(model).__name__}: expected at least one, got none. Has an iterator been used up already?"
            )
    except BaseException:
        for norm, statistics in zip(norms, before, strict=True):
            statistics.restore(norm)
        raise


def _average(model: nn.Module, norms: list[_BatchNorm], before: list[_Statistics], batches: Iterable[Any], run: Run) -> int:
    """Statistics become their average over batches. Returns how many there were."""
    count = 0
    with _in_mode(model, norms):
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            run(model, batch)
            count += 1
    for norm, statistics in zip(norms, before, strict=True):
        if not int(_counter(norm)):
            statistics.restore(norm)
    return count


def _move(
    model: nn.Module, norms: list[_BatchNorm], before: list[_Statistics], batches: Iterable[Any], run: Run, trained_at: Mapping[str, int]
) -> int:
    """Statistics move as far as batches say that they do between two sets of widths. Returns how many batches there were."""
    known = dims(model)
    present = {name: known[name].active for name in trained_at}
    trained, now = ({norm: _Moments(norm) for norm in norms} for _ in range(2))
    statistics = dict(zip(norms, before, strict=True))
    count = 0

    def observe_trained(norm: _BatchNorm, x: Tensor) -> None:
        trained[norm].add(x)

    def observe_present(norm: _BatchNorm, x: Tensor) -> None:
        now[norm].add(x)
        statistics[norm].write_moved(norm, trained[norm], now[norm])

    with _in_mode(model, []):
        for batch in batches:
            for norm, kept in statistics.items():
                kept.restore(norm)
            try:
                resize(model, trained_at)
                with _seen_by(norms, observe_trained):
                    run(model, batch)
            finally:
                resize(model, present)
            with _seen_by(norms, observe_present):
                run(model, batch)
            count += 1
    return count


class _Moments:
    """Mean and variance of what enters a batch norm, summed over batches, at capacity shape."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.mean, self.variance, self.count = (torch.zeros_like(_storage(norm, "running_mean"), dtype=torch.float64) for _ in range(3))

    def add(self, x: Tensor) -> None:
        place = _active_features(self.norm, x.device)
        part = x if x.shape[1] == len(place) else x.index_select(1, place)  # in static layout the rest is zeros
        variance, mean = torch.var_mean(part.double(), [0, *range(2, x.dim())], correction=0)
        self.mean[place] += mean
        self.variance[place] += variance
        self.count[place] += 1


def _active_features(norm: _BatchNorm, device: torch.device) -> Tensor:
    axes = norm.tensor_axes().get("running_mean", (None,)) if isinstance(norm, ElasticLayer) else (None,)
    runs = [(0, _storage(norm, "running_mean").numel())] if axes[0] is None else axes[0].runs()
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in runs])


def _storage(norm: _BatchNorm, name: str) -> Tensor:
    storage = norm._buffers[name]
    assert storage is not None
    return storage


@contextlib.contextmanager
def _seen_by(norms: list[_BatchNorm], observe: Callable[[_BatchNorm, Tensor], None]) -> Iterator[None]:
    """``observe`` sees what enters each norm that is awake, just before it does."""

    def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not isinstance(norm, ElasticLayer) or all(switch.on for switch in norm._widths.switches):
            observe(norm, arguments[0])  # type: ignore[arg-type]

    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
            _storage(norm, name).copy_(tensor)

    def write_moved(self, norm: _BatchNorm, trained: _Moments, now: _Moments) -> None:
        """These statistics, moved from ``trained`` to ``now``; those of features that slept then are what is measured now."""
        place = _active_features(norm, now.mean.device)
        mean, variance = now.mean[place] / now.count[place], now.variance[place] / now.count[place]
        slept, times = trained.count[place] == 0, trained.count[place].clamp(min=1)
        moved = self.tensors["running_mean"][place] + mean - trained.mean[place] / times
        scale = (variance + norm.eps) / (trained.variance[place] / times + norm.eps)
        scaled = self.tensors["running_var"][place] * scale
        for name, new, measured in (("running_mean", moved, mean), ("running_var", scaled, variance)):
            storage = _storage(norm, name)
            storage[place] = torch.where(slept, measured, new).to(storage.dtype)


@contextlib.contextmanager
def _in_mode(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
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
