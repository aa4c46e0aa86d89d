"""Networks whose units are tied by additions and concatenations: ResNet, pre-activation ResNet, DenseNet.

Source: He et al. 2015 (arXiv:1512.03385), He et al. 2016 (arXiv:1603.05027), Huang et al. 2016 (arXiv:1608.06993).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample(in_planes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions, the second of which widens by four."""

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample(in_planes, planes * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def downsample(in_planes: int, out_planes: int, stride: int) -> nn.Sequential | None:
    """The projection of a shortcut, where the identity does not fit."""
    if stride == 1 and in_planes == out_planes:
        return None
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False), nn.BatchNorm2d(out_planes))


class ResNet(nn.Module):
    """Four stages of residual blocks; torchvision's names."""

    def __init__(self, block: type[BasicBlock | Bottleneck], layers: tuple[int, int, int, int], width: int, num_classes: int):
        super().__init__()
        self.in_planes = width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, width, layers[0], stride=1)
        self.layer2 = self._stage(block, width * 2, layers[1], stride=2)
        self.layer3 = self._stage(block, width * 4, layers[2], stride=2)
        self.layer4 = self._stage(block, width * 8, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width * 8 * block.expansion, num_classes)

    def _stage(self, block: type[BasicBlock | Bottleneck], planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        blocks = []
        for index in range(num_blocks):
            blocks.append(block(self.in_planes, planes, stride if index == 0 else 1))
            self.in_planes = planes * block.expansion
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


class PreActivationBlock(nn.Module):
    """Norm and activation before each convolution; the projection, where there is one, sees the activated input."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PreActivationResNet(nn.Module):
    """For small images: no pooling in the stem, a norm before the head, and `view` with what `size` says."""

    def __init__(self, width: int, num_blocks: int, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        planes = [width, width * 2, width * 4]
        stages = []
        in_planes = width
        for index, out_planes in enumerate(planes):
            for block in range(num_blocks):
                stages.append(PreActivationBlock(in_planes, out_planes, stride=2 if index and block == 0 else 1))
                in_planes = out_planes
        self.blocks = nn.ModuleList(stages)
        self.bn = nn.BatchNorm2d(in_planes)
        self.linear = nn.Linear(in_planes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for block in self.blocks:
            out = block(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), 8)
        return self.linear(out.view(out.size(0), -1))


class DenseLayer(nn.Module):
    """What it adds to the features, from the concatenation of all that came before it."""

    def __init__(self, in_features: int, growth_rate: int, bottleneck: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_features, bottleneck * growth_rate, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth_rate)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    """Dense layers, each fed by all before it."""

    def __init__(self, num_layers: int, in_features: int, growth_rate: int, bottleneck: int):
        super().__init__()
        for index in range(num_layers):
            self[f"denselayer{index + 1}"] = DenseLayer(in_features + index * growth_rate, growth_rate, bottleneck)

    def forward(self, initial: Tensor) -> Tensor:
        features = [initial]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Dense blocks joined by transitions that halve the channels."""

    def __init__(self, growth_rate: int, block_layers: tuple[int, ...], stem: int, bottleneck: int, num_classes: int):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        num_features = stem
        for index, num_layers in enumerate(block_layers, start=1):
            self.features.add_module(f"denseblock{index}", DenseBlock(num_layers, num_features, growth_rate, bottleneck))
            num_features += num_layers * growth_rate
            if index != len(block_layers):
                self.features.add_module(f"transition{index}", transition(num_features, num_features // 2))
                num_features //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(num_features))
        self.classifier = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


def transition(in_features: int, out_features: int) -> nn.Sequential:
    """Between two dense blocks: fewer channels at half the resolution."""
    return nn.Sequential(
        nn.BatchNorm2d(in_features), nn.ReLU(inplace=True), nn.Conv2d(in_features, out_features, 1, bias=False), nn.AvgPool2d(2, stride=2)
    )


CASES = by_name(
    Case("resnet_basic", lambda: ResNet(BasicBlock, (2, 2, 2, 2), width=12, num_classes=10), lambda: images(65, 97)),
    Case("resnet_bottleneck", lambda: ResNet(Bottleneck, (2, 2, 2, 2), width=8, num_classes=10), lambda: images(65, 97)),
    Case("resnet_preactivation", lambda: PreActivationResNet(width=12, num_blocks=2, num_classes=10), lambda: images(32, 32)),
    Case(
        "densenet",
        lambda: DenseNet(growth_rate=6, block_layers=(2, 5, 3), stem=16, bottleneck=4, num_classes=10),
        lambda: images(72, 92),
    ),
)
