"""``ElasticGroupNorm``: the contract, and what only this layer promises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import AXES, LAYOUTS, MANY, NARROW, AxisCase, Contract, assert_as_exact, needs_library, norm, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.ops.backend import LIBRARY_MISSING

native = pytest.mark.skipif(LIBRARY_MISSING is not None, reason=f"no compiled library: {LIBRARY_MISSING}")


class TestGroupNorm(Contract):
    """Groups of two channels: the dims of the contract count groups."""

    num_axes = 1
    entering = leaving = 0
    unit = 1
    kernels = "narrow"
    test_opcheck: Any = None  # test_ops_pass_opcheck has more of it

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((AXES[place],) for place in (0, 1, 4))

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (MANY,)

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticGroupNorm(axes[0].active, axes[0].active * 2, dim=axes[0] * 2, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.GroupNorm(sizes[0] // 2, sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        # No group whose values are all but equal: there the largest error is a matter of luck.
        spread = 0.25 + torch.arange(size, dtype=torch.float64)[:, None, None] % 2
        return torch.rand(2, size, 2, 2, dtype=torch.float64) / 2 + spread


class TestOneGroup(TestGroupNorm):
    """One group for ever, over all active channels, without a bias. Triton's side of it is in test_triton_ops.py."""

    kernels = None

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (NARROW,)

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticGroupNorm(1, axes[0].active, bias=False, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return norm(nn.GroupNorm, 1, sizes[0], bias=False, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(3, size, 5, dtype=torch.float64) + 0.25


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (3, 6, 4, 5, 2)], ids=["images", "volumes"])
def test_keeps_channels_last(shape: tuple[int, ...], backend: str, layout: str) -> None:
    layer = ee.ElasticGroupNorm(3, 6, max_num_features=10)
    layer.layout, layer._widths.backend = layout, backend
    poison(layer)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    part = torch.randn(shape)
    x = torch.cat([part, torch.full_like(part[:, :4], torch.nan)], 1) if layout == "static" else part
    x = x.contiguous(memory_format=last).requires_grad_()
    part = part.contiguous(memory_format=last).requires_grad_()
    y, expected = layer(x), layer.to_dense()(part)
    torch.testing.assert_close(y[:, :6], expected)
    assert expected.is_contiguous(memory_format=last)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad[:, :6], part.grad)
    if backend == "native":
        assert y.is_contiguous(memory_format=last)
        assert x.grad.is_contiguous(memory_format=last)


@native
@pytest.mark.parametrize(
    ("case", "groups", "layout", "options"),
    [
        pytest.param(NARROW, True, "static", {}, id="static"),
        pytest.param(MANY, True, "compact", {"bias": False}, id="compact, several runs"),
        pytest.param(MANY, False, "static", {"affine": False}, id="one group, several runs"),
    ],
)
def test_ops_pass_opcheck(case: AxisCase, groups: bool, layout: str, options: dict[str, Any]) -> None:
    axis, dims = case.axis()
    layer = ee.ElasticGroupNorm(axis.active if groups else 1, axis.active * 2, dim=axis * 2, **options)
    for dim, (active, _) in zip(dims, case.sizes, strict=True):
        dim.resize(active)
    layer.layout = layout
    w, compact, width = layer._widths, layout == "compact", 2 if groups else 0
    x = torch.randn(2, w.size(0), 3, requires_grad=True)
    parameters = [layer.weight, layer.bias]
    ops = torch.ops.esper_elastic
    torch.library.opcheck(ops.group_norm, (x, *parameters, w.control, w.slots, compact, width, 1e-5))
    operands = [None if t is None else t.detach() for t in parameters]
    _, mean, rstd = ops.group_norm(x.detach(), *operands, w.control, w.slots, compact, width, 1e-5)
    has = [t is not None for t in operands]
    for mask in ([True, *has], [False, has[0], False], [True, False, False]):
        args = (torch.rand_like(x), x.detach(), *operands, mean, rstd, w.control, w.slots, compact, width, mask)
        torch.library.opcheck(ops.group_norm_backward, args)


@pytest.mark.parametrize("groups", [3, 1], ids=["groups", "one group"])
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
def test_a_switch_that_is_off_silences_a_static_layer(backend: str, groups: int) -> None:
    layer = ee.ElasticGroupNorm(groups, 6, max_num_features=10)
    layer.layout = "static"
    switch = Switch()
    layer.govern(switch)
    layer._widths.backend = backend
    poison(layer)
    switch.set(False)
    x = torch.randn(3, 10, 4, requires_grad=True)
    y = layer(x)
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()
    assert layer.weight.grad is None or (layer.weight.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0)], ids=str)
def test_takes_empty_batches_and_images(shape: tuple[int, ...], layout: str, backend: str) -> None:
    layer = ee.ElasticGroupNorm(3, 6)
    layer.layout, layer._widths.backend = layout, backend
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    if backend == "native" or shape[0] == 0:  # of images without pixels PyTorch's own gradient is not a number
        assert (layer.weight.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_may_be_wider_than_activations(layout: str, backend: str) -> None:
    """As in training in bfloat16 with parameters in float32."""
    layer = ee.ElasticGroupNorm(3, 6, max_num_features=10)
    layer.layout, layer._widths.backend = layout, backend
    part = torch.randn(2, 6, 5).bfloat16()
    x = torch.nn.functional.pad(part, (0, 0, 0, layer.num_channels - 6)).requires_grad_()
    dense, exact = layer.to_dense(), layer.to_dense().double()
    leaves = [part.clone().requires_grad_(), part.double().requires_grad_()]
    y, y_dense, y_exact = layer(x)[:, :6], dense(leaves[0]), exact(leaves[1])
    assert_as_exact(y, y_dense, y_exact)
    for output in (y, y_dense, y_exact):
        output.square().sum().backward()
    assert_as_exact(x.grad[:, :6], leaves[0].grad, leaves[1].grad)
    assert_as_exact(layer.weight.grad[:6], dense.weight.grad, exact.weight.grad)


def test_reports_the_sizes_of_its_layout() -> None:
    layer = ee.ElasticGroupNorm(3, 6, max_num_features=10)
    assert (layer.num_groups, layer.num_channels, layer.weight.shape) == (3, 6, (10,))
    layer.layout = "static"
    assert (layer.num_groups, layer.num_channels) == (5, 10)
    layer.layout = "compact"
    layer.dim.dims[0].resize(2)
    assert (layer.num_groups, layer.num_channels) == (2, 4)
    one = ee.ElasticGroupNorm(1, 6, max_num_features=10)
    one.dim.resize(7)
    assert (one.num_groups, one.num_channels) == (1, 7)
    assert one.mixes_units
    assert not layer.mixes_units


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ee.ElasticGroupNorm(4, 6), r"num_channels: expected a multiple of groups=4, at least 1, got 6"),
        (lambda: ee.ElasticGroupNorm(0, 6), r"expected a multiple of groups=0"),
        (lambda: ee.ElasticGroupNorm(3, 6, max_num_features=9), r"max_num_features: expected whole groups of 2 .* got 9\. .* 8 and 10"),
        (lambda: ee.ElasticGroupNorm(3, 6, max_num_features=4), r"capacity is 2"),
        (
            lambda: ee.ElasticGroupNorm(3, 6, dim=ee.ElasticDim(6, 8)),
            r"ElasticGroupNorm: dim: ElasticDim moves in steps of 1 channels, which splits groups of 2\. "
            r"Share a dim whose unit is a group \(dim \* 2\), or one .* multiple_of=2\.",
        ),
        (lambda: ee.ElasticGroupNorm(3, 6, dim=ee.ElasticDim(6, 9, multiple_of=2)), r"which splits groups of 2"),
        (lambda: ee.ElasticGroupNorm(3, 6, dim=ee.ElasticDim(4, 8, multiple_of=2)), r"num_features: expected 4, .* got 6"),
        (lambda: ee.ElasticGroupNorm(3, 6, dim=ee.ElasticDim(6), max_num_features=8), r"drop max_num_features"),
    ],
)
def test_refuses_sizes_that_split_groups(build: Any, match: str) -> None:
    with pytest.raises(ee.CapacityError, match=match):
        build()


def test_refuses_inputs_that_nn_refuses() -> None:
    layer = ee.ElasticGroupNorm(3, 6)
    with pytest.raises(ee.LayoutError, match=r"ElasticGroupNorm: input: expected shape \(N, 6, \*\), got \(6,\)"):
        layer(torch.randn(6))
    with pytest.raises(ValueError, match=r"expected more than one value per group, got input of shape \(1, 3, 1\)"):
        ee.ElasticGroupNorm(3, 3)(torch.randn(1, 3, 1))
    assert ee.ElasticGroupNorm(1, 3)(torch.randn(1, 3, 1)).shape == (1, 3, 1)
    with pytest.raises(ValueError, match=r"expected more than one value per group"):
        ee.ElasticGroupNorm(1, 1)(torch.randn(1, 1, 1))


class Net(nn.Module):
    """Two convolutions with a group norm of pairs of channels between them, on a dim that counts channels or pairs of them."""

    def __init__(self, channels: Axis, groups: int = 3, **options: Any) -> None:
        super().__init__()
        self.first = ee.ElasticConv2d(2, channels.active, 1, out_dim=channels, dtype=torch.float64)
        self.norm = ee.ElasticGroupNorm(groups, channels.active, dim=channels, dtype=torch.float64, **options)
        self.last = ee.ElasticConv2d(channels.active, 2, 1, in_dim=channels, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


COUNTS = {"channels": lambda: ee.ElasticDim(6, 10, multiple_of=2), "pairs": lambda: ee.ElasticDim(3, 5) * 2}


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "plain"])
@pytest.mark.parametrize("init", ["zero", "split"])
@pytest.mark.parametrize("counts", COUNTS)
def test_growth_in_whole_groups_keeps_the_function(counts: str, init: str, options: dict[str, Any]) -> None:
    net = Net(COUNTS[counts](), **options)
    for layer in (net.first, net.norm, net.last):
        poison(layer)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    before = net(x)
    (dim,) = net.norm.dim.dims
    dim.grow(dim.capacity, init=init)
    assert net.norm.num_groups == 5
    assert net.last.weight[:, 6:].eq(0).all() == (init == "zero")
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "plain"])
def test_pruning_keeps_whole_groups(options: dict[str, Any]) -> None:
    net = Net(COUNTS["channels"](), **options)
    dim = net.norm.dim
    assert isinstance(dim, ee.ElasticDim)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        net.last.weight[:, 2:4] = 0
    before = net(x)
    with pytest.raises(ee.CapacityError, match=r"ElasticGroupNorm computes the units in groups of 2: .* 2 to 3, got 3 alone"):
        dim.keep([0, 1, 3, 4])
    dim.keep([0, 1, 4, 5])
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "plain"])
def test_one_group_mixes_its_channels(options: dict[str, Any]) -> None:
    net = Net(ee.ElasticDim(6, 10), groups=1, **options)
    with pytest.raises(ee.CapacityError, match=r"ElasticGroupNorm runs over the dim and mixes all its units.*Pass exact=False"):
        net.norm.dim.grow(7)
    net.norm.dim.grow(7, exact=False)
    net.norm.dim.keep([0, 3, 6])
    assert net(torch.randn(2, 2, 3, 3, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=str)
def test_dense_twins_and_copies(options: dict[str, Any]) -> None:
    dense = norm(nn.GroupNorm, 3, 6, 1e-3, **options)
    layer = ee.ElasticGroupNorm.from_dense(dense, max_num_features=10)
    for twin in (layer.to_dense(), copy.deepcopy(layer).to_dense(), pickle.loads(pickle.dumps(layer)).to_dense(), ee.export(layer)):
        assert type(twin) is nn.GroupNorm
        assert repr(twin) == repr(dense)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), dense.parameters(), strict=True))
    full = ee.ElasticGroupNorm(3, 6, **options)
    full.load_state_dict(dense.state_dict())
    dense.load_state_dict(full.state_dict())


def test_a_smaller_state_dict_sets_the_width() -> None:
    layer = ee.ElasticGroupNorm(3, 6, max_num_features=10)
    layer.load_state_dict(nn.GroupNorm(2, 4).state_dict())
    assert layer.num_groups == 2
    with pytest.raises(ee.CapacityError, match="5 indices are no multiple of the 2 per unit"):
        layer.load_state_dict(nn.GroupNorm(1, 5).state_dict())
    assert layer.num_groups == 2
