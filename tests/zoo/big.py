"""Models of full size, for what conversion costs: a ResNet-50 with torchvision's names, and a transformer encoder of BERT-base's size.

Source: He et al. 2015 (arXiv:1512.03385), Devlin et al. 2018 (arXiv:1810.04805).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, images, tokens
from .residual import Bottleneck, ResNet


class SelfAttention(nn.Module):
    """Attention with four projections and torch's scaled dot product."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.output(x.transpose(1, 2).reshape(batch, length, width))


class EncoderLayer(nn.Module):
    """Attention and a two-layer network, each normalised after its addition."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.attention = SelfAttention(hidden_size, num_heads)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x))
        return self.output_norm(x + self.output(F.gelu(self.intermediate(x))))


class Encoder(nn.Module):
    """Embeddings, layers and a pooled first token."""

    def __init__(
        self, vocabulary: int = 30522, hidden_size: int = 768, num_layers: int = 12, num_heads: int = 12, intermediate_size: int = 3072
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, hidden_size)
        self.position_embeddings = nn.Embedding(512, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(hidden_size, num_heads, intermediate_size) for _ in range(num_layers))
        self.pooler = nn.Linear(hidden_size, hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.norm(self.word_embeddings(input_ids) + self.position_embeddings(positions))
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(self.pooler(x[:, 0]))


BIG = by_name(
    Case("resnet50", lambda: ResNet(Bottleneck, (3, 4, 6, 3), width=64, num_classes=1000), lambda: images(64, 96)),
    Case("encoder_base", Encoder, lambda: tokens(11, 30522)),
)

# the same encoder, small
SMALL = by_name(
    Case("encoder", lambda: Encoder(50, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40), lambda: tokens(11, 50))
)
