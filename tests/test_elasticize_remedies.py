"""What conversion finds out of code that holds sizes in several places: patterns met in published models, each in a few lines."""

import pytest
import torch
import torch.nn.functional as F
from covering import coverage_of
from torch import nn


class Windows(nn.Module):
    """Heads as many as an unrelated attribute before them says, as in Swin: ``shift_size`` and ``num_heads`` are 3."""

    def __init__(self, width=12, shift=3, heads=3):
        super().__init__()
        self.shift_size = [shift, shift]
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        channels = x.shape[-1]
        x = torch.roll(x, self.shift_size[0], 1)
        qkv = self.qkv(x)
        qkv = qkv.reshape(x.size(0), x.size(1), 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        y = self.proj(y.transpose(1, 2).reshape(x.size(0), x.size(1), channels))
        mask = y.new_zeros(1, x.size(1), 1)
        for begin, end in ((0, -4), (-4, -self.shift_size[0]), (-self.shift_size[0], None)):
            mask[:, begin:end] += 0.1
        return torch.roll(y + mask, -self.shift_size[0], 1)


class CosineWindows(nn.Module):
    """Keys without bias, a scale per head and a bias by position from a small network, as in the second version of Swin."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj, self.table = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(4, heads)
        self.logit_scale = nn.Parameter(torch.rand(heads, 1, 1))

    def forward(self, x):
        table = self.table(torch.ones(3, 3, 4, dtype=x.dtype)).view(-1, self.num_heads)
        places = table[torch.arange(81) % 9].view(9, 9, -1).permute(2, 0, 1)
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(x.size(0), x.size(1), 3, self.num_heads, x.size(2) // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        y = torch.softmax(weights * self.logit_scale.exp() + places, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Heads(nn.Module):
    """Heads with a layer each, all cut by the same attributes, whose numbers may be equal, as in EfficientViT."""

    def __init__(self, width=12, key=6, value=6, heads=2):
        super().__init__()
        self.key_dim, self.val_dim = key, value
        self.qkvs = nn.ModuleList(nn.Linear(width, 2 * key + value) for _ in range(heads))
        self.proj = nn.Linear(heads * value, width)

    def forward(self, x):
        outputs = []
        for layer in self.qkvs:
            q, k, v = layer(x).split([self.key_dim, self.key_dim, self.val_dim], dim=-1)
            outputs.append(torch.softmax(q @ k.transpose(-2, -1), -1) @ v)
        return self.proj(torch.cat(outputs, -1))


class Gates(nn.Module):
    """A list of sizes, two of them equal, by which a projection is cut, as in FocalNet."""

    def __init__(self, width=12, levels=2):
        super().__init__()
        self.levels = levels
        self.input_split = [width, width, levels]
        self.f, self.h = nn.Linear(width, 2 * width + levels), nn.Linear(width, width)

    def forward(self, x):
        q, context, gates = torch.split(self.f(x), self.input_split, -1)
        return q * self.h(sum(context * gates[..., index : index + 1] for index in range(self.levels)))


MIDDLES = {
    "an equal number before the right one": lambda: Windows(),
    "a bias cut in thirds": lambda: CosineWindows(),
    "heads of one size": lambda: Heads(),
    "heads of two sizes": lambda: Heads(value=8),
    "equal numbers in a list": lambda: Gates(),
}


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES.keys())
@pytest.mark.parametrize("count", [1, 2])
def test_everything_halves(middle, count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), *(middle() for _ in range(count)), nn.Linear(12, 5)).double()
    coverage = coverage_of(model, torch.randn(2, 9, 7, dtype=torch.float64))
    assert coverage.dims[0] == coverage.dims[1] > count
    rigid = {name for group in coverage.rigid for name in group.names}
    # two of a gate's three parts can change, which is less than half of the whole
    assert {name for name in rigid if not name.endswith(".f.bias")} == {f"{count + 1}.bias"}
