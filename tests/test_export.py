"""export: ordinary modules, equal outputs, nothing of ours left."""

import copy
import pickle

import pytest
import torch
from torch import nn

import esper_elastic as ee


def network() -> nn.Sequential:
    dim = ee.ElasticDim(6, 9)
    inner = nn.Sequential(ee.ElasticLinear(6, 6, in_dim=dim, out_dim=dim), nn.ReLU())
    return nn.Sequential(
        ee.ElasticLinear(4, 6, out_dim=dim),
        ee.ElasticBlock(inner),
        ee.ElasticBlock(nn.Sequential(ee.ElasticBlock(copy.deepcopy(nn.Tanh())), nn.Tanh())),
        ee.ElasticLinear(6, 3, in_dim=dim),
    )


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("width", [1, 6, 9])
def test_exported_model_is_plain_and_equal(width: int, layout: str) -> None:
    model = network().eval()
    ee.set_layout(model, layout)
    ee.resize(model, {"0": width})
    plain = ee.export(model)
    assert not [type(m) for m in plain.modules() if "esper_elastic" in type(m).__module__]
    assert b"esper_elastic" not in pickle.dumps(plain)
    x = torch.randn(5, 4)
    torch.testing.assert_close(plain(x), model(x))
    assert plain[0].weight.shape == (width, 4) and plain[0].weight.untyped_storage().nbytes() == width * 4 * 4
    assert not plain.training and model[0].weight.shape == (9, 4)


@pytest.mark.parametrize("kind", ["block", "branch"])
def test_an_off_block_exports_to_a_plain_module_that_does_the_same(kind: str) -> None:
    block = ee.ElasticBlock(ee.ElasticLinear(4, 4), kind=kind, on=False)
    x = torch.tensor([[1.0, -2.0, 1e30, float("inf")]])
    assert torch.equal(ee.export(block)(x), block(x))


def test_tied_parameters_stay_tied() -> None:
    first, second = ee.ElasticLinear(4, 4), ee.ElasticLinear(4, 4)
    second.weight = first.weight
    plain = ee.export(nn.ModuleList([first, second]))
    assert plain[0].weight is plain[1].weight and plain[0].bias is not plain[1].bias


def test_export_draws_no_random_number_and_leaves_the_model_alone() -> None:
    model = network()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plain = ee.export(model)
    with torch.no_grad():
        plain[0].weight.zero_()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_exported_state_dict_loads_into_a_network_built_plainly() -> None:
    model = network()
    ee.resize(model, {"0": 5})
    twin = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.ReLU()), nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Linear(5, 3))
    twin.load_state_dict(ee.export(model).state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(twin(x), model(x))
