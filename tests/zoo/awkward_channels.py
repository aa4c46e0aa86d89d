"""Hard cases, one difficulty each, in what is done with a dim: views with numbers, reductions, gathers, splits.

A converter has to see through each of them, or has to leave that dim as it is and say why. Each case is named after its difficulty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, pictures


class PixelShuffleNet(nn.Module):
    """Super-resolution: nine channels of the last convolution make one pixel of each of three colours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1)
        self.up1 = nn.Conv2d(16, 20 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.conv3 = nn.Conv2d(20, 3 * 9, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return F.pixel_shuffle(self.conv3(torch.tanh(self.shuffle(self.up1(x)))), 3)


class SplitBranches(nn.Module):
    """One convolution's channels split in unequal parts, by sizes that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.split_sizes = (12, 20)
        self.conv = nn.Conv2d(3, sum(self.split_sizes), 3, padding=1)
        self.left = nn.Conv2d(12, 28, 3, padding=1)
        self.right = nn.Conv2d(20, 28, 1)
        self.head = nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(F.relu(self.conv(x)), self.split_sizes, dim=1)
        x = self.left(left) * torch.sigmoid(self.right(right))
        return self.head(x.mean((2, 3)))


class SizeInAttribute(nn.Module):
    """The number of features is an attribute, used in `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.num_features = 24
        self.fc = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.adaptive_avg_pool2d(x, 1).view(-1, self.num_features)
        return self.fc(x)


class LiteralInView(nn.Module):
    """The number of features is written in `view`: that dim has to stay, the one before it need not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.fc = nn.Linear(24 * 3 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), (3, 5))
        return self.fc(x.view(-1, 360))


class FlattenAfterConv(nn.Module):
    """A flatten of channels and positions, and batch norm over what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, stride=2)
        self.conv2 = nn.Conv2d(16, 20, 3, stride=2)
        self.norm = nn.BatchNorm1d(20 * 4 * 6)
        self.fc = nn.Linear(20 * 4 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(self.norm(x.view(x.size(0), -1)))


class OverChannels(nn.Module):
    """Something that runs over the channels of the middle convolution: see the subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.over_channels(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.conv3(x)).mean((2, 3)))

    def over_channels(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class MeanOverChannels(OverChannels):
    """Each channel less the mean of all."""

    def over_channels(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class SoftmaxOverChannels(OverChannels):
    """Channels compete at each position."""

    def over_channels(self, x: Tensor) -> Tensor:
        return x * x.softmax(dim=1)


class GatherChannels(OverChannels):
    """Channels reordered by an index buffer, which names channels by number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(24).flip(0))

    def over_channels(self, x: Tensor) -> Tensor:
        order = self.order.view(1, -1, 1, 1).expand_as(x)
        return torch.gather(x, 1, order)


class SelectChannels(OverChannels):
    """Eight channels by their numbers, added to the first eight of the rest: indexing with literals."""

    def over_channels(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :8] + x[:, 16:], x[:, 8:]], dim=1)


class CumsumOverChannels(OverChannels):
    """Each channel the sum of those up to it: their order matters."""

    def over_channels(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1)


class ScaleBySize(OverChannels):
    """A factor computed from the number of channels."""

    def over_channels(self, x: Tensor) -> Tensor:
        return x / x.shape[1] ** 0.5


CASES = by_name(
    Case("pixel_shuffle", PixelShuffleNet, pictures),
    Case("split_branches", SplitBranches, pictures),
    Case("size_in_attribute", SizeInAttribute, pictures),
    Case("literal_in_view", LiteralInView, pictures),
    Case("flatten_after_conv", FlattenAfterConv, pictures),
    Case("mean_over_channels", MeanOverChannels, pictures),
    Case("softmax_over_channels", SoftmaxOverChannels, pictures),
    Case("gather_channels", GatherChannels, pictures),
    Case("select_channels", SelectChannels, pictures),
    Case("cumsum_over_channels", CumsumOverChannels, pictures),
    Case("scale_by_size", ScaleBySize, pictures),
)
