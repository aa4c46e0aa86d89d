"""``ElasticConv1d``: the contract, and what it adds to the two-dimensional convolution that computes it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from contract import (
    AXES,
    LAYOUTS,
    MANY,
    NARROW,
    AxisCase,
    Contract,
    Record,
    allocations,
    assert_as_exact,
    needs_kernels,
    needs_library,
    poison,
)
from growing import batch, integral
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.errors import GenerationError
from esper_elastic.layers import ElasticConv1d
from esper_elastic.ops import widths as widths_module


class TestConv1d(Contract):
    """Triton's kernels are those of an image; without a GPU, a test below shows that they are reached."""

    kernels = None if torch.get_default_device().type == "cpu" else "narrow"
    unit = -2
    settings: ClassVar[dict[str, Any]] = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((case, AXES[(place + 3) % len(AXES)]) for place, case in enumerate(AXES))

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (NARROW, MANY)

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ElasticConv1d(in_dim.active, out_dim.active, **self.settings, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Conv1d(sizes[1], sizes[0], **self.settings, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(2, size, 5, dtype=torch.float64) + 0.25


class TestGroupedConv1d(TestConv1d):
    """Two channels in and three out per group, without a bias."""

    num_axes = 1

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((case,) for case in AXES[1:5])

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (MANY,)

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        groups = axes[0]
        channels = (groups.active * 2, groups.active * 3)
        return ElasticConv1d(*channels, **self.settings, groups=groups.active, bias=False, in_dim=groups * 2, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Conv1d(sizes[1], sizes[0], **self.settings, groups=sizes[1] // 2, bias=False, **factory)


SETTINGS = {
    "plain": {},
    "kernel-1": {"kernel_size": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": (2,)},
    "valid": {"padding": "valid", "dilation": 2},
    "same": {"padding": "same"},
    "same-even": {"padding": "same", "kernel_size": 4, "dilation": 3},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular", "kernel_size": 2},
    "no-bias": {"bias": False},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": "same"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 9), (6, 9), (0, 6, 9)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_gives_what_nn_gives(settings: dict[str, Any], shape: tuple[int, ...], layout: str) -> None:
    settings = {"kernel_size": 3} | settings
    dense = nn.Conv1d(6, 12, **settings)
    elastic = ElasticConv1d.from_dense(dense, max_in_channels=12, max_out_channels=24)
    poison(elastic)
    elastic.layout = layout
    part = torch.rand(shape)
    rest = torch.zeros(*shape[:-2], elastic.in_channels - 6, shape[-1])
    x, x_dense, x_exact = (t.requires_grad_() for t in (torch.cat([part, rest], -2), part.clone(), part.double()))
    exact = copy.deepcopy(dense).double()
    outputs = [elastic(x), dense(x_dense), exact(x_exact)]
    assert outputs[0].is_contiguous()
    for y in outputs:
        y.sum().backward()
    assert outputs[0].narrow(-2, 12, outputs[0].shape[-2] - 12).count_nonzero() == 0
    assert x.grad.narrow(-2, 6, x.shape[-2] - 6).count_nonzero() == 0
    assert_as_exact(outputs[0].narrow(-2, 0, 12), outputs[1], outputs[2], "output")
    assert_as_exact(x.grad.narrow(-2, 0, 6), x_dense.grad, x_exact.grad, "input gradient")
    for name, theirs in dense.named_parameters():
        ours = getattr(elastic, name).grad
        inside = ours[:12, : theirs.shape[1]] if name == "weight" else ours[:12]
        assert_as_exact(inside, theirs.grad, exact.get_parameter(name).grad, f"{name} gradient")
        assert ours.count_nonzero() == inside.count_nonzero()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_is_at_full_size_the_layer_of_nn(settings: dict[str, Any]) -> None:
    settings = {"kernel_size": 3} | settings
    dense = nn.Conv1d(6, 12, **settings)
    elastic = ElasticConv1d(6, 12, **settings)
    assert repr(dense)[:-1] + ", max_in_channels=6, max_out_channels=12)" == repr(elastic).removeprefix("Elastic")
    elastic.load_state_dict(dense.state_dict())
    x = torch.randn(2, 6, 9)
    assert torch.equal(elastic(x), dense(x))
    back = elastic.to_dense()
    assert type(back) is nn.Conv1d
    assert repr(back) == repr(dense)
    assert torch.equal(back(x), dense(x))


def test_a_permuted_sequence_gives_an_output_like_that_of_nn() -> None:
    dense = nn.Conv1d(4, 6, 3)
    elastic = ElasticConv1d.from_dense(dense, max_out_channels=8)
    x = torch.randn(2, 7, 4).transpose(1, 2)
    ours, theirs = elastic(x), dense(x)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("positional", "keywords", "message"),
    [
        ((5, 4, 3), {"groups": 2}, r"ElasticConv1d: in_channels: expected a multiple of groups=2, at least 1, got 5"),
        ((4, 6, 3), {"groups": 2, "max_in_channels": 7}, r"ElasticConv1d: max_in_channels: expected whole groups of 2 channels, got 7"),
        ((4, 4, 3), {"max_in_channels": 3}, r"capacity is 3"),
    ],
)
def test_impossible_sizes_are_refused(positional: tuple[int, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ee.CapacityError, match=message):
        ElasticConv1d(*positional, **keywords)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 6, 9)])
def test_what_is_no_sequence_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ee.LayoutError, match=r"ElasticConv1d: input: expected \(C, L\) or \(N, C, L\), got"):
        ElasticConv1d(6, 4, 3)(torch.randn(shape))


@needs_kernels
@pytest.mark.parametrize("suite", [TestConv1d(), TestGroupedConv1d()], ids=["plain", "grouped"])
def test_kernels_of_images_serve_sequences(suite: TestConv1d, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths_module, "choose", lambda device, static: "triton")
    layer = suite.build((NARROW, MANY)[: suite.num_axes], "static")
    with Record() as record:
        suite.compare(layer)
    assert "esper_elastic::triton_conv2d" in [op.name() for op, _, _ in record.calls]
    loss = layer(suite.inputs(layer)[0]).sum()
    layer.in_dim.dims[0].resize(1)
    with pytest.raises(GenerationError, match="elastic convolution: cannot run this backward"):
        loss.backward()


# Memory


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_comes_back_through_the_view_in_one_kept_buffer(layout: str) -> None:
    layer = ElasticConv1d(12, 16, 3, max_in_channels=96, max_out_channels=128)
    layer.layout = layout
    x = torch.rand(1, layer.in_channels, 5)

    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad()

    size = layer.weight.numel() * 4
    first, second = allocations(step), allocations(step)
    assert [bytes for bytes in first if bytes >= size // 8] == [size], "the gradient itself, and no temporary"
    assert [bytes for bytes in second if bytes >= size // 8] == [], "the gradient's buffer is kept"


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_someone_holds_is_not_overwritten(layout: str) -> None:
    """Another forward, another width, a written gradient and an accumulated one: the kept buffer serves none of them wrongly."""
    layer = ElasticConv1d(3, 4, 3, max_in_channels=5, max_out_channels=8)
    layer.layout = layout
    x = torch.rand(2, layer.in_channels, 6)
    if layout == "static":
        x[:, 3:] = float("nan")

    def truth() -> Tensor:
        dense = layer.to_dense()
        dense(x[:, :3]).sum().backward()
        whole = torch.zeros_like(layer.weight)
        whole[: layer.out_dim.active, :3] = dense.weight.grad
        return whole

    def backward() -> None:
        layer(x).sum().backward()

    backward()
    held = layer.weight.grad
    torch.testing.assert_close(held, truth())
    backward()
    backward()
    assert layer.weight.grad is held
    torch.testing.assert_close(held, 3 * truth())
    layer.zero_grad()
    backward()
    torch.testing.assert_close(held, 3 * truth())
    torch.testing.assert_close(layer.weight.grad, truth())
    layer.weight.grad.fill_(7.0)
    layer.zero_grad()
    layer.out_dim.resize(2)
    backward()
    torch.testing.assert_close(layer.weight.grad, truth())
    layer.zero_grad(set_to_none=False)
    backward()
    torch.testing.assert_close(layer.weight.grad, truth())


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_views_of_one_parameter_keep_their_gradients_apart(layout: str) -> None:
    layer = ElasticConv1d(3, 4, 3, bias=False, max_in_channels=5, max_out_channels=8)
    layer.layout = layout
    both = torch.rand(2, *layer.weight.shape).requires_grad_()
    x = torch.rand(2, layer.in_channels, 6)
    for _ in range(2):
        both.grad = None
        for weight, factor in zip(both, (1, 2), strict=True):
            (factor * torch.func.functional_call(layer, {"weight": weight}, x)).sum().backward()
        (first,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(both.grad, torch.stack([first, 2 * first]))
        one, two = (torch.func.functional_call(layer, {"weight": weight}, x) for weight in both)
        (together,) = torch.autograd.grad((one + 2 * two).sum(), both)
        torch.testing.assert_close(together, both.grad)


# Switches and neighbours


@needs_library
def test_a_static_layer_that_is_off_gives_zeros_and_reads_nothing() -> None:
    layer = ElasticConv1d(4, 6, 3, padding=1, stride=2, max_in_channels=5, max_out_channels=7)
    switch = Switch(name="branch")
    layer.govern(switch)
    layer.layout = "static"
    x = torch.rand(2, 5, 6).requires_grad_()
    shape = layer(x).shape
    switch.set(False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    off = layer(x)
    assert off.shape == shape
    off.sum().backward()
    for tensor in (off, x.grad, layer.weight.grad, layer.bias.grad):
        assert tensor.count_nonzero() == 0


class Sequences(nn.Module):
    """Two convolutions and a depthwise one between them, flattened into a linear layer; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ElasticConv1d(2, 4, 3, padding=1, max_out_channels=9, dtype=torch.float64)
        self.depthwise = ElasticConv1d(4, 4, 3, padding=1, groups=4, in_dim=self.first.out_dim, dtype=torch.float64)
        self.second = ElasticConv1d(4, 3, 3, in_dim=self.first.out_dim, max_out_channels=6, dtype=torch.float64)
        self.head = ee.ElasticLinear(12, 5, in_dim=self.second.out_dim * 4, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.second(self.depthwise(self.first(input)).relu()).relu().flatten(1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("init", ["zero", "split"])
def test_newborn_channels_keep_the_function(init: str, layout: str) -> None:
    torch.manual_seed(0)
    net = integral(Sequences())
    for layer in net.children():
        poison(layer)
    ee.set_layout(net, layout)
    input = batch(3, 2, 6)
    before = net(input)
    net.first.out_dim.grow(7, init=init)
    net.second.out_dim.grow(6, init=init)
    tolerance = 0 if init == "zero" else 1e-12
    torch.testing.assert_close(net(input), before, rtol=tolerance, atol=tolerance)
    if init == "zero":
        assert net.second.weight[:3, 4:7].eq(0).all()
        assert net.first.weight[4:7].count_nonzero() > 0


def test_kept_channels_are_the_chosen_ones() -> None:
    torch.manual_seed(0)
    net = integral(Sequences())
    input = batch(3, 2, 6)
    full = net(input)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.second.weight[:, [0, 2]] = 0
    net.first.out_dim.keep([3, 1])
    assert torch.equal(net(input), twin(input))
    net.first.out_dim.resize(4)
    assert torch.equal(net(input), full)


def test_a_network_exports_and_loads_like_its_dense_twin() -> None:
    net = Sequences()
    ee.resize(net, {"first": 3, "second": 2})
    plain = ee.export(net)
    assert [type(child) for child in plain.children()] == [nn.Conv1d, nn.Conv1d, nn.Conv1d, nn.Linear]
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(plain(x), net(x))
    other = Sequences()
    other.load_state_dict(plain.state_dict())
    assert {name: dim.active for name, dim in ee.dims(other).items()} == {"first": 3, "second": 2, "head": 5}
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_optimizers_step_the_active_slice(layout: str) -> None:
    torch.manual_seed(0)
    layer = TestConv1d().build((NARROW, MANY), layout)
    dense = TestConv1d().twin(layer, torch.float32)
    x, x_dense = TestConv1d().inputs(layer)
    ours, theirs = ee.optim.AdamW(layer.parameters(), lr=0.1), torch.optim.AdamW(dense.parameters(), lr=0.1)
    for _ in range(3):
        for module, optimizer, input in ((layer, ours, x), (dense, theirs, x_dense)):
            optimizer.zero_grad()
            module(input).square().sum().backward()
            optimizer.step()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(layer.active(name), parameter)
