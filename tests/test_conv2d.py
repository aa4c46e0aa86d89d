"""``ElasticConv2d``: the contract, and what only a convolution promises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from contract import AXES, LAYOUTS, MANY, AxisCase, Contract, Record, allocations, assert_as_exact, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.layers import ElasticConv2d
from esper_elastic.ops.backend import LIBRARY_MISSING

native = pytest.mark.skipif(LIBRARY_MISSING is not None, reason=f"no compiled library: {LIBRARY_MISSING}")


class TestConv2d(Contract):
    kernels = "narrow"
    unit = -3
    settings: ClassVar[dict[str, Any]] = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)}

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((case, AXES[(place + 3) % len(AXES)]) for place, case in enumerate(AXES))

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ElasticConv2d(in_dim.active, out_dim.active, **self.settings, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Conv2d(sizes[1], sizes[0], **self.settings, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(2, size, 3, 3, dtype=torch.float64) + 0.25


class TestGroupedConv2d(TestConv2d):
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
        return ElasticConv2d(*channels, **self.settings, groups=groups.active, bias=False, in_dim=groups * 2, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Conv2d(sizes[1], sizes[0], **self.settings, groups=sizes[1] // 2, bias=False, **factory)


SETTINGS = {
    "plain": {},
    "kernel-1": {"kernel_size": 1},
    "stride": {"stride": (2, 3), "padding": 1},
    "dilation": {"dilation": (2, 1), "padding": (2, 0)},
    "valid": {"padding": "valid", "dilation": 2},
    "same": {"padding": "same"},
    "same-even": {"padding": "same", "kernel_size": (2, 4), "dilation": (3, 1)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular", "kernel_size": (2, 3)},
    "no-bias": {"bias": False},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": "same"},
}


def pair(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A layer at six of twelve input channels, dormant storage full of NaN, and the ``nn`` layer that the same seed makes."""
    settings = {"kernel_size": 3} | settings
    torch.manual_seed(3)
    dense = nn.Conv2d(6, 12, **settings, dtype=dtype)
    torch.manual_seed(3)
    elastic = ElasticConv2d(6, 12, **settings, dtype=dtype, max_in_channels=12, max_out_channels=24)
    poison(elastic)
    return elastic, dense


def widened(x: Tensor, layer: nn.Module) -> Tensor:
    """``x`` as the layout of ``layer`` wants it."""
    if layer.layout == "compact":
        return x.clone().requires_grad_()
    rest = torch.zeros(*x.shape[:-3], layer.in_dim.capacity - x.shape[-3], *x.shape[-2:], dtype=x.dtype)
    return torch.cat([x, rest], -3).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 9, 8), (6, 9, 8), (0, 6, 9, 8)], ids=["batched", "unbatched", "empty"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_gives_what_nn_gives(settings: dict[str, Any], shape: tuple[int, ...], layout: str) -> None:
    elastic, dense = pair(settings)
    elastic.layout = layout
    part = torch.rand(shape)
    x, x_dense, x_exact = widened(part, elastic), part.requires_grad_(), part.detach().double().requires_grad_()
    exact = copy.deepcopy(dense).double()
    outputs = [elastic(x), dense(x_dense), exact(x_exact)]
    for y in outputs:
        y.sum().backward()
    assert outputs[0].narrow(-3, 12, outputs[0].shape[-3] - 12).count_nonzero() == 0
    assert x.grad.narrow(-3, 6, x.shape[-3] - 6).count_nonzero() == 0
    assert_as_exact(outputs[0].narrow(-3, 0, 12), outputs[1], outputs[2], "output")
    assert_as_exact(x.grad.narrow(-3, 0, 6), x_dense.grad, x_exact.grad, "input gradient")
    inside = elastic.weight.grad[:12, : dense.weight.shape[1]]
    assert_as_exact(inside, dense.weight.grad, exact.weight.grad, "weight gradient")
    assert elastic.weight.grad.count_nonzero() == inside.count_nonzero()
    if dense.bias is not None:
        assert_as_exact(elastic.bias.grad[:12], dense.bias.grad, exact.bias.grad, "bias gradient")
        assert elastic.bias.grad[12:].count_nonzero() == 0


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_is_at_full_size_the_layer_of_nn(settings: dict[str, Any]) -> None:
    settings = {"kernel_size": 3} | settings
    torch.manual_seed(0)
    elastic = ElasticConv2d(6, 12, **settings)
    torch.manual_seed(0)
    dense = nn.Conv2d(6, 12, **settings)
    assert isinstance(elastic, nn.Conv2d)
    assert repr(dense)[:-1] + ", max_in_channels=6, max_out_channels=12)" == repr(elastic).removeprefix("Elastic")
    for name, tensor in dense.state_dict().items():
        assert torch.equal(elastic.state_dict()[name], tensor)
    for name in ("in_channels", "out_channels", "groups", "kernel_size", "stride", "padding", "dilation", "padding_mode", "output_padding"):
        assert getattr(elastic, name) == getattr(dense, name), name
    other = nn.Conv2d(6, 12, **settings)
    elastic.load_state_dict(other.state_dict())
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(elastic(x), other(x))
    back = elastic.to_dense()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(dense)
    assert torch.equal(back(x), other(x))


def test_from_dense_copies_and_draws_nothing() -> None:
    dense = nn.Conv2d(4, 8, 3, groups=4)
    state = torch.get_rng_state()
    elastic = ElasticConv2d.from_dense(dense, max_out_channels=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert (elastic.in_dim.capacity, elastic.out_dim.capacity, elastic.groups) == (8, 16, 4)
    assert torch.equal(elastic.active("weight"), dense.weight)
    assert elastic.weight.isfinite().all()
    with pytest.raises(ee.LayoutError, match=r"expected a plain nn\.Conv2d"):
        ElasticConv2d.from_dense(nn.Conv1d(1, 1, 1))


def test_sizes_are_those_of_activations() -> None:
    layer = ElasticConv2d(4, 6, 3, groups=2, max_in_channels=10)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 6, 2)
    layer.layout = "static"
    assert (layer.in_channels, layer.out_channels, layer.groups) == (10, 15, 5)
    assert "ElasticConv2d(10, 15, kernel_size=(3, 3), stride=(1, 1), groups=5, max_in_channels=10" in repr(layer)
    assert layer.to_dense().groups == 2


# Groups


def test_a_depthwise_layer_has_one_dim_and_takes_its_neighbours() -> None:
    alone = ElasticConv2d(4, 4, 3, groups=4, max_in_channels=8)
    assert alone.in_dim is alone.out_dim
    first = ElasticConv2d(3, 4, 1, max_out_channels=8)
    depthwise = ElasticConv2d(4, 4, 3, groups=4, in_dim=first.out_dim)
    last = ElasticConv2d(4, 5, 1, in_dim=depthwise.out_dim)
    assert first.out_dim is depthwise.in_dim is depthwise.out_dim is last.in_dim
    first.out_dim.resize(7)
    assert last(depthwise(first(torch.randn(1, 3, 5, 5)))).shape == (1, 5, 3, 3)
    assert depthwise.groups == 7
    expanding = ElasticConv2d(7, 14, 3, groups=7, in_dim=first.out_dim)
    assert [(s.dim, s.start, s.inner) for s in expanding.out_dim.segments] == [(first.out_dim, 0, 2)]
    shrinking = ElasticConv2d(14, 7, 3, groups=7, in_dim=first.out_dim * 2)
    assert shrinking.out_dim is first.out_dim
    backwards = ElasticConv2d(14, 7, 3, groups=7, out_dim=first.out_dim)
    assert backwards.in_dim.segments == (first.out_dim * 2).segments


def test_a_dim_of_channels_that_moves_by_whole_groups_serves_both_sides() -> None:
    dim = ee.ElasticDim(4, 12, multiple_of=2)
    layer = ElasticConv2d(4, 4, 3, groups=2, in_dim=dim)
    assert layer.out_dim is dim
    dim.resize(10)
    assert layer.groups == 5
    dense = layer.to_dense()
    x = torch.randn(2, 10, 4, 4)
    torch.testing.assert_close(layer(x), dense(x))


def test_dims_side_by_side_run_through_a_depthwise_layer() -> None:
    a, b = ee.ElasticDim(2, 3), ee.ElasticDim(1, 4)
    layer = ElasticConv2d(3, 6, 3, groups=3, in_dim=ee.concat(a, b))
    assert [(s.dim, s.start, s.inner) for s in layer.out_dim.segments] == [(a, 0, 2), (b, 6, 2)]
    a.resize(1)
    b.resize(3)
    poison(layer)
    x = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: ((5, 4, 3), {"groups": 2}), r"in_channels: expected a multiple of groups=2, at least 1, got 5"),
        (lambda: ((4, 5, 3), {"groups": 2}), r"out_channels: expected a multiple of groups=2"),
        (lambda: ((4, 4, 3), {"groups": 0}), r"in_channels: expected a multiple of groups=0"),
        (lambda: ((4, 4, 3), {"groups": 2.0}), r"groups: expected an integer, got 2\.0 of type float"),
        (lambda: ((True, 4, 3), {}), r"expected an integer, got True of type bool"),
        (lambda: ((0, 4, 3), {}), r"minimum is 1"),
        (lambda: ((4, 4, 3), {"max_in_channels": 3}), r"capacity is 3"),
        (lambda: ((4, 6, 3), {"groups": 2, "max_in_channels": 7}), r"whole groups of 2 channels, got 7\. The nearest are 6 and 8"),
        (
            lambda: ((4, 6, 3), {"groups": 2, "max_in_channels": 8, "max_out_channels": 9}),
            r"as many groups in both, got 4 groups of 2 and 3 of 3\. Give one of the two",
        ),
        (
            lambda: ((4, 4, 3), {"groups": 2, "in_dim": ee.ElasticDim(4, 8)}),
            r"in_dim: ElasticDim moves in steps of 1 .* splits groups of 2",
        ),
        (
            lambda: ((4, 6, 3), {"groups": 2, "in_dim": ee.ElasticDim(4, 8, multiple_of=2)}),
            r"splits groups of 2\. Share a dim whose unit is a group \(dim \* 2\)",
        ),
        (lambda: ((4, 4, 3), {"groups": 4, "in_dim": ee.ElasticDim(3, 8)}), r"in_channels: expected 3, .* got 4"),
        (lambda: ((4, 4, 3), {"groups": 4, "in_dim": ee.ElasticDim(4), "max_out_channels": 8}), r"Drop max_out_channels"),
        (
            lambda: ((4, 4, 3), {"groups": 4, "in_dim": ee.ElasticDim(4), "out_dim": ee.ElasticDim(4)}),
            r"out_dim: expected the axis whose groups are those of in_dim",
        ),
        (lambda: ((4, 4, 3), {"in_dim": 4}), r"expected an ElasticDim or a derived axis, got int"),
    ],
)
def test_impossible_sizes_are_refused(arguments: Any, message: str) -> None:
    positional, keywords = arguments()
    with pytest.raises(ee.CapacityError, match=message):
        ElasticConv2d(*positional, **keywords)


@pytest.mark.parametrize("shape", [(6, 9), (1, 2, 6, 9, 9)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ee.LayoutError, match=r"expected \(C, H, W\) or \(N, C, H, W\), got"):
        ElasticConv2d(6, 4, 3)(torch.randn(shape))


# Memory


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("last", ["input", "weight", "both", "neither"])
def test_memory_formats_are_those_of_nn(last: str, layout: str) -> None:
    elastic, dense = pair({"padding": 1})
    if last in ("weight", "both"):
        elastic, dense = elastic.to(memory_format=torch.channels_last), dense.to(memory_format=torch.channels_last)
    elastic.layout = layout
    part = torch.rand(2, 6, 5, 4)
    x, x_dense = widened(part, elastic).detach(), part
    if last in ("input", "both"):
        x, x_dense = x.to(memory_format=torch.channels_last), x_dense.to(memory_format=torch.channels_last)
    outputs = elastic(x.requires_grad_()), dense(x_dense.requires_grad_())
    torch.testing.assert_close(outputs[0][:, :12], outputs[1])
    for y in outputs:
        y.sum().backward()
    for name, ours, theirs in (
        ("output", *outputs),
        ("input gradient", x.grad, x_dense.grad),
        ("weight gradient", elastic.weight.grad, dense.weight.grad),
    ):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            assert ours.is_contiguous(memory_format=memory_format) == theirs.is_contiguous(memory_format=memory_format), name


@native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_nothing_of_the_size_of_the_weight_is_allocated(memory_format: torch.memory_format, amp: bool, layout: str) -> None:
    layer = ElasticConv2d(12, 16, 3, max_in_channels=96, max_out_channels=128).to(memory_format=memory_format)
    layer.layout = layout
    x = torch.rand(1, layer.in_channels, 4, 4).to(memory_format=memory_format).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = layer(x)
        y.sum().backward()
        layer.zero_grad()

    size = layer.weight.numel() * 4
    first, second = allocations(step), allocations(step)
    assert sorted(bytes for bytes in first if bytes >= size // 8) == [size], "the gradient itself, and no temporary"
    assert [bytes for bytes in second if bytes >= size // 8] == [], "the gradient's buffer is kept"


@native
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ops_say_beforehand_what_they_return(layout: str, memory_format: torch.memory_format) -> None:
    for settings in ({"stride": 2}, {"groups": 2}, {"groups": 6, "padding": 1}):
        layer, _ = pair(settings)
        layer.to(memory_format=memory_format).layout = layout
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.nan_to_num_(0.5)
        x = torch.rand(2, layer.in_channels, 5, 6).to(memory_format=memory_format).requires_grad_()
        with Record() as record:
            layer(x).square().sum().backward()
        assert [op.name() for op, _, _ in record.calls] == ["esper_elastic::convolution", "esper_elastic::convolution_backward"]
        for op, arguments, keywords in record.calls:
            operands = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
            torch.library.opcheck(op, operands, keywords, test_utils=("test_schema", "test_faketensor"))
        shadow = copy.deepcopy(layer).to("meta")(x.detach().to("meta"))
        y = layer(x)
        assert (shadow.shape, shadow.stride()) == (y.shape, y.stride())


# Switches, copies, compilation


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_static_layer_that_is_off_gives_zeros_and_reads_nothing(memory_format: torch.memory_format) -> None:
    layer = ElasticConv2d(4, 6, 3, padding=1, stride=2, max_in_channels=5, max_out_channels=7).to(memory_format=memory_format)
    switch = Switch(name="branch")
    layer.govern(switch)
    layer.layout = "static"
    x = torch.rand(2, 5, 6, 7).to(memory_format=memory_format).requires_grad_()
    on = layer(x)
    assert on[:, :6].count_nonzero() > 0
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


def through_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def through_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("groups", [1, 2])
def test_copies_keep_widths_and_go_their_own_way(way: Any, groups: int) -> None:
    layer = ElasticConv2d(4, 6, 3, groups=groups, max_in_channels=8)
    twin = way(layer)
    x = torch.randn(1, 4, 5, 5)
    before = layer(x)
    assert torch.equal(twin(x), before)
    twin.in_dim.dims[0].resize(twin.in_dim.dims[0].capacity)
    assert (twin.in_channels, layer.in_channels) == (8, 4)
    assert torch.equal(layer(x), before)


def test_serves_what_builds_and_calls_modules_for_nn() -> None:
    keywords = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "max_in_channels": 4}
    skipped = nn.utils.skip_init(ElasticConv2d, **keywords)
    assert skipped.weight.shape == (3, 4, 3, 3)
    on_meta = ElasticConv2d(**keywords, device="meta")
    assert on_meta(torch.empty(1, 2, 5, 5, device="meta")).shape == (1, 3, 3, 3)
    layer = on_meta.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(1, 2, 5, 5)
    expected = layer(x)
    assert expected.isfinite().all()
    state = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, state, x), 2 * expected)
    torch.testing.assert_close(layer.half()(x.half()), expected.half(), rtol=1e-2, atol=1e-2)
    complex_layer = ElasticConv2d(**keywords, dtype=torch.complex64)
    z = torch.randn(1, 2, 5, 5, dtype=torch.complex64)
    torch.testing.assert_close(complex_layer(z), complex_layer.to_dense()(z))


@native
@pytest.mark.slow
def test_inductor_compiles_a_static_network_once() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dim = ee.ElasticDim(5, 8)
    model = nn.Sequential(
        ElasticConv2d(3, 5, 3, padding=1, out_dim=dim),
        nn.ReLU(),
        ElasticConv2d(5, 5, 3, groups=5, in_dim=dim),
        ElasticConv2d(5, 4, 1, in_dim=dim),
    ).to(memory_format=torch.channels_last)
    ee.set_layout(model, "static")
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    for width in (5, 1, 8, 3):
        dim.resize(width)
        grads = []
        for module in (model, compiled):
            x = torch.linspace(-1, 1, 2 * 3 * 6 * 7).reshape(2, 3, 6, 7).to(memory_format=torch.channels_last).requires_grad_()
            model.zero_grad()
            module(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(grads[0], grads[1])
    assert counters["stats"]["unique_graphs"] == 1
