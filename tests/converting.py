"""What the converter's tests share: models of the zoo in float64, converted, poisoned and run, and results to compare.

In float64 a wrong index and a rounding error are eight orders of magnitude apart, so that one tolerance serves every model: see
:func:`assert_same`.
"""

import random
from typing import NamedTuple

import torch
from contract import active_part, dormant_mask
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import Case, Inputs, call

import esper_elastic as ee
from esper_elastic.layers import ElasticLayer

#: Relative error of a result in float64. Two orders of the same few hundred additions, some thousand ops deep, differ by about 1e-13.
EXACT = 1e-9


class Outcome(NamedTuple):
    """What one forward and backward leaves.

    Attributes:
        outputs: of the model.
        gradients: of each parameter, by name.
        buffers: afterwards, by name.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def built(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a case, the same at each call."""
    torch.manual_seed(0)
    return case.build().to(dtype)


def inputs_of(case: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    """The inputs of a case, floating ones in ``dtype``."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, case.inputs())


def elastic_layers(model: nn.Module) -> dict[str, ElasticLayer]:
    """Path -> every module with elastic tensors or sizes."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ElasticLayer)}


def poison(model: nn.Module) -> nn.Module:
    """Fill the dormant part of every parameter and buffer with NaN."""
    for layer in elastic_layers(model).values():
        for name, axes in layer.tensor_axes().items():
            tensor = layer.storage(name)
            if tensor is not None and tensor.is_floating_point():
                tensor.detach().masked_fill_(dormant_mask(tensor, axes), float("nan"))
    return model


def valid_widths(dim: ee.ElasticDim, most: int | None = None) -> list[int]:
    """The widths that a dim can take, up to ``most``."""
    return [n for n in range(dim.minimum, (most or dim.capacity) + 1) if n % dim.multiple_of == 0]


def random_widths(model: nn.Module, seed: int) -> dict[str, int]:
    """A valid width for every dim of a model."""
    generator = random.Random(seed)
    return {name: generator.choice(valid_widths(dim)) for name, dim in ee.dims(model).items()}


def run(model: nn.Module, case: Case, inputs: Inputs, training: bool) -> Outcome:
    """Forward and backward of a sum with random weights, under one seed."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(7)
    outputs = case.outputs(call(model, inputs))
    generator = torch.Generator().manual_seed(8)
    weights = [torch.randn(output.shape, generator=generator, dtype=output.dtype) for output in outputs]
    torch.stack([(output * weight).sum() for output, weight in zip(outputs, weights, strict=True)]).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Outcome([output.detach() for output in outputs], gradients, buffers)


def active_outcome(model: nn.Module, outcome: Outcome) -> Outcome:
    """What an elastic model's outcome is in active units; the rest of the gradients has to be zero."""
    axes = {f"{path}.{name}".lstrip("."): own for path, layer in elastic_layers(model).items() for name, own in layer.tensor_axes().items()}
    gradients: dict[str, Tensor | None] = {}
    for name, grad in outcome.gradients.items():
        if grad is not None and name in axes:
            dormant = grad[dormant_mask(grad, axes[name])]
            assert not dormant.any(), f"{name}: {dormant.count_nonzero()} of {dormant.numel()} dormant gradients are not zero"
            grad = active_part(grad, axes[name])
        gradients[name] = grad
    buffers = {name: active_part(buffer, axes[name]) if name in axes else buffer for name, buffer in outcome.buffers.items()}
    return Outcome(outcome.outputs, gradients, buffers)


def assert_same(got: Outcome, expected: Outcome, tolerance: float = EXACT) -> None:
    """Two outcomes are equal up to ``tolerance`` of the largest element of each tensor.

    Gradients that vanish but for rounding, as that of a bias before a batch norm does, are held to the largest gradient of all; running
    means that do, as those behind another batch norm, to the deviation beside them.
    """
    assert len(got.outputs) == len(expected.outputs)
    for index, (one, other) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        assert_close(one, other, f"output {index}", tolerance)
    assert got.gradients.keys() == expected.gradients.keys()
    largest = max((float(grad.abs().max()) for grad in expected.gradients.values() if grad is not None and grad.numel()), default=0.0)
    for name, grad in expected.gradients.items():
        assert (grad is None) == (got.gradients[name] is None), f"gradient of {name}: {got.gradients[name]}, expected {grad}"
        if grad is not None:
            assert_close(got.gradients[name], grad, f"gradient of {name}", tolerance, 1e-4 * tolerance * largest)
    assert got.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        variance = expected.buffers.get(name.removesuffix("running_mean") + "running_var") if name.endswith("running_mean") else None
        floor = 0.0 if variance is None else 1e-4 * tolerance * float(variance.max()) ** 0.5
        assert_close(got.buffers[name], buffer, f"buffer {name}", tolerance, floor)


def assert_close(got: Tensor, expected: Tensor, what: str, tolerance: float = EXACT, floor: float = 0.0) -> None:
    """Equal up to ``tolerance`` of the largest element, or up to ``floor``; finite where finite is expected."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    if not got.is_floating_point():
        assert torch.equal(got, expected), what
    elif got.numel():
        assert got.isfinite().all(), f"{what}: not finite"
        error = float((got - expected).abs().max())
        bound = max(tolerance * float(expected.abs().max()), floor)
        assert error <= bound, f"{what}: error {error:.3e}, expected at most {bound:.3e}"
