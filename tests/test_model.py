"""The calls that take a whole model."""

import gc
import weakref

import pytest
import torch
from torch import nn

import esper_elastic as ee


class Residual(nn.Module):
    def __init__(self, dim: ee.ElasticDim) -> None:
        super().__init__()
        hidden = ee.ElasticDim(5, 7)
        up = ee.ElasticLinear(dim.active, 5, in_dim=dim, out_dim=hidden)
        down = ee.ElasticLinear(5, dim.active, in_dim=hidden, out_dim=dim)
        self.branch = ee.ElasticBlock(nn.Sequential(up, nn.ReLU(), down), kind="branch")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    dim = ee.ElasticDim(8, 16, multiple_of=2)
    return nn.Sequential(ee.ElasticLinear(4, 8, out_dim=dim), Residual(dim), Residual(dim), ee.ElasticLinear(8, 3, in_dim=dim))


def test_dims_are_named_after_the_first_module_that_produces_them(model: nn.Sequential) -> None:
    assert list(ee.dims(model)) == ["0", "1.branch.module.0", "2.branch.module.0", "3"]
    assert ee.dims(model)["0"] is model[0].out_dim is model[3].in_dim


def test_every_admissible_width_runs_whatever_the_others_are(model: nn.Sequential) -> None:
    x = torch.randn(2, 4)
    for width in (2, 16, 8):
        for hidden in (1, 7):
            ee.resize(model, {"0": width, "1.branch.module.0": hidden})
            torch.testing.assert_close(ee.export(model)(x), model(x))


def test_several_widths_are_one_commit(model: nn.Sequential) -> None:
    control = ee.control_block(model)
    before = control.generation
    ee.resize(model, {"0": 2, "1.branch.module.0": 1, "2.branch.module.0": 7})
    assert control.generation == before + 1
    assert [dim.active for dim in ee.dims(model).values()] == [2, 1, 7, 3]


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"1.branch.module.0": 1, "0": 3}, r"ElasticDim '0': cannot activate 3 units: expected a multiple of 2. The nearest: 2 and 4"),
        ({"1.branch.module.0": 1, "0": 18}, r"ElasticDim '0': cannot activate 18 units: capacity is 16"),
        ({"1.branch.module.0": 1, "0": 0}, r"ElasticDim '0': cannot activate 0 units: minimum is 1"),
        ({"1.branch.module.0": 1, "0": 4.0}, r"ElasticDim '0': width: expected an integer, got 4.0 of type float"),
        ({"1.branch.module.0": 1, "0": True}, r"ElasticDim '0': width: expected an integer, got True of type bool"),
        ({"1.branch.module.0": 1, "1.branch": 2}, r"unknown dim '1.branch': .*'1.branch.module.0'"),
    ],
    ids=["multiple", "capacity", "zero", "float", "bool", "name"],
)
def test_a_bad_width_among_good_ones_changes_nothing(model: nn.Sequential, widths: dict, message: str) -> None:
    ee.dims(model)
    digest, generation = ee.control_block(model).digest(), ee.control_block(model).generation
    with pytest.raises(ee.CapacityError, match=message):
        ee.resize(model, widths)
    assert (ee.control_block(model).digest(), ee.control_block(model).generation) == (digest, generation)


def test_unknown_names_are_key_errors_too(model: nn.Sequential) -> None:
    with pytest.raises(KeyError, match="nearest: '0'"):
        ee.dims(model)["00"]
    with pytest.raises(KeyError, match=r"unknown switch '1.brunch': expected one of its 2 names. The nearest: '1.branch'"):
        ee.disable(model, "1.brunch")


def test_a_dim_answers_to_the_name_it_was_given() -> None:
    dim = ee.ElasticDim(4, 8, name="hidden")
    model = nn.Sequential(ee.ElasticLinear(2, 4, out_dim=dim), ee.ElasticLinear(4, 2, in_dim=dim))
    ee.resize(model, {"hidden": 6})
    assert ee.dims(model)["0"].active == 6


def test_switching_a_block_off_equals_the_model_without_it(model: nn.Sequential) -> None:
    x = torch.randn(2, 4)
    ee.disable(model, "1.branch")
    without = nn.Sequential(model[0], model[2], model[3])
    assert torch.equal(model(x), without(x))


@pytest.mark.parametrize("kind", ["on", "off"])
def test_static_layout_equals_compact(model: nn.Sequential, kind: str) -> None:
    x = torch.randn(2, 4)
    ee.resize(model, {"0": 6, "2.branch.module.0": 3})
    if kind == "off":
        ee.disable(model, "2.branch")
    expected = model(x)
    ee.set_layout(model, "static")
    torch.testing.assert_close(model(x), expected)
    assert model[0](x).shape == (2, 16) and not model[0](x)[:, 6:].any()


def test_one_control_block_serves_the_whole_model() -> None:
    model = nn.ModuleList(ee.ElasticLinear(3, 3, max_out_features=5) for _ in range(40))
    assert len({layer.out_dim.block for layer in model}) == 40
    control = ee.control_block(model)
    assert {layer.out_dim.block for layer in model} == {control}
    model.append(ee.ElasticLinear(3, 3, max_out_features=5))
    assert "40" in ee.dims(model) and model[40].out_dim.block is ee.control_block(model)


def test_structure_follows_added_and_removed_modules(model: nn.Sequential) -> None:
    assert "2.branch.module.0" in ee.dims(model)
    del model[2]
    assert "2.branch.module.0" not in ee.dims(model)
    ee.resize(model, {"1.branch.module.0": 2})
    model.add_module("extra", ee.ElasticLinear(3, 3, max_out_features=9))
    ee.resize(model, {"extra": 9})
    assert model(torch.randn(1, 4)).shape == (1, 9)


def test_the_record_of_a_model_dies_with_it() -> None:
    model = nn.Sequential(ee.ElasticLinear(2, 2))
    ee.dims(model)
    reference = weakref.ref(model[0])
    del model
    gc.collect()
    assert reference() is None


def test_a_model_without_elastic_layers_says_so() -> None:
    with pytest.raises(ee.LayoutError, match="control_block: Linear holds no elastic layer"):
        ee.control_block(nn.Linear(2, 2))
    assert ee.dims(nn.Linear(2, 2)) == {}


def test_unknown_layout_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(ee.LayoutError, match="expected 'compact' or 'static', got 'dense'"):
        ee.set_layout(model, "dense")
