"""Three things that Triton's interpreter does badly, done well: conftest.py has them where kernels are interpreted.

It truncates what GPUs round, which doubles every error of bfloat16. It replaces all of ``triton.language`` at every call of a device
function, though a call within a kernel finds it replaced. And it repeats all arithmetic of integers in 64 bits, for a comparison that is
thrown away unless it runs for debugging. The last two take more than half of the time.
"""

from __future__ import annotations

import dataclasses
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


def patch_language_once() -> None:
    """Let a device function find ``triton.language`` as the kernel that calls it left it."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


def compute_integers_once() -> None:
    """Leave out the check for overflows, whose result nobody looks at."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
