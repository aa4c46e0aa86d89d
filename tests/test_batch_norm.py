"""``ElasticBatchNorm1d`` and ``ElasticBatchNorm2d``: the contract, and what only they promise."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from contract import LAYOUTS, MANY, NARROW, Contract, active_part, norm, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis, Switch
from esper_elastic.layers.base import ElasticLayer
from esper_elastic.ops import backend as backends

MAKERS = {
    "1d": (ee.ElasticBatchNorm1d, (6,), ()),
    "1d-length": (ee.ElasticBatchNorm1d, (6,), (4,)),
    "2d": (ee.ElasticBatchNorm2d, (3,), (2, 3)),
}


class TestBatchNorm1d(Contract):
    num_axes = 1
    kernels = "all"
    entering = leaving = 0
    unit = 1

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticBatchNorm1d(axes[0].active, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.BatchNorm1d(sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(7, size, dtype=torch.float64) + 0.25


class TestBatchNorm2d(TestBatchNorm1d):
    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return ee.ElasticBatchNorm2d(axes[0].active, momentum=None, dim=axes[0], **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.BatchNorm2d(sizes[0], momentum=None, **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(3, size, 2, 3, dtype=torch.float64) + 0.25


def build(kind: str, layout: str = "compact", case: Any = NARROW, **options: Any) -> tuple[ElasticLayer, nn.Module]:
    """A layer at the widths of ``case``, poisoned, and the ``nn`` layer of its active slice."""
    axis, dims = case.axis()
    layer = MAKERS[kind][0](axis.active, dim=axis, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.25, 1.25)
    for dim, (active, _) in zip(dims, case.sizes, strict=True):
        dim.resize(active)
    layer.layout = layout
    poison(layer)
    return layer, layer.to_dense()


def inputs(kind: str, layer: ElasticLayer, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """An input of the layer's layout, and its active part."""
    _, batch, rest = MAKERS[kind]
    axis = layer.dim
    x = torch.randn(*batch, axis.capacity, *rest, dtype=dtype)
    part = active_part(x, (None, axis))
    return (x if layer.layout == "static" else part.clone()), part


@pytest.mark.parametrize("case", [NARROW, MANY], ids=["one", "many"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.3, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track", [True, False], ids=["tracking", "not-tracking"])
@pytest.mark.parametrize("kind", MAKERS)
def test_follows_nn_through_training_and_evaluation(
    kind: str, track: bool, affine: bool, momentum: float | None, layout: str, case: Any
) -> None:
    torch.manual_seed(0)
    layer, dense = build(kind, layout, case, affine=affine, track_running_stats=track, momentum=momentum, dtype=torch.float64)
    for training in (True, True, False, True):
        layer.train(training)
        dense.train(training)
        x, part = inputs(kind, layer, torch.float64)
        got, expected = layer(x), dense(part)
        torch.testing.assert_close(active_part(got, (None, layer.dim)) if layout == "static" else got, expected)
        for name, buffer in dense.named_buffers():
            torch.testing.assert_close(active_part(getattr(layer, name), layer.tensor_axes()[name]), buffer)
    if track:
        assert layer.num_batches_tracked == 3
        assert layer.running_mean.isnan().sum() == layer.dim.capacity - layer.dim.active


@pytest.mark.parametrize("kind", MAKERS)
def test_a_switch_that_is_off_freezes_a_static_layer(kind: str) -> None:
    layer, _ = build(kind, "static")
    switch = Switch()
    layer.govern(switch)
    x, _ = inputs(kind, layer)
    layer(x)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    switch.set(False)
    x.requires_grad_()
    for training in (True, False):
        y = layer.train(training)(x)
        assert (y == 0).all()
        y.sum().backward()
        assert (x.grad == 0).all()
        assert (layer.weight.grad == 0).all()
    after = layer.state_dict()
    assert all(torch.equal(before[name].view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)) for name in before)
    switch.set(True)
    layer.train()(x)
    assert layer.num_batches_tracked == 2


def test_training_says_that_it_writes_the_statistics() -> None:
    layer, _ = build("1d")
    x, _ = inputs("1d", layer)
    buffers = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        before = [buffer._version for buffer in buffers]
        with mode:
            layer(x)
        assert all(buffer._version > version for buffer, version in zip(buffers, before, strict=True))
    before = [buffer._version for buffer in buffers]
    layer.eval()(x)
    assert [buffer._version for buffer in buffers] == before


def test_training_between_an_evaluation_and_its_backward_is_harmless() -> None:
    layer, dense = build("1d")
    x, part = inputs("1d", layer)
    x.requires_grad_()
    part.requires_grad_()
    y = layer.eval()(x)
    layer.train()(x.detach() * 3)
    y.square().sum().backward()
    dense.eval()(part).square().sum().backward()
    torch.testing.assert_close(x.grad, part.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_keeps_channels_last(training: bool, layout: str) -> None:
    layer, _ = build("2d", layout)
    layer.train(training)
    x = inputs("2d", layer)[0].to(memory_format=torch.channels_last).requires_grad_()
    plain = copy.deepcopy(layer)(x.detach().contiguous())
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("1d", "static", {}),
        ("1d-length", "compact", {"track_running_stats": False}),
        ("2d", "static", {"affine": False, "momentum": None}),
    ],
    ids=str,
)
def test_ops_pass_opcheck(kind: str, layout: str, options: dict[str, Any]) -> None:
    if backends.LIBRARY_MISSING is not None:
        pytest.skip(f"no compiled library: {backends.LIBRARY_MISSING}")
    layer, _ = build(kind, layout, **options)
    w = layer._widths
    x = inputs(kind, layer)[0].requires_grad_()
    parameters = [None if t is None else t.detach().nan_to_num(0.5).requires_grad_() for t in (layer.weight, layer.bias)]
    mean, var, batches = (
        None if t is None else t.nan_to_num(0.5) for t in (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    )
    ops = torch.ops.esper_elastic
    compact, momentum = layout == "compact", None if batches is not None and layer.momentum is None else 0.1
    torch.library.opcheck(ops.batch_norm, (x, *parameters, mean, var, batches, w.control, w.slots, compact, momentum, 1e-5))
    if mean is not None:
        torch.library.opcheck(ops.batch_norm_eval, (x, *parameters, mean, var, w.control, w.slots, compact, 1e-5))
    width = w.size(0)
    saved = torch.rand(width), torch.rand(width) + 0.5
    operands = [None if t is None else t.detach() for t in parameters]
    for mask in ([True, layer.affine, layer.affine], [False, layer.affine, False], [True, False, False]):
        args = (torch.rand_like(x), x.detach(), *operands, *saved, w.control, w.slots, compact, True, 1e-5, mask)
        torch.library.opcheck(ops.batch_norm_backward, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_compiled_statistics_equal_eager_ones_at_all_widths(momentum: float | None, backend: str) -> None:
    if backends.LIBRARY_MISSING is not None:
        pytest.skip(f"no compiled library: {backends.LIBRARY_MISSING}")
    if backend == "inductor" and momentum is None:
        pytest.skip("one run of inductor is enough")
    layer = ee.ElasticBatchNorm2d(9, momentum=momentum)
    layer.layout = "static"
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for width in (9, 4, 1, 7):
        layer.dim.resize(width)
        twin.dim.resize(width)
        x = torch.randn(3, 9, 2, 2)
        torch.testing.assert_close(compiled(x), twin(x))
        torch.testing.assert_close(layer.running_mean, twin.running_mean)
        torch.testing.assert_close(layer.running_var, twin.running_var)
        compiled(x).sum().backward()
        twin(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    assert layer.num_batches_tracked == 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_vmap_in_training_is_refused_as_nn_refuses_it() -> None:
    layer, dense = build("1d")
    x, part = inputs("1d", layer)
    for module, batch in ((dense, part), (layer, x)):
        with pytest.raises((RuntimeError, ValueError), match="running_mean or running_var"):
            torch.func.vmap(module)(torch.stack([batch, batch]))


@pytest.mark.parametrize("kind", MAKERS)
def test_refuses_what_nn_refuses(kind: str) -> None:
    layer, dense = build(kind)
    bad = torch.randn(2, 5, 3, 3) if kind.startswith("1d") else torch.randn(2, 5)
    for module in (layer, dense):
        with pytest.raises(ValueError, match="expected"):
            module(bad)
    single = torch.randn(1, 5) if kind.startswith("1d") else torch.randn(1, 5, 1, 1)
    for module in (layer, dense):
        with pytest.raises(ValueError, match=r"more than (1|one) value per"):
            module(single)
    layer.eps = -1.0
    with pytest.raises(ValueError, match="eps"):
        layer(inputs(kind, layer)[0])


def test_flatten_after_convolution_shares_the_channels_dim() -> None:
    dim = ee.ElasticDim(4, 6)
    layer = ee.ElasticBatchNorm1d(4 * 9, dim=dim * 9)
    dim.resize(2)
    assert layer.num_features == 18
    x = torch.randn(5, 2, 3, 3).flatten(1)
    torch.testing.assert_close(layer(x), nn.functional.batch_norm(x, None, None, training=True))


def test_reset_running_stats_leaves_what_sleeps() -> None:
    layer, _ = build("1d", case=MANY)
    layer.num_batches_tracked.fill_(3)
    layer.reset_running_stats()
    assert (layer.active("running_mean") == 0).all()
    assert (layer.active("running_var") == 1).all()
    assert layer.running_mean.isnan().sum() == layer.dim.capacity - layer.dim.active
    assert layer.num_batches_tracked == 0


def test_dormant_units_start_as_newborn_ones() -> None:
    layer = ee.ElasticBatchNorm2d(3, max_num_features=8)
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        assert (getattr(layer, name) == value).all()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_dense_twins_and_copies(options: dict[str, Any]) -> None:
    dense = norm(nn.BatchNorm2d, 5, 1e-3, None, **options).eval()
    dense.num_batches_tracked = None if dense.num_batches_tracked is None else dense.num_batches_tracked.fill_(4)
    layer = ee.ElasticBatchNorm2d.from_dense(dense, max_num_features=9)
    assert isinstance(layer, nn.BatchNorm2d)
    assert not layer.training
    assert layer.num_batches_tracked is None or layer.num_batches_tracked is not dense.num_batches_tracked
    for twin in (layer.to_dense(), copy.deepcopy(layer).to_dense(), pickle.loads(pickle.dumps(layer)).to_dense()):
        assert type(twin) is nn.BatchNorm2d
        assert repr(twin) == repr(dense)
        assert list(twin.state_dict()) == list(dense.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), dense.state_dict().values(), strict=True))
    full = ee.ElasticBatchNorm2d(5, **options)
    full.load_state_dict(dense.state_dict())
    dense.load_state_dict(full.state_dict())


def test_casts_devices_and_deferred_initialisation() -> None:
    layer = ee.ElasticBatchNorm1d(5, max_num_features=9)
    x = torch.randn(6, 5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.BatchNorm1d(5)(x).dtype
    assert layer.half()(x.half()).dtype == torch.half
    assert layer.num_batches_tracked.dtype == torch.long
    meta = ee.ElasticBatchNorm1d(5, max_num_features=9, device="meta")
    y = meta(torch.randn(6, 5, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.shape == (6, 5)
    assert y.is_meta
    skipped = nn.utils.skip_init(ee.ElasticBatchNorm1d, 5, max_num_features=9)
    skipped.reset_parameters()
    torch.testing.assert_close(skipped(x), ee.ElasticBatchNorm1d(5)(x))


def test_a_layer_without_tensors_follows_its_input() -> None:
    layer = ee.ElasticBatchNorm1d(5, affine=False, track_running_stats=False, max_num_features=9)
    layer.reset_parameters()
    for device in ("cpu", "meta", "cpu"):
        assert layer(torch.randn(6, 5, device=device)).device.type == device
    layer.dim.resize(7)
    with pytest.raises(ee.LayoutError, match=r"expected 7 .*got 5"):
        layer(torch.randn(6, 5))


def test_functional_call_moves_the_statistics_that_it_is_given() -> None:
    layer, dense = build("1d", case=MANY)
    x, part = inputs("1d", layer)
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    torch.func.functional_call(layer, state, x)
    dense(part)
    torch.testing.assert_close(active_part(state["running_var"], (layer.dim,)), dense.running_var)
    assert state["num_batches_tracked"] == 1
    assert layer.num_batches_tracked == 0
    assert not math.isnan(state["running_mean"][0])
