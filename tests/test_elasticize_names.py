"""A module's own attributes and methods keep their meaning when it is converted, whatever they are called."""

import copy

import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic.convert.names import taken_name
from esper_elastic.layers import ElasticBlock, ElasticView


class Scale(nn.Module):
    """Reads a parameter and a size under names that may be taken."""

    def __init__(self, width, attributes=()):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width))
        self.width = width
        for name in attributes:
            setattr(self, name, 3)
        self.names = tuple(attributes)

    def forward(self, x):
        for name in self.names:
            assert getattr(self, name) == 3, name
        return x.view(-1, self.width) * self.scale * 3


class Drawn(Scale):
    def draw(self, x):
        return x - 1

    def forward(self, x):
        return super().forward(self.draw(x))


def model(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), middle, nn.Linear(8, 4)).double()


def converted(middle):
    plain = model(middle)
    elastic = ee.elasticize(copy.deepcopy(plain), torch.ones(2, 5, dtype=torch.float64))
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(elastic(x), plain(x), rtol=0, atol=1e-13)
    for name, dim in ee.dims(elastic).items():
        dim.resize(3)
        torch.testing.assert_close(elastic(x), ee.export(elastic)(x), rtol=0, atol=1e-13, msg=name)
    return elastic


@pytest.mark.parametrize("name", ["size", "read", "weight", "out_features", "outer", "step"])
def test_a_name_that_is_free_stays_free(name):
    elastic = converted(Scale(8, [name]))
    assert list(ee.dims(elastic)) == ["0"]
    assert getattr(elastic[1], name) == 3


@pytest.mark.parametrize("middle", [Scale(8, ["layout"]), Scale(8, ["active", "storage"]), Scale(8, ["_widths"]), Drawn(8)], ids=str)
def test_a_module_whose_name_is_taken_stays_rigid(middle):
    taken = taken_name(middle, ElasticView)
    plan = ee.plan(model(middle), torch.ones(2, 5, dtype=torch.float64))
    assert next(axis.reason for axis in plan.rigid if axis.tensor == "1.scale").startswith(
        f"1 has a {taken!r} of its own, a name that an elastic module needs"
    )
    elastic = converted(middle)
    assert type(elastic[1]) is type(middle)
    assert not ee.dims(elastic)


class Residual(nn.Module):
    def __init__(self, kind=None):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        if kind is not None:
            self.kind = kind

    def forward(self, x):
        return x + self.inner(x) * (2 if getattr(self, "kind", None) == "twice" else 1)


def test_a_block_with_a_kind_of_its_own_gets_no_switch():
    example = torch.ones(2, 6, dtype=torch.float64)
    plain = nn.Sequential(Residual(), Residual("twice")).double()
    assert ee.plan(plain, example).switches == {"0": "block"}
    elastic = ee.elasticize(copy.deepcopy(plain), example)
    assert elastic[1].kind == "twice"
    torch.testing.assert_close(elastic(example), plain(example), rtol=0, atol=1e-13)


def test_no_class_of_torch_has_a_name_that_is_taken():
    modules = [nn.Linear(2, 2), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), nn.TransformerEncoderLayer(2, 1), nn.GroupNorm(1, 2)]
    assert [taken_name(module, base) for module in modules for base in (ElasticView, ElasticBlock)] == [None] * 10
