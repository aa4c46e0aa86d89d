"""``ElasticLayerNorm``: the contract, and what only this layer promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from contract import NARROW, Contract, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.ops import backend as backends


class TestLayerNorm(Contract):
    num_axes = 1
    kernels = "all"
    entering = leaving = 0

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticLayerNorm(axes[0].active, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.LayerNorm(sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        # No row whose values are all but equal: there the largest error is a matter of luck.
        return torch.rand(4, 3, size, dtype=torch.float64) / 2 + torch.linspace(0.25, 1.25, size, dtype=torch.float64)


class TestLayerNormOverSeveralSizes(TestLayerNorm):
    unit = -2

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticLayerNorm((axes[0].active, 3), bias=False, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.LayerNorm((sizes[0], 3), bias=False, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(2, size, 3, dtype=torch.float64) + 0.25


@pytest.mark.parametrize(
    ("rest", "layout", "options"),
    [((), "compact", {}), ((2, 3), "static", {"bias": False}), ((), "static", {"elementwise_affine": False})],
    ids=str,
)
def test_ops_pass_opcheck(rest: tuple[int, ...], options: dict[str, Any], layout: str) -> None:
    if backends.LIBRARY_MISSING is not None:
        pytest.skip(f"no compiled library: {backends.LIBRARY_MISSING}")
    axis, (dim,) = NARROW.axis()
    layer = ee.ElasticLayerNorm((9, *rest), dim=axis, **options)
    dim.resize(5)
    layer.layout = layout
    w, dims = layer._widths, 1 + len(rest)
    x = torch.randn(2, w.size(0), *rest, requires_grad=True)
    compact, parameters = layout == "compact", [layer.weight, layer.bias]
    ops = torch.ops.esper_elastic
    torch.library.opcheck(ops.layer_norm, (x, *parameters, w.control, w.slots, compact, dims, 1e-5))
    operands = [None if t is None else t.detach() for t in parameters]
    _, mean, rstd = ops.layer_norm(x.detach(), *operands, w.control, w.slots, compact, dims, 1e-5)
    has = [t is not None for t in operands]
    for mask in ([True, *has], [False, has[0], False], [True, False, False]):
        args = (torch.rand_like(x), x.detach(), *operands, mean, rstd, w.control, w.slots, compact, dims, mask)
        torch.library.opcheck(ops.layer_norm_backward, args)


def test_a_switch_that_is_off_silences_a_static_layer() -> None:
    layer = ee.ElasticLayerNorm(5, max_num_features=9)
    layer.layout = "static"
    switch = Switch()
    layer.govern(switch)
    poison(layer)
    switch.set(False)
    x = torch.randn(3, 9, requires_grad=True)
    y = layer(x)
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()
    assert (layer.weight.grad == 0).all()


def test_inductor_compiles_once_for_all_widths() -> None:
    if backends.LIBRARY_MISSING is not None:
        pytest.skip(f"no compiled library: {backends.LIBRARY_MISSING}")
    layer = ee.ElasticLayerNorm(9)
    layer.layout = "static"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True)
    for width in (9, 4, 1, 7):
        layer.dim.resize(width)
        x = torch.randn(3, 9)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_reports_the_sizes_of_its_layout() -> None:
    layer = ee.ElasticLayerNorm((5, 3), max_num_features=9)
    assert layer.normalized_shape == (5, 3)
    layer.layout = "static"
    assert layer.normalized_shape == (9, 3)
    assert layer.weight.shape == (9, 3)
    assert layer.mixes_units
    assert (layer.weight == 1).all()
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("shape", [(5, 4), (3,), ()], ids=str)
def test_refuses_inputs_whose_fixed_sizes_differ(shape: tuple[int, ...]) -> None:
    layer = ee.ElasticLayerNorm((5, 3))
    with pytest.raises(ee.LayoutError, match=r"expected shape \(\*, 5, 3\), got"):
        layer(torch.randn(shape))


def test_needs_a_size() -> None:
    with pytest.raises(ee.CapacityError, match="at least one size"):
        ee.ElasticLayerNorm(())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_dense_twins_and_copies(options: dict[str, Any]) -> None:
    dense = nn.LayerNorm((5, 2), 1e-3, **options)
    layer = ee.ElasticLayerNorm.from_dense(dense, max_num_features=9)
    assert isinstance(layer, nn.LayerNorm)
    for twin in (layer.to_dense(), copy.deepcopy(layer).to_dense(), pickle.loads(pickle.dumps(layer)).to_dense()):
        assert type(twin) is nn.LayerNorm
        assert repr(twin) == repr(dense)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), dense.parameters(), strict=True))
    full = ee.ElasticLayerNorm((5, 2), **options)
    full.load_state_dict(dense.state_dict())
    dense.load_state_dict(full.state_dict())


def test_casts_devices_and_deferred_initialisation() -> None:
    layer = ee.ElasticLayerNorm(5, max_num_features=9)
    x = torch.randn(6, 5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.LayerNorm(5)(x).dtype
    assert layer.half()(x.half()).dtype == torch.half
    meta = ee.ElasticLayerNorm(5, max_num_features=9, device="meta")
    y = meta(torch.randn(6, 5, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.is_meta
    skipped = nn.utils.skip_init(ee.ElasticLayerNorm, 5, max_num_features=9)
    skipped.reset_parameters()
    torch.testing.assert_close(skipped(x), nn.functional.layer_norm(x, (5,)))
    plain = ee.ElasticLayerNorm(5, elementwise_affine=False)
    for device in ("cpu", "meta", "cpu"):
        assert plain(torch.randn(6, 5, device=device)).device.type == device
