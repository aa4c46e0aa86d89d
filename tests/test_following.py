"""What follows the parameters of a model that is edited: optimizer groups, state, step counts, and averages of the weights."""

import copy
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from editing import Net, grow_plain, insert_plain, plain, widen
from torch import Tensor, nn
from torch.optim import Optimizer

import esper_elastic as ee
from esper_elastic.errors import OptimizerError, TransactionError
from esper_elastic.surgery.transaction import transaction, twins
from esper_elastic.surgery.undo import added, moved, removed

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, centered=True, momentum=0.9),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "ours AdamW": lambda params: ee.optim.AdamW(params, lr=1e-2),
    "ours SGD": lambda params: ee.optim.SGD(params, lr=1e-2, momentum=0.9),
}


def pictures() -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(pictures()).square().mean().backward()
    optimizer.step()


def stepped(name: str, **groups: Any) -> tuple[Net, Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def edited(model: nn.Module, edit: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
    with transaction(model, *args, validate=False, **kwargs):
        return edit(model)


@pytest.mark.parametrize("given", [True, False], ids=["given", "known"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_of_what_is_kept_is_carried_bit_for_bit(name, given):
    model, optimizer = stepped(name)
    weight = model.conv1.weight
    kept = dict(optimizer.state[weight])
    before = {key: value.clone() for key, value in kept.items() if isinstance(value, Tensor)}
    edited(model, grow_plain, *[optimizer] * given)
    assert model.conv1.weight is weight and weight.shape == (8, 3, 3, 3)
    carried = 0
    for key, old in before.items():
        new = optimizer.state[weight][key]
        if old.dim() == 4:
            assert new is kept[key]
            assert new.shape == tuple(8 if size == 6 else size for size in old.shape)
            assert torch.equal(new[:6] if old.shape[0] == 6 else new, old)
            initial = {"Rprop": 1e-2, "Adagrad": 0.1}.get(name, 0.0) if key in ("step_size", "sum") else 0.0
            assert (new[old.shape[0] :] == initial).all()
            carried += 1
    assert carried
    narrow = optimizer.state[model.body[1].weight]
    assert all(
        value.shape in ((6, 8, 3, 3), (6, 8, 3, 1), (6, 1, 3, 3), (6, 8, 1, 3))
        for value in narrow.values()
        if value is not None and value.dim() == 4
    )
    old = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), old, strict=True)) > 6


@pytest.mark.parametrize("name", ["AdamW", "SGD", "ours AdamW", "ours SGD"])
def test_steps_of_what_is_kept_are_those_of_a_twin(name):
    """The new channels are zero and stay so: the others train as if nothing had been done."""
    model, optimizer = stepped(name)
    twin, other = stepped(name)
    for each in (optimizer, other):
        for group in each.param_groups:
            group["weight_decay"] = 0.0
    edited(model, grow_plain, optimizer)
    for norm in (model.bn1,):
        norm.weight.data[6:] = 0.0
    model.body[1].weight.requires_grad_(False)
    twin.body[1].weight.requires_grad_(False)
    for _ in range(3):
        step(model, optimizer)
        step(twin, other)
    for one, mine in zip(model.parameters(), twin.parameters(), strict=True):
        part = one[tuple(slice(size) for size in mine.shape)]
        torch.testing.assert_close(part, mine, rtol=1e-5, atol=1e-7)


def test_step_counts_of_what_is_new_begin_at_zero():
    model, optimizer = stepped("ours AdamW")
    edited(model, grow_plain, optimizer)
    counts = optimizer.step_counts(model.conv1.weight)
    assert (counts[:6] == 3).all() and (counts[6:] == 0).all()
    counts = optimizer.step_counts(model.body[1].weight)
    assert (counts[:, :6] == 3).all() and (counts[:, 6:] == 0).all()
    counts = optimizer.step_counts(model.bn1.weight)
    assert counts.tolist() == [3] * 6 + [0] * 2
    step(model, optimizer)
    assert optimizer.step_counts(model.bn1.bias).tolist() == [4] * 6 + [1] * 2


def test_counts_of_four_units_are_not_taken_for_state():
    """Packed, they are four numbers as well."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = ee.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()

    def grow(model: nn.Linear) -> None:
        widen(model.weight, 0, 6)
        widen(model.bias, 0, 6)

    edited(model, grow, optimizer)
    assert optimizer.step_counts(model.bias).tolist() == [1, 1, 1, 1, 0, 0]


def test_without_state_all_of_a_grown_parameter_is_stepped():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = ee.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    edited(model, lambda model: (widen(model.weight, 0, 6), widen(model.bias, 0, 6)), optimizer)
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert (model.weight[4:] == -0.2).all() and (model.bias[4:] == -0.2).all()


def test_factored_state_is_that_of_a_unit_which_is_kept():
    model, optimizer = stepped("Adafactor")
    weight = model.head.weight
    rows, columns = (optimizer.state[weight][key].clone() for key in ("row_var", "col_var"))
    assert (rows.shape, columns.shape) == ((4, 1), (1, 6))

    def edit(model: Any) -> None:
        weight.grad = None
        weight.data = torch.zeros(6, 6)
        moved(weight, (4, 6), lambda made, kept: made[3:5].copy_(kept[1:3]))

    edited(model, edit, optimizer)
    after = optimizer.state[weight]
    assert torch.equal(after["row_var"][3:5], rows[1:3]) and after["row_var"].flatten().nonzero().flatten().tolist() == [3, 4]
    assert torch.equal(after["col_var"], columns)


def test_a_guarded_optimizer_follows():
    model, optimizer = stepped("AdamW")
    ee.optim.guard(optimizer, model)
    before = optimizer.state[model.conv1.weight]["exp_avg"].clone()
    edited(model, grow_plain, optimizer)
    assert torch.equal(optimizer.state[model.conv1.weight]["exp_avg"][:6], before)
    step(model, optimizer)


# Groups


def test_a_new_parameter_joins_the_group_of_its_neighbour():
    model = Net()
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in head)]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1.0}, {"params": rest}])
    layer = nn.Linear(2, 2)
    with transaction(model, optimizer, validate=False):
        added(layer.weight, model.head.weight)
        added(layer.weight, model.conv1.weight)
        added(layer.bias)
    assert optimizer.param_groups[0]["params"][-1] is layer.weight
    assert optimizer.param_groups[1]["params"][-1] is layer.bias


def test_several_optimizers_are_told_apart():
    model = Net()
    one = torch.optim.SGD(model.head.parameters(), lr=0.1)
    two = torch.optim.SGD([*model.conv1.parameters(), *model.body.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(two, 0.1, total_steps=9)
    layer = edited(model, insert_plain, [one, two], schedulers=[scheduler])
    assert [p is q for p, q in zip(two.param_groups[0]["params"][-2:], layer.parameters(), strict=True)] == [True, True]
    assert len(one.param_groups[0]["params"]) == 2
    step(model, two)
    scheduler.step()


def test_names_in_groups_stay_in_line():
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)

    def edit(model: Any) -> None:
        insert_plain(model)
        removed(model.head.bias)
        model.head.bias = None

    edited(model, edit, optimizer)
    (group,) = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert group["param_names"] == [names[id(p)] for p in group["params"]]
    assert "body.1.after.weight" in group["param_names"] and "head.bias" not in group["param_names"]


def test_what_is_removed_leaves_group_and_state():
    model, optimizer = stepped("AdamW")
    bias = model.head.bias

    def edit(model: Any) -> None:
        removed(bias)
        model.head.bias = None

    edited(model, edit, optimizer)
    assert not any(p is bias for p in optimizer.param_groups[0]["params"])
    assert not any(p is bias for p in optimizer.state)
    step(model, optimizer)


@pytest.mark.parametrize("name", ["AdamW", "ours AdamW"])
def test_what_is_removed_is_held_by_nobody(name):
    model, optimizer = stepped(name)
    with transaction(model, optimizer, validate=False) as ended:
        removed(model.head.bias)
        gone = weakref.ref(model.head.bias)
        model.head.bias = None
    optimizer.zero_grad()
    gc.collect()
    assert gone() is None, ended


def test_edits_that_nobody_reported_are_settled_at_the_end():
    model, optimizer = stepped("AdamW")
    old = model.head.weight

    def edit(model: Any) -> None:
        model.head = nn.Linear(6, 4)

    edited(model, edit, optimizer)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()} and old not in optimizer.state


def test_an_optimizer_that_has_not_stepped_is_joined_at_its_first_step():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    layer = edited(model, insert_plain)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    other.step()
    before = layer.weight.detach().clone()
    step(model, optimizer)
    assert "body.1.after.weight" in optimizer.param_groups[0]["param_names"]
    assert not torch.equal(layer.weight, before)
    step(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_parameter_that_vanished_is_not_waited_for():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = []

    def edit(model: Any) -> None:
        layer.append(insert_plain(model))
        raise KeyError

    with pytest.raises(KeyError):
        edited(model, edit)
    step(model, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("edit", [grow_plain, insert_plain, lambda model: removed(model.head.bias)], ids=["moved", "added", "removed"])
def test_an_optimizer_of_one_vector_is_refused(edit):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: model(pictures()).square().mean())
    with pytest.raises(TransactionError, match=r"cannot carry LBFGS: its history is one vector over all parameters"):
        edited(model, edit, optimizer)
    assert model.conv1.out_channels == 6


class Odd(torch.optim.SGD):
    """Keeps state of which no part belongs to a unit."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["odd"] = torch.zeros(5)


def test_state_that_cannot_be_carried_refuses_the_edit():
    model = Net()
    optimizer = Odd(model.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(OptimizerError, match=r"cannot serve Odd: state 'odd' of a parameter .* of which no part belongs to a unit"):
        edited(model, grow_plain, optimizer)
    assert model.conv1.weight.shape[0] == 6


# Averages


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        pytest.param(lambda weights: weights, "", id="dict"),
        pytest.param(lambda weights: {f"module.{name}": value for name, value in weights.items()}, "module.", id="prefixed"),
        pytest.param(lambda weights: types.SimpleNamespace(shadow=weights), "", id="object"),
    ],
)
def test_an_average_by_name_follows(make, prefix):
    model = Net()
    ema = make({name: tensor.detach() + 1 for name, tensor in model.state_dict().items()})
    weights = getattr(ema, "shadow", ema)
    before = dict(weights)
    values = weights[prefix + "conv1.weight"].clone()

    def edit(model: Any) -> None:
        grow_plain(model)
        insert_plain(model)
        removed(model.head.bias)
        model.head.bias = None

    edited(model, edit, ema=ema)
    entry = weights[prefix + "conv1.weight"]
    assert entry is before[prefix + "conv1.weight"]
    assert torch.equal(entry[:6], values) and torch.equal(entry[6:], model.conv1.weight[6:])
    assert torch.equal(weights[prefix + "body.1.after.weight"], model.body[1]._modules["after"].weight)
    assert {name.removeprefix(prefix): value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "wrap", [torch.optim.swa_utils.AveragedModel, copy.deepcopy, lambda m: types.SimpleNamespace(ema=copy.deepcopy(m))]
)
def test_an_average_that_is_a_module_is_a_twin_whose_parameters_are_not_trained(wrap):
    scene = plain()
    ema = wrap(scene.model)
    assert twins(scene.model) == []
    with transaction(scene.model, scene.optimizer, ema=ema, validate=False):
        (twin,) = twins(scene.model)
        assert type(twin) is Net and twin is not scene.model
        with transaction(scene.model, validate=False):
            assert twins(scene.model) == [twin]
            for each in (scene.model, twin):
                grow_plain(each)
                insert_plain(each)
    assert twins(scene.model) == []
    held = [id(p) for p in scene.optimizer.param_groups[0]["params"]]
    assert sorted(held) == sorted(id(p) for p in scene.model.parameters())
    assert torch.equal(twin.eval()(pictures()), twin(pictures()))
