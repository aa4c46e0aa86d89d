"""Activations that kernels apply to what they hold in registers, and their derivatives."""

import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "silu")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)``."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """``act'(x)``, for other activations than "none"."""
    if ACTIVATION == "relu":
        result = tl.where(x > 0, 1.0, 0.0)
    if ACTIVATION == "gelu":
        result = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if ACTIVATION == "silu":
        sigmoid = 1 / (1 + tl.exp(-x))
        result = sigmoid * (1 + x * (1 - sigmoid))
    return result
