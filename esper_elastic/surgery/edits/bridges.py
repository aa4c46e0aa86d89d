"""What takes the place of a removed layer where the code around it still calls one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .holder import first_tensor


class Pass(nn.Module):
    """Gives the first tensor that it is called with, in the form that the removed layer gave its result in.

    Args:
        length: of the tuple that the layer gave, its first item being what is passed on and the others ``None``; ``None`` for a tensor.
    """

    def __init__(self, length: int | None = None) -> None:
        super().__init__()
        self.length = length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments."""
        x = first_tensor(args) if args else None
        if x is None:
            x = first_tensor(kwargs)
        return x if self.length is None else (x, *[None] * (self.length - 1))

    def extra_repr(self) -> str:
        return "" if self.length is None else f"length={self.length}"


class Projection(nn.Module):
    """A pointwise linear map between numbers of channels, at the resolution that the removed layer gave.

    Args:
        have: channels of the input.
        want: channels of the output; the same number needs no weights.
        shape_in: shape of an input of the removed layer, of which ratios alone are kept.
        shape_out: shape of what the layer gave for it.
        last: whether channels are the last axis, and not the second.
        length: as of :class:`Pass`.
        mapped: whether there are weights though the numbers are the same, as they need not stay so.

    Shape: ``(batch, have, *)`` to ``(batch, want, *)``, or ``(batch, *, have)`` to ``(batch, *, want)``.
    """

    def __init__(
        self,
        have: int,
        want: int,
        shape_in: tuple[int, ...],
        shape_out: tuple[int, ...],
        last: bool,
        length: int | None = None,
        mapped: bool = False,
    ) -> None:
        super().__init__()
        rank = len(shape_in)
        inner = slice(1, -1) if last else slice(2, None)
        self.sizes = tuple(zip(shape_in[inner], shape_out[inner], strict=True))
        self.last = last
        self.length = length
        self.map: nn.Module | None = None
        if have != want or mapped:
            self.map = nn.Linear(have, want) if last else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 3](have, want, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, pooled or repeated to the removed layer's resolution and mapped."""
        x = first_tensor(args) if args else None
        x = self.resample(first_tensor(kwargs) if x is None else x)  # type: ignore[arg-type]
        if self.map is not None:
            x = self.map(x)
        return x if self.length is None else (x, *[None] * (self.length - 1))

    def resample(self, x: Tensor) -> Tensor:
        """``x`` at the resolution of the output."""
        if all(have == want for have, want in self.sizes):
            return x
        channelled = x.movedim(-1, 1) if self.last else x
        size = [max(1, n * want // have) for n, (have, want) in zip(channelled.shape[2:], self.sizes, strict=True)]
        if all(have >= want for have, want in self.sizes):
            pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
            made = pool(channelled, size)
        else:
            made = F.interpolate(channelled, size=size, mode="nearest")
        return made.movedim(1, -1) if self.last else made

    def extra_repr(self) -> str:
        return ", ".join(f"{have} -> {want}" for have, want in self.sizes if have != want)
