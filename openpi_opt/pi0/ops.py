"""The operations of the policy that can be replaced, with plain PyTorch as default.

A policy has one `Ops`; all of its modules hold a reference to it, so that assigning a field acts
everywhere. The defaults follow the arithmetic of openpi's eager PyTorch code, rounding included.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key/value heads, D head dim, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The reference's value for "not allowed": finite, so a query that may see nothing gets a uniform
# average instead of NaN. Its softmax weight beside any allowed key is exactly 0 in float32.
NOT_ALLOWED = -2.3819763e38


class Segment(NamedTuple):
    """Queries [start, stop) and the keys they see."""

    start: int
    stop: int
    keys: Tensor | int | None
    """None: all keys; int n: the first n; int64 [n] on the device: those at these indices"""


class Padding(NamedTuple):
    """Keys [start, stop) of each element of the batch, which no query sees."""

    start: Tensor
    """[B] int32, read on the device: another call may have another one"""
    stop: int


@dataclass(frozen=True)
class Visibility:
    """Which keys each query sees, said in two equivalent ways.

    `mask` is bool and broadcastable to [B, 1, S, T]; None means that every query sees every key.
    `segments` is the static equivalent for backends that take no mask: together the segments cover
    every query once. It is None when the policy has no declared layout. With `padding`, the
    segments and the padding together are the equivalent: its keys are in no segment.
    What a masked *query* computes is read by nobody, so both only need to be right about keys.
    """

    mask: Tensor | None
    segments: tuple[Segment, ...] | None
    padding: Padding | None = None


SEE_ALL = Visibility(mask=None, segments=None)

Attention = Callable[[Tensor, Tensor, Tensor, Visibility, float], Tensor]


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Softmax attention with the roundings of openpi's eager code; reads the mask only.

    q [B, S, Hq, D], k and v [B, T, Hkv, D] of one dtype -> [B, S, Hq, D] of the same dtype.
    Logits are rounded to the activations' dtype before and after scaling, the softmax is float32.
    Query heads that share a key head become extra rows of one product: no key is repeated.
    """
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    # Three dimensions on purpose: Inductor (2.13) takes the same code in four for an attention
    # pattern that it then rewrites with wrong shapes.
    rows = q.transpose(1, 2).reshape(batch * kv_heads, -1, width)
    k = k.permute(0, 2, 3, 1).reshape(batch * kv_heads, width, keys)
    v = v.transpose(1, 2).reshape(batch * kv_heads, keys, width)
    logits = torch.bmm(rows, k) * scale
    logits = logits.view(batch, heads, queries, keys).float()
    if visibility.mask is not None:
        logits = logits.masked_fill(~visibility.mask, NOT_ALLOWED)
    weights = torch.softmax(logits, dim=-1).to(q.dtype)
    out = torch.bmm(weights.view(batch * kv_heads, -1, keys), v)
    return out.view(batch, heads, queries, width).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma's RMSNorm: x / rms(x) * (1 + weight), in float32, cast once to x's dtype.

    x [..., W], weight [W] float32; None means that the gain is 1.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (1.0 + weight.float())
    return normed.to(x.dtype)


def adaptive_rms_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """RMSNorm with a given gain and shift: x / rms(x) * (1 + scale) + shift, cast once.

    x [..., W], scale and shift [W] float32; computed in float32 -> [..., W] of x's dtype.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + scale) + shift).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis; x [..., W], weight and bias [W], all of one dtype.

    None for both means that the gain is 1 and the bias 0.
    """
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, elementwise (the vision MLP)."""
    return F.gelu(x, approximate="tanh")


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, elementwise, the GELU rounded before the product (the Gemma MLPs)."""
    return F.gelu(gate, approximate="tanh") * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate head vectors, half-split layout: x = [a | b] -> [a cos - b sin | b cos + a sin].

    x [B, S, Hq or Hkv, D], cos and sin [B or 1, S, D/2] of x's dtype, in which all is computed.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotary_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` of queries [B, S, Hq, D] and of keys [B, S, Hkv, D]."""
    return rotary(q, cos, sin), rotary(k, cos, sin)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out] or None -> [..., out], all of one dtype."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu` of a linear layer, for who leaves both to one GEMM (knob `fusion`)."""
    return gelu(F.linear(x, weight, bias))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """A linear layer and the residual it is added to, for who leaves both to one GEMM."""
    return residual + F.linear(x, weight, bias)


@dataclass
class Ops:
    """The replaceable operations; signatures and contracts are those of the defaults above.

    The float32 projections of state, actions and time, and those of pi05's norms, do not go
    through `linear`.
    """

    attention_vision: Attention = eager_attention
    attention_prefill: Attention = eager_attention
    attention_denoise: Attention = eager_attention
    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor] = rms_norm
    adaptive_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = adaptive_rms_norm
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor] = layer_norm
    gelu: Callable[[Tensor], Tensor] = gelu
    gelu_mul: Callable[[Tensor, Tensor], Tensor] = gelu_mul
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = rotary
    rotary_qk: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rotary_qk
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_gelu
    linear_add: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor] = linear_add
