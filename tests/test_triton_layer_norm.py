"""The Triton kernels of ``layer_norm``, launched by hand: rows in registers and in blocks, odd shapes, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_exact
from kernels import DEVICE, Segment, active_part, poisoned, widths
from test_triton_linear import DTYPES, functional

from esper_elastic.triton_kernels.layer_norm import Config, layer_norm_backward, layer_norm_forward

SMALL = Config(block=64, elements=256, warps=4, stages=2, programs=1)
BLOCKS = Config(block=32, elements=128, warps=4, stages=2, programs=1)  # rows are wider than what is held in registers
CONFIGS = {"registers": SMALL, "blocks": BLOCKS}
AXES = {
    "one": [Segment(1, 40)],
    "odd": [Segment(35, 72)],
    "few": [Segment(5, 72)],
    "full": [Segment(40, 40)],
    "unaligned": [Segment(17, 37)],
    "times": [Segment(3, 6, 8)],
    "concat": [Segment(9, 16), Segment(1, 8), Segment(5, 8, 3)],
    "odd concat": [Segment(2, 3), Segment(17, 20), Segment(5, 10)],
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("axis", AXES)
def test_forward_and_gradients_are_those_of_the_active_units(axis, config):
    check(AXES[axis], torch.float32, rows=5, config=CONFIGS[config])


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_activation_are_fused(dtype, activation):
    check(AXES["odd"], dtype, rows=3, config=SMALL, activation=activation, residual=True)
    check(AXES["concat"], dtype, rows=3, config=SMALL, activation=activation)
    check(AXES["odd"], dtype, rows=3, config=BLOCKS, activation=activation, residual=activation != "relu")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("fixed", [3, 8])
def test_a_unit_may_have_several_indices(fixed, config):
    check([Segment(3, 5)], torch.float32, rows=3, config=CONFIGS[config], fixed=fixed)
    check([Segment(1, 3), Segment(4, 5)], torch.float32, rows=3, config=CONFIGS[config], fixed=fixed, residual=True, activation="silu")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("parameters", ["", "w"], ids=["no parameters", "no bias"])
def test_parameters_may_be_missing(parameters, config):
    check(AXES["odd"], torch.float32, rows=3, config=CONFIGS[config], parameters=parameters, residual=True, activation="gelu")


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("switches", [(1,), (0,), (1, 0)], ids=str)
def test_a_switch_that_is_off_leaves_zeros(switches, config):
    check(AXES["odd"], torch.float32, rows=3, config=CONFIGS[config], switches=switches, residual=True, activation="gelu")


@pytest.mark.parametrize("rows", [0, 2, 300])
def test_as_configured(rows):
    check(AXES["odd"], torch.bfloat16, rows=rows)
    check(AXES["times"], torch.float32, rows=rows, residual=True, activation="relu")


def test_parameters_may_be_of_a_wider_type():
    for config in CONFIGS.values():
        check(AXES["odd"], torch.bfloat16, rows=3, config=config, parameter_dtype=torch.float32)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_far_from_zero_are_normalised_as_exactly(config):
    check(AXES["odd"], torch.float32, rows=3, config=CONFIGS[config], offset=1000.0)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_the_same_in_every_run(config):
    at = widths(AXES["odd"])
    x, grad = (torch.randn(9, at.capacity[0], device=DEVICE) for _ in range(2))
    weight, bias = (torch.randn(at.capacity[0], device=DEVICE) for _ in range(2))
    where = (at.control, at.slots, at.segments)
    _, mean, rstd = layer_norm_forward(x, 1, weight, bias, None, *where, 1e-5, config=CONFIGS[config])
    runs = [layer_norm_backward(grad, x, 1, weight, bias, None, mean, rstd, *where, config=CONFIGS[config])[:3] for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def check(
    axis,
    dtype,
    rows,
    config=None,
    activation="none",
    residual=False,
    fixed=1,
    parameters="wb",
    switches=(),
    parameter_dtype=None,
    offset=0.0,
):
    """Both launchers against PyTorch in float64 on the active units."""
    at = widths(axis, switches=switches)
    indices = (at.active[0][:, None] * fixed + torch.arange(fixed)).flatten()
    size, n = at.capacity[0] * fixed, len(indices)
    columns, units = (1, indices, size), (0, indices, size)
    x, grad, add = (torch.randn(rows, n, dtype=torch.float64) for _ in range(3))
    x, grad, add = ((x + offset).to(dtype), grad.to(dtype), add.to(dtype) if residual else None)
    weight, bias = ((torch.rand(n, dtype=torch.float64) + 0.25).to(parameter_dtype or dtype) for _ in range(2))
    weight, bias = (t if letter in parameters else None for t, letter in ((weight, "w"), (bias, "b")))
    x_full, grad_full, add_full = (None if t is None else poisoned(t, columns) for t in (x, grad, add))
    weight_full, bias_full = (None if t is None else poisoned(t, units) for t in (weight, bias))
    where = (at.control, at.slots, at.segments)
    operands = (x_full, fixed, weight_full, bias_full, add_full)
    y, mean, rstd = layer_norm_forward(*operands, *where, 1e-5, activation, config=config)
    gx, gw, gb, gadd = layer_norm_backward(grad_full, *operands, mean, rstd, *where, activation, config=config)
    got = [(y, columns), (gx, columns), (gw, units), (gb, units), (gadd, columns)]
    got = [None if t is None else active_part(t, place) for t, place in got]

    def plain(kind):
        leaves = [None if t is None else t.to(kind or t.dtype).detach().requires_grad_() for t in (x, weight, bias, add)]
        y = F.layer_norm(leaves[0], (n,), *leaves[1:3], 1e-5)
        y = functional(activation)(y if add is None else y + leaves[3])
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]

    for name, ours, dense, exact in zip(("y", "gx", "gw", "gb", "gresidual"), got, plain(None), plain(torch.float64), strict=True):
        if ours is None:
            assert dense is None, name
        elif at.on:
            assert_as_exact(ours, dense, exact, name)
        else:
            assert ours.dtype == dense.dtype and (ours == 0).all(), name
