"""``export``: an elastic model as ordinary modules of the active size."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ElasticBlock, ElasticLayer, ElasticView, Switchable
from ..layers.state import JOURNAL
from .dynamic import Converted, beneath, original_class, with_top_of
from .elasticize import PLAN
from .names import SWITCH_ATTRIBUTES, VIEW_ATTRIBUTES

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


@torch.no_grad()
def export(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which nothing elastic is left: ordinary modules that hold the active weights alone.

    A converted module gets its own class back, with the sizes that it keeps as they are now; a hand-built elastic layer becomes the ``nn``
    layer that it stands for. A block that is on becomes the module that it was or holds. One that is off becomes ``nn.Identity()``, or for
    a branch ``nn.Threshold(inf, 0)``, which maps every finite number to zero. Tied parameters stay tied; hooks travel as in a deepcopy, and
    edits of the model stay in place.

    Effects:
        None on ``model``. Allocates the active weights once; draws no random number.
    """
    memo: dict[int, Any] = {}
    elastic = [module for module in model.modules() if isinstance(module, ElasticLayer | Converted)]
    for module in elastic:
        off = isinstance(module, Switchable) and not module.on
        kind = with_top_of(type(module), original_of(module))
        memo[id(module)] = _substitute(module) if off else kind.__new__(kind)
    for module in elastic:
        for tensor, part in _tensors(module):
            memo.setdefault(id(tensor), part)
    for each in model.modules():
        for value in each.__dict__.values():  # what a hook computes before each call; deepcopy takes leaves alone
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for module in elastic:
        if not (isinstance(module, Switchable) and not module.on):
            memo[id(module)].__dict__.update(copy.deepcopy(_plain_attributes(module), memo))
    for block in reversed(list(model.modules())):  # inner ones first
        if isinstance(block, ElasticBlock):
            inside = copy.deepcopy(block.module, memo) if block.on else _substitute(block)
            memo[id(block)] = inside if beneath(type(block)) is type(block) else nn.Sequential(inside)
        if isinstance(block, ElasticBlock) or (isinstance(block, Switchable) and not block.on):
            put = getattr(block, "put_edits_on", None)  # what edits have put before and after it runs whether it is on or off
            if put is not None:
                put(memo[id(block)], memo)
    plain = copy.deepcopy(model, memo)
    for each in plain.modules():
        each.__dict__.pop(PLAN, None)
        each.__dict__.pop(JOURNAL, None)  # which leads to other sizes
    for each in model.modules():
        if isinstance(each, torch.jit.ScriptModule) and id(each) in memo:  # a copy of one forgets it
            for own, copied in zip(each.parameters(), memo[id(each)].parameters(), strict=True):
                copied.requires_grad_(own.requires_grad)
    return plain


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class of the ordinary module that an elastic one stands for."""
    if isinstance(module, Converted):
        return original_class(module)
    assert isinstance(module, ElasticLayer)
    return module.dense_class


def _substitute(block: nn.Module) -> nn.Module:
    """What a block that is off computes."""
    assert isinstance(block, Switchable)
    return nn.Identity() if block.kind == "block" else nn.Threshold(math.inf, 0.0)


def _tensors(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Elastic parameters and buffers of a module, each with a plain copy of what is active."""
    found: list[tuple[Tensor, Tensor]] = []
    if not isinstance(module, ElasticLayer):
        return found
    for name, axes in module.tensor_axes().items():
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None or all(axis is None for axis in axes):
            continue
        part = module.active(name).detach().clone()
        found.append((tensor, nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part))
    return found


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What the ordinary module has as attributes; tensors are still the elastic ones."""
    ours = set(SWITCH_ATTRIBUTES) if isinstance(module, Switchable) else set()
    sizes: dict[str, Any] = {}
    if isinstance(module, ElasticView):
        ours |= set(VIEW_ATTRIBUTES)
        sizes = {name: module.active_size(name) for name in module._sizes}
    elif isinstance(module, ElasticLayer):
        ours |= module.own_attributes()
        template = module._dense("meta", None).__dict__
        sizes = {name: value for name, value in template.items() if name not in module.__dict__ and name not in _MODULE_ATTRIBUTES}
    return {name: value for name, value in module.__dict__.items() if name not in ours} | sizes
