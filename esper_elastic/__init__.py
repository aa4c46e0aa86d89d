"""Elastic capacity for PyTorch: layers own weights at a capacity, a control block says what is active, kernels compute on that alone."""

from . import errors, growth, importance, optim
from .control import ControlBlock, ElasticDim, concat
from .convert import export
from .errors import CapacityError, ElasticError, LayoutError, SurgeryError, TopologyError, TransactionError
from .layers import (
    ElasticBatchNorm1d,
    ElasticBatchNorm2d,
    ElasticBlock,
    ElasticConv2d,
    ElasticEmbedding,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticRMSNorm,
)
from .model import control_block, dims, disable, enable, resize, set_layout
from .ops import backend_info

__version__ = "0.1.0"

__all__ = [
    "ControlBlock",
    "ElasticDim",
    "concat",
    "ElasticBatchNorm1d",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticEmbedding",
    "ElasticGroupNorm",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticRMSNorm",
    "ElasticConv2d",
    "backend_info",
    "control_block",
    "dims",
    "disable",
    "enable",
    "export",
    "resize",
    "set_layout",
    "growth",
    "importance",
    "errors",
    "ElasticError",
    "CapacityError",
    "LayoutError",
    "SurgeryError",
    "TopologyError",
    "TransactionError",
    "optim",
]
