"""The allow-list: which ``nn`` layers a spec may name, with which arguments, and how many elements each allocates.

A kind is a class of ``torch.nn`` that takes one input and gives one output. Its table says of each argument which values are admitted, and
what the default is; what several arguments have to satisfy together is its rule. ``device``, ``dtype`` and whatever is not in the table
cannot be said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .values import AsFloat, Choice, Each, Either, Flag, Integer, Nothing, Number, Spread, Values, one_or, spread

#: Of a dim that is allocated; the budget of a spec is what limits them together.
_SIZE = 2**28
#: Of kernels, strides and dilations.
_SPAN = 2**16
#: Of what makes activations larger: paddings, output sizes, strides of transposed convolutions.
_MARGIN = 2**12
_REQUIRED: Any = object()


class Argument(NamedTuple):
    """What an argument may be, and its default."""

    values: Values
    default: Any = _REQUIRED

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is _REQUIRED


Given = dict[str, Any]
Complaint = tuple[str, str, object]  # the argument, what was expected of it, what was got


class Kind(NamedTuple):
    """One class of the allow-list.

    Attributes:
        make: the class.
        arguments: by name, in the order of the class's own signature.
        elements: how many elements of parameters and buffers it allocates, given all arguments.
        rule: what is wrong with arguments that are admitted one by one; ``None`` if nothing is.
        settled: the arguments with those at their default that make no difference there, so that what builds the same is the same.
    """

    make: type[nn.Module]
    arguments: dict[str, Argument]
    elements: Callable[[Given], int] = lambda given: 0
    rule: Callable[[Given], Complaint | None] = lambda given: None
    settled: Callable[[Given], Given] = lambda given: given


_size, _span, _margin, _real, _flag = Integer(1, _SIZE), Integer(1, _SPAN), Integer(0, _MARGIN), Number(), Flag()
_dim = Integer(-8, 7)
_inplace = Argument(_flag, False)
_eps = Number(0, 1e6)


def _per_group(given: Given) -> Complaint | None:
    for name in ("in_channels", "out_channels"):
        if given[name] % given["groups"]:
            return name, f"a multiple of the {given['groups']} groups", given[name]
    return None


def _convolution(make: type[nn.Module], length: int) -> Kind:
    def rule(given: Given) -> Complaint | None:
        if given["padding"] == "same" and set(given["stride"]) != {1}:
            return "stride", "1, since padding is 'same'", given["stride"]
        return _per_group(given)

    arguments = {
        "in_channels": Argument(_size),
        "out_channels": Argument(_size),
        "kernel_size": Argument(spread(length, _span)),
        "stride": Argument(spread(length, _span), (1,) * length),
        "padding": Argument(Either(spread(length, _margin), Choice("same", "valid")), (0,) * length),
        "dilation": Argument(spread(length, _span), (1,) * length),
        "groups": Argument(_size, 1),
        "bias": Argument(_flag, True),
        "padding_mode": Argument(Choice("zeros", "reflect", "replicate", "circular"), "zeros"),
    }
    return Kind(make, arguments, _convolution_elements, rule)


def _transposed_convolution(make: type[nn.Module], length: int) -> Kind:
    def rule(given: Given) -> Complaint | None:
        for more, stride, dilation in zip(given["output_padding"], given["stride"], given["dilation"], strict=True):
            if more >= max(stride, dilation):
                return "output_padding", f"less than stride or dilation, {given['stride']} and {given['dilation']}", given["output_padding"]
        return _per_group(given)

    steps = spread(length, Integer(1, _MARGIN))
    arguments = {
        "in_channels": Argument(_size),
        "out_channels": Argument(_size),
        "kernel_size": Argument(steps),
        "stride": Argument(steps, (1,) * length),
        "padding": Argument(spread(length, _margin), (0,) * length),
        "output_padding": Argument(spread(length, _margin), (0,) * length),
        "groups": Argument(_size, 1),
        "bias": Argument(_flag, True),
        "dilation": Argument(steps, (1,) * length),
    }
    return Kind(make, arguments, _convolution_elements, rule)


def _convolution_elements(given: Given) -> int:
    weight = given["in_channels"] * given["out_channels"] // given["groups"] * math.prod(given["kernel_size"])
    return weight + given["out_channels"] * given["bias"]


def _batch_norm(make: type[nn.Module], affine: bool = True, tracks: bool = True, momentum: Values | None = None) -> Kind:
    arguments = {
        "num_features": Argument(_size),
        "eps": Argument(_eps, 1e-5),
        "momentum": Argument(momentum or Number(0, 1), 0.1),
        "affine": Argument(_flag, affine),
        "track_running_stats": Argument(_flag, tracks),
    }
    return Kind(
        make,
        arguments,
        lambda given: 2 * given["num_features"] * (given["affine"] + given["track_running_stats"]) + given["track_running_stats"],
    )


def _layer_norm() -> Kind:
    arguments = _normalized_arguments(Argument(_eps, 1e-5)) | {"bias": Argument(_flag, True)}
    return Kind(
        nn.LayerNorm,
        arguments,
        lambda given: math.prod(given["normalized_shape"]) * given["elementwise_affine"] * (1 + given["bias"]),
        settled=lambda given: given if given["elementwise_affine"] else given | {"bias": True},
    )


def _rms_norm() -> Kind:
    arguments = _normalized_arguments(Argument(Either(Nothing(), _eps), None))
    return Kind(nn.RMSNorm, arguments, lambda given: math.prod(given["normalized_shape"]) * given["elementwise_affine"])


def _normalized_arguments(eps: Argument) -> dict[str, Argument]:
    shape = Either(Spread(_size, 1), Each(_size, 1, 8))
    return {"normalized_shape": Argument(shape), "eps": eps, "elementwise_affine": Argument(_flag, True)}


def _group_norm() -> Kind:
    def rule(given: Given) -> Complaint | None:
        groups, channels = given["num_groups"], given["num_channels"]
        return ("num_channels", f"a multiple of the {groups} groups", channels) if channels % groups else None

    arguments = {
        "num_groups": Argument(_size),
        "num_channels": Argument(_size),
        "eps": Argument(_eps, 1e-5),
        "affine": Argument(_flag, True),
    }
    return Kind(nn.GroupNorm, arguments, lambda given: 2 * given["num_channels"] * given["affine"], rule)


def _embedding() -> Kind:
    def rule(given: Given) -> Complaint | None:
        count, index = given["num_embeddings"], given["padding_idx"]
        return None if index is None or 0 <= index < count else ("padding_idx", f"an index below the {count} embeddings", index)

    arguments = {
        "num_embeddings": Argument(_size),
        "embedding_dim": Argument(_size),
        "padding_idx": Argument(Either(Nothing(), Integer(0, _SIZE)), None),
        "max_norm": Argument(Either(Nothing(), Number(0)), None),
        "norm_type": Argument(Number(0), 2.0),
        "scale_grad_by_freq": Argument(_flag, False),
        "sparse": Argument(_flag, False),
    }
    return Kind(nn.Embedding, arguments, lambda given: given["num_embeddings"] * given["embedding_dim"], rule)


def _pool(make: type[nn.Module], length: int, more: dict[str, Argument], spreads: bool = False) -> Kind:
    """A pooling, of which ``stride`` is the kernel size unless it is said."""
    several = spread if spreads else one_or
    arguments = {
        "kernel_size": Argument(several(length, _span)),
        "stride": Argument(Either(Nothing(), several(length, _span)), None),
        "padding": Argument(several(length, _margin), (0,) * length if spreads else 0),
    }

    def rule(given: Given) -> Complaint | None:
        kernel, padding = (value if type(value) is tuple else (value,) * length for value in (given["kernel_size"], given["padding"]))
        wide = any(margin > size // 2 for margin, size in zip(padding, kernel, strict=True))
        return ("padding", f"at most half the kernel of {given['kernel_size']}", given["padding"]) if wide else None

    return Kind(make, arguments | more, rule=rule, settled=_step_of_kernel)


def _step_of_kernel(given: Given) -> Given:
    kernel, stride = given["kernel_size"], given["stride"]
    return given | {"stride": None} if type(stride) is type(kernel) and stride == kernel else given


def _max_pool(make: type[nn.Module], length: int) -> Kind:
    return _pool(make, length, {"dilation": Argument(one_or(length, _span), 1), "ceil_mode": Argument(_flag, False)})


def _mean_pool(make: type[nn.Module], length: int) -> Kind:
    more = {"ceil_mode": Argument(_flag, False), "count_include_pad": Argument(_flag, True)}
    if length > 1:
        more["divisor_override"] = Argument(Either(Nothing(), _size), None)
    return _pool(make, length, more, spreads=length == 1)


def _norm_pool(make: type[nn.Module], length: int) -> Kind:
    arguments = {
        "norm_type": Argument(Number(1, 1e3)),
        "kernel_size": Argument(one_or(length, _span)),
        "stride": Argument(Either(Nothing(), one_or(length, _span)), None),
        "ceil_mode": Argument(_flag, False),
    }
    return Kind(make, arguments)


def _adaptive_pool(make: type[nn.Module], length: int) -> Kind:
    size: Values = Integer(1, _MARGIN)
    item = size if length == 1 else Either(Nothing(), size)
    return Kind(make, {"output_size": Argument(one_or(length, item))})


def _pad(make: type[nn.Module], length: int, constant: bool = False) -> Kind:
    arguments = {"padding": Argument(spread(2 * length, Integer(-_MARGIN, _MARGIN)))}
    if constant:
        arguments["value"] = Argument(_real)
    return Kind(make, arguments)


def _upsample() -> Kind:
    def rule(given: Given) -> Complaint | None:
        if (given["size"] is None) == (given["scale_factor"] is None):
            return "size and scale_factor", "one of the two", "neither" if given["size"] is None else "both"
        if given["align_corners"] is not None and given["mode"] in ("nearest", "nearest-exact", "area"):
            return "align_corners", f"None for mode {given['mode']!r}", given["align_corners"]
        return None

    size, factor = Integer(1, _MARGIN), AsFloat(Number(1e-3, 64))
    arguments = {
        "size": Argument(Either(Nothing(), size, Each(size, 1, 3)), None),
        "scale_factor": Argument(Either(Nothing(), factor, Each(factor, 1, 3)), None),
        "mode": Argument(Choice("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area"), "nearest"),
        "align_corners": Argument(Either(Nothing(), _flag), None),
    }
    return Kind(nn.Upsample, arguments, rule=rule)


def _hardtanh() -> Kind:
    def rule(given: Given) -> Complaint | None:
        low, high = given["min_val"], given["max_val"]
        return None if low < high else ("max_val", f"more than min_val, {low}", high)

    arguments = {"min_val": Argument(_real, -1.0), "max_val": Argument(_real, 1.0), "inplace": _inplace}
    return Kind(nn.Hardtanh, arguments, rule=rule)


def _rrelu() -> Kind:
    def rule(given: Given) -> Complaint | None:
        low, high = given["lower"], given["upper"]
        return None if low <= high else ("upper", f"at least lower, {low}", high)

    arguments = {"lower": Argument(_real, 1 / 8), "upper": Argument(_real, 1 / 3), "inplace": _inplace}
    return Kind(nn.RReLU, arguments, rule=rule)


def _activation(make: type[nn.Module], **arguments: Argument) -> Kind:
    return Kind(make, arguments)


def _dropout(make: type[nn.Module]) -> Kind:
    return Kind(make, {"p": Argument(Number(0, 1), 0.5), "inplace": _inplace})


_KINDS = [
    Kind(
        nn.Linear,
        {"in_features": Argument(_size), "out_features": Argument(_size), "bias": Argument(_flag, True)},
        lambda given: given["out_features"] * (given["in_features"] + given["bias"]),
    ),
    *(_convolution(make, length) for length, make in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)),
    *(_transposed_convolution(make, length) for length, make in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)),
    *(_batch_norm(make, momentum=Either(Nothing(), Number(0, 1))) for make in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    *(_batch_norm(make, affine=False, tracks=False) for make in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    _layer_norm(),
    _rms_norm(),
    _group_norm(),
    _activation(
        nn.LocalResponseNorm,
        size=Argument(_span),
        alpha=Argument(_real, 1e-4),
        beta=Argument(_real, 0.75),
        k=Argument(_real, 1.0),
    ),
    _embedding(),
    *(_activation(make, inplace=_inplace) for make in (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardsigmoid, nn.Hardswish)),
    *(_activation(make) for make in (nn.Identity, nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Softmax2d)),
    _activation(nn.LeakyReLU, negative_slope=Argument(_real, 0.01), inplace=_inplace),
    _activation(nn.ELU, alpha=Argument(_real, 1.0), inplace=_inplace),
    _activation(nn.CELU, alpha=Argument(Number(1e-30), 1.0), inplace=_inplace),
    _activation(nn.GELU, approximate=Argument(Choice("none", "tanh"), "none")),
    _activation(nn.Softplus, beta=Argument(_real, 1.0), threshold=Argument(_real, 20.0)),
    _activation(nn.Softshrink, lambd=Argument(Number(0), 0.5)),
    _activation(nn.Hardshrink, lambd=Argument(_real, 0.5)),
    _activation(nn.Threshold, threshold=Argument(_real), value=Argument(_real), inplace=_inplace),
    _activation(nn.GLU, dim=Argument(_dim, -1)),
    *(_activation(make, dim=Argument(_dim)) for make in (nn.Softmax, nn.Softmin, nn.LogSoftmax)),
    _hardtanh(),
    _rrelu(),
    Kind(
        nn.PReLU,
        {"num_parameters": Argument(_size, 1), "init": Argument(_real, 0.25)},
        lambda given: given["num_parameters"],
    ),
    *(_dropout(make) for make in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)),
    *(_max_pool(make, length) for length, make in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)),
    *(_mean_pool(make, length) for length, make in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)),
    *(_norm_pool(make, length) for length, make in enumerate((nn.LPPool1d, nn.LPPool2d, nn.LPPool3d), 1)),
    *(_adaptive_pool(make, length) for length, make in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)),
    *(_adaptive_pool(make, length) for length, make in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)),
    *(_pad(make, length) for length, make in enumerate((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), 1)),
    *(_pad(make, length) for length, make in enumerate((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), 1)),
    *(_pad(make, length) for length, make in enumerate((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), 1)),
    *(_pad(make, length) for length, make in enumerate((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), 1)),
    *(_pad(make, length, constant=True) for length, make in enumerate((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), 1)),
    _activation(nn.Flatten, start_dim=Argument(_dim, 1), end_dim=Argument(_dim, -1)),
    _activation(nn.Unflatten, dim=Argument(_dim), unflattened_size=Argument(Each(Either(Integer(-1, -1), _size), 1, 8))),
    _upsample(),
    _activation(nn.PixelShuffle, upscale_factor=Argument(Integer(1, _MARGIN))),
    _activation(nn.PixelUnshuffle, downscale_factor=Argument(Integer(1, _MARGIN))),
    _activation(nn.ChannelShuffle, groups=Argument(_size)),
    Kind(nn.Sequential, {}),
]

#: Every kind by the name of its class in ``torch.nn``; ``Sequential`` is the one that holds layers.
KINDS = {kind.make.__name__: kind for kind in _KINDS}
