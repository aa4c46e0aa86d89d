"""The Triton kernels of ``conv2d``, launched by hand: all geometries, odd shapes, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from contract import assert_as_exact
from kernels import DEVICE, Segment, active_part, poisoned, widths

from esper_elastic.triton_kernels import conv2d_dense, conv2d_depthwise, conv2d_grouped, conv2d_weight
from esper_elastic.triton_kernels.conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight
from esper_elastic.triton_kernels.conv2d_dense import Config
from esper_elastic.triton_kernels.conv2d_weight import WeightConfig
from esper_elastic.triton_kernels.windows import divide, reciprocal

SMALL = Config(16, 32, 16, 16, 2, 4, 2)
SMALL_WEIGHT = WeightConfig(16, 32, 32, 2, 4, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
AXES = {  # of the output and of the input
    "one": ([Segment(1, 8)], [Segment(1, 24)]),
    "odd": ([Segment(17, 40)], [Segment(19, 24)]),
    "full": ([Segment(16, 16)], [Segment(32, 32)]),
    "unaligned": ([Segment(5, 11)], [Segment(19, 29)]),
    "concat": ([Segment(5, 8), Segment(1, 2)], [Segment(17, 24), Segment(2, 4)]),
    "odd concat": ([Segment(2, 3), Segment(1, 3, 2)], [Segment(9, 9), Segment(3, 4, 3)]),
    "few": ([Segment(17, 24)], [Segment(3, 3)]),
    "few of more": ([Segment(17, 24)], [Segment(2, 4), Segment(1, 3)]),
}
GEOMETRIES = {  # kernel, stride, padding, dilation, size of the image
    "plain": ((2, 2), (1, 1), (1, 1), (1, 1), (3, 3)),
    "unequal padding": ((3, 2), (1, 1), (0, 2), (1, 1), (4, 3)),
    "stride": ((3, 3), (2, 2), (1, 1), (1, 1), (3, 3)),
    "stride beyond the kernel": ((2, 1), (3, 2), (0, 0), (1, 1), (6, 4)),
    "dilation": ((2, 2), (1, 1), (2, 1), (2, 3), (4, 5)),
    "stride and dilation": ((2, 3), (2, 4), (2, 3), (3, 2), (5, 7)),
    "pointwise": ((1, 1), (1, 1), (0, 0), (1, 1), (3, 5)),
    "pointwise, padded": ((1, 1), (1, 1), (1, 0), (1, 1), (3, 2)),
    "one position": ((2, 2), (1, 1), (0, 0), (1, 1), (2, 2)),
}
GROUPS = {  # groups, and channels of one of the output and of the input
    "one": ([Segment(1, 3)], 4, 8),
    "odd": ([Segment(3, 5)], 6, 3),
    "full": ([Segment(2, 2)], 16, 16),
    "wide": ([Segment(1, 2)], 70, 66),
    "concat": ([Segment(2, 3), Segment(1, 2, 2)], 4, 2),
    "multiplied": ([Segment(3, 4)], 3, 1),
    "depthwise": ([Segment(37, 40)], 1, 1),
    "depthwise, unaligned": ([Segment(7, 9)], 1, 1),
    "depthwise, concat": ([Segment(70, 72), Segment(3, 4, 3)], 1, 1),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("axes", AXES)
def test_forward_and_gradients_are_those_of_the_active_slice(axes):
    check(*AXES[axes], geometry="one position" if "concat" in axes else "plain")


@pytest.mark.parametrize("geometry", list(GEOMETRIES)[1:])
def test_windows_of_every_geometry(geometry):
    check(*AXES["unaligned"], geometry=geometry)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_what_is_active(groups):
    check_grouped(groups, "plain")


@pytest.mark.parametrize("geometry", ["pointwise", "stride beyond the kernel", "stride and dilation"])
def test_windows_of_groups(geometry):
    check_grouped("one", geometry)
    check_grouped("depthwise, unaligned", geometry)


@pytest.mark.parametrize("axes", ["unaligned", "few"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_types(axes, dtype):
    check(*AXES[axes], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_narrow_types_of_groups(dtype):
    check_grouped("odd", "one position", dtype=dtype)
    check_grouped("depthwise, unaligned", "plain", dtype=dtype)


@pytest.mark.parametrize("axes", ["unaligned", "few"])
def test_contiguous_weights(axes):
    check(*AXES[axes], weight_format=torch.contiguous_format)


def test_contiguous_weights_of_groups():
    check_grouped("one", "plain", weight_format=torch.contiguous_format)
    check_grouped("depthwise, unaligned", "plain", weight_format=torch.contiguous_format)


@pytest.mark.parametrize("axes", ["full", "unaligned"])
def test_tiles_as_configured(axes):
    check(*AXES[axes], geometry="one position", config=None, weight_config=None)


@pytest.mark.parametrize("switches", [(0,), (1, 0)], ids=str)
def test_a_switch_that_is_off_leaves_zeros(switches):
    for axes, geometry in (("one", "plain"), ("one", "pointwise"), ("few", "one position")):
        check(*AXES[axes], geometry=geometry, switches=switches)
    check_grouped("one", "plain", switches=switches)
    check_grouped("depthwise, unaligned", "plain", switches=switches)


def test_switches_that_are_on_change_nothing():
    check(*AXES["one"], switches=(1, 1))
    check_grouped("one", "plain", switches=(1, 1))
    check_grouped("depthwise, unaligned", "plain", switches=(1, 1))


def test_without_a_bias():
    check(*AXES["one"], bias=False)
    check_grouped("one", "plain", bias=False)
    check_grouped("depthwise, unaligned", "plain", bias=False)


def test_a_batch_of_nothing():
    check(*AXES["one"], batch=0)
    check(*AXES["one"], geometry="pointwise", batch=0)
    check_grouped("one", "plain", batch=0)
    check_grouped("depthwise, unaligned", "plain", batch=0)


def test_wide_indices(monkeypatch):
    for module in (conv2d_dense, conv2d_weight, conv2d_grouped, conv2d_depthwise):
        monkeypatch.setattr(module, "LARGE", 1)
    check(*AXES["one"], geometry="stride")
    check(*AXES["few"], geometry="one position")
    check_grouped("one", "one position")
    check_grouped("depthwise, unaligned", "one position")


def test_sums_in_parts_are_the_same_in_every_run():
    x, grad = (torch.randn(4, 8, 7, size, device=DEVICE).contiguous(memory_format=torch.channels_last) for size in (8, 7))
    for in_width, grouped in ((8, False), (2, True), (1, True)):
        at = widths([Segment(4, 8)], [Segment(4, 8)])
        weight, bias = torch.empty(8, in_width, 1, 2, device=DEVICE), torch.empty(8, device=DEVICE)
        geometry = (at.control, at.slots, at.segments, (1, 1), (0, 0), (1, 1), grouped)
        runs = [conv2d_grad_weight(grad, x, weight, bias, *geometry, config=SMALL_WEIGHT) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        exact = torch.nn.grad.conv2d_weight(
            x[:, :4].double(), (4, min(in_width, 4), 1, 2), grad[:, :4].double(), groups=4 // min(in_width, 4)
        )
        torch.testing.assert_close(runs[0][0][:4, :4].double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(runs[0][1][:4].double(), grad[:, :4].double().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@triton.jit
def _divide_kernel(numbers, quotients, count, factor, shift, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    inside = place < count
    tl.store(quotients + place, divide(tl.load(numbers + place, mask=inside), factor, shift), mask=inside)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 56, 64, 997, 2**20 - 1])
def test_division_by_reciprocals_is_exact(divisor):
    """Wherever the quotient changes, and on both ends."""
    steps = torch.randint(0, (2**30 - 1) // divisor + 1, (4000,)) * divisor
    numbers = torch.cat([steps, (steps - 1).clamp(min=0), torch.tensor([0, 2**30 - 1])]).to(torch.int32).to(DEVICE)
    factor, shift = reciprocal(divisor)
    assert factor < 2**31
    quotients = torch.empty_like(numbers)
    _divide_kernel[(1,)](numbers, quotients, len(numbers), factor, shift, BLOCK=8192)
    assert torch.equal(quotients, numbers // divisor)


def check(
    outside,
    inside,
    *,
    geometry="plain",
    dtype=torch.float32,
    weight_format=torch.channels_last,
    config=SMALL,
    weight_config=SMALL_WEIGHT,
    switches=(),
    bias=True,
    width=None,
    batch=2,
):
    """Every launcher against PyTorch in float64 on the active slice; ``width`` is that of a group's input channels."""
    *window, image = GEOMETRIES[geometry]
    kernel, stride, padding, dilation = window
    at = widths(outside, inside, switches=switches)
    (n, out), (k, into) = ((len(index), (index, size)) for index, size in zip(at.active, at.capacity, strict=True))
    positions = F.conv2d(torch.empty(1, 1, *image), torch.empty(1, 1, *kernel), None, stride, padding, dilation).shape[2:]
    groups = 1 if width is None else k // width
    shapes = ((batch, k, *image), (n, k // groups, *kernel), (n,), (batch, n, *positions))
    x, weight, b, grad = ((torch.rand(shape, dtype=torch.float64) + 0.25).to(dtype) for shape in shapes)
    columns = [] if width else [(1, *into)]
    x_full = poisoned(x, (1, *into)).contiguous(memory_format=torch.channels_last)
    grad_full = poisoned(grad, (1, *out)).contiguous(memory_format=torch.channels_last)
    weight_full = poisoned(weight, (0, *out), *columns).contiguous(memory_format=weight_format)
    bias_full = poisoned(b, (0, *out)) if bias else None
    where = (at.control, at.slots, at.segments, stride, padding, dilation, width is not None)
    y = conv2d_forward(x_full, weight_full, bias_full, *where, config=config)
    gx = conv2d_grad_input(grad_full, weight_full, tuple(x_full.shape), *where, config=config)
    gw, gb = conv2d_grad_weight(grad_full, x_full, weight_full, bias_full, *where, config=weight_config)
    assert y.is_contiguous(memory_format=torch.channels_last) and gx.is_contiguous(memory_format=torch.channels_last)
    assert gw.stride() == weight_full.stride()
    got = [active_part(y, (1, *out)), active_part(gx, (1, *into)), active_part(gw, (0, *out), *columns)]
    if bias:
        got.append(active_part(gb, (0, *out)))
    else:
        assert gb is None

    def plain(kind):
        operands = [t.to(kind).detach().requires_grad_() for t in (x, weight, b)[: 2 + bias]]
        y = F.conv2d(*operands[:2], operands[2] if bias else None, stride, padding, dilation, groups)
        y.backward(grad.to(kind))
        return [y, *(operand.grad for operand in operands)]

    for name, ours, dense, exact in zip(("y", "gx", "gw", "gb")[: len(got)], got, plain(dtype), plain(torch.float64), strict=True):
        if at.on:
            assert_as_exact(ours, dense.detach(), exact.detach(), name)
        else:
            assert ours.dtype == dense.dtype and (ours == 0).all(), name


def check_grouped(name, geometry, **settings):
    """:func:`check` of a convolution whose groups are the axis."""
    groups, out_width, in_width = GROUPS[name]
    outside, inside = ([Segment(s.active, s.capacity, s.inner * width) for s in groups] for width in (out_width, in_width))
    check(outside, inside, geometry=geometry, width=in_width, **settings)
