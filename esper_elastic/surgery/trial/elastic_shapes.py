"""Sizes that the compiled ops of elastic layers give, for tensors without values: what :mod:`shapes` is for those of torch.

Whether what they are given fits has been checked before they are called; a rule here asks whether it is plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops.backend import LIBRARY_MISSING
from ...ops.batch_norm import statistics_type
from ...ops.convolution import output_size
from .shapes import Rule, alike, fake_tensor, like, plain


def _fit(x: Any, *parameters: Any) -> bool:
    return plain(x) and x.is_floating_point() and x.numel() > 0 and all(p is None or alike(x, p) for p in parameters)


def _linear(x: Any, weight: Any, bias: Any, control: Any, slots: Any, width: int | None, dtype: Any = None) -> Tensor | None:
    if dtype is not None or not _fit(x, weight, bias):
        return None
    return like(x, (*x.shape[:-1], weight.shape[0] if width is None else width))


def _convolution(x: Any, weight: Any, bias: Any, control: Any, slots: Any, *geometry: Any) -> Tensor | None:
    stride, padding, dilation, transposed, output_padding, _, channels, _ = geometry
    if not (_fit(x, weight, bias) and weight.is_contiguous()):
        return None
    sizes = output_size(x.shape, weight.shape, stride, padding, dilation, output_padding if transposed else None)
    return like(x, (x.shape[0], channels, *sizes)) if min(sizes) > 0 else None


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, *_: Any) -> tuple[Tensor, ...] | None:
    if not _fit(x, weight, bias, mean, var):
        return None
    return _with_mean_and_deviation(x, (x.shape[1],), statistics_type(x, weight, mean))


def _batch_norm_eval(x: Any, weight: Any, bias: Any, mean: Any, var: Any, *_: Any) -> Tensor | None:
    return like(x, x.shape) if _fit(x, weight, bias, mean, var) else None


def _layer_norm(
    x: Any, weight: Any, bias: Any, control: Any, slots: Any, compact: bool, normalized_dims: int, eps: float
) -> tuple[Tensor, ...] | None:
    if not _fit(x, weight, bias):
        return None
    rows = (*x.shape[: x.dim() - normalized_dims], *(1 for _ in range(normalized_dims)))
    return _with_mean_and_deviation(x, rows, statistics_type(x, weight, bias))


def _with_mean_and_deviation(x: Any, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A result like ``x``, and what a norm saves beside it."""
    mean, deviation = (fake_tensor(x.fake_mode, shape, None, dtype, x.device) for _ in range(2))
    return like(x, x.shape), mean, deviation


#: The rule of a function, by the function.
ELASTIC_RULES: dict[Any, Rule] = {}

if LIBRARY_MISSING is None:
    _OPS = torch.ops.esper_elastic
    ELASTIC_RULES |= {
        _OPS.linear.default: _linear,
        _OPS.convolution.default: _convolution,
        _OPS.batch_norm.default: _batch_norm,
        _OPS.batch_norm_eval.default: _batch_norm_eval,
        _OPS.layer_norm.default: _layer_norm,
    }
