"""Widths in a state_dict: the key at its root, and the widths that smaller tensors imply."""

import copy
import io
import json
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper_elastic as ee
from esper_elastic.errors import StateDictError
from esper_elastic.layers import registry
from esper_elastic.layers.base import write_active

KEY = "_esper_elastic"


class Net(nn.Module):
    """A user's module: two hidden dims, a plain layer between, a switchable block, a flatten-like and a concatenated axis."""

    def __init__(self, first: int = 3, second: int = 4, capacity: int = 8, step: int = 1) -> None:
        super().__init__()
        self.hidden = ee.ElasticDim(first, capacity, multiple_of=step)
        self.second = ee.ElasticDim(second, capacity)
        self.fc1 = ee.ElasticLinear(5, first, out_dim=self.hidden)
        self.fc2 = ee.ElasticLinear(first, second, in_dim=self.hidden, out_dim=self.second)
        self.plain = nn.Linear(2, 2)
        self.block = ee.ElasticBlock(ee.ElasticLinear(second, second, in_dim=self.second, out_dim=self.second))
        self.wide = ee.ElasticLinear(2 * first, 2, in_dim=self.hidden * 2)
        self.joint = ee.ElasticLinear(first + second, 3, in_dim=ee.concat(self.hidden, self.second))

    def forward(self, x):
        a = self.fc1(x).relu()
        b = self.block(self.fc2(a))
        return self.plain(self.wide(a.repeat_interleave(2, -1))).sum() + self.joint(torch.cat([a, b], -1))


def content(state: dict, key: str = KEY) -> dict:
    assert state[key].dtype == torch.uint8
    return json.loads(bytes(state[key].tolist()))


def poison(model: nn.Module) -> None:
    """Fill dormant memory with NaN."""
    for layer in model.modules():
        if isinstance(layer, ee.ElasticLinear):
            for name in ("weight", "bias"):
                kept = layer.active(name).detach().clone()
                with torch.no_grad():
                    write_active(getattr(layer, name).fill_(math.nan), layer.tensor_axes()[name], kept)


def roots():
    net = Net()
    late = nn.Sequential(nn.Sequential(), nn.ReLU())
    late[0].append(ee.ElasticLinear(2, 2, max_out_features=4))
    replaced = copy.deepcopy(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))
    replaced[0][0] = ee.ElasticLinear.from_dense(replaced[0][0], max_out_features=4)
    inserted = nn.ModuleList([nn.ReLU()])
    inserted.insert(0, ee.ElasticLinear(2, 2, max_out_features=4))
    return {
        "lone": (ee.ElasticLinear(2, 2, max_out_features=4), "out"),
        "sequential": (nn.Sequential(ee.ElasticLinear(2, 2, max_out_features=4)), "0.out"),
        "user": (net, "fc1.out"),
        "nested": (nn.Sequential(nn.Sequential(Net())), "0.0.fc1.out"),
        "appended late": (late, "0.0.out"),
        "replaced far below": (replaced, "0.0.out"),
        "inserted": (inserted, "0.out"),
        "parallel": (nn.DataParallel(net), "fc1.out"),
        "averaged": (AveragedModel(net), "fc1.out"),
        "compiled": (torch.compile(net), "fc1.out"),
        "copied": (copy.deepcopy(net), "fc1.out"),
        "unpickled": (pickle.loads(pickle.dumps(net)), "fc1.out"),
    }


@pytest.mark.parametrize("name", roots())
def test_one_key_at_whatever_module_is_the_root(name):
    root, dim = roots()[name]
    state = root.state_dict()
    assert [key for key in state if KEY in key] == [KEY]
    assert dim in content(state)["widths"]
    prefixed = root.state_dict(prefix="a.b.")
    assert [key for key in prefixed if KEY in key] == ["a.b." + KEY]
    assert torch.equal(prefixed["a.b." + KEY], state[KEY])


@pytest.mark.parametrize("name", roots())
def test_a_round_trip_restores_the_widths_in_any_root(name):
    root, _ = roots()[name]
    state = {key: tensor.clone() for key, tensor in root.state_dict().items()}
    for elastic in ee.dims(root).values():
        elastic.resize(elastic.capacity)
    with torch.no_grad():
        for parameter in root.parameters():
            parameter.zero_()
    assert KEY not in root.state_dict()
    result = root.load_state_dict(state)
    assert result.missing_keys == result.unexpected_keys == []
    assert content(root.state_dict()) == content(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in root.state_dict().items())


def test_the_key_is_there_only_when_it_has_something_to_say():
    net = Net(8, 8)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    net.block.switch.set(False)
    assert content(net.state_dict())["switches"] == {"block.switch": False}
    net.block.switch.set(True)
    net.hidden.resize(7)
    assert content(net.state_dict()) == {
        "format": 1,
        "widths": {"fc1.out": 7, "fc1.in": 5, "fc2.out": 8, "wide.out": 2, "joint.out": 3},
        "switches": {"block.switch": True},
        "journal": [],
    }


def test_entries_alias_the_parameters_at_capacity():
    net = Net()
    state = net.state_dict()
    for name, parameter in net.named_parameters():
        assert state[name].data_ptr() == parameter.data_ptr() and state[name].shape == parameter.shape
        assert net.state_dict(keep_vars=True)[name] is parameter


def test_a_given_destination_gets_one_key_per_call():
    destination: dict = {}
    first, second = Net(2), Net(3)
    first.state_dict(destination=destination, prefix="first.")
    second.state_dict(destination=destination, prefix="second.")
    assert content(destination, "first." + KEY)["widths"]["fc1.out"] == 2
    both = nn.ModuleDict({"first": Net(), "second": Net()})
    both.load_state_dict(destination)
    assert (both["first"].hidden.active, both["second"].hidden.active) == (2, 3)


def test_plain_trees_are_left_alone():
    plain = nn.Sequential(nn.Linear(2, 3))
    assert list(plain.state_dict()) == ["0.weight", "0.bias"]
    elastic = nn.Sequential(ee.ElasticLinear(2, 2, max_out_features=3))
    assert plain.load_state_dict(elastic.state_dict(), strict=False).unexpected_keys == [KEY]
    elastic.load_state_dict(plain.state_dict())
    assert elastic[0].out_dim.active == 2


def test_a_switch_and_all_widths_come_in_one_commit():
    source, target = Net(6, 2), Net()
    source.block.switch.set(False)
    separate = nn.ModuleList([target])
    target.load_state_dict(source.state_dict())
    control = ee.control_block(separate)
    assert (target.hidden.active, target.second.active, target.block.on) == (6, 2, False)
    before = control.generation
    separate.load_state_dict({f"0.{key}": value for key, value in Net(5, 3).state_dict().items()})
    assert (target.hidden.active, target.second.active, target.block.on) == (5, 3, True)
    assert control.generation == before + 1
    separate.load_state_dict(separate.state_dict())
    assert control.generation == before + 1


@pytest.mark.parametrize("strip", [False, True], ids=["wrapped", "unwrapped"])
def test_a_checkpoint_moves_between_a_model_and_its_wrapper(strip):
    source, target = Net(6, 2), Net()
    if strip:
        state = nn.DataParallel(source).state_dict()
        nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "module.")
        target.load_state_dict(state)
    else:
        nn.DataParallel(target).load_state_dict({f"module.{key}": value for key, value in source.state_dict().items()})
    assert (target.hidden.active, target.second.active) == (6, 2)


def test_torch_save_and_weights_only_load():
    source, target = Net(6, 2), Net()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 5)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_key_survives_a_cast_of_the_whole_dict(dtype):
    target = Net()
    target.load_state_dict({key: tensor.to(dtype) for key, tensor in Net(6, 2).state_dict().items()})
    assert (target.hidden.active, target.second.active) == (6, 2)


# Tensors without the key


def test_capacity_tensors_without_the_key_leave_widths():
    source, target = Net(6, 2), Net()
    state = source.state_dict()
    del state[KEY]
    target.load_state_dict(state)
    assert (target.hidden.active, target.second.active) == (3, 4)
    assert torch.equal(target.fc1.weight, source.fc1.weight)


def dense_state(net: Net) -> dict:
    """The plain checkpoint of active size, under the keys that the block has."""
    return {
        f"{path}.{name}": tensor
        for path, layer in net.named_modules()
        if isinstance(layer, ee.ElasticLinear)
        for name, tensor in layer.to_dense().state_dict().items()
    } | {f"plain.{name}": tensor for name, tensor in net.plain.state_dict().items()}


@pytest.mark.parametrize("widths", [(1, 1), (3, 4), (5, 2), (8, 3)], ids=str)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_smaller_tensors_set_widths_and_leave_dormant_memory(widths, assign):
    source, target = Net(*widths), Net()
    poison(target)
    poison(source)
    x = torch.randn(4, 5)
    before = ee.control_block(target).generation
    parameters = dict(target.named_parameters())
    result = target.load_state_dict(dense_state(source), assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert (target.hidden.active, target.second.active) == widths
    assert ee.control_block(target).generation == before + (widths != (3, 4))
    assert torch.equal(target(x), source(x))
    target.hidden.resize(8)
    assert target.fc1.weight[max(3, widths[0]) :].isnan().all()
    if not assign:
        assert all(parameter is parameters[name] for name, parameter in target.named_parameters())
    registered = [registry.lookup(parameter) for parameter in target.parameters()]
    assert all(axes is not None for axes in registered[:4])


def test_an_exported_model_loads_back():
    d = ee.ElasticDim(3, 8)
    model = nn.Sequential(ee.ElasticLinear(4, 3, out_dim=d), nn.ReLU(), ee.ElasticLinear(3, 2, in_dim=d, max_out_features=4))
    state, x = ee.export(model).state_dict(), torch.randn(2, 4)
    expected = model(x)
    ee.resize(model, {"0": 7, "2": 4})
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dense", [False, True], ids=["capacity", "active"])
def test_a_meta_model_loads_with_assign_alone(assign, dense):
    source = Net(6, 2)
    with torch.device("meta"):
        target = Net()
    state = dense_state(source) if dense else source.state_dict()
    if not assign:
        with pytest.warns(UserWarning, match="no-op"):
            target.load_state_dict(state)
        return
    target.load_state_dict(state, assign=True)
    x = torch.randn(4, 5)
    assert torch.equal(target(x), source(x))
    assert all(parameter.isfinite().all() for parameter in target.parameters())
    target.hidden.resize(8)
    assert target(x).isfinite().all()


def test_a_dict_is_of_active_size_throughout():
    """A dim at capacity in a plain checkpoint is meant to be there, though its tensors alone would not tell."""
    target, source = Net(3, 4), Net(8, 2)
    target.load_state_dict(dense_state(source))
    assert (target.hidden.active, target.second.active) == (8, 2)


def test_partial_dicts_report_as_torch_does():
    source, target = Net(6, 2), Net()
    state = {key: tensor for key, tensor in dense_state(source).items() if key.startswith("fc1")} | {"other": torch.zeros(1)}
    result = target.load_state_dict(state, strict=False)
    assert (target.hidden.active, target.second.active) == (6, 4)
    assert result.unexpected_keys == ["other"]
    assert "fc2.weight" in result.missing_keys and "fc1.weight" not in result.missing_keys
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc2.weight"'):
        target.load_state_dict(state)


def snapshot(net: nn.Module):
    return [tensor.clone() for tensor in net.parameters()], [dim.active for dim in ee.dims(net).values()]


def bad(**changes):
    def make() -> dict:
        state = dense_state(Net(6, 2))
        for name, shape in changes.items():
            state[name.replace("__", ".")] = torch.zeros(shape)
        return state

    return make


def root_says(**changes):
    def make() -> dict:
        state = Net(6, 2).state_dict()
        said = content(state)
        for name, value in changes.items():
            said["widths"][name.replace("__", ".")] = value
        state[KEY] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        return state

    return make


def replaced(value):
    return lambda: Net(6, 2).state_dict() | {KEY: value}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param(bad(fc2__weight=(2, 5)), r"fc2.weight.*should be 6: fc1.out = 6 by fc1.weight", id="two layers disagree"),
        pytest.param(bad(fc1__bias=(5,)), r"fc1.bias.*should be 6", id="weight and bias disagree"),
        pytest.param(bad(wide__weight=(2, 11)), r"wide.weight.*should be 12", id="derived axis disagrees"),
        pytest.param(bad(joint__weight=(3, 9)), r"joint.weight.*should be 8: fc1.out = 6 .*fc2.out = 2", id="concatenation disagrees"),
        pytest.param(bad(fc1__weight=(9, 5)), r"fc1.weight.*fc1.out: .*cannot activate 9 units: capacity is 8", id="beyond capacity"),
        pytest.param(bad(fc1__weight=(0, 5)), r"cannot activate 0 units", id="zero"),
        pytest.param(bad(plain__weight=(3, 2)), None, id="plain layer"),
        pytest.param(bad(fc1__weight=(6, 5, 1)), r"size mismatch for fc1.weight", id="rank"),
        pytest.param(root_says(fc1__out=9), r"_esper_elastic: fc1.out: .*capacity is 8", id="key beyond capacity"),
        pytest.param(root_says(fc1__out=2.0), r"_esper_elastic: fc1.out: .*expected an integer", id="key no integer"),
        pytest.param(root_says(fc2__in=5), r"fc2.in: expected 6, as for another axis", id="key disagrees with itself"),
        pytest.param(root_says(fc9__out=3), r"got fc9.out. Was it saved from another model", id="key unknown name"),
        pytest.param(replaced(torch.zeros(3)), r"expected a uint8 tensor of JSON", id="key garbage"),
        pytest.param(replaced(torch.empty(3, device="meta")), r"expected a uint8 tensor of JSON", id="key on meta"),
        pytest.param(replaced("widths"), r"expected a uint8 tensor of JSON", id="key no tensor"),
        pytest.param(lambda: Net(6, 2, 10).state_dict(), r"fc1.weight.*neither the capacity nor the active size", id="other capacity"),
    ],
)
def test_what_does_not_fit_is_refused_with_nothing_changed(state, message):
    net = Net()
    parameters, widths = snapshot(net)
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for Net:\n\t") as caught:
        net.load_state_dict(state())
    if message is None:  # torch's own, which reports plain layers after it has loaded the rest
        assert "size mismatch for plain.weight" in str(caught.value)
        return
    assert isinstance(caught.value, StateDictError | ValueError)
    assert caught.match(message)
    assert snapshot(net)[1] == widths
    assert all(torch.equal(a, b) for a, b in zip(snapshot(net)[0], parameters, strict=True))


def test_a_width_that_is_no_multiple_is_refused():
    net = Net(4, 4, step=2)
    with pytest.raises(StateDictError, match="expected a multiple of 2"):
        net.load_state_dict(dense_state(Net(3, 4)))
    with pytest.raises(StateDictError, match="expected a multiple of 2"):
        net.load_state_dict(Net(3, 4).state_dict())
    assert net.hidden.active == 4


def test_an_unknown_name_is_ignored_when_lenient():
    net = Net()
    net.load_state_dict(root_says(fc9__out=3)(), strict=False)
    assert net.hidden.active == 6


@pytest.mark.parametrize(("field", "value"), [("format", 2), ("journal", [{"edit": "add_layer"}])])
def test_what_this_version_cannot_honour_is_refused(field, value):
    state = Net(6, 2).state_dict()
    state[KEY] = torch.tensor(list(json.dumps(content(state) | {field: value}).encode()), dtype=torch.uint8)
    net = Net()
    with pytest.raises(StateDictError, match=f"{KEY}: {field}: expected"):
        net.load_state_dict(state)
    assert net.hidden.active == 3


def test_what_a_partial_key_does_not_name_stays():
    source, target = nn.ModuleDict({"fc1": ee.ElasticLinear(5, 6, max_out_features=8)}), Net()
    target.load_state_dict(source.state_dict(), strict=False)
    assert (target.hidden.active, target.second.active) == (6, 4)


def test_a_concatenation_alone_does_not_say_how_it_divides():
    target = nn.ModuleList([ee.ElasticLinear(7, 2, in_dim=ee.concat(ee.ElasticDim(3, 8), ee.ElasticDim(4, 8)))])
    with pytest.raises(StateDictError, match=r"axis of 10 has no unique division among 0.in.0, 0.in.1: set their widths first"):
        target.load_state_dict({"0.weight": torch.zeros(2, 10), "0.bias": torch.zeros(2)})
    target.load_state_dict(
        nn.ModuleList([ee.ElasticLinear(10, 2, in_dim=ee.concat(ee.ElasticDim(3, 8), ee.ElasticDim(7, 8)))]).state_dict()
    )
    assert [dim.active for dim in target[0].in_dim.dims] == [3, 7]
    target.load_state_dict(nn.ModuleList([nn.Linear(16, 2)]).state_dict())
    assert [dim.active for dim in target[0].in_dim.dims] == [3, 7]
    single = ee.ElasticLinear(10, 2, in_dim=target[0].in_dim, max_out_features=4)
    single.load_state_dict(nn.Linear(16, 3).state_dict())  # of active size, and only one division fills the axis
    assert [dim.active for dim in target[0].in_dim.dims] == [8, 8]


def test_a_multiple_of_a_dim_takes_multiples_alone():
    target = ee.ElasticLinear(6, 2, in_dim=ee.ElasticDim(3, 8) * 2)
    with pytest.raises(StateDictError, match="11 indices are no multiple of the 2 per unit of in"):
        target.load_state_dict(nn.Linear(11, 2).state_dict())
    target.load_state_dict(nn.Linear(10, 2).state_dict())
    assert target.in_dim.dims[0].active == 5


def test_a_commit_from_another_thread_leaves_tensors_alone():
    from concurrent.futures import ThreadPoolExecutor

    net = Net()
    parameters, _ = snapshot(net)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ee.errors.OwnerError):
        pool.submit(net.load_state_dict, Net(6, 2).state_dict()).result()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(net)[0], parameters, strict=True))


def test_a_layer_at_two_paths_loads_from_both():
    layer = ee.ElasticLinear(3, 3, max_in_features=5, max_out_features=5)
    model = nn.ModuleList([layer, layer])
    plain = nn.ModuleList([nn.Linear(2, 4)] * 2)
    model.load_state_dict(plain.state_dict())
    assert (layer.in_dim.active, layer.out_dim.active) == (2, 4)
    assert torch.equal(layer.active("weight"), plain[0].weight)
    with pytest.raises(StateDictError, match=r"1.weight.*should be 4: 0.out = 4 by 0.weight"):
        model.load_state_dict(plain.state_dict() | {"1.weight": torch.zeros(5, 2)})


def test_functional_call_takes_a_state_dict():
    net, x = Net(), torch.randn(2, 5)
    doubled = {key: value * 2 if value.is_floating_point() else value for key, value in net.state_dict().items()}
    expected = net(x)
    assert not torch.equal(torch.func.functional_call(net, doubled, (x,)), expected)
    assert torch.equal(net(x), expected) and not hasattr(net, KEY)


def test_distributed_checkpoint_sees_the_key():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    source, target = Net(6, 2), Net()
    state = get_model_state_dict(source)
    assert KEY in state
    set_model_state_dict(target, state)
    assert (target.hidden.active, target.second.active) == (6, 2)


def test_a_hook_that_renames_keys_still_works():
    layer = ee.ElasticLinear(2, 2, max_out_features=4)
    layer.register_load_state_dict_pre_hook(lambda module, state, *rest: state.update(weight=state.pop("kernel")))
    layer.load_state_dict({"kernel": torch.ones(4, 2), "bias": torch.zeros(4)})
    assert (layer.weight == 1).all()


class ConvNet(nn.Module):
    """Convolutions, plain and depthwise, a norm with statistics, and a flatten before the classifier."""

    def __init__(self, width: int, capacity: int, elastic: bool = True) -> None:
        super().__init__()
        if elastic:
            dim = ee.ElasticDim(width, capacity)
            self.conv = ee.ElasticConv2d(1, width, 3, out_dim=dim)
            self.norm = ee.ElasticBatchNorm2d(width, dim=dim)
            self.depth = ee.ElasticConv2d(width, width, 3, groups=width, in_dim=dim)
            self.head = ee.ElasticLinear(4 * width, 3, in_dim=dim * 4)
        else:
            self.conv = nn.Conv2d(1, width, 3)
            self.norm = nn.BatchNorm2d(width)
            self.depth = nn.Conv2d(width, width, 3, groups=width)
            self.head = nn.Linear(4 * width, 3)

    def forward(self, x):
        return self.head(self.depth(self.norm(self.conv(x)).relu()).flatten(1))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_convolutions_and_statistics_take_plain_checkpoints(assign):
    plain, net, x = ConvNet(5, 5, elastic=False), ConvNet(3, 8), torch.randn(4, 1, 6, 6)
    for _ in range(3):
        plain(x)
    with torch.no_grad():
        net.norm.running_mean[3:] = 7
    net.load_state_dict(plain.state_dict(), assign=assign)
    assert net.norm.dim.active == 5 and net.norm.num_batches_tracked == 3
    assert net.norm.running_mean[5:].eq(7).all()
    assert torch.allclose(net.eval()(x), plain.eval()(x), atol=1e-5)
    with pytest.raises(StateDictError, match=r"head.weight.*axis of 18 should be 20"):
        net.load_state_dict(plain.state_dict() | {"head.weight": torch.zeros(3, 18)})
    with pytest.raises(StateDictError, match=r"conv.weight.*neither the capacity nor the active size"):
        net.load_state_dict(plain.state_dict() | {"conv.weight": torch.zeros(5, 1, 3, 2)})


def test_statistics_travel_at_capacity_with_the_key():
    source, target, x = ConvNet(5, 8), ConvNet(3, 8), torch.randn(4, 1, 6, 6)
    source(x)
    state = copy.deepcopy(source.state_dict())
    assert content(state)["widths"]["conv.out"] == 5 and state["norm.running_var"].shape == (8,)
    target.load_state_dict(state)
    assert target.norm.num_batches_tracked == 1
    assert torch.equal(target.eval()(x), source.eval()(x))
    equal = ConvNet(8, 8, elastic=False)
    assert equal.load_state_dict(state, strict=False).unexpected_keys == [KEY]
    assert equal.load_state_dict(state, strict=False).missing_keys == []
