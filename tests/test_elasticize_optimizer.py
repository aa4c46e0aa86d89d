"""Optimizers that have stepped a model before it becomes elastic: they go on as if nothing had happened, and sleep with what sleeps."""

import copy
import warnings

import pytest
import torch
from contract import dormant_mask
from converting import assert_close, elastic_layers, poison
from plain_net import DIMS, fingerprint, net, pictures
from torch import Tensor, nn
from torch.optim import Optimizer

import esper_elastic as ee
from esper_elastic.errors import OptimizerError

OPTIMIZERS = {
    "ours AdamW": lambda params: ee.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "ours SGD": lambda params: ee.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True, foreach=False),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(pictures()).square().sum().backward()
    optimizer.step()


def stepped(name: str, steps: int = 3) -> tuple[nn.Module, Optimizer]:
    model = net().train()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def poison_state(model: nn.Module, optimizer: Optimizer) -> None:
    """Fill the dormant part of what an optimizer keeps of a parameter's shape with NaN."""
    for layer in elastic_layers(model).values():
        for name, axes in layer.tensor_axes().items():
            for value in optimizer.state.get(layer.storage(name), {}).values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == layer.storage(name).shape and value.dim():
                    value.masked_fill_(dormant_mask(value, axes), float("nan"))


def assert_equal_parameters(elastic: nn.Module, plain: nn.Module, tolerance: float = 0.0) -> None:
    """To the last bit; with a tolerance, weights alone: the gradient of a bias before a batch norm is nothing but rounding."""
    for (name, one), other in zip(ee.export(elastic).named_parameters(), plain.parameters(), strict=True):
        if not tolerance or one.dim() > 1:
            assert_close(one.detach(), other.detach(), name, tolerance)


@pytest.mark.parametrize("capacity", [1.0, 2.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_at_full_width_are_those_of_a_twin_that_was_left_alone(name, capacity):
    model, optimizer = stepped(name)
    twin, other = stepped(name)
    parameters, kind, groups = list(model.parameters()), type(optimizer), optimizer.param_groups
    ee.elasticize(model, pictures(), capacity=capacity, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert isinstance(optimizer, kind) and optimizer.param_groups is groups
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in parameters] and set(optimizer.state) == set(parameters)
    poison(model)
    poison_state(model, optimizer)
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    # Adafactor takes the norm of each tensor, which sums a strided slice in another order
    assert_equal_parameters(model, twin, tolerance=1e-14 if name == "Adafactor" else 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_sleeps_comes_back_bit_for_bit_and_learns_again(name):
    model, optimizer = stepped(name)
    ee.elasticize(model, pictures(), capacity=2.0, optimizer=optimizer)
    narrow = {"stem": 5, "layer1.0.conv1": 3, "layer1.1.conv1": 11}
    ee.resize(model, narrow)
    layers = elastic_layers(model)
    asleep = {
        (path, key): dormant_mask(layer.storage(key), axes) for path, layer in layers.items() for key, axes in layer.tensor_axes().items()
    }

    def sleepers() -> list[Tensor]:
        found = []
        for (path, key), mask in asleep.items():
            storage = layers[path].storage(key)
            found.append(storage.detach()[mask])
            state = optimizer.state.get(storage, {}).values()
            found += [value[mask] for value in state if isinstance(value, Tensor) and value.shape == mask.shape]
        return found

    before = sleepers()
    for _ in range(2):
        step(model, optimizer)
    after = sleepers()
    assert len(before) == len(after) > 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    ee.resize(model, {name: dim.capacity for name, dim in ee.dims(model).items()})  # those beyond the original size have never been awake
    before = [layer.weight.detach().clone() for layer in layers.values()]
    for _ in range(2):
        step(model, optimizer)
    moved = [(layer.weight - old).ne(0).double().mean() for layer, old in zip(layers.values(), before, strict=True)]
    assert all(share > 0.9 for share in moved), moved
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_state_of_units_that_are_yet_to_wake_is_that_before_a_first_step():
    model, optimizer = stepped("Rprop")
    ee.elasticize(model, pictures(), capacity=2.0, optimizer=optimizer)
    step_size = optimizer.state[model.stem.weight]["step_size"]
    assert step_size.shape == (24, 3, 3, 3) and (step_size[12:] == 1e-2).all()  # zero would keep them for ever
    model, optimizer = stepped("Adafactor")
    ee.elasticize(model, pictures(), capacity=2.0, optimizer=optimizer)
    kept = optimizer.state[model.layer1[0].conv1.weight]
    assert (kept["row_var"].shape, kept["col_var"].shape) == ((40, 24, 3, 1), (40, 24, 1, 3))


@pytest.mark.parametrize("name", ["ours AdamW", "AdamW"])
def test_groups_frozen_parameters_and_schedulers_go_on(name):
    def build() -> tuple[nn.Module, Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = net().train()
        model.norm.requires_grad_(False)
        kind = ee.optim.AdamW if name.startswith("ours") else torch.optim.AdamW
        head, rest = list(model.head.parameters()), [p for key, p in model.named_parameters() if not key.startswith("head")]
        optimizer = kind([{"params": head, "lr": 5e-2, "weight_decay": 0.0}, {"params": rest}], lr=1e-2, weight_decay=0.2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.02], total_steps=9)
        for _ in range(2):
            step(model, optimizer)
            scheduler.step()
        return model, optimizer, scheduler

    (model, optimizer, scheduler), (twin, other, beat) = build(), build()
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    ee.elasticize(model, pictures(), capacity=2.0, optimizer=optimizer)
    poison(model)
    assert groups == [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert not any(p.requires_grad for p in model.norm.parameters())
    for _ in range(4):
        for each, its, schedule in ((model, optimizer, scheduler), (twin, other, beat)):
            step(each, its)
            schedule.step()
    assert scheduler.get_last_lr() == beat.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
    assert_equal_parameters(model, twin)
    loaded = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(loaded)
    step(model, optimizer)


# An optimizer in use that is not given


def test_ours_go_on_without_being_given():
    model, optimizer = stepped("ours AdamW")
    twin, other = stepped("ours AdamW")
    ee.elasticize(model, pictures(), capacity=2.0)
    poison(model)
    for _ in range(2):
        step(model, optimizer)
        step(twin, other)
    assert_equal_parameters(model, twin)


def test_counts_of_a_parameter_of_four_units_are_not_taken_for_its_state():
    """Packed, they are four numbers as well."""

    def stepped() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = ee.optim.AdamW(model.parameters(), lr=1e-2)
        step(model, optimizer)
        return model, optimizer

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    (model, optimizer), (twin, other) = stepped(), stepped()
    ee.elasticize(model, torch.ones(2, 3), capacity=2.0)
    step(model, optimizer)
    step(twin, other)
    assert_equal_parameters(model, twin)


def test_another_with_state_is_refused_where_tensors_grow():
    model, optimizer = stepped("AdamW")
    before = fingerprint(model)
    match = (
        r"elasticize: AdamW holds state for a parameter of shape \(\d+,.*Pass it as optimizer=, or clear it \(optimizer\.state\.clear\(\)\)"
    )
    with pytest.raises(OptimizerError, match=match):
        ee.elasticize(model, pictures(), capacity=2.0)
    assert fingerprint(model) == before
    step(model, optimizer)
    optimizer.state.clear()
    ee.elasticize(model, pictures(), capacity=2.0)


def test_another_goes_on_where_nothing_grows_and_warns_when_something_sleeps():
    model, optimizer = stepped("AdamW")
    twin, other = stepped("AdamW")
    ee.elasticize(model, pictures())
    with warnings.catch_warnings(action="error"):
        step(model, optimizer)
    step(twin, other)
    assert_equal_parameters(model, twin)
    ee.dims(model)["stem"].resize(7)
    with pytest.warns(
        UserWarning, match=r"AdamW steps elastic parameters of which a part is dormant.*ee\.optim\.guard\(optimizer, model\)"
    ):
        step(model, optimizer)


# Optimizers that are refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        pytest.param(lambda m: torch.optim.LBFGS(m.parameters()), r"guard: cannot serve LBFGS: its direction is one product", id="LBFGS"),
        pytest.param(lambda m: torch.optim.SGD(net().parameters(), lr=0.1), r"expected SGD to hold parameters of the model", id="stranger"),
        pytest.param(lambda m: torch.optim.Adam(m.parameters(), differentiable=True), r"differentiable=True", id="differentiable"),
    ],
)
def test_a_refused_optimizer_leaves_everything_as_it_was(make, match):
    model = net().train()
    model(pictures()).sum().backward()
    optimizer = make(model)
    before, kind, attributes = fingerprint(model), type(optimizer), dict(vars(optimizer))
    with pytest.raises(OptimizerError, match=match):
        ee.elasticize(model, pictures(), capacity=2.0, optimizer=optimizer)
    assert fingerprint(model) == before
    assert type(optimizer) is kind and vars(optimizer) == attributes
    assert {name: dim.active for name, dim in ee.dims(ee.elasticize(model, pictures(), capacity=2.0)).items()} == DIMS


def test_what_is_no_optimizer_is_refused():
    model = net()
    before = fingerprint(model)
    with pytest.raises(ee.ConversionError, match=r"optimizer: expected a torch\.optim\.Optimizer, got list"):
        ee.elasticize(model, pictures(), optimizer=[1])
    assert fingerprint(model) == before


@pytest.mark.parametrize("width", [4, 5])
def test_counts_of_updates_follow_whatever_their_length(width):
    """The counts of a bias of four, updated once, take four numbers themselves."""
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
    optimizer = ee.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    ee.elasticize(model, torch.randn(2, 3), capacity=2.0, optimizer=optimizer)
    assert optimizer.step_counts(model[0].bias).tolist() == [1] * width + [0] * width
    assert optimizer.step_counts(model[2].weight).tolist() == [[1] * width + [0] * width] * 2
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.step_counts(model[0].bias).tolist() == [2] * width + [0] * width
