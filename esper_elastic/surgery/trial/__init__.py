"""Runs of a model on tensors without values: what it can be called with, what its modules are called with, whether it still runs."""
