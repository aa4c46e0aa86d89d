"""Elastic layers: drop-ins for ``torch.nn`` whose widths are data."""

from .base import ElasticLayer
from .block import ElasticBlock
from .linear import ElasticLinear

__all__ = ["ElasticBlock", "ElasticLayer", "ElasticLinear"]
