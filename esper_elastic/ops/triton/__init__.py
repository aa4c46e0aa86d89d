"""Triton's side of the ops, in static layout: their registration with torch and their derivatives over the kernels of ``triton_kernels``.

Imported when a layer first chooses Triton. The ops take the control tensor and the slots on the device of their operands and read no width
on the host, so that compiled models and captured graphs follow every commit. Each family is closed under differentiation.
"""

from .. import flops
from .batch_norm import batch_norm
from .conv2d import conv2d
from .embedding import embedding
from .group_norm import group_norm
from .layer_norm import layer_norm
from .linear import linear
from .rms_norm import rms_norm
from .switch import switch

__all__ = ["batch_norm", "conv2d", "embedding", "group_norm", "layer_norm", "linear", "rms_norm", "switch"]

flops.register()
