"""Convolutional networks with heads and branches: VGG, Inception, U-Net.

Source: Simonyan & Zisserman 2014 (arXiv:1409.1556), Szegedy et al. 2014, 2015 (arXiv:1409.4842, 1512.00567), Ronneberger et al. 2015
(arXiv:1505.04597).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, images


class VGG(nn.Module):
    """A row of convolutions and a classifier over 7x7 positions, flattened."""

    def __init__(self, plan: tuple[int | str, ...], hidden: int, num_classes: int, batch_norm: bool):
        super().__init__()
        self.features = self._features(plan, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        last = [entry for entry in plan if isinstance(entry, int)][-1]
        self.classifier = nn.Sequential(
            nn.Linear(last * 7 * 7, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )

    @staticmethod
    def _features(plan: tuple[int | str, ...], batch_norm: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        in_channels = 3
        for entry in plan:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2, stride=2))
                continue
            layers.append(nn.Conv2d(in_channels, entry, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(entry))
            layers.append(nn.ReLU(inplace=True))
            in_channels = entry
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class ConvNormRelu(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, **convolution: int | tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **convolution)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Version 1: four branches side by side."""

    def __init__(self, in_channels: int, one: int, reduce3: int, three: int, reduce5: int, five: int, pool: int):
        super().__init__()
        self.branch1 = ConvNormRelu(in_channels, one, kernel_size=1)
        self.branch2 = nn.Sequential(
            ConvNormRelu(in_channels, reduce3, kernel_size=1), ConvNormRelu(reduce3, three, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            ConvNormRelu(in_channels, reduce5, kernel_size=1), ConvNormRelu(reduce5, five, kernel_size=5, padding=2)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), ConvNormRelu(in_channels, pool, kernel_size=1))
        self.out_channels = one + three + five + pool

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Reduction(nn.Module):
    """Version 3: half the resolution by strided branches beside a pool that keeps the input's channels."""

    def __init__(self, in_channels: int, three: int, reduce: int, double: int):
        super().__init__()
        self.branch3x3 = ConvNormRelu(in_channels, three, kernel_size=3, stride=2)
        self.branch3x3dbl_1 = ConvNormRelu(in_channels, reduce, kernel_size=1)
        self.branch3x3dbl_2 = ConvNormRelu(reduce, double, kernel_size=3, padding=1)
        self.branch3x3dbl_3 = ConvNormRelu(double, double, kernel_size=3, stride=2)
        self.out_channels = three + double + in_channels

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class Factorised(nn.Module):
    """Version 3: 7x7 convolutions as 1x7 and 7x1."""

    def __init__(self, in_channels: int, out: int, seven: int):
        super().__init__()
        self.branch1x1 = ConvNormRelu(in_channels, out, kernel_size=1)
        self.branch7x7_1 = ConvNormRelu(in_channels, seven, kernel_size=1)
        self.branch7x7_2 = ConvNormRelu(seven, seven, kernel_size=(1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNormRelu(seven, out, kernel_size=(7, 1), padding=(3, 0))
        self.branch_pool = ConvNormRelu(in_channels, out, kernel_size=1)
        self.out_channels = 3 * out

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat((self.branch1x1(x), seven, pool), dim=1)


class Expanded(nn.Module):
    """Version 3: a branch that splits in two and is concatenated within."""

    def __init__(self, in_channels: int, one: int, wide: int):
        super().__init__()
        self.branch1x1 = ConvNormRelu(in_channels, one, kernel_size=1)
        self.branch3x3_1 = ConvNormRelu(in_channels, wide, kernel_size=1)
        self.branch3x3_2a = ConvNormRelu(wide, wide, kernel_size=(1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormRelu(wide, wide, kernel_size=(3, 1), padding=(1, 0))
        self.out_channels = one + 2 * wide

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch3x3_1(x)
        wide = torch.cat([self.branch3x3_2a(wide), self.branch3x3_2b(wide)], 1)
        return torch.cat([self.branch1x1(x), wide], 1)


class InceptionHead(nn.Module):
    """The auxiliary classifier."""

    def __init__(self, in_channels: int, channels: int, hidden: int, num_classes: int):
        super().__init__()
        self.conv = ConvNormRelu(in_channels, channels, kernel_size=1)
        self.fc1 = nn.Linear(channels * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (4, 4)))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(F.dropout(x, 0.7, training=self.training))


class InceptionOutputs(NamedTuple):
    """What `Inception` returns in training."""

    logits: Tensor
    aux_logits: Tensor


class Inception(nn.Module):
    """Branches of versions 1 and 3; the auxiliary head is there in training only."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = ConvNormRelu(3, 12, kernel_size=3, stride=2)
        self.conv2 = ConvNormRelu(12, 20, kernel_size=3, padding=1)
        self.mixed1 = Mixed(20, one=8, reduce3=14, three=18, reduce5=4, five=10, pool=6)
        self.reduction = Reduction(self.mixed1.out_channels, three=16, reduce=22, double=24)
        self.factorised = Factorised(self.reduction.out_channels, out=26, seven=28)
        self.AuxLogits = InceptionHead(self.factorised.out_channels, channels=30, hidden=34, num_classes=num_classes)
        self.expanded = Expanded(self.factorised.out_channels, one=32, wide=36)
        self.fc = nn.Linear(self.expanded.out_channels, num_classes)

    def forward(self, x: Tensor) -> InceptionOutputs | Tensor:
        red = torch.unsqueeze(x[:, 0], 1) * 0.458 - 0.030
        green = torch.unsqueeze(x[:, 1], 1) * 0.448 - 0.088
        blue = torch.unsqueeze(x[:, 2], 1) * 0.450 - 0.188
        x = torch.cat((red, green, blue), 1)
        x = F.max_pool2d(self.conv2(self.conv1(x)), kernel_size=3, stride=2)
        x = self.factorised(self.reduction(self.mixed1(x)))
        auxiliary = self.AuxLogits(x) if self.training else None
        x = F.adaptive_avg_pool2d(self.expanded(x), (1, 1))
        logits = self.fc(torch.flatten(x, 1))
        return logits if auxiliary is None else InceptionOutputs(logits, auxiliary)


class DoubleConv(nn.Module):
    """Twice convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """Twice the resolution, padded to that of the skip, which is concatenated."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        missing_y, missing_x = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [missing_x // 2, missing_x - missing_x // 2, missing_y // 2, missing_y - missing_y // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """Segmentation: down three times and up again, with a skip at each resolution."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.inc = DoubleConv(3, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, width * 2))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width * 2, width * 4))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width * 4, width * 8))
        self.up1 = Up(width * 8, width * 4)
        self.up2 = Up(width * 4, width * 2)
        self.up3 = Up(width * 2, width)
        self.outc = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(x4, x3)
        x = self.up2(x, x2)
        return self.outc(self.up3(x, x1))


VGG_PLAN = (12, "M", 20, "M", 28, 28, "M", 36, 36, "M")

CASES = by_name(
    Case("vgg", lambda: VGG(VGG_PLAN, hidden=56, num_classes=10, batch_norm=False), lambda: images(48, 64)),
    Case("vgg_batch_norm", lambda: VGG(VGG_PLAN, hidden=56, num_classes=10, batch_norm=True), lambda: images(48, 64)),
    Case("inception", lambda: Inception(num_classes=7), lambda: images(64, 48)),
    Case("unet", lambda: UNet(width=8, num_classes=5), lambda: images(42, 60)),
)
