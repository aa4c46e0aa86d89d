"""How much of each architecture is elastic, by measure, and that the measure is one: `make coverage-models` prints the table."""

import pytest
import torch
from converting import built, inputs_of
from covering import coverage_of
from torch import nn
from zoo import MODELS, Case

import esper_elastic as ee

pytestmark = pytest.mark.wide

#: Recurrent layers stay rigid; a graph network mixes nodes by index.
EXEMPT = ("lstm", "graph_convolution", "graph_attention")

#: One of each kind; `make coverage-models` and the slow tests measure all.
QUICK = ("resnet_basic", "densenet", "mobilenet_v3", "shufflenet_v2", "unet", "swin", "vit_multihead", "gpt2", "llama", "graph_attention")


def check(case: Case, each: bool) -> None:
    model = built(case)
    coverage = coverage_of(model, inputs_of(case), case.outputs, each=each)
    assert case.name in EXEMPT or coverage.share >= 0.9, coverage
    assert coverage.dims[1] > 0
    assert coverage.elements[0] == sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    for group in coverage.rigid:
        assert group.reason, group.names
        assert all(name.rpartition(".")[2] in modules[name.rpartition(".")[0]]._parameters for name in group.names)


@pytest.mark.parametrize("name", QUICK)
def test_ninety_percent_halve_together(name):
    check(MODELS[name], each=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ninety_percent_halve_one_by_one(name):
    check(MODELS[name], each=True)


def test_what_is_rigid_in_an_lstm_is_told():
    case = MODELS["lstm"]
    coverage = coverage_of(built(case), inputs_of(case), case.outputs, each=False)
    assert coverage.share < 0.5
    assert coverage.rigid[0].reason == "a recurrent layer keeps its weights packed"
    assert set(coverage.rigid[0].names) > {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}


def test_a_dim_that_cannot_halve_does_not_count(monkeypatch):
    """Its neighbours do: the last layer reads a dim that goes down to 4 of 8, the first one makes one that ends at 5 of 9."""
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    convert = ee.elasticize

    def with_floors(given, inputs):
        convert(given, inputs)
        for name, floor in (("0", 5), ("2", 4)):
            ee.dims(given)[name].minimum = floor
        plan = given.__dict__["_elastic_plan"]
        plan["dims"][0]["minimum"], plan["dims"][1]["minimum"] = 5, 4
        return given

    monkeypatch.setattr(ee, "elasticize", with_floors)
    coverage = coverage_of(model, torch.ones(2, 3, dtype=torch.float64))
    assert coverage.dims == (2, 1)
    assert coverage.elements == (27 + 9 + 72 + 8 + 16 + 2, 72 + 8 + 16)
    first = next(group for group in coverage.rigid if "0.weight" in group.names)
    assert "its part '0' goes from 9 to 5, and the axis not to its half" in first.reason


def test_an_axis_that_keeps_most_of_its_length_does_not_count():
    """The second layer reads 2 elastic channels beside 6 inputs: its dim halves, its axis does not."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.both = nn.Linear(6, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.both(torch.cat([self.narrow(x), x], 1))

    coverage = coverage_of(Beside().double(), torch.ones(4, 6, dtype=torch.float64))
    assert coverage.dims == (1, 1)
    assert coverage.elements == (12 + 2 + 24 + 3, 12 + 2)
    assert [group.names for group in coverage.rigid] == [["both.weight"], ["both.bias"]]
    assert "its part 'narrow' goes from 2 to 1" in coverage.rigid[0].reason


def test_a_model_that_is_wrong_at_half_width_is_not_counted(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    export = ee.export

    def off_by_one(elastic):
        plain = export(elastic)
        plain[0].bias.data += 1
        return plain

    monkeypatch.setattr(ee, "export", off_by_one)
    with pytest.raises(AssertionError, match="'0' at 4: output 0: error"):
        coverage_of(model, torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="half width: output 0: error"):
        coverage_of(model, torch.ones(2, 3, dtype=torch.float64), each=False)
