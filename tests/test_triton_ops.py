"""Second derivatives of the ops that Triton serves, against those of the reference, and torch's own check of their registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from contract import needs_kernels, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.ops import widths as widths_module

pytestmark = needs_kernels
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: ee.ElasticLinear(5, 6, max_in_features=9, max_out_features=8), (4, 9)),
    "conv2d": (lambda: ee.ElasticConv2d(5, 6, 3, stride=2, padding=1, max_in_channels=9, max_out_channels=8), (2, 9, 4, 5)),
    "batch norm": (lambda: ee.ElasticBatchNorm2d(5, max_num_features=9), (3, 9, 2, 2)),
    "batch norm, eval": (lambda: ee.ElasticBatchNorm2d(5, max_num_features=9).eval(), (3, 9, 2, 2)),
    "layer norm": (lambda: ee.ElasticLayerNorm(5, max_num_features=9), (4, 9)),
    "group norm": (lambda: ee.ElasticGroupNorm(2, 4, max_num_features=6), (2, 6, 3)),
    "group norm, one group": (lambda: ee.ElasticGroupNorm(1, 4, max_num_features=6, bias=False), (2, 6, 3)),
    "rms norm": (lambda: ee.ElasticRMSNorm(5, max_num_features=9), (4, 9)),
}


def second_derivatives(layer: nn.Module, x: Tensor, backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Gradients of a function of the first gradients."""
    monkeypatch.setattr(widths_module, "choose", lambda device, static: backend)
    layer.bind_control()
    x = x.detach().clone().requires_grad_()
    operands = [x, *layer.parameters()]
    y = layer(x)
    first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
    found = torch.autograd.grad(sum(g.sin().sum() for g in first), operands)
    return [y, *first, *found]


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_are_those_of_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    layer.layout = "static"
    poison(layer)
    x = torch.randn(shape)
    ours = second_derivatives(layer, x, "triton", monkeypatch)
    theirs = second_derivatives(layer, x, "reference", monkeypatch)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_ops_pass_opcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    layer.layout = "static"
    calls: list[tuple[object, tuple[object, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "esper_elastic":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(widths_module, "choose", lambda device, static: "triton")
    layer.bind_control()
    with Record():
        layer(torch.randn(shape, requires_grad=True)).sum().backward()
    assert len({func for func, _ in calls}) >= 2
    for func, args in calls:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
