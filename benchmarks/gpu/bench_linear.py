"""Linear by Triton and by cuBLAS on slices, against cuBLAS at exactly the active size, bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import DEVICE, captured, seconds, sized, speed
from harness import bar

import esper_elastic as ee

SIZE, ROWS = sized(4096, 64), sized(8192, 48)
HALF = torch.bfloat16


def layer(layout: str, quarters: int, both: bool = False) -> ee.ElasticLinear:
    """A layer with its outputs, or both sides, at so many quarters of capacity."""
    width = SIZE * quarters // 4
    built = ee.ElasticLinear(
        width if both else SIZE, width, bias=True, max_in_features=SIZE, max_out_features=SIZE, device=DEVICE, dtype=HALF
    )
    built.layout = layout
    return built


def check_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error < 1e-2, f"relative error {error:.2e}"


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_forward(quarters: int, layout: str) -> None:
    elastic = layer(layout, quarters)
    exact = elastic.to_dense()
    x = torch.randn(ROWS, SIZE, device=DEVICE, dtype=HALF)
    with torch.no_grad():
        check_close(elastic(x)[:, : exact.out_features], exact(x))
        value = speed(lambda: elastic(x), lambda: exact(x))
    least = 0.95 if layout == "compact" else 0.85 if quarters == 1 else 0.90
    bar(f"Linear {SIZE} -> {quarters}/4 of {SIZE}, {ROWS} rows, forward, {layout}, speed", value, "x", at_least=least)


@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_gradients(quarters: int) -> None:
    elastic = layer("static", quarters)
    exact = elastic.to_dense()
    width = exact.out_features
    x, grad = (torch.randn(ROWS, SIZE, device=DEVICE, dtype=HALF) for _ in range(2))
    short = grad[:, :width].contiguous()
    at = elastic._widths
    where = at.control, at.slots, at.segments
    ops = torch.ops.esper_elastic

    def input_gradient() -> Any:
        return ops.triton_linear_grad_input(grad, elastic.weight, *where)

    def weight_gradient() -> Any:
        return ops.triton_linear_grad_weight(grad, x, elastic.weight, elastic.bias, *where)

    def exact_weight_gradient() -> Any:
        return short.t() @ x, short.sum(0)

    with torch.no_grad():
        check_close(input_gradient(), short @ exact.weight)
        check_close(weight_gradient()[0][:width], exact_weight_gradient()[0])
        of_input = speed(input_gradient, lambda: short @ exact.weight)
        of_weight = speed(weight_gradient, exact_weight_gradient)
    name = f"Linear {SIZE} -> {quarters}/4 of {SIZE}, {ROWS} rows"
    bar(f"{name}, gradient of the weight and the bias, static, speed", of_weight, "x", at_least=0.88)
    bar(f"{name}, gradient of the input, static, speed", of_input, "x", at_least=0.85)


def test_both_sides_at_half() -> None:
    half, full = layer("static", 2, both=True), layer("static", 4, both=True)
    x = torch.randn(ROWS, SIZE, device=DEVICE, dtype=HALF)
    with torch.no_grad():
        ours, theirs = seconds([captured(lambda: half(x), 4), captured(lambda: full(x), 4)])
    bar(f"Linear {SIZE} x {SIZE}, {ROWS} rows, both sides at 1/2, time over full width, static", ours / theirs, "x", at_most=0.30)
