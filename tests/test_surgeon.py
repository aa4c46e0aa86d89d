"""The surgeon: each edit keeps what it says that it keeps, on plain models of many kinds, and refuses what it cannot do, by name."""

import copy
import pickle
import re

import pytest
import torch
from surgery_net import difference, gives, images, net, surgeon
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.surgery.edits.edited import Edited
from esper_elastic.surgery.edits.skip import Skip

EXACT = 1e-12


def assert_trains(model: nn.Module, x: Tensor) -> None:
    """Every parameter of the edited model gets a gradient, in training, within two steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    seen: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        seen |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}
        optimizer.step()
    assert seen == {name for name, _ in model.named_parameters()}


def assert_survives(model: nn.Module, x: Tensor) -> None:
    """Copies and pickles of the edited model compute the same."""
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(gives(twin, x), gives(model, x))
        assert list(twin.state_dict()) == list(model.state_dict())


# Adding layers


@pytest.mark.parametrize("layer", ["conv", "depthwise", "norm", "sequential", "relu", "dropout", "prelu"])
@pytest.mark.parametrize(
    "position", ["after_conv1", "before_conv2", "after_blocks.0.conv1", "after_blocks", "before_blocks.1", "after_stages.0"]
)
def test_an_inserted_layer_keeps_the_function(layer: str, position: str) -> None:
    model, x = net(), images(2)
    before, keys = gives(model, x), list(model.state_dict())
    path = position.partition("_")[2]
    host = model.get_submodule(path)
    out = position.startswith("after")
    channels = next(
        n
        for part in (reversed(list(host.modules())) if out else host.modules())
        if (n := getattr(part, "out_channels" if out else "in_channels", None))
    )
    made = {
        "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1),
        "depthwise": lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        "norm": lambda: nn.BatchNorm2d(channels),
        "sequential": lambda: nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1)),
        "relu": nn.ReLU,
        "dropout": lambda: nn.Dropout(0.5),
        "prelu": nn.PReLU,
    }[layer]()
    result = surgeon().add_layer(model, position, made)
    assert result, result
    assert model.get_submodule(result.details["name"]) is made and result.details["function_kept"]
    assert difference(model, before, x) == 0
    assert [key for key in model.state_dict() if key in keys] == keys
    assert type(host) is not type(net().get_submodule(path)) and isinstance(host, type(net().get_submodule(path)))
    assert next(made.parameters(), x).dtype == torch.float64
    assert_trains(model, x)
    assert_survives(model, x)


@pytest.mark.parametrize(
    ("position", "taken"), [("after_conv1", 8), ("after_conv2", 12), ("after_blocks.0.conv1", 24), ("before_blocks.0", 12)]
)
@pytest.mark.parametrize("preserve", [True, False])
def test_more_channels_reach_everything_behind(position: str, taken: int, preserve: bool) -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    made = nn.Conv2d(taken, 2 * taken, 3, padding=1)
    weight = made.weight.detach().double().clone()
    result = surgeon().add_layer(model, position, made, preserve=preserve)
    assert result, result
    assert made.out_channels == 2 * taken and made.weight.shape[0] == 2 * taken
    if preserve:
        assert difference(model, before, x) <= EXACT and torch.equal(made.weight[taken:], weight[taken:])
    else:
        assert torch.equal(made.weight, weight) and difference(model, before, x) > 1e-6
    assert_trains(model, x)
    assert_survives(model, x)


def test_any_layer_can_widen_what_follows() -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    made = nn.Sequential(nn.Conv2d(12, 20, 1), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1))
    result = surgeon().add_layer(model, "after_blocks.0", made)
    assert result, result
    assert difference(model, before, x) <= EXACT and model.blocks[1].conv1.in_channels == 20
    assert_trains(model, x)


class Gated(nn.Module):
    """Takes the channels of one layer in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 300)
        self.outer = nn.Linear(150, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.outer(value * torch.sigmoid(gate))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_more_channels_where_code_takes_them_in_parts(dtype: torch.dtype) -> None:
    """The identity passes on each unit to where its part goes on."""
    model, x = Gated().to(dtype), torch.randn(3, 6, dtype=dtype)
    before = gives(model, x)
    assert ee.ModelSurgeon(x).add_layer(model, "after_inner", nn.Linear(300, 310))
    assert difference(model, before, x) <= (EXACT if dtype is torch.float64 else 0.05) and model.outer.in_features == 155
    refused(ee.ModelSurgeon(x).add_layer(model, "after_inner", nn.Sequential(nn.Linear(310, 320), nn.ReLU())), "in several parts")
    assert ee.ModelSurgeon(x).add_layer(model, "after_inner", nn.Sequential(nn.Linear(310, 320), nn.ReLU()), preserve=False)
    gives(model, x)


def test_fewer_channels_are_done_and_told() -> None:
    model, x = net(), images(2)
    result = surgeon().add_layer(model, "after_conv2", nn.Conv2d(12, 6, 1))
    assert result and not result.details["function_kept"] and model.bn2.num_features == 6
    assert gives(model, x).shape == (2, 6)
    assert_trains(model, x)


def test_layers_stack_in_the_order_of_their_insertion() -> None:
    model, x = net(), images(2)
    first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    hand = surgeon()
    for layer in (first, second):
        assert hand.add_layer(model, "after_conv1", layer, preserve=False)
    with torch.no_grad():
        inner = second(first(nn.Conv2d.forward(model.conv1, x)))
    assert torch.equal(gives(model.conv1, x), inner)
    between = nn.Conv2d(8, 8, 1)
    assert hand.add_layer(model, "before_conv1.edits.after_1", between, preserve=False)
    with torch.no_grad():
        inner = between(first(nn.Conv2d.forward(model.conv1, x)))
        assert torch.equal(gives(model.conv1, x), nn.Conv2d.forward(second, inner))


def test_hooks_of_the_module_see_its_own_output() -> None:
    model, x = net(), images(2)
    seen: list[Tensor] = []
    model.conv1.register_forward_hook(lambda module, args, result: seen.append(result))
    expected = gives(model.conv1, x)
    seen.clear()
    assert surgeon().add_layer(model, "after_conv1", nn.ReLU(), preserve=False)
    gives(model, x)
    assert torch.equal(seen[0], expected)


# Removing layers


def test_a_removed_layer_is_gone() -> None:
    model, x = net(), images(2)
    gone = model.blocks[0].conv1
    for path in ("dropout", "bn1", "stages.0", "blocks.0"):
        result = surgeon().remove_layer(model, path)
        assert result, result
        assert path not in dict(model.named_modules())
    assert gone not in list(model.modules()) and len(model.blocks) == 1 and len(model.stages) == 2
    assert gives(model, x).shape == (2, 6)
    assert_trains(model, x)
    assert_survives(model, x)


@pytest.mark.parametrize("path", ["bn1", "bn2", "blocks.0.bn1"])
def test_a_removed_norm_is_folded(path: str) -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    result = surgeon().remove_layer(model, path)
    assert result and result.details["function_kept"] and path not in dict(model.named_modules())
    assert difference(model, before, x) <= EXACT
    assert_trains(model, x)


@pytest.mark.parametrize("path", ["fc1", "fc2"])
def test_linear_maps_in_a_row_become_one(path: str) -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    result = surgeon().remove_layer(model, path)
    assert result and result.details["function_kept"], result
    assert difference(model, before, x) <= EXACT
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in net().parameters())
    assert_trains(model, x)
    assert_survives(model, x)


def test_a_projection_is_fitted_where_shapes_differ() -> None:
    model, x = net(), images(1)
    with torch.no_grad():
        wanted = gives(model.conv2, torch.relu(model.bn1(model.conv1(x))))
    result = surgeon().remove_layer(model, "conv2")
    assert result and not result.details["function_kept"]
    bridge = model.get_submodule("edits.bridge_conv2")
    with torch.no_grad():
        given = gives(bridge, torch.relu(model.bn1(model.conv1(x))))
    assert given.shape == wanted.shape
    assert (given - wanted).square().mean() < 0.7 * (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    assert_trains(model, x)
    assert_survives(model, x)


def test_an_inserted_layer_can_be_removed_again() -> None:
    model, x = net(), images(2)
    before, classes = gives(model, x), [type(module) for module in model.modules()]
    hand = surgeon()
    added = hand.add_layer(model, "after_conv1", nn.BatchNorm2d(8))
    assert hand.remove_layer(model, added.details["name"])
    assert [type(module) for module in model.modules()] == classes
    assert difference(model, before, x) == 0


# Skips


@pytest.mark.parametrize(
    ("source", "target"),
    [("conv1", "bn1"), ("conv1", "conv2"), ("blocks.0", "blocks.1"), ("conv2", "fc1"), ("blocks.0.conv1", "stages.1"), ("fc1", "fc2")],
)
def test_a_skip_adds_one_output_to_another(source: str, target: str) -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    classes = [type(module) for module in model.modules()]
    hand = surgeon()
    result = hand.add_skip_connection(model, source, target)
    assert result, result
    assert difference(model, before, x) == 0
    skip = model.get_submodule(result.details["name"])
    assert isinstance(skip, Skip)
    assert_trains(model, x)
    assert_survives(model, x)
    with torch.no_grad():
        for parameter in skip.parameters():
            parameter.add_(0.5)
    assert difference(model, before, x) > 1e-3
    assert hand.remove_skip_connection(model, result.details["name"])
    assert difference(model, before, x) == 0 and [type(module) for module in model.modules()] == classes


def test_a_skip_goes_with_its_ends() -> None:
    model, x = net(), images(2)
    hand = surgeon()
    assert hand.add_skip_connection(model, "blocks.0.conv1", "stages.0") and hand.add_skip_connection(model, "conv1", "blocks.0")
    assert hand.remove_layer(model, "blocks.0")
    assert not any(isinstance(module, Skip) for module in model.modules())
    assert not isinstance(model.conv1, Edited)
    gives(model, x)


# Changing layers


CHANGES = [
    ("conv1", {"out_channels": 12}),
    ("conv2", {"in_channels": 12}),
    ("conv2", {"out_channels": 16}),
    ("blocks.0.conv1", {"out_channels": 30}),
    ("bn1", {"num_features": 10}),
    ("fc1", {"out_features": 14}),
    ("conv1", {"kernel_size": 5}),
    ("conv1", {"kernel_size": (5, 7)}),
    ("conv1", {"kernel_size": 4}),
    ("stages.0", {"kernel_size": 3}),
    ("stages.1", {"groups": 2}),
    ("blocks.0.conv1", {"bias": True}),
    ("conv1", {"out_channels": 10, "kernel_size": 5}),
    ("dropout", {"p": 0.3}),
]


@pytest.mark.parametrize(("path", "config"), CHANGES)
def test_a_change_that_only_adds_keeps_the_function(path: str, config: dict[str, object]) -> None:
    model, x = net(), images(2)
    before, modules = gives(model, x), list(model.modules())
    result = surgeon().modify_layer(model, path, config)
    assert result and result.details["function_kept"], result
    assert difference(model, before, x) <= EXACT
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    layer = model.get_submodule(path)
    for name, value in config.items():
        got = getattr(layer, name)
        assert isinstance(got, nn.Parameter) if name == "bias" else got in (value, (value, value))
    assert_trains(model, x)
    assert_survives(model, x)


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("conv1", {"out_channels": 6}),
        ("conv2", {"stride": 1}),
        ("conv2", {"kernel_size": 1}),
        ("blocks.1.conv1", {"dilation": 2, "padding": 2}),
        ("stages.1", {"groups": 2, "bias": False}),
        ("fc1", {"bias": False, "out_features": 7}),
        ("blocks.0.relu", {"activation": "gelu"}),
        ("bn1", {"eps": 1e-3, "momentum": None}),
    ],
)
def test_a_change_that_takes_away_is_done_and_told(path: str, config: dict[str, object]) -> None:
    model, x = net(), images(2)
    result = surgeon().modify_layer(model, path, config)
    assert result and not result.details["function_kept"], result
    assert gives(model, x).shape == (2, 6)
    assert_trains(model, x)
    assert_survives(model, x)


def test_the_last_layer_can_have_other_outputs() -> None:
    model, x = net(), images(2)
    before = gives(model, x)
    result = surgeon().modify_layer(model, "fc2", {"out_features": 9})
    assert result and not result.details["function_kept"]
    assert re.search(r"gives \(2, 9\).*gave \(2, 6\)", result.details["warnings"][0])
    assert (gives(model, x)[:, :6] - before).abs().max() <= EXACT  # another shape is summed in another order
    assert_trains(model, x)


def test_the_overlap_of_windows_is_kept() -> None:
    model = net()
    weight = model.conv1.weight.detach().clone()
    assert surgeon().modify_layer(model, "conv1", {"kernel_size": 5})
    assert torch.equal(model.conv1.weight[..., 1:4, 1:4], weight) and model.conv1.padding == (2, 2)
    assert surgeon().modify_layer(model, "conv1", {"kernel_size": 3})
    assert torch.equal(model.conv1.weight, weight) and model.conv1.padding == (1, 1)


# Refusals


def refused(result: ee.SurgeryResult, message: str) -> None:
    assert not result and not result.success and result.details == {}
    assert isinstance(result.error, ee.SurgeryError) and re.search(message, str(result.error), re.S), result.error


def test_refusals_say_why_and_change_nothing() -> None:
    model, x = net(), images(2)
    before, classes = gives(model, x), [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    hand = surgeon()
    refused(hand.add_layer(model, "conv1", nn.ReLU()), "expected 'before_<path>' or 'after_<path>'.*got 'conv1'")
    refused(hand.add_layer(model, "after_conv9", nn.ReLU()), "'conv9' names no module of Net.*conv")
    refused(hand.add_layer(model, "after_conv1", model.conv2), "it is in the model already, as 'conv2'")
    refused(hand.add_layer(model, "after_conv1", model), "holds the model")
    refused(hand.add_layer(model, "after_conv1", nn.Conv2d(9, 9, 1)), r"does not take an input of shape \(2, 8, 10, 10\)")
    refused(hand.add_layer(model, "after_conv1", "ReLU"), "expected an nn.Module or a LayerSpec, got str")
    refused(hand.add_layer(model, "after_conv1", nn.Flatten(), preserve=False), "after the edit the model fails")
    refused(hand.add_layer(model, "after_conv1", nn.ReLU(), preserve=1), "preserve: expected True or False, got 1")
    refused(hand.remove_layer(model, "conv7"), "names no module")
    refused(hand.remove_layer(model, ""), "got the model itself")
    refused(hand.modify_layer(model, "conv1", {}), "expected a dict of what to change")
    refused(hand.modify_layer(model, "conv1", {"out_chanels": 4}), "'out_chanels' is nothing that can be changed here.*out_channels")
    refused(hand.modify_layer(model, "conv1", {"out_channels": 0}), "out_channels: expected an integer from 1 to 1048576, got 0")
    refused(hand.modify_layer(model, "conv1", {"out_channels": True}), "got True")
    refused(hand.modify_layer(model, "conv1", {"padding_mode": "reflect"}), "nothing that can be changed")
    refused(hand.modify_layer(model, "stages.1", {"groups": 3}), "groups: expected a divisor of 12 and 16 channels, got 3")
    refused(hand.modify_layer(model, "conv2", {"kernel_size": 4}), "no padding lets a window")
    refused(hand.modify_layer(model, "blocks.0", {"p": 0.1}), "nothing that can be changed")
    refused(hand.modify_layer(model, "dropout", {"p": 2}), "expected a probability")
    refused(hand.add_skip_connection(model, "conv2", "conv1"), "its source has not run before its target")
    refused(hand.add_skip_connection(model, "conv1", "conv1"), "the target is the source")
    refused(hand.add_skip_connection(model, "blocks", "blocks.0"), "the target lies inside of the source")
    refused(hand.remove_skip_connection(model, "conv1"), "expected a skip that add_skip_connection made, got Conv2d.*none")
    assert difference(model, before, x) == 0 and list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes


def test_a_refused_layer_is_as_it_was_given() -> None:
    layer = nn.Conv2d(8, 16, 3, padding=2).eval()
    weight, pointer = layer.weight.detach().clone(), layer.weight.data_ptr()
    refused(surgeon().add_layer(net(), "after_blocks.0", layer), "does not take")
    refused(surgeon().add_layer(net(), "after_stages.1", nn.Sequential(nn.Conv2d(16, 8, 1), layer, nn.Flatten())), "the model fails")
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, weight) and layer.weight.data_ptr() == pointer
    assert not layer.training and layer.weight.shape == (16, 8, 3, 3)


def test_a_module_that_is_called_twice_or_never_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.read = nn.Linear(4, 4)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.shared(self.relu(self.shared(x))))
            return nn.functional.linear(x, self.read.weight)

    model, hand = Odd(), ee.ModelSurgeon(torch.randn(2, 4))
    refused(hand.add_layer(model, "after_shared", nn.ReLU()), "'shared' .Linear. has parameters and is called 2 times")
    refused(hand.remove_layer(model, "read"), "'read' .Linear. is never called as a module in Odd's forward")
    refused(hand.modify_layer(model, "read", {"bias": False}), "never called")
    assert hand.add_layer(model, "after_relu", nn.ReLU())


# Plans


def test_a_plan_touches_nothing_and_tells_everything() -> None:
    model = net()
    before = [(id(p), p.shape) for p in model.parameters()]
    layer = nn.Conv2d(12, 24, 3, padding=1)
    weight = layer.weight.detach().clone()
    plan = surgeon().plan_add_layer(model, "after_conv2", layer)
    assert plan and "bn2" in str(plan) and "blocks.0.conv1.weight" in str(plan) and "function kept" in str(plan)
    assert [(id(p), p.shape) for p in model.parameters()] == before and torch.equal(layer.weight, weight)
    assert not any(isinstance(module, Edited) for module in model.modules())
    refused_plan = surgeon().plan_remove_layer(model, "conv9")
    assert not refused_plan and "would be refused: 'conv9' names no module" in str(refused_plan)
    for made in (
        surgeon().plan_remove_layer(model, "conv2"),
        surgeon().plan_modify_layer(model, "conv2", {"out_channels": 14}),
        surgeon().plan_add_skip_connection(model, "conv1", "conv2"),
    ):
        assert made, made
    assert [(id(p), p.shape) for p in model.parameters()] == before


@pytest.mark.parametrize("side", [28, 20, 36])
def test_an_input_is_derived_for_a_classifier_of_another_size(side: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * (side // 2) ** 2, 5))
    x = torch.randn(2, 1, side, side)
    before = gives(model, x)
    assert ee.ModelSurgeon().add_layer(model, "after_1", nn.Conv2d(6, 9, 3, padding=1))
    assert difference(model, before, x) <= 1e-5 and model[4].in_features == 9 * (side // 2) ** 2


def test_a_compiled_model_is_edited_within() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters())
    with ee.transaction(compiled, optimizer):
        assert surgeon().add_layer(compiled, "after_conv1", nn.Conv2d(8, 8, 1))
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert ee.journal(compiled) == ee.journal(model) and len(ee.journal(model)) == 1


def test_a_wrapper_that_keeps_account_of_parameters_is_refused() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    refused(
        surgeon().add_layer(DistributedDataParallel(net()), "after_module.conv1", nn.ReLU()), "Edit what is inside .model.module. and wrap"
    )
    refused(surgeon().remove_layer("net", "conv1"), "model: expected an nn.Module, got str")
