"""Names that a module shares with the class that it would become: it is left as it is, since its code would find the wrong thing."""

from __future__ import annotations

import functools

import torch
from torch import nn

#: What instances have; the rest is what their classes have.
VIEW_ATTRIBUTES = ("_axes", "_sizes", "_widths", "_masks", "newborn", "_mixed")
SWITCH_ATTRIBUTES = ("kind", "static", "switch", "_position", "control", "slot", "backend")

_OF_OBJECTS = frozenset((*VIEW_ATTRIBUTES, *SWITCH_ATTRIBUTES, "recipe"))


def taken_name(module: nn.Module, base: type[nn.Module]) -> str | None:
    """A name that the module's own code has given to something, and that ``base`` needs; ``None`` if there is no such name."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # nothing of it changes
    needed = _names_of(base)  # type: ignore[arg-type]  # classes are hashable; mypy takes nn.Module's __hash__ for theirs
    own = [*vars(module), *module._parameters, *module._buffers, *module._modules]
    own += [name for each in _beyond_torch(type(module)) for name in vars(each)]
    return next((name for name in own if name in needed), None)


@functools.cache
def _names_of(base: type[nn.Module]) -> frozenset[str]:
    """What ``base`` and its own bases define beyond ``nn.Module``."""
    names = {name for each in _beyond_torch(base) for name in (*vars(each), *vars(each).get("__annotations__", ()))}
    general = {*dir(nn.Module), "reset_parameters"}  # anyone may have these
    return frozenset(name for name in names - general if not name.startswith("__")) | _OF_OBJECTS


def _beyond_torch(kind: type) -> list[type]:
    return [each for each in kind.__mro__ if each is not object and not each.__module__.startswith("torch.nn")]
