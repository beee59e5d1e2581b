"""A layer of the action expert in six launches (eight on AMD), for a denoising step's few rows.

In a step 11 rows (10 without the state token) go through 18 layers, ten times an inference. As
PyTorch operations a layer is some thirty launches, most of them shorter than the gaps between them.
Here norms, activation and residuals are part of the products around them, and attention reads the
prefix's keys where the prefill left them, so no step copies or writes a cache.

Vendors: NVIDIA and AMD (not run on AMD). Source: Dexmal/realtime-vla writes its decoder as such a
chain of Triton kernels; the kernels here are `triton_skinny_gemm`, `triton_rotary` and
`triton_decode` of `openpi_opt.kernels`.

Letters: B batch, S tokens of the call, N keys before them, T all keys, W width, Hq query heads, Hkv
key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from openpi_opt.kernels.triton_decode import CachedAttention, cached_attention
from openpi_opt.kernels.triton_rotary import rotary
from openpi_opt.kernels.triton_skinny_gemm import skinny_gelu_mul, skinny_linear
from openpi_opt.pi0.gemma import (
    EPS,
    Attending,
    GemmaLayer,
    GemmaTower,
    KeysValues,
    Past,
    RmsNorm,
)
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.buffer import BufferedKeysValues
from openpi_opt.surgery.folded import UnitRmsNorm
from openpi_opt.surgery.fused import FusedAttention, FusedMlp
from openpi_opt.surgery.towers import gemma_layers


class FusedExpertLayer(GemmaLayer):
    """A Gemma layer of at most 64 rows, B * S, as a chain of fused kernels.

    The fewer roundings are the only difference from the plain layer: a normed input, gate and up
    are never rounded, and a sum with its residual is rounded once.
    """

    self_attn: FusedAttention
    mlp: FusedMlp
    attend_cached: CachedAttention

    def step(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """[B, S, W] -> the same shape, and the call's own keys and values [B, S, Hkv, D].

        These keys are before their rotary embedding, which the attention kernel does on the way.
        """
        attention, mlp = self.self_attn, self.mlp
        qkv = _linear(x, attention.qkv_proj.weight, norm=self.input_layernorm)
        heads = qkv.view(*x.shape[:-1], -1, attention.head_dim)
        counts = (attention.heads, attention.kv_heads, attention.kv_heads)
        q, k, v = heads.split(counts, dim=-2)
        before = (k[:, :0], v[:, :0]) if past is None else _stored(past)
        seen = self.attend_cached(q, before, (k, v), how.rope, how.visibility, attention.scale)
        x = _linear(seen.flatten(2), attention.o_proj.weight, residual=x)
        gain = _gain(self.post_attention_layernorm)
        hidden = skinny_gelu_mul(x, mlp.gate_up_proj.weight, gain, EPS, [])
        return _linear(hidden, mlp.down_proj.weight, residual=x), KeysValues(k, v)

    def forward(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """As in `GemmaLayer`; `how.attend` is not called, its cached form is the layer's own."""
        x, own = self.step(x, how, past)
        own = KeysValues(rotary(own.keys, *how.rope), own.values)
        return x, own if past is None else past.joined(*own)


class FusedExpertTower(GemmaTower):
    """A tower of such layers that keeps no caches: what a denoising step would join, none reads.

    Who needs the joined ones (the state token, run once before the steps) calls the layers.
    """

    def forward(
        self, x: Tensor, how: Attending, past: Sequence[Past] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """As in `GemmaTower`, but no keys and values are returned."""
        for index, layer in enumerate(self.layers):
            before = None if past is None else past[index]
            x, _ = cast(FusedExpertLayer, layer).step(x, how, before)
        return x, []


def _linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, norm: RmsNorm | None = None
) -> Tensor:
    """norm(x) @ weight^T + residual, one launch."""
    gain, eps = (None, None) if norm is None else (_gain(norm), EPS)
    out: Tensor = skinny_linear(x, weight, None, residual, gain, eps, [])
    return out


def _gain(norm: RmsNorm) -> Tensor | None:
    """The weight that the kernels add to 1; None when it was folded into the projections."""
    return None if isinstance(norm, UnitRmsNorm) else norm.weight


def _stored(past: Past) -> tuple[Tensor, Tensor]:
    """The keys and values [B, N, Hkv, D] before a call's own: of a buffer the filled rows."""
    if isinstance(past, BufferedKeysValues):
        return past.keys[:, : past.filled], past.values[:, : past.filled]
    return past.keys, past.values


def fuse_expert_layers(policy: Pi0Policy, launch: Mapping[str, int] | None = None) -> None:
    """Turn the expert, whose projections are fused, into a `FusedExpertTower` in place.

    `launch` goes over the launch parameters of the attention kernel.

    Raises:
        ValueError: q, k, v or gate, up are not fused, or the expert is pi05's.
    """
    if not isinstance(policy.expert, GemmaTower):
        raise ValueError("the kernels of the expert's layers have no adaptive norms")
    attend = cached_attention(launch)
    for layer in gemma_layers(policy.expert):
        if not (isinstance(layer.self_attn, FusedAttention) and isinstance(layer.mlp, FusedMlp)):
            raise ValueError("fuse_qkv and fuse_gate_up come before fuse_expert_layers")
        layer.__class__ = FusedExpertLayer
        assert isinstance(layer, FusedExpertLayer)
        layer.attend_cached = attend
    policy.expert.__class__ = FusedExpertTower
