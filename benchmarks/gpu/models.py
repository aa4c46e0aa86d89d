"""The models of bench_models.py: elastic at capacity, or plain at any size, from one description."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper_elastic as ee


class Bottleneck(nn.Module):
    def __init__(self, into: ee.ElasticDim, out: ee.ElasticDim, inside: int, stride: int, project: bool) -> None:
        super().__init__()
        first, second = ee.ElasticDim(inside), ee.ElasticDim(inside)
        self.conv1 = ee.ElasticConv2d(into.active, inside, 1, bias=False, in_dim=into, out_dim=first)
        self.bn1 = ee.ElasticBatchNorm2d(inside, dim=first)
        self.conv2 = ee.ElasticConv2d(inside, inside, 3, stride, 1, bias=False, in_dim=first, out_dim=second)
        self.bn2 = ee.ElasticBatchNorm2d(inside, dim=second)
        self.conv3 = ee.ElasticConv2d(inside, out.active, 1, bias=False, in_dim=second, out_dim=out)
        self.bn3 = ee.ElasticBatchNorm2d(out.active, dim=out)
        self.shortcut = nn.Sequential()
        if project:
            self.shortcut = nn.Sequential(
                ee.ElasticConv2d(into.active, out.active, 1, stride, bias=False, in_dim=into, out_dim=out),
                ee.ElasticBatchNorm2d(out.active, dim=out),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al., 2016) whose every channel count is elastic; each stage shares one residual dim."""
    stream = ee.ElasticDim(width)
    layers: list[nn.Module] = [
        ee.ElasticConv2d(3, width, 7, 2, 3, bias=False, out_dim=stream),
        ee.ElasticBatchNorm2d(width, dim=stream),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    for stage, depth in enumerate(depths):
        inside = width * 2**stage
        out = ee.ElasticDim(4 * inside)
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Bottleneck(stream, out, inside, stride, index == 0))
            stream = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), ee.ElasticLinear(stream.active, classes, in_dim=stream))


class Attention(nn.Module):
    """Causal attention whose heads are the units of a dim; elastic linear layers around torch's attention."""

    def __init__(self, stream: ee.ElasticDim, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = ee.ElasticDim(heads), size
        inside = self.heads * size
        self.query, self.key, self.value = (ee.ElasticLinear(stream.active, inside.active, in_dim=stream, out_dim=inside) for _ in range(3))
        self.project = ee.ElasticLinear(inside.active, stream.active, in_dim=inside, out_dim=stream)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, stream: ee.ElasticDim, heads: int, size: int) -> None:
        super().__init__()
        hidden = ee.ElasticDim(4 * stream.active)
        self.norm1, self.norm2 = (ee.ElasticLayerNorm(stream.active, dim=stream) for _ in range(2))
        self.attention = Attention(stream, heads, size)
        self.up = ee.ElasticLinear(stream.active, hidden.active, in_dim=stream, out_dim=hidden)
        self.down = ee.ElasticLinear(hidden.active, stream.active, in_dim=hidden, out_dim=stream)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of GPT-2's sizes (Radford et al., 2019) with every width elastic but the vocabulary; the head is not tied."""

    def __init__(self, depth: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.stream = ee.ElasticDim(width)
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(self.stream, heads, width // heads) for _ in range(depth))
        self.norm = ee.ElasticLayerNorm(width, dim=self.stream)
        self.head = ee.ElasticLinear(width, vocabulary, bias=False, in_dim=self.stream)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
