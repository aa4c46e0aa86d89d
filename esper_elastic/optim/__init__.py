"""Optimizers that act on active slices: :class:`AdamW` and :class:`SGD`, :func:`guard` for those of ``torch.optim``, and the clipping."""

from .adamw import AdamW
from .clip import clip_grad_norm_
from .guard import guard
from .sgd import SGD

__all__ = ["SGD", "AdamW", "clip_grad_norm_", "guard"]
