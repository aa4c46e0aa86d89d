"""``ElasticConvTranspose2d``: the contract, and what a convolution promises whose weight begins with its input."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from contract import AXES, LAYOUTS, MANY, NARROW, AxisCase, Contract, Record, allocations, assert_as_exact, needs_library, poison
from growing import batch, integral, refused
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.layers import ElasticConv2d, ElasticConvTranspose2d
from esper_elastic.ops import backend as backends


class TestConvTranspose2d(Contract):
    unit = -3
    settings: ClassVar[dict[str, Any]] = {
        "kernel_size": (3, 2),
        "stride": (2, 1),
        "padding": (1, 0),
        "output_padding": (1, 0),
        "dilation": (1, 2),
    }

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((case, AXES[(place + 3) % len(AXES)]) for place, case in enumerate(AXES))

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (NARROW, MANY)

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ElasticConvTranspose2d(in_dim.active, out_dim.active, **self.settings, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.ConvTranspose2d(sizes[1], sizes[0], **self.settings, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(2, size, 2, 3, dtype=torch.float64) + 0.25


class TestGroupedConvTranspose2d(TestConvTranspose2d):
    """Two channels in and three out per group."""

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
        return ElasticConvTranspose2d(*channels, **self.settings, groups=groups.active, in_dim=groups * 2, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.ConvTranspose2d(sizes[1], sizes[0], **self.settings, groups=sizes[1] // 2, **factory)


SETTINGS = {
    "plain": {},
    "kernel-1": {"kernel_size": 1},
    "stride": {"stride": (2, 3), "padding": 1},
    "output-padding": {"stride": 2, "output_padding": (1, 0)},
    "padding-of-dilation": {"dilation": (3, 2), "output_padding": (2, 1), "padding": (0, 2)},
    "no-bias": {"bias": False},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "stride": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (6, 4, 5), (0, 6, 4, 5)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_gives_what_nn_gives(settings: dict[str, Any], shape: tuple[int, ...], layout: str) -> None:
    dense = nn.ConvTranspose2d(6, 12, **{"kernel_size": 3} | settings)
    elastic = ElasticConvTranspose2d.from_dense(dense, max_in_channels=12, max_out_channels=24)
    poison(elastic)
    elastic.layout = layout
    part = torch.rand(shape)
    rest = torch.zeros(*shape[:-3], elastic.in_channels - 6, *shape[-2:])
    x, x_dense, x_exact = (t.requires_grad_() for t in (torch.cat([part, rest], -3), part.clone(), part.double()))
    exact = copy.deepcopy(dense).double()
    outputs = [elastic(x), dense(x_dense), exact(x_exact)]
    for y in outputs:
        y.sum().backward()
    assert outputs[0].narrow(-3, 12, outputs[0].shape[-3] - 12).count_nonzero() == 0
    assert x.grad.narrow(-3, 6, x.shape[-3] - 6).count_nonzero() == 0
    assert_as_exact(outputs[0].narrow(-3, 0, 12), outputs[1], outputs[2], "output")
    assert_as_exact(x.grad.narrow(-3, 0, 6), x_dense.grad, x_exact.grad, "input gradient")
    for name, theirs in dense.named_parameters():
        ours = getattr(elastic, name).grad
        inside = ours[:6, : theirs.shape[1]] if name == "weight" else ours[:12]
        assert_as_exact(inside, theirs.grad, exact.get_parameter(name).grad, f"{name} gradient")
        assert ours.count_nonzero() == inside.count_nonzero()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_is_at_full_size_the_layer_of_nn(settings: dict[str, Any]) -> None:
    settings = {"kernel_size": 3} | settings
    dense = nn.ConvTranspose2d(6, 12, **settings)
    elastic = ElasticConvTranspose2d(6, 12, **settings)
    assert repr(dense)[:-1] + ", max_in_channels=6, max_out_channels=12)" == repr(elastic).removeprefix("Elastic")
    for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation", "output_padding", "transposed"):
        assert getattr(elastic, name) == getattr(dense, name), name
    elastic.load_state_dict(dense.state_dict())
    x = torch.randn(2, 6, 4, 5)
    assert torch.equal(elastic(x), dense(x))
    back = elastic.to_dense()
    assert type(back) is nn.ConvTranspose2d
    assert repr(back) == repr(dense)
    assert torch.equal(back(x), dense(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("output_size", [(9, 13), [2, 6, 10, 14], torch.Size((10, 15))], ids=str)
def test_the_size_of_the_output_can_be_asked_for(output_size: Any, layout: str) -> None:
    dense = nn.ConvTranspose2d(4, 6, 3, stride=(2, 3), padding=(0, 1))
    elastic = ElasticConvTranspose2d.from_dense(dense, max_out_channels=8)
    elastic.layout = layout
    x = torch.randn(2, 4, 4, 5)
    expected = dense(x, output_size=output_size)
    assert expected.shape[2:] == tuple(output_size[-2:])
    torch.testing.assert_close(elastic(x, output_size=output_size)[:, :6], expected)
    torch.testing.assert_close(elastic(x[0], output_size[-2:])[:6], expected[0])


def test_a_size_that_the_output_cannot_have_is_refused_as_by_nn() -> None:
    layer = ElasticConvTranspose2d(4, 6, 3, stride=2)
    with pytest.raises(ValueError, match=r"requested an output size of \[9, 11\], but valid sizes range from \[9, 9\] to \[10, 10\]"):
        layer(torch.randn(1, 4, 4, 4), output_size=[9, 11])
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported'):
        ElasticConvTranspose2d(4, 6, 3, padding_mode="circular")


@pytest.mark.parametrize(
    ("positional", "keywords", "message"),
    [
        ((5, 4, 3), {"groups": 2}, r"ElasticConvTranspose2d: in_channels: expected a multiple of groups=2, at least 1, got 5"),
        ((4, 6, 3), {"groups": 2, "max_out_channels": 8}, r"max_out_channels: expected whole groups of 3 channels, got 8"),
        ((4, 4, 3), {"max_out_channels": 3}, r"capacity is 3"),
    ],
)
def test_impossible_sizes_are_refused(positional: tuple[int, ...], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ee.CapacityError, match=message):
        ElasticConvTranspose2d(*positional, **keywords)


@pytest.mark.parametrize("shape", [(6, 9), (1, 2, 6, 9, 9)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ee.LayoutError, match=r"ElasticConvTranspose2d: input: expected \(C, H, W\) or \(N, C, H, W\), got"):
        ElasticConvTranspose2d(6, 4, 3)(torch.randn(shape))


def test_the_dims_are_named_after_what_they_run_through() -> None:
    model = nn.Sequential(ElasticConvTranspose2d(3, 4, 2, max_in_channels=5, max_out_channels=6))
    assert model[0].weight.shape == (5, 6, 2, 2)
    assert dict(ee.dims(model)) == {"0": model[0].out_dim}
    ee.resize(model, {"0": 6})
    assert model(torch.randn(1, 3, 2, 2)).shape == (1, 6, 3, 3)


@pytest.mark.parametrize(("groups", "second"), [(1, 50), (10, 5)], ids=["plain", "grouped"])
def test_the_law_of_new_weights_is_that_of_nn(groups: int, second: int) -> None:
    """``nn`` takes the second axis of the weight, which here is the output, for the one that is summed over."""
    layer = ElasticConvTranspose2d(20, 50, 2, groups=groups, max_in_channels=400, max_out_channels=None if groups > 1 else 60)
    bound = (second * 4) ** -0.5
    assert 0.99 * bound < layer.weight[20:].abs().max() <= bound
    with torch.no_grad():
        layer.weight.fill_(2 * bound)
    (dim,) = layer.out_dim.dims
    born = slice(dim.active, dim.active + 10)
    dim.grow(born.stop)
    newborn = layer.weight[2 * born.start : 2 * born.stop] if groups > 1 else layer.weight[:, born]
    assert 0.9 * bound < newborn.abs().max() <= bound


# Memory, backends


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("last", ["input", "weight", "both", "neither"])
def test_memory_formats_are_those_of_nn(last: str, dtype: torch.dtype, layout: str) -> None:
    dense = nn.ConvTranspose2d(6, 12, 3, padding=1, dtype=dtype)
    elastic = ElasticConvTranspose2d.from_dense(dense, max_in_channels=8, max_out_channels=14)
    if last in ("weight", "both"):
        elastic, dense = elastic.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last)
    elastic.layout = layout
    x, x_dense = torch.rand(2, elastic.in_channels, 5, 4, dtype=dtype), torch.rand(2, 6, 5, 4, dtype=dtype)
    if last in ("input", "both"):
        x, x_dense = x.to(memory_format=torch.channels_last), x_dense.to(memory_format=torch.channels_last)
    outputs = elastic(x.requires_grad_()), dense(x_dense.requires_grad_())
    for y in outputs:
        y.sum().backward()
    for name, ours, theirs in (
        ("output", *outputs),
        ("input gradient", x.grad, x_dense.grad),
        ("weight gradient", elastic.weight.grad, dense.weight.grad),
    ):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            assert ours.is_contiguous(memory_format=memory_format) == theirs.is_contiguous(memory_format=memory_format), name


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_nothing_of_the_size_of_the_weight_is_allocated(amp: bool, layout: str) -> None:
    layer = ElasticConvTranspose2d(12, 16, 3, max_in_channels=96, max_out_channels=128)
    layer.layout = layout
    x = torch.rand(1, layer.in_channels, 3, 3).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(x)
        y.sum().backward()
        layer.zero_grad()

    size = layer.weight.numel() * 4
    first, second = allocations(step), allocations(step)
    assert sorted(bytes for bytes in first if bytes >= size // 8) == [size], "the gradient itself, and no temporary"
    assert [bytes for bytes in second if bytes >= size // 8] == [], "the gradient's buffer is kept"


@needs_library
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_say_beforehand_what_they_return(layout: str, memory_format: torch.memory_format) -> None:
    for settings in ({"stride": 2, "output_padding": (0, 1)}, {"groups": 2}, {"groups": 6, "padding": 1, "dtype": torch.float64}):
        layer = ElasticConvTranspose2d(6, 12, 3, **settings, max_in_channels=12, max_out_channels=24).to(memory_format=memory_format)
        layer.layout = layout
        x = torch.rand(2, layer.in_channels, 3, 4, dtype=layer.weight.dtype).to(memory_format=memory_format).requires_grad_()
        with Record() as record:
            layer(x).square().sum().backward()
        assert [op.name() for op, _, _ in record.calls] == ["esper_elastic::convolution", "esper_elastic::convolution_backward"]
        for op, arguments, keywords in record.calls:
            operands = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            torch.library.opcheck(op, operands, keywords, test_utils=("test_schema", "test_faketensor"))
        shadow = copy.deepcopy(layer).to("meta")(x.detach().to("meta"))
        y = layer(x)
        assert (shadow.shape, shadow.stride()) == (y.shape, y.stride())


def test_without_kernels_the_reference_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.refuse_triton.cache_clear()
    layer = ElasticConvTranspose2d(3, 4, 2, max_in_channels=5, max_out_channels=6)
    poison(layer)
    layer.layout = "static"
    layer._widths.backend = "triton"
    x = torch.randn(2, 5, 2, 2)
    with pytest.warns(UserWarning, match="Triton's kernels do not serve transposed convolutions: there are no kernels for them"):
        y = layer(x)
    torch.testing.assert_close(y[:, :4], layer.to_dense()(x[:, :3]))
    monkeypatch.setattr(backends, "CHOICE", "triton")
    backends.refuse_triton.cache_clear()
    with pytest.raises(ee.LayoutError, match="ESPER_ELASTIC_BACKEND=triton"):
        layer(x)
    backends.refuse_triton.cache_clear()


def test_complex_weights_are_served() -> None:
    layer = ElasticConvTranspose2d(2, 3, 3, max_in_channels=4, dtype=torch.complex64)
    z = torch.randn(1, 2, 5, 5, dtype=torch.complex64)
    torch.testing.assert_close(layer(z), layer.to_dense()(z))


@needs_library
@pytest.mark.parametrize("groups", [1, 2])
def test_a_static_layer_that_is_off_gives_zeros_and_reads_nothing(groups: int) -> None:
    layer = ElasticConvTranspose2d(4, 6, 3, padding=1, stride=2, groups=groups, max_in_channels=6)
    switch = Switch(name="branch")
    layer.govern(switch)
    layer.layout = "static"
    x = torch.rand(2, 6, 3, 2).to(memory_format=torch.channels_last).requires_grad_()
    on = layer(x)
    switch.set(False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    off = layer(x)
    assert (off.shape, off.stride()) == (on.shape, on.stride())
    off.sum().backward()
    for tensor in (off, x.grad, layer.weight.grad, layer.bias.grad):
        assert tensor.count_nonzero() == 0
    (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert first.count_nonzero() == 0


# Growth and pruning


class Decoder(nn.Module):
    """A convolution down, three transposed ones up, of which the middle one has groups, two channels in and three out; float64."""

    def __init__(self) -> None:
        super().__init__()
        groups = ee.ElasticDim(2, 4)
        self.down = ElasticConv2d(2, 3, 2, stride=2, max_out_channels=7, dtype=torch.float64)
        self.first = ElasticConvTranspose2d(3, 4, 2, in_dim=self.down.out_dim, out_dim=groups * 2, dtype=torch.float64)
        self.grouped = ElasticConvTranspose2d(4, 6, 2, stride=2, groups=2, in_dim=groups * 2, dtype=torch.float64)
        self.last = ElasticConvTranspose2d(6, 2, 3, padding=1, in_dim=self.grouped.out_dim, dtype=torch.float64)
        self.hidden, self.group = self.down.out_dim, groups

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.grouped(self.first(self.down(input).relu()).relu()).relu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("init", ["zero", "split"])
def test_newborn_channels_keep_the_function(init: str, layout: str) -> None:
    torch.manual_seed(0)
    net = integral(Decoder())
    for layer in net.children():
        poison(layer)
    ee.set_layout(net, layout)
    input = batch(3, 2, 4, 4)
    before = net(input)
    net.hidden.grow(6, init=init)
    net.group.grow(4, init=init)
    assert net.grouped.weight.shape == (8, 3, 2, 2)
    tolerance = 0 if init == "zero" else 1e-12
    torch.testing.assert_close(net(input), before, rtol=tolerance, atol=tolerance)
    if init == "zero":
        assert net.first.weight[3:6, :4].eq(0).all()
        assert net.first.weight[:3, 4:8].count_nonzero() > 0
        assert net.grouped.weight[4:8].count_nonzero() > 0
        assert net.last.weight[6:12].eq(0).all()


def test_newborn_channels_learn() -> None:
    torch.manual_seed(0)
    net = Decoder()
    net.hidden.grow(6)
    net.group.grow(3)
    net(torch.randn(3, 2, 4, 4, dtype=torch.float64)).square().sum().backward()
    assert net.first.weight.grad[3:6].count_nonzero() > 0
    assert net.last.weight.grad[6:9].count_nonzero() > 0


def test_kept_channels_are_the_chosen_ones() -> None:
    torch.manual_seed(0)
    net = integral(Decoder())
    for layer in net.children():
        poison(layer)
    net.group.grow(3, init="split")
    integral(net)
    net.group.resize(4)
    net.group.resize(3)
    input = batch(3, 2, 4, 4)
    full = net(input)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.first.weight[1] = 0
        twin.last.weight[3:6] = 0
    net.hidden.keep([0, 2])
    net.group.keep([2, 0])
    assert torch.equal(net(input), twin(input))
    net.hidden.resize(3)
    net.group.resize(3)
    assert torch.equal(net(input), full)


def test_a_dim_that_counts_the_channels_of_groups_is_pruned_by_whole_groups() -> None:
    dim = ee.ElasticDim(6, 12, multiple_of=2, name="channels")
    first = ElasticConvTranspose2d(2, 6, 1, out_dim=dim)
    grouped = ElasticConvTranspose2d(6, 6, 1, groups=3, in_dim=dim)
    net = nn.Sequential(first, grouped)
    message = r"ElasticConvTranspose2d computes the units in groups of 2: expected all or none of units 2 to 3, got 2 alone"
    refused(net, lambda: dim.keep([0, 1, 2, 5]), ee.CapacityError, message)
    dim.keep([0, 1, 4, 5])
    assert grouped.groups == 2


def test_scores_are_those_of_the_channels() -> None:
    net = Decoder()
    expected = net.first.weight[:3, :4].detach()
    net(torch.randn(3, 2, 4, 4, dtype=torch.float64)).square().sum().backward()
    change = (expected * net.first.weight.grad[:3, :4]).sum((1, 2, 3)).abs()
    torch.testing.assert_close(ee.importance.taylor(net.hidden), change)
    of_groups = torch.cat([expected.movedim(1, 0).reshape(2, -1), net.grouped.weight[:4].detach().reshape(2, -1)], 1).norm(dim=1)
    torch.testing.assert_close(ee.importance.magnitude(net.group), of_groups)


# Whole models


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_exports_and_loads_like_its_dense_twin(layout: str) -> None:
    net = Decoder()
    ee.resize(net, {"down": 2, "first": 1})
    plain = ee.export(net)
    kinds = [nn.Conv2d, nn.ConvTranspose2d, nn.ConvTranspose2d, nn.ConvTranspose2d]
    assert [type(child) for child in plain.children()] == kinds
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    ee.set_layout(net, layout)
    torch.testing.assert_close(plain(x), net(x))
    for state in (plain.state_dict(), net.state_dict()):
        other = Decoder()
        other.load_state_dict(state)
        assert {name: dim.active for name, dim in ee.dims(other).items()} == {"down": 2, "first": 1, "last": 2}
        torch.testing.assert_close(other(x), plain(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suite", [TestConvTranspose2d(), TestGroupedConvTranspose2d()], ids=["plain", "grouped"])
def test_optimizers_step_the_active_slice(suite: TestConvTranspose2d, layout: str) -> None:
    torch.manual_seed(0)
    layer = suite.build((MANY, NARROW)[: suite.num_axes], layout)
    dense = suite.twin(layer, torch.float32)
    x, x_dense = suite.inputs(layer)
    ours, theirs = ee.optim.AdamW(layer.parameters(), lr=0.1), torch.optim.AdamW(dense.parameters(), lr=0.1)
    for _ in range(3):
        for module, optimizer, input in ((layer, ours, x), (dense, theirs, x_dense)):
            optimizer.zero_grad()
            module(input).square().sum().backward()
            optimizer.step()
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(layer.active(name), parameter)
