"""How the units of a dim come from the layers that produce them to one that consumes them, read from the autograd graph.

GradMax has to know what a newborn unit that is zero becomes on the way, and what of a gradient comes back through it. Between producer and
consumer it follows batch norms, activations that keep zero at zero, sums of residual streams, concatenations, dropout and pooling. All
else it names as a reason to refuse.

Gradients travel as ``(examples, channels, *positions)``; layers with units on the last axis count every position as an example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..control import ElasticDim
from ..layers import ElasticLayer

Pull = Callable[[Tensor, tuple[int, ...]], Tensor]

#: Derivatives at zero of activations that are zero there; relu's is that from above, where a newborn unit's spark puts it.
_SLOPES = {
    "ReluBackward0": 1.0,
    "LeakyReluBackward0": 1.0,
    "PreluKernelBackward0": 1.0,
    "TanhBackward0": 1.0,
    "EluBackward0": 1.0,
    "CeluBackward0": 1.0,
    "GeluBackward0": 0.5,
    "SiluBackward0": 0.5,
    "HardswishBackward0": 0.5,
    "MishBackward0": 0.6,
}
_DEAD_AT_ZERO = {"ReluBackward0", "HardtanhBackward0", "ThresholdBackward0"}
_SAME_UNITS = {
    "AliasBackward0",
    "CatBackward0",
    "CloneBackward0",
    "NativeDropoutBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
_DEPTH = 100


class Call:
    """One call of an elastic layer in a forward pass.

    Attributes:
        layer: that was called; dropped when the observation ends, as the input is.
        input: what it was given, detached; only of producers.
        version: of the input.
        shape: of the output, as gradients travel, without channels: ``(examples, *positions)``.
        before: the node of the graph that the input came from.
        centres: whether it is a batch norm that takes the mean of the batch.
    """

    __slots__ = ("__weakref__", "before", "centres", "input", "layer", "shape", "version")

    def __init__(self, layer: ElasticLayer, shape: tuple[int, ...], before: Any, input: Tensor | None) -> None:
        self.layer: ElasticLayer | None = layer
        self.shape = shape
        self.before = before
        self.input = input
        self.version = 0 if input is None else input._version
        self.centres = isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)

    def forget(self) -> None:
        """Let go of the layer and its tensors."""
        self.layer = self.before = self.input = None


class Route(NamedTuple):
    """A way from a producer's call to a consumer.

    Attributes:
        call: of the producer.
        pulls: what brings a gradient back, the last on the way first, each with the examples and positions in front of it if known.
        lit: whether a bias on the way can lift newborn units above zero.
        shape: examples and positions behind the last layer on the way, ``None`` once pooling has changed them.
        reason: why GradMax cannot follow it, or ``None``.
    """

    call: Call
    pulls: tuple[tuple[Pull, tuple[int, ...]], ...]
    lit: bool
    shape: tuple[int, ...] | None
    reason: str | None

    def behind(self, pull: Pull) -> Route:
        return self._replace(pulls=((pull, self.shape or ()), *self.pulls))

    def refused(self, reason: str) -> Route:
        return self if self.reason is not None else self._replace(reason=reason)

    def bring_back(self, gradient: Tensor) -> Tensor | None:
        """The gradient at the producer's output, or ``None`` where positions do not correspond.

        Shape:
            ``(examples, channels, *positions)`` at the consumer's input, to the same at the producer's output.
        """
        for pull, shape in (*self.pulls, (_as_it_is, self.call.shape)):
            gradient = pull(gradient, shape)
            if not shape:
                continue
            if gradient.shape[0] != shape[0] or gradient.shape[2:].numel() != torch.Size(shape[1:]).numel():
                return None
            gradient = gradient.reshape(gradient.shape[0], gradient.shape[1], *shape[1:])
        return gradient


def routes_to(node: Any, dim: ElasticDim, calls: object) -> list[Route]:
    """Every route from a producer of ``dim`` to ``node``.

    Args:
        node: of the graph, that a consumer's input came from.
        dim: whose units travel.
        calls: the key by which nodes hold the :class:`Call` that made them, in their metadata.
    """
    return _Walk(dim, calls).arriving_at(node, 0)


class _Walk:
    def __init__(self, dim: ElasticDim, key: object) -> None:
        self.dim = dim
        self.key = key
        self.known: dict[Any, list[Route]] = {}

    def arriving_at(self, node: Any, depth: int) -> list[Route]:
        if node is None or depth > _DEPTH:
            return []
        if node not in self.known:
            call = node.metadata.get(self.key)
            self.known[node] = self._through(node, depth) if call is None or call.layer is None else self._from(call, depth)
        return self.known[node]

    def _from(self, call: Call, depth: int) -> list[Route]:
        """The routes that leave a layer."""
        layer = call.layer
        assert layer is not None
        if not any(self.dim is dim for axis in layer._widths.axes[:1] for dim in axis.dims):
            return []
        label = layer._widths.label
        if isinstance(layer, _BatchNorm):
            gain = 1.0 if layer.weight is not None else layer.eps**-0.5
            return [
                route._replace(lit=layer.bias is not None).behind(_normed(gain, call.centres))._replace(shape=call.shape)
                for route in self.arriving_at(call.before, depth + 1)
            ]
        if layer.mixes_units:
            return [route._replace(shape=call.shape) for route in self.arriving_at(call.before, depth + 1)]
        if call.input is None:
            return [Route(call, (), True, call.shape, f"{label} lies between")]
        return [Route(call, (), layer.bias is not None, call.shape, None)]

    def _through(self, node: Any, depth: int) -> list[Route]:
        """The routes that leave a plain operation."""
        name = node.name()
        inputs = [before for before, _ in node.next_functions]
        branches = [self.arriving_at(before, depth + 1) for before in inputs]
        found = [route for branch in branches for route in branch]
        if not found:
            return []
        if name in _SAME_UNITS:
            return found
        if name.startswith("AddBackward"):
            if not all(branches):
                return [route.refused("a sum adds what no layer over the dim has produced") for route in found]
            return [route._replace(lit=any(other.lit for other in found)) for route in found]
        if name == "MulBackward0" and len([before for before in inputs if before is not None]) == 1:
            return found  # dropout, whose mean is the identity, or a fixed factor
        if name in _DEAD_AT_ZERO and not all(route.lit for route in found):
            return [
                route.refused("a relu has no gradient at zero, and the layer in front of it has no bias to lift newborn units above that")
                for route in found
            ]
        slope = _slope(node, name)
        if slope is not None:
            return found if slope == 1.0 else [route.behind(_times(slope)) for route in found]
        pull = _pooling(node, name)
        if pull is not None:
            return [
                route.refused("two poolings follow each other") if route.shape is None else route.behind(pull)._replace(shape=None)
                for route in found
            ]
        return [route.refused(f"{name.removesuffix('0').removesuffix('Backward')} lies between") for route in found]


def _slope(node: Any, name: str) -> float | None:
    if name == "HardtanhBackward0":
        return 1.0 if node._saved_min_val <= 0 < node._saved_max_val else None
    if name == "ThresholdBackward0":
        return 1.0 if node._saved_threshold == 0 else None
    if name == "EluBackward0":
        return float(node._saved_scale)
    return _SLOPES.get(name)


def _as_it_is(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    return gradient


def _times(factor: float) -> Pull:
    return lambda gradient, shape: gradient * factor


def _normed(gain: float, centres: bool) -> Pull:
    """Back through a batch norm at a channel that is constant: the identity, without the mean of the batch where that is taken.

    ``grow`` gives a newborn channel the scale ``sqrt(eps)``, so that its derivative is one.
    """

    def pull(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
        if centres:
            gradient = gradient - gradient.mean((0, *range(2, gradient.dim())), keepdim=True)
        return gradient if gain == 1.0 else gradient * gain

    return pull


def _pooling(node: Any, name: str) -> Pull | None:
    if name == "MaxPool2DWithIndicesBackward0":
        settings = node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_ceil_mode
        return _pooled(lambda x: F.max_pool2d(x, *settings))
    if name == "AvgPool2DBackward0":
        window = node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_ceil_mode
        counts = node._saved_count_include_pad, node._saved_divisor_override
        return _pooled(lambda x: F.avg_pool2d(x, *window, *counts))
    if name == "MeanBackward1":
        sizes, dims = node._saved_self_sym_sizes, {index % len(node._saved_self_sym_sizes) for index in node._saved_dim}
        if len(sizes) > 2 and dims == set(range(2, len(sizes))):
            return _pooled(lambda x: x.mean(tuple(range(2, x.dim()))))
    return None


def _pooled(function: Callable[[Tensor], Tensor]) -> Pull:
    """Back through what pools each channel, at a channel that is constant."""

    def pull(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
        with torch.enable_grad():
            x = gradient.new_zeros(gradient.shape[0], gradient.shape[1], *shape[1:]).requires_grad_()
            y = function(x)
            if y.numel() != gradient.numel():
                return gradient
            (back,) = torch.autograd.grad(y, x, gradient.reshape(y.shape))
        return back

    return pull
