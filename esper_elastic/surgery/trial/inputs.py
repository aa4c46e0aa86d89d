"""Which inputs of a model are known: given, recorded when it was made elastic, or derived from its first layer and tried.

A derived input has run once through the model, on tensors without values and in evaluation mode as well as in the model's own. It stays
known while the first layers stay as they are, whatever becomes of the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import example_of
from ...convert.trace import Example
from ...errors import ConversionError, SurgeryError
from .memory import Derived, memory_of, stamp_of
from .recording import attempt
from .twins import unwrapped

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_LENGTH = 16  # of derived sequences
_SIDES = (32, 64, 224)  # of derived images
_OTHER_SIDES = (28, 96, 128, 16, 48, 256, 299, 8, 40, 20, 24, 36, 12, 14, 10, 56, 80, 112, 160, 192)  # which a classifier may be built for
_TRIED = 3  # layers that may be the first


def known_inputs(model: nn.Module, given: Any = None) -> Inputs | None:
    """Inputs that ``model`` can be called with: positional arguments and arguments by name.

    Args:
        model: any module.
        given: example inputs as ``elasticize`` takes them: a tensor, a tuple or list of arguments, or a dict of keyword arguments.

    Returns:
        those given; else those that ``elasticize`` recorded; else small ones derived from the first layer, tried on tensors without values;
        else ``None``.

    Effects:
        Draws from a generator of its own. What was derived is remembered, weakly.

    Raises:
        SurgeryError: ``given`` is nothing that example inputs can be.
    """
    inner = unwrapped(model)
    if given is None:
        given = example_of(model)
    if given is None and inner is not model:
        given = example_of(inner)
    if given is not None:
        try:
            example = Example(given)
        except ConversionError as error:
            raise SurgeryError(str(error)) from error
        return example.args, example.kwargs
    memory, stamp = memory_of(inner), stamp_of(inner)
    kept = memory.derived
    if kept is not None and kept.stamp == stamp:
        return kept.inputs
    if kept is not None and kept.inputs is not None and _still_first(inner, kept.entry):
        memory.derived = Derived(stamp, kept.entry, kept.inputs)
    else:
        memory.derived = Derived(stamp, *_derive(inner))
    return memory.derived.inputs


def _derive(model: nn.Module) -> tuple[Any, Inputs | None]:
    """The first candidate that runs in evaluation mode and as the model is, and what it was made for."""
    for layer, (args, kwargs) in _candidates(model):
        modes = (False, None) if any(module.training for module in model.modules()) else (False,)
        if all(attempt(model, args, kwargs, training=mode, explain=False)[0] is not None for mode in modes):
            return (tuple(_parameters(model)), layer), (args, kwargs)
    return None, None


def _still_first(model: nn.Module, entry: Any) -> bool:
    """Whether a model still takes inputs made for a layer, as far as its forward's parameters and its first layers tell."""
    parameters, layer = entry
    return tuple(_parameters(model)) == parameters and (layer is None or any(known[:2] == layer for known in _first_layers(model)))


def _candidates(model: nn.Module) -> Iterator[tuple[tuple[str, int] | None, Inputs]]:
    """Inputs to try, each with the kind and size of the layer that it was made for."""
    parameters = _parameters(model)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    layers = list(_first_layers(model))
    if {"input_ids", "pixel_values"} & parameters.keys():
        for inputs in _named(model, parameters, layers):
            yield None, inputs
    elif len(required) <= 1:
        for kind, size, like in layers:
            for shape in _shapes(kind, size):
                yield (kind, size), ((_drawn(shape, like) if shape[1:] else _ids(size, like),), {})
        for kind, size, like in layers[:1]:
            for side in _OTHER_SIDES if kind in ("conv1", "conv2") else ():
                yield (kind, size), ((_drawn((2, size, *(side,) * int(kind[-1])), like),), {})


def _named(model: nn.Module, parameters: Any, layers: list[tuple[str, int, Tensor]]) -> Iterator[Inputs]:
    """Arguments by the names that models of ``transformers`` use."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", config)
    like = layers[0][2] if layers else next(model.parameters(), torch.empty(0))
    text = {}
    if "input_ids" in parameters:
        words = getattr(getattr(config, "text_config", config), "vocab_size", None)
        words = words if isinstance(words, int) else next((size for kind, size, _ in layers if kind == "embedding"), 2)
        text = {name: _ids(words, like) for name in ("input_ids", "decoder_input_ids") if name in parameters}
    if "pixel_values" not in parameters:
        yield (), text
        return
    channels, side = getattr(vision, "num_channels", 3), getattr(vision, "image_size", None)
    for size in (side,) if isinstance(side, int) else _SIDES:
        yield (), text | {"pixel_values": _drawn((2, channels, size, size), like)}


def _first_layers(model: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """The layers registered first that say by themselves what they take: kind, size, a tensor of the type of the input."""
    found = 0
    for module in model.modules():
        described = _described(module)
        if described is not None:
            like = next(module.parameters(), None)
            if like is not None and not nn.parameter.is_lazy(like):
                yield *described, like
                found += 1
        if found == _TRIED:
            return


def _described(module: nn.Module) -> tuple[str, int] | None:
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings
    if isinstance(module, nn.Linear):
        return "linear", module.in_features
    if isinstance(module, nn.RNNBase):
        return "sequence", module.input_size
    for axes, kinds in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        if isinstance(module, kinds):
            return f"conv{axes}", module.in_channels
    return None


def _shapes(kind: str, size: int) -> list[tuple[int, ...]]:
    """Shapes to try, the batch first; that of a batch alone stands for numbers of tokens."""
    if kind == "embedding":
        return [(2,)]
    if kind == "linear":
        return [(2, size), (2, _LENGTH, size)]
    if kind == "sequence":
        return [(2, _LENGTH, size)]
    axes = int(kind[-1])
    return [(2, size, *(side,) * axes) for side in (_SIDES if axes < 3 else (16, 32))]


def _drawn(shape: tuple[int, ...], like: Tensor) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    return values.to(device=like.device, dtype=like.dtype if like.is_floating_point() else torch.float32)


def _ids(words: int, like: Tensor) -> Tensor:
    return (torch.arange(2 * _LENGTH, device="cpu") % max(words, 1)).reshape(2, _LENGTH).to(like.device)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}
