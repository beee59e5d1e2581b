# mypy: disable-error-code="no-untyped-def"
"""Rotary embedding, half-split layout, for one tensor or for queries and keys in one launch.

The products and the sum are float32 with one rounding (eager code rounds each of them). One block
rotates one head of one token: 128 pairs at Pi0's head width 256. On AMD it is four heads, so that
each of 64 lanes loads 16 bytes instead of 4.
Reference: `openpi_opt.pi0.ops.rotary`.

Letters: B batch, S tokens, Hq query heads, Hkv key heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.operators import operator
from openpi_opt.kernels.triton_common import arch, unit_stride


@triton.jit
def _rotate(
    q, k, q_out, k_out, cos, sin, tokens, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks,
    stride_kh, stride_tb, stride_ts, q_heads: tl.constexpr, k_heads: tl.constexpr,
    half: tl.constexpr, block: tl.constexpr, together: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0), tl.program_id(1)
    batch, token = row // tokens, row % tokens
    q_groups: tl.constexpr = (q_heads + together - 1) // together
    lane = tl.arange(0, together * block)
    pair = lane % block
    if group < q_groups:
        head = group * together + lane // block
        keep = (pair < half) & (head < q_heads)
        source = q + batch * stride_qb + token * stride_qs + head * stride_qh + pair
        target = q_out + (row * q_heads + head) * 2 * half + pair
    else:
        head = (group - q_groups) * together + lane // block
        keep = (pair < half) & (head < k_heads)
        source = k + batch * stride_kb + token * stride_ks + head * stride_kh + pair
        target = k_out + (row * k_heads + head) * 2 * half + pair
    table = batch * stride_tb + token * stride_ts + pair
    c = tl.load(cos + table, mask=keep, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=keep, other=0.0).to(tl.float32)
    a = tl.load(source, mask=keep, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=keep, other=0.0).to(tl.float32)
    tl.store(target, (a * c - b * s).to(q_out.dtype.element_ty), mask=keep)
    tl.store(target + half, (b * c + a * s).to(q_out.dtype.element_ty), mask=keep)


def _launch(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, cos, sin = unit_stride(q), cos.contiguous(), sin.contiguous()
    keys = q if k is None else unit_stride(k)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = q_out if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    batch, tokens, q_heads, width = q.shape
    k_heads = 0 if k is None else keys.shape[2]
    block = triton.next_power_of_2(width // 2)
    together = 4 if arch(q).startswith("gfx") else 1
    groups = triton.cdiv(q_heads, together) + triton.cdiv(k_heads, together)
    _rotate[(batch * tokens, groups)](
        q, keys, q_out, k_out, cos, sin, tokens, *q.stride()[:3], *keys.stride()[:3],
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), q_heads=q_heads,
        k_heads=k_heads, half=width // 2, block=block, together=together, num_warps=1,
    )  # fmt: skip
    return q_out, k_out


@operator("triton_rotary")
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, D], cos and sin [B or 1, S, D/2] -> [B, S, H, D] of x's dtype."""
    return _launch(x, None, cos, sin)[0]


@operator("triton_rotary_qk", lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)))
def rotary_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, S, Hq, D] and keys [B, S, Hkv, D], both rotated by one launch."""
    return _launch(q, k, cos, sin)
