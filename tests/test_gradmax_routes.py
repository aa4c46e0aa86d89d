"""What GradMax reads from the graph between producers and consumers, against the gradient that autograd gives newborn units.

For any consumer weights ``u`` of newborn units, their producers' gradient has to be ``u^T M``, whatever lies between.
"""

import pytest
import torch
from growing import poison
from torch import nn
from torch.nn import functional as F
from training import CASES
from zoo import call

import esper_elastic as ee
from esper_elastic.growth import gradmax, observe
from esper_elastic.ops.reference import active_slice

DOUBLE = {"dtype": torch.float64}
each_layout = pytest.mark.parametrize("layout", ["compact", "static"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Residual(nn.Module):
    """A stem and two blocks with batch norms that add to one stream, pooled and flattened; the dim is the stream's."""

    def __init__(self):
        super().__init__()
        self.stem = ee.ElasticConv2d(2, 4, 3, padding=1, max_out_channels=9, **DOUBLE)
        self.dim = self.stem.out_dim
        self.stem_norm = ee.ElasticBatchNorm2d(4, dim=self.dim, **DOUBLE)
        self.inner = nn.ModuleList(ee.ElasticConv2d(4, 3, 3, padding=1, in_dim=self.dim, max_out_channels=4, **DOUBLE) for _ in range(2))
        self.outer = nn.ModuleList(
            ee.ElasticConv2d(3, 4, 1, bias=False, in_dim=inner.out_dim, out_dim=self.dim, **DOUBLE) for inner in self.inner
        )
        self.norms = nn.ModuleList(ee.ElasticBatchNorm2d(4, dim=self.dim, **DOUBLE) for _ in range(2))
        self.head = ee.ElasticLinear(4, 3, in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        for inner, outer, norm in zip(self.inner, self.outer, self.norms, strict=True):
            x = (x + norm(outer(inner(x).tanh()))).relu()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Preactivated(nn.Module):
    """A stream that is added to before the norm in front of each consumer."""

    def __init__(self):
        super().__init__()
        self.stem = ee.ElasticLinear(3, 4, max_out_features=9, **DOUBLE)
        self.dim = self.stem.out_dim
        self.norm = ee.ElasticBatchNorm1d(4, dim=self.dim, **DOUBLE)
        self.inner = ee.ElasticLinear(4, 5, in_dim=self.dim, **DOUBLE)
        self.outer = ee.ElasticLinear(5, 4, in_dim=self.inner.out_dim, out_dim=self.dim, **DOUBLE)
        self.head = ee.ElasticLinear(4, 2, in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.outer(self.inner(self.norm(x).relu()).relu())
        return self.head(x)


class HalfBiased(nn.Module):
    """A sum of two producers, only one of which can lift newborn units above the relu's zero."""

    def __init__(self):
        super().__init__()
        self.one = ee.ElasticLinear(3, 4, max_out_features=9, **DOUBLE)
        self.dim = self.one.out_dim
        self.two = ee.ElasticLinear(3, 4, bias=False, out_dim=self.dim, **DOUBLE)
        self.head = ee.ElasticLinear(4, 2, in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        return self.head((self.two(x.square()) + self.one(x)).relu())


class Flat(nn.Module):
    """Convolution, pooling, flatten, linear."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.conv = ee.ElasticConv2d(2, 4, 3, padding=1, padding_mode="circular", max_out_channels=9, **DOUBLE)
        self.dim = self.conv.out_dim
        self.head = ee.ElasticLinear(16, 3, in_dim=self.dim * 4, **DOUBLE)

    def forward(self, x):
        return self.head(self.pool(self.conv(x).relu()).flatten(1))


class Joined(nn.Module):
    """Two dims side by side into a strided, dilated and reflected convolution, and one of them into another consumer too."""

    def __init__(self):
        super().__init__()
        self.one = ee.ElasticConv2d(2, 4, 1, max_out_channels=9, **DOUBLE)
        self.other = ee.ElasticConv2d(2, 2, 1, max_out_channels=3, **DOUBLE)
        self.dim = self.one.out_dim
        axis = ee.concat(self.other.out_dim, self.dim)
        settings = {"stride": 2, "padding": 1, "dilation": 2, "padding_mode": "reflect"}
        self.last = ee.ElasticConv2d(6, 3, 2, in_dim=axis, max_out_channels=4, **settings, **DOUBLE)
        self.side = ee.ElasticConv2d(4, 2, 3, in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        one = F.silu(self.one(x))
        return torch.cat([self.last(torch.cat([self.other(x), one], 1)).flatten(1), self.side(one).flatten(1)], 1)


class Tokens(nn.Module):
    """Two linear layers over tokens, called twice in a pass."""

    def __init__(self):
        super().__init__()
        self.up = ee.ElasticLinear(3, 4, max_out_features=9, **DOUBLE)
        self.dim = self.up.out_dim
        self.down = ee.ElasticLinear(4, 3, in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(F.gelu(self.up(x)))
        return x


class Sequences(nn.Module):
    """One-dimensional convolutions; the second with padding "same"."""

    def __init__(self):
        super().__init__()
        self.one = ee.ElasticConv1d(2, 4, 3, stride=2, padding=1, max_out_channels=9, **DOUBLE)
        self.dim = self.one.out_dim
        self.two = ee.ElasticConv1d(4, 3, 4, padding="same", in_dim=self.dim, **DOUBLE)

    def forward(self, x):
        return self.two(F.elu(self.one(x), 1.7))


NETS = {
    "residual": (Residual, (4, 2, 5, 5)),
    "preactivated": (Preactivated, (8, 3)),
    "half biased": (HalfBiased, (8, 3)),
    "max pool": (lambda: Flat(nn.MaxPool2d(3, 2, 1)), (4, 2, 4, 3)),
    "average pool": (lambda: Flat(nn.AvgPool2d(2)), (4, 2, 4, 4)),
    "flatten": (lambda: Flat(nn.Identity()), (4, 2, 2, 2)),
    "joined": (Joined, (3, 2, 7, 7)),
    "tokens": (Tokens, (2, 5, 3)),
    "sequences": (Sequences, (4, 2, 9)),
    "no batch axis": (Sequences, (2, 9)),
}


@each_layout
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", NETS)
def test_the_matrix_predicts_the_gradient_of_newborn_units(name, training, layout):
    """For any consumer weights ``u`` of newborn units, their producers' gradient is ``u^T M``; GradMax's are its left singular vectors."""
    build, shape = NETS[name]
    net = build().train(training)
    poison(*[layer for layer in net.modules() if hasattr(layer, "_widths")])
    ee.set_layout(net, layout)
    x = torch.randn(shape, **DOUBLE)
    weights = torch.randn(net(x).shape, **DOUBLE)

    def loss():
        y = net(x)
        return (y * weights).sum() + y.square().sum()

    with observe(net):
        loss().backward()
    statistic = gradmax._latest[net.dim]
    matrix = statistic.matrix()
    consumers, producers = [r() for r in statistic.consumers], [r() for r in statistic.producers]
    before = net(x)
    net.dim.grow(6, init="gradmax")
    torch.testing.assert_close(net(x), before, rtol=1e-14, atol=1e-14)

    def columns(layer):
        place = next(p for p in ee.layers.units.places(net.dim, "test") if p.layer is layer and p.consumes)
        units = place.units(layer.weight.detach()).narrow(place.unit_axis, 4, 2)
        return units[: layer.out_dim.active, 0]  # (out, 2, inner, ...)

    def gradient():
        net.zero_grad()
        loss().backward()
        return torch.cat([layer.weight.grad[4:6, : layer.in_dim.active].flatten(1) for layer in producers], 1)

    grown = torch.cat([columns(layer).transpose(0, 1).flatten(2).flatten(1) for layer in consumers], 1)
    torch.testing.assert_close(gradient(), grown @ matrix, rtol=1e-9, atol=1e-12)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(gradient().norm(dim=1), grown.norm(dim=1) * values[:2], rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        for layer in consumers:
            columns(layer).normal_()
    random = torch.cat([columns(layer).transpose(0, 1).flatten(2).flatten(1) for layer in consumers], 1)
    torch.testing.assert_close(gradient(), random @ matrix, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("training", "layout"), [(True, "static"), (False, "compact")], ids=["training, static", "eval, compact"])
@pytest.mark.parametrize("name", ["resnet", "densenet", "unet"])
def test_converted_models_have_the_gradients_that_the_matrix_predicts(name, training, layout):
    """Every dim of a whole model that GradMax serves; what it refuses is refused by name."""
    case = CASES[name]
    x = case.inputs().double()
    net = ee.elasticize(case.build().double(), x, capacity=1.5).train(training)
    ee.set_layout(net, layout)
    weights = [torch.randn_like(y) for y in case.outputs(call(net, x))]

    def loss():
        return sum((y * w).sum() + y.square().sum() for y, w in zip(case.outputs(call(net, x)), weights, strict=True))

    served = 0
    for name, dim in ee.dims(net).items():
        if dim.capacity == dim.active:
            continue
        net.zero_grad()
        with observe(net, dim):
            loss().backward()
        before, active, statistic = loss(), dim.active, gradmax._latest.get(dim)
        try:
            dim.grow(active + dim.multiple_of, init="gradmax")
        except ee.CapacityError as error:
            assert "ElasticConvTranspose2d" in str(error), name
            continue
        torch.testing.assert_close(loss(), before, rtol=1e-12, atol=1e-12)
        net.zero_grad()
        loss().backward()
        places = [p for p in ee.layers.units.places(dim, "test") if p.name == "weight"]

        def newborn(place, tensor, active=active):
            for index, axis in enumerate(place.layer.tensor_axes()["weight"]):
                if axis is not None and index != place.axis:
                    tensor = active_slice(tensor, index, axis)
            return place.units(tensor).movedim(place.unit_axis, 0)[active].flatten()

        consumed = [p for layer in statistic.consumers for p in places if p.layer is layer() and p.consumes]
        produced = [p for layer in statistic.producers for p in places if p.layer is layer() and not p.consumes]
        columns = torch.cat([newborn(p, p.tensor.detach()) for p in consumed])
        gradient = torch.cat([newborn(p, p.tensor.grad) for p in produced])
        torch.testing.assert_close(gradient, columns @ statistic.matrix(), rtol=1e-8, atol=1e-10 * gradient.abs().max().item())
        served += 1
    assert served >= 9
