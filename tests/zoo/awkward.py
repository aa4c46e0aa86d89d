"""Hard cases, one difficulty each, in how modules and parameters are used: shared, derived, frozen, compiled, subclassed, structured.

Each case is named after its difficulty; `awkward_channels` has those in what is done with a dim.
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, pictures, tokens


class ModuleCalledTwice(nn.Module):
    """One layer and one norm in two places: all four axes that meet there have one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(14, 24)
        self.shared = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.last = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.relu(self.shared(F.relu(self.first(x)))))
        return self.last(self.norm(F.relu(self.shared(x))))


class TiedWeights(nn.Module):
    """A language model whose decoder holds the embedding's parameter, and an encoder between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.hidden = nn.Linear(24, 40)
        self.back = nn.Linear(40, 24)
        self.decoder = nn.Linear(24, 50)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        return self.decoder(x + self.back(F.relu(self.hidden(x))))


class DataDependent(nn.Module):
    """Chooses its branch by a value: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(14, 24)
        self.positive = nn.Linear(24, 10)
        self.negative = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        if x.mean() > 0.2:
            return self.positive(x) + 0.0 * self.negative(x)
        return self.negative(x) + 0.0 * self.positive(x)


class FrozenPart(nn.Module):
    """A backbone without gradients, batch norm included, under a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3, stride=2), nn.ReLU()
        )
        self.backbone.requires_grad_(False)
        self.hidden = nn.Conv2d(20, 28, 1)
        self.head = nn.Linear(28, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.backbone(x))).mean((2, 3)))


class Gate(nn.Module):
    """What `ScriptedPart` compiles with TorchScript."""

    def __init__(self, features: int):
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x))


class ScriptedPart(nn.Module):
    """A child that is a ScriptModule, between two layers that could be elastic if it were not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(14, 40)
        self.fc2 = nn.Linear(40, 24)
        self.gate = scripted(Gate(24))
        self.fc3 = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.gate(F.relu(self.fc2(F.relu(self.fc1(x))))))


class SamePadConv2d(nn.Conv2d):
    """TensorFlow's "same" padding, which may be uneven and depends on the input's size."""

    def forward(self, x: Tensor) -> Tensor:
        missing = []
        for size, kernel, stride, dilation in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            missing.append(max((-(size // -stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0))
        high, wide = missing
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class StandardisedConv2d(nn.Conv2d):
    """Each filter to mean zero and variance one before it is used: a reduction over the axis of input channels."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BareRMSNorm(nn.Module):
    """A norm with a parameter of its own, as Llama has."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class GatedMLP(nn.Module):
    """One projection cut in halves, one of which gates the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(14, 24)
        self.fc2 = nn.Linear(24, 2 * 40)
        self.fc3 = nn.Linear(40, 28)
        self.glu = nn.Linear(28, 2 * 32)
        self.fc4 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc2(F.relu(self.fc1(x))).chunk(2, dim=-1)
        x = self.fc3(value * F.silu(gate))
        return self.fc4(F.glu(self.glu(x), dim=-1))


class EinsumAttention(nn.Module):
    """Attention in einsum, its projections bare parameters of shape (embedding, heads, head_dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.w_q = nn.Parameter(torch.randn(24, 4, 6) * 0.2)
        self.w_k = nn.Parameter(torch.randn(24, 4, 6) * 0.2)
        self.w_v = nn.Parameter(torch.randn(24, 4, 8) * 0.2)
        self.w_o = nn.Parameter(torch.randn(4, 8, 24) * 0.2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q = torch.einsum("bnc,chd->bhnd", x, self.w_q)
        k = torch.einsum("bnc,chd->bhnd", x, self.w_k)
        v = torch.einsum("bnc,chd->bhnd", x, self.w_v)
        attention = torch.einsum("bhid,bhjd->bhij", q, k).div(6**0.5).softmax(-1)
        x = x + torch.einsum("bhij,bhjd,hdc->bic", attention, v, self.w_o)
        return self.head(x.mean(1))


class GroupNormNet(nn.Module):
    """Group norm with groups of several channels, with one group, and with one channel a group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 24)
        self.conv2 = nn.Conv2d(24, 36, 3, padding=1, groups=4)
        self.norm2 = nn.GroupNorm(1, 36)
        self.conv3 = nn.Conv2d(36, 20, 1)
        self.norm3 = nn.GroupNorm(20, 20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(F.relu(self.norm3(self.conv3(x))).mean((2, 3)))


class Conv1dNet(nn.Module):
    """Convolutions over time, dilated and causal, gated as WaveNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.causal = nn.Conv1d(5, 16, 2)
        self.filter = nn.Conv1d(16, 24, 2, dilation=2)
        self.gate = nn.Conv1d(16, 24, 2, dilation=2)
        self.norm = nn.BatchNorm1d(24)
        self.residual = nn.Conv1d(24, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.causal(F.pad(x, (1, 0)))
        y = F.pad(x, (2, 0))
        y = self.norm(torch.tanh(self.filter(y)) * torch.sigmoid(self.gate(y)))
        return self.head((x + self.residual(y)).mean(-1))


class EmbeddingBags(nn.Module):
    """A bag of features per table, concatenated with numbers, as recommenders have."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.EmbeddingBag(50, 12, mode="mean")
        self.items = nn.EmbeddingBag(60, 20, mode="sum")
        self.dense = nn.Linear(7, 16)
        self.fc1 = nn.Linear(12 + 20 + 16, 40)
        self.fc2 = nn.Linear(40, 10)

    def forward(self, users: Tensor, items: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([self.users(users), self.items(items), F.relu(self.dense(numbers))], dim=-1)
        return self.fc2(F.relu(self.fc1(x)))


@dataclass
class Detection:
    """What `StructuredOutputs` returns within its dict."""

    scores: Tensor
    boxes: Tensor


torch.export.register_dataclass(Detection, serialized_type_name="zoo.Detection")


class StructuredOutputs(nn.Module):
    """A dict that holds features, a dataclass and what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 24, 3, stride=2)
        self.scores = nn.Conv2d(24, 10, 1)
        self.boxes = nn.Conv2d(24, 16, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        x = F.relu(self.backbone(x))
        return {"features": x, "detection": Detection(self.scores(x), self.boxes(x)), "stride": 2}


class ShapePreservingBlocks(nn.Module):
    """A ModuleList of residual blocks, each of which could be switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 24, 1))
            for hidden in (16, 28, 36)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class ParallelHeads(nn.Module):
    """One trunk, several heads of several kinds, a tuple of outputs; one of them shows the trunk's features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(14, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU())
        self.heads = nn.ModuleDict(
            {"age": nn.Linear(24, 1), "kind": nn.Linear(24, 10), "deep": nn.Sequential(nn.Linear(24, 28), nn.Linear(28, 6))}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.trunk(x)
        return (*(head(x) for head in self.heads.values()), x)


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        return torch.jit.script(module)


def between(norm_or_layer: nn.Module) -> nn.Module:
    """The layer under test, of 24 features in and out, inside a small network."""
    return nn.Sequential(nn.Linear(14, 24), nn.ReLU(), norm_or_layer, nn.ReLU(), nn.Linear(24, 10))


def weight_norm_new() -> nn.Module:
    return between(torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)))


def weight_norm_hook() -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return between(torch.nn.utils.weight_norm(nn.Linear(24, 24)))


def spectral_norm() -> nn.Module:
    return between(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(24, 24)))


def convolutions(kind: type[nn.Conv2d]) -> nn.Module:
    """A network of one kind of Conv2d: strided, depthwise and plain."""
    return nn.Sequential(
        kind(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        kind(16, 16, 3, stride=2, padding=1, groups=16),
        nn.ReLU(),
        kind(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def rows() -> Tensor:
    return torch.randn(3, 14, generator=torch.Generator().manual_seed(1))


def signals() -> Tensor:
    return torch.randn(3, 5, 33, generator=torch.Generator().manual_seed(1))


def bags() -> tuple[Tensor, Tensor, Tensor]:
    return tokens(4, 50), tokens(6, 60, seed=2), torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


CASES = by_name(
    Case("data_dependent", DataDependent, rows, exports=False),
    Case("module_called_twice", ModuleCalledTwice, rows),
    Case("tied_weights", TiedWeights, lambda: tokens(11, 50)),
    Case("weight_norm_parametrization", weight_norm_new, rows),
    Case("weight_norm_hook", weight_norm_hook, rows),
    Case("spectral_norm", spectral_norm, rows),
    Case("frozen_part", FrozenPart, pictures),
    Case("scripted_part", ScriptedPart, rows, exports=False),
    Case("same_padding_conv", lambda: convolutions(SamePadConv2d), pictures),
    Case("standardised_conv", lambda: convolutions(StandardisedConv2d), pictures),
    Case("bare_rms_norm", lambda: between(BareRMSNorm(24)), rows),
    Case("gated_mlp", GatedMLP, rows),
    Case("einsum_attention", EinsumAttention, lambda: tokens(11, 50)),
    Case("group_norm", GroupNormNet, pictures),
    Case("conv1d", Conv1dNet, signals),
    Case("embedding_bags", EmbeddingBags, bags),
    Case("structured_outputs", StructuredOutputs, pictures),
    Case("shape_preserving_blocks", ShapePreservingBlocks, pictures),
    Case("parallel_heads", ParallelHeads, rows),
)
