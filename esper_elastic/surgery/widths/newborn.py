"""What new units begin with: the law by which their module initialises itself, and zero where they are summed over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

#: Classes whose ``reset_parameters`` says what a fresh tensor holds, and needs nothing but the tensors' own shapes.
_RESETS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
_KNOWN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def fresh(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Tensors of a module as it would initialise them at other sizes.

    Args:
        module: that has them.
        shapes: of those wanted, by name.
        generator: to draw from, in the place of torch's own.

    Returns:
        By name. A module of ``torch.nn`` draws by its own ``reset_parameters``; the matrices of any other come from a uniform law as wide
        as their present values, and its vectors hold the mean of theirs.
    """
    kind = next((kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules")), nn.Module)
    own = {key: tensor for key, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    with torch.no_grad(), _drawing_from(generator, next(iter(own.values())).device):
        if isinstance(module, nn.MultiheadAttention):
            return {key: _fresh_attention(key, own[key], shape) for key, shape in shapes.items()}
        if isinstance(module, _RESETS) and set(shapes) <= _KNOWN:
            return _reset(module, kind, {key: shapes.get(key, tuple(tensor.shape)) for key, tensor in own.items()}, own)
        return {key: _like(own[key], shape) for key, shape in shapes.items()}


def depends_on_first_axis(module: nn.Module) -> bool:
    """Whether a weight's initial law depends on how many rows it has: they cannot be drawn by themselves."""
    return isinstance(module, _ConvTransposeNd | nn.MultiheadAttention) or not isinstance(module, _RESETS)


def _reset(module: nn.Module, kind: type[nn.Module], shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``reset_parameters`` gives a module without a history."""
    made: Any = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    tensors = {key: torch.empty(shape, dtype=own[key].dtype, device=own[key].device) for key, shape in shapes.items()}
    made.__dict__["_parameters"] = {
        key: None if tensor is None else nn.Parameter(tensors[key], requires_grad=False) for key, tensor in module._parameters.items()
    }
    made.__dict__["_buffers"] = {key: tensors.get(key) for key in module._buffers}
    made.reset_parameters()
    return {key: tensor.detach() for key, tensor in tensors.items()}


def _fresh_attention(key: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    made = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if key.endswith("weight"):
        nn.init.xavier_uniform_(made)
    elif key in ("bias_k", "bias_v"):
        nn.init.xavier_normal_(made)
    return made


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    values = tensor.detach().float()
    made = torch.empty(shape, dtype=torch.float32, device=tensor.device)
    if tensor.is_meta or not tensor.numel():
        return made.to(tensor.dtype).zero_()
    matrix = sum(n > 1 for n in tensor.shape) > 1
    spread = float(values.std(correction=0)) * 3**0.5 if matrix else 0.0
    return made.uniform_(-spread, spread).add_(float(values.mean())).to(tensor.dtype)


def _drawing_from(generator: torch.Generator | None, device: torch.device) -> contextlib.ExitStack:
    """Have initialisers, which know torch's own generators alone, draw from another for a while."""
    end = contextlib.ExitStack()
    if generator is not None:
        own = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
        end.callback(own.set_state, own.get_state())
        end.callback(lambda: generator.set_state(own.get_state()))
        own.set_state(generator.get_state())
    return end
