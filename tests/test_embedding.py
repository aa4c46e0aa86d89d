"""``ElasticEmbedding``: the contract, and what only this layer promises."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contract import (
    AXES,
    LAYOUTS,
    MANY,
    NARROW,
    AxisCase,
    Contract,
    active_indices,
    active_part,
    dormant_bits,
    needs_kernels,
    needs_library,
    poison,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import esper_elastic as ee
from esper_elastic.control import Axis, Switch

BACKENDS = ["reference", pytest.param("native", marks=needs_library), pytest.param("triton", marks=needs_kernels)]


class TestEmbedding(Contract):
    """Axes are those of the vectors and of the indices, which are no concatenation."""

    differentiable = False
    kernels = "all"

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return ((case, AXES[(place + 2) % 4]) for place, case in enumerate(AXES))

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (NARROW, NARROW)
        yield (MANY, AXES[3])

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ee.ElasticEmbedding(in_dim.active, out_dim.active, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Embedding(sizes[1], sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        return torch.arange(18).remainder(size).view(6, 3)

    # What asks for gradients of the input, or for inputs of several widths

    test_input_of_another_width_is_refused: Any = None
    test_hooks_see_what_those_of_the_dense_twin_see: Any = None

    def test_forward_mode_equals_the_dense_twin(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        dense = self.twin(layer, torch.float32)
        x, _ = self.inputs(layer)
        axes, weight = layer.tensor_axes()["weight"], layer.weight.detach()
        tangent = torch.rand_like(weight)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, tangent)
            got = forward_ad.unpack_dual(torch.func.functional_call(layer, {"weight": dual}, x)).tangent
            dual = forward_ad.make_dual(dense.weight.detach(), active_part(tangent, axes))
            expected = forward_ad.unpack_dual(torch.func.functional_call(dense, {"weight": dual}, x)).tangent
            torch.testing.assert_close(self.part(layer, got, self.axis_out(layer)), expected)

    def test_torch_func_equals_the_dense_twin(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout, torch.float64)
        dense = self.twin(layer, torch.float64)
        x, _ = self.inputs(layer)
        batch = torch.stack([x, x.flip(0)])
        inside = active_indices(self.axis_out(layer)) if layout == "static" else slice(None)

        def gradients(module: nn.Module, columns: Any) -> Tensor:
            def loss(weight: Tensor, x: Tensor) -> Tensor:
                return torch.func.functional_call(module, {"weight": weight}, x)[..., columns].square().sum()

            return torch.func.vmap(torch.func.grad(loss), (None, 0))(module.weight.detach(), batch)

        for ours, theirs in zip(gradients(layer, inside), gradients(dense, slice(None)), strict=True):
            torch.testing.assert_close(active_part(ours, layer.tensor_axes()["weight"]), theirs)


class TestEmbeddingWithPadding(TestEmbedding):
    """The first vector is not trained, and gradients are divided by counts."""

    settings = {"padding_idx": 0, "scale_grad_by_freq": True}  # noqa: RUF012

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return super().make(*axes, **self.settings, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return super().dense(*sizes, **self.settings, **factory)

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        return cls.narrow_cases()

    # PyTorch's own second derivative leaves the counts out, and its vmap has no rule for them
    test_gradcheck: Any = None
    test_torch_func_equals_the_dense_twin: Any = None
    test_compiles_once_for_all_widths: Any = None


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and request.node.callspec.params.get("layout") == "compact":
        pytest.skip("Triton serves static layout")
    return request.param


def build(layout: str, backend: str, *axes: AxisCase, **settings: Any) -> ee.ElasticEmbedding:
    """A layer of 5 of 9 vectors, or as ``axes`` say of its vectors, dormant memory full of NaN."""
    torch.manual_seed(0)
    (rows, (dim,)), (columns, dims) = NARROW.axis(), (axes[0] if axes else NARROW).axis()
    layer = ee.ElasticEmbedding(9, columns.active, in_dim=rows, out_dim=columns, **settings)
    dim.resize(5)
    for each, (active, _) in zip(dims, (axes[0] if axes else NARROW).sizes, strict=True):
        each.resize(active)
    layer.layout = layout
    layer._widths.backend = backend
    poison(layer)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", [5, 8, 9, -1])
def test_the_index_of_a_vector_that_is_not_active_raises(index: int, layout: str, backend: str) -> None:
    layer = build(layout, backend)
    with pytest.raises(IndexError, match="out of range"):
        layer(torch.tensor([0, index]))
    layer.in_dim.resize(9)
    if index in (5, 8):
        layer(torch.tensor([index]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_have_the_types_that_nn_takes(layout: str, backend: str) -> None:
    layer = build(layout, backend)
    assert torch.equal(layer(torch.tensor([1, 4], dtype=torch.int32)), layer(torch.tensor([1, 4])))
    with pytest.raises(RuntimeError, match="expected tensor for argument #1 'indices'|Long, Int"):
        layer(torch.tensor([1.0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 1)], ids=str)
def test_any_shape_of_indices(shape: tuple[int, ...], layout: str, backend: str) -> None:
    layer = build(layout, backend)
    dense = layer.to_dense()
    x = torch.randint(5, shape)
    y, expected = layer(x), dense(x)
    assert torch.equal(y[..., :5], expected)
    assert y.shape == (*shape, layer.embedding_dim)
    y[..., :5].sum().backward()
    expected.sum().backward()
    assert torch.equal(layer.weight.grad[:5, :5], dense.weight.grad)


@pytest.mark.parametrize("norm_type", [2.0, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [NARROW, MANY], ids=["one run", "several"])
def test_max_norm_shortens_the_active_part_of_what_is_looked_up(axis: AxisCase, layout: str, norm_type: float, backend: str) -> None:
    layer = build(layout, backend, axis, max_norm=0.7, norm_type=norm_type)
    dense = layer.to_dense()
    assert (dense.max_norm, dense.norm_type) == (0.7, norm_type)
    asleep, version = dormant_bits(layer), layer.weight._version
    x = torch.tensor([[0, 3], [3, 1]])
    for _ in range(2):
        y, expected = layer(x), dense(x)
        inside = active_indices(layer.out_dim) if layout == "static" else slice(None)
        torch.testing.assert_close(y[..., inside], expected)
        torch.testing.assert_close(layer.active("weight"), dense.weight)
        assert torch.equal(layer.active("weight")[[2, 4]], dense.weight[[2, 4]])
    assert layer.weight._version > version
    assert all(torch.equal(bits, dormant_bits(layer)[name]) for name, bits in asleep.items())
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(active_part(layer.weight.grad, layer.tensor_axes()["weight"]), dense.weight.grad)


@needs_library
def test_max_norm_compiles_once_for_all_widths() -> None:
    layer = build("static", "native", max_norm=0.5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.tensor([0, 3])
    for width in (5, 4, 2):
        layer.out_dim.resize(width)
        with torch.no_grad():
            layer.weight[:5, :width] += 1
        dense = layer.to_dense()
        torch.testing.assert_close(compiled(x)[:, :width], dense(x))
        torch.testing.assert_close(layer.active("weight"), dense.weight)
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [{}, {"max_norm": 0.1}], ids=str)
def test_a_switch_that_is_off_silences_a_static_layer(settings: dict[str, Any], backend: str) -> None:
    layer = build("static", "reference", **settings)
    switch = Switch()
    layer.govern(switch)
    layer._widths.backend = backend
    switch.set(False)
    before = layer.weight.detach().clone()
    y = layer(torch.tensor([0, 4]))
    assert y.shape == (2, 9)
    assert (y == 0).all()
    if y.requires_grad:
        y.sum().backward()
        assert (layer.weight.grad == 0).all()
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_reports_the_sizes_of_its_layout() -> None:
    layer = ee.ElasticEmbedding(3, 5, max_num_embeddings=7, max_embedding_dim=8)
    assert (layer.num_embeddings, layer.embedding_dim, layer.weight.shape) == (3, 5, (7, 8))
    assert ee.dims(layer)[""] is layer.out_dim
    layer.layout = "static"
    assert (layer.num_embeddings, layer.embedding_dim) == (7, 8)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ee.ElasticEmbedding(3, 5, sparse=True), ee.LayoutError, r"sparse: expected False, got True: .* Leave sparse out"),
        (lambda: ee.ElasticEmbedding.from_dense(nn.Embedding(3, 5, sparse=True)), ee.LayoutError, r"sparse: expected False"),
        (
            lambda: ee.ElasticEmbedding(4, 5, in_dim=ee.concat(ee.ElasticDim(1), ee.ElasticDim(3))),
            ee.CapacityError,
            r"in_dim: expected one dim or a multiple of one, got DerivedAxis.* Use an embedding for each",
        ),
        (lambda: ee.ElasticEmbedding(4, 5, in_dim=ee.ElasticDim(3)), ee.CapacityError, r"num_embeddings: expected 3, .* got 4"),
        (lambda: ee.ElasticEmbedding(4, 5, max_embedding_dim=3), ee.CapacityError, r"capacity is 3"),
        (lambda: ee.ElasticEmbedding(4, 5, padding_idx=4, max_num_embeddings=9), AssertionError, r"within num_embeddings"),
    ],
)
def test_refuses(make: Callable[[], nn.Module], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_is_made_of_given_vectors() -> None:
    vectors = torch.randn(3, 5)
    layer = ee.ElasticEmbedding.from_pretrained(vectors, padding_idx=1)
    assert isinstance(layer, ee.ElasticEmbedding)
    assert torch.equal(layer.weight, vectors)
    assert not layer.weight.requires_grad
    assert layer.padding_idx == 1


@pytest.mark.parametrize("options", [{}, {"padding_idx": -2}, {"max_norm": 1.0, "norm_type": 1.0, "scale_grad_by_freq": True}], ids=str)
def test_dense_twins_and_copies(options: dict[str, Any]) -> None:
    dense = nn.Embedding(5, 3, **options)
    layer = ee.ElasticEmbedding.from_dense(dense, max_num_embeddings=9, max_embedding_dim=4)
    for twin in (layer.to_dense(), copy.deepcopy(layer).to_dense(), pickle.loads(pickle.dumps(layer)).to_dense(), ee.export(layer)):
        assert type(twin) is nn.Embedding
        assert repr(twin) == repr(dense)
        assert torch.equal(twin.weight, dense.weight)
    assert layer.weight[:, 3:].ne(0).any()
    full = ee.ElasticEmbedding(5, 3, **options)
    full.load_state_dict(dense.state_dict())
    dense.load_state_dict(full.state_dict())
    layer.load_state_dict(nn.Embedding(7, 2).state_dict())
    assert (layer.num_embeddings, layer.embedding_dim) == (7, 2)


# Padding


def test_the_padding_vector_is_zero_at_every_width() -> None:
    layer = ee.ElasticEmbedding(4, 3, padding_idx=2, max_num_embeddings=8, max_embedding_dim=7)
    assert (layer.weight[2] == 0).all()
    layer.out_dim.grow(5)
    assert (layer.weight[2] == 0).all()
    assert layer.weight[[0, 1, 3], 3:5].ne(0).all()
    layer.in_dim.grow(8)
    assert layer.weight[4:].ne(0).all()
    layer(torch.arange(8)).sum().backward()
    assert (layer.weight.grad[2] == 0).all()
    assert layer.weight.grad[:2, :5].ne(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_follows_the_vectors_that_are_kept(layout: str, backend: str) -> None:
    layer = build(layout, backend, padding_idx=3)
    padded = layer.weight[3].detach().clone()

    def trained() -> list[int]:
        layer.weight.grad = None
        layer(torch.arange(layer.in_dim.active)).sum().backward()
        return layer.weight.grad.nan_to_num().ne(0).any(1).nonzero().flatten().tolist()

    assert trained() == [0, 1, 2, 4]
    layer.in_dim.keep([0, 3, 4])
    assert layer.padding_idx == 1
    torch.testing.assert_close(layer.weight[1].detach(), padded, rtol=0, atol=0, equal_nan=True)
    assert trained() == [0, 2]
    layer.in_dim.keep([0, 2])  # the padding vector goes to sleep
    assert trained() == [0, 1]
    assert layer.to_dense().padding_idx is None
    layer.in_dim.resize(3)
    assert layer.padding_idx == 2
    assert trained() == [0, 1]


# A weight shared with the classifier


class Tied(nn.Module):
    """Words to vectors, a linear map of those, and back to words with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = ee.ElasticEmbedding(5, 4, max_num_embeddings=8, max_embedding_dim=7, dtype=torch.float64)
        vocabulary, units = self.words.in_dim, self.words.out_dim
        self.body = ee.ElasticLinear(4, 4, in_dim=units, out_dim=units, dtype=torch.float64)
        self.head = ee.ElasticLinear(4, 5, bias=False, in_dim=units, out_dim=vocabulary, dtype=torch.float64)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        return self.head(h + self.body(h))


def tied() -> Tied:
    torch.manual_seed(0)
    model = Tied()
    poison(model.words)
    poison(model.body)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_weight_trains_as_a_tied_dense_one_does(layout: str) -> None:
    model = tied()
    assert list(dict(model.named_parameters())) == ["words.weight", "body.weight", "body.bias"]
    dense = ee.export(model)
    assert dense.head.weight is dense.words.weight
    ee.set_layout(model, layout)
    asleep = dormant_bits(model.words)
    x = torch.tensor([[0, 4, 2], [1, 4, 0]])
    for module, optimizer in ((model, ee.optim.AdamW), (dense, torch.optim.AdamW)):
        step = optimizer(module.parameters(), lr=0.1)
        for _ in range(3):
            step.zero_grad()
            y = module(x)
            y[..., :5].square().sum().backward()
            step.step()
    torch.testing.assert_close(model.words.active("weight"), dense.words.weight)
    assert torch.equal(dormant_bits(model.words)["weight"], asleep["weight"])
    assert list(ee.dims(model)) == ["words", "head"]


def test_growth_of_a_tied_weight_keeps_the_function() -> None:
    model = tied()
    optimizer = ee.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.tensor([0, 4, 2])
    model(x).sum().backward()
    optimizer.step()
    before = model(x)
    units = model.words.out_dim
    with pytest.raises(ee.CapacityError, match="is tied"):
        units.grow(6, init="split")
    units.grow(6)
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-13)
    assert model.words.weight[:5, 4:6].eq(0).all()
    model.words.in_dim.grow(7)
    torch.testing.assert_close(model(x)[:, :5], before, rtol=1e-13, atol=1e-13)
    assert model.head.out_features == 7
    assert model.words.weight[5:7, :6].isfinite().all()
    model(x).sum().backward()
    optimizer.step()
    assert model(torch.arange(7)).isfinite().all()


def test_pruning_of_a_tied_weight_moves_it_once() -> None:
    model = tied()
    optimizer = ee.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.tensor([0, 4, 2])
    model(x).sum().backward()
    optimizer.step()
    before = model(x)
    momentum = optimizer.state[model.words.weight]["exp_avg"][[0, 2, 4]].clone()
    model.words.in_dim.keep([0, 2, 4])
    torch.testing.assert_close(model(torch.tensor([0, 2, 1])), before[:, [0, 2, 4]])
    assert torch.equal(optimizer.state[model.words.weight]["exp_avg"][:3], momentum)
    rows = model.words.weight[:3, [0, 3]].detach().clone()
    model.words.out_dim.keep([0, 3])
    assert torch.equal(model.words.weight[:3, :2], rows)


def test_newborn_vectors_follow_the_normal_law() -> None:
    layer = ee.ElasticEmbedding(1, 1, max_num_embeddings=400, max_embedding_dim=50)
    layer.in_dim.grow(400)
    layer.out_dim.grow(50)
    born = layer.weight[1:, 1:].detach()
    assert abs(born.mean()) < 0.05
    assert abs(born.std() - 1) < 0.05
    assert born.abs().max() > math.sqrt(3)
