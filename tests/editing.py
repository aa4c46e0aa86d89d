"""Models in training, and edits made by hand: what tests of the undo log and of transactions do to them."""

import random
from typing import Any, NamedTuple

import numpy
import torch
from fingerprint import Print, fingerprint
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.surgery.undo import added, moved, removed, save_values


class Net(nn.Module):
    """Two convolutions with batch norms and a head; the second convolution can be done without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)
        self.sizes = [6, {"head": 4}]
        self.offset = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.bn1(self.conv1(x))).mean((2, 3)))


class Scene(NamedTuple):
    """A model in training, with everything that hangs on it."""

    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    inputs: Tensor

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model(self.inputs).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        return float(loss.detach())

    def followers(self) -> dict[str, Any]:
        """The keyword arguments of a transaction."""
        return {"optimizer": self.optimizer, "schedulers": self.scheduler, "scaler": self.scaler, "ema": self.ema}

    def print(self) -> Print:
        return fingerprint(self.model, self.optimizer, self.scheduler, self.scaler, self.ema)

    def values(self) -> list[Tensor]:
        """What training computes, copied."""
        state = [value for kept in self.optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
        kept = [*self.model.parameters(), *self.model.buffers(), *state, *self.ema.parameters(), *self.ema.buffers()]
        return [tensor.detach().clone() for tensor in kept]


def _scene(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> Scene:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scene = Scene(model, optimizer, scheduler, scaler, torch.optim.swa_utils.AveragedModel(model), inputs)
    for _ in range(2):
        scene.step()
    random.seed(3)
    numpy.random.seed(3)
    return scene


def plain() -> Scene:
    """The same at each call."""
    torch.manual_seed(0)
    model = Net()
    model.conv1.register_forward_hook(_pass)
    model.conv1.weight.register_hook(lambda grad: grad)
    return _scene(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2)), torch.randn(4, 3, 5, 5))


def elastic() -> Scene:
    """The same at each call; a dim is narrow."""
    torch.manual_seed(0)
    hidden = ee.ElasticDim(8, 12, name="hidden")
    model = nn.Sequential(
        ee.ElasticLinear(5, 8, out_dim=hidden),
        nn.ReLU(),
        ee.ElasticLinear(8, 8, in_dim=hidden, out_dim=hidden),
        ee.ElasticLinear(8, 3, in_dim=hidden),
    )
    scene = _scene(model, ee.optim.AdamW(model.parameters(), lr=1e-2), torch.randn(4, 5))
    hidden.resize(7)
    scene.step()
    return scene


def _pass(module: nn.Module, args: Any, output: Any) -> None: ...


class Edited(nn.Conv2d):
    """A class for a convolution to become."""


def widen(tensor: Tensor, axis: int, size: int) -> None:
    """Let a parameter or buffer have ``size`` along ``axis``, new ones zero."""
    shape = tuple(tensor.shape)
    made = tensor.new_zeros([size if index == axis else n for index, n in enumerate(shape)])

    def write(target: Tensor, source: Tensor) -> None:
        target.narrow(axis, 0, shape[axis]).copy_(source)

    with torch.no_grad():
        write(made, tensor)
        grad, tensor.grad = tensor.grad, None
        tensor.data = made
        if grad is not None:
            tensor.grad = torch.zeros_like(made)
            write(tensor.grad, grad)
    moved(tensor, shape, write)


def grow_plain(model: Any) -> None:
    """Two more channels out of the first convolution; they change nothing."""
    norm, following = model.bn1, model.body[1]
    for tensor in (model.conv1.weight, model.conv1.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        widen(tensor, 0, 8)
    widen(following.weight, 1, 8)
    model.conv1.out_channels = norm.num_features = following.in_channels = 8


def insert_plain(model: Any) -> nn.Module:
    """A convolution that passes on what it gets, after the second one."""
    layer = nn.Conv2d(6, 6, 1)
    nn.init.dirac_(layer.weight)
    nn.init.zeros_(layer.bias)
    model.body[1]._modules["after"] = layer
    model.body[1].register_forward_hook(lambda module, args, output: module._modules["after"](output))
    for parameter in layer.parameters():
        added(parameter, model.body[1].weight)
    return layer


def edit_plain(model: Any) -> None:
    """One of each kind."""
    model.conv1.__class__ = Edited
    insert_plain(model)
    grow_plain(model)
    bias = model.head.bias
    model.head._parameters["bias"] = None
    removed(bias)
    save_values(model.head.weight[1:3], model.head.weight.grad)
    with torch.no_grad():
        model.head.weight[1:3] *= 2
        model.head.weight.grad.zero_()


def edit_elastic(model: Any) -> None:
    """One of each kind, and a width."""
    hidden = model[0].out_dim
    layer = ee.ElasticLinear(7, 7, in_dim=hidden, out_dim=hidden)
    save_values(*layer.parameters())
    model._modules["9"] = layer
    model._modules["3"], model._modules["9"] = model._modules["9"], model._modules["3"]
    for parameter in layer.parameters():
        added(parameter, model[2].weight)
    bias = model[2].bias
    model[2]._parameters["bias"] = None
    removed(bias)
    hidden.resize(9)
    save_values(model[0].weight)
    with torch.no_grad():
        model[0].weight[:9] += 1
    hidden.resize(5)


SCENES = {"plain": (plain, edit_plain), "elastic": (elastic, edit_elastic)}
