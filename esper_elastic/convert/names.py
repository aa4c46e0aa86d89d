"""Names that a converted module has for purposes of its own. A module whose code gives one of them another meaning stays as it is."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..layers import ElasticView, Switchable

#: What instances have; the rest is what their classes have.
VIEW_ATTRIBUTES = ("_axes", "_sizes", "_widths", "_masks", "newborn", "_mixed")
SWITCH_ATTRIBUTES = ("kind", "static", "switch", "_position", "control", "slot", "backend")

_SHARED = ("reset_parameters", "__constants__")  # ours stands in for theirs


@functools.cache
def _taken() -> frozenset[str]:
    names = {name for kind in (ElasticView, Switchable) for name in dir(kind) if not hasattr(nn.Module, name) and name not in _SHARED}
    return frozenset(names | {*VIEW_ATTRIBUTES, *SWITCH_ATTRIBUTES})


def clash(module: nn.Module) -> str | None:
    """A name that a module gives a meaning of its own, or ``None``."""
    if isinstance(module, torch.jit.ScriptModule):  # it is not converted
        return None
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules, *dir(type(module))}
    return min(_taken() & own, default=None)
