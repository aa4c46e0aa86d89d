"""Cases of elementwise ops, copies, tensors that code makes, and broadcasting."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, by_name, simple, still

SIZED = "code computes a number from sizes"


def channel_weight(net, sizes):
    net.w = nn.Parameter(torch.rand(sizes["a"]))


CASES = by_name(
    *simple(
        {
            "relu": lambda net, h: h.relu(),
            "arithmetic": lambda net, h: (2 * h + 1) * torch.sigmoid(h) - h**2,
            "copy": lambda net, h: torch.empty_like(h).copy_(h),
            "hardswish": lambda net, h: F.hardswish(h),
            "hardsigmoid": lambda net, h: F.hardsigmoid(h),
            "hardtanh": lambda net, h: F.hardtanh(h),
            "mish": lambda net, h: F.mish(h),
            "softplus": lambda net, h: F.softplus(h),
            "threshold": lambda net, h: F.threshold(h, 0.1, 0.0),
            "log_sigmoid": lambda net, h: F.logsigmoid(h),
            "nan_to_num": lambda net, h: h.nan_to_num(),
            "masked_fill": lambda net, h: h.masked_fill(h > 0.3, 0.5),
            "where": lambda net, h: torch.where(h > 0, h, 0.1 * h),
            "clone": lambda net, h: h.clone() + h.detach(),
            "alias": lambda net, h: torch.ops.aten.alias(h).contiguous() + torch.ops.aten.lift(h),
            "to_copy": lambda net, h: h.to(torch.float32).to(torch.float64, copy=True),
            "conj": lambda net, h: (+h + torch.ops.aten.positive(h)) * torch.conj(h),
            "fill": lambda net, h: h + h.clone().fill_(0.5),
            "zero": lambda net, h: h + h.clone().zero_(),
            "zeros_like": lambda net, h: h + torch.zeros_like(h),
            "ones_like": lambda net, h: h * torch.ones_like(h),
            "full_like": lambda net, h: h * torch.full_like(h, 2.0),
            "empty_like": lambda net, h: h * torch.empty_like(h).fill_(3.0),
            "zeros": lambda net, h: h + torch.zeros(h.shape, dtype=h.dtype),
            "ones": lambda net, h: h * torch.ones(h.shape[1], dtype=h.dtype),
            "full": lambda net, h: h * torch.full((h.shape[1],), 1.5, dtype=h.dtype),
            "empty": lambda net, h: h * torch.empty(h.shape[1], dtype=h.dtype).fill_(1.5),
            "new_zeros": lambda net, h: h + h.new_zeros(h.shape),
            "new_ones": lambda net, h: h * h.new_ones(h.shape[1]),
            "new_full": lambda net, h: h * h.new_full((1, h.shape[1]), 1.5),
            "new_empty": lambda net, h: h * h.new_empty(h.shape[1]).fill_(1.5),
            "empty_strided": lambda net, h: h * torch.empty_strided((h.shape[1],), (1,), dtype=h.dtype).fill_(1.5),
            "new_empty_strided": lambda net, h: h * h.new_empty_strided((h.shape[1],), (1,)).fill_(1.5),
            "empty_permuted": lambda net, h: h * torch.empty_permuted(h.shape, (0, 1), dtype=h.dtype).fill_(1.5),
            "scalar_tensor": lambda net, h: h * torch.scalar_tensor(2.0, dtype=h.dtype),
            "constant": lambda net, h: h * torch.tensor([2.0], dtype=h.dtype),
            "expanded_constant": lambda net, h: h * torch.tensor(2.0, dtype=h.dtype).expand(h.shape[1]),
            "width_one": lambda net, h: h * h.new_ones(1, 1) + torch.ones(h.shape[0], 1, dtype=h.dtype),
        }
    ),
    *simple(
        {
            "native_dropout": lambda net, h: F.dropout(h, 0.3, net.training),
            "dropout": lambda net, h: torch.ops.aten.native_dropout(h, 0.3, net.training)[0],
            "bernoulli": lambda net, h: h * torch.empty_like(h).bernoulli_(0.5) + torch.bernoulli(torch.sigmoid(h.detach())),
            "normal": lambda net, h: h * torch.empty_like(h).normal_(),
            "uniform": lambda net, h: h * torch.empty_like(h).uniform_(),
            "exponential": lambda net, h: h * torch.empty_like(h).exponential_(),
            "random": lambda net, h: h * torch.empty_like(h).random_(9),
            "rrelu": lambda net, h: F.rrelu(h, training=net.training),
            "rand_like": lambda net, h: h * torch.rand_like(h),
            "randn_like": lambda net, h: h * torch.randn_like(h),
            "rand": lambda net, h: h * torch.rand(h.shape, dtype=h.dtype),
            "randn": lambda net, h: h * torch.randn(h.shape, dtype=h.dtype),
        },
        random=True,
    ),
    Case("dropout2d", lambda net, h: F.dropout2d(h, 0.3, net.training), kind="images", random=True),
    Case("prelu", lambda net, h: F.prelu(h, net.w), setup=channel_weight, own={"w": "a"}),
    Case("prelu_of_images", lambda net, h: F.prelu(h, net.w), kind="images", setup=channel_weight, own={"w": "a"}),
    Case("scale_per_channel", lambda net, h: h * net.w[:, None, None], kind="images", setup=channel_weight, own={"w": "a"}),
    Case("two_made_alike", lambda net, h, g: h * torch.sigmoid(g), made=("a", "a")),
    *still(
        "code numbers its indices",
        {
            "arange": lambda net, h: h * torch.arange(h.shape[1], dtype=h.dtype),
            "linspace": lambda net, h: h * torch.linspace(0, 1, 12, dtype=h.dtype),
            "logspace": lambda net, h: h * torch.logspace(0, 1, h.shape[1], dtype=h.dtype),
            "eye": lambda net, h: h @ torch.eye(h.shape[1], dtype=h.dtype),
            "randint": lambda net, h: h * torch.randint(0, 5, h.shape),
            "hann_window": lambda net, h: h * torch.hann_window(h.shape[1], dtype=h.dtype),
            "randperm": lambda net, h: h * torch.randperm(h.shape[1]),
            "tril_indices": lambda net, h: h + torch.tril_indices(3, 4, 0)[0, :12].sum() + torch.triu_indices(12, 12)[0, :12],
            "triu_indices": lambda net, h: h + torch.triu_indices(3, 4, 6)[0, :12].sum() + torch.tril_indices(12, 12)[0, :12],
            "meshgrid": lambda net, h: (
                h + torch.meshgrid(torch.arange(3, dtype=h.dtype), torch.arange(h.shape[1], dtype=h.dtype), indexing="ij")[1]
            ),
        },
        random=True,
    ),
    *still("the op complex is not understood", {"complex_conj": lambda net, h: torch.conj(torch.complex(h, h)).resolve_conj().imag}),
    *still("code keeps its size", {"ones_of_a_literal": lambda net, h: h * torch.ones(12, dtype=h.dtype)}),
    *simple(
        {
            "scale_by_size": lambda net, h: h / h.shape[1] ** 0.5,
            "full_of_size": lambda net, h: h * torch.full((1,), 1.0 / h.shape[1], dtype=h.dtype),
            "tensor_of_size": lambda net, h: h / torch.sqrt(torch.tensor(h.shape[1], dtype=h.dtype)),
            "new_tensor_of_size": lambda net, h: h / h.new_tensor(h.size(1)),
            "filled_with_size": lambda net, h: h / torch.empty(1, dtype=h.dtype).fill_(h.shape[1]),
            "dropout_by_size": lambda net, h: F.dropout(h, 1.0 / h.shape[1], net.training),
        },
        compact=SIZED,
        mixed=SIZED,
    ),
    Case("sizes_cancel", lambda net, h: h * (h.shape[1] - h.size(-1) + 1)),
)
