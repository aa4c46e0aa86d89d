"""Networks on sequences and graphs: an LSTM classifier, graph networks on scatter.

Source: Hochreiter & Schmidhuber 1997, Kipf & Welling 2016 (arXiv:1609.02907), Velickovic et al. 2017 (arXiv:1710.10903).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, tokens


class LSTMClassifier(nn.Module):
    """Embedding, two bidirectional layers, the last hidden states of both directions."""

    def __init__(self, vocabulary: int, embedding_dim: int, hidden_dim: int, num_classes: int):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.embedding = nn.Embedding(vocabulary, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.fc1 = nn.Linear(2 * hidden_dim, 30)
        self.fc2 = nn.Linear(30, num_classes)

    def forward(self, text: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(text))
        hidden = torch.cat((hidden[-2], hidden[-1]), dim=1)
        return self.fc2(F.relu(self.fc1(hidden)))


class GraphConvolution(nn.Module):
    """Messages along edges, weighted by the degrees at both ends and summed at the target with index_add."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index[0], edge_index[1]
        degree = torch.zeros(x.size(0), dtype=x.dtype, device=x.device).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        scale = degree.clamp(min=1).rsqrt()
        messages = self.lin(x)[source] * (scale[source] * scale[target]).unsqueeze(-1)
        out = torch.zeros(x.size(0), messages.size(1), dtype=x.dtype, device=x.device).index_add(0, target, messages)
        return out + self.bias


class GraphAttention(nn.Module):
    """Heads that weigh edges by a softmax over the edges of each target, written with scatter_add and scatter_reduce."""

    def __init__(self, in_channels: int, out_channels: int, heads: int):
        super().__init__()
        self.heads, self.out_channels = heads, out_channels
        self.lin = nn.Linear(in_channels, heads * out_channels, bias=False)
        self.att_src = nn.Parameter(torch.randn(1, heads, out_channels) * 0.3)
        self.att_dst = nn.Parameter(torch.randn(1, heads, out_channels) * 0.3)
        self.bias = nn.Parameter(torch.zeros(heads * out_channels))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        num_nodes = x.size(0)
        x = self.lin(x).view(-1, self.heads, self.out_channels)
        alpha = F.leaky_relu((x * self.att_src).sum(-1)[source] + (x * self.att_dst).sum(-1)[target], 0.2)
        index = target.unsqueeze(-1).expand_as(alpha)
        highest = alpha.new_full((num_nodes, self.heads), -1e9).scatter_reduce(0, index, alpha.detach(), reduce="amax")
        alpha = (alpha - highest[target]).exp()
        total = alpha.new_zeros(num_nodes, self.heads).scatter_add(0, index, alpha)
        messages = x[source] * (alpha / total[target]).unsqueeze(-1)
        out = torch.zeros_like(x).scatter_add(0, target.view(-1, 1, 1).expand_as(messages), messages)
        return out.view(-1, self.heads * self.out_channels) + self.bias


class GraphNetwork(nn.Module):
    """Two layers on the graph, the mean over each graph's nodes, a classifier."""

    def __init__(self, first: nn.Module, second: nn.Module, channels: int, num_classes: int):
        super().__init__()
        self.conv1, self.conv2 = first, second
        self.lin = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = F.relu(self.conv1(x, edge_index))
        x = F.relu(self.conv2(x, edge_index))
        count = torch.zeros(3, dtype=x.dtype).index_add(0, batch, torch.ones_like(batch, dtype=x.dtype))
        pooled = torch.zeros(3, x.size(1), dtype=x.dtype).index_add(0, batch, x)
        return self.lin(pooled / count.unsqueeze(-1))


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Three graphs of 17 nodes in all: features, edges within each graph, the graph of each node."""
    generator = torch.Generator().manual_seed(1)
    batch = torch.tensor([0] * 7 + [1] * 6 + [2] * 4)
    edges = torch.cat([torch.randint(low, high, (2, 15), generator=generator) for low, high in ((0, 7), (7, 13), (13, 17))], dim=1)
    return torch.randn(17, 10, generator=generator), edges, batch


CASES = by_name(
    Case("lstm", lambda: LSTMClassifier(vocabulary=50, embedding_dim=14, hidden_dim=18, num_classes=6), lambda: tokens(11, 50)),
    Case("graph_convolution", lambda: GraphNetwork(GraphConvolution(10, 24), GraphConvolution(24, 36), 36, num_classes=6), graph),
    Case("graph_attention", lambda: GraphNetwork(GraphAttention(10, 8, 4), GraphAttention(32, 14, 4), 56, num_classes=6), graph),
)
