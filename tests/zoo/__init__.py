"""The models that the converter is tested on: small, in plain `nn`, each written as its authors write it.

What is hard for a tracer is kept on purpose: sizes held as attributes, literals in `view`, parameters outside any layer. Sizes of
unrelated dims differ from each other and from the batch, which is always 2; widths are even, so that each of them can halve.
"""

from . import convnext, convolutional, mobile, residual
from .case import Case, Inputs, call, floating_leaves

MODELS: dict[str, Case] = residual.CASES | convolutional.CASES | mobile.CASES | convnext.CASES

__all__ = ["MODELS", "Case", "Inputs", "call", "floating_leaves"]
