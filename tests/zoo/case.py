"""What a case of the zoo is: how a model is built, what it is called with, which tensors of its result count."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


def floating_leaves(result: Any) -> list[Tensor]:
    """Every floating tensor in a result of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call `model` as `ee.elasticize` does: a tuple holds positional arguments, a dict those by name."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@dataclass(frozen=True)
class Case:
    """A model that the converter is tested on.

    Attributes:
        name: key in the dict that holds the case.
        build: makes the model, drawing from torch's global generator and from nothing else.
        inputs: makes the inputs, the same at each call.
        outputs: the tensors to compare and to differentiate, from what the model returns.
        exports: whether `torch.export.export(..., strict=False)` traces the model.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    outputs: Callable[[Any], list[Tensor]] = floating_leaves
    exports: bool = True

    def run(self, model: nn.Module) -> list[Tensor]:
        """The outputs of `model` for this case's inputs."""
        return self.outputs(call(model, self.inputs()))


def images(height: int, width: int, channels: int = 3) -> Tensor:
    """A batch of two images."""
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def pictures() -> Tensor:
    """Small images for the hard cases."""
    return images(21, 29)


def tokens(length: int, vocabulary: int, batch: int = 3, seed: int = 1) -> Tensor:
    """A batch of sequences of token numbers."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def by_name(*cases: Case) -> dict[str, Case]:
    """The cases under their names, each of which may occur once."""
    named = {case.name: case for case in cases}
    assert len(named) == len(cases)
    return named
