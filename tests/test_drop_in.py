"""Every elastic layer in the place of its ``nn`` class: PyTorch's own module inputs, and all that code written for ``nn`` may do to one.

The layers are found in the package; a new one joins by being exported, and with an entry in ``EXAMPLES``.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from contract import assert_as_exact, dormant_mask
from torch import Tensor, nn
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_nn import get_new_module_tests, module_tests

import esper_elastic as ee
from esper_elastic.layers import ElasticLayer

LAYERS = {value.dense_class: value for value in vars(ee).values() if isinstance(value, type) and issubclass(value, ElasticLayer)}

#: Inputs that are not run, each with its reason: (name of the nn class, description).
SKIPS: dict[tuple[str, str], str] = {
    ("Embedding", "old-Embedding_sparse"): "sparse gradients are refused: growth and the optimizers of active slices need dense ones",
}


class Case(NamedTuple):
    """One of PyTorch's inputs for a module: how to build the dense layer, and what to call it with."""

    id: str
    dense: type[nn.Module]
    build: Callable[[dict[str, Any]], nn.Module]
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None
    input: Callable[[torch.dtype], Tensor]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, unless it holds indices."""
    return x.to(dtype) if x.is_floating_point() else x


def _from_module_db(training: bool) -> Iterator[Case]:
    for info in module_db:
        if info.module_cls not in LAYERS:
            continue
        for number, example in enumerate(
            info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
        ):
            given, call = example.constructor_input, example.forward_input
            x = call.args[0] if call.args else call.kwargs["input"]
            yield Case(
                f"{info.module_cls.__name__}-{number}-{example.desc or 'plain'}",
                info.module_cls,
                lambda factory, cls=info.module_cls, given=given: cls(*given.args, **given.kwargs, **factory),
                (given.args, given.kwargs),
                lambda dtype, x=x: cast(x.detach(), dtype),
            )


def _from_module_tests() -> Iterator[Case]:
    """The older list, which has the stranger configurations; some of its entries say only how to build the dense layer."""
    names = {cls.__name__: cls for cls in LAYERS}
    for test in (*module_tests, *get_new_module_tests()):
        name = test.get("module_name") or test["fullname"].split("_")[0]
        if name not in names or ("input_size" not in test and "input_fn" not in test):
            continue
        cls, given = names[name], test.get("constructor_args")
        if test.get("desc") == "3d_no_affine_large_feature":
            test = {**test, "constructor_args": ([7, 6, 5], 1e-5, False), "input_size": (4, 7, 6, 5)}  # for time and memory
            given = test["constructor_args"]

        def build(factory: dict[str, Any], cls: Any = cls, given: Any = given, test: Any = test) -> nn.Module:
            dense = test["constructor"]() if given is None else cls(*given)
            return dense.to(**factory)

        def example(dtype: torch.dtype, test: Any = test) -> Tensor:
            return cast(test["input_fn"]() if "input_fn" in test else torch.randn(test["input_size"], dtype=torch.float64), dtype)

        label = test.get("fullname") or f"{name}_{test.get('desc', 'plain')}"
        yield Case(f"old-{label}", cls, build, None if given is None else (given, {}), example)


CASES = {case.id: case for case in (*_from_module_db(True), *_from_module_tests())}


def capacities(cls: type[nn.Module], dense: nn.Module, factor: int) -> dict[str, int]:
    """The ``max_*`` arguments of ``cls`` for ``factor`` times the sizes of ``dense``."""
    parameters = inspect.signature(cls).parameters.values()
    names = [p.name for p in parameters if p.name.startswith("max_") and p.kind is inspect.Parameter.KEYWORD_ONLY]
    sizes = {name: getattr(dense, name.removeprefix("max_"), None) for name in names}
    if isinstance(dense, nn.GroupNorm):
        sizes = {"max_num_features": dense.num_channels}
    sizes = {name: dense.normalized_shape[0] if size is None else size for name, size in sizes.items()}
    return {name: factor * size for name, size in sizes.items()}


def run(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = module(x)
    y.backward(g.to(y.dtype))
    found = {"output": y.detach()} | ({"input gradient": x.grad} if x.requires_grad else {})
    for name, parameter in module.named_parameters():
        elastic = isinstance(module, ElasticLayer)
        found[f"{name} gradient"] = active_gradient(module, name) if elastic else parameter.grad
    for name, buffer in module.named_buffers():
        found[name] = (module.active(name) if isinstance(module, ElasticLayer) else buffer).detach()
    return found


def active_gradient(layer: ElasticLayer, name: str) -> Tensor:
    parameter, axes = getattr(layer, name), layer.tensor_axes()[name]
    asleep = dormant_mask(parameter, axes)
    assert (parameter.grad[asleep] == 0).all()
    shape = [size if axis is None else axis.active for size, axis in zip(parameter.shape, axes, strict=True)]
    return parameter.grad[~asleep].view(shape)


@pytest.mark.parametrize("factor", [1, 2], ids=["full", "half asleep"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_module_inputs_of_pytorch(name: str, dtype: torch.dtype, training: bool, factor: int) -> None:
    case = CASES[name]
    reason = SKIPS.get((case.dense.__name__, name))
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    cls = LAYERS[case.dense]
    dense = case.build({"dtype": dtype}).train(training)
    x = case.input(dtype)
    extra = capacities(cls, dense, factor)
    if case.arguments is None:
        layer = cls.from_dense(dense, **extra)
    else:
        layer = cls(*case.arguments[0], **case.arguments[1], dtype=dtype, **extra).train(training)
        layer.load_state_dict({**layer.state_dict(), **dict(embedded(layer, dense))})
    with torch.no_grad():
        for key, axes in layer.tensor_axes().items():
            if getattr(layer, key) is not None and getattr(layer, key).is_floating_point():
                getattr(layer, key).masked_fill_(dormant_mask(getattr(layer, key), axes), math.nan)
    exact = copy.deepcopy(dense).double()
    try:
        g = torch.rand_like(exact(cast(x, torch.float64)))
        exact = copy.deepcopy(dense).double()
        theirs = run(dense, x, g)
    except (ValueError, RuntimeError) as error:
        with pytest.raises((ValueError, RuntimeError)) as ours:
            layer(x)
        assert str(error)[:20] in str(ours.value) or isinstance(ours.value, ee.ElasticError)
        return
    ours, truth = run(layer, x, g), run(exact, cast(x, torch.float64), g)
    assert ours.keys() == theirs.keys()
    for what, value in theirs.items():
        if value.is_floating_point():
            assert_as_exact(ours[what], value, truth[what], what)
        else:
            assert torch.equal(ours[what], value)


def embedded(layer: ElasticLayer, dense: nn.Module) -> dict[str, Tensor]:
    """The state of ``dense`` in the active slices of that of ``layer``."""
    state = {}
    for name, value in dense.state_dict().items():
        storage = layer.state_dict()[name].clone()
        axes = layer.tensor_axes().get(name)
        if axes is None:
            storage = value.clone()
        else:
            storage[~dormant_mask(storage, axes)] = value.flatten()
        state[name] = storage
    return state


def test_at_most_one_input_in_twenty_is_skipped() -> None:
    skipped = [name for name, case in CASES.items() if (case.dense.__name__, name) in SKIPS]
    assert set(SKIPS) == {(CASES[name].dense.__name__, name) for name in skipped}, "a skip that skips nothing"
    assert all(SKIPS.values())
    assert len(skipped) <= 0.05 * len(CASES)
    assert {case.dense for case in CASES.values()} == set(LAYERS), "a layer without inputs"


# The checklist


class Example(NamedTuple):
    """Constructor arguments, narrower than capacity, and the shape of an input, of numbers or of indices."""

    arguments: tuple[Any, ...]
    extra: dict[str, Any]
    shape: tuple[int, ...]
    indices: bool = False

    def input(self, **options: Any) -> Tensor:
        return torch.randint(self.arguments[0], self.shape, **options) if self.indices else torch.randn(self.shape, **options)


EXAMPLES: dict[str, Example] = {
    "ElasticLinear": Example((3, 5), {"max_in_features": 7, "max_out_features": 8}, (4, 3)),
    "ElasticConv1d": Example((3, 5, 3), {"max_in_channels": 7, "max_out_channels": 8}, (4, 3, 6)),
    "ElasticConv2d": Example((3, 5, 3), {"max_in_channels": 7, "max_out_channels": 8}, (4, 3, 6, 6)),
    "ElasticConvTranspose2d": Example((3, 5, 3), {"max_in_channels": 7, "max_out_channels": 8}, (4, 3, 6, 6)),
    "ElasticBatchNorm1d": Example((3,), {"max_num_features": 7}, (4, 3)),
    "ElasticBatchNorm2d": Example((3,), {"max_num_features": 7}, (4, 3, 6, 6)),
    "ElasticLayerNorm": Example((3,), {"max_num_features": 7}, (4, 3)),
    "ElasticGroupNorm": Example((3, 6), {"max_num_features": 14}, (4, 6, 3, 3)),
    "ElasticRMSNorm": Example((3,), {"max_num_features": 7}, (4, 3)),
    "ElasticEmbedding": Example((3, 5), {"max_num_embeddings": 7, "max_embedding_dim": 8}, (4, 2), indices=True),
}


@pytest.fixture(params=LAYERS.values(), ids=lambda cls: cls.__name__)
def cls(request: pytest.FixtureRequest) -> type[ElasticLayer]:
    return request.param


@pytest.fixture
def example(cls: type[ElasticLayer]) -> Example:
    return EXAMPLES[cls.__name__]


def build(cls: type[ElasticLayer], example: Example, **factory: Any) -> Any:
    return cls(*example.arguments, **factory, **example.extra)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; a state_dict holds the widths as well."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def test_signature_is_that_of_nn_and_keyword_only_extras(cls: type[ElasticLayer]) -> None:
    ours, theirs = (list(inspect.signature(c).parameters.values()) for c in (cls, cls.dense_class))
    head, extras = ours[: len(theirs)], [p for p in ours[len(theirs) :] if p.name != "bias"]  # which torch 2.11's norms have not
    assert [(p.name, p.kind, p.default) for p in head] == [(p.name, p.kind, p.default) for p in theirs]
    assert extras
    for parameter in extras:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is None
        assert parameter.name.startswith("max_") or parameter.name.endswith("dim")


def test_is_a_leaf_module_of_its_class(cls: type[ElasticLayer], example: Example) -> None:
    layer = build(cls, example)
    assert isinstance(layer, cls.dense_class)
    assert list(layer.children()) == []
    dense = cls.dense_class(*example.arguments)
    assert list(cls(*example.arguments).state_dict()) == list(dense.state_dict())
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert [name for name, _ in layer.named_buffers()] == [name for name, _ in dense.named_buffers()]
    public = {name for name in vars(dense) if not name.startswith("_")}
    assert all(getattr(layer, name) == getattr(dense, name) for name in public)


def test_repr_shows_sizes_and_capacities(cls: type[ElasticLayer], example: Example) -> None:
    text = repr(build(cls, example))
    dense = repr(cls.dense_class(*example.arguments))
    if "bias=" not in dense:  # of norms, in torch 2.11
        text = text.replace("bias=True, ", "")
    assert text.startswith(dense.replace(cls.dense_class.__name__, cls.__name__, 1)[:-1])
    for name, value in example.extra.items():
        assert f"{name}={value}" in text


def test_same_seed_gives_the_same_weights_and_leaves_the_same_state(cls: type[ElasticLayer], example: Example) -> None:
    torch.manual_seed(3)
    dense = cls.dense_class(*example.arguments)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    layer = build(cls, example)
    assert torch.equal(torch.get_rng_state(), after)
    for name in dense.state_dict():
        assert torch.equal(layer.active(name), dense.state_dict()[name])
    assert all(tensor.isfinite().all() for tensor in tensors(layer).values())
    torch.manual_seed(3)
    again = tensors(build(cls, example))
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors(layer).items())


def test_reset_parameters_draws_what_nn_draws(cls: type[ElasticLayer], example: Example) -> None:
    layer, dense = build(cls, example), cls.dense_class(*example.arguments)
    for module in (dense, layer):
        torch.manual_seed(5)
        module.reset_parameters()
        after = torch.get_rng_state()
    for name in dense.state_dict():
        assert torch.equal(layer.active(name), dense.state_dict()[name])
    torch.manual_seed(5)
    dense.reset_parameters()
    assert torch.equal(torch.get_rng_state(), after)


def test_from_dense_and_to_dense_are_inverse(cls: type[ElasticLayer], example: Example) -> None:
    dense = cls.dense_class(*example.arguments).eval()
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    state = torch.get_rng_state()
    layer = cls.from_dense(dense, **example.extra)
    back = layer.to_dense()
    assert torch.equal(torch.get_rng_state(), state), "a random number was drawn"
    assert type(back) is cls.dense_class
    assert repr(back) == repr(dense)
    assert not back.training
    assert not layer.training
    assert all(not p.requires_grad for p in (*back.parameters(), *layer.parameters()))
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
        assert back.state_dict()[name].untyped_storage().nbytes() == value.untyped_storage().nbytes()
    x = example.input()
    assert torch.equal(back(x), dense(x))
    with pytest.raises(ee.LayoutError, match=rf"{cls.__name__}.from_dense: expected a plain nn.{cls.dense_class.__name__}, got Flatten"):
        cls.from_dense(nn.Flatten())
    with pytest.raises(ee.LayoutError, match=rf"got {cls.__name__}"):
        cls.from_dense(layer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(cls: type[ElasticLayer], example: Example, how: str) -> None:
    layer = build(cls, example).eval()
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = example.input()
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(twin(x), layer(x))
    out = layer._widths.axes[0]
    out.dims[0].resize(out.dims[0].capacity)
    assert twin._widths.axes[0].active == example.arguments[1 if len(example.arguments) > 1 else 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_casts(cls: type[ElasticLayer], example: Example, dtype: torch.dtype) -> None:
    layer = build(cls, example).eval()
    dense = layer.to_dense()
    x = example.input()
    for convert in (lambda m: m.to(dtype), lambda m: m.type(dtype)):
        ours, theirs = convert(copy.deepcopy(layer)), convert(copy.deepcopy(dense))
        assert_as_exact(
            ours(cast(x, dtype)), theirs(cast(x, dtype)), copy.deepcopy(theirs).double()(cast(cast(x, dtype), torch.float64)), str(dtype)
        )
        assert {k: v.dtype for k, v in tensors(ours).items()} == {k: v.dtype for k, v in tensors(theirs).items()}


def test_meta_device_and_back(cls: type[ElasticLayer], example: Example) -> None:
    layer = build(cls, example, device="meta")
    assert all(tensor.is_meta for tensor in tensors(layer).values())
    assert layer(example.input(device="meta")).shape == cls.dense_class(*example.arguments)(example.input()).shape
    layer = layer.to_empty(device="cpu")
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    dense = cls.dense_class(*example.arguments)
    x = example.input()
    assert_as_exact(layer(x), dense(x), copy.deepcopy(dense).double()(cast(x, torch.float64)))
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in tensors(build(cls, example)).values())


def test_skip_init(cls: type[ElasticLayer], example: Example) -> None:
    layer = torch.nn.utils.skip_init(cls, *example.arguments, **example.extra)
    assert all(tensor.device.type == "cpu" for tensor in tensors(layer).values())
    layer.reset_parameters()
    assert layer(example.input()).isfinite().all()


def test_functional_call(cls: type[ElasticLayer], example: Example) -> None:
    layer, other = build(cls, example).eval(), build(cls, example).eval()
    x = example.input()
    expected = other(x)
    assert torch.equal(torch.func.functional_call(layer, tensors(other), x), expected)


def test_plain_state_dict_goes_in(cls: type[ElasticLayer], example: Example) -> None:
    layer, dense = build(cls, example).eval(), cls.dense_class(*example.arguments).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.uniform_(-1, 1)
    layer.load_state_dict(dense.state_dict())
    x = example.input()
    assert_as_exact(layer(x), dense(x), copy.deepcopy(dense).double()(cast(x, torch.float64)))


def test_parameters_keep_identity_through_resizing(cls: type[ElasticLayer], example: Example) -> None:
    layer = build(cls, example)
    before = {name: (id(p), p.shape, p.data_ptr()) for name, p in layer.named_parameters()}
    for width in (1, 7, 3):
        for axis in layer._widths.axes:
            axis.dims[0].resize(width)
    layer.layout = "static"
    assert {name: (id(p), p.shape, p.data_ptr()) for name, p in layer.named_parameters()} == before
