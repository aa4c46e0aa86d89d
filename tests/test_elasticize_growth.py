"""Growth and pruning in converted models: ``grow`` keeps the function, ``keep`` gives what pruning the plain model by hand gives."""

import copy
import random

import pytest
import torch
from contract import active_indices
from converting import active_outcome, assert_close, assert_same, built, elastic_layers, inputs_of, poison, run, valid_widths
from torch import Tensor, nn
from zoo import MODELS, Case, Inputs, call

import esper_elastic as ee
from esper_elastic.control import Axis
from esper_elastic.errors import CapacityError
from esper_elastic.layers.units import blocks

NAMES = ("resnet_basic", "mobilenet_v2", "vit", "llama", "gpt2")
STEPS = 2
LR = 1e-3


def converted(name: str) -> tuple[Case, Inputs, nn.Module, ee.optim.AdamW]:
    """A model with capacity 1.5 whose optimizer has stepped it, dormant memory full of NaN."""
    case = MODELS[name]
    model, inputs = built(case), inputs_of(case)
    optimizer = ee.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)
    for _ in range(STEPS):
        run(model, case, inputs, training=True)
        optimizer.step()
    ee.elasticize(model, inputs, capacity=1.5, optimizer=optimizer)
    return case, inputs, poison(model), optimizer


def outputs(model: nn.Module, case: Case, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return case.outputs(call(model.eval(), inputs))


def mixes(dim: ee.ElasticDim) -> bool:
    return dim.mixed is not None or any(layer.mixes_units for layer in dim.users())


@pytest.mark.parametrize("name", NAMES)
def test_grow_keeps_the_function_or_says_why_not(name):
    case, inputs, model, optimizer = converted(name)
    shown = outputs(model, case, inputs)
    grown = []
    for path, dim in ee.dims(model).items():
        wider = valid_widths(dim)[-1]
        if mixes(dim):
            with pytest.raises(CapacityError, match=r"grow: .*Pass exact=False to grow all the same"):
                dim.grow(wider, init="zero")
            continue
        if wider == dim.active:
            continue
        dim.grow(wider, init="zero")
        grown.append(path)
        for got, expected in zip(outputs(model, case, inputs), shown, strict=True):
            assert_close(got, expected, f"output after growth of {path!r}", 1e-12)
    assert grown
    run(model, case, inputs, training=True)
    optimizer.step()
    assert all(p.isfinite().all() for p in ee.export(model).parameters())
    grown_units = {path: ee.dims(model)[path].active for path in grown}
    assert all(units == valid_widths(ee.dims(model)[path])[-1] for path, units in grown_units.items())


@pytest.mark.parametrize("name", NAMES)
def test_keep_gives_the_model_pruned_by_hand_and_its_optimizer(name):
    case, inputs, model, optimizer = converted(name)
    chosen = {}
    generator = random.Random(1)
    for path, dim in ee.dims(model).items():
        group = max((size for _, size in blocks(dim)), default=1)
        step = max(group, dim.multiple_of)
        count = max(dim.active // step * 2 // 3, -(-dim.minimum // step))
        groups = sorted(generator.sample(range(dim.active // step), count))
        chosen[path] = [unit for start in groups for unit in range(start * step, (start + 1) * step)]
    pruned = by_hand(model, optimizer, chosen)
    for path, indices in chosen.items():
        ee.dims(model)[path].keep(indices)
    plain, twin = pruned
    for _ in range(2):
        assert_same(active_outcome(model, run(model, case, inputs, training=True)), run(plain, case, inputs, training=True))
        optimizer.step()
        twin.step()
    for (key, one), other in zip(ee.export(model).named_parameters(), plain.parameters(), strict=True):
        assert_close(one.detach(), other.detach(), key, floor=1e-6 * LR)  # Adam makes steps of gradients that are all rounding


def by_hand(model: nn.Module, optimizer: ee.optim.AdamW, chosen: dict[str, list[int]]) -> tuple[nn.Module, torch.optim.AdamW]:
    """The exported model with the chosen units of each dim, and torch's AdamW with their moments; nothing is asked of ``keep``."""
    narrow = copy.deepcopy(model)
    ee.resize(narrow, {path: len(indices) for path, indices in chosen.items()})
    plain = ee.export(narrow)
    units = {id(ee.dims(model)[path]): set(indices) for path, indices in chosen.items()}
    places = {id(layer.storage(key)): axes for layer in elastic_layers(model).values() for key, axes in layer.tensor_axes().items()}

    def pick(tensor: Tensor, like: Tensor) -> Tensor:
        for index, axis in enumerate(places.get(id(like), ())):
            if axis is not None:
                tensor = tensor.index_select(index, torch.tensor(picked(axis, units)))
        return tensor.detach().clone()

    with torch.no_grad():
        for own, other in zip((*plain.parameters(), *plain.buffers()), (*model.parameters(), *model.buffers()), strict=True):
            own.copy_(pick(other, other))
    twin = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.1)
    for own, other in zip(plain.parameters(), model.parameters(), strict=True):
        kept = optimizer.state.get(other)
        if kept:
            moments = {key: pick(kept[key], other) for key in ("exp_avg", "exp_avg_sq")}
            twin.state[own] = {"step": torch.tensor(float(STEPS)), **moments}
    return plain, twin


def picked(axis: Axis, units: dict[int, set[int]]) -> list[int]:
    """The indices of an axis, at capacity, that belong to chosen units."""
    found = []
    for index in active_indices(axis).tolist():
        segment = next(s for s in axis.segments if s.start <= index < s.start + s.dim.capacity * s.inner)
        if id(segment.dim) not in units or (index - segment.start) // segment.inner in units[id(segment.dim)]:
            found.append(index)
    return found
