"""Rules of what works on images: pooling, interpolation, windows, and channels that move to pixels and back."""

from __future__ import annotations

from ..structure import Structure, fresh
from ..trace import Node, Value
from .registry import Rule, Scope, fixed, give, op_name, rule


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
    count, width = fixed(scope, groups, "channel shuffle deals out so many groups"), fresh(x.shape[1] // groups)
    scope.unify(x.axes[1], (*count, *width))
    give(node, [x.axes[0], (*width, *count), *x.axes[2:]])


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


_image_ops = {
    1: ("reflection_pad1d", "replication_pad1d", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_linear1d"),
    2: (
        *("max_pool2d_with_indices", "mkldnn_max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("reflection_pad2d", "replication_pad2d", "grid_sampler_2d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    ),
    3: (
        *("max_pool3d_with_indices", "mkldnn_max_pool3d", "avg_pool3d", "_adaptive_avg_pool3d", "adaptive_max_pool3d"),
        *(
            "reflection_pad3d",
            "replication_pad3d",
            "grid_sampler_3d",
            "upsample_nearest3d",
            "_upsample_nearest_exact3d",
            "upsample_trilinear3d",
        ),
    ),
}
for _spatial, _names in _image_ops.items():
    rule(*_names)(_image_rule(_spatial))


@rule("max_unpool2d", "max_unpool3d")
def _max_unpool(scope: Scope, node: Node) -> None:
    x, places = node.args[:2]
    spatial = int(op_name(node.op)[-2])
    for one, other in zip(x.axes, places.axes, strict=True):
        scope.unify(one, other)
    images(scope, node, x, spatial)


@rule("im2col", "col2im")
def _columns(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    for axis in x.axes[-2:] if op_name(node.op) == "im2col" else x.axes[-1:]:
        scope.fix(axis, "it is an axis of an image")
    if op_name(node.op) == "im2col":
        taps = output.shape[-2] // x.shape[-3]
        channels = (*x.axes[-3], *fixed(scope, taps, "it counts the taps of a window"))
        give(node, [*x.axes[:-3], channels, fixed(scope, output.shape[-1], "it is an axis of an image")])
    else:
        channels = fresh(output.shape[-3])
        scope.unify(x.axes[-2], (*channels, *fixed(scope, x.shape[-2] // output.shape[-3], "it counts the taps of a window")))
        give(node, [*x.axes[:-2], channels, *[fixed(scope, n, "it is an axis of an image") for n in output.shape[-2:]]])
