"""The elastic ops, one file each: argument checks, fake implementation, and the choice of backend.

Every op takes its operands at capacity and a :class:`Widths`, which says what is active. ``reference.py`` is the meaning of each op in
plain PyTorch; the compiled library of ``csrc`` serves the same on strided slices, and the kernels of ``triton_kernels``, through
``ops/triton``, in static layout on GPUs.
"""

from . import flops
from .backend import backend_info, choose
from .batch_norm import batch_norm
from .conv1d import conv1d
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .embedding import embedding
from .group_norm import group_norm
from .layer_norm import layer_norm
from .linear import linear
from .rms_norm import rms_norm
from .switch import switch
from .widths import Widths

__all__ = [
    "Widths",
    "backend_info",
    "batch_norm",
    "choose",
    "conv1d",
    "conv2d",
    "conv_transpose2d",
    "embedding",
    "group_norm",
    "layer_norm",
    "linear",
    "rms_norm",
    "switch",
]

flops.serve()
