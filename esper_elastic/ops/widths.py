"""What an op needs to know of a layer's widths: its axes for the host, its slots in the control block for the kernels."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..control import Axis, ControlBlock, Switch, keep_for_graphs, of_fixed_shape
from ..errors import GraphCaptureError, LayoutError
from .backend import choose, refuse_triton

_TRITON_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


class Widths:
    """The axes of a layer's weight, the switches above it, and where both are in the control block.

    Attributes:
        axes: the elastic axes, the one that the layer produces first, whatever their order in the weight.
        switches: those of the blocks around the layer; it is asleep if one is off.
        device: that of the operands.
        static: whether activations have capacity size, dormant units exactly zero.
        control: the control tensor that kernels read.
        slots: int32 table on the same device, one row ``[axis, slot, start, inner]`` per segment; axis -1 is a switch.
        segments: how many rows of ``slots`` belong to each axis and to switches, and whether all segments begin at a multiple of eight.
        label: how messages call the layer.
        backend: what serves it, as far as device and layout say.
    """

    device: torch.device
    control: Tensor
    slots: Tensor
    segments: list[int]
    backend: str
    _rows: list[tuple[int, int, int, int]]

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
        old = self.__dict__.get("slots")
        if old is None or old.device != self.control.device or self._rows != rows:  # a captured graph may hold the address of the old ones
            keep_for_graphs(old)
            with torch.inference_mode(False):
                self.slots = of_fixed_shape(torch.tensor(rows, dtype=torch.int32, device=self.control.device))
            self._rows = rows
        counts = [len(axis.segments) for axis in self.axes] + [0] * (2 - len(self.axes))
        aligned = all(segment.start % 8 == 0 for axis in self.axes for segment in axis.segments)
        self.segments = [*counts, len(self.switches), int(aligned)]
        self.backend = choose(device, self.static)

    def serving(self, *operands: Tensor | None, lacking: str | None = None) -> str:
        """The backend for this call. Functional transforms and forward mode are left to the reference, and so is what no kernel takes.

        Args:
            operands: of the op.
            lacking: what the op computes, if Triton has no kernel for it at all.

        Raises:
            GraphCaptureError: a CUDA graph is being captured in static layout, and the reference, whose widths are numbers on the host,
                would serve it.
            LayoutError: no kernel takes the call, and ``ESPER_ELASTIC_BACKEND=triton`` allows no other backend.
        """
        if not self.static and torch.compiler.is_compiling():
            _warn_specialised()
        backend = self.backend
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            backend = "reference"
        elif backend == "triton" and lacking is not None:
            refuse_triton(lacking, "there are no kernels for them")
            backend = "reference"
        elif backend == "triton":
            strange = {t.dtype for t in operands if t is not None} - _TRITON_DTYPES
            if strange:
                refuse_triton(
                    f"{self.label} with operands of {', '.join(sorted(map(str, strange)))}", "they take float32, float16 and bfloat16"
                )
                backend = "reference"
        if (
            self.device.type == "cuda"
            and backend != "triton"
            and not torch.compiler.is_compiling()
            and torch.cuda.is_current_stream_capturing()
        ):
            self._capture_without_kernels()
        return backend

    def _capture_without_kernels(self) -> None:
        if self.static:
            raise GraphCaptureError(
                f"{self.label}: cannot be captured in a CUDA graph: the reference backend serves it here, and the graph would keep the "
                "present widths. ee.backend_info() says why Triton's kernels do not."
            )
        _warn_captured()

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


@functools.cache
def _warn_captured() -> None:
    warnings.warn(
        "esper_elastic: a layer in compact layout is being captured in a CUDA graph, which keeps the present widths for ever. "
        "Call ee.set_layout(model, 'static') first for a graph that follows them.",
        stacklevel=2,
    )


# what torch.compiler.assume_constant_result sets; calling it would import the compiler with the package
_warn_specialised._dynamo_marked_constant = True  # type: ignore[attr-defined]
