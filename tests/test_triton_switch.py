"""The Triton kernel of ``switch``, and its derivatives, against torch.where."""

import math

import pytest
import torch
from kernels import DEVICE

from esper_elastic.ops import triton as ops


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (2, 3, 5, 4), (3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_only_what_is_wanted_is_read(shape: tuple[int, ...], on: int, dtype: torch.dtype) -> None:
    control, slot = torch.tensor([7, on, 7], dtype=torch.int32, device=DEVICE), torch.tensor([1], dtype=torch.int32, device=DEVICE)
    wanted = (torch.randn(shape, device=DEVICE) * 8).to(dtype)
    dropped = torch.full_like(wanted, math.nan if dtype.is_floating_point else -1)
    branch, otherwise = (wanted, dropped) if on else (dropped, wanted)
    assert torch.equal(ops.switch(branch, otherwise, control, slot), wanted)
    assert torch.equal(ops.switch(branch, None, control, slot), wanted if on else torch.zeros_like(wanted))


@pytest.mark.parametrize("on", [0, 1])
def test_memory_order_is_that_of_the_branch(on: int) -> None:
    control, slot = torch.tensor([on], dtype=torch.int32, device=DEVICE), torch.tensor([0], dtype=torch.int32, device=DEVICE)
    branch = torch.randn(2, 3, 5, 4, device=DEVICE).to(memory_format=torch.channels_last)
    for otherwise in (torch.randn(2, 3, 5, 4, device=DEVICE), torch.randn(2, 3, 5, 8, device=DEVICE)[..., ::2]):
        result = ops.switch(branch, otherwise, control, slot)
        assert torch.equal(result, branch if on else otherwise)
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 by finite differences: on the CPU")
@pytest.mark.parametrize("on", [0, 1])
def test_gradients_of_both_orders(on: int) -> None:
    control, slot = torch.tensor([on], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for operands, call in (
        ((x, y), lambda x, y: ops.switch(x, y, control, slot).square()),
        ((x,), lambda x: ops.switch(x, None, control, slot).square()),
    ):
        assert torch.autograd.gradcheck(call, operands)
        assert torch.autograd.gradgradcheck(call, operands)
    torch.library.opcheck(torch.ops.esper_elastic.triton_select.default, (x, y, control, slot))
    torch.library.opcheck(torch.ops.esper_elastic.triton_gate.default, (x, control, slot, True))
