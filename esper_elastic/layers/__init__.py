"""Elastic layers: drop-ins for ``torch.nn`` whose widths are data."""

from .base import ElasticLayer
from .linear import ElasticLinear

__all__ = ["ElasticLayer", "ElasticLinear"]
