"""Rules of what cuts axes into parts and lays parts end to end."""

from __future__ import annotations

import itertools

from ..structure import Structure, concat, cut, size
from ..trace import Node, Value
from .elementwise import broadcast
from .registry import Scope, argument, fixed, give, op_name, rule, wrap


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


@rule("narrow_copy")
def _narrow(scope: Scope, node: Node) -> None:
    x, dim, start, length = node.args[:4]
    dim = wrap(dim, len(x.shape))
    axes = list(x.axes)
    axes[dim] = stretch(scope, x.axes[dim], start % x.shape[dim], start % x.shape[dim] + length, length, 1)
    give(node, axes)


@rule("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "unsafe_split")
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


@rule("cat")
def _cat(scope: Scope, node: Node) -> None:
    parts: list[Value] = [part for part in node.args[0] if part.shape != (0,)] or node.args[0]
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


@rule("constant_pad_nd")
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
