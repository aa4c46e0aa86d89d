"""What GradMax starts newborn units from: how the gradient of their producers' weights depends on their consumers' weights.

A newborn unit with producer weights zero and consumer weights ``u`` has the producer gradient ``u^T M``. ``M`` adds, over examples and
positions, the gradient at the consumer's output times the producer's input, as far apart as the kernels of both reach:

    M[(o, b), (c, a)] = sum over n, q of G_b[n, o, q] * x[n, c, reach(q, a)]

``G_b`` is the consumer's output gradient seen from its input positions ``q`` through tap ``b`` of its kernel, and brought back by what lies
between (:mod:`esper_elastic.growth.routes`). Each tap costs what the producer's weight gradient costs.

Source: Evci, van Merrienboer, Unterthiner, Vladymyrov, Pedregosa: GradMax (ICLR 2022), section 3 and appendix on convolutions, there by an
auxiliary layer.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as weight_gradients
from torch.nn.modules.conv import _ConvNd

from ..control import ElasticDim
from ..layers import ElasticLayer
from ..ops.reference import active_slice
from .activations import unit_axis
from .revision import stamp
from .routes import Call, Route


class Statistic:
    """The blocks of ``M`` for one dim, by consumer and producer. It holds neither layers nor dims.

    Attributes:
        reason: why there is none, or ``None``.
        half: whether activations are float16, which has no very small numbers.
        blocks: ``(consumer, producer)``, by their places in the lists, -> ``(out, taps, in, taps)`` over active units.
    """

    def __init__(self, dim: ElasticDim) -> None:
        self.reason: str | None = None
        self.half = False
        self.consumers: list[weakref.ref[ElasticLayer]] = []
        self.producers: list[weakref.ref[ElasticLayer]] = []
        self.blocks: dict[tuple[int, int], Tensor] = {}
        self._stamps: dict[int, tuple[weakref.ref[ElasticDim], tuple[int, int]]] = {}
        self._remember(dim)

    def holds(self) -> bool:
        """Whether every dim that it speaks of has the units that it had."""
        for reference, then in self._stamps.values():
            dim = reference()
            if dim is None or stamp(dim) != then:
                return False
        return True

    def add(self, consumer: ElasticLayer, gradient: Tensor, shape: tuple[int, ...], inner: int, routes: list[Route]) -> None:
        """Add what a gradient at the output of ``consumer`` says, ``shape`` being examples and positions of its input."""
        usable = [route for route in routes if route.call.input is not None and route.call.layer is not None]
        if not usable or self.reason is not None:
            return
        for route in usable:
            call = route.call
            if call.input is not None and call.input._version != call.version:
                self.reason = "an input was changed in place between forward and backward"
                return
        by_taps = [[self._block(tap, route) for route in usable] for tap in taps(consumer, gradient, shape, inner)]
        for index, route in enumerate(usable):
            columns = [blocks[index] for blocks in by_taps]
            producer = route.call.layer
            assert producer is not None
            if any(block is None for block in columns):
                self.reason = f"positions of what {producer._widths.label} gives and {consumer._widths.label} takes do not correspond"
                return
            block = torch.stack([block for block in columns if block is not None], 1)
            key = self._index(self.consumers, consumer), self._index(self.producers, producer)
            self.blocks[key] = self.blocks[key] + block if key in self.blocks else block

    def matrix(self) -> Tensor:
        """``M``, its rows those of the consumers after each other, its columns those of the producers.

        Shape:
            ``(sum of out * taps, sum of in * taps)``.
        """
        sizes = {key: (block.shape[:2].numel(), block.shape[2:].numel()) for key, block in self.blocks.items()}
        any_block = next(iter(self.blocks.values()))
        rows = []
        for i in range(len(self.consumers)):
            height = next(size[0] for (row, _), size in sizes.items() if row == i)
            parts = []
            for j in range(len(self.producers)):
                width = next(size[1] for (_, column), size in sizes.items() if column == j)
                block = self.blocks.get((i, j))
                parts.append(any_block.new_zeros(height, width) if block is None else block.flatten(2).flatten(0, 1).to(any_block))
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def _block(self, tap: Tensor, route: Route) -> Tensor | None:
        back = route.bring_back(tap)
        return None if back is None else _correlate(route.call, back)

    def _index(self, layers: list[weakref.ref[ElasticLayer]], layer: ElasticLayer) -> int:
        for index, known in enumerate(layers):
            if known() is layer:
                return index
        layers.append(weakref.ref(layer))
        for axis in layer._widths.axes:
            for dim in axis.dims:
                self._remember(dim)
        return len(layers) - 1

    def _remember(self, dim: ElasticDim) -> None:
        self._stamps.setdefault(id(dim), (weakref.ref(dim), stamp(dim)))


def canonical_shape(layer: ElasticLayer, activation: Tensor, inner: int) -> tuple[int, ...]:
    """Examples and positions of an activation, as gradients travel; ``inner`` neighbouring indices of one unit are positions."""
    index = unit_axis(layer, activation)
    assert index is not None
    return (activation.shape[:index].numel(), *activation.shape[index + 1 :], *([inner] if inner > 1 else []))


def taps(consumer: ElasticLayer, gradient: Tensor, shape: tuple[int, ...], inner: int) -> Iterator[Tensor]:
    """The gradient at the output of a consumer as each tap of its kernel brings it to its input.

    Args:
        consumer: a linear layer or a convolution.
        gradient: of its output.
        shape: examples and positions of its input.
        inner: neighbouring inputs per unit of a linear layer, which are its taps.

    Shape:
        ``(examples, active outputs, *positions)`` each, at least float32.
    """
    index = unit_axis(consumer, gradient)
    assert index is not None
    gradient = _active(gradient, index, consumer, 0)
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if isinstance(consumer, nn.Linear):
        flat = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient[None]
        if inner == 1:
            yield flat
            return
        for tap in range(inner):
            at_tap = flat.new_zeros(*flat.shape, inner)
            at_tap[..., tap] = flat
            yield at_tap
        return
    assert isinstance(consumer, _ConvNd)
    gradient = gradient if index == 1 else gradient[None]
    padding = list(consumer._reversed_padding_repeated_twice)
    mode = "constant" if consumer.padding_mode == "zeros" else consumer.padding_mode
    with torch.enable_grad():
        x = gradient.new_zeros(shape[0], gradient.shape[1], *shape[1:]).requires_grad_()
        padded = F.pad(x, padding, mode=mode)
    for places in itertools.product(*(range(size) for size in consumer.kernel_size)):
        reach: list[Any] = [slice(None), slice(None)]
        for axis, place in enumerate(places):
            start, stride = place * consumer.dilation[axis], consumer.stride[axis]
            reach.append(slice(start, start + stride * (gradient.shape[axis + 2] - 1) + 1, stride))
        with torch.enable_grad():
            reached = padded[tuple(reach)]
        yield torch.autograd.grad(reached, x, gradient, retain_graph=True)[0]


def _correlate(call: Call, gradient: Tensor) -> Tensor:
    """The weight gradient of a producer whose output has ``gradient``, of whatever number of channels.

    Shape:
        ``(examples, channels, *positions)`` to ``(channels, in, taps)``.
    """
    producer, x = call.layer, call.input
    assert producer is not None
    assert x is not None
    index = unit_axis(producer, x)
    assert index is not None
    x = _active(x, index, producer, 1).to(gradient.dtype)
    if isinstance(producer, nn.Linear):
        return (gradient.T @ (x.flatten(0, -2) if x.dim() > 1 else x[None]))[..., None]
    assert isinstance(producer, _ConvNd)
    x = F.pad(
        x if index == 1 else x[None],
        list(producer._reversed_padding_repeated_twice),
        mode="constant" if producer.padding_mode == "zeros" else producer.padding_mode,
    )
    function = weight_gradients.conv1d_weight if len(producer.kernel_size) == 1 else weight_gradients.conv2d_weight
    size = (gradient.shape[1], x.shape[1], *producer.kernel_size)
    return function(x, size, gradient, producer.stride, 0, producer.dilation).flatten(2)


def _active(activation: Tensor, index: int, layer: ElasticLayer, side: int) -> Tensor:
    """What is active of an activation; ``side`` counts the layer's axes, 0 what it gives and 1 what it takes."""
    axis = layer._widths.axes[side]
    return active_slice(activation, index, axis) if layer._widths.static and axis.active < axis.capacity else activation


def serves(layer: ElasticLayer) -> bool:
    """Whether GradMax knows the weight of a layer: linear ones and convolutions without groups, not transposed ones."""
    ungrouped = getattr(layer, "_group_width", None) is None
    return isinstance(layer, nn.Linear) or (isinstance(layer, _ConvNd) and not layer.transposed and ungrouped)
