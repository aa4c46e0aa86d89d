"""``ee.plan``: what it says, how it travels, what it leaves alone."""

import json
import random
import re
from collections import deque

import numpy
import pytest
import torch
import torch.nn.functional as F
from converting import active_outcome, assert_same, built, inputs_of, poison, random_widths, run
from plain_net import CASE, DIMS, fingerprint, net, pictures
from torch import Tensor, nn
from zoo import AWKWARD, MODELS

import esper_elastic as ee
from esper_elastic.errors import ConversionError


def test_plan_prints():
    plan = ee.plan(net(), pictures(), capacity=1.5, minimum=2)
    text = str(plan)
    assert text.startswith("3 dims; 11,016 of 11,026 parameters (99.9%) lie on one")
    assert re.search(r"stem +12 active of 18, from 2\n +runs through stem\.weight\[0\], stem\.bias\[0\], norm\.weight\[0\], ", text)
    assert "and 9 more" in text
    assert "switches\n  layer1.0: block\n  layer1.1: block" in text
    assert "head.weight[0], head.bias[0]: it is an axis of the model's output" in text
    assert "stem.weight[1]: it is an axis of the model's input" in text
    assert plan.coverage == 11016 / 11026


def test_plan_prints_multiples_and_what_a_dim_cannot_do():
    grouped = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 5, 1))
    assert re.search(r"0 +16 active of 16, from 4, multiples of 4\n", str(ee.plan(grouped, torch.zeros(2, 3, 7, 7))))
    mean = AWKWARD["mean_over_channels"]
    text = str(ee.plan(built(mean), inputs_of(mean)))
    assert re.search(r"compact layout only: mean runs over it \(.*awkward_channels\.py:\d+\)", text)
    assert re.search(r"grows with exact=False only: mean runs over it", text)


def test_plan_holds_its_content():
    plan = ee.plan(net(), pictures())
    assert {dim.name: dim.size for dim in plan.dims} == DIMS
    assert plan.switches == {"layer1.0": "block", "layer1.1": "block"}
    assert plan.dims[1].bindings == [
        *("layer1.0.conv1.weight[0]", "layer1.0.conv1.bias[0]", "layer1.0.bn1.weight[0]", "layer1.0.bn1.bias[0]"),
        *("layer1.0.bn1.running_mean[0]", "layer1.0.bn1.running_var[0]", "layer1.0.conv2.weight[1]"),
    ]


@pytest.mark.parametrize("training", [True, False])
def test_planning_touches_nothing(training):
    model = net().train(training)
    model.layer1[0].eval()
    model.norm.register_forward_hook(lambda *_: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = fingerprint(model)
    ee.plan(model, pictures(), capacity=2.0, exclude="stem")
    assert fingerprint(model) == before


class Raises(nn.Module):
    """A net that fails in the n-th run of its forward."""

    runs = 0  # counted outside the object, whose attributes are taken back

    def __init__(self, error: BaseException, after: int):
        super().__init__()
        self.net, self.error, self.after = net(), error, after
        Raises.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        Raises.runs += 1
        if Raises.runs > self.after:
            raise self.error
        return x


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
@pytest.mark.parametrize("after", range(5))
def test_an_interrupted_conversion_touches_nothing(verb, after):
    model = Raises(KeyboardInterrupt("now"), after)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        verb(model, pictures(), capacity=1.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_a_model_that_raises_is_refused_and_as_it_was(verb):
    model = Raises(RuntimeError("out of order"), 0)
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=r"the forward of Raises: forward failed on the example inputs, at .*: RuntimeError: out of"):
        verb(model, pictures())
    assert fingerprint(model) == before


def test_a_plan_travels_as_json(tmp_path):
    plan = ee.plan(net(), pictures(), capacity=1.5)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    read = ee.Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert read == plan
    assert str(read) == str(plan)
    one, other = net(), net()
    read.apply(one)
    ee.elasticize(other, pictures(), capacity=1.5)
    assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
    widths = random_widths(one, 0)
    for model in (one, other):
        ee.resize(model, widths)
        poison(model)
    outcomes = [active_outcome(model, run(model, CASE, pictures(), training=True)) for model in (one, other)]
    assert_same(*outcomes, tolerance=0.0)
    assert ee.plan(net(), pictures(), capacity=1.5).to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        pytest.param({"format": 99}, r"plan: format: expected 1, got 99", id="format"),
        pytest.param({}, r"expected what Plan.to_json\(\) gives, got something else \(KeyError", id="empty"),
        pytest.param({"format": 1, "dims": [{"no": 1}], "modules": [], "rigid": [], "parameters": [0, 0]}, r"TypeError", id="fields"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(content, match):
    with pytest.raises(ConversionError, match=match):
        ee.Plan.from_json(content)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(lambda m: m.layer1.__delitem__(1), r"module 'layer1\.1(\..*)?' is missing from Net", id="module missing"),
        pytest.param(lambda m: setattr(m, "stem", nn.Conv2d(3, 14, 3)), r"module 'stem' \(Conv2d\) is not what the plan", id="width"),
        pytest.param(lambda m: setattr(m, "stem", nn.Conv1d(3, 12, 3)), r"module 'stem' \(Conv1d\) is not what the plan", id="kind"),
        pytest.param(lambda m: setattr(m, "head", nn.Conv2d(12, 10, 1)), r"module 'head' \(Conv2d\) is not what the plan", id="last kind"),
        pytest.param(lambda m: setattr(m, "head", nn.Identity()), r"module 'head' \(Identity\) is not what the plan", id="no weight"),
    ],
)
def test_a_plan_for_another_model_is_refused(change, match):
    plan, model = ee.plan(net(), pictures(), capacity=1.5), net()
    change(model)
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=match):
        plan.apply(model)
    assert fingerprint(model) == before


def test_a_plan_applied_twice_is_refused():
    plan, model = ee.plan(net(), pictures()), net()
    plan.apply(model)
    before = fingerprint(model)
    with pytest.raises(ConversionError, match="is not what the plan was made for|elastic already"):
        plan.apply(model)
    assert fingerprint(model) == before


class Writes(nn.Module):
    """Writes to itself, in every way, whatever it computes; draws from every generator of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 16), nn.Linear(16, 4)
        self.calls, self.table, self.queue, self.nested = 0, None, deque([1]), {"seen": [{3}]}
        self.gone = 5

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = self.fc1(x)
        self.queue.append(self.hidden)
        self.nested["seen"][0].add(self.calls)
        self.nested["last"] = x
        if self.table is None:
            self.table = self.hidden.new_ones(())
            self.register_buffer("scale", self.hidden.new_ones(3), persistent=False)
        if hasattr(self, "gone"):
            del self.gone
        self.fc1.note = x
        self.fc2.eval()
        self.fc1.register_forward_hook(lambda *_: None)
        random.random(), numpy.random.rand(), torch.rand(2)
        return self.fc2(F.relu(self.hidden)) * self.table


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_what_forward_writes_to_modules_is_taken_back(verb):
    model = Writes()
    before, states = fingerprint(model), (random.getstate(), torch.get_rng_state())
    attributes = dict(vars(model))
    plan = verb(model, torch.randn(3, 7, generator=torch.Generator()), exclude="*" if verb is ee.elasticize else None)
    if verb is ee.plan:
        assert {dim.name: dim.size for dim in plan.dims} == {"fc1": 16}
        assert fingerprint(model) == before
    assert all(vars(model)[name] is value for name, value in attributes.items())
    assert (model.calls, model.table, list(model.queue), model.nested, model.gone) == (0, None, [1], {"seen": [{3}]}, 5)
    assert model.fc2.training and not hasattr(model.fc1, "note") and not model.fc1._forward_hooks
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())


@pytest.mark.parametrize("name", ["lstm", "weight_norm_hook"])
def test_what_torch_keeps_in_modules_stays_real(name):
    """An LSTM lists its weights, the old weight norm leaves the one that it computes; fake tensors were left in both."""
    case = (MODELS | AWKWARD)[name]
    model = built(case)
    before = fingerprint(model)
    ee.plan(model, inputs_of(case), capacity=1.5)
    assert fingerprint(model) == before


def test_names_are_those_of_the_dims():
    """Of bare parameters of the model itself too: a plan's names can be given back as capacities."""
    case = MODELS["vit_multihead"]
    model, inputs = built(case), inputs_of(case)
    names = [dim.name for dim in ee.plan(model, inputs).dims]
    assert all(names) and len(set(names)) == len(names)
    ee.elasticize(model, inputs, capacity=dict.fromkeys(names, 1.5))
    assert list(ee.dims(model)) == names
    assert any(dim.capacity > dim.active for dim in ee.dims(model).values())


def test_code_that_differs_from_run_to_run_is_refused():
    """Its second run parts from the first with nothing changed; looking for what keeps the sizes went on for ever."""

    class Drifts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counter[0] += 1
            for _ in range(counter[0] // 3):
                x = x.sin()
            return x

    counter = [0]
    model = nn.Sequential(nn.Linear(7, 16), Drifts(), nn.Linear(16, 4))
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=r"module '\w+': its code does not run twice in the same way, with nothing changed between"):
        ee.plan(model, torch.randn(3, 7, generator=torch.Generator()))
    assert fingerprint(model) == before
