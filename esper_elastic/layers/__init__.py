"""Elastic layers: drop-ins for ``torch.nn`` whose widths are data."""

from .base import ElasticLayer
from .batch_norm import ElasticBatchNorm1d, ElasticBatchNorm2d
from .block import ElasticBlock, Switchable
from .conv import ElasticConv1d, ElasticConv2d, ElasticConvTranspose2d
from .embedding import ElasticEmbedding
from .group_norm import ElasticGroupNorm
from .layer_norm import ElasticLayerNorm
from .linear import ElasticLinear
from .rms_norm import ElasticRMSNorm
from .view import ElasticView

__all__ = [
    "ElasticBatchNorm1d",
    "ElasticBatchNorm2d",
    "ElasticBlock",
    "ElasticConv1d",
    "ElasticConv2d",
    "ElasticConvTranspose2d",
    "ElasticEmbedding",
    "ElasticGroupNorm",
    "ElasticLayer",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticRMSNorm",
    "ElasticView",
    "Switchable",
]
