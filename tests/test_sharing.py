"""What layers share survives casts, moves, copies, pickles and other processes; and copies share nothing with their originals."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import multiprocessing, nn
from torch.optim.swa_utils import AveragedModel

import esper_elastic as ee
from esper_elastic.layers import registry


def network(active: int = 3, capacity: int = 8) -> nn.Sequential:
    """Two layers that share one dim, and a block under a switch that runs along it."""
    hidden = ee.ElasticDim(active, capacity, name="hidden")
    inner = ee.ElasticLinear(active, active, in_dim=hidden, out_dim=hidden)
    return nn.Sequential(ee.ElasticLinear(4, active, out_dim=hidden), ee.ElasticBlock(inner), ee.ElasticLinear(active, 2, in_dim=hidden))


def hidden(model: nn.Module) -> ee.ElasticDim:
    return next(module for module in model.modules() if isinstance(module, ee.ElasticLinear)).out_dim


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_sharing(model: nn.Module, active: int) -> None:
    """All layers of ``model`` follow one dim of one control block, in forward and backward, and its switch."""
    layers = [module for module in model.modules() if isinstance(module, ee.ElasticLinear)]
    block = next(module for module in model.modules() if isinstance(module, ee.ElasticBlock))
    dim = hidden(model)
    assert dim.active == active
    assert all(axis in (dim, layers[0].in_dim, layers[-1].out_dim) for layer in layers for axis in layer._widths.axes)
    assert {id(binding.layer) for binding in dim.bindings} == {id(layer) for layer in layers}
    assert all(layer._widths.block is dim.block and layer._widths.control is dim.block.on(layer.weight.device) for layer in layers)
    assert block.switch.block is dim.block and layers[1]._widths.switches == (block.switch,)
    for layer in layers:
        assert registry.lookup(layer.weight).axes == layer.tensor_axes()["weight"]
    parameter = layers[0].weight
    for width in (5, active):
        dim.resize(width)
        x = torch.ones(2, 4, dtype=parameter.dtype)
        assert model(x).shape == (2, 2)
        model.zero_grad()
        model(x).sum().backward()
        assert parameter.grad[width:].eq(0).all()
        dense = ee.export(model)
        assert torch.allclose(model(x), dense(x), rtol=1e-2)
    block.switch.set(False)
    assert torch.equal(model(x), layers[2](layers[0](x)))
    block.switch.set(True)
    model.zero_grad()


CONVERSIONS = {
    "to dtype": lambda m: m.to(torch.float64),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float64),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "from meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "share_memory_": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(False).requires_grad_(),
    "train": lambda m: m.eval().train(),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "average": lambda m: AveragedModel(m).module,
    "copy of a copy": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_sharing_survives_conversion(convert):
    model = network()
    dim, generation = hidden(model), hidden(model).block.generation
    parameters = [id(parameter) for parameter in model.parameters()]
    converted = convert(model)
    assert converted is model and hidden(model) is dim and dim.block.generation == generation
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(0.1 + number / 8)
    assert_sharing(model, 3)
    assert len(parameters) == len(list(model.parameters()))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_share_among_themselves_and_not_with_the_original(duplicate):
    model = network()
    hidden(model).resize(4)
    other = duplicate(model)
    assert hidden(other) is not hidden(model) and hidden(other).block is not hidden(model).block
    assert (hidden(other).name, hidden(other).capacity) == ("hidden", 8)
    assert hidden(other).block.generation == hidden(model).block.generation
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))
    digest = hidden(model).block.digest()
    assert hidden(other).block.digest() == digest
    assert_sharing(other, 4)
    hidden(other).resize(7)
    assert hidden(model).active == 4 and hidden(model).block.digest() == digest
    hidden(model).resize(2)
    assert hidden(other).active == 7
    assert_sharing(model, 2)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_does_not_keep_the_original_alive(duplicate):
    import gc
    import weakref

    model = network()
    reference, dim = weakref.ref(model[0]), weakref.ref(hidden(model))
    other = duplicate(model)
    del model
    gc.collect()
    assert reference() is None and dim() is None
    assert_sharing(other, 3)


def test_a_copied_switch_keeps_its_position():
    model = network()
    model[1].switch.set(False)
    for duplicate in COPIES.values():
        other = duplicate(model)
        assert not other[1].on
        model[1].switch.set(True)
        assert not other[1].on
        model[1].switch.set(False)


@pytest.mark.parametrize(
    "dump", [pickle.dumps, lambda m: torch.save(m, buffer := io.BytesIO()) or buffer.getvalue()], ids=["pickle", "save"]
)
def test_one_layer_of_ten_is_a_tenth_of_the_bytes(dump):
    dim = ee.ElasticDim(100, 128)
    layers = nn.ModuleList([ee.ElasticLinear(100, 100, in_dim=dim, out_dim=dim) for _ in range(10)])
    assert len(dump(layers[3])) < 0.13 * len(dump(layers))


def test_a_part_pickled_alone_leaves_the_rest_behind():
    model = network()
    part = pickle.loads(pickle.dumps(model[0]))
    assert [binding.layer for binding in part.out_dim.bindings] == [part, part]
    part.out_dim.resize(8)
    assert hidden(model).active == 3 and part(torch.ones(4)).shape == (8,)


def test_a_dim_is_copied_with_the_layers_that_come_along():
    model = network()
    other_dim, layer = copy.deepcopy((hidden(model), model[2]))
    assert layer.in_dim is other_dim and other_dim is not hidden(model)
    assert [binding.layer for binding in other_dim.bindings] == [layer]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copied_block_takes_new_dims(duplicate):
    model = duplicate(network())
    more = [ee.ElasticLinear(3, width, in_dim=hidden(model)) for width in range(1, 40)]
    block = hidden(model).block
    assert all(layer._widths.block is block for layer in more)
    assert [int(block.on(torch.device("cpu"))[entry.slot]) for entry in block.entries()] == [entry._value for entry in block.entries()]
    assert len({entry.slot for entry in block.entries()}) == len(block.entries())
    hidden(model).resize(6)
    assert model(torch.ones(1, 4)).shape == (1, 2) and more[-1](torch.ones(1, 6)).shape == (1, 39)


def test_averaging_weights_leaves_widths_alone():
    model = network()
    average = AveragedModel(model)
    hidden(model).resize(5)
    average.update_parameters(model)
    average.update_parameters(model)
    assert hidden(average).active == 3
    assert_sharing(average.module, 3)


def test_the_thread_that_copies_owns_the_copy():
    model = network()
    box: list = []
    thread = threading.Thread(target=lambda: (box.append(copy.deepcopy(model)), hidden(box[0]).resize(6)))
    thread.start()
    thread.join()
    assert hidden(box[0]).active == 6 and hidden(model).active == 3
    with pytest.raises(ee.errors.OwnerError):
        hidden(box[0]).resize(5)
    hidden(box[0]).block.adopt()
    assert_sharing(box[0], 6)


def _resize_and_reply(model, x, queue):
    torch.set_num_threads(1)
    before = hidden(model).active
    hidden(model).resize(6)
    with torch.no_grad():
        model[0].weight.zero_()
        queue.put((before, hidden(model).active, model(x).numpy().tolist()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_has_widths_of_its_own_and_shares_the_weights(method):
    context = multiprocessing.get_context(method)
    model, x = network().share_memory(), torch.ones(2, 4)
    queue = context.SimpleQueue()
    process = context.Process(target=_resize_and_reply, args=(model, x, queue))
    process.start()
    before, after, output = queue.get()
    process.join()
    assert (before, after) == (3, 6) and process.exitcode == 0
    assert hidden(model).active == 3
    assert model[0].weight.eq(0).all()
    hidden(model).resize(6)
    assert torch.allclose(model(x), torch.tensor(output))
