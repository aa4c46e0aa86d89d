"""recalibrate: statistics of the present widths, everything else as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import poison
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import esper_elastic as ee


class Net(nn.Module):
    """Elastic and plain batch norms, dropout, a branch that can be switched off, and a head that eval mode does not run."""

    def __init__(self) -> None:
        super().__init__()
        width = ee.ElasticDim(8, name="width")
        self.stem = ee.ElasticConv2d(3, 8, 3, out_dim=width)
        self.norm = ee.ElasticBatchNorm2d(8, dim=width)
        inner = ee.ElasticConv2d(8, 8, 1, in_dim=width, out_dim=width)
        self.branch = ee.ElasticBlock(nn.Sequential(inner, ee.ElasticBatchNorm2d(8, dim=width)), kind="branch")
        self.out = ee.ElasticConv2d(8, 4, 1, in_dim=width)
        self.plain = nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(4, momentum=0.0)
        self.bare = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.norm(self.stem(x * scale)).relu()
        x = self.plain(self.out(x + self.branch(x)))
        x = self.bare(self.frozen(self.drop(x)))
        return x + self.head(x) if self.training else x


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(7)
    return net


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) * (1 + n) for n in range(3)]


def state(net: nn.Module) -> dict[str, Any]:
    """Everything that recalibration could disturb, statistics of batch norms left out."""
    modules = dict(net.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "momenta": {name: getattr(module, "momentum", None) for name, module in modules.items()},
        "grads": {name: (p.requires_grad, p.grad, p._version) for name, p in net.named_parameters()},
        "names": list(net.state_dict()),
        "generation": ee.control_block(net).generation,
        "rng": torch.get_rng_state().tolist(),
    }


def bits(net: nn.Module) -> dict[str, list[int]]:
    return {name: buffer.view(torch.uint8).flatten().tolist() for name, buffer in net.named_buffers() if buffer.dim()}


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("width", [1, 5, 8])
def test_statistics_are_those_of_the_exported_net_calibrated_the_same_way(net: Net, width: int, layout: str) -> None:
    ee.set_layout(net, layout)
    ee.resize(net, {"stem": width})
    poison(net.norm)
    poison(net.stem)
    poison(net.out)
    poison(net.branch.module[0])
    poison(net.branch.module[1])
    plain = ee.export(net)
    plain.drop.p = 0.0  # update_bn trains, and what is dropped is random
    head, frozen = copy.deepcopy(plain.head), copy.deepcopy(plain.frozen)
    before, sleeping = state(net), net.norm.running_mean[width:].clone()

    ee.recalibrate(net, batches())
    plain.train()
    plain.head, plain.frozen = nn.Identity(), plain.frozen.eval()
    update_bn(batches(), plain)  # sets only those that keep statistics and move
    plain.head, plain.frozen = head, frozen

    for ours, theirs in ((net.norm, plain.norm), (net.branch.module[1], plain.branch[1]), (net.plain, plain.plain)):
        assert ours.num_batches_tracked == 3
        size = theirs.num_features
        torch.testing.assert_close(ours.running_mean[:size], theirs.running_mean)
        torch.testing.assert_close(ours.running_var[:size], theirs.running_var)
    assert torch.equal(net.norm.running_mean[width:].view(torch.uint8), sleeping.view(torch.uint8))
    assert state(net) == before
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))


def test_statistics_are_the_plain_mean_over_batches_whatever_the_momentum() -> None:
    norm = nn.BatchNorm1d(2, momentum=0.9)
    data = [torch.randn(5, 2, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    ee.recalibrate(norm, iter(data))
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in data]).mean(0))
    assert norm.momentum == 0.9


def test_what_does_not_take_part_keeps_its_statistics(net: Net) -> None:
    ee.disable(net, "branch")
    kept = [net.branch.module[1], net.frozen, net.head]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in kept]
    ee.recalibrate(net, batches())
    for norm, buffers in zip(kept, before, strict=True):
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in norm.named_buffers())
    assert net.plain.num_batches_tracked == 3


def test_statistics_that_are_not_finite_are_replaced(net: Net) -> None:
    net.norm.running_mean.fill_(math.nan)
    net.plain.running_var.fill_(math.inf)
    ee.recalibrate(net, batches())
    assert net.norm.running_mean.isfinite().all() and net.plain.running_var.isfinite().all()


def failing(error: BaseException) -> Iterator[Tensor]:
    yield batches()[0]
    raise error


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_leaves_everything_as_it_was(net: Net, error: BaseException) -> None:
    ee.resize(net, {"stem": 5})
    poison(net.norm)
    net.train()
    net.plain.eval()
    before, buffers = state(net), bits(net)
    with pytest.raises(type(error)):
        ee.recalibrate(net, failing(error))
    assert (state(net), bits(net)) == (before, buffers)
    with pytest.raises(ee.LayoutError):
        ee.recalibrate(net, [batches()[0], torch.zeros(2, 4, 6, 6)])
    assert (state(net), bits(net)) == (before, buffers)


def test_no_batches_are_refused(net: Net) -> None:
    before, buffers = state(net), bits(net)
    with pytest.raises(ee.CalibrationError, match="recalibrate: batches of Net: expected at least one, got none"):
        ee.recalibrate(net, [])
    assert (state(net), bits(net)) == (before, buffers)


def test_a_model_without_batch_norm_needs_no_batch() -> None:
    used = iter([torch.randn(2, 3)])
    ee.recalibrate(ee.ElasticLinear(3, 3), used)
    assert next(used, None) is not None


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_a_batch_is_what_the_model_takes(net: Net, kind: str) -> None:
    twin = copy.deepcopy(net)
    expected = batches() if kind == "tensor" else [x * 2.0 for x in batches()]
    ee.recalibrate(twin, expected)
    forms = {
        "tensor": lambda x: x,
        "tuple": lambda x: (x, 2.0),
        "list": lambda x: [x, 2.0],
        "dict": lambda x: {"scale": 2.0, "x": x},
    }
    ee.recalibrate(net, [forms[kind](x) for x in batches()])
    assert torch.equal(net.plain.running_mean, twin.plain.running_mean)


def test_forward_says_how_to_run_a_batch(net: Net) -> None:
    twin = copy.deepcopy(net)
    ee.recalibrate(twin, batches())
    pairs = [(x, torch.zeros(4, dtype=torch.long)) for x in batches()]
    ee.recalibrate(net, pairs, forward=lambda model, batch: model(batch[0]))
    assert torch.equal(net.norm.running_var, twin.norm.running_var)


def test_nothing_is_recorded_for_a_gradient(net: Net) -> None:
    outputs = []
    ee.recalibrate(net, batches(), forward=lambda model, batch: outputs.append(model(batch)))
    assert not any(output.requires_grad for output in outputs)
