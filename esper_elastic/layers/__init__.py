"""Elastic layers: drop-ins for ``torch.nn`` whose widths are data."""

from .base import ElasticLayer
from .batch_norm import ElasticBatchNorm1d, ElasticBatchNorm2d
from .block import ElasticBlock
from .conv import ElasticConv2d
from .embedding import ElasticEmbedding
from .group_norm import ElasticGroupNorm
from .layer_norm import ElasticLayerNorm
from .linear import ElasticLinear
from .rms_norm import ElasticRMSNorm

__all__ = [
    "ElasticBatchNorm1d",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticConv2d",
    "ElasticEmbedding",
    "ElasticGroupNorm",
    "ElasticLayer",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticRMSNorm",
]
