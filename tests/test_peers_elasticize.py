"""Our dims beside the groups of Torch-Pruning: the same channels pruned give the same coupled channels and the same outputs.

A dim is pruned twice: with ``keep`` and ``export``, and by Torch-Pruning from the first layer that makes the dim's units. What it does not
handle is listed with what it says, and checked to be so; none of that counts as agreement.
"""

import copy
import fnmatch
import re
from typing import NamedTuple

import pytest
import torch
from converting import assert_close, built, elastic_layers, inputs_of
from peers import EndlessError, pruned_by_torch_pruning, time_limit
from torch import Tensor, nn
from zoo import MODELS, Case, Inputs, call

import esper_elastic as ee
from esper_elastic.control import Axis

pytestmark = pytest.mark.wide

#: Enough for every group of the zoo's models a hundred times over.
SECONDS = 5.0

#: Of each architecture, the dims that Torch-Pruning does not handle, and what it says: its own error where it forms the group, or that of
#: the model that it has pruned when that is run.
UNHANDLED: dict[str, dict[str, str]] = {
    "inception": {"AuxLogits.*": "is not in the dependency graph"},  # evaluation does not run it
    "shufflenet_v2": {"*": "ZeroDivisionError"},  # channel shuffle
    "convnext": {"downsample_layers.*": "same shape as normalized_shape"},  # a norm with code of its own keeps the shape
    "vit": {"cls_token": "shape .* is invalid"},  # embedding and heads are one size in `reshape(B, N, C)`
    "vit_fused": {"cls_token": "shape .* is invalid"},
    "vit_multihead": {"class_token": "shape .* is invalid"},
    "vit_encoder_layer": {"class_token": "shape .* is invalid"},
    "swin": {"patch_embed.proj": "shape .* is invalid", "layers.2.reduction": "shape .* is invalid"},
    "mixer": {"stem.proj": "shapes cannot be multiplied"},  # it prunes tokens along with channels
    "lstm": {"*": "TypeError: unsupported operand"},
    "graph_attention": {"*": "would leave no unit"},
    "encoder": {"word_embeddings": "shape .* is invalid"},
    "gpt2": {"transformer.wte": "shapes cannot be multiplied", "*": r"Module Conv1D.* is not in the dependency graph"},
    "gpt2_eager": {"transformer.wte": "shapes cannot be multiplied", "*": r"Module Conv1D.* is not in the dependency graph"},
    "llama": {"*.q_proj": "does not come to an end"},
    "llama_eager": {"*.q_proj": "does not come to an end"},
    "t5": {"*.SelfAttention.q": "would leave no unit", "*.EncDecAttention.q": "must match the size"},
    "clip": {"visual_projection": "would leave no unit"},
}
NONE_HANDLED = ("shufflenet_v2", "lstm", "graph_attention", "gpt2", "gpt2_eager")

#: Left to the slow test, since another architecture is as good.
ALIKE = ("resnet_bottleneck", "vgg", "convnext_sequential", "vit_fused", "vit_encoder_layer", "gpt2_eager", "llama_eager")

#: Dims whose groups differ. A test below says for each of these models who is right.
DIFFERENT = (
    ("inception", "factorised.branch1x1.conv"),
    ("inception", "factorised.branch7x7_3.conv"),
    ("inception", "factorised.branch_pool.conv"),
    ("t5", "shared"),
)

Group = dict[tuple[str, str], set[int]]


class Pair(NamedTuple):
    """One model, plain and converted."""

    case: Case
    inputs: Inputs
    plain: nn.Module
    elastic: nn.Module


def pair_of(name: str) -> Pair:
    case = MODELS[name]
    plain, inputs = built(case).eval(), inputs_of(case)
    return Pair(case, inputs, plain, ee.elasticize(copy.deepcopy(plain), inputs))


def chosen_units(dim: ee.ElasticDim) -> list[int]:
    """What to prune of a dim: two of its steps, one in the first half and the last one; one step of a narrow dim, if that may go."""
    step = dim.multiple_of
    count = dim.active // step
    steps = [count // 3, count - 1] if count > 2 else [count - 1]
    while steps and dim.active - len(steps) * step < max(dim.minimum, 1):
        steps.pop()
    return [unit for index in steps for unit in range(index * step, (index + 1) * step)]


def indices_in(axis: Axis, dim: ee.ElasticDim, units: list[int]) -> set[int]:
    """Where units of a dim lie in an axis, at full width."""
    return {
        index
        for segment in axis.segments
        if segment.dim is dim
        for unit in units
        for index in range(segment.start + unit * segment.inner, segment.start + (unit + 1) * segment.inner)
    }


def side_of(module: nn.Module, axis: int) -> str:
    """The side of a layer that an axis of its weight or bias is on, as Torch-Pruning sees it."""
    if isinstance(module, nn.Embedding) or getattr(module, "transposed", False):
        return "in" if axis == 0 else "out"
    return "out" if axis == 0 else "in"


def coupled(elastic: nn.Module, dim: ee.ElasticDim, units: list[int]) -> Group:
    """Ours: where the units lie, by module and side, or by name for a parameter that is neither weight nor bias."""
    group: Group = {}
    for path, layer in elastic_layers(elastic).items():
        for name, axes in layer.tensor_axes().items():
            if not isinstance(layer.storage(name), nn.Parameter):
                continue
            for index, axis in enumerate(axes):
                if axis is not None and dim in axis.dims:
                    key = (
                        (path, "out" if name == "bias" else side_of(layer, index))
                        if name in ("weight", "bias")
                        else (f"{path}.{name}".lstrip("."), "out")
                    )
                    group.setdefault(key, set()).update(indices_in(axis, dim, units))
    return group


def in_our_words(plain: nn.Module, members: list[tuple[str, str, list[int]]]) -> Group:
    """Torch-Pruning's group. Weights and biases of modules that it does not know stand under names of their own there."""
    modules = dict(plain.named_modules())
    group: Group = {}
    for path, side, indices in members:
        owner, _, key = path.rpartition(".")
        bare = path not in modules and key in ("weight", "bias")
        group.setdefault((owner if bare else path, side), set()).update(indices)
    return group


def makers(pair: Pair, dim: ee.ElasticDim, units: list[int]) -> list[tuple[str, list[int]]]:
    """The layers that make the units, in order, and the places of the units among the outputs of each."""
    found = []
    for path, layer in elastic_layers(pair.elastic).items():
        axes = layer.tensor_axes().get("weight", ())
        for index, axis in enumerate(axes if len(axes) > 1 and path else ()):
            if axis is not None and side_of(layer, index) == "out" and dim in axis.dims:
                found.append((path, sorted(indices_in(axis, dim, units))))
    return found


class Side(NamedTuple):
    """What one of the two makes of a dim: the group, the outputs in evaluation, the pruned model."""

    group: Group
    outputs: list[Tensor]
    model: nn.Module


def theirs(pair: Pair, dim: ee.ElasticDim, units: list[int]) -> Side | str:
    """Torch-Pruning's side, from the first layer that it finds in its graph, or what it says or does instead."""
    said = ""
    for path, indices in makers(pair, dim, units):
        try:
            with time_limit(SECONDS):
                pruned, members = pruned_by_torch_pruning(pair.plain, pair.inputs, path, indices)
                outputs = pair.case.outputs(call(pruned.eval(), pair.inputs))
            return Side(in_our_words(pair.plain, members), [output.detach() for output in outputs], pruned)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if "is not in the dependency graph" not in said:
                break
    return said


def ours(pair: Pair, name: str, units: list[int]) -> Side:
    twin = copy.deepcopy(pair.elastic)
    dim = ee.dims(twin)[name]
    dim.keep([unit for unit in range(dim.active) if unit not in units])
    pruned = ee.export(twin).eval()
    with torch.no_grad():
        outputs = pair.case.outputs(call(pruned, pair.inputs))
    return Side(coupled(pair.elastic, ee.dims(pair.elastic)[name], units), outputs, pruned)


def differing(one: Group, other: Group) -> list[tuple[str, str]]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def said_of(name: str, dim: str) -> str | None:
    """What Torch-Pruning is listed to say of a dim."""
    return next((said for pattern, said in UNHANDLED.get(name, {}).items() if fnmatch.fnmatchcase(dim, pattern)), None)


def compare(name: str, most: int | None) -> int:
    """Hold every dim of an architecture against its peer, or ``most`` of them, evenly chosen; how many could be."""
    pair = pair_of(name)
    dims = ee.dims(pair.elastic)
    chosen = list(dims)
    if most is not None and len(chosen) > most:
        chosen = [chosen[index * (len(chosen) - 1) // (most - 1)] for index in range(most)]
    agreed = []
    for dim in chosen:
        units = chosen_units(dims[dim])
        assert units, dim
        found, expected = theirs(pair, dims[dim], units), said_of(name, dim)
        if isinstance(found, str):
            assert expected is not None, f"{dim}: {found}"
            assert re.search(expected, found), f"{dim}: {found}"
            continue
        assert expected is None, f"{dim}: handled, though listed with {expected!r}"
        own = ours(pair, dim, units)
        if (name, dim) in DIFFERENT:
            assert differing(own.group, found.group), f"{dim}: the same, though listed as different"
            continue
        assert own.group == found.group, f"{dim}: {differing(own.group, found.group)}"
        for index, (got, wanted) in enumerate(zip(own.outputs, found.outputs, strict=True)):
            assert_close(got, wanted, f"{dim}: output {index}")
        agreed.append(dim)
    print(f"{name}: {len(agreed)} groups compared of {len(chosen)}")
    return len(agreed)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ALIKE])
def test_the_same_channels_give_the_same_model(name):
    assert bool(compare(name, most=3)) == (name not in NONE_HANDLED)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_dim_gives_the_same_model(name):
    assert bool(compare(name, most=None)) == (name not in NONE_HANDLED)


def test_what_is_listed_exists():
    assert UNHANDLED.keys() | {name for name, _ in DIFFERENT} | set(NONE_HANDLED) <= MODELS.keys()


def test_a_head_that_only_training_runs_is_coupled_too():
    """Torch-Pruning follows evaluation; the model that it leaves cannot be trained, and ours can."""
    pair = pair_of("inception")
    dim = "factorised.branch1x1.conv"
    units = chosen_units(ee.dims(pair.elastic)[dim])
    found, own = theirs(pair, ee.dims(pair.elastic)[dim], units), ours(pair, dim, units)
    assert isinstance(found, Side)
    assert differing(own.group, found.group) == [("AuxLogits.conv.conv", "in")]
    for got, wanted in zip(own.outputs, found.outputs, strict=True):
        assert_close(got, wanted, "output")
    with pytest.raises(RuntimeError, match="channels"):
        call(found.model.train(), pair.inputs)
    assert all(output.isfinite().all() for output in pair.case.outputs(call(own.model.train(), pair.inputs)))


def test_t5_is_pruned_to_the_t5_of_that_width():
    """Torch-Pruning leaves the shared embedding and the decoder as they are; a T5 built narrower says what is right."""
    from transformers import T5ForConditionalGeneration

    pair = pair_of("t5")
    units = chosen_units(ee.dims(pair.elastic)["shared"])
    found, own = theirs(pair, ee.dims(pair.elastic)["shared"], units), ours(pair, "shared", units)
    config = copy.deepcopy(pair.plain.config)
    config.d_model = 24 - len(units)
    narrow = T5ForConditionalGeneration(config).double().eval()
    narrow.model_dim = 24  # scales the head: a number that the weights were trained with, not a size that code needs
    staying = [index for index in range(24) if index not in units]
    state = {}
    for key, tensor in pair.plain.state_dict().items():
        for axis, size in enumerate(narrow.state_dict()[key].shape):
            if size != tensor.shape[axis]:
                assert tensor.shape[axis] == 24
                tensor = tensor.index_select(axis, torch.tensor(staying))
        state[key] = tensor
    narrow.load_state_dict(state)
    with torch.no_grad():
        wanted = pair.case.outputs(call(narrow, pair.inputs))
    for got, output in zip(own.outputs, wanted, strict=True):
        assert_close(got, output, "output")
    assert isinstance(found, Side)
    assert ("decoder.block.0.layer.0.SelfAttention.q", "in") in differing(own.group, found.group)
    assert any(float((one - other).abs().max()) > 0.01 * float(other.abs().max()) for one, other in zip(found.outputs, wanted, strict=True))


def test_a_unit_coupled_wrongly_would_be_found():
    pair = pair_of("resnet_basic")
    dim = ee.dims(pair.elastic)["layer1.0.conv1"]
    found, own = theirs(pair, dim, [1, 3]), ours(pair, "layer1.0.conv1", [1, 2])
    assert isinstance(found, Side)
    assert len(differing(own.group, found.group)) == 3
    with pytest.raises(AssertionError, match="error"):
        assert_close(own.outputs[0], found.outputs[0], "output")


def test_endless_code_is_interrupted():
    with pytest.raises(EndlessError, match=r"does not come to an end in 0\.1 s"), time_limit(0.1):
        while True:
            pass
