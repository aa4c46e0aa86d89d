"""``ElasticRMSNorm``: the contract, and what only this layer promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from contract import LAYOUTS, NARROW, Contract, assert_as_exact, needs_library, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch


class TestRMSNorm(Contract):
    num_axes = 1
    kernels = "all"
    entering = leaving = 0
    test_opcheck: Any = None  # test_ops_pass_opcheck has more of it

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticRMSNorm(axes[0].active, 1e-5, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.RMSNorm(sizes[0], 1e-5, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(4, 3, size, dtype=torch.float64) + torch.linspace(0.25, 1.25, size, dtype=torch.float64)


class TestRMSNormOverSeveralSizes(TestRMSNorm):
    unit = -2
    kernels = "narrow"

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticRMSNorm((axes[0].active, 3), 1e-5, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.RMSNorm((sizes[0], 3), 1e-5, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(2, size, 3, dtype=torch.float64) + 0.25


@needs_library
@pytest.mark.parametrize(
    ("rest", "layout", "options"),
    [((), "compact", {}), ((2, 3), "static", {}), ((), "static", {"elementwise_affine": False})],
    ids=str,
)
def test_ops_pass_opcheck(rest: tuple[int, ...], options: dict[str, Any], layout: str) -> None:
    axis, (dim,) = NARROW.axis()
    layer = ee.ElasticRMSNorm((9, *rest), dim=axis, **options)
    dim.resize(5)
    layer.layout = layout
    w, dims, compact = layer._widths, 1 + len(rest), layout == "compact"
    x = torch.randn(2, w.size(0), *rest, requires_grad=True)
    ops = torch.ops.esper_elastic
    torch.library.opcheck(ops.rms_norm, (x, layer.weight, w.control, w.slots, compact, dims, 1e-5))
    weight = None if layer.weight is None else layer.weight.detach()
    _, rstd = ops.rms_norm(x.detach(), weight, w.control, w.slots, compact, dims, 1e-5)
    for mask in ([True, weight is not None], [False, weight is not None], [True, False]):
        args = (torch.rand_like(x), x.detach(), weight, rstd, w.control, w.slots, compact, dims, mask)
        torch.library.opcheck(ops.rms_norm_backward, args)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_without_eps_it_is_the_machine_epsilon_that_nn_takes(dtype: torch.dtype, layout: str, backend: str) -> None:
    layer = ee.ElasticRMSNorm(5, max_num_features=9, dtype=dtype)
    layer.layout, layer._widths.backend = layout, backend
    poison(layer)
    part = torch.full((3, 5), torch.finfo(dtype).smallest_normal ** 0.5 if dtype == torch.float64 else 3e-4, dtype=dtype)
    x = torch.nn.functional.pad(part, (0, layer.normalized_shape[0] - 5))
    torch.testing.assert_close(layer(x)[:, :5], nn.RMSNorm(5, dtype=dtype)(part))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_weight_may_have_another_type(types: tuple[torch.dtype, torch.dtype], layout: str, backend: str) -> None:
    layer = ee.ElasticRMSNorm(5, max_num_features=9, dtype=types[1])
    layer.layout, layer._widths.backend = layout, backend
    part = torch.randn(4, 5).to(types[0])
    x = torch.nn.functional.pad(part, (0, layer.normalized_shape[0] - 5)).requires_grad_()
    dense, exact = layer.to_dense(), layer.to_dense().double()
    leaves = [part.clone().requires_grad_(), part.double().requires_grad_()]
    y, y_dense, y_exact = layer(x)[:, :5], dense(leaves[0]), exact(leaves[1])
    assert_as_exact(y, y_dense, y_exact)
    for output in (y, y_dense, y_exact):
        output.square().sum().backward()
    assert_as_exact(x.grad[:, :5], leaves[0].grad, leaves[1].grad)
    assert_as_exact(layer.weight.grad[:5], dense.weight.grad, exact.weight.grad)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0)], ids=str)
def test_any_batch_shape(shape: tuple[int, ...], layout: str, backend: str) -> None:
    layer = ee.ElasticRMSNorm(5)
    dense = layer.to_dense()
    layer.layout, layer._widths.backend = layout, backend
    x = torch.randn(*shape, 5)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_library)])
def test_a_switch_that_is_off_silences_a_static_layer(backend: str) -> None:
    layer = ee.ElasticRMSNorm(5, max_num_features=9)
    layer.layout = "static"
    switch = Switch()
    layer.govern(switch)
    layer._widths.backend = backend
    poison(layer)
    switch.set(False)
    x = torch.randn(3, 9, requires_grad=True)
    y = layer(x)
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()
    assert layer.weight.grad is None or (layer.weight.grad == 0).all()


def test_reports_the_sizes_of_its_layout() -> None:
    layer = ee.ElasticRMSNorm((5, 3), max_num_features=9)
    assert layer.normalized_shape == (5, 3)
    layer.layout = "static"
    assert layer.normalized_shape == (9, 3)
    assert layer.weight.shape == (9, 3)
    assert (layer.weight == 1).all()


def test_mixes_its_units() -> None:
    dim = ee.ElasticDim(5, 9)
    linear = ee.ElasticLinear(3, 5, out_dim=dim)
    norm = ee.ElasticRMSNorm(5, dim=dim, elementwise_affine=False)
    with pytest.raises(ee.CapacityError, match=r"ElasticRMSNorm runs over the dim and mixes all its units"):
        dim.grow(7)
    dim.grow(7, exact=False)
    dim.keep([1, 6])
    assert norm(linear(torch.randn(4, 3))).shape == (4, 2)


@pytest.mark.parametrize("shape", [(5, 4), (3,), ()], ids=str)
def test_refuses_inputs_whose_fixed_sizes_differ(shape: tuple[int, ...]) -> None:
    layer = ee.ElasticRMSNorm((5, 3))
    with pytest.raises(ee.LayoutError, match=r"ElasticRMSNorm: input: expected shape \(\*, 5, 3\), got"):
        layer(torch.randn(shape))


def test_needs_a_size() -> None:
    with pytest.raises(ee.CapacityError, match="ElasticRMSNorm: normalized_shape: expected at least one size"):
        ee.ElasticRMSNorm(())


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
def test_dense_twins_and_copies(options: dict[str, Any]) -> None:
    dense = nn.RMSNorm((5, 2), **options)
    layer = ee.ElasticRMSNorm.from_dense(dense, max_num_features=9)
    for twin in (layer.to_dense(), copy.deepcopy(layer).to_dense(), pickle.loads(pickle.dumps(layer)).to_dense(), ee.export(layer)):
        assert type(twin) is nn.RMSNorm
        assert repr(twin) == repr(dense)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), dense.parameters(), strict=True))
    full = ee.ElasticRMSNorm((5, 2), **options)
    full.load_state_dict(dense.state_dict())
    dense.load_state_dict(full.state_dict())


def test_a_layer_without_a_weight_follows_its_input() -> None:
    plain = ee.ElasticRMSNorm(5, elementwise_affine=False)
    for device in ("cpu", "meta", "cpu"):
        assert plain(torch.randn(6, 5, device=device)).device.type == device
