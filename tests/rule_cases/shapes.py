"""Cases of views, parts and images."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, by_name, simple, still

AB = {"a": 12, "b": 10}
REGROUPED = "its indices are regrouped"
ORDERED = "depends on the order of its indices"


def in_place_views(net, h):
    h = h.clone()
    h.view(h.shape[0], -1, 4).mul_(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=h.dtype))
    h.view(h.shape[0], -1, 4)[:, :, 1:3].add_(0.5)
    return h


def first_three(net, h):
    h = h.clone()
    h[:, :3] += 1
    return h


def swapped_halves(net, h):
    left, right = h.chunk(2, 1)
    return torch.cat([right, left], 1)


def added_halves(net, h):
    left, right = h.chunk(2, 1)
    return left + 2 * right


def unequal(net, h):
    one, two, three = h.split(net.parts, 1)
    return torch.cat([three, one.relu(), two], 1)


def parts(net, sizes):
    net.parts = [sizes["a"], sizes["b"], sizes["c"]]


def keep_size(net, sizes):
    net.size = sizes["a"]


def channel_shuffle(net, h):
    n, c, *image = h.shape
    return h.view(n, 2, c // 2, *image).transpose(1, 2).reshape(n, c, *image)


def flat(inner):
    """A setup of one weight from channels and so many positions to units of ``b``."""
    return lambda net, sizes: setattr(net, "w", nn.Parameter(torch.randn(sizes["a"] * inner, sizes["b"]) / 9))


def second_half(net, h):
    """Half of the channels, by where they are in memory."""
    half = h.shape[1] // 2
    return h[:, :half].as_strided((h.shape[0], half), h.stride(), half)


def unpooled(net, h):
    pooled, where = F.max_pool2d(h, 2, return_indices=True)
    return F.max_unpool2d(pooled, where, 2)


def heads_first(net, h):
    """Tokens and channels exchanged by a reshape where a transpose was meant."""
    return h.reshape(h.shape[0], h.shape[2], h.shape[1]).permute(0, 2, 1)


CASES = by_name(
    *simple(
        {
            "flatten_and_back": lambda net, h: h.flatten().view(h.shape),
            "unsafe_view": lambda net, h: torch.ops.aten._unsafe_view(h, [h.shape[0], h.shape[1]]),
            "reshape_alias": lambda net, h: torch.ops.aten._reshape_alias(h, h.shape, h.stride()),
            "view_of_fours": lambda net, h: h.view(h.shape[0], -1, 1).squeeze(-1),
            "expand_copy": lambda net, h: h + torch.ops.aten.expand_copy(h[:1], [3, h.shape[1]]),
            "select_copy": lambda net, h: h + torch.ops.aten.select_copy(h, 0, 1),
            "slice_copy": lambda net, h: h + torch.ops.aten.slice_copy(h, 0, 1, 2),
            "split_copy": lambda net, h: h + torch.ops.aten.split_copy(h, 1)[1],
            "split_with_sizes_copy": lambda net, h: h + torch.ops.aten.split_with_sizes_copy(h, [2, 1])[1],
            "unbind_copy": lambda net, h: h + torch.ops.aten.unbind_copy(h)[2],
            "view_copy": lambda net, h: torch.ops.aten.view_copy(h, [3, 1, h.shape[1]]).squeeze(1),
            "lift_fresh_copy": lambda net, h: h * torch.ops.aten.lift_fresh_copy(torch.tensor(2.0, dtype=h.dtype)),
            "transpose": lambda net, h: h.t().relu().t() + h.transpose(0, 1).mT,
            "transpose_in_place": lambda net, h: h.clone().t_().relu().clone().transpose_(0, 1),
            "unsqueeze_in_place": lambda net, h: h.clone().unsqueeze_(1).relu().clone().squeeze_(1),
            "squeeze": lambda net, h: h.unsqueeze(0).squeeze(0) + h[None, :, None].squeeze((0, 2)),
            "expand": lambda net, h: h + h.mean(0, keepdim=True).expand(h.shape[0], -1),
            "expand_as": lambda net, h: h + h[:1].expand_as(h),
            "repeat_of_one": lambda net, h: h + h[:1].repeat(3, 1),
            "stack": lambda net, h: torch.stack([h, h.relu()]).sum(0),
            "stack_and_unbind": lambda net, h: torch.stack([h, 2 * h], -1).unbind(-1)[1],
            "select_of_batch": lambda net, h: h + h.select(0, 1),
            "slice_of_all": lambda net, h: h[:, 0:] + h[:, :99],
            "narrow_of_batch": lambda net, h: h + h.narrow(0, 0, 1),
            "cut_and_joined": lambda net, h: torch.cat([h[:2], h[2:]], 0),
            "empty_joined": lambda net, h: h + torch.cat([torch.empty(0), torch.empty(0)]).sum(),
            "padding_of_none": lambda net, h: F.pad(h, (0, 0, 1, 0))[1:],
            "narrow_copy": lambda net, h: h + torch.ops.aten.narrow_copy(h.detach(), 0, 1, 1),  # torch 2.11 has no derivative of it
        }
    ),
    Case("attribute_in_view", lambda net, h: h.view(-1, 1, net.size).squeeze(1), setup=keep_size),
    Case("permute", lambda net, h: h.permute(0, 2, 1).mean(2), kind="sequences"),
    Case(
        "size_in_arithmetic",
        lambda net, h: h.reshape(h.size(0) * 2, h.size(1) // 2).reshape(h.size(0), h.size(1)),
        ("2:a",),
        "2:a",
        {"a": 6},
    ),
    Case(
        "flatten_of_images",
        lambda net, h: (h.flatten(1) @ net.w)[..., None, None],
        used="b",
        dims=AB,
        kind="images",
        setup=flat(24),
        own={"w": "a*24, b"},
    ),
    Case(
        "flatten_of_pooled",
        lambda net, h: (F.adaptive_avg_pool2d(h, 1).flatten(1) @ net.w)[..., None, None],
        used="b",
        dims=AB,
        kind="images",
        setup=flat(1),
        own={"w": "a, b"},
    ),
    Case(
        "as_strided", lambda net, h: h.as_strided((3, 12), (12, 1)), ("12",), "12", {}, rigid={"makers.0.weight[0]": "code keeps its size"}
    ),
    Case(
        "as_strided_over_itself",
        lambda net, h: h.as_strided((3, 12), (6, 1)),
        ("12",),
        "12",
        {},
        rigid={"makers.0.weight[0]": "code addresses its memory"},
    ),
    Case("as_strided_of_another_place", second_half, ("12",), "6", {}, rigid={"makers.0.weight[0]": "code addresses its memory"}),
    Case("repeat", lambda net, h: h.repeat(1, 2), used="a a"),
    Case("repeat_interleave", lambda net, h: h.repeat_interleave(2, 1), used="a*2"),
    Case(
        "select",
        lambda net, h: torch.stack([h[:, 0], h[:, 3]], 1),
        ("12",),
        "2",
        {},
        rigid={"makers.0.weight[0]": "code picks one index of it"},
    ),
    Case("unbind", lambda net, h: torch.stack(h.unbind(1), 1), ("12",), "12", {}, rigid={"makers.0.weight[0]": "code takes it apart"}),
    Case("mixed_heads", heads_first, ("12",), "12", {}, "sequences", rigid={"makers.0.weight[0]": REGROUPED}),
    Case(
        "spread_channels",
        lambda net, h: h.reshape(h.shape[0], h.shape[2] * 2, -1).reshape(h.shape),
        ("12",),
        "12",
        {},
        "signals",
        rigid={"makers.0.weight[0]": REGROUPED},
    ),
    # Parts
    Case("first_three", first_three, ("3 a",), "3 a", {"a": 9}),
    Case("without_the_first_three", lambda net, h: h[:, 3:], ("3 a",), "a", {"a": 9}),
    Case("without_the_last_three", lambda net, h: h[:, :-3], ("a 3",), "a", {"a": 9}),
    Case("two_slices", lambda net, h: h[:, :5] + h[:, 7:], ("12",), "5", {}, rigid={"makers.0.weight[0]": "code keeps its size"}),
    Case("every_other", lambda net, h: h[:, ::2], ("12",), "6", {}, rigid={"makers.0.weight[0]": "code takes every few indices of it"}),
    Case("narrow", lambda net, h: h.narrow(1, 3, h.shape[1] - 3), ("3 a",), "a", {"a": 9}),
    Case("in_place_views", in_place_views, ("a*4",), "a*4", {"a": 3}),
    Case("halves_added", added_halves, ("a a",), "a", {"a": 6}),
    Case("halves_swapped", swapped_halves, ("a a",), "a a", {"a": 6}),
    Case("thirds_by_unsafe_chunk", lambda net, h: sum(torch.unsafe_chunk(h, 3, 1)), ("a a a",), "a", {"a": 4}),
    Case("unsafe_split", lambda net, h: sum(torch.unsafe_split(h, h.shape[1] // 2, 1)), ("a a",), "a", {"a": 6}),
    Case("tensor_split", lambda net, h: sum(torch.tensor_split(h, 2, 1)), ("a a",), "a", {"a": 6}),
    Case("glu", lambda net, h: F.glu(h, 1), ("a a",), "a", {"a": 6}),
    Case("unequal_parts", unequal, ("a b c",), "c a b", {**AB, "c": 5}, setup=parts),
    Case("split_by_a_literal", lambda net, h: sum(h.split(4, 1)), ("12",), "4", {}, rigid={"makers.0.weight[0]": "code keeps its size"}),
    Case(
        "five_uneven_chunks",
        lambda net, h: torch.cat(h.chunk(5, 1)[::-1], 1),
        ("13",),
        "13",
        {},
        rigid={"makers.0.weight[0]": "code keeps its size"},
    ),
    Case("cat", lambda net, h, g: torch.cat([h, g], 1), ("a", "b"), "a b", AB),
    Case("cat_with_itself", lambda net, h: torch.cat([h, -h, h], 1), used="a a a"),
    Case("cat_reversed_and_added", lambda net, h, g: torch.cat([h, g], 1) + torch.cat([g, h], 1), ("a", "a"), "a a"),
    Case("uneven_and_reversed", lambda net, h, g: torch.cat([h, g], 1) + torch.cat([g, h], 1), ("a a", "a"), "a a a", {"a": 6}),
    Case("cat_with_zeros", lambda net, h: torch.cat([h, h.new_zeros(h.shape[0], 4)], 1), used="a 4"),
    Case("pad_of_channels", lambda net, h: F.pad(h, (2, 3), value=0.5), used="2 a 3"),
    Case("pad_of_image_channels", lambda net, h: F.pad(h, (0, 0, 0, 0, 2, 3)), used="2 a 3", kind="images"),
    Case("crop_of_channels", lambda net, h: F.pad(h, (-2, -3)), ("2 a 3",), "a", {"a": 7}),
    Case(
        "pad_to_a_literal",
        lambda net, h: F.pad(h, (0, 20 - h.shape[1])),
        ("12",),
        "20",
        {},
        rigid={"makers.0.weight[0]": "code keeps its size"},
    ),
    # Images
    *simple(
        {
            "max_pool": lambda net, h: F.max_pool2d(h, 2),
            "max_unpool": unpooled,
            "avg_pool": lambda net, h: F.avg_pool2d(h, 2),
            "adaptive_avg_pool": lambda net, h: F.adaptive_avg_pool2d(h, (2, 3)),
            "adaptive_max_pool": lambda net, h: F.adaptive_max_pool2d(h, (2, 3)),
            "adaptive_pool_to_one": lambda net, h: F.adaptive_avg_pool2d(h, 1),
            "reflection_pad": lambda net, h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
            "replication_pad": lambda net, h: F.pad(h, (1, 1, 1, 1), mode="replicate"),
            "circular_pad": lambda net, h: F.pad(h, (1, 1, 1, 1), mode="circular"),
            "upsample_nearest": lambda net, h: F.interpolate(h, scale_factor=2),
            "upsample_nearest_exact": lambda net, h: F.interpolate(h, scale_factor=2, mode="nearest-exact"),
            "upsample_bilinear": lambda net, h: F.interpolate(h, scale_factor=2, mode="bilinear"),
            "upsample_bicubic": lambda net, h: F.interpolate(h, size=(5, 5), mode="bicubic"),
            "antialiased": lambda net, h: (
                F.interpolate(h, size=(3, 3), mode="bilinear", antialias=True)
                + F.interpolate(h, size=(3, 3), mode="bicubic", antialias=True)
            ),
            "grid_sample": lambda net, h: F.grid_sample(h, h.new_zeros(h.shape[0], 3, 3, 2), align_corners=False),
            "roll_of_pixels": lambda net, h: h.roll((1, 2), (2, 3)),
            "flip_of_pixels": lambda net, h: h.flip(3),
            "window_of_pixels": lambda net, h: h.unfold(2, 2, 2).sum(-1),
            "mean_over_pixels": lambda net, h: h.mean((2, 3), keepdim=True),
            "maximum_over_pixels": lambda net, h: h.flatten(2).max(2)[0][..., None, None],
            "softmax_over_pixels": lambda net, h: h.flatten(2).softmax(-1).view(h.shape),
        },
        kind="images",
    ),
    *simple(
        {
            "max_pool_of_signals": lambda net, h: F.max_pool1d(h, 2),
            "avg_pool_of_signals": lambda net, h: F.avg_pool1d(h, 2),
            "adaptive_pool_of_signals": lambda net, h: F.adaptive_avg_pool1d(h, 3) + F.adaptive_max_pool1d(h, 3),
            "pads_of_signals": lambda net, h: F.pad(h, (1, 1), mode="reflect") + F.pad(h, (1, 1), mode="replicate"),
            "upsample_of_signals": lambda net, h: (
                F.interpolate(h, scale_factor=2)
                + F.interpolate(h, scale_factor=2, mode="linear")
                + F.interpolate(h, scale_factor=2, mode="nearest-exact")
            ),
            "sort_of_moments": lambda net, h: h.sort(2)[0] + h.cumsum(2) + h.topk(2, 2)[0].sum(2, keepdim=True),
        },
        kind="signals",
    ),
    Case("volumes", lambda net, h: volumes(h), kind="images"),
    Case(
        "unfolded",
        lambda net, h: (F.unfold(h, 2).transpose(1, 2) @ net.w).transpose(1, 2)[..., None],
        used="b",
        dims=AB,
        kind="images",
        setup=flat(4),
        own={"w": "a*4, b"},
    ),
    Case("folded", lambda net, h: F.fold(h.flatten(2), (8, 12), 2, stride=2), ("a*4",), "a", {"a": 3}, "images"),
    Case("pixel_shuffle", lambda net, h: F.pixel_shuffle(h, 2), ("a*4",), "a", {"a": 3}, "images"),
    Case("pixel_unshuffle", lambda net, h: F.pixel_unshuffle(h, 2), used="a*4", kind="images"),
    Case("channel_shuffle_by_views", channel_shuffle, ("a a",), "a*2", {"a": 6}, "images"),
    Case("channel_shuffle", lambda net, h: F.channel_shuffle(h, 2), ("a a",), "a*2", {"a": 6}, "images"),
    # Order
    *still(
        ORDERED,
        {
            "cumsum": lambda net, h: h.cumsum(1),
            "cumprod": lambda net, h: h.cumprod(1),
            "logcumsumexp": lambda net, h: h.logcumsumexp(1),
            "cummax": lambda net, h: h.cummax(1)[0],
            "cummin": lambda net, h: h.cummin(1)[0],
            "sort": lambda net, h: h.sort(1)[0],
            "stable_sort": lambda net, h: h.sort(dim=1, stable=True)[0],
            "argsort": lambda net, h: h.gather(1, h.argsort(1)),
            "topk": lambda net, h: h.topk(12, 1)[0],
            "flip": lambda net, h: h + h.flip(1),
            "roll": lambda net, h: h.roll(1, 1),
            "tril": lambda net, h: h.tril(),
            "triu": lambda net, h: h.triu(),
            "kthvalue": lambda net, h: h + h.kthvalue(2, 1)[0][:, None],
        },
    ),
    *still(ORDERED, {"roll_of_all": lambda net, h: h.roll(1)}, kind="images"),
    *still("code tells its indices apart", {"diff": lambda net, h: F.pad(h.diff(dim=1), (0, 1))}),
    Case(
        "window_over_channels",
        lambda net, h: h.unfold(1, 3, 1).sum(-1),
        ("12",),
        "10",
        {},
        rigid={"makers.0.weight[0]": "a window slides along it"},
    ),
    Case("diagonal", lambda net, h: (h @ h.t()).diagonal()[:, None], used="1", mixed="two activations are multiplied along it"),
    # Sizes that are alike by accident
    Case("batch_of_channels", lambda net, h: h.relu(), batch=12),
    Case("channels_and_moments", lambda net, h: h.relu(), kind="signals", dims={"a": 8}),
    Case(
        "reshaped_to_what_it_is",
        lambda net, h: h.reshape(h.shape[1], h.shape[0]),
        ("12",),
        "12",
        {},
        batch=12,
        rigid={"makers.0.weight[0]": "code keeps its size"},
    ),
    Case(
        "added_to_its_transpose",
        lambda net, h: h + h.t(),
        ("12",),
        "12",
        {},
        batch=12,
        rigid={"makers.0.weight[0]": "it is an axis of the model's input"},
    ),
    Case(
        "transposed_in_place",
        lambda net, h: h + h.clone().t_(),
        ("12",),
        "12",
        {},
        batch=12,
        rigid={"makers.0.weight[0]": "it is an axis of the model's input"},
    ),
)


def volumes(h):
    """Ops of three spatial axes, on a channel's image as a volume."""
    x = h[:, :, None].expand(-1, -1, 2, -1, -1)
    x = F.max_pool3d(x, (1, 2, 1)) + F.avg_pool3d(x, (1, 2, 1)) + F.adaptive_avg_pool3d(x, (2, 2, 6)) + F.adaptive_max_pool3d(x, (2, 2, 6))
    x = F.pad(x, (1, 1, 0, 0, 0, 0), mode="replicate") + F.pad(x, (1, 1, 0, 0, 0, 0), mode="reflect")
    x = F.interpolate(x, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="nearest-exact")
    pooled, places = F.max_pool3d(x, (1, 2, 2), return_indices=True)
    x = x + F.max_unpool3d(pooled, places, (1, 2, 2)) + F.interpolate(x, size=x.shape[2:], mode="trilinear")
    return F.grid_sample(x, x.new_zeros(x.shape[0], 2, 2, 2, 3), align_corners=False).sum(2)
