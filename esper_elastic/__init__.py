"""Elastic capacity for PyTorch: layers own weights at a capacity, a control block says what is active, kernels compute on that alone."""

from . import errors, growth, importance, optim, training
from .calibration import recalibrate
from .checkpoint import load, save
from .control import ControlBlock, ElasticDim, concat
from .convert import Plan, elasticize, export, plan
from .errors import (
    CalibrationError,
    CapacityError,
    CheckpointError,
    ConversionError,
    ElasticError,
    LayoutError,
    SurgeryError,
    TopologyError,
    TransactionError,
)
from .layers import (
    ElasticBatchNorm1d,
    ElasticBatchNorm2d,
    ElasticBlock,
    ElasticConv1d,
    ElasticConv2d,
    ElasticConvTranspose2d,
    ElasticEmbedding,
    ElasticGroupNorm,
    ElasticLayerNorm,
    ElasticLinear,
    ElasticRMSNorm,
)
from .model import control_block, dims, disable, enable, resize, set_layout
from .ops import backend_info
from .summary import Summary, summary
from .surgery import LayerSpec, ModelSurgeon, SurgeryResult, SurgeryValidator, ValidationResult, journal, replay, transaction

__version__ = "0.1.0"

__all__ = [
    "ControlBlock",
    "ElasticDim",
    "concat",
    "ElasticBatchNorm1d",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticConv1d",
    "ElasticConv2d",
    "ElasticConvTranspose2d",
    "ElasticEmbedding",
    "ElasticGroupNorm",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticRMSNorm",
    "backend_info",
    "control_block",
    "dims",
    "disable",
    "elasticize",
    "enable",
    "export",
    "load",
    "plan",
    "Plan",
    "recalibrate",
    "resize",
    "save",
    "set_layout",
    "Summary",
    "summary",
    "LayerSpec",
    "ModelSurgeon",
    "SurgeryResult",
    "SurgeryValidator",
    "ValidationResult",
    "journal",
    "replay",
    "transaction",
    "growth",
    "importance",
    "errors",
    "ElasticError",
    "CalibrationError",
    "CapacityError",
    "CheckpointError",
    "ConversionError",
    "LayoutError",
    "SurgeryError",
    "TopologyError",
    "TransactionError",
    "optim",
    "training",
]
