"""The widths that the tensors of a ``state_dict`` imply, where they are smaller than the storage that they are for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..control import Axis, ElasticDim
from ..errors import CapacityError


class Loaded(NamedTuple):
    """A tensor of a ``state_dict``, and the storage that it is for."""

    key: str
    shape: torch.Size
    storage: Tensor
    axes: tuple[Axis | None, ...]

    @property
    def at_capacity(self) -> bool:
        return self.shape == self.storage.shape

    def fits(self, widths: dict[ElasticDim, int]) -> bool:
        """Whether the shape is that of the active slice once dims have ``widths``."""
        if len(self.shape) != len(self.axes):
            return False
        pairs = zip(self.axes, self.storage.shape, strict=True)
        return self.shape == tuple(size if axis is None else _size(axis, widths) for axis, size in pairs)

    def mismatch(self, why: str = "") -> str:
        """The message that torch gives, and why the tensor is not one of active size either."""
        why = why or "It has neither the capacity nor the active size."
        return (
            f"size mismatch for {self.key}: copying a param with shape {self.shape} from checkpoint, "
            f"the shape in current model is {self.storage.shape}. {why}"
        )


class Solver:
    """Finds the width of each dim from the sizes of tensor axes, each a sum of widths times constants."""

    def __init__(self, names: dict[int, str], problems: list[str]) -> None:
        self.names = names
        self.problems = problems
        self.widths: dict[ElasticDim, int] = {}
        self.sources: dict[ElasticDim, str] = {}

    def solve(self, tensors: list[Loaded]) -> dict[ElasticDim, int]:
        pending = [
            (tensor, axis, size)
            for tensor in tensors
            if len(tensor.shape) == len(tensor.axes)
            for axis, size in zip(tensor.axes, tensor.shape, strict=True)
            if axis is not None
        ]
        while pending:
            left = [claim for claim in pending if not self._settle(*claim)]
            if len(left) == len(pending):
                break
            pending = left
        for tensor, axis, size in pending:
            open_dims = ", ".join(self._name(dim) for dim in axis.dims if dim not in self.widths)
            self.problems.append(tensor.mismatch(f"Its axis of {size} has no unique division among {open_dims}: set their widths first."))
        return self.widths

    def _settle(self, tensor: Loaded, axis: Axis, size: int) -> bool:
        """Draw from one axis what it says of the one dim not known yet; ``False`` while there are several."""
        unknown = [dim for dim in axis.dims if dim not in self.widths]
        if len(unknown) > 1:
            if size != axis.capacity:
                return False
            self.widths.update((dim, dim.capacity) for dim in unknown)
            self.sources.update((dim, tensor.key) for dim in unknown)
        elif unknown:
            (dim,) = unknown
            rest = size - sum(self.widths.get(segment.dim, 0) * segment.inner for segment in axis.segments)
            per_unit = sum(segment.inner for segment in axis.segments if segment.dim is dim)
            if rest % per_unit:
                self.problems.append(tensor.mismatch(f"{rest} indices are no multiple of the {per_unit} per unit of {self._name(dim)}."))
                return True
            try:
                self.widths[dim] = dim.admit(rest // per_unit)
                self.sources[dim] = tensor.key
            except CapacityError as error:
                self.problems.append(tensor.mismatch(f"{self._name(dim)}: {error}"))
                return True
        expected = _size(axis, self.widths)
        if expected != size:
            said = ", ".join(f"{self._name(dim)} = {self.widths[dim]} by {self.sources[dim]}" for dim in axis.dims)
            self.problems.append(tensor.mismatch(f"Its axis of {size} should be {expected}: {said}."))
        return True

    def _name(self, dim: ElasticDim) -> str:
        return self.names.get(id(dim), dim.label)


def _size(axis: Axis, widths: dict[ElasticDim, int]) -> int:
    return sum(widths.get(segment.dim, segment.dim.active) * segment.inner for segment in axis.segments)
