"""An example input made from a shape, where none is at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..surgery.trial.inputs import known_inputs
from ..surgery.trial.recording import attempt


def runs_on(model: nn.Module, example_inputs: Any) -> bool:
    """Whether a model runs on inputs, tried on tensors without values."""
    args, kwargs = known_inputs(model, example_inputs) or ((), {})
    return attempt(model, args, kwargs, explain=False)[0] is not None


def inputs_of_shape(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """An input of a shape, with a batch of two in front if it takes that.

    Raises:
        TrainingError: the model runs on neither.
    """
    if isinstance(shape, str) or not all(type(n) is int and 0 < n < 2**20 for n in shape) or math.prod(shape) > 2**28:
        raise TrainingError(f"Trainer: input_shape: expected the sizes of one input, got {shape!r}.")
    said = ""
    for given in ((2, *shape), tuple(shape)):
        x = torch.zeros(given, device=next((parameter.device for parameter in model.parameters()), None))
        calls, failure = attempt(model, (x,), {}, explain=False)
        if calls is not None:
            return x
        said = said or f"{given}: {failure}"
    raise TrainingError(f"Trainer: input_shape: {type(model).__name__} runs neither on {tuple(shape)} nor with a batch before it: {said}.")
