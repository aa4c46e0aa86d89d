"""Two linear maps in a row as one: what a removed layer did is taken over by the layer before or behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...convert.trace import Call, Run
from ..undo import added, rewritten, save_values
from ..widths.tensors import replace_storage

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def neighbours(run: Run, layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The modules whose result is all that a layer takes and nothing else does, and which take all that it gives."""
    own = [call for call in run.calls if call.module is layer]
    if len(own) != 1 or len(own[0].inputs) != 1 or len(own[0].outputs) != 1:
        return None, None
    call = own[0]
    before = [
        c for c in run.calls if c is not call and len(c.outputs) == 1 and c.outputs[0] is call.inputs[0] and c.inputs and _leaf(c, run)
    ]
    after = [c for c in run.calls if c is not call and len(c.inputs) == 1 and c.inputs[0] is call.outputs[0] and _leaf(c, run)]
    first = before[0].module if len(before) == 1 and _only_use(run, call.inputs[0], call) and _once(run, before[0]) else None
    second = after[0].module if len(after) == 1 and _only_use(run, call.outputs[0], after[0]) and _once(run, after[0]) else None
    return first, second


def _leaf(call: Call, run: Run) -> bool:
    return not any(other.parent is call for other in run.calls)


def _once(run: Run, call: Call) -> bool:
    return sum(other.module is call.module for other in run.calls) == 1


def _only_use(run: Run, value: Any, by: Call) -> bool:
    """Whether a value goes into one call and nowhere else."""
    if any(value is other for other in run.outputs):
        return False
    return all(by in node.call.chain() for node in run.nodes if _holds((node.args, node.kwargs), value))


def _holds(nested: Any, value: Any) -> bool:
    if nested is value:
        return True
    if isinstance(nested, dict):
        return any(_holds(item, value) for item in nested.values())
    return isinstance(nested, tuple | list) and any(_holds(item, value) for item in nested)


def foldable(layer: nn.Module) -> bool:
    """Whether a layer is a linear map that another one could take over."""
    return not _special(layer) and (type(layer) is nn.Linear or type(layer) in _BATCH_NORMS or _pointwise(layer))


def fold(layer: nn.Module, before: nn.Module | None, behind: nn.Module | None) -> str | None:
    """Let a neighbour do what a layer does, exactly but for rounding.

    Returns:
        what was done; ``None`` if neither neighbour can, and nothing has changed.
    """
    if not foldable(layer) or any(_special(module) for module in (before, behind) if module is not None):
        return None
    if type(layer) in _BATCH_NORMS:
        return _fold_norm(layer, before)
    if before is not None and _same_kind(layer, before) and getattr(before, "groups", 1) == 1:
        return _fold_back(layer, before)
    if behind is not None and _same_kind(layer, behind) and getattr(behind, "groups", 1) == 1 and not _pads_bias(layer, behind):
        return _fold_forward(layer, behind)
    return None


def _special(module: nn.Module) -> bool:
    """Whether something computes a module's tensors, or watches what passes through it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooked) or bool(getattr(module, "parametrizations", None)) or bool(module._modules)


def _pointwise(module: Any) -> bool:
    return (
        type(module) in _CONVS
        and set(module.kernel_size) == {1}
        and set(module.stride) == {1}
        and module.groups == 1
        and (module.padding == "same" or module.padding == "valid" or not any(module.padding))
    )


def _same_kind(layer: nn.Module, other: nn.Module) -> bool:
    return type(layer) is type(other)


def _pads_bias(layer: Any, behind: Any) -> bool:
    """Whether a convolution's padding would meet a shift that comes before it."""
    return (
        layer.bias is not None
        and type(behind) in _CONVS
        and behind.padding != "valid"
        and (behind.padding == "same" or any(behind.padding))
    )


def _fold_norm(norm: Any, before: Any) -> str | None:
    if type(before) not in (nn.Linear, *_CONVS) or norm.running_var is None:
        return None
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        save_values(before.weight)
        before.weight.mul_(scale.reshape(-1, *[1] * (before.weight.dim() - 1)))
        rewritten(before.weight)
        if before.bias is None:
            before._parameters["bias"] = made = nn.Parameter(shift)
            added(made, before.weight)
        else:
            save_values(before.bias)
            before.bias.mul_(scale).add_(shift)
            rewritten(before.bias)
    return "its statistics, scale and shift folded into the layer before it: the same in evaluation"


def _fold_back(layer: Any, before: Any) -> str:
    """``layer(before(x))`` in one, at ``before``."""
    outer = layer.weight.detach().flatten(1)
    with torch.no_grad():
        weight = torch.einsum("om,m...->o...", outer, before.weight)
        bias = _sum(outer @ before.bias if before.bias is not None else None, layer.bias)
    _replace(before, weight, bias)
    name = "out_features" if type(before) is nn.Linear else "out_channels"
    setattr(before, name, weight.shape[0])
    return "folded into the layer before it"


def _fold_forward(layer: Any, behind: Any) -> str:
    """``behind(layer(x))`` in one, at ``behind``."""
    inner = layer.weight.detach().flatten(1)
    with torch.no_grad():
        weight = torch.einsum("om...,mi->oi...", behind.weight, inner)
        moved = behind.weight.flatten(2).sum(2) if behind.weight.dim() > 2 else behind.weight
        bias = _sum(moved @ layer.bias if layer.bias is not None else None, behind.bias)
    _replace(behind, weight, bias)
    name = "in_features" if type(behind) is nn.Linear else "in_channels"
    setattr(behind, name, weight.shape[1])
    return "folded into the layer behind it"


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other.detach().clone()
    return one + other.detach()


def _replace(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer the weights of two. Its units are mixtures of those that it had: no momentum carries over."""
    replace_storage(module.weight, weight, _nothing_kept)
    rewritten(module.weight)
    if bias is None:
        return
    if module.bias is None:
        module._parameters["bias"] = made = nn.Parameter(bias)
        added(made, module.weight)
    else:
        replace_storage(module.bias, bias, _nothing_kept)
        rewritten(module.bias)


def _nothing_kept(made: Tensor, old: Tensor) -> None:
    """No unit of the old tensor is one of the new."""
