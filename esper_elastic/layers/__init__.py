"""Elastic layers: drop-ins for ``torch.nn`` whose widths are data."""

from .base import ElasticLayer
from .block import ElasticBlock
from .conv import ElasticConv2d
from .linear import ElasticLinear

__all__ = ["ElasticBlock", "ElasticConv2d", "ElasticLayer", "ElasticLinear"]
