"""How often each element of a parameter was updated, compressed exactly.

Elements that always slept and woke together share a count, so the counts of a parameter are constant on the cells of a grid: per axis
the places where a *band* of indices begins, and one int64 per cell. Every operation is exact; where a permutation scatters the bands, they
become as narrow as it takes, down to one index each.

The whole lives in one int64 vector, so that it goes through ``state_dict`` like any other state (:meth:`StepCounts.packed`).

Kernels on a device count by themselves, also where a CUDA graph replays them and no Python runs. There a count per element is kept
(:func:`dense_counts`), a tensor of the parameter's shape: int32, or the bits of an unsigned 16-bit number in an int16 tensor. Both stop at
their largest value. Each form is read wherever the other was written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..control import Runs
from ..errors import OptimizerError

Spans = list[tuple[int, int, int]]


class StepCounts:
    """The step counts of one parameter.

    Attributes:
        shape: of the parameter.
        starts: per axis, where its bands begin, ascending from 0.
        packed: int64 vector: number of axes, number of bands of each axis, the starts of each axis, then the table.
        table: int64, one count per cell, a view of ``packed``.
    """

    def __init__(self, shape: Sequence[int], starts: Sequence[Sequence[int]] | None = None, table: Tensor | None = None) -> None:
        self.shape = tuple(shape)
        self.starts = [[0] for _ in self.shape] if starts is None else [list(axis) for axis in starts]
        cells = [len(axis) for axis in self.starts]
        header = [len(cells), *cells, *itertools.chain.from_iterable(self.starts)]
        with torch.inference_mode(False):
            self.packed = torch.zeros(len(header) + math.prod(cells), dtype=torch.int64, device="cpu")
        self.packed[: len(header)] = torch.tensor(header)
        self.offset = len(header)
        self.table = self.packed[self.offset :].view(cells)
        if table is not None:
            self.table.copy_(table)

    @classmethod
    def unpack(cls, packed: Tensor, shape: Sequence[int]) -> StepCounts:
        """Read what :attr:`packed` held; its table goes on living in that tensor. A number is a count that all elements share.

        Counts of the dense form are compressed.

        Raises:
            OptimizerError: the vector does not describe a parameter of this shape.
        """
        if is_dense(packed, shape):
            return cls(shape, [range(size) for size in shape], widened(packed)).merge()
        if packed.dim() == 0:
            shared = cls(shape)
            shared.table.fill_(int(packed))
            return shared
        packed = packed.to("cpu", torch.int64)
        numbers = packed.tolist() if packed.numel() < 4096 else packed[: _header_length(packed)].tolist()
        cells = numbers[1 : 1 + numbers[0]]
        offset = 1 + len(cells) + sum(cells)
        places = iter(numbers[1 + len(cells) : offset])
        starts = [list(itertools.islice(places, count)) for count in cells]
        if len(cells) != len(shape) or any(s[0] != 0 or s[-1] >= max(n, 1) for s, n in zip(starts, shape, strict=True)):
            raise OptimizerError(
                f"step counts: expected bands of a parameter of shape {tuple(shape)}, got bands that begin at {starts}. "
                "Load the state of an optimizer over the same parameters, in the same order."
            )
        if packed.numel() != offset + math.prod(cells):
            raise OptimizerError(
                f"step counts: expected {math.prod(cells)} cells, got {packed.numel() - offset}. Was the state of another optimizer loaded?"
            )
        counts = cls.__new__(cls)
        counts.shape, counts.starts, counts.packed, counts.offset = tuple(shape), starts, packed, offset
        counts.table = packed[offset:].view(cells)
        return counts

    def spans(self, axis: int, runs: Runs) -> Spans:
        """The bands of one axis that ``runs`` cover, as ``(start, stop, band)``; bands must not straddle a run's end, see :meth:`split`."""
        starts = self.starts[axis]
        stops = [*starts[1:], self.shape[axis]]
        found: Spans = []
        position = 0
        for start, length in runs:
            while position < len(starts) and starts[position] < start:
                position += 1
            while position < len(starts) and starts[position] < start + length:
                found.append((starts[position], stops[position], position))
                position += 1
        return found

    def split(self, runs: Sequence[Runs]) -> StepCounts:
        """The same counts in bands that begin and end where ``runs`` do, one list per axis; equal neighbours elsewhere are joined."""
        counts = self.merge()
        for axis, size in enumerate(self.shape):
            edges = {edge for start, length in runs[axis] for edge in (start, start + length) if edge < size}
            counts = counts._cut(axis, edges)
        return counts

    def advance(self, runs: Sequence[Runs]) -> StepCounts:
        """Count one update of the elements in the product of ``runs``: the slow way, for optimizers that keep no plan."""
        counts = self.split(runs)
        index = [[band for _, _, band in counts.spans(axis, part)] for axis, part in enumerate(runs)]
        if index:
            counts.table[torch.meshgrid(*map(torch.tensor, index), indexing="ij")] += 1
        else:
            counts.table += 1
        return counts

    def merge(self) -> StepCounts:
        """The same counts with equal neighbouring bands joined."""
        starts, table = [], self.table
        for axis, places in enumerate(self.starts):
            if len(places) > 1:
                rows = table.movedim(axis, 0).reshape(len(places), -1)
                keep = [0, *(1 + (rows[1:] != rows[:-1]).any(1).nonzero().flatten()).tolist()]
                if len(keep) < len(places):
                    table = table.index_select(axis, torch.tensor(keep))
                    places = [places[band] for band in keep]
            starts.append(places)
        return self if table is self.table else StepCounts(self.shape, starts, table)

    def permute(self, axis: int, order: Tensor) -> StepCounts:
        """Bring index ``order[i]`` of ``axis`` to place ``i``."""
        bands = self._band_of(axis).index_select(0, order.to("cpu", torch.int64))
        places = [0, *(1 + (bands[1:] != bands[:-1]).nonzero().flatten()).tolist()]
        return self._replace(axis, places, bands[places]).merge()

    def reset(self, axis: int, start: int, stop: int) -> StepCounts:
        """Forget the updates of the indices from ``start`` to ``stop`` of ``axis``."""
        counts = self._cut(axis, {edge for edge in (start, stop) if edge < self.shape[axis]})
        bands = [band for _, _, band in counts.spans(axis, [(start, stop - start)])]
        if counts is self:
            counts = StepCounts(self.shape, self.starts, self.table)
        counts.table.index_fill_(axis, torch.tensor(bands, dtype=torch.int64), 0)
        return counts.merge()

    def moved(self, shape: Sequence[int], write: Callable[[Tensor, Tensor], None]) -> StepCounts:
        """The counts of a parameter that has come to another shape: ``write(made, old)`` copies what is kept; the rest has no updates."""
        made = torch.zeros(tuple(shape), dtype=torch.int64, device="cpu")
        write(made, self.dense())
        return StepCounts(shape, [range(size) for size in shape], made).merge()

    def dense(self) -> Tensor:
        """One int64 per element of the parameter."""
        table = self.table
        for axis in range(len(self.shape)):
            table = table.index_select(axis, self._band_of(axis))
        return table

    def _band_of(self, axis: int) -> Tensor:
        """The band of each index of ``axis``."""
        starts = torch.tensor([*self.starts[axis], self.shape[axis]])
        return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

    def _cut(self, axis: int, edges: set[int]) -> StepCounts:
        """The same counts with a band that begins at each of ``edges``."""
        old = self.starts[axis]
        places = sorted(edges.union(old))
        if len(places) == len(old):
            return self
        bands = torch.searchsorted(torch.tensor(old), torch.tensor(places), right=True) - 1
        return self._replace(axis, places, bands)

    def _replace(self, axis: int, places: list[int], bands: Tensor) -> StepCounts:
        """Bands of ``axis`` that begin at ``places`` and continue the present ``bands``."""
        starts = [*self.starts[:axis], places, *self.starts[axis + 1 :]]
        return StepCounts(self.shape, starts, self.table.index_select(axis, bands))


def is_dense(step: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``step`` holds a count per element of a parameter of ``shape``."""
    return step.dtype in (torch.int16, torch.int32) and step.shape == torch.Size(shape)


def widened(dense: Tensor) -> Tensor:
    """Counts of the dense form as int64."""
    return dense.to(torch.int64) & 0xFFFF if dense.dtype == torch.int16 else dense.to(torch.int64)


def dense_counts(param: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts of any form as a tensor of the shape, device and strides of ``param``: ``step`` itself if it is one.

    Args:
        param: the parameter.
        step: its counts.
        dtype: int16 or int32; what is int32 already stays so.
    """
    if is_dense(step, param.shape):
        if step.dtype in (dtype, torch.int32) and step.device == param.device and step.stride() == param.stride():
            return step
        dtype = torch.int32 if step.dtype == torch.int32 else dtype
        counts = widened(step)
    else:
        counts = StepCounts.unpack(step, param.shape).dense()
    dense = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if dtype == torch.int16:
        return dense.copy_((counts.clamp(max=2**16 - 1) ^ 2**15) - 2**15)
    return dense.copy_(counts.clamp(max=2**31 - 1))


def _header_length(packed: Tensor) -> int:
    num_axes = int(packed[0])
    return 1 + num_axes + int(packed[1 : 1 + num_axes].sum())
