"""Elastic neural network layers for PyTorch: capacity is allocated once, the active part is a number that changes in microseconds."""

__version__ = "0.1.0"
