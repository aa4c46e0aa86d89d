"""A small plain network for tests of conversion, and everything that planning or a refusal could have touched of a model."""

import random
from collections import deque
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Case


class Net(nn.Module):
    """Convolutions with batch norms, residual blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.layer1 = nn.Sequential(Residual(12, 20), Residual(12, 28))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer1(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn1(self.conv1(x))))


DIMS = {"stem": 12, "layer1.0.conv1": 20, "layer1.1.conv1": 28}


def net(dtype: torch.dtype = torch.float64) -> Net:
    """The same network at each call."""
    torch.manual_seed(0)
    return Net().to(dtype)


def pictures(dtype: torch.dtype = torch.float64) -> Tensor:
    """Its inputs."""
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(1), dtype=dtype)


CASE = Case("net", Net, pictures)


def fingerprint(model: nn.Module) -> list[Any]:
    """Objects, classes, bytes, attributes and what containers among them hold, modes, gradients, and the states of random generators."""
    found: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), torch.is_grad_enabled()]
    for path, module in model.named_modules():
        found += [path, id(module), type(module), module.training]
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in module.__dict__.items():
            found += [name, id(value), *contents(value)]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found += [tensor.data_ptr(), tensor.shape, tensor._version, tensor.requires_grad, content(tensor)]
                grad = tensor.grad if tensor.is_leaf else None
                found += [None] if grad is None else [id(grad), content(grad)]
    kept = vars(torch.nn.modules.module)
    return [*found, *[list(hooks) for name, hooks in kept.items() if name.startswith("_global_") and isinstance(hooks, dict)]]


def content(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def contents(value: Any) -> list[Any]:
    """What a container holds, and the containers in it."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in (str(key), id(item), *contents(item))]
    if isinstance(value, list | set | deque):
        return [found for item in value for found in (id(item), *contents(item))]
    return []
