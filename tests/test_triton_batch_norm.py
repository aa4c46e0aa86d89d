"""The Triton kernels of ``batch_norm``, launched by hand: both memory formats, odd shapes, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_exact
from kernels import DEVICE, Segment, active_part, poisoned, widths
from test_triton_linear import DTYPES, functional

from esper_elastic.triton_kernels.batch_norm import Config, batch_norm_backward, batch_norm_eval, batch_norm_forward

SMALL = Config(tile=512, warps=4, stages=2, programs=1)
TINY = SMALL._replace(tile=64)
AXES = {
    "one": [Segment(1, 24)],
    "odd": [Segment(13, 24)],
    "few": [Segment(5, 72)],
    "full": [Segment(24, 24)],
    "unaligned": [Segment(9, 13)],
    "times": [Segment(3, 4, 7)],
    "concat": [Segment(9, 16), Segment(1, 8), Segment(2, 3, 8)],
    "odd concat": [Segment(2, 3), Segment(11, 14)],
}
# sizes but that of the channels, and tiles: of part of an image, of one, and of several
SHAPES = {
    "vector": ((70,), SMALL, True),
    "one pixel": ((3, 1, 1), SMALL, False),
    "small images": ((9, 3, 3), SMALL, False),
    "image": ((3, 4, 8), TINY, False),
    "large image": ((2, 1, 70), TINY, False),
    "many pixels": ((2, 1, 70), TINY, True),
    "sequence": ((2, 7), SMALL, False),
    "sequence, channels last": ((2, 7), SMALL, True),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("axis", AXES)
def test_forward_and_gradients_are_those_of_the_active_features(axis, channels_last):
    check(AXES[axis], torch.float32, (5, 3, 3), channels_last)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    sizes, config, channels_last = SHAPES[shape]
    check([Segment(3, 5)], torch.float32, sizes, channels_last, config=config, residual=True, activation="relu")


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_and_activation_are_fused(dtype, activation):
    check(AXES["odd"], dtype, (5, 3, 3), dtype != torch.float16, activation=activation, residual=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_eval(residual, channels_last):
    activation = "silu" if residual else "none"
    check(AXES["concat"], torch.bfloat16, (5, 3, 3), channels_last, activation=activation, residual=residual, training=False)


@pytest.mark.parametrize("parameters", ["", "w"], ids=["no parameters", "no bias"])
def test_parameters_may_be_missing(parameters):
    check(AXES["odd"], torch.float32, (5, 3, 3), True, parameters=parameters, activation="gelu")


@pytest.mark.parametrize("tracked", ["", "s", "n"], ids=["nothing tracked", "statistics only", "batches only"])
def test_statistics_need_not_be_tracked(tracked):
    check(AXES["odd"], torch.float32, (5, 3, 3), True, tracked=tracked)


def test_without_momentum_the_share_of_a_batch_is_one_over_their_count():
    check(AXES["odd"], torch.float32, (5, 3, 3), False, momentum=None)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("switches", [(0,), (1, 0)], ids=str)
def test_a_switch_that_is_off_leaves_zeros_and_writes_no_statistics(switches, training):
    check(AXES["odd"], torch.float32, (5, 3, 3), True, switches=switches, residual=True, activation="gelu", training=training)


def test_switches_that_are_on():
    check(AXES["odd"], torch.float32, (5, 3, 3), True, switches=(1, 1))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_as_configured_and_with_parameters_of_a_wider_type(channels_last):
    check([Segment(70, 72)], torch.bfloat16, (3, 7, 7), channels_last, config=None, parameter_dtype=torch.float32, residual=True)


def test_operands_of_any_strides():
    at = widths(AXES["odd"])
    x, grad = (torch.randn(6, 24, 5, 4, device=DEVICE).transpose(2, 3) for _ in range(2))
    where = (at.control, at.slots, at.segments)
    y, mean, rstd = batch_norm_forward(x, None, None, None, None, None, None, *where, 0.1, 1e-5, config=SMALL)
    gx = batch_norm_backward(grad, x, None, None, None, mean, rstd, *where, True, 1e-5, config=SMALL)[0]
    active = x.detach()[:, :13].double().requires_grad_()
    exact = F.batch_norm(active, None, None, training=True)
    exact.backward(grad[:, :13].double())
    assert (y[:, :13] - exact).abs().max() < 1e-5 and (gx[:, :13] - active.grad).abs().max() < 1e-5


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_features_far_from_zero_are_normalised_as_exactly(channels_last):
    check(AXES["odd"], torch.float32, (3, 1, 40), channels_last, offset=1000.0)


def test_the_first_pixel_may_be_far_from_the_others():
    check(AXES["odd"], torch.float32, (3, 1, 40), True, offset=1000.0, corner=0.0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels last"])
def test_results_are_the_same_in_every_run(channels_last):
    at = widths(AXES["odd"])
    x, grad = (torch.randn(3, 24, 5, 5, device=DEVICE) for _ in range(2))
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = (torch.randn(24, device=DEVICE) for _ in range(2))
    where = (at.control, at.slots, at.segments)

    def run():
        y, mean, rstd = batch_norm_forward(x, weight, bias, None, None, None, None, *where, 0.1, 1e-5, config=SMALL)
        return y, *batch_norm_backward(grad, x, weight, bias, None, mean, rstd, *where, True, 1e-5, config=SMALL)[:3]

    first = run()
    assert all(torch.equal(a, b) for _ in range(2) for a, b in zip(run(), first, strict=True))


def test_an_empty_batch_leaves_the_statistics():
    at = widths(AXES["odd"])
    mean, var, batches = torch.zeros(24, device=DEVICE), torch.ones(24, device=DEVICE), torch.tensor(3, device=DEVICE)
    where = (at.control, at.slots, at.segments)
    x = torch.empty(0, 24, 4, 4, device=DEVICE)
    y, saved, rstd = batch_norm_forward(x, mean, mean, None, mean, var, batches, *where, 0.1, 1e-5)
    _, gw, gb, _ = batch_norm_backward(y, x, mean, mean, None, saved, rstd, *where, True, 1e-5)
    assert y.shape == x.shape and (mean == 0).all() and (var == 1).all() and batches == 4 and (gw == 0).all() and (gb == 0).all()


def check(
    axis,
    dtype,
    shape,
    channels_last,
    config=SMALL,
    activation="none",
    residual=False,
    training=True,
    parameters="wb",
    tracked="sn",
    momentum=0.1,
    switches=(),
    parameter_dtype=None,
    offset=0.0,
    corner=None,
):
    """The launchers against PyTorch in float64 on the active features."""
    at = widths(axis, switches=switches)
    n = len(at.active[0])
    channels, features = (1, at.active[0], at.capacity[0]), (0, at.active[0], at.capacity[0])
    x, grad, add = (torch.randn(shape[0], n, *shape[1:], dtype=torch.float64) for _ in range(3))
    grad += 0.25 * x + 0.25  # so that no sum cancels to nothing: PyTorch's are of double precision on the CPU
    x += offset
    if corner is not None:
        x.flatten(2)[0, :, 0] = corner
    x, grad, add = (t.to(dtype) for t in (x, grad, add))
    weight, bias, mean, var = ((torch.rand(n, dtype=torch.float64) + 0.25).to(parameter_dtype or dtype) for _ in range(4))
    weight, bias = (t if letter in parameters else None for t, letter in ((weight, "w"), (bias, "b")))
    mean, var = (t if "s" in tracked else None for t in (mean, var))
    add = add if residual else None
    batches = torch.tensor(4, device=DEVICE) if "n" in tracked and training else None

    def laid_out(tensor):
        tensor = poisoned(tensor, channels)
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor

    x_full, grad_full, add_full = (None if t is None else laid_out(t) for t in (x, grad, add))
    weight_full, bias_full, mean_full, var_full = (None if t is None else poisoned(t, features) for t in (weight, bias, mean, var))
    where = (at.control, at.slots, at.segments)
    operands = (x_full, weight_full, bias_full, add_full)
    if training:
        statistics = (mean_full, var_full, batches)
        y, *saved = batch_norm_forward(*operands, *statistics, *where, momentum, 1e-5, activation, config=config)
    else:
        saved = (mean_full, var_full)
        y = batch_norm_eval(*operands, *saved, *where, 1e-5, activation, config=config)
    gx, gw, gb, gadd = batch_norm_backward(grad_full, *operands, *saved, *where, training, 1e-5, activation, config=config)
    assert y.stride() == gx.stride() == x_full.stride()
    got = [(y, channels), (gx, channels), (gw, features), (gb, features), (gadd, channels)]
    got = [None if t is None else active_part(t, place) for t, place in got]

    def plain(kind):
        leaves = [None if t is None else t.to(kind or t.dtype).detach().requires_grad_() for t in (x, weight, bias, add)]
        running = [None if t is None else t.to(kind or t.dtype, copy=True) for t in (mean, var)]
        share = 1 / 5 if momentum is None else momentum
        y = F.batch_norm(leaves[0], *running, *leaves[1:3], training, share, 1e-5)
        y = functional(activation)(y if add is None else y + leaves[3])
        y.backward(grad.to(y.dtype))
        return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves), *running]

    moved = [None if t is None else t.cpu()[at.active[0]] for t in (mean_full, var_full)]
    names = ("y", "gx", "gw", "gb", "gresidual", "running mean", "running var")
    for name, ours, dense, exact in zip(names, got + moved, plain(None), plain(torch.float64), strict=True):
        if ours is None:
            assert dense is None, name
        elif at.on:
            assert_as_exact(ours, dense, exact, name)
        elif name.startswith("running"):
            assert torch.equal(ours, mean if name.endswith("mean") else var), name
        else:
            assert ours.dtype == dense.dtype and (ours == 0).all(), name
    for tensor in (mean_full, var_full):
        dormant = torch.ones(at.capacity[0], dtype=torch.bool).index_fill(0, at.active[0], False)
        assert tensor is None or tensor.cpu()[dormant].isnan().all(), "dormant statistics were written"
    assert batches is None or batches == 4 + at.on, "batches"
