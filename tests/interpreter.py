"""Makes Triton's interpreter convert to and from bfloat16 as GPUs do: it truncates, which doubles every rounding error.

Imported by conftest.py where kernels are interpreted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def round_as_hardware_does() -> None:
    """Replace the conversion between float32 and bfloat16 by torch's."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(array: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        values = torch.from_numpy(np.ascontiguousarray(array))
        if (source, target) == (tl.float32, tl.bfloat16):
            return values.view(torch.float32).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(torch.bfloat16).to(torch.float32).numpy()
        return convert(array, source, target, rounding)

    interpreter._convert_float = convert_float
