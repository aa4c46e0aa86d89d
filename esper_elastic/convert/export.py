"""``export``: an elastic model as ordinary ``nn`` modules of the active size."""

from __future__ import annotations

import copy
import math
from typing import Any

from torch import nn

from ..layers import ElasticBlock, ElasticLayer


def export(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which nothing elastic is left: ordinary ``nn`` modules that hold the active weights alone.

    A block that is on becomes the module inside it. One that is off becomes ``nn.Identity()``, or for a branch ``nn.Threshold(inf, 0)``,
    which maps every finite number to zero. Tied parameters stay tied; hooks of elastic layers do not travel. Sizes that the model's own
    code keeps in attributes are copied as they are.

    Effects:
        None on ``model``. Allocates the active weights once; draws no random number.
    """
    memo: dict[int, Any] = {}
    ties: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, ElasticLayer):
            memo[id(module)] = _dense(module, ties)
    for module in reversed(list(model.modules())):  # inner blocks first
        if isinstance(module, ElasticBlock):
            if module.on:
                memo[id(module)] = copy.deepcopy(module.module, memo)
            else:
                memo[id(module)] = nn.Identity() if module.kind == "block" else nn.Threshold(math.inf, 0.0)
    return copy.deepcopy(model, memo)


def _dense(layer: ElasticLayer, ties: dict[int, nn.Parameter]) -> nn.Module:
    dense = layer.to_dense()
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            dense._parameters[name] = ties.setdefault(id(parameter), dense._parameters[name])  # type: ignore[arg-type]
    return dense
