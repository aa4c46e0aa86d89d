"""The Triton kernels of ``group_norm``, launched by hand: groups and one group, both memory formats, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_exact
from kernels import DEVICE, Segment, active_part, poisoned, widths
from test_triton_linear import DTYPES

from esper_elastic.triton_kernels.group_norm import Config, group_norm_backward, group_norm_forward

SMALL = Config(block=8, tile=16, warps=4, programs=1)  # groups have several blocks, channels several tiles
AXES = {
    "one": [Segment(1, 3, 4)],
    "odd": [Segment(2, 3, 4)],
    "full": [Segment(3, 3, 4)],
    "concat": [Segment(2, 3, 4), Segment(1, 2, 8), Segment(4, 8)],
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("width", [4, 0], ids=["groups", "one group"])
@pytest.mark.parametrize("axis", AXES)
def test_forward_and_gradients_are_those_of_the_active_channels(axis, width, last):
    check(AXES[axis], torch.float32, width, (1, 3), last, SMALL)


def test_groups_may_be_parts_of_a_unit():
    check(AXES["odd"], torch.float32, 2, (3,), config=SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 0], ids=["groups", "one group"])
def test_as_configured(width, dtype):
    check(AXES["odd"], dtype, width, (5, 7), last=dtype == torch.bfloat16)


def test_many_images_are_added_up():
    check([Segment(1, 1, 2)], torch.float32, 0, (), images=33)


@pytest.mark.parametrize("parameters", ["", "w"], ids=["no parameters", "no bias"])
def test_parameters_may_be_missing(parameters):
    check(AXES["odd"], torch.float32, 4, (3,), config=SMALL, parameters=parameters)
    check(AXES["odd"], torch.float32, 0, (3,), config=SMALL, parameters=parameters)


@pytest.mark.parametrize("switches", [(1,), (0,), (1, 0)], ids=str)
@pytest.mark.parametrize("width", [4, 0], ids=["groups", "one group"])
def test_a_switch_that_is_off_leaves_zeros(width, switches):
    check(AXES["odd"], torch.float32, width, (3,), config=SMALL, switches=switches)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no image", "no pixel"])
def test_nothing_gives_nothing(shape):
    images, pixels = shape
    at = widths(AXES["odd"])
    x, weight = torch.empty(images, 12, pixels, device=DEVICE), torch.ones(12, device=DEVICE)
    where = (at.control, at.slots, at.segments)
    y, mean, rstd = group_norm_forward(x, 4, weight, None, *where, 1e-5)
    gx, gw, gb = group_norm_backward(y, x, 4, weight, None, mean, rstd, *where)
    assert y.shape == gx.shape == x.shape
    assert (gw == 0).all()
    assert gb is None


def test_parameters_may_be_of_a_wider_type():
    check(AXES["odd"], torch.bfloat16, 4, (5,), parameter_dtype=torch.float32)


@pytest.mark.parametrize("width", [4, 0], ids=["groups", "one group"])
def test_images_far_from_zero_are_normalised_as_exactly(width):
    check(AXES["odd"], torch.float32, width, (5,), config=SMALL, offset=1000.0)


def test_gradients_are_the_same_in_every_run():
    at = widths(AXES["odd"])
    x, grad = (torch.randn(3, at.capacity[0], 7, device=DEVICE) for _ in range(2))
    weight, bias = (torch.randn(at.capacity[0], device=DEVICE) for _ in range(2))
    where = (at.control, at.slots, at.segments)
    _, mean, rstd = group_norm_forward(x, 4, weight, bias, *where, 1e-5, config=SMALL)
    runs = [group_norm_backward(grad, x, 4, weight, bias, mean, rstd, *where, config=SMALL) for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def check(axis, dtype, width, shape, last=False, config=None, parameters="wb", switches=(), parameter_dtype=None, offset=0.0, images=2):
    """Both launchers against PyTorch in float64 on the active channels."""
    at = widths(axis, switches=switches)
    n, channels, units = len(at.active[0]), (1, at.active[0], at.capacity[0]), (0, at.active[0], at.capacity[0])
    x = (torch.randn(images, n, *shape, dtype=torch.float64) + offset).to(dtype)
    grad = (torch.rand(images, n, *shape, dtype=torch.float64) + 0.25).to(dtype)  # where sums cancel, PyTorch's error is a matter of luck
    weight, bias = ((torch.rand(n, dtype=torch.float64) + 0.25).to(parameter_dtype or dtype) for _ in range(2))
    weight, bias = (t if letter in parameters else None for t, letter in ((weight, "w"), (bias, "b")))
    x_full, grad_full = (poisoned(t, channels) for t in (x, grad))
    if last:
        x_full = x_full.contiguous(memory_format=torch.channels_last)
    weight_full, bias_full = (None if t is None else poisoned(t, units) for t in (weight, bias))
    where = (at.control, at.slots, at.segments)
    how = {} if config is None else {"config": config}
    y, mean, rstd = group_norm_forward(x_full, width, weight_full, bias_full, *where, 1e-5, **how)
    gx, gw, gb = group_norm_backward(grad_full, x_full, width, weight_full, bias_full, mean, rstd, *where, **how)
    assert y.stride() == gx.stride() == x_full.stride()
    got = [None if t is None else active_part(t, place) for t, place in ((y, channels), (gx, channels), (gw, units), (gb, units))]

    def plain(kind):
        leaves = [None if t is None else t.to(kind or t.dtype).detach().requires_grad_() for t in (x, weight, bias)]
        y = F.group_norm(leaves[0], n // width if width else 1, *leaves[1:], 1e-5)
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]

    for name, ours, dense, exact in zip(("y", "gx", "gw", "gb"), got, plain(None), plain(torch.float64), strict=True):
        if ours is None:
            assert dense is None, name
        elif at.on:
            assert_as_exact(ours, dense, exact, name)
        else:
            assert ours.dtype == dense.dtype and (ours == 0).all(), name
