"""Sizes that common functions of torch give, for tensors without values.

Torch finds them too, at some hundred microseconds an op, most of what a run of a network without values takes. A rule here speaks only
where everything is plain: contiguous tensors whose sizes fit. Otherwise it says ``None``, and torch decides, with a message of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ...ops.convolution import output_size

Rule = Callable[..., Tensor | tuple[Tensor, ...] | None]


def fake_tensor(
    mode: FakeTensorMode, shape: Iterable[int], stride: Iterable[int] | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor without values, made without asking torch what making one would give."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        sizes = tuple(shape)
        if stride is None:
            meta = torch.empty(sizes, dtype=dtype, device="meta")
        else:
            meta = torch.empty_strided(sizes, tuple(stride), dtype=dtype, device="meta")
        return FakeTensor(mode, meta, device)


def like(x: Any, shape: Iterable[int]) -> Tensor:
    """A tensor without values of another shape, of the type and on the device of ``x``."""
    return fake_tensor(x.fake_mode, shape, None, x.dtype, x.device)


def plain(x: Any) -> bool:
    """Whether ``x`` is a contiguous tensor without values."""
    return type(x) is FakeTensor and x.layout is torch.strided and x.is_contiguous()


def _fit(x: Any, *vectors: Any, size: int) -> bool:
    """Whether each vector that is there goes with ``x`` and has ``size`` entries."""
    return all(v is None or (alike(x, v) and tuple(v.shape) == (size,)) for v in vectors)


def alike(x: Any, y: Any) -> bool:
    """Whether ``y`` is a tensor without values of the type and on the device of ``x``."""
    return type(y) is FakeTensor and y.dtype == x.dtype and y.device == x.device


def _linear(x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    if not (plain(x) and x.dim() and alike(x, weight) and weight.dim() == 2 and weight.shape[1] == x.shape[-1]):
        return None
    return like(x, (*x.shape[:-1], weight.shape[0])) if _fit(x, bias, size=weight.shape[0]) else None


def _convolution(num_axes: int) -> Rule:
    def rule(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Tensor | None:
        if not (plain(x) and x.dim() == num_axes + 2 and alike(x, weight) and weight.dim() == num_axes + 2 and weight.is_contiguous()):
            return None
        steps, edges, gaps = ((v,) * num_axes if type(v) is int else v for v in (stride, padding, dilation))
        if not all(type(v) is tuple and len(v) == num_axes for v in (steps, edges, gaps)) or min(*steps, *gaps) < 1 or min(edges) < 0:
            return None
        rows, columns = weight.shape[:2]
        if groups < 1 or rows % groups or x.shape[1] != columns * groups or not _fit(x, bias, size=rows):
            return None
        sizes = output_size(x.shape, weight.shape, steps, edges, gaps)
        return like(x, (x.shape[0], rows, *sizes)) if min(*sizes, *x.shape) > 0 else None

    return rule


def _batch_norm(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, momentum: Any = 0.1, eps: float = 1e-5
) -> Tensor | None:
    if not (plain(x) and x.dim() >= 2 and x.numel() and x.is_floating_point() and eps > 0):
        return None
    if (training and x.numel() == x.shape[1]) or (not training and (mean is None or var is None)):
        return None
    return like(x, x.shape) if _fit(x, mean, var, weight, bias, size=x.shape[1]) else None


def _layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
    shape = tuple(shape)
    if not (plain(x) and shape and x.is_floating_point() and tuple(x.shape[-len(shape) :]) == shape):
        return None
    return like(x, x.shape) if all(v is None or (alike(x, v) and tuple(v.shape) == shape) for v in (weight, bias)) else None


def _group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
    if not (plain(x) and x.dim() >= 2 and groups > 0 and x.numel() and x.is_floating_point() and x.shape[1] % groups == 0):
        return None
    if x.shape[0] * x.shape[1] // groups * math.prod(x.shape[2:]) <= 1:
        return None
    return like(x, x.shape) if _fit(x, weight, bias, size=x.shape[1]) else None


def _embedding(x: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    if not (plain(x) and x.dtype is torch.int64 and type(weight) is FakeTensor and weight.dim() == 2 and weight.device == x.device):
        return None
    if max_norm is not None or (padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]):
        return None
    return like(weight, (*x.shape, weight.shape[1]))


def _activation(x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    if not (plain(x) and x.is_floating_point()):
        return None
    return x if kwargs.get("inplace") or True in args else like(x, x.shape)


def _pointwise(x: Any) -> Tensor | None:
    return like(x, x.shape) if plain(x) and x.is_floating_point() else None


def _gelu(x: Any, approximate: str = "none") -> Tensor | None:
    return _pointwise(x) if approximate in ("none", "tanh") else None


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    if not (plain(x) and x.is_floating_point() and 0.0 <= p <= 1.0):
        return None
    return x if inplace else like(x, x.shape)


def _goes_with(x: Any, y: Any) -> bool:
    """Whether arithmetic of the two gives sizes and type of the first."""
    if not plain(x):
        return False
    if type(y) is FakeTensor:
        return y.dtype == x.dtype and y.device == x.device and y.shape == x.shape and y.is_contiguous()
    return (type(y) is int and x.dtype is not torch.bool) or (type(y) is float and x.is_floating_point())


def _arithmetic(x: Any, y: Any) -> Tensor | None:
    return like(x, x.shape) if _goes_with(x, y) and (x.is_floating_point()) else None


def _in_place(x: Any, y: Any) -> Tensor | None:
    return x if _goes_with(x, y) else None


def _of_tensors(*names: str) -> list[Any]:
    """The functions of these names, of ``torch`` and of its tensors."""
    return [getattr(owner, name) for name in names for owner in (torch, Tensor) if hasattr(owner, name)]


def require_same_type(*operands: Any) -> None:
    """Refuse a product of different types, which torch notices only where there are values.

    Raises:
        RuntimeError: as torch would.
    """
    types = dict.fromkeys(x.dtype for x in operands if isinstance(x, Tensor))
    if len(types) > 1:
        raise RuntimeError(f"expected operands of one type, got {' and '.join(str(dtype).removeprefix('torch.') for dtype in types)}")


#: Functions all of whose operands have one type, unless autocast sees to it.
SAME_TYPE: frozenset[Any] = frozenset(
    (
        *(F.linear, F.bilinear, torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        *_of_tensors("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    )
)

#: The rule of a function, by the function.
PLAIN_RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
    F.dropout: _dropout,
    F.gelu: _gelu,
}
PLAIN_RULES |= dict.fromkeys((F.relu, F.relu6, F.silu, F.hardswish, F.mish), _activation)
PLAIN_RULES |= dict.fromkeys(_of_tensors("relu", "sigmoid", "tanh"), _pointwise)
PLAIN_RULES |= dict.fromkeys(_of_tensors("add", "sub", "mul", "__add__", "__radd__", "__sub__", "__mul__", "__rmul__"), _arithmetic)
PLAIN_RULES |= dict.fromkeys(_of_tensors("add_", "sub_", "mul_", "__iadd__", "__isub__", "__imul__"), _in_place)
