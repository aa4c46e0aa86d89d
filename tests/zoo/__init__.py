"""The models that the converter is tested on: small, in plain `nn`, each written as its authors write it.

What is hard for a tracer is kept on purpose: sizes held as attributes, literals in `view`, parameters outside any layer. Sizes of
unrelated dims differ from each other and from the batch, which is 2 or 3; widths are even, so that each of them can halve.
"""

from . import convnext, convolutional, hugging_face, mobile, residual, sequence, vision
from .awkward import AWKWARD
from .case import Case, Inputs, call, floating_leaves

MODELS: dict[str, Case] = (
    residual.CASES | convolutional.CASES | mobile.CASES | convnext.CASES | vision.CASES | sequence.CASES | hugging_face.CASES
)

__all__ = ["AWKWARD", "MODELS", "Case", "Inputs", "call", "floating_leaves"]
