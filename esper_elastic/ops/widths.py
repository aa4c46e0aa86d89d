"""What an op needs to know of a layer's widths: its axes for the host, its slots in the control block for the kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..control import Axis, ControlBlock, Switch, of_fixed_shape
from ..errors import LayoutError
from .backend import native_serves


class Widths:
    """The axes of a layer's weight, the switches above it, and where both are in the control block.

    Attributes:
        axes: the elastic axes, in the order of the weight.
        switches: those of the blocks around the layer; it is asleep if one is off.
        device: that of the operands.
        static: whether activations have capacity size, dormant units exactly zero.
        control: the control tensor that kernels read.
        slots: int32 table on the same device, one row ``[axis, slot, start, inner]`` per segment; axis -1 is a switch.
        label: how messages call the layer.
        native: whether the compiled ops serve it.
    """

    device: torch.device
    control: Tensor
    slots: Tensor
    native: bool

    def __init__(self, label: str, axes: tuple[Axis, ...]) -> None:
        self.label = label
        self.axes = axes
        self.switches: tuple[Switch, ...] = ()
        self.static = False

    @property
    def block(self) -> ControlBlock:
        """The control block of the layer."""
        return self.axes[0].segments[0].dim.block

    def bind(self, device: torch.device) -> None:
        """Look up the control tensor and the slots for operands on ``device``."""
        rows = [(index, s.dim.slot, s.start, s.inner) for index, axis in enumerate(self.axes) for s in axis.segments]
        rows += [(-1, switch.slot, 0, 0) for switch in self.switches]
        self.device = device
        home = device if self.static else torch.device("cpu")
        self.control = self.block.on(home)
        with torch.inference_mode(False):
            self.slots = of_fixed_shape(torch.tensor(rows, dtype=torch.int32, device=self.control.device))
        self.native = native_serves(device, self.static)

    def compiled_ops_serve(self) -> bool:
        """Whether the compiled ops serve this call; functional transforms and forward mode are left to the reference."""
        if not self.static and torch.compiler.is_compiling():
            _warn_specialised()
        return self.native and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0

    def size(self, axis: int) -> int:
        """The size that activations have along an axis of the weight, in the present layout."""
        return self.axes[axis].capacity if self.static else self.axes[axis].active

    def refuse(self, what: str, got: int, axis: int) -> LayoutError:
        """The error for an activation whose width is not :meth:`size`."""
        here, active, capacity = self.axes[axis], self.axes[axis].active, self.axes[axis].capacity
        if self.static:
            remedy = "In static layout activations carry capacity; feed it from a static layer, or call ee.set_layout(model, 'compact')."
        elif got == capacity:
            remedy = "That is the capacity: is the layer before it in static layout? Use ee.set_layout on the whole model."
        else:
            remedy = "Did one of two neighbours change width alone? Let them share one dim."
        return LayoutError(
            f"{self.label}: {what}: expected {self.size(axis)} ({'static' if self.static else 'compact'} layout: active {active}, "
            f"capacity {capacity}, {', '.join(dim.label for dim in here.dims)}), got {got}. {remedy}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("control", "slots")}


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "esper_elastic: a layer in compact layout is being compiled: the graph serves the present widths, and each other width compiles "
        "again, up to torch's recompile limit. Call ee.set_layout(model, 'static') first to compile once for all widths.",
        stacklevel=2,
    )


def _warn_specialised() -> None:
    """Say once per process that a graph serves one width. Called while the graph is traced, and no part of it."""
    _warn_once()


# what torch.compiler.assume_constant_result sets; calling it would import the compiler with the package
_warn_specialised._dynamo_marked_constant = True  # type: ignore[attr-defined]
