"""Where every write of an edit is reported."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def save_values(*tensors: Tensor) -> None:
    """Tensors are about to be written in place."""


def added(parameter: Tensor, near: Tensor | None = None) -> None:
    """A parameter has come to the model."""


def removed(parameter: Tensor) -> None:
    """A parameter has left the model."""


def moved(parameter: Tensor, shape: tuple[int, ...], write: Callable[[Tensor, Tensor], None]) -> None:
    """A tensor of the old ``shape`` has other storage; ``write(made, old)`` copies what is kept of a tensor of the old shape."""
