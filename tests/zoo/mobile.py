"""Convolutional networks for small devices: MobileNetV2, MobileNetV3, EfficientNet, ShuffleNetV2.

Source: Sandler et al. 2018 (arXiv:1801.04381), Howard et al. 2019 (arXiv:1905.02244), Tan & Le 2019 (arXiv:1905.11946), Ma et al. 2018
(arXiv:1807.11164).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, images


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at most a tenth below it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm, activation; the padding keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: type[nn.Module] | None = nn.ReLU6,
    ):
        padding = (kernel_size - 1) // 2
        layers = [
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class InvertedResidual(nn.Module):
    """MobileNetV2: widen, filter each channel, narrow without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int):
        super().__init__()
        hidden = in_channels * expand_ratio
        self.use_res_connect = stride == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvNormActivation(in_channels, hidden, 1))
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    """Rows of (expansion, channels, repetitions, stride)."""

    def __init__(self, rows: tuple[tuple[int, int, int, int], ...], stem: int, last: int, num_classes: int):
        super().__init__()
        features: list[nn.Module] = [ConvNormActivation(3, stem, 3, stride=2)]
        in_channels = stem
        for expansion, channels, repetitions, stride in rows:
            for index in range(repetitions):
                features.append(InvertedResidual(in_channels, channels, stride if index == 0 else 1, expansion))
                in_channels = channels
        features.append(ConvNormActivation(in_channels, last, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.mean([2, 3]))


class SqueezeExcitation(nn.Module):
    """A factor for each channel, from the means of all of them."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module], gate: type[nn.Module]):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()
        self.scale_activation = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class MobileBlockV3(nn.Module):
    """MobileNetV3: an inverted residual with an optional squeeze-and-excitation before the projection."""

    def __init__(self, in_channels: int, kernel: int, hidden: int, out_channels: int, squeeze: bool, hard: bool, stride: int):
        super().__init__()
        self.use_res_connect = stride == 1 and in_channels == out_channels
        activation = nn.Hardswish if hard else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != in_channels:
            layers.append(ConvNormActivation(in_channels, hidden, 1, activation=activation))
        layers.append(ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=activation))
        if squeeze:
            layers.append(SqueezeExcitation(hidden, make_divisible(hidden // 4, 4), nn.ReLU, nn.Hardsigmoid))
        layers.append(ConvNormActivation(hidden, out_channels, 1, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    """The small network's order of blocks at a quarter of its widths."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            ConvNormActivation(3, 12, 3, stride=2, activation=nn.Hardswish),
            MobileBlockV3(12, 3, 12, 14, squeeze=True, hard=False, stride=2),
            MobileBlockV3(14, 3, 44, 18, squeeze=False, hard=False, stride=2),
            MobileBlockV3(18, 3, 52, 18, squeeze=False, hard=False, stride=1),
            MobileBlockV3(18, 5, 60, 22, squeeze=True, hard=True, stride=1),
            MobileBlockV3(22, 5, 68, 22, squeeze=True, hard=True, stride=1),
            ConvNormActivation(22, 72, 1, activation=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(72, 84), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(84, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.classifier(x)


class StochasticDepth(nn.Module):
    """Drops whole samples of a branch in training; with probability 0 the identity."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        kept = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.probability)
        return x * kept / (1 - self.probability)


class MBConv(nn.Module):
    """EfficientNet: an inverted residual with squeeze-and-excitation by the block's input channels, and SiLU."""

    def __init__(self, expand_ratio: int, kernel: int, stride: int, in_channels: int, out_channels: int):
        super().__init__()
        self.use_res_connect = stride == 1 and in_channels == out_channels
        hidden = in_channels * expand_ratio
        layers: list[nn.Module] = []
        if hidden != in_channels:
            layers.append(ConvNormActivation(in_channels, hidden, 1, activation=nn.SiLU))
        layers.append(ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU))
        layers.append(SqueezeExcitation(hidden, max(1, in_channels // 4), partial(nn.SiLU, inplace=True), nn.Sigmoid))
        layers.append(ConvNormActivation(hidden, out_channels, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(0.0)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class EfficientNet(nn.Module):
    """Rows of (expansion, kernel, stride, channels, repetitions)."""

    def __init__(self, rows: tuple[tuple[int, int, int, int, int], ...], stem: int, last: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(3, stem, 3, stride=2, activation=nn.SiLU)]
        in_channels = stem
        for expansion, kernel, stride, channels, repetitions in rows:
            stage = []
            for index in range(repetitions):
                stage.append(MBConv(expansion, kernel, stride if index == 0 else 1, in_channels, channels))
                in_channels = channels
            layers.append(nn.Sequential(*stage))
        layers.append(ConvNormActivation(in_channels, last, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(last, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of each group out over all groups."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass, or at stride 2 both halves are made from all."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        features = out_channels // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
                nn.BatchNorm2d(in_channels),
                nn.Conv2d(in_channels, features, 1, bias=False),
                nn.BatchNorm2d(features),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(in_channels if stride > 1 else features, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, stride, padding=1, groups=features, bias=False),
            nn.BatchNorm2d(features),
            nn.Conv2d(features, features, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            passed, worked = x.chunk(2, dim=1)
            out = torch.cat((passed, self.branch2(worked)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """Three stages of units; the last convolution widens."""

    def __init__(self, repeats: tuple[int, int, int], channels: tuple[int, int, int, int, int], num_classes: int):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        for num_units, in_channels, out_channels in zip(repeats, channels, channels[1:], strict=False):
            units = [ShuffleUnit(in_channels, out_channels, 2), *(ShuffleUnit(out_channels, out_channels, 1) for _ in range(num_units - 1))]
            stages.append(nn.Sequential(*units))
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = nn.Sequential(nn.Conv2d(channels[3], channels[4], 1, bias=False), nn.BatchNorm2d(channels[4]), nn.ReLU(inplace=True))
        self.fc = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


MOBILENET_ROWS = ((1, 8, 1, 1), (6, 14, 2, 2), (6, 18, 2, 2), (6, 22, 2, 2))
EFFICIENTNET_ROWS = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 5, 1, 56, 2))

CASES = by_name(
    Case("mobilenet_v2", lambda: MobileNetV2(MOBILENET_ROWS, stem=16, last=64, num_classes=10), lambda: images(48, 64)),
    Case("mobilenet_v3", lambda: MobileNetV3(num_classes=10), lambda: images(48, 64)),
    Case("efficientnet", lambda: EfficientNet(EFFICIENTNET_ROWS, stem=20, last=64, num_classes=10), lambda: images(48, 64)),
    Case("shufflenet_v2", lambda: ShuffleNetV2((3, 4, 2), (12, 24, 48, 96, 128), num_classes=10), lambda: images(65, 97)),
)
