"""What the tests of growth and pruning share: a net with two crossing dims, exact arithmetic, and all that a refusal must leave alone."""

import pytest
import torch
from contract import poison as poison_layer
from torch import nn

import esper_elastic as ee


class Net(nn.Module):
    """3 -> hidden (4 of 9) -> middle (5 of 8) -> 2, in float64."""

    def __init__(self):
        super().__init__()
        self.first = ee.ElasticLinear(3, 4, max_out_features=9, dtype=torch.float64)
        self.second = ee.ElasticLinear(4, 5, in_dim=self.first.out_dim, max_out_features=8, dtype=torch.float64)
        self.third = ee.ElasticLinear(5, 2, in_dim=self.second.out_dim, dtype=torch.float64)
        self.hidden, self.middle = self.first.out_dim, self.second.out_dim

    def forward(self, input):
        return self.third(self.second(self.first(input).relu()).relu())


@torch.no_grad()
def integral(*layers):
    """Make all weights small integers, so that float64 computes without rounding and functions can be compared for equality."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    return layers[0]


def batch(*shape):
    return torch.randint(-3, 4, shape).double()


def everything(module):
    """All that a refusal must leave as it was."""
    generation = {id(dim.block): dim.block.generation for dim in dims_of(module)}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    versions = [p._version for p in module.parameters()]
    return generation, [dim.active for dim in dims_of(module)], state, grads, versions, torch.get_rng_state()


def dims_of(module):
    return [dim for layer in module.modules() if hasattr(layer, "_widths") for axis in layer._widths.axes for dim in axis.dims]


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def refused(net, change, error, match):
    before = everything(net)
    with pytest.raises(error, match=match):
        change()
    assert_same(before, everything(net))


def poison(*layers):
    """Fill the dormant memory of all layers with NaN."""
    for layer in layers:
        poison_layer(layer)


#: Ways to put two dims into one axis, and to bring the activations of both there.
DERIVED = {
    "flatten": (lambda d, e: d * 3, lambda one, other: one.repeat_interleave(3, -1)),
    "beside others": (lambda d, e: ee.concat(e, d, e * 2), lambda one, other: torch.cat([other, one, other.repeat_interleave(2, -1)], -1)),
    "twice": (lambda d, e: ee.concat(d, d), lambda one, other: torch.cat([one, one], -1)),
    "twice apart": (lambda d, e: ee.concat(d, e, d), lambda one, other: torch.cat([one, other, one], -1)),
}


class Derived(nn.Module):
    """Two producers, of 4 (of 7) and 2 (of 3) units, and a consumer of an axis derived from both; float64."""

    def __init__(self, shape):
        super().__init__()
        derive, self.join = DERIVED[shape]
        self.one = ee.ElasticLinear(3, 4, max_out_features=7, dtype=torch.float64)
        self.other = ee.ElasticLinear(3, 2, max_out_features=3, dtype=torch.float64)
        axis = derive(self.one.out_dim, self.other.out_dim)
        self.last = ee.ElasticLinear(axis.active, 2, in_dim=axis, dtype=torch.float64)

    def forward(self, input):
        return self.last(self.join(self.one(input), self.other(input)))
