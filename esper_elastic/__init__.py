"""Elastic capacity for PyTorch: layers own weights at a capacity, a control block says what is active, kernels compute on that alone."""

from . import errors, optim
from .control import ControlBlock, ElasticDim, concat
from .errors import CapacityError, ElasticError, LayoutError, SurgeryError, TopologyError, TransactionError
from .layers import ElasticLinear
from .ops import backend_info

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ControlBlock",
    "ElasticDim",
    "ElasticError",
    "ElasticLinear",
    "LayoutError",
    "SurgeryError",
    "TopologyError",
    "TransactionError",
    "backend_info",
    "concat",
    "errors",
    "optim",
]
