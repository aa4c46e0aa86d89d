"""Conversion that fails half-way, and models that it refuses: object for object, bit for bit, everything is as it was."""

import importlib
import itertools

import pytest
import torch
from converting import assert_same, built, inputs_of, run
from plain_net import CASE, DIMS, fingerprint, net, pictures
from torch import Tensor, nn
from zoo import AWKWARD, Case

import esper_elastic as ee
from esper_elastic.control import ElasticDim
from esper_elastic.errors import ConversionError
from esper_elastic.layers import Switchable, registry

conversion = importlib.import_module("esper_elastic.convert.elasticize")  # the package has a function of that name

#: What carrying out a plan calls, and how it is counted: each call of each in turn is made to fail.
STEPS = {
    "growing storage": (conversion._Builder, "grown"),
    "replacing storage": (conversion, "_replace_storage"),
    "changing a module": (conversion._Builder, "carry_out"),
    "attaching a dim": (ElasticDim, "attach"),
    "installing a switch": (Switchable, "install_switch"),
    "noting the plan": (ee.Plan, "to_json"),
    "guarding": (ee.optim, "guard"),
}


class Interrupt(BaseException):
    """As KeyboardInterrupt, that no one else raises."""


def in_use(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model in mixed modes with hooks and gradients, and an optimizer with state."""
    model = built(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run(model, case, inputs_of(case), training=True)
    optimizer.step()
    next(model.children()).eval()
    next(model.children()).register_forward_hook(lambda *_: None)
    return model, optimizer


def state_of(optimizer: torch.optim.Optimizer) -> list[object]:
    kept = [(id(p), {key: (id(v), v.tolist()) for key, v in state.items()}) for p, state in optimizer.state.items()]
    groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
    return [type(optimizer), list(vars(optimizer)), kept, groups]


@pytest.mark.parametrize("capacity", [1.0, 2.0])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_in_any_step_of_conversion_is_undone(step, capacity, monkeypatch):
    case = Case("net", lambda: net(), pictures)
    model, optimizer = in_use(case)
    twin, other = in_use(case)
    plan = ee.plan(model, pictures(), capacity=capacity)
    before, state = fingerprint(model), state_of(optimizer)
    owner, name = STEPS[step]
    real = getattr(owner, name)
    for fail_at in itertools.count(1):
        remaining = [fail_at]

        def failing(*args, remaining=remaining, **kwargs):
            result = real(*args, **kwargs)
            remaining[0] -= 1
            if remaining[0] == 0:
                raise Interrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                plan.apply(model, optimizer)
                break
            except Interrupt:
                assert fingerprint(model) == before, f"call {fail_at}"
                assert state_of(optimizer) == state, f"call {fail_at}"
                assert all(registry.lookup(p) is None for p in model.parameters())
    assert fail_at > 1 or (capacity == 1.0 and step == "replacing storage")
    assert {key: dim.active for key, dim in ee.dims(model).items()} == DIMS  # the last attempt went through
    plain = ee.export(model)
    assert_same(run(plain, CASE, pictures(), True), run(twin, CASE, pictures(), True), tolerance=0.0)
    del other


@pytest.mark.parametrize("name", ["tied_weights", "weight_norm_hook", "spectral_norm", "frozen_part", "scripted_part"])
def test_hard_cases_are_left_alone_by_a_plan_and_a_failure(name, monkeypatch):
    case = AWKWARD[name]
    model, inputs = built(case), inputs_of(case)
    run(model, case, inputs, training=True)
    before = fingerprint(model)
    ee.plan(model, inputs, capacity=1.5)
    assert fingerprint(model) == before

    def fail(*args, **kwargs):
        raise RuntimeError("no plan today")

    monkeypatch.setattr(ee.Plan, "to_json", fail)
    with pytest.raises(RuntimeError, match="no plan today"):
        ee.elasticize(model, inputs, capacity=1.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_a_refusal_leaves_modes_hooks_and_gradients_alone(verb):
    case = AWKWARD["data_dependent"]
    inputs = inputs_of(case)
    model = nn.Sequential(nn.Linear(14, 14), built(case), nn.Dropout()).double()
    model(inputs).sum().backward()
    model[0].eval()
    model[1].register_forward_pre_hook(lambda *_: None)
    before, state = fingerprint(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ConversionError, match=r"module '1': its code decides by the values of tensors"):
        verb(model, inputs, capacity=1.5)
    assert fingerprint(model) == before
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_conversion_draws_no_random_number_and_keeps_modes():
    model = net()
    model.layer1[0].eval()
    modes = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    ee.elasticize(model, pictures(), capacity=2.0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes


def test_hooks_and_methods_stay_and_see_what_is_active():
    model = net()
    seen: list[tuple[int, ...]] = []
    handle = model.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    ee.elasticize(model, pictures(), capacity=2.0)
    ee.dims(model)["layer1.0.conv1"].resize(7)
    model(pictures())
    assert seen[-1] == (2, 7, 9, 11)
    handle.remove()
    model(pictures())
    assert len([shape for shape in seen if shape[1] == 7]) == 1


def test_no_global_hook_is_left():
    """torch keeps an entry of its own for hooks that take keywords, does not remove it, and warns of it at each compilation."""
    kept = vars(torch.nn.modules.module)
    before = {name: list(hooks) for name, hooks in kept.items() if name.startswith("_global_") and isinstance(hooks, dict)}
    ee.elasticize(net(), pictures())
    assert before == {name: list(kept[name]) for name in before}


def test_gradients_grow_along():
    model, twin = net(), net()
    for each in (model, twin):
        each(pictures()).sum().backward()
    ee.elasticize(model, pictures(), capacity=2.0)
    assert all(p.grad.shape == p.shape for p in model.parameters())
    for each in (model, twin):
        each(pictures()).sum().backward()
    assert torch.equal(model.stem.weight.grad[:12], twin.stem.weight.grad)
    assert not model.stem.weight.grad[12:].any()


def test_a_view_of_the_parameters_taken_before_is_told_apart():
    """With room to grow contents move to new memory: parameters stay the objects that they were, views of them do not follow."""
    model = net()
    parameters = list(model.parameters())
    views: list[Tensor] = [p.detach() for p in parameters]
    ee.elasticize(model, pictures(), capacity={"layer1.0.conv1": 2.0})
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    moved = {key for (key, p), view in zip(model.named_parameters(), views, strict=True) if p.data_ptr() != view.data_ptr()}
    assert moved == {f"layer1.0.{key}" for key in ("conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias", "conv2.weight")}
