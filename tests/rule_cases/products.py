"""Cases of matrix products, convolutions, attention and norms."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, by_name, still

AB = {"a": 12, "b": 10}
HEADS = {"h": 3}
SUMMED = "two activations are multiplied along it"
NORM = "a norm runs over it"


def weight(*shape, **named):
    """A setup of one parameter ``w``; dims in ``shape`` by name, with a factor as in ``"a*4"``."""

    def setup(net, sizes):
        net.w = nn.Parameter(torch.randn([n if isinstance(n, int) else sized(n, sizes) for n in shape]) / 3)
        for name, n in named.items():
            setattr(net, name, sized(n, sizes))

    return setup


def sized(text, sizes):
    name, _, inner = text.partition("*")
    return sizes[name] * int(inner or 1)


def low_rank(net, sizes):
    net.w, net.v = nn.Parameter(torch.randn(sizes["a"], sizes["r"])), nn.Parameter(torch.randn(sizes["r"], sizes["b"]))


def module(make):
    """A setup of one module ``m``."""

    def setup(net, sizes):
        net.m = make(sizes)

    return setup


def affine_norm(make):
    """The same with weights that are not all one and zero."""

    def setup(net, sizes):
        net.m = make(sizes)
        for tensor in net.m.parameters():
            nn.init.normal_(tensor)

    return setup


def functional_norm(net, sizes):
    net.w, net.b = nn.Parameter(torch.randn(sizes["a"])), nn.Parameter(torch.randn(sizes["a"]))


def statistics(net, sizes):
    functional_norm(net, sizes)
    net.register_buffer("mean", torch.randn(sizes["a"]))
    net.register_buffer("var", torch.rand(sizes["a"]) + 1)


def statistics_of_both(net, sizes):
    net.register_buffer("mean", torch.randn(sizes["a"] + sizes["b"]))
    net.register_buffer("var", torch.rand(sizes["a"] + sizes["b"]) + 1)


def running_scale(net, sizes):
    net.register_buffer("scale", torch.rand(sizes["a"] + sizes["b"]) + 1)


def follow_scale(net, *made):
    h = torch.cat(made, 1)
    if net.training:
        net.scale.mul_(0.9).add_(0.1 * h.detach().abs().mean(0))
    return h / net.scale


def heads(net, h):
    """One head of size four for every four channels."""
    return h.view(*h.shape[:2], -1, 4).transpose(1, 2)


def attend(net, q, k, v):
    x = F.scaled_dot_product_attention(heads(net, q), heads(net, k), heads(net, v))
    return x.transpose(1, 2).flatten(2)


def one_head(net, q, k, v):
    return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def by_hand(net, q, k, v):
    q, k, v = heads(net, q), heads(net, k), heads(net, v)
    return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(*q.shape[:1], q.shape[2], -1)


def fused_qkv(net, h):
    q, k, v = h.view(*h.shape[:2], 3, -1, 4).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def norm_of(groups):
    return affine_norm(lambda n: nn.GroupNorm(groups if groups else n["a"] // 3, n["a"]))


def grouped(width_in, width_out, transposed=False):
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    return module(lambda n: layer(n["a"], n["a"] // width_in * width_out, 3, padding=1, groups=n["a"] // width_in))


NORMED = {"w": "a", "b": "a"}
MODULE = {"m.weight": "a", "m.bias": "a"}
RUNNING = {**MODULE, "m.running_mean": "a", "m.running_var": "a"}

CASES = by_name(
    # Products
    Case("mm", lambda net, h: h @ net.w, ("a",), "b", AB, setup=weight("a", "b"), own={"w": "a, b"}),
    Case("linear_of_a_bare_weight", lambda net, h: F.linear(h, net.w), ("a",), "b", AB, setup=weight("b", "a"), own={"w": "b, a"}),
    Case("bmm_with_a_weight", lambda net, h: h @ net.w, ("a",), "b", AB, "sequences", setup=weight(2, "a", "b"), own={"w": "2, a, b"}),
    Case(
        "bmm_of_two",
        lambda net, q, k: q @ k.transpose(1, 2) @ net.w,
        ("a", "a"),
        "b",
        AB,
        "sequences",
        setup=weight(7, "b"),
        own={"w": "7, b"},
        mixed={"a": SUMMED},
    ),
    Case("mv", lambda net, h: torch.mv(h, net.w)[:, None], used="1", setup=weight("a"), own={"w": "a"}),
    Case("addmv", lambda net, h: torch.addmv(h.new_ones(3), h, net.w)[:, None], used="1", setup=weight("a"), own={"w": "a"}),
    Case("dot", lambda net, h: h * torch.dot(net.w, net.w), setup=weight(5)),
    Case(
        "low_rank",
        lambda net, h: h @ (net.w @ net.v),
        ("a",),
        "b",
        {**AB, "r": 3},
        setup=low_rank,
        own={"w": "a, r", "v": "r, b"},
        mixed={"a": SUMMED},
    ),
    Case("vdot", lambda net, h: h * torch.vdot(net.w, h[0]), setup=weight("a"), own={"w": "a"}),
    Case("addmm", lambda net, h: torch.addmm(h.new_ones(1, 1), h, net.w), ("a",), "b", AB, setup=weight("a", "b"), own={"w": "a, b"}),
    Case(
        "addmm_of_two_made",
        lambda net, h, g: torch.addmm(g, h, net.w, beta=0.5),
        ("a", "b"),
        "b",
        AB,
        setup=weight("a", "b"),
        own={"w": "a, b"},
    ),
    Case(
        "baddbmm",
        lambda net, h, g: torch.baddbmm(g, h, net.w, alpha=2),
        ("a", "b"),
        "b",
        AB,
        "sequences",
        setup=weight(2, "a", "b"),
        own={"w": "2, a, b"},
    ),
    Case(
        "addbmm",
        lambda net, h: torch.addbmm(h.new_ones(1), h, net.w),
        ("a",),
        "b",
        AB,
        "sequences",
        setup=weight(2, "a", "b"),
        own={"w": "2, a, b"},
    ),
    Case(
        "einsum",
        lambda net, h: torch.einsum("bnc,cd->bnd", h, net.w),
        ("a",),
        "b",
        AB,
        "sequences",
        setup=weight("a", "b"),
        own={"w": "a, b"},
    ),
    Case(
        "einsum_of_heads",
        lambda net, h: torch.einsum("bna,ahd->bnhd", h, net.w).flatten(2),
        ("a",),
        "h*4",
        {"a": 12, "h": 3},
        "sequences",
        setup=weight("a", "h", 4),
        own={"w": "a, h, 4"},
        mixed={"a": SUMMED},
    ),
    Case(
        "bilinear",
        lambda net, h, g: F.bilinear(h, g, net.w),
        ("12", "10"),
        "4",
        {},
        setup=weight(4, 12, 10),
        rigid={"makers.0.weight[0]": "_trilinear is not understood"},
    ),
    Case(
        "bilinear_module",
        lambda net, h, g: net.m(h, g),
        ("12", "10"),
        "4",
        {},
        setup=module(lambda n: nn.Bilinear(12, 10, 4)),
        rigid={"makers.0.weight[0]": "_trilinear is not understood"},
    ),
    # Convolutions
    Case("conv1d", lambda net, h: F.conv1d(h, net.w), ("a",), "b", AB, "signals", setup=weight("b", "a", 3), own={"w": "b, a"}),
    Case(
        "conv2d", lambda net, h: F.conv2d(h, net.w, padding=1), ("a",), "b", AB, "images", setup=weight("b", "a", 3, 3), own={"w": "b, a"}
    ),
    Case(
        "conv_transposed",
        lambda net, h: F.conv_transpose2d(h, net.w),
        ("a",),
        "b",
        AB,
        "images",
        setup=weight("a", "b", 2, 2),
        own={"w": "a, b"},
    ),
    Case("depthwise", lambda net, h: net.m(h), kind="images", setup=grouped(1, 1), own={"m.weight": "a", "m.bias": "a"}),
    Case(
        "depthwise_multiplied",
        lambda net, h: net.m(h),
        used="a*2",
        kind="images",
        setup=grouped(1, 2),
        own={"m.weight": "a*2", "m.bias": "a*2"},
    ),
    Case("grouped", lambda net, h: net.m(h), kind="images", setup=grouped(3, 3), own={"m.weight": "a", "m.bias": "a"}, multiple={"a": 3}),
    Case(
        "grouped_transposed",
        lambda net, h: net.m(h),
        kind="images",
        setup=grouped(3, 3, True),
        own={"m.weight": "a", "m.bias": "a"},
        multiple={"a": 3},
    ),
    Case(
        "groups_of_a_literal_transposed",
        lambda net, h: F.conv_transpose2d(h, net.w, groups=4),
        ("4:c",),
        "8",
        {"c": 3},
        "images",
        setup=lambda net, n: setattr(net, "w", nn.Parameter(torch.randn(4 * n["c"], 2, 1, 1))),
        own={"w": "4:c, 2"},
        mixed="a grouped convolution sums over it",
    ),
    Case(
        "groups_of_two_widths",
        lambda net, h: net.m(h),
        ("g*3",),
        "g*2",
        {"g": 4},
        "images",
        setup=module(lambda n: nn.Conv2d(n["g"] * 3, n["g"] * 2, 3, padding=1, groups=n["g"])),
        own={"m.weight": "g*2", "m.bias": "g*2"},
    ),
    Case(
        "groups_of_four_and_six",
        lambda net, h: net.m(h),
        ("g*6",),
        "g*4",
        {"g": 4},
        "images",
        setup=module(lambda n: nn.Conv2d(n["g"] * 6, n["g"] * 4, 3, padding=1, groups=n["g"])),
        own={"m.weight": "g*4", "m.bias": "g*4"},
    ),
    Case(
        "groups_of_a_literal",
        lambda net, h: F.conv2d(h, net.w, groups=4),
        ("4:c",),
        "8",
        {"c": 3},
        "images",
        setup=lambda net, n: setattr(net, "w", nn.Parameter(torch.randn(8, n["c"], 1, 1))),
        own={"w": "8, c"},
    ),
    # Attention
    Case("attention", attend, ("h*4",) * 3, "h*4", HEADS, "sequences"),
    Case("attention_by_hand", by_hand, ("h*4",) * 3, "h*4", HEADS, "sequences"),
    Case("fused_qkv", fused_qkv, ("3:h*4",), "h*4", HEADS, "sequences"),
    Case(
        "one_head",
        one_head,
        ("a", "a", "b"),
        "b",
        AB,
        "sequences",
        compact={"a": "code computes a number from sizes"},
        mixed={"a": SUMMED},
    ),
    # Norms
    Case("batch_norm", lambda net, h: net.m(h), setup=affine_norm(lambda n: nn.BatchNorm1d(n["a"])), own=RUNNING),
    Case("batch_norm_of_images", lambda net, h: net.m(h), kind="images", setup=affine_norm(lambda n: nn.BatchNorm2d(n["a"])), own=RUNNING),
    Case(
        "functional_batch_norm",
        lambda net, h: F.batch_norm(h, net.mean, net.var, net.w, net.b, net.training),
        setup=statistics,
        own={**NORMED, "mean": "a", "var": "a"},
        compact="code writes a tensor in place",
    ),
    Case(
        "functional_batch_norm_of_two",
        lambda net, h, g: F.batch_norm(torch.cat([h, g], 1), net.mean, net.var, training=net.training),
        ("12", "10"),
        "22",
        {},
        setup=lambda net, n: statistics_of_both(net, AB),
        rigid={"makers.0.weight[0]": "code writes part of a tensor in place"},
    ),
    Case(
        "running_scale_of_two",
        follow_scale,
        ("12", "10"),
        "22",
        {},
        setup=lambda net, n: running_scale(net, AB),
        rigid={"makers.0.weight[0]": "code writes part of a tensor in place"},
    ),
    Case("layer_norm", lambda net, h: net.m(h), setup=affine_norm(lambda n: nn.LayerNorm(n["a"])), normed=True, own=MODULE),
    Case(
        "functional_layer_norm",
        lambda net, h: F.layer_norm(h, h.shape[1:], net.w, net.b),
        setup=functional_norm,
        own=NORMED,
        compact=NORM,
        mixed=NORM,
    ),
    Case("layer_norm_of_images", lambda net, h: F.layer_norm(h, h.shape[1:]), kind="images", compact=NORM, mixed=NORM),
    Case("rms_norm", lambda net, h: net.m(h), setup=affine_norm(lambda n: nn.RMSNorm(n["a"])), normed=True, own={"m.weight": "a"}),
    Case("group_norm", lambda net, h: net.m(h), kind="images", setup=norm_of(0), own=MODULE, multiple={"a": 3}),
    Case("group_norm_of_one_group", lambda net, h: net.m(h), kind="images", setup=norm_of(1), normed=True, own=MODULE),
    Case(
        "groups_by_size",
        lambda net, h: F.group_norm(h, h.shape[1] // 3, net.w, net.b),
        kind="images",
        setup=functional_norm,
        own=NORMED,
        multiple={"a": 3},
    ),
    Case(
        "normed_by_four_groups_of_any_width",
        lambda net, h: F.group_norm(h.view(h.shape[0], 4, -1, *h.shape[2:]).relu().view(h.shape), 4),
        ("4:a",),
        "4:a",
        {"a": 3},
        "images",
        compact=NORM,
        mixed=NORM,
    ),
    Case(
        "groups_of_a_literal_normed",
        lambda net, h: F.group_norm(h, 4),
        ("12",),
        "12",
        {},
        "images",
        rigid={"makers.0.weight[0]": "code keeps its size"},
    ),
    Case("instance_norm", lambda net, h: F.instance_norm(h), kind="images"),
    Case(
        "instance_norm_module",
        lambda net, h: net.m(h),
        kind="images",
        setup=affine_norm(lambda n: nn.InstanceNorm2d(n["a"], affine=True)),
        own=MODULE,
    ),
    Case(
        "instance_norm_with_statistics",
        lambda net, h: net.m(h),
        kind="images",
        setup=affine_norm(lambda n: nn.InstanceNorm2d(n["a"], affine=True, track_running_stats=True)),
        own=RUNNING,
        compact="code writes a tensor in place",
    ),
    Case(
        "norm_read_elsewhere",
        lambda net, h: net.m(h) * net.m.weight,
        setup=affine_norm(lambda n: nn.LayerNorm(n["a"])),
        own=MODULE,
        compact=NORM,
        mixed=NORM,
    ),
    Case(
        "rms_norm_without_weight",
        lambda net, h: net.m(h),
        setup=module(lambda n: nn.RMSNorm(n["a"], elementwise_affine=False)),
        normed=True,
    ),
    *still(
        "it is an axis of an image",
        {"local_response_norm": lambda net, h: F.local_response_norm(h, 3)},
        kind="images",
    ),
    Case(
        "weight_norm",
        lambda net, h: net.m(h),
        ("a",),
        "b",
        AB,
        setup=module(lambda n: torch.nn.utils.parametrizations.weight_norm(nn.Linear(n["a"], n["b"]))),
        own={"m.parametrizations.weight.original0": "b", "m.parametrizations.weight.original1": "b, a", "m.bias": "b"},
        normed=True,
        compact="a weight norm",
        mixed={"a": "a weight norm"},
    ),
)
