"""The SigLIP vision tower (So400m/14): pre-LN transformer over 256 image tokens, no pooling.

Module names give the state dict the names of an openpi file.
Letters: N images, 256 tokens an image, W width, Hq heads, D head dim, F MLP width.
"""

import torch
from torch import Tensor, nn

from openpi_opt.pi0.config import VisionConfig
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import SEE_ALL, Ops

EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, computed by `ops.layer_norm`."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__(width, eps=EPS)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    """Patches to tokens, plus a learned position table; float32 in every precision."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, kernel_size=size, stride=size)
        # Not `nn.Embedding(...)`: its `normal_` on meta tensors imports sympy, over a second.
        positions = torch.empty(config.tokens, config.width)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, 224, 224] float32 in [-1, 1] -> [N, 256, W] float32, rows of patches in order."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Full attention among the tokens of one image."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.heads = config.heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.q_proj = Linear(config.width, config.width, True, ops)
        self.k_proj = Linear(config.width, config.width, True, ops)
        self.v_proj = Linear(config.width, config.width, True, ops)
        self.out_proj = Linear(config.width, config.width, True, ops)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 256, W] -> q, k, v, each [N, 256, Hq, D]."""
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        return self.q_proj(x).view(shape), self.k_proj(x).view(shape), self.v_proj(x).view(shape)

    def attended(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> the heads [N, 256, Hq * D] before their projection."""
        q, k, v = self.qkv(x)
        return self.ops.attention_vision(q, k, v, SEE_ALL, self.scale).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, W]."""
        return self.out_proj(self.attended(x))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.fc1 = Linear(config.width, config.mlp_width, True, ops)
        self.fc2 = Linear(config.mlp_width, config.width, True, ops)

    def hidden(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> gelu_tanh(fc1(x)), [N, 256, F]."""
        return self.ops.gelu(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, W]."""
        return self.fc2(self.hidden(x))


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, ops)
        self.self_attn = SelfAttention(config, ops)
        self.layer_norm2 = LayerNorm(config.width, ops)
        self.mlp = Mlp(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, W]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, ops) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, W]."""
        for layer in self.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    """Images to normed tokens."""

    def __init__(self, config: VisionConfig, ops: Ops) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, ops)
        self.post_layernorm = LayerNorm(config.width, ops)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, 3, 224, 224] float32 -> [N, 256, W] of `dtype`, the dtype of the layers."""
        return self.post_layernorm(self.encoder(self.embeddings(images).to(dtype)))
