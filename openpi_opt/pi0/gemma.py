"""A Gemma tower, used twice: the prefix language model and the action expert.

Module names give the state dict the names of an openpi file.
Letters: B batch, S tokens of this call, T all keys (cached ones first), W width, Hq query heads,
Hkv key/value heads, D head dim, F MLP width.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from openpi_opt.pi0.config import GemmaConfig, RopeFrequencies
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import Attention, Ops, Visibility

EPS = 1e-6
ROPE_THETA = 10000.0


class Rope(NamedTuple):
    """Cosine and sine of the rotary angles, each [B or 1, S, D/2] in the activations' dtype."""

    cos: Tensor
    sin: Tensor


class Attending(NamedTuple):
    """How the tokens of a call attend to what they see: the same in every layer of a tower."""

    rope: Rope
    """of the call's own tokens"""
    visibility: Visibility
    """S queries, T keys"""
    attend: Attention


class KeysValues(NamedTuple):
    """One layer's keys (rotated) and values, each [B, T, Hkv, D]."""

    keys: Tensor
    values: Tensor

    def joined(self, keys: Tensor, values: Tensor) -> "KeysValues":
        """These, followed by a call's own [B, S, Hkv, D]."""
        return KeysValues(
            torch.cat((self.keys, keys), dim=1), torch.cat((self.values, values), dim=1)
        )


class Past(Protocol):
    """What a layer's tokens see before their own; `KeysValues` is the plain one."""

    @property
    def keys(self) -> Tensor:
        """[B, T, Hkv, D], rotated."""

    @property
    def values(self) -> Tensor:
        """[B, T, Hkv, D]."""

    def joined(self, keys: Tensor, values: Tensor) -> KeysValues:
        """All keys and values of a call whose own are [B, S, Hkv, D]."""


def rope_frequencies(head_dim: int, rounding: RopeFrequencies) -> Tensor:
    """theta^(-2d/D) for d < D/2 -> [D/2] float32 on the CPU, holding rounded values if asked.

    openpi and LeRobot cast these with the rest of the model, so their bfloat16 mode rounds them.
    """
    exponent = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    frequencies = 1.0 / ROPE_THETA**exponent
    return frequencies.to(getattr(torch, rounding)).float()


def rope_at(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rope:
    """The rotary tables of positions [B or 1, S] int64; angles in float32, then cast to `dtype`."""
    # A product, not a matmul: with TF32 on, a matmul would lose the angle's low bits.
    angles = positions.unsqueeze(-1).float() * frequencies
    return Rope(angles.cos().to(dtype), angles.sin().to(dtype))


class RmsNorm(nn.Module):
    """Gemma's RMSNorm, gain 1 + weight, computed by `ops.rms_norm`."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.ops.rms_norm(x, self.weight, EPS)


class SelfAttention(nn.Module):
    """Attention of a layer's tokens over the cached keys and their own."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(config.width, q_width, False, ops)
        self.k_proj = Linear(config.width, kv_width, False, ops)
        self.v_proj = Linear(config.width, kv_width, False, ops)
        self.o_proj = Linear(q_width, config.width, False, ops)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, W] -> q [B, S, Hq, D], k and v [B, S, Hkv, D], none of them rotated."""
        q = self.q_proj(x).view(*x.shape[:-1], self.heads, self.head_dim)
        k = self.k_proj(x).view(*x.shape[:-1], self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(*x.shape[:-1], self.kv_heads, self.head_dim)
        return q, k, v

    def attended(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """[B, S, W] -> the heads [B, S, Hq * D] before their projection, and as `forward`."""
        q, k, v = self.qkv(x)
        q, k = self.ops.rotary_qk(q, k, *how.rope)
        cache = KeysValues(k, v) if past is None else past.joined(k, v)
        return how.attend(q, *cache, how.visibility, self.scale).flatten(2), cache

    def forward(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """[B, S, W] -> the same shape, and the keys and values of all T tokens."""
        heads, cache = self.attended(x, how, past)
        return self.o_proj(heads), cache


class GatedMlp(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_proj = Linear(config.width, config.mlp_width, False, ops)
        self.up_proj = Linear(config.width, config.mlp_width, False, ops)
        self.down_proj = Linear(config.mlp_width, config.width, False, ops)

    def hidden(self, x: Tensor) -> Tensor:
        """[B, S, W] -> gelu(gate(x)) * up(x), [B, S, F]."""
        return self.ops.gelu_mul(self.gate_proj(x), self.up_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        return self.down_proj(self.hidden(x))


class LayerParts(nn.Module):
    """The attention and the MLP of a layer; how they are normed and added is its subclass's."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, ops)
        self.mlp = GatedMlp(config, ops)


class GemmaLayer(LayerParts):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.input_layernorm = RmsNorm(config.width, ops)
        self.post_attention_layernorm = RmsNorm(config.width, ops)

    def forward(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """[B, S, W] -> the same shape, and the keys and values of all T tokens."""
        out, cache = self.self_attn(self.input_layernorm(x), how, past)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class GemmaTower(nn.Module):
    """The layers and the final norm. The embedding table lives outside (it is `lm_head`)."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(config, ops) for _ in range(config.depth))
        self.norm = RmsNorm(config.width, ops)

    def forward(
        self, x: Tensor, how: Attending, past: Sequence[Past] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """[B, S, W] -> hidden states *before* the final norm, and each layer's keys and values.

        `past[i]` holds the keys and values that layer i sees before its own.
        """
        caches = []
        for index, layer in enumerate(self.layers):
            x, cache = layer(x, how, None if past is None else past[index])
            caches.append(cache)
        return x, caches
