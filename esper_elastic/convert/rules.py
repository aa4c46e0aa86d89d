"""What each op says of the axes of its operands: which are the same units, which are regrouped, which can only stay as they are.

One rule per op, by its ATen name. A rule sets the axes of the outputs and unifies those of the inputs. An op without a rule makes every
axis that it touches rigid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from .structure import Structure, concat, cut, fresh, resolve, size, stiffen
from .trace import Node, Value


class Scope(Protocol):
    """What a rule may call."""

    def unify(self, one: Structure, other: Structure) -> None: ...

    def fix(self, axis: Structure, why: str) -> None: ...

    def mix(self, axis: Structure, why: str, *, static: bool = False) -> None: ...

    def produce(self, weight: Value, axis: int) -> None: ...

    def consume(self, weight: Value, axis: int) -> bool: ...

    def at_least(self, axis: Structure, minimum: int) -> None: ...

    def group(self, groups: Structure, width: Structure) -> None: ...

    def normalise(self, axis: Structure) -> bool: ...

    def enter(self, axis: Structure) -> None: ...

    def follow(self, output: Value, input: Value, order: Sequence[int | None]) -> None: ...


Rule = Callable[[Scope, Node], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(op: Any) -> str:
    """The ATen name without namespace and without the underscore of a variant that works in place."""
    namespace, _, name = op._schema.name.partition("::")
    plain = name.rstrip("_") if not name.endswith("__") else name
    return plain if namespace == "aten" else f"{namespace}::{name}"


def values(tree: Any) -> list[Value]:
    """The values in arguments, in order."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [value for item in tree for value in values(item)]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def give(node: Node, *axes: list[Structure]) -> None:
    """Set the axes of the outputs; one that is an input, as in place, keeps its own."""
    for output, found in zip(node.outputs, axes, strict=False):
        if output.axes is None:
            output.axes = found


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def same(node: Node, which: int = 0) -> None:
    source: Value = values(node.args)[which]
    for output in node.outputs:
        if output.axes is None and output.shape == source.shape:
            output.axes = list(source.axes or [])


# Elementwise


def broadcast(scope: Scope, inputs: Iterable[Value], rank: int) -> list[Structure]:
    """The axes that operands have together once they are aligned from the right."""
    found: list[Structure] = [()] * rank
    for value in inputs:
        offset = rank - len(value.shape)
        for index, axis in enumerate(value.axes or []):
            place = index + offset
            if place < 0 or value.shape[index] == 1:
                continue
            if found[place] == ():
                found[place] = axis
            else:
                scope.unify(found[place], axis)
    return found


def pointwise(scope: Scope, node: Node) -> None:
    rank = max((len(output.shape) for output in node.outputs), default=0)
    axes = broadcast(scope, values((node.args, node.kwargs)), rank)
    give(node, *[axes] * len(node.outputs))


# what torch does not tag as such
for _name in ("copy", "native_dropout", "_fused_dropout", "bernoulli", "normal", "uniform", "hardswish", "hardsigmoid", "hardtanh", "mish"):
    RULES[_name] = pointwise
for _name in ("softplus", "threshold", "log_sigmoid_forward", "rrelu_with_noise", "nan_to_num", "masked_fill", "where", "_prelu_kernel"):
    RULES[_name] = pointwise


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "positive", "lift", "_conj", "fill", "zero")
def _copy(scope: Scope, node: Node) -> None:
    same(node)
    source = values(node.args)[0]
    for output in node.outputs:
        scope.follow(output, source, range(len(source.shape)))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "exponential", "random")
def _like(scope: Scope, node: Node) -> None:
    same(node)


@rule("zeros", "ones", "full", "empty", "rand", "randn", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
@rule("new_empty_strided", "empty_permuted")
def _uniform(scope: Scope, node: Node) -> None:
    give(node, [fresh(n) for n in node.outputs[0].shape])


@rule("arange", "linspace", "eye", "randperm", "randint", "tril_indices", "triu_indices", "hann_window", "logspace")
def _counted(scope: Scope, node: Node) -> None:
    axes = [fresh(n) for n in node.outputs[0].shape]
    for axis in axes:
        scope.fix(axis, "code numbers its indices")
    give(node, axes)


# Matrix products


@rule("mm", "bmm")
def _matmul(scope: Scope, node: Node) -> None:
    a, b = node.args[:2]
    give(node, product(scope, a, b))


def product(scope: Scope, a: Value, b: Value) -> list[Structure]:
    """The axes of ``a @ b``, both matrices or both batches of them."""
    assert a.axes is not None and b.axes is not None
    for one, other in zip(a.axes[:-2], b.axes[:-2], strict=True):
        scope.unify(one, other)
    contract(scope, a, -1, b, -2)
    scope.produce(b, -1)
    scope.produce(a, -2)
    return [*a.axes[:-1], b.axes[-1]]


def contract(scope: Scope, a: Value, i: int, b: Value, j: int) -> None:
    """Sum over an axis of both. Where one is a weight, units whose column in it is zero do not take part."""
    assert a.axes is not None and b.axes is not None
    scope.unify(a.axes[i], b.axes[j])
    if not scope.consume(a, i) | scope.consume(b, j):
        scope.mix(a.axes[i], "two activations are multiplied along it", static=True)


@rule("addmm", "baddbmm", "addbmm")
def _addmm(scope: Scope, node: Node) -> None:
    bias, a, b = node.args[:3]
    axes = product(scope, a, b)
    give(node, axes)
    for index, axis in enumerate(reversed(bias.axes)):
        if bias.shape[-1 - index] != 1:
            scope.unify(axis, axes[-1 - index])


@rule("mv", "dot", "vdot")
def _vector(scope: Scope, node: Node) -> None:
    a, b = node.args[:2]
    contract(scope, a, -1, b, -1)
    give(node, list(a.axes[:-1]))


@rule("addmv")
def _addmv(scope: Scope, node: Node) -> None:
    bias, a, b = node.args[:3]
    contract(scope, a, -1, b, -1)
    scope.unify(bias.axes[0], a.axes[0])
    give(node, list(a.axes[:-1]))


@rule("linear", "mkldnn_linear", "_mkl_linear")
def _linear(scope: Scope, node: Node) -> None:
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    contract(scope, x, -1, weight, -1)
    scope.produce(weight, 0)
    if isinstance(bias, Value):
        scope.unify(bias.axes[0], weight.axes[0])  # type: ignore[index]
    give(node, [*x.axes[:-1], *weight.axes[:-1]])


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(scope: Scope, node: Node) -> None:
    x, weight, bias = node.args[:3]
    transposed, groups = bool(argument(node, 6, "transposed", False)), int(argument(node, 8, "groups", 1))
    into, out = (0, 1) if transposed else (1, 0)
    channels = weight.axes[out]
    if groups == 1:
        contract(scope, x, 1, weight, into)
        scope.produce(weight, out)
    else:
        count = fresh(groups)
        width = fresh(weight.shape[0] // groups)
        scope.unify(weight.axes[0], (*count, *width))
        scope.unify(x.axes[1], (*count, *(width if transposed else weight.axes[1])))
        scope.group(count, width)
        scope.group(count, weight.axes[1])
        scope.enter(x.axes[1])
        scope.produce(weight, 0)
        channels = (*count, *weight.axes[1]) if transposed else weight.axes[0]
    if isinstance(bias, Value):
        scope.unify(bias.axes[0], channels)  # type: ignore[index]
    for axis in (*x.axes[2:], *weight.axes[2:]):
        scope.fix(axis, "a kernel slides along it")
    give(node, [x.axes[0], channels, *[fixed(scope, n, "a kernel slides along it") for n in node.outputs[0].shape[2:]]])


def fixed(scope: Scope, n: int, why: str) -> Structure:
    axis = fresh(n)
    scope.fix(axis, why)
    return axis


# Norms


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")
def _batch_norm(scope: Scope, node: Node) -> None:
    x, *others = values((node.args, node.kwargs))
    channels = x.axes[1]  # type: ignore[index]
    for value in others:
        scope.unify(value.axes[0], channels)  # type: ignore[index]
    scope.normalise(channels)
    give(
        node,
        list(x.axes or []),
        *[[channels] if len(v.shape) == 1 and v.shape[0] == x.shape[1] else unknown_axes(v) for v in node.outputs[1:]],
    )


def unknown_axes(value: Value) -> list[Structure]:
    return [fresh(n, "no rule says what it is") for n in value.shape]


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def _layer_norm(scope: Scope, node: Node) -> None:
    x, *affine = values((node.args, node.kwargs))
    count = len(node.args[1])
    for value in affine:
        for one, other in zip(value.axes or [], (x.axes or [])[-count:], strict=True):
            scope.unify(one, other)
    assert x.axes is not None
    first, *rest = x.axes[-count:]
    for axis in rest:
        scope.fix(axis, "it is a further axis of a layer norm")
    if not scope.normalise(first):
        scope.mix(first, "a norm runs over it")
    statistics = [*x.axes[:-count], *[()] * count]
    give(node, list(x.axes), statistics, statistics)


@rule("native_group_norm", "group_norm")
def _group_norm(scope: Scope, node: Node) -> None:
    x, *affine = values((node.args, node.kwargs))
    assert x.axes is not None
    channels = x.axes[1]
    groups = int(argument(node, 6, "group"))
    for value in affine:
        scope.unify(value.axes[0], channels)  # type: ignore[index]
    if groups > 1:
        count, width = fresh(groups), fresh(x.shape[1] // groups)
        scope.unify(channels, (*count, *width))
        scope.group(count, width)
        scope.normalise(channels)
    elif not scope.normalise(channels):
        scope.mix(channels, "a norm runs over it")
    statistics = [x.axes[0], fresh(groups)]
    give(node, list(x.axes), statistics, statistics)


@rule("_weight_norm_interface", "_weight_norm")
def _weight_norm(scope: Scope, node: Node) -> None:
    v, g = node.args[:2]
    dim = wrap(int(argument(node, 2, "dim", 0)), len(v.shape))
    for index, axis in enumerate(v.axes):
        if index == dim:
            scope.unify(axis, g.axes[dim])
        else:
            scope.mix(axis, "a weight norm runs over it")
    give(node, list(v.axes), list(g.axes))


# Views


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten", "_reshape_copy", "view_copy")
def _view(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    if output.axes is None:
        output.axes = regroup(scope, x, output.shape)


@rule("as_strided")
def _as_strided(scope: Scope, node: Node) -> None:
    """What ``reshape`` of some tensors comes to; any other use is not understood."""
    x, shape, stride = node.args[:3]
    layout = torch.empty_strided(x.shape, x.stride, device="meta")
    try:
        viewed = layout.view(shape).stride()
        is_view = all(n == 1 or a == b for n, a, b in zip(shape, viewed, stride, strict=True))
    except RuntimeError:
        is_view = False
    if is_view:
        give(node, regroup(scope, x, shape))
    else:
        for axis in x.axes:
            scope.fix(axis, "code addresses its memory")
        give(node, [fixed(scope, n, "code addresses its memory") for n in shape])


def regroup(scope: Scope, x: Value, shape: Sequence[int]) -> list[Structure]:
    """The axes after a view: runs of axes of equal size, in row-major order, are the same indices."""
    assert x.axes is not None
    found: list[Structure] = []
    if 0 in shape:
        return [fresh(n) for n in shape]
    i = j = 0
    while i < len(x.shape) or j < len(shape):
        i0, j0 = i, j
        before = after = 1
        if i < len(x.shape):
            before, i = x.shape[i], i + 1
        if j < len(shape):
            after, j = shape[j], j + 1
        while before != after:
            if before < after:
                before, i = before * x.shape[i], i + 1
            else:
                after, j = after * shape[j], j + 1
        if i - i0 == 1 and j - j0 == 1:
            found.append(x.axes[i0])
        elif j - j0 == 1:
            found.append(tuple(itertools.chain.from_iterable(x.axes[i0:i])))
        else:
            parts = split_known(tuple(itertools.chain.from_iterable(x.axes[i0:i])), shape[j0:j])
            if parts is None:
                parts = [fresh(n) for n in shape[j0:j]]
                scope.unify(tuple(itertools.chain.from_iterable(x.axes[i0:i])), tuple(itertools.chain.from_iterable(parts)))
            found += parts
    return found


def split_known(axis: Structure, shape: Sequence[int]) -> list[Structure] | None:
    """The factors of an axis dealt out to ``shape``, if they happen to fit."""
    factors = list(resolve(axis))
    parts: list[Structure] = []
    for n in shape:
        part: list[Any] = []
        while math.prod(f.size for f in part) < n and factors:
            part.append(factors.pop(0))
        if math.prod(f.size for f in part) != n:
            return None
        parts.append(tuple(part))
    return None if factors else parts


@rule("permute")
def _permute(scope: Scope, node: Node) -> None:
    x, order = node.args[:2]
    order = [wrap(d, len(x.shape)) for d in order]
    give(node, [x.axes[d] for d in order])
    scope.follow(node.outputs[0], x, order)


@rule("transpose", "swapaxes", "t", "numpy_T", "mT")
def _transpose(scope: Scope, node: Node) -> None:
    x = node.args[0]
    rank = len(x.shape)
    order = list(range(rank))
    a, b = (wrap(d, rank) for d in node.args[1:3]) if len(node.args) > 2 else (max(rank - 2, 0), max(rank - 1, 0))
    if rank:
        order[a], order[b] = order[b], order[a]
    give(node, [x.axes[d] for d in order])
    scope.follow(node.outputs[0], x, order)


@rule("unsqueeze")
def _unsqueeze(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    place = wrap(dim, len(x.shape) + 1)
    give(node, [*x.axes[:place], (), *x.axes[place:]])
    scope.follow(node.outputs[0], x, [*range(place), None, *range(place, len(x.shape))])


@rule("squeeze")
def _squeeze(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else range(len(x.shape))
    dims = {wrap(d, len(x.shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = [index for index, n in enumerate(x.shape) if not (n == 1 and index in dims)]
    for index in dims & set(kept):
        scope.at_least(x.axes[index], 2)
    give(node, [x.axes[index] for index in kept])
    scope.follow(node.outputs[0], x, kept)


@rule("expand", "broadcast_to", "expand_copy")
def _expand(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    offset = len(output.shape) - len(x.shape)
    give(
        node,
        [x.axes[index - offset] if index >= offset and x.shape[index - offset] == n else fresh(n) for index, n in enumerate(output.shape)],
    )


@rule("repeat", "tile")
def _repeat(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    offset = len(output.shape) - len(x.shape)
    axes: list[Structure] = []
    for index, n in enumerate(output.shape):
        own = x.shape[index - offset] if index >= offset else 1
        if own == 1:
            axes.append(fresh(n))
        else:
            axes.append(concat([x.axes[index - offset]] * (n // own)))
    give(node, axes)


@rule("select", "select_copy")
def _select(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "code picks one index of it")
    give(node, [axis for index, axis in enumerate(x.axes) if index != dim])


@rule("unbind", "unbind_copy")
def _unbind(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dim = wrap(int(argument(node, 1, "dim", 0)), len(x.shape))
    scope.fix(x.axes[dim], "code takes it apart")
    axes = [axis for index, axis in enumerate(x.axes) if index != dim]
    give(node, *[list(axes) for _ in node.outputs])


@rule("slice", "slice_copy")
def _slice(scope: Scope, node: Node) -> None:
    x = node.args[0]
    rank = len(x.shape)
    dim = wrap(int(argument(node, 1, "dim", 0)), rank)
    n, step = x.shape[dim], int(argument(node, 4, "step", 1))
    start, end, _ = slice(argument(node, 2, "start"), argument(node, 3, "end")).indices(n)
    axes = list(x.axes)
    if (start, end, step) != (0, n, 1):
        axes[dim] = stretch(scope, x.axes[dim], start, end, node.outputs[0].shape[dim], step)
    give(node, axes)
    if start == 0 and end == n and step == 1:
        scope.follow(node.outputs[0], x, range(rank))


def stretch(scope: Scope, axis: Structure, start: int, end: int, length: int, step: int) -> Structure:
    """A part of an axis."""
    if step != 1 or end <= start:
        scope.fix(axis, "code takes every few indices of it")
        return fixed(scope, length, "it is part of an axis that is fixed")
    ends = sorted({start, end, size(axis)} - {0})
    pieces = cut(axis, ends, "code cuts it where its units do not end")
    return pieces[ends.index(end)]


@rule("narrow", "narrow_copy")
def _narrow(scope: Scope, node: Node) -> None:
    x, dim, start, length = node.args[:4]
    dim = wrap(dim, len(x.shape))
    axes = list(x.axes)
    axes[dim] = stretch(scope, x.axes[dim], start % x.shape[dim], start % x.shape[dim] + length, length, 1)
    give(node, axes)


@rule("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dim = wrap(int(argument(node, 2, "dim", 0)), len(x.shape))
    sizes = [output.shape[dim] for output in node.outputs]
    pieces = cut(x.axes[dim], list(itertools.accumulate(sizes)), "code cuts it where its units do not end")
    if len(set(sizes)) == 1 and not op_name(node.op).startswith("split_with_sizes"):
        for piece in pieces[1:]:
            scope.unify(pieces[0], piece)
    give(node, *[[*x.axes[:dim], piece, *x.axes[dim + 1 :]] for piece in pieces])


@rule("glu")
def _glu(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dim = wrap(int(argument(node, 1, "dim", -1)), len(x.shape))
    half = x.shape[dim] // 2
    first, second = cut(x.axes[dim], [half, 2 * half], "code cuts it where its units do not end")
    scope.unify(first, second)
    give(node, [*x.axes[:dim], first, *x.axes[dim + 1 :]])


@rule("cat", "concat")
def _cat(scope: Scope, node: Node) -> None:
    parts: list[Value] = [part for part in node.args[0] if part.shape != (0,)]
    dim = wrap(int(argument(node, 1, "dim", 0)), len(parts[0].shape))
    axes = list(parts[0].axes or [])
    for part in parts[1:]:
        for index, axis in enumerate(part.axes or []):
            if index != dim:
                scope.unify(axes[index], axis)
    axes[dim] = concat([part.axes[dim] for part in parts])  # type: ignore[index]
    give(node, axes)


@rule("stack")
def _stack(scope: Scope, node: Node) -> None:
    parts: list[Value] = node.args[0]
    axes = broadcast(scope, parts, len(parts[0].shape))
    dim = wrap(int(argument(node, 1, "dim", 0)), len(axes) + 1)
    give(node, [*axes[:dim], fixed(scope, len(parts), "code stacks tensors along it"), *axes[dim:]])


@rule("constant_pad_nd", "pad")
def _pad(scope: Scope, node: Node) -> None:
    x, pads = node.args[:2]
    axes = list(x.axes)
    for index in range(len(pads) // 2):
        place = len(axes) - 1 - index
        low, high = pads[2 * index], pads[2 * index + 1]
        if low < 0 or high < 0:
            n = x.shape[place]
            axes[place] = stretch(scope, axes[place], max(-low, 0), n - max(-high, 0), n + min(low, 0) + min(high, 0), 1)
        why = "it is padding"
        axes[place] = concat([fixed(scope, max(low, 0), why), axes[place], fixed(scope, max(high, 0), why)])
    give(node, axes)


@rule("pixel_shuffle")
def _pixel_shuffle(scope: Scope, node: Node) -> None:
    x, factor = node.args[:2]
    channels = fresh(x.shape[-3] // factor**2)
    scope.unify(x.axes[-3], (*channels, *fixed(scope, factor**2, "pixel shuffle spreads it over the image")))
    images(scope, node, x, 2, channels)


@rule("pixel_unshuffle")
def _pixel_unshuffle(scope: Scope, node: Node) -> None:
    x, factor = node.args[:2]
    images(scope, node, x, 2, (*x.axes[-3], *fixed(scope, factor**2, "pixel unshuffle gathers it from the image")))


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(scope: Scope, node: Node) -> None:
    x, groups = node.args[:2]
    count, width = fresh(groups), fresh(x.shape[1] // groups)
    scope.unify(x.axes[1], (*count, *width))
    give(node, [x.axes[0], (*width, *count), *x.axes[2:]])


# Images


def images(scope: Scope, node: Node, x: Value, spatial: int, channels: Structure | None = None) -> None:
    """Outputs of an op that works on the last axes as on an image and leaves the others."""
    assert x.axes is not None
    why = "it is an axis of an image"
    for axis in x.axes[len(x.axes) - spatial :]:
        scope.fix(axis, why)
    for output in node.outputs:
        if output.axes is None:
            kept = list(x.axes[: len(x.axes) - spatial])
            if channels is not None:
                kept[-1] = channels
            output.axes = [*kept, *[fixed(scope, n, why) for n in output.shape[len(kept) :]]]


def _image_rule(spatial: int) -> Rule:
    return lambda scope, node: images(scope, node, node.args[0], spatial)


for _spatial in (1, 2, 3):
    for _kind in (
        "max_pool{}d_with_indices",
        "max_pool{}d",
        "avg_pool{}d",
        "_adaptive_avg_pool{}d",
        "adaptive_avg_pool{}d",
        "adaptive_max_pool{}d",
        "reflection_pad{}d",
        "replication_pad{}d",
        "upsample_nearest{}d",
        "_upsample_nearest_exact{}d",
        "grid_sampler_{}d",
        "mkldnn_max_pool{}d",
    ):
        RULES[_kind.format(_spatial)] = _image_rule(_spatial)
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_linear1d"):
    RULES[_name] = _image_rule(1 if "1d" in _name else 2)


@rule("im2col", "col2im")
def _columns(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    for axis in x.axes[-2:]:
        scope.fix(axis, "it is an axis of an image")
    if op_name(node.op) == "im2col":
        taps = output.shape[-2] // x.shape[-3]
        channels = (*x.axes[-3], *fixed(scope, taps, "it counts the taps of a window"))
        give(node, [*x.axes[:-3], channels, fixed(scope, output.shape[-1], "it is an axis of an image")])
    else:
        channels = fresh(output.shape[-3])
        scope.unify(x.axes[-2], (*channels, *fixed(scope, x.shape[-2] // output.shape[-3], "it counts the taps of a window")))
        give(node, [*x.axes[:-2], channels, *[fixed(scope, n, "it is an axis of an image") for n in output.shape[-2:]]])


# Along an axis


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "linalg_vector_norm", "norm", "any", "all")
@rule("max", "min", "argmax", "argmin", "median", "nansum", "nanmean", "count_nonzero", "mode")
def _reduce(scope: Scope, node: Node) -> None:
    name = op_name(node.op)
    inputs = values(node.args)
    if len(inputs) > 1:  # max and min of two
        pointwise(scope, node)
        return
    x = inputs[0]
    rank = len(x.shape)
    place = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims = argument(node, place, "dim")
    keep = bool(node.kwargs.get("keepdim", next((a for a in node.args[place + 1 :] if isinstance(a, bool)), False)))
    reduced = set(range(rank)) if dims is None or dims == [] else {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    for index in reduced:
        axis = x.axes[index]  # type: ignore[index]
        if name in ("argmax", "argmin", "max", "min", "median", "mode") and len(node.outputs) + (name.startswith("arg")) > 1:
            scope.fix(axis, f"{name} numbers its indices")
        else:
            scope.mix(axis, f"{name} runs over it", static=name == "sum")
    axes: list[Structure] = []
    for index, axis in enumerate(x.axes or []):
        if index not in reduced:
            axes.append(axis)
        elif keep:
            axes.append(())
    give(node, *[list(axes) for _ in node.outputs])


@rule("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
def _softmax(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    if x.shape:
        scope.mix(x.axes[wrap(dim, len(x.shape))], "softmax runs over it")
    same(node)


@rule(
    "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk", "flip", "roll", "tril", "triu", "renorm", "kthvalue"
)
@rule("diff", "unique_consecutive")
def _ordered(scope: Scope, node: Node) -> None:
    x, name = node.args[0], op_name(node.op)
    rank = len(x.shape)
    if name in ("tril", "triu"):
        dims: Any = [rank - 2, rank - 1]
    elif name == "topk" or name == "kthvalue" or name == "roll":
        dims = argument(node, 2, "dim" if name != "roll" else "dims", -1)
    elif name == "sort" or name == "argsort":
        dims = next((a for a in node.args[1:] if isinstance(a, int) and not isinstance(a, bool)), node.kwargs.get("dim", -1))
    else:
        dims = argument(node, 1, "dim", -1)
    places = {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    if name == "roll" and not dims:
        places = set(range(rank))
    for place in places:
        scope.fix(x.axes[place], f"{name} depends on the order of its indices")
    for output in node.outputs:
        if output.axes is None:
            output.axes = [x.axes[i] if i not in places or n == x.shape[i] else fixed(scope, n, "") for i, n in enumerate(output.shape)]


@rule("unfold")
def _unfold(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "a window slides along it")
    axes = list(x.axes)
    axes[dim] = fixed(scope, node.outputs[0].shape[dim], "a window slides along it")
    give(node, [*axes, fixed(scope, node.outputs[0].shape[-1], "a window slides along it")])


# Look-ups


@rule("embedding")
def _embedding(scope: Scope, node: Node) -> None:
    weight, indices = node.args[:2]
    scope.fix(weight.axes[0], "it is looked up by index")
    scope.produce(weight, 1)
    give(node, [*indices.axes, weight.axes[1]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(scope: Scope, node: Node) -> None:
    weight = node.args[0]
    scope.fix(weight.axes[0], "it is looked up by index")
    scope.produce(weight, 1)
    give(node, [fixed(scope, node.outputs[0].shape[0], "it counts bags"), weight.axes[1]], *[unknown_axes(v) for v in node.outputs[1:]])


@rule("index", "_unsafe_index")
def _index(scope: Scope, node: Node) -> None:
    x, indices = node.args[:2]
    places = [i for i, index in enumerate(indices) if index is not None]
    rank = max(len(indices[i].shape) for i in places)
    looked_up = broadcast(scope, [indices[i] for i in places], rank)
    for place in places:
        scope.fix(x.axes[place], "it is looked up by index")
    rest = [axis for index, axis in enumerate(x.axes) if index not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent else 0
    give(node, [*rest[:first], *looked_up, *rest[first:]])


@rule("index_select")
def _index_select(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "it is looked up by index")
    give(node, [*x.axes[:dim], index.axes[0] if index.axes else (), *x.axes[dim + 1 :]])


@rule("gather")
def _gather(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    along(scope, dim, x, index)
    give(node, list(index.axes))


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def _scatter(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    others = [v for v in values(node.args[2:]) if len(v.shape) == len(x.shape)]
    along(scope, dim, x, *others)
    if len(index.shape) != len(x.shape):
        for axis in index.axes:
            scope.fix(axis, "it is looked up by index")
    give(node, list(x.axes))


def along(scope: Scope, dim: int, *operands: Value) -> None:
    """Operands that meet index by index on every axis but one, which is looked up."""
    first = operands[0]
    assert first.axes is not None
    dim = wrap(dim, len(first.shape))
    for value in operands:
        for index, axis in enumerate(value.axes or []):
            if index == dim:
                scope.fix(axis, "it is looked up by index")
            elif value is not first:
                if value.shape[index] == first.shape[index]:
                    scope.unify(first.axes[index], axis)
                else:
                    stiffen(axis, "it meets part of another axis")
                    stiffen(first.axes[index], "part of it meets another axis")


# Attention


def attention(scope: Scope, node: Node) -> None:
    """``softmax(query key^T + mask) value``: heads and batch stay, the size of a head is contracted, that of a value comes out."""
    query, key, value = node.args[:3]
    mask = next((v for v in values((node.args[3:], node.kwargs)) if len(v.shape) >= 2), None)
    for one, other in zip(query.axes[:-2], key.axes[:-2], strict=True):
        scope.unify(one, other)
    for one, other in zip(key.axes[:-1], value.axes[:-1], strict=True):
        scope.unify(one, other)
    scope.unify(query.axes[-1], key.axes[-1])
    scope.mix(query.axes[-1], "attention scales by its size")
    scope.mix(key.axes[-2], "softmax runs over it")
    scores = [*query.axes[:-1], key.axes[-2]]
    if mask is not None:
        for index, axis in enumerate(reversed(mask.axes or [])):
            if mask.shape[-1 - index] != 1:
                scope.unify(axis, scores[-1 - index])
    give(node, [*query.axes[:-1], value.axes[-1]])
    for output in node.outputs[1:]:
        if output.axes is None:
            matches = output.shape == query.shape[:-1]
            output.axes = list(query.axes[:-1]) if matches else unknown_axes(output)


@rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def _fused_encoder(scope: Scope, node: Node) -> None:
    """Fast paths of modules whose plain path says the same in full."""
    same(node)
    for output in node.outputs:
        if output.axes is None:
            output.axes = unknown_axes(output)


def find(op: Any) -> Rule | None:
    """The rule of an op, if there is one."""
    name = op_name(op)
    if name in RULES:
        return RULES[name]
    if name.startswith("_scaled_dot_product"):
        return attention
    if torch.Tag.pointwise in op.tags:
        return pointwise
    return None
