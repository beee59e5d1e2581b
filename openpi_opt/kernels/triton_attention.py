# mypy: disable-error-code="no-untyped-def"
"""Flash attention for the vision tower and the prefix: many queries, any head width, exact masks.

As in `triton_decode`, the rows of the product are (token, head) pairs over one key head, so MQA
repeats no key. A head width that is no power of two is cut in two tiles, 72 = 64 + 8 padded to 16:
80 columns of products instead of 128. On gfx942, which has no transposing read of LDS, values stay
one tile: 16 columns are too few for a thread to turn in its registers, and were read by 2 bytes.
Reference: `openpi_opt.pi0.ops.eager_attention` in float64.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.launch import FLASH, Launch, applied, encoded
from openpi_opt.kernels.operators import operator
from openpi_opt.kernels.triton_common import (
    LOG2_E,
    LOWEST,
    arch,
    load_rows,
    neighbours_on_one_die,
    padded,
    unit_stride,
)
from openpi_opt.kernels.triton_visibility import bounds, mask_arguments
from openpi_opt.pi0.ops import Attention, Visibility

# By architecture and head width.
TABLE: dict[tuple[str, int], Launch] = {
    # H100, by benchmarks/tune.py --flash: us at 816 and at 3 x 256 tokens.
    ("sm90", 256): Launch(block_m=64, block_n=64, num_warps=4, num_stages=3),  # 24.6
    ("sm90", 72): Launch(block_m=64, block_n=64, num_warps=4, num_stages=3),  # 9.7
}


# 80 lines: each operand has its pointer and strides, and a head may be cut in two tiles.
@triton.jit
def _flash(
    q, k, v, mask, lengths, out, keys, padding_end, rows, group, lead, lead_keys, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
    stride_vh, stride_mb, stride_mq, stride_mk,
    width: tl.constexpr, kv_heads: tl.constexpr, masked: tl.constexpr, bounded: tl.constexpr,
    padded_keys: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_d: tl.constexpr, tail: tl.constexpr,
    block_v: tl.constexpr, tail_v: tl.constexpr, aligned: tl.constexpr, key_blocks: tl.constexpr,
    dies: tl.constexpr,
):  # fmt: skip
    if dies > 1:
        row_blocks = tl.num_programs(0)
        place = tl.program_id(1) * row_blocks + tl.program_id(0)
        place = neighbours_on_one_die(place, row_blocks * tl.num_programs(1), dies)
        row_block, pair = place % row_blocks, place // row_blocks
    else:
        row_block, pair = tl.program_id(0), tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = row_block * block_m + tl.arange(0, block_m)
    live = row < rows
    token, head = row // group, kv_head * group + row % group
    # Triton knows of arguments only whether 16 divides them; a head stride of 72 would mean
    # loads of 2 bytes instead of 16.
    k += tl.multiple_of(batch * stride_kb + kv_head * stride_kh, aligned)
    v += tl.multiple_of(batch * stride_vb + kv_head * stride_vh, aligned)
    first: tl.constexpr = block_d if tail > 0 else width
    place = tl.multiple_of(token * stride_qs + head * stride_qh, aligned)
    q += tl.multiple_of(batch * stride_qb, aligned)
    queries = load_rows(q, place, 1, live, first, block_d)
    first_v: tl.constexpr = block_v if tail_v > 0 else width
    acc = tl.zeros((block_m, block_v), tl.float32)
    if tail > 0:
        queries_tail = load_rows(q + block_d, place, 1, live, width - block_d,
                                 tail)  # fmt: skip
    if tail_v > 0:
        acc_tail = tl.zeros((block_m, tail_v), tl.float32)
    seen = tl.where(token < lead, lead_keys, keys)
    top = tl.full((block_m,), LOWEST, tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    blocks = key_blocks
    if padded_keys:
        length = tl.load(lengths + batch)
        # Padding that reaches the last key: what lies in it is not even read.
        last = tl.where(padding_end >= keys, tl.minimum(length, keys), keys)
        blocks = tl.cdiv(last, block_n)
    for block in range(blocks):
        key = block * block_n + tl.arange(0, block_n)
        inside = key < keys
        tile = load_rows(k, key, stride_ks, inside, first, block_d)
        logits = tl.dot(queries, tl.trans(tile), input_precision="ieee")
        if tail > 0:
            tile = load_rows(k + block_d, key, stride_ks, inside, width - block_d, tail)
            logits = tl.dot(queries_tail, tl.trans(tile), logits, input_precision="ieee")
        logits = logits * scale
        if bounded:
            visible = key[None, :] < seen[:, None]
            if padded_keys:
                visible = visible & ((key < length) | (key >= padding_end))[None, :]
            if masked:
                cell = token[:, None] * stride_mq + key[None, :] * stride_mk
                allowed = tl.load(
                    mask + batch * stride_mb + cell, mask=visible & live[:, None], other=0
                )
                visible = visible & (allowed != 0)
            logits = tl.where(visible, logits, LOWEST)
        higher = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - higher[:, None])
        if masked:  # only then may a row have seen nothing yet, when LOWEST - LOWEST is 0
            weights = tl.where(visible, weights, 0.0)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
        tile = load_rows(v, key, stride_vs, inside, first_v, block_v)
        weights = weights.to(tile.dtype)
        acc = tl.dot(weights, tile, acc * shrink[:, None], input_precision="ieee")
        if tail_v > 0:
            tile = load_rows(v + block_v, key, stride_vs, inside, width - block_v, tail_v)
            acc_tail = tl.dot(weights, tile, acc_tail * shrink[:, None], input_precision="ieee")
    scale_out = 1.0 / tl.where(total > 0, total, 1.0)
    tokens = rows // group
    target = out + (((batch * tokens + token) * kv_heads * group + head) * width)[:, None]
    column = tl.arange(0, block_v)
    result = (acc * scale_out[:, None]).to(out.dtype.element_ty)
    tl.store(target + column[None, :], result, mask=live[:, None] & (column < width)[None, :])
    if tail_v > 0:
        column = block_v + tl.arange(0, tail_v)
        result = (acc_tail * scale_out[:, None]).to(out.dtype.element_ty)
        tl.store(target + column[None, :], result, mask=live[:, None] & (column < width)[None, :])


def tiles(width: int) -> tuple[int, int]:
    """Head width -> columns of the main tile and of the tail; 0 when one tile is as good."""
    whole = padded(width)
    if whole - width < whole // 4 or whole == 16:
        return whole, 0
    main = whole // 2
    tail = padded(width - main)
    return (main, tail) if main + tail < whole else (whole, 0)


def table_key(q: Tensor) -> tuple[str, int]:
    """The key of `TABLE` for queries [B, S, Hq, D]."""
    return arch(q), q.shape[3]


def default_launch(q: Tensor) -> Launch:
    """The measured parameters of this architecture, or the default."""
    key, width = table_key(q)
    if q.dtype == torch.float32:  # no matrix instruction: tiles that fit the registers
        return Launch(block_m=16, block_n=32)
    if key.startswith("gfx"):
        # Computed, not measured: 192 blocks of vision for 304 and 256 compute units, no spills.
        fallback = Launch(block_m=64, block_n=32, dies=8, matrix_instr_nonkdim=16)
    else:
        wide = Launch(block_m=64, block_n=32, num_warps=8, num_stages=2)
        fallback = wide if width > 128 else Launch(block_m=64, block_n=64, num_stages=3)
    return TABLE.get((key, width), fallback)


@operator("triton_flash_attention")
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, lead: int, lead_keys: int, keys: int, mask: Tensor | None,
    scale: float, launch: Sequence[int], padding: Tensor | None = None, padding_end: int = 0,
) -> Tensor:  # fmt: skip
    """q [B, S, Hq, D], k and v [B, T, Hkv, D] -> [B, S, Hq, D].

    The first `lead` queries see `lead_keys` keys (at least one), the others `keys`. mask: bool
    [B, T], or broadcastable to [B, 1, S, T], or None. A query that the mask lets see no
    key gets zeros. padding: [B] int32, read on the device: no query sees the keys [padding[b],
    padding_end); without a mask key 0 must be seen. `launch`: see `launch.encoded`.
    """
    chosen = applied(default_launch(q), launch)
    batch, tokens, heads, width = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    q, k, v = (unit_stride(t) for t in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    seen, *mask_strides = mask_arguments(mask, batch, tokens, k.shape[1], q)
    block_d, tail = tiles(width)
    block_v, tail_v = (padded(width), 0) if arch(q) == "gfx942" else (block_d, tail)
    strides = [s for t in (q, k, v) for s in t.stride()[:3]]
    tail_block = keys % chosen.block_n != 0
    bounded = mask is not None or padding is not None or lead > 0 or tail_block
    _flash[(triton.cdiv(tokens * group, chosen.block_m), batch * kv_heads)](
        q, k, v, seen, q if padding is None else padding, out, keys, padding_end,
        tokens * group, group, lead, lead_keys, scale * LOG2_E,
        *strides, *mask_strides, width=width,
        kv_heads=kv_heads, masked=mask is not None, bounded=bounded,
        padded_keys=padding is not None, block_m=chosen.block_m,
        block_n=chosen.block_n, block_d=block_d, tail=tail, block_v=block_v, tail_v=tail_v,
        aligned=math.gcd(16, *strides), key_blocks=triton.cdiv(keys, chosen.block_n),
        dies=chosen.dies, **chosen.options(),
    )  # fmt: skip
    return out


def attention(overrides: Mapping[str, int] | None = None) -> Attention:
    """The kernel behind the signature of `eager_attention`; `overrides` replace table entries."""
    launch = encoded(FLASH, overrides)

    def flash(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        seen = bounds(visibility, k.shape[1])
        return flash_attention(
            q, k, v, seen.lead, seen.lead_keys, seen.keys, seen.mask, scale, launch, *seen.padded
        )

    return flash
