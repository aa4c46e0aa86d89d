"""A device's copy of the control vector: written in the order of streams, read by kernels and by captured graphs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import GraphCaptureError


def _copy(target: Tensor, source: Tensor, begin: int, end: int) -> None:
    """The write without the compiled library: for memory that is not pinned, CUDA stages the values before the call returns."""
    target[begin:end].copy_(source[begin:end], non_blocking=True)


_read_by_graphs: list[Tensor] = []


def keep_for_graphs(tensor: Tensor | None) -> None:
    """Keep a tensor that nobody needs any more, but whose address captured graphs may hold: nothing says when a graph is dropped."""
    if tensor is not None and tensor.is_cuda and Replica.captures > 0:
        _read_by_graphs.append(tensor)


class Replica:
    """The int32 vector on one device.

    A write is one kernel on the current stream that carries the values as its arguments, so that no later commit overtakes it. Streams on
    which the vector was read or written before wait for each other around a write.

    Attributes:
        tensor: what kernels read.
        captured: a CUDA graph was captured whose kernels read it.
    """

    #: ``write(target, source, begin, end)``: set by ``ops.backend`` to that of the compiled library, if it was built for CUDA.
    write_device: Callable[[Tensor, Tensor, int, int], None] = staticmethod(_copy)
    #: How often an op was captured, in this process.
    captures = 0

    def __init__(self, source: Tensor, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensor = source.to(device)
        self.tensor._replica = weakref.ref(self)  # type: ignore[attr-defined]
        self.captured = False
        self._cuda = device.type == "cuda"
        self._streams: dict[int, Any] = {}

    @staticmethod
    def of(tensor: Tensor) -> Replica | None:
        """The replica whose vector a kernel was given."""
        reference = getattr(tensor, "_replica", None)
        return None if reference is None else reference()

    def note_reader(self) -> None:
        """Say that a kernel on the current stream reads the vector."""
        if not self._cuda:
            return
        if torch.cuda.is_current_stream_capturing():
            self.captured = True
            Replica.captures += 1
        else:
            self._note_stream()

    def require_writable(self) -> None:
        """Check that nothing forbids a write now.

        Raises:
            GraphCaptureError: a CUDA graph is being captured, which would repeat the commit at every replay.
        """
        if self._cuda and torch.cuda.is_current_stream_capturing():
            raise GraphCaptureError(
                "ControlBlock: cannot commit while a CUDA graph is being captured: every replay would set these widths again. "
                "Change widths before the capture, or between replays."
            )

    def write(self, source: Tensor, begin: int, end: int) -> None:
        """Take over ``source[begin:end]``, in the order of the current stream."""
        if not self._cuda:
            self.tensor[begin:end].copy_(source[begin:end])
            return
        current = self._note_stream()
        others = [stream for stream in self._streams.values() if stream is not current]
        for stream in others:
            current.wait_stream(stream)
        self.write_device(self.tensor, source, begin, end)
        increment_version(self.tensor)
        for stream in others:
            stream.wait_stream(current)

    def abandon(self) -> None:
        """Say what becomes of captured graphs when the block moves to another vector: they go on reading this one."""
        keep_for_graphs(self.tensor)
        if self.captured:
            warnings.warn(
                "esper_elastic: the control block moves to new memory, since layers or dims were added to it, and CUDA graphs captured "
                "before follow no further width changes. Capture them again.",
                stacklevel=2,
            )

    def _note_stream(self) -> Any:
        raw = torch._C._cuda_getCurrentRawStream(self.tensor.device.index)
        stream = self._streams.get(raw)
        if stream is None:
            stream = self._streams[raw] = torch.cuda.current_stream(self.tensor.device)
        return stream
