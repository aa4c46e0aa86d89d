"""recalibrate with ``trained_at``: statistics move by what a change of widths does to them."""

from __future__ import annotations

import copy

import pytest
import torch
from test_calibration import Net, batches, bits, net, state  # noqa: F401
from torch import Tensor, nn

import esper_elastic as ee

FULL = {"stem": 8}


def entering(model: nn.Module, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what enters a norm."""
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda norm, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), unbiased=False)


@pytest.mark.parametrize("layout", ["compact", "static"])
def test_statistics_move_by_the_difference_between_widths(net: Net, layout: str) -> None:  # noqa: F811
    """Followed by hand, norm by norm, in the plain networks that are exported at both widths."""
    ee.set_layout(net, layout)
    x = batches()[2]
    wide = ee.export(net).eval()
    ee.resize(net, {"stem": 5})
    narrow = ee.export(net).eval()
    before, asleep = state(net), net.norm.running_mean[5:].clone()
    ee.recalibrate(net, [x], trained_at=FULL)
    for ours, path in ((net.norm, "norm"), (net.branch.module[1], "branch.1"), (net.plain, "plain")):
        then, now = wide.get_submodule(path), narrow.get_submodule(path)
        size = now.num_features
        (mean_then, variance_then), (mean, variance) = entering(wide, then, x), entering(narrow, now, x)
        now.running_mean += mean - mean_then[:size]
        now.running_var *= (variance + now.eps) / (variance_then[:size] + now.eps)
        torch.testing.assert_close(ours.running_mean[:size], now.running_mean)
        torch.testing.assert_close(ours.running_var[:size], now.running_var)
        assert ours.num_batches_tracked == 7
    assert torch.equal(net.norm.running_mean[5:], asleep)
    after = state(net)
    assert after.pop("generation") > before.pop("generation")
    assert after == before
    assert ee.dims(net)["stem"].active == 5
    torch.testing.assert_close(net.eval()(x), narrow(x))


def test_widths_of_training_move_nothing(net: Net) -> None:  # noqa: F811
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    ee.recalibrate(net, batches(), trained_at=FULL)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, before[name])


def test_the_same_batch_twice_moves_nothing_further(net: Net) -> None:  # noqa: F811
    x = batches()[0]
    twin = copy.deepcopy(net)
    for each, data in ((net, [x, x]), (twin, [x])):
        ee.resize(each, {"stem": 5})
        ee.recalibrate(each, data, trained_at=FULL)
    for ours, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_features_that_slept_in_training_get_what_is_measured(net: Net) -> None:  # noqa: F811
    x = batches()[0]
    net.norm.running_mean[5:] = torch.nan
    net.norm.running_var[5:] = torch.nan
    ee.recalibrate(net, [x], trained_at={"stem": 5})
    mean, variance = entering(net.eval(), net.norm, x)
    torch.testing.assert_close(net.norm.running_mean[5:], mean[5:])
    torch.testing.assert_close(net.norm.running_var[5:], variance[5:])
    assert net(x).isfinite().all()


def test_a_branch_that_is_off_keeps_its_statistics(net: Net) -> None:  # noqa: F811
    ee.resize(net, {"stem": 5})
    ee.disable(net, "branch")
    before = {name: buffer.clone() for name, buffer in net.branch.module[1].named_buffers()}
    ee.recalibrate(net, batches(), trained_at=FULL)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.branch.module[1].named_buffers())


@pytest.mark.parametrize(
    ("data", "widths", "error"),
    [
        ([batches()[0], torch.zeros(2, 4, 6, 6)], FULL, ee.LayoutError),
        ([], FULL, ee.CalibrationError),
        (batches(), {"stem": 99}, ee.CapacityError),
        (batches(), {"stam": 8}, ee.CapacityError),
    ],
    ids=["batch", "no batch", "width", "name"],
)
def test_an_error_leaves_widths_and_statistics(net: Net, data: list[Tensor], widths: dict[str, int], error: type) -> None:  # noqa: F811
    ee.resize(net, {"stem": 5})
    before, buffers = state(net), bits(net)
    with pytest.raises(error):
        ee.recalibrate(net, data, trained_at=widths)
    after = state(net)
    assert after.pop("generation") >= before.pop("generation")
    assert (after, bits(net)) == (before, buffers)
    assert ee.dims(net)["stem"].active == 5
