"""Cases of reductions and of what looks up by index."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, simple, still

LOOKED_UP = "it is looked up by index"


def runs(name: str) -> str:
    return f"{name} runs over it"


def over(name: str, op, **fields) -> Case:
    """A reduction over units, whose result shifts every unit."""
    return Case(name, lambda net, h: h + op(h), compact=fields.pop("compact", runs(name)), mixed=runs(name), **fields)


def table(net, sizes) -> None:
    net.w = nn.Parameter(torch.randn(9, sizes["a"]))


def places(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) % 3


CASES = by_name(
    over("sum", lambda h: h.sum(1, keepdim=True), compact=None),
    over("mean", lambda h: h.mean(1, keepdim=True)),
    over("amax", lambda h: h.amax(1, keepdim=True)),
    over("amin", lambda h: h.amin(1, keepdim=True)),
    over("prod", lambda h: h.prod(1, keepdim=True)),
    over("var", lambda h: h.var(1, correction=0, keepdim=True)),
    over("std", lambda h: h.std(1, correction=0, keepdim=True), minimum=2),
    over("logsumexp", lambda h: h.logsumexp(1, keepdim=True)),
    over("linalg_vector_norm", lambda h: h.norm(dim=1, keepdim=True)),
    over("any", lambda h: (h > 0.9).any(1, keepdim=True)),
    over("all", lambda h: (h > 0.9).all(1, keepdim=True)),
    over("count_nonzero", lambda h: h.count_nonzero(1)[:, None]),
    Case(
        "var_mean",
        lambda net, h: sum(torch.var_mean(h, 1, correction=0, keepdim=True)) + h,
        compact=runs("var_mean"),
        mixed=runs("var_mean"),
    ),
    Case(
        "std_mean",
        lambda net, h: sum(torch.std_mean(h, 1, correction=0, keepdim=True)) + h,
        compact=runs("std_mean"),
        mixed=runs("std_mean"),
        minimum=2,
    ),
    Case("norm_of_all", lambda net, h: h / h.norm(), compact=runs("linalg_vector_norm"), mixed=runs("linalg_vector_norm")),
    Case("nuclear", lambda net, h: h + torch.ops.aten.norm.ScalarOpt_dim(h, 2, [1], True), compact=runs("norm"), mixed=runs("norm")),
    Case("max_of_all", lambda net, h: h + h.max() + h.min(), compact=runs("max"), mixed=runs("max")),
    Case("median_of_all", lambda net, h: h + h.median(), compact=runs("median"), mixed=runs("median")),
    Case(
        "sum_of_no_nans",
        lambda net, h: h + h.nansum(1, keepdim=True) + h.nanmean(1, keepdim=True),
        compact="sum|nansum|number",
        mixed="sum",
    ),
    Case("maximum_of_two", lambda net, h: torch.maximum(h, -h) + torch.max(h, 2 * h)),
    Case("softmax", lambda net, h: h.softmax(1), compact=runs("softmax"), mixed=runs("softmax")),
    Case("log_softmax", lambda net, h: h.log_softmax(1), compact=runs("softmax"), mixed=runs("softmax")),
    Case("safe_softmax", lambda net, h: torch.ops.aten._safe_softmax(h, 1), compact=runs("softmax"), mixed=runs("softmax")),
    Case("normalize", lambda net, h: F.normalize(h, dim=1), compact=runs("linalg_vector_norm"), mixed=runs("linalg_vector_norm")),
    Case(
        "cosine_similarity",
        lambda net, h, g: F.cosine_similarity(h, g, dim=1)[:, None],
        ("a", "a"),
        "1",
        compact=runs("linalg_vector_norm"),
        mixed="runs over it",
    ),
    Case("renorm", lambda net, h: h.renorm(2, 0, 1.0), compact="a norm runs over it", mixed="a norm runs over it"),
    *still(
        "numbers its indices",
        {
            "maximum": lambda net, h: h + h.max(1, keepdim=True)[0],
            "minimum": lambda net, h: h + h.min(1, keepdim=True)[0],
            "median": lambda net, h: h + h.median(1, keepdim=True)[0],
            "mode": lambda net, h: h + h.mode(1, keepdim=True)[0],
            "argmax": lambda net, h: h + h.argmax(1, keepdim=True),
            "argmin": lambda net, h: h + h.argmin(1, keepdim=True),
            "argmax_of_all": lambda net, h: h + h.argmax(),
        },
    ),
    # Tables
    Case("embedding", lambda net, h: h + F.embedding(places(3), net.w), setup=table, own={"w": "9, a"}),
    Case("embedding_bag", lambda net, h: h + F.embedding_bag(places(3, 2), net.w), setup=table, own={"w": "9, a"}),
    Case(
        "embedding_alone",
        lambda net, h: h @ net.w.t(),
        used="b",
        dims={"a": 12, "b": 9},
        setup=lambda net, n: setattr(net, "w", nn.Parameter(torch.randn(n["b"], n["a"]))),
        own={"w": "b, a"},
    ),
    # By index
    *simple(
        {
            "index_of_batch": lambda net, h: h[torch.tensor([2, 0, 1])],
            "unsafe_index": lambda net, h: torch.ops.aten._unsafe_index(h, [torch.tensor([2, 0, 1])]),
            "index_select_of_batch": lambda net, h: h.index_select(0, torch.tensor([2, 0, 1])),
            "gather_of_batch": lambda net, h: h.gather(0, torch.zeros_like(h, dtype=torch.long)),
            "scatter_add_of_batch": lambda net, h: h.scatter_add(0, torch.zeros_like(h, dtype=torch.long), h),
            "index_add_of_batch": lambda net, h: h.index_add(0, torch.tensor([1, 1, 0]), h),
            "index_copy_of_batch": lambda net, h: h.index_copy(0, torch.tensor([1, 2, 0]), h),
            "index_fill_of_batch": lambda net, h: h.index_fill(0, torch.tensor([1]), 0.5),
            "index_put_of_batch": lambda net, h: h.index_put((torch.tensor([1, 1, 0]),), h, accumulate=True),
            "unsafe_index_put": lambda net, h: torch.ops.aten._unsafe_index_put(h, [torch.tensor([1, 0])], h[1:], True),
            "item_of_batch_set": lambda net, h: item_set(h),
            "masked_set": lambda net, h: mask_set(h),
        }
    ),
    Case("index_of_moments", lambda net, h: h[:, torch.tensor([2, 0])] + h[:, torch.tensor([1])], kind="sequences"),
    Case("indices_apart", lambda net, h: h[torch.tensor([1, 0]), :, torch.tensor([2, 3])][..., None], kind="signals"),
    *still(
        LOOKED_UP,
        {
            "index": lambda net, h: h[:, torch.arange(12)],
            "index_select": lambda net, h: h.index_select(1, torch.tensor([*range(12)])),
            "gather": lambda net, h: h.gather(1, torch.zeros(3, 12, dtype=torch.long)),
            "take_along_dim": lambda net, h: h.take_along_dim(torch.zeros(3, 12, dtype=torch.long), 1),
            "scatter": lambda net, h: h.scatter(1, torch.zeros(3, 1, dtype=torch.long), 0.5),
            "scatter_reduce": lambda net, h: h.scatter_reduce(1, torch.zeros(3, 2, dtype=torch.long), h[:, :2], "amax"),
            "index_add": lambda net, h: h.index_add(1, torch.tensor([1, 1]), h[:, :2]),
            "index_copy": lambda net, h: h.index_copy(1, torch.tensor([1, 2]), h[:, :2]),
            "index_fill": lambda net, h: h.index_fill(1, torch.tensor([1]), 0.5),
            "index_put": lambda net, h: h.index_put((torch.tensor([0, 1]), torch.tensor([3, 4])), h.new_ones(2)),
            "bag_of_units": lambda net, h: h + F.embedding_bag(places(3, 2), h.t())[:, :1],
        },
    ),
    Case(
        "part_of_a_batch_gathered",
        lambda net, h: h + h.gather(0, torch.zeros(1, 12, dtype=torch.long)),
        ("12",),
        "12",
        {},
        rigid={"makers.0.weight[0]": "code keeps its size"},
    ),
)


def item_set(h: Tensor) -> Tensor:
    h = h.clone()
    h[torch.tensor([0, 2])] = 0.5
    return h


def mask_set(h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0.3] = 0.5
    return h
