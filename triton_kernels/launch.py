"""What launchers ask of the device: how many programs to start, whether it has a copy engine, in which precision to multiply."""

import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Segments(NamedTuple):
    """How many rows of a slots table belong to each axis, and to switches; and whether all segments begin at a multiple of 16 bytes."""

    out: int
    inner: int
    switches: int
    aligned: bool


@functools.cache
def num_programs(device: torch.device) -> int:
    """How many programs walk over the tiles: one per multiprocessor; few under the interpreter, which runs them one after the other."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether the device moves tiles by descriptor (TMA)."""
    return INTERPRETED if device.type != "cuda" else torch.cuda.get_device_capability(device) >= (9, 0)


def can_describe(segments: Segments, *tensors: Tensor) -> bool:
    """Whether tiles of these matrices can be described: wherever one begins is a multiple of 16 bytes, and no matrix is empty."""
    return segments.aligned and all(
        has_copy_engine(t.device) and t.numel() > 0 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors
    )


def describe(tensor: Tensor, block: Sequence[int], tma: bool) -> Any:
    """A matrix as a kernel's operand: a descriptor that loads ``block`` and gives zero outside, or the tensor itself."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)) if tma else tensor


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """How ``dot`` multiplies operands of ``dtype``. The interpreter multiplies the bits of bfloat16, so there they are cast first."""
    if INTERPRETED and dtype == torch.bfloat16:
        return "upcast"
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


def vector_of(segments: Segments, image: Tensor) -> int:
    """How many neighbouring channels move at once: up to 16 bytes, if all segments begin and all positions lie at multiples of that."""
    return math.gcd(16 // image.element_size(), image.shape[1]) if segments.aligned and image.data_ptr() % 16 == 0 else 1
