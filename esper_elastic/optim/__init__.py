"""Optimizers that act on active slices: :class:`AdamW` and :class:`SGD`, and :func:`guard` for those of ``torch.optim``."""

from .adamw import AdamW
from .guard import guard
from .sgd import SGD

__all__ = ["SGD", "AdamW", "guard"]
