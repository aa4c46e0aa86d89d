"""The Triton kernels of ``linear``, launched by hand: any tile sizes, odd shapes, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_exact
from kernels import DEVICE, Segment, active_part, poisoned, widths

from esper_elastic.triton_kernels import launch
from esper_elastic.triton_kernels.linear import Config, activation_backward, linear_forward, linear_grad_input, linear_grad_weight

SMALL = Config(16, 16, 16, 2, 4, 2)
WIDE = Config(16, 32, 32, 2, 4, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OUT = {
    "one": [Segment(1, 24)],
    "odd": [Segment(17, 40)],
    "full": [Segment(24, 24)],
    "concat": [Segment(5, 8), Segment(17, 24), Segment(1, 2, 3)],
    "odd concat": [Segment(2, 3), Segment(17, 20)],
}
IN = {
    "one": [Segment(1, 24)],
    "odd": [Segment(33, 40)],
    "full": [Segment(40, 40)],
    "times": [Segment(5, 6, 4)],
    "concat": [Segment(9, 16), Segment(20, 20)],
    "odd concat": [Segment(9, 9), Segment(3, 4, 5)],
    "unaligned": [Segment(19, 29)],
}


def functional(activation):
    return {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("inside", IN)
@pytest.mark.parametrize("outside", OUT)
def test_forward_and_gradients_are_those_of_the_active_slice(outside, inside):
    check(OUT[outside], IN[inside], torch.float32, rows=21)


@pytest.mark.parametrize("axes", [("odd", "odd"), ("concat", "concat"), ("odd concat", "odd concat"), ("full", "unaligned")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_types(axes, dtype):
    check(OUT[axes[0]], IN[axes[1]], dtype, rows=21)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_is_fused(activation, dtype):
    check(OUT["odd"], IN["odd"], dtype, rows=19, activation=activation)
    check(OUT["concat"], IN["concat"], dtype, rows=19, activation=activation)


@pytest.mark.parametrize("rows", [1, 16, 67])
@pytest.mark.parametrize("config", [SMALL, WIDE, None], ids=["small tiles", "wide tiles", "as configured"])
def test_tiles_of_any_size_and_sums_in_parts(rows, config):
    check(OUT["odd"], IN["odd"], torch.float32, rows=rows, config=config)


@pytest.mark.parametrize("switches", [(1,), (0,), (1, 0), (1, 1)], ids=str)
def test_a_switch_that_is_off_leaves_zeros(switches):
    check(OUT["odd"], IN["odd"], torch.float32, rows=19, switches=switches)
    check(OUT["concat"], IN["concat"], torch.float32, rows=19, switches=switches, activation="gelu")


def test_without_descriptors(monkeypatch):
    monkeypatch.setattr(launch, "has_copy_engine", lambda device: False)
    check(OUT["odd"], IN["odd"], torch.float32, rows=21)
    check(OUT["concat"], IN["concat"], torch.float32, rows=21)


def test_gradient_of_the_weight_is_the_same_in_every_run():
    at = widths(OUT["odd"], IN["odd"])
    grad, x = (torch.randn(300, size, device=DEVICE) for size in at.capacity)
    weight, bias = torch.empty(at.capacity, device=DEVICE), torch.empty(at.capacity[0], device=DEVICE)
    runs = [linear_grad_weight(grad, x, weight, bias, at.control, at.slots, at.segments, config=SMALL) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def check(outside, inside, dtype, rows, config=SMALL, activation="none", switches=()):
    """Every launcher against PyTorch in float64 on the active slice."""
    at = widths(outside, inside, switches=switches)
    out, into = (0, at.active[0], at.capacity[0]), (1, at.active[1], at.capacity[1])
    n, k = len(at.active[0]), len(at.active[1])
    x, weight, bias, grad = ((torch.rand(shape, dtype=torch.float64) + 0.25).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n)))
    x_full, weight_full = poisoned(x, into), poisoned(weight, out, into)
    bias_full, grad_full = poisoned(bias, out), poisoned(grad, (1, *out[1:]))
    arguments = (at.control, at.slots, at.segments)
    y, before = linear_forward(x_full, weight_full, bias_full, *arguments, activation, activation != "none", config=config)
    if activation != "none":
        grad_full = activation_backward(grad_full, before, activation, *arguments)
    gx = linear_grad_input(grad_full, weight_full, *arguments, config=config)
    gw, gb = linear_grad_weight(grad_full, x_full, weight_full, bias_full, *arguments, config=config)
    got = active_part(y, (1, *out[1:])), active_part(gx, into), active_part(gw, out, into), active_part(gb, out)

    def plain(kind):
        operands = [t.to(kind).detach().requires_grad_() for t in (x, weight, bias)]
        y = functional(activation)(F.linear(*operands))
        y.backward(grad.to(kind))
        return [y, *(operand.grad for operand in operands)]

    for name, ours, dense, exact in zip(("y", "gx", "gw", "gb"), got, plain(dtype), plain(torch.float64), strict=True):
        if at.on:
            assert_as_exact(ours, dense.detach(), exact.detach(), name)
        else:
            assert ours.dtype == dense.dtype and (ours == 0).all(), name
