"""Vision networks on tokens: ViT in two styles and on nn.TransformerEncoderLayer, Swin, MLP-Mixer.

Source: Dosovitskiy et al. 2020 (arXiv:2010.11929), Liu et al. 2021 (arXiv:2103.14030), Tolstikhin et al. 2021 (arXiv:2105.01601).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, by_name, images


class PatchEmbed(nn.Module):
    """Image to a row of patch embeddings."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, fused: bool, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(dim, dim * 3, bias=True)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            q = q * self.scale
            attn = q @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two layers at each token."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each channel of a residual branch."""

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each normalised before and added after."""

    def __init__(self, dim: int, num_heads: int, hidden: int, fused: bool, rich: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, fused, qk_norm=rich)
        self.ls1 = LayerScale(dim, 0.1) if rich else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim, 0.1) if rich else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """timm's style: class token and position embedding as bare parameters, one projection for queries, keys and values.

    `rich` adds norms of queries and keys and layer scales; `fused` takes torch's attention instead of the written one.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden: int, depth: int, num_patches: int, num_classes: int, fused: bool, rich: bool
    ):
        super().__init__()
        self.num_features = self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(8, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches + 1, embed_dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(embed_dim, num_heads, hidden, fused, rich) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0])


class EncoderBlock(nn.Module):
    """torchvision's block on nn.MultiheadAttention."""

    def __init__(self, hidden_dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=0.0, batch_first=True)
        self.dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_dim, mlp_dim), nn.GELU(), nn.Dropout(0.0), nn.Linear(mlp_dim, hidden_dim), nn.Dropout(0.0)
        )

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        x = self.ln_1(input)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = self.dropout(x) + input
        return x + self.mlp(self.ln_2(x))


class MultiheadViT(nn.Module):
    """torchvision's ViT: patches reshaped with `hidden_dim`, blocks on nn.MultiheadAttention or whole nn.TransformerEncoderLayers."""

    def __init__(self, hidden_dim: int, num_heads: int, mlp_dim: int, depth: int, num_patches: int, num_classes: int, encoder_layer: bool):
        super().__init__()
        self.patch_size = 8
        self.hidden_dim = hidden_dim
        self.conv_proj = nn.Conv2d(3, hidden_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, num_patches + 1, hidden_dim).normal_(std=0.02))
        if encoder_layer:
            layer = nn.TransformerEncoderLayer(
                hidden_dim, num_heads, mlp_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        else:
            self.encoder = nn.Sequential(*(EncoderBlock(hidden_dim, num_heads, mlp_dim) for _ in range(depth)))
        self.ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.heads = nn.Sequential(nn.Linear(hidden_dim, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, self.hidden_dim, h // self.patch_size * (w // self.patch_size)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.ln(self.encoder(x + self.pos_embedding))
        return self.heads(x[:, 0])


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """(batch, height, width, channels) -> (batch x windows, window, window, channels)."""
    B, H, W, C = x.shape
    x = x.view(B, H // window_size, window_size, W // window_size, window_size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, C)


def window_reverse(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """The inverse of `window_partition`."""
    B = int(windows.shape[0] / (H * W / window_size / window_size))
    x = windows.view(B, H // window_size, W // window_size, window_size, window_size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


def relative_positions(window_size: int) -> Tensor:
    """For each pair of positions in a window, the row of the table that holds its bias."""
    grid = torch.stack(torch.meshgrid(torch.arange(window_size), torch.arange(window_size), indexing="ij")).flatten(1)
    relative = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window_size - 1
    return relative[:, :, 0] * (2 * window_size - 1) + relative[:, :, 1]


def shifted_mask(size: tuple[int, int], window_size: int, shift: int) -> Tensor:
    """Minus one hundred between positions that only the cyclic shift has brought into one window."""
    region = torch.zeros((1, *size, 1))
    cuts = (slice(0, -window_size), slice(-window_size, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        region[:, rows, columns, :] = number
    windows = window_partition(region, window_size).view(-1, window_size * window_size)
    return (windows.unsqueeze(1) != windows.unsqueeze(2)).float() * -100.0


class WindowAttention(nn.Module):
    """Attention within windows, with a bias gathered from a table of relative positions."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window_size - 1) ** 2, num_heads) * 0.02)
        self.register_buffer("relative_position_index", relative_positions(window_size))
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        area = self.window_size * self.window_size
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(area, area, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            num_windows = mask.shape[0]
            attn = attn.view(B_ // num_windows, num_windows, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (self.softmax(attn) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    """Window attention, shifted in every second block, and a two-layer network."""

    def __init__(self, dim: int, resolution: tuple[int, int], num_heads: int, window_size: int, shift_size: int, hidden: int):
        super().__init__()
        self.input_resolution = resolution
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden)
        self.register_buffer("attn_mask", shifted_mask(resolution, window_size, shift_size) if shift_size else None)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        assert L == H * W, "input feature has wrong size"
        shortcut = x
        x = self.norm1(x).view(B, H, W, C)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(-self.shift_size, -self.shift_size), dims=(1, 2))
        windows = window_partition(x, self.window_size).view(-1, self.window_size * self.window_size, C)
        windows = self.attn(windows, mask=self.attn_mask).view(-1, self.window_size, self.window_size, C)
        x = window_reverse(windows, self.window_size, H, W)
        if self.shift_size > 0:
            x = torch.roll(x, shifts=(self.shift_size, self.shift_size), dims=(1, 2))
        x = shortcut + x.view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours concatenated, normalised and reduced to twice the channels."""

    def __init__(self, resolution: tuple[int, int], dim: int):
        super().__init__()
        self.input_resolution = resolution
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, _, C = x.shape
        x = x.view(B, H, W, C)
        x = torch.cat([x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


class SwinTransformer(nn.Module):
    """Two stages; the second has half the resolution, twice the channels and twice the heads."""

    def __init__(self, embed_dim: int, num_heads: int, resolution: tuple[int, int], window_size: int, num_classes: int):
        super().__init__()
        self.patch_embed = PatchEmbed(2, embed_dim)
        half = resolution[0] // 2, resolution[1] // 2
        shift = window_size // 2
        stage1 = (SwinBlock(embed_dim, resolution, num_heads, window_size, shifted, 3 * embed_dim) for shifted in (0, shift))
        stage2 = (SwinBlock(2 * embed_dim, half, 2 * num_heads, window_size, shifted, 6 * embed_dim) for shifted in (0, shift))
        self.layers = nn.Sequential(*stage1, PatchMerging(resolution, embed_dim), *stage2)
        self.norm = nn.LayerNorm(2 * embed_dim)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(2 * embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers(self.patch_embed(x)))
        x = torch.flatten(self.avgpool(x.transpose(1, 2)), 1)
        return self.head(x)


class MixerBlock(nn.Module):
    """A two-layer network across tokens, then one across channels."""

    def __init__(self, num_tokens: int, dim: int, token_hidden: int, channel_hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp_tokens = Mlp(num_tokens, token_hidden)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_channels = Mlp(dim, channel_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class MLPMixer(nn.Module):
    """Patches, mixer blocks, the mean over tokens."""

    def __init__(self, dim: int, num_tokens: int, token_hidden: int, channel_hidden: int, depth: int, num_classes: int):
        super().__init__()
        self.stem = PatchEmbed(8, dim)
        self.blocks = nn.Sequential(*(MixerBlock(num_tokens, dim, token_hidden, channel_hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean(dim=1))


def vit(fused: bool, rich: bool) -> nn.Module:
    return VisionTransformer(24, num_heads=4, hidden=40, depth=3, num_patches=35, num_classes=10, fused=fused, rich=rich)


def multihead_vit(encoder_layer: bool) -> nn.Module:
    return MultiheadViT(24, num_heads=4, mlp_dim=40, depth=2, num_patches=35, num_classes=10, encoder_layer=encoder_layer)


CASES = by_name(
    Case("vit", lambda: vit(fused=False, rich=False), lambda: images(40, 56)),
    Case("vit_fused", lambda: vit(fused=True, rich=True), lambda: images(40, 56)),
    Case("vit_multihead", lambda: multihead_vit(encoder_layer=False), lambda: images(40, 56)),
    Case("vit_encoder_layer", lambda: multihead_vit(encoder_layer=True), lambda: images(40, 56)),
    Case("swin", lambda: SwinTransformer(30, num_heads=6, resolution=(16, 24), window_size=4, num_classes=10), lambda: images(32, 48)),
    Case("mixer", lambda: MLPMixer(24, num_tokens=35, token_hidden=14, channel_hidden=52, depth=2, num_classes=10), lambda: images(40, 56)),
)
