"""The control block, its dims, switches and derived axes: what they say, what they refuse, and what a copy or a thread sees of them."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic.control import ControlBlock, Switch
from esper_elastic.errors import GenerationError, OwnerError
from esper_elastic.layers.registry import lookup


def chain(*sizes: tuple[int, int]) -> nn.Sequential:
    """Linear layers over ``(active, capacity)`` sizes, neighbours sharing a dim."""
    dims = [ee.ElasticDim(active, capacity) for active, capacity in sizes]
    pairs = itertools.pairwise(dims)
    return nn.Sequential(*(ee.ElasticLinear(a.active, b.active, in_dim=a, out_dim=b) for a, b in pairs))


def state(block: ControlBlock) -> tuple[Any, ...]:
    return block.generation, block.digest(), block._host.tolist(), block._host._version, [entry._value for entry in block.entries()]


def in_thread(action: Callable[[], Any]) -> Any:
    box: list[Any] = []

    def run() -> None:
        try:
            box.append(action())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return box[0]


# Widths


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (0, r"ElasticDim 'fc1': cannot activate 0 units: minimum is 2\. To switch a layer off, put it in an ElasticBlock\."),
        (-4, r"cannot activate -4 units: minimum is 2"),
        (12, r"ElasticDim 'fc1': cannot activate 12 units: capacity is 10\. Rebuild the layer with a larger max_\* size"),
        (5, r"ElasticDim 'fc1': cannot activate 5 units: expected a multiple of 2\. The nearest: 4 and 6\."),
        (True, r"ElasticDim 'fc1': width: expected an integer, got True of type bool\."),
        (np.True_, r"width: expected an integer, got np\.True_ of type bool"),
        (4.0, r"width: expected an integer, got 4\.0 of type float\."),
        (np.float32(4), r"width: expected an integer, got np\.float32\(4\.0\) of type float32\."),
        (torch.tensor(4), r"width: expected an integer, got tensor\(4\) of type Tensor\."),
        ("4", r"width: expected an integer, got '4' of type str\."),
        (None, r"width: expected an integer, got None of type NoneType\."),
    ],
    ids=lambda value: repr(value) if not isinstance(value, str) else "",
)
def test_a_bad_width_is_refused_and_nothing_changes(width: Any, message: str) -> None:
    dim = ee.ElasticDim(6, 10, minimum=2, multiple_of=2, name="fc1")
    before = state(dim.block)
    with pytest.raises(ee.CapacityError, match=message):
        dim.resize(width)
    with pytest.raises(ValueError, match=message):
        dim.resize(width)
    assert state(dim.block) == before


@pytest.mark.parametrize("width", [np.int64(8), np.int32(8), np.array(8)], ids=["int64", "int32", "array"])
def test_an_integer_of_another_library_is_a_width(width: Any) -> None:
    dim = ee.ElasticDim(6, 10)
    dim.resize(width)
    assert dim.active == 8
    assert type(dim.active) is int


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"active": 0}, "cannot activate 0 units: minimum is 1"),
        ({"active": True}, "active: expected an integer, got True"),
        ({"active": 2.0}, "active: expected an integer, got 2.0"),
        ({"active": 5, "capacity": 4}, "cannot activate 5 units: capacity is 4"),
        ({"active": 5, "capacity": 8.0}, "capacity: expected an integer"),
        ({"active": 3, "multiple_of": 4}, "expected a multiple of 4. No width of this dim is one"),
        ({"active": 5, "capacity": 7, "multiple_of": 4}, "expected a multiple of 4. The nearest: 4\\."),
        ({"active": 5, "minimum": 6}, "minimum is 6"),
        ({"active": 5, "minimum": 0}, "minimum and multiple_of: expected at least 1, got 0 and 1"),
        ({"active": 5, "multiple_of": -1}, "minimum and multiple_of: expected at least 1, got 1 and -1"),
    ],
    ids=str,
)
def test_a_bad_dim_cannot_be_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ee.CapacityError, match=f"ElasticDim 'd': .*{message}"):
        ee.ElasticDim(**arguments, name="d")


def test_capacity_is_exactly_what_was_asked() -> None:
    dim = ee.ElasticDim(3, 7, minimum=2)
    assert (dim.active, dim.capacity, dim.minimum, dim.multiple_of, dim.name) == (3, 7, 2, 1, None)
    assert ee.ElasticDim(5).capacity == 5
    assert repr(dim) == "ElasticDim(active=3, capacity=7)"


@pytest.mark.parametrize("arguments", [(3.0, 5), (3, True), ("3", 5)], ids=str)
def test_a_layer_refuses_sizes_that_are_no_integers(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ee.CapacityError, match="expected an integer, got"):
        ee.ElasticLinear(*arguments)


def test_a_layer_refuses_a_dim_of_another_size() -> None:
    with pytest.raises(ee.CapacityError, match=r"ElasticLinear: in_features: expected 4, the active size of the dim given, got 3\."):
        ee.ElasticLinear(3, 5, in_dim=ee.ElasticDim(4, 9))
    with pytest.raises(ee.CapacityError, match=r"max_in_features and a dim for in_features were both given"):
        ee.ElasticLinear(4, 5, in_dim=ee.ElasticDim(4, 9), max_in_features=9)
    with pytest.raises(ee.CapacityError, match=r"dim for in_features: expected an ElasticDim or a derived axis, got int"):
        ee.ElasticLinear(4, 5, in_dim=4)


def test_resize_to_the_present_width_commits_nothing() -> None:
    dim = ee.ElasticDim(3, 7)
    before = state(dim.block)
    dim.resize(3)
    assert state(dim.block) == before
    dim.resize(4)
    assert dim.block.generation == before[0] + 1


# Derived axes


def test_derived_axes_follow_their_dims() -> None:
    a, b = ee.ElasticDim(2, 4), ee.ElasticDim(1, 3)
    axis = ee.concat(a * 2, b, a)
    assert (axis.active, axis.capacity) == (7, 15)
    assert axis.runs() == [(0, 4), (8, 1), (11, 2)]
    assert axis.dims == [a, b]
    a.resize(4)
    assert axis.runs() == [(0, 9), (11, 4)]
    assert (3 * axis).runs() == [(0, 27), (33, 12)]
    assert "active=13, capacity=15" in repr(axis)


def test_a_derived_axis_cannot_be_set() -> None:
    axis = ee.ElasticDim(2, 4) * 3
    assert not any(hasattr(axis, verb) for verb in ("resize", "grow", "keep"))


@pytest.mark.parametrize("factor", [0, -1, True, 2.0, None], ids=str)
def test_a_bad_factor_is_refused(factor: Any) -> None:
    with pytest.raises(ee.CapacityError, match="Axis: .*(expected at least 1|expected an integer)"):
        ee.ElasticDim(2, 4) * factor
    with pytest.raises(ee.CapacityError, match="concat: expected at least one dim"):
        ee.concat()


def test_bindings_name_every_axis_that_a_dim_runs_through() -> None:
    dim, other = ee.ElasticDim(2, 4), ee.ElasticDim(3, 5)
    plain = ee.ElasticLinear(2, 3, in_dim=dim, out_dim=other)
    times = ee.ElasticLinear(6, 2, in_dim=dim * 3, max_out_features=8, bias=False)
    joined = ee.ElasticLinear(9, 2, in_dim=ee.concat(other, dim, dim, dim), out_dim=dim)
    found = {(b.layer, b.name, b.axis, b.outer, b.inner, b.start) for b in dim.bindings}
    assert found == {
        (plain, "weight", 1, 1, 1, 0),
        (times, "weight", 1, 1, 3, 0),
        (joined, "weight", 1, 3, 1, 5),
        (joined, "weight", 0, 1, 1, 0),
        (joined, "bias", 0, 1, 1, 0),
    }
    assert all(binding.tensor is getattr(binding.layer, binding.name) for binding in dim.bindings)
    for binding in dim.bindings:  # the definition of a binding, against the runs of the axis
        axis = binding.layer.tensor_axes()[binding.name][binding.axis]
        mine = range(binding.start, binding.start + binding.outer * binding.inner * dim.capacity)
        active = {i for i in mine if ((i - binding.start) // binding.inner) % dim.capacity < dim.active}
        runs = {i for start, length in axis.runs() for i in range(start, start + length)}
        assert active == runs & set(mine)
    del plain, joined, binding, found, axis
    gc.collect()
    assert [b.layer for b in dim.bindings] == [times]


# One block


def test_layers_that_share_a_dim_share_a_block_whatever_the_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)):
        dims = [ee.ElasticDim(2 + i, 9, name=str(i)) for i in range(4)]
        layers = [None, None, None]
        for i in order:
            layers[i] = ee.ElasticLinear(dims[i].active, dims[i + 1].active, in_dim=dims[i], out_dim=dims[i + 1])
        assert len({id(dim.block) for dim in dims}) == 1
        assert sorted(dim.slot for dim in dims) == sorted({dim.slot for dim in dims})
        assert all(dim.block._host[dim.slot] == dim.active for dim in dims)
        model = nn.Sequential(*layers)
        for width in (1, 9, 4):
            for dim in dims:
                dim.resize(width)
            assert model(torch.randn(2, width)).shape == (2, width)
            assert all(layer._widths.control is dims[0].block._host for layer in layers)


def test_blocks_grow_beyond_their_first_slots() -> None:
    model = chain(*((3, 5) for _ in range(60)))
    dims = [layer.in_dim for layer in model]
    block = dims[0].block
    assert all(dim.block is block for dim in dims)
    assert len({dim.slot for dim in dims}) == len(dims)
    dims[0].resize(5)
    dims[30].resize(2)
    assert block._host[[dim.slot for dim in dims]].tolist() == [dim.active for dim in dims]
    assert model(torch.randn(2, 5)).shape == (2, 3)
    assert all(layer._widths.control is block._host for layer in model)


def test_a_graph_lives_through_a_merge_and_dies_with_the_next_commit() -> None:
    def build() -> tuple[ee.ElasticDim, ee.ElasticLinear, torch.Tensor]:
        dim = ee.ElasticDim(3, 5)
        layer = ee.ElasticLinear(2, 3, out_dim=dim)
        return dim, layer, layer(torch.ones(1, 2)).sum()

    dim, layer, loss = build()
    others = chain(*((4, 6) for _ in range(40)))
    ControlBlock.merge((dim.block, others[0].in_dim.block))
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    dim, layer, loss = build()
    merged = ControlBlock.merge((dim.block, others[0].in_dim.block))
    others[0].in_dim.resize(5)
    assert merged is dim.block
    with pytest.raises(GenerationError):
        loss.backward()


def test_a_slot_is_not_reused_under_a_graph_that_outlives_its_layer() -> None:
    shared = ee.ElasticDim(4, 8)
    weight, bias = torch.randn(6, 8, requires_grad=True), torch.randn(6, requires_grad=True)

    def forward() -> torch.Tensor:
        layer = ee.ElasticLinear(4, 3, in_dim=shared, max_out_features=6)
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, torch.ones(2, 4))

    y = forward()
    gc.collect()
    layers = [ee.ElasticLinear(4, 5, in_dim=shared, max_out_features=6) for _ in range(20)]
    assert all(layer.out_dim.block is shared.block for layer in layers)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.tensor([2.0, 2, 2, 0, 0, 0]))


def test_slots_of_dead_dims_are_used_again() -> None:
    shared = ee.ElasticDim(4, 8)
    for _ in range(200):
        ee.ElasticLinear(4, 3, in_dim=shared)
    assert shared.block._host.numel() <= 32
    assert ee.ElasticLinear(4, 3, in_dim=shared)(torch.randn(2, 4)).shape == (2, 3)


def test_a_refused_merge_moves_nothing() -> None:
    model = chain((2, 4), (3, 5), (4, 6))
    lone, foreign = ee.ElasticDim(2, 4), in_thread(lambda: ee.ElasticDim(2, 4))
    layer = ee.ElasticLinear(2, 2, in_dim=lone)
    blocks = [lone.block, model[0].in_dim.block, foreign.block]
    before = [state(block) for block in blocks]
    with pytest.raises(OwnerError, match="thread 'MainThread' cannot commit"):
        ControlBlock.merge(blocks)
    assert [state(block) for block in blocks] == before
    lone.resize(3)
    assert layer(torch.randn(1, 3)).shape == (1, 2)
    with model[0].in_dim.block.batch(), pytest.raises(ee.CapacityError, match="while a batch is open. Leave the batch first"):
        ControlBlock.merge(blocks[:2])


# Batches


def test_a_batch_is_one_commit() -> None:
    model = chain((2, 4), (3, 5), (4, 6))
    a, b, c = model[0].in_dim, model[0].out_dim, model[1].out_dim
    generation = a.block.generation
    with a.block.batch() as block:
        a.resize(3)
        b.resize(1)
        b.resize(4)
        assert (a.active, a.staged, b.active, b.staged) == (2, 3, 3, 4)
        with block.batch():
            c.resize(6)
        assert c.active == 4
    assert (a.active, b.active, c.active) == (3, 4, 6)
    assert a.block.generation == generation + 1


def test_a_batch_whose_body_raises_commits_nothing() -> None:
    model = chain((2, 4), (3, 5), (4, 6))
    a, b, c = model[0].in_dim, model[0].out_dim, model[1].out_dim
    before = state(a.block)
    with pytest.raises(ee.CapacityError), a.block.batch():
        a.resize(3)
        b.resize(99)
    assert state(a.block) == before
    with a.block.batch() as block:
        a.resize(3)
        with pytest.raises(KeyError), block.batch():
            b.resize(1)
            a.resize(4)
            raise KeyError
        c.resize(5)
    assert (a.active, b.active, c.active) == (3, 3, 5)


def test_a_batch_that_changes_nothing_commits_nothing() -> None:
    model = chain((2, 4), (3, 5))
    before = state(model[0].in_dim.block)
    with model[0].in_dim.block.batch():
        model[0].in_dim.resize(4)
        model[0].in_dim.resize(2)
    with model[0].in_dim.block.batch():
        pass
    assert state(model[0].in_dim.block) == before


def test_digest_tells_widths_and_switches_apart() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(chain((2, 4), (3, 5)), ee.ElasticBlock(chain((3, 5), (3, 5))))

    first, second = build(), build()
    digests = [ee.control_block(model).digest() for model in (first, second)]
    assert digests[0] == digests[1]
    first[0][0].in_dim.resize(3)
    assert ee.control_block(first).digest() != digests[1]
    second[0][0].in_dim.resize(3)
    assert ee.control_block(first).digest() == ee.control_block(second).digest()
    first[1].switch.set(False)
    assert ee.control_block(first).digest() != ee.control_block(second).digest()
    assert ee.control_block(copy.deepcopy(first)).digest() == ee.control_block(first).digest()


# Threads


@pytest.mark.parametrize(
    "change",
    [
        lambda dim, switch: dim.resize(3),
        lambda dim, switch: dim.resize(dim.active),
        lambda dim, switch: switch.set(False),
        lambda dim, switch: dim.block.batch().__enter__(),
        lambda dim, switch: dim.block.drain(),
    ],
    ids=["resize", "resize to the same", "switch", "batch", "drain"],
)
def test_another_thread_cannot_commit(change: Callable[..., Any]) -> None:
    dim, switch = ee.ElasticDim(2, 4), Switch()
    block = ControlBlock.merge((dim.block, switch.block))
    before = state(block)
    error = in_thread(lambda: change(dim, switch))
    assert isinstance(error, OwnerError)
    assert "thread 'other' cannot commit" in str(error)
    assert "control.post(dim.resize, n)" in str(error)
    assert state(block) == before


def test_posted_changes_wait_for_the_owner() -> None:
    dim = ee.ElasticDim(2, 4)
    good, bad, reading = in_thread(lambda: [dim.block.post(dim.resize, n) for n in (3, 9)] + [dim.block.post(lambda: dim.active)])
    assert not good.done()
    assert dim.active == 2
    assert dim.block.drain() == 3
    assert (good.result(), reading.result(), dim.active) == (None, 3, 3)
    with pytest.raises(ee.CapacityError, match="cannot activate 9 units"):
        bad.result()
    cancelled = dim.block.post(dim.resize, 4)
    assert cancelled.cancel()
    dim.block.drain()
    assert dim.active == 3
    assert dim.block.drain() == 0


def test_posted_changes_survive_a_merge() -> None:
    dims = [ee.ElasticDim(2, 4) for _ in range(3)]
    futures = [dim.block.post(dim.resize, 3) for dim in dims]
    assert ControlBlock.merge(dim.block for dim in dims).drain() == 3
    assert all(future.done() for future in futures)
    assert [dim.active for dim in dims] == [3, 3, 3]


def test_a_thread_may_adopt_the_block() -> None:
    dim = ee.ElasticDim(2, 4)

    def work() -> None:
        dim.block.adopt()
        dim.resize(3)

    assert in_thread(work) is None
    assert dim.active == 3
    with pytest.raises(OwnerError, match="thread 'MainThread' cannot commit"):
        dim.resize(4)
    dim.block.adopt()
    dim.resize(4)


# Copies


def copies(model: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_shares_among_itself_and_with_nobody_else(how: str) -> None:
    model = nn.Sequential(chain((2, 4), (3, 5), (4, 6)), ee.ElasticBlock(chain((4, 4), (4, 4))))
    model[0][0].out_dim.resize(4)
    twin = copies(model)[how]
    assert twin[0][0].out_dim is twin[0][1].in_dim
    assert twin[0][0].out_dim is not model[0][0].out_dim
    assert ee.control_block(twin) is not ee.control_block(model)
    assert ee.control_block(twin).generation == ee.control_block(model).generation
    x = torch.randn(3, 2)
    assert torch.equal(twin(x), model(x))
    twin[0][0].out_dim.resize(1)
    assert (twin[0](x).shape, model[0][0].out_dim.active) == ((3, 4), 4)
    assert torch.equal(twin[0][0](x), model[0][0](x)[:, :1])
    assert {b.layer for b in twin[0][0].out_dim.bindings} == {twin[0][0], twin[0][1]}
    twin[1].switch.set(False)
    assert model[1].on


def test_a_copied_layer_does_not_drag_the_model_along() -> None:
    model = chain(*((3, 200) for _ in range(10)))
    assert len(pickle.dumps(model[4])) < 1.1 * len(pickle.dumps(ee.ElasticLinear(3, 3, max_in_features=200, max_out_features=200)))
    alone = copy.deepcopy(model[4])
    alone.in_dim.resize(7)
    assert (model[4].in_dim.active, alone(torch.randn(2, 7)).shape) == (3, (2, 3))


def test_a_shallow_copy_of_a_dim_is_the_dim() -> None:
    dim = ee.ElasticDim(2, 4)
    assert copy.copy(dim) is dim
    assert dim.block.entries() == [dim]
    model = chain((2, 4), (3, 5))
    other = copy.copy(model[0])
    model[0].out_dim.resize(5)
    assert other(torch.randn(1, 2)).shape == (1, 5)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "type": lambda m: m.type(torch.float64),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "share_memory": lambda m: m.share_memory(),
    "meta and back": lambda m: m.to("meta").to_empty(device="cpu"),
    "apply": lambda m: m.apply(lambda module: None),
}


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("how", CASTS)
def test_sharing_survives(how: str, swap: bool) -> None:
    model = chain((2, 4), (3, 5), (4, 6))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model = CASTS[how](model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert model[0].out_dim is model[1].in_dim
    assert model[0].out_dim.block._host.dtype == torch.int32
    model[0].out_dim.resize(5)
    assert model(torch.ones(2, 2, dtype=model[0].weight.dtype)).shape == (2, 4)
    assert all(b.tensor is getattr(b.layer, b.name) for b in model[0].out_dim.bindings)
    assert len(model[0].out_dim.bindings) == 3


def test_a_block_of_plain_modules_can_be_cast_by_swapping() -> None:
    block = ee.ElasticBlock(nn.Sequential(nn.Linear(3, 3), ee.ElasticLinear(3, 3)))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        block.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert {lookup(p).switches for p in block.parameters()} == {(block.switch,)}


def test_resizing_works_in_inference_mode_and_without_grad() -> None:
    model = chain((2, 4), (3, 5))
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            model[0].out_dim.resize(5)
            assert model(torch.ones(1, 2)).shape == (1, 5)
            model[0].out_dim.resize(3)
    model(torch.ones(1, 2)).sum().backward()
    with torch.inference_mode():
        inside = chain((2, 4), (3, 5))
        inside[0].out_dim.resize(4)
        assert inside(torch.ones(1, 2)).shape == (1, 4)


def test_resize_never_raises_because_a_graph_is_alive() -> None:
    model = chain((2, 4), (3, 5), (4, 6))
    losses = []
    for width in (1, 5, 2, 3):
        losses.append(model(torch.ones(1, 2)).sum())
        model[0].out_dim.resize(width)
    for loss in losses:
        with pytest.raises(GenerationError):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())


# Cost


def flat(action: Callable[[int], Any], times: int) -> tuple[int, int]:
    """What ``times`` calls leave behind: bytes by tracemalloc, objects by gc."""
    for i in range(1000):
        action(i)
    gc.collect()
    objects = len(gc.get_objects())
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(times):
        action(i)
    gc.collect()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return left, len(gc.get_objects()) - objects


@pytest.mark.parametrize("kind", ["resize", "switch", "batch"])
def test_changes_leave_nothing_behind(kind: str) -> None:
    model = nn.Sequential(chain((2, 4), (3, 5)), ee.ElasticBlock(chain((3, 5), (3, 5))))
    dim, switch, block = model[0][0].in_dim, model[1].switch, ee.control_block(model)

    def batch(i: int) -> None:
        with block.batch():
            dim.resize(1 + i % 4)
            switch.set(i % 2 == 0)

    actions = {"resize": lambda i: dim.resize(1 + i % 4), "switch": lambda i: switch.set(i % 2 == 0), "batch": batch}
    left, objects = flat(actions[kind], 100_000 if kind == "resize" else 10_000)
    assert left < 2048, f"{left} bytes"
    assert objects < 20, f"{objects} objects"
    assert block.generation >= 10_000
