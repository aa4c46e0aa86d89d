"""The models that the converter is tested on: small, in plain `nn`, each written as its authors write it.

What is hard for a tracer is kept on purpose: sizes held as attributes, literals in `view`, parameters outside any layer. Sizes of
unrelated dims differ from each other and from the batch, which is 2 or 3; widths are even, so that each of them can halve.

`MODELS` are the architectures, `AWKWARD` the hard cases, `BIG` two models of full size, for what conversion costs.
"""

from . import awkward, awkward_channels, big, convnext, convolutional, hugging_face, mobile, residual, sequence, vision
from .case import Case, Inputs, call, floating_leaves

MODELS: dict[str, Case] = (
    residual.CASES | convolutional.CASES | mobile.CASES | convnext.CASES | vision.CASES | sequence.CASES | big.SMALL | hugging_face.CASES
)
AWKWARD: dict[str, Case] = awkward.CASES | awkward_channels.CASES
BIG: dict[str, Case] = big.BIG

__all__ = ["AWKWARD", "BIG", "MODELS", "Case", "Inputs", "call", "floating_leaves"]
