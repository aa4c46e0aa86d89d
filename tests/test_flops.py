"""Torch's flop counter over our ops: what is active counts, as it would in the plain model of that size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from contract import needs_kernels, needs_library
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import esper_elastic as ee
from esper_elastic import ops
from esper_elastic.ops import flops
from esper_elastic.ops import widths as widths_module


class Net(nn.Module):
    """Every op that does matrix work, over plain, multiplied and concatenated axes, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        a, b, hidden = ee.ElasticDim(6, name="a"), ee.ElasticDim(4, name="b"), ee.ElasticDim(5, name="hidden")
        self.left = ee.ElasticConv2d(3, 6, 3, padding=1, out_dim=a)
        self.right = ee.ElasticConv2d(3, 4, 1, stride=2, bias=False, out_dim=b)
        self.depthwise = ee.ElasticConv2d(6, 6, 3, stride=2, padding=1, groups=6, in_dim=a)
        both = ee.concat(a, b)
        self.mix = ee.ElasticConv2d(10, 8, (3, 1), dilation=2, padding=(2, 0), in_dim=both)
        self.norm = ee.ElasticBatchNorm2d(8, dim=self.mix.out_dim)
        self.first = ee.ElasticLinear(8 * 9, 5, in_dim=self.mix.out_dim * 9, out_dim=hidden)
        self.branch = ee.ElasticBlock(ee.ElasticLinear(5, 5, in_dim=hidden, out_dim=hidden), kind="branch")
        self.last = ee.ElasticLinear(5, 2, in_dim=hidden)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.depthwise(self.left(x)), self.right(x)]
        x = self.norm(self.mix(torch.cat(parts, 1))).relu().flatten(1)
        x = self.first(x)
        return self.last(x + self.branch(x))


WIDTHS = {
    "full": {},
    "narrow": {"left": 1, "right": 1, "mix": 1, "first": 1},
    "mixed": {"left": 5, "right": 3, "mix": 7, "first": 2},
}


def counted(run: Callable[[], Tensor], backward: bool = True) -> tuple[int, int]:
    """The flops of the forward, and of the backward."""
    with FlopCounterMode(display=False) as forward:
        loss = run()
    if not backward:
        return forward.get_total_flops(), 0
    with FlopCounterMode(display=False) as back:
        loss.sum().backward()
    return forward.get_total_flops(), back.get_total_flops()


def serve_by(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (widths_module, ops):
        monkeypatch.setattr(module, "choose", lambda device, static: backend if static or backend != "triton" else "native")


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "reference"])
def test_an_elastic_model_counts_what_its_plain_twin_does(
    backend: str, layout: str, widths: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_by(backend, monkeypatch)
    net = Net()
    ee.resize(net, widths)
    ee.set_layout(net, layout)
    assert net.first._widths.backend == backend
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    for on in (True, False):
        net.branch.switch.set(on)
        plain = ee.export(net)
        ours, theirs = counted(lambda: net(x)), counted(lambda plain=plain: plain(x))
        assert ours == theirs
        assert min(ours) > 0


@needs_library
@pytest.mark.parametrize("needs", ["input", "weight"])
@pytest.mark.parametrize("layer", [lambda: ee.ElasticLinear(3, 4, max_out_features=9), lambda: ee.ElasticConv2d(4, 6, 3, groups=2)])
def test_only_gradients_that_are_asked_for_count(layer: Callable[[], nn.Module], needs: str) -> None:
    layer = layer()
    layer.requires_grad_(needs == "weight")
    plain = ee.export(layer)
    x = torch.randn(*((2, 3) if isinstance(layer, nn.Linear) else (2, 4, 5, 5)), requires_grad=needs == "input")
    assert counted(lambda: layer(x)) == counted(lambda: plain(x))


@needs_library
@pytest.mark.parametrize("layer", [lambda: ee.ElasticLinear(3, 4), lambda: ee.ElasticConv2d(4, 6, 3)], ids=["linear", "conv2d"])
def test_a_static_layer_under_a_switch_that_is_off_counts_nothing(layer: Callable[[], nn.Module]) -> None:
    layer = layer()
    block = ee.ElasticBlock(layer)
    ee.set_layout(block, "static")
    x = torch.randn(*((2, 3) if isinstance(layer, nn.Linear) else (2, 4, 5, 5)), requires_grad=True)
    block.switch.set(False)
    assert counted(lambda: layer(x)) == (0, 0)
    block.switch.set(True)
    assert min(counted(lambda: layer(x))) > 0


@needs_kernels
def test_tritons_ops_count_what_the_plain_twin_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from esper_elastic.ops import triton  # noqa: F401  what the choice of the backend does

    serve_by("triton", monkeypatch)
    net = Net()
    ee.resize(net, WIDTHS["mixed"])
    ee.set_layout(net, "static")
    assert net.first._widths.backend == "triton"
    x, plain = torch.randn(1, 3, 6, 6, requires_grad=True), ee.export(net)
    assert counted(lambda: net(x)) == counted(lambda: plain(x))
    net.branch.switch.set(False)
    net.zero_grad()
    assert counted(lambda: net.branch.module(torch.randn(1, 5, requires_grad=True))) == (0, 0)


@needs_library
@pytest.mark.parametrize("layout", ["compact", "static"])
def test_fake_tensors_count_as_real_ones(layout: str) -> None:
    net = Net()
    ee.resize(net, WIDTHS["mixed"])
    ee.set_layout(net, layout)
    expected = counted(lambda: net(torch.randn(2, 3, 6, 6)), backward=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert counted(lambda: net(torch.randn(2, 3, 6, 6)), backward=False) == expected


@needs_library
def test_without_values_of_the_control_block_sizes_of_operands_count() -> None:
    layer = ee.ElasticLinear(3, 4, max_out_features=9)
    with FakeTensorMode() as mode:
        control, slots = (mode.from_tensor(t) for t in (layer._widths.control, layer._widths.slots))
        x, weight = torch.randn(2, 3), torch.randn(9, 3)
        ran = [lambda w=w: torch.ops.esper_elastic.linear(x, weight, None, control, slots, w) for w in (4, None)]
        assert [counted(run, backward=False)[0] for run in ran] == [2 * 2 * 3 * 4, 2 * 2 * 3 * 9]


ORDERS = {
    "before": "from torch.utils.flop_counter import FlopCounterMode; import esper_elastic as ee",
    "after": "import sys, esper_elastic as ee; assert 'torch.utils.flop_counter' not in sys.modules\n"
    "from torch.utils.flop_counter import FlopCounterMode",
    "reloaded": "import importlib, esper_elastic as ee, torch.utils.flop_counter as counter\n"
    "FlopCounterMode = importlib.reload(counter).FlopCounterMode",
}
COUNT = """
import torch
layer = ee.ElasticLinear(3, 4, max_out_features=9)
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(2, 3))
print(counter.get_total_flops())
"""


@pytest.mark.wide
@needs_library
@pytest.mark.parametrize("order", ORDERS)
def test_formulas_are_there_whenever_the_counter_was_imported(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + COUNT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (f"{2 * 2 * 3 * 4}\n", 0), done.stderr


@needs_library
def test_every_op_with_matrix_work_has_a_formula() -> None:
    from esper_elastic.ops import triton  # noqa: F401

    without = ("norm", "fence", "adamw", "sgd", "select", "gate", "grad_bias", "embedding")
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("esper_elastic::")}
    assert {name for name in names if not any(part in name for part in without)} == set(flops._FORMULAS)
