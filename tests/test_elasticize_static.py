"""Converted models in static layout: what the plan allows computes what the exported model does; the rest is refused by name."""

from __future__ import annotations

import math
import random

import pytest
import torch
import zoo
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.layers import ElasticLayer

pytestmark = pytest.mark.wide

CASES = {**zoo.MODELS, **zoo.AWKWARD}
REFUSED = ("data_dependent",)
# results that are intermediates as well have capacity size in static layout, those of the exported model have not
OTHER_SHAPES = ("clip", "t5", "structured_outputs", "parallel_heads")


def without_dropout(model: nn.Module) -> nn.Module:
    """Dropout draws by position, so that two layouts see different masks."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)
    return model


def poison(model: nn.Module) -> None:
    for layer in model.modules():
        if not isinstance(layer, ElasticLayer):
            continue
        for name, axes in layer.tensor_axes().items():
            tensor = layer.storage(name)
            if tensor is None or not tensor.is_floating_point():
                continue
            asleep = torch.zeros(tensor.shape, dtype=torch.bool)
            for index, axis in enumerate(axes):
                if axis is not None:
                    here = torch.ones(axis.capacity, dtype=torch.bool)
                    for start, length in axis.runs():
                        here[start : start + length] = False
                    asleep |= here.view([-1 if i == index else 1 for i in range(tensor.dim())])
            tensor.detach().masked_fill_(asleep, math.nan)


def narrow(model: nn.Module, seed: int) -> None:
    generator = random.Random(seed)
    widths = {}
    for name, dim in ee.dims(model).items():
        if dim.compact_only is None:
            widths[name] = generator.choice([n for n in range(dim.minimum, dim.capacity + 1) if n % dim.multiple_of == 0])
    ee.resize(model, widths)


def results(case: zoo.Case, model: nn.Module) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(3)
    outputs = [t for t in case.outputs(zoo.call(model, doubled(case.inputs()))) if t.is_floating_point()]
    model.zero_grad()
    sum(t.square().sum() for t in outputs).backward()
    return [t.detach() for t in outputs], [p.grad for p in model.parameters()]


def doubled(inputs: object) -> object:
    return torch.utils._pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*REFUSED, *OTHER_SHAPES)])
def test_a_static_model_computes_what_the_exported_one_does(name: str, training: bool) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = without_dropout(case.build()).double()
    ee.elasticize(model, doubled(case.inputs()))
    narrow(model, 1)
    plain = ee.export(model)
    poison(model)
    for dim in ee.dims(model).values():  # at full width, where compact and static are one
        dim.compact_only = None
    ee.set_layout(model, "static")
    outputs, grads = results(case, model.train(training))
    expected, _ = results(case, plain.train(training))
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mean_over_channels", "mean runs over it"),
        ("softmax_over_channels", "softmax runs over it"),
        ("scale_by_size", "code computes a number from sizes"),
        ("bare_rms_norm", "mean runs over it"),
        ("weight_norm_parametrization", "a weight norm"),
    ],
)
def test_what_cannot_be_static_is_refused_by_name(name: str, reason: str) -> None:
    case = CASES[name]
    model = ee.elasticize(case.build(), case.inputs())
    with pytest.raises(ee.LayoutError, match=f"cannot be static: {reason}"):
        ee.set_layout(model, "static")
    assert all(module.layout == "compact" for module in model.modules() if isinstance(module, ElasticLayer))


class Dividing(nn.Module):
    """Divides by what is zero where units sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h / h.norm(dim=0, keepdim=True))


class Gated(nn.Module):
    """Sums over units what a sigmoid has made of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 12), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).sigmoid().sum(1, keepdim=True))


class Summed(nn.Module):
    """Sums over units what stays zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 12), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu().sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Dividing, "no finite value where units sleep"), (Gated, "sums over it what is not zero"), (Summed, None)],
    ids=["divides", "sums-halves", "sums-zeros"],
)
def test_zeros_are_followed_through_plain_ops(make: type[nn.Module], reason: str | None) -> None:
    (dim,) = ee.plan(make(), torch.randn(5, 4)).dims
    assert dim.compact_only is None if reason is None else reason in (dim.compact_only or "")
