"""``y = W * x + b``, convolution over the active channels of both sides of ``W``, and its gradients: which kernels serve which of them.

``x`` and ``gy`` have to be channels_last, and so are ``y`` and ``gx``. A weight is contiguous or channels_last, and so is its gradient.
All have the size of the capacity; what is dormant is never read, and written as zeros. Of a grouped convolution the number of groups is
elastic: the channels of a group are active together, on both sides.

- conv2d_dense.py, conv2d_weight.py: products of matrices gathered from images;
- linear.py: for windows of one position, where images are matrices already;
- conv2d_grouped.py: the products of each group; conv2d_depthwise.py: groups of a single channel.
"""

import torch
from torch import Tensor

from .conv2d_dense import Config, fill_dense
from .conv2d_depthwise import depthwise_grad_weight, fill_depthwise
from .conv2d_grouped import fill_grouped, grouped_grad_weight
from .conv2d_weight import WeightConfig, dense_grad_weight
from .launch import Segments
from .linear import linear_forward, linear_grad_input, linear_grad_weight
from .windows import Windows


def conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    grouped: bool,
    *,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """``y``, channels_last, of ``x``, which has to be."""
    windows = Windows(_pair(weight.shape[2:]), stride, padding, dilation)
    size = (x.shape[0], weight.shape[0], *windows.output_size(x.shape[2], x.shape[3]))
    if windows.pointwise and not grouped:
        return _image(linear_forward(_matrix(x), weight[:, :, 0, 0], bias, control, slots, segments, allow_tf32=allow_tf32)[0], size)
    output = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _fill(x, weight, bias, output, control, slots, segments, windows, grouped, allow_tf32, config, transposed=False)
    return output


def conv2d_grad_input(
    grad: Tensor,
    weight: Tensor,
    input_shape: tuple[int, int, int, int],
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    grouped: bool,
    *,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """``gx``, channels_last, of ``gy``, which has to be."""
    windows = Windows(_pair(weight.shape[2:]), stride, padding, dilation)
    if windows.pointwise and not grouped:
        return _image(linear_grad_input(_matrix(grad), weight[:, :, 0, 0], control, slots, segments, allow_tf32=allow_tf32), input_shape)
    output = torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    _fill(grad, weight, None, output, control, slots, segments, windows, grouped, allow_tf32, config, transposed=True)
    return output


def conv2d_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    grouped: bool,
    *,
    allow_tf32: bool = False,
    config: WeightConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(gW, gb)`` of ``gy`` and ``x``, which have to be channels_last, in the types and memory formats of ``weight`` and ``bias``."""
    windows = Windows(_pair(weight.shape[2:]), stride, padding, dilation)
    where = (control, slots, segments)
    if grouped and weight.shape[0] == x.shape[1] and weight.shape[1] == 1:
        return depthwise_grad_weight(grad, x, weight, bias, *where, windows)
    if grouped:
        return grouped_grad_weight(grad, x, weight, bias, *where, windows, allow_tf32)
    if windows.pointwise:
        result, result_bias = linear_grad_weight(_matrix(grad), _matrix(x), weight[:, :, 0, 0], bias, *where, allow_tf32=allow_tf32)
        return result.as_strided(weight.shape, weight.stride()), result_bias
    return dense_grad_weight(grad, x, weight, bias, *where, windows, allow_tf32, config)


def _matrix(image: Tensor) -> Tensor:
    """The positions of a channels_last image as rows."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _image(matrix: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of :func:`_matrix`."""
    images, channels, height, width = shape
    return matrix.view(images, height, width, channels).permute(0, 3, 1, 2)


def _fill(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    grouped: bool,
    allow_tf32: bool,
    config: Config | None,
    transposed: bool,
) -> None:
    """Compute ``output``, which is ``y``, or ``gx`` if ``transposed``, by the kernels that serve it."""
    if output.numel() == 0:
        return
    where = (control, slots, segments, windows)
    if grouped and source.shape[1] == output.shape[1] and weight.shape[1] == 1:
        fill_depthwise(source, weight, bias, output, *where, transposed)
    elif grouped:
        fill_grouped(source, weight, bias, output, *where, allow_tf32, transposed)
    else:
        fill_dense(source, weight, bias, output, *where, allow_tf32, config, transposed)


def _pair(sizes: torch.Size) -> tuple[int, int]:
    return sizes[0], sizes[1]
