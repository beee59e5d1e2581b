# mypy: disable-error-code="no-untyped-def"
"""Attention of few queries over many cached keys: split over keys, exact Pi0 masks, one call.

In a denoising step 11 queries of 8 heads see 799 keys of one head. A flash kernel that walks the
keys has 6 blocks for 132 processors and takes 11 us; cuDNN's takes 25 us, twice, because the state
token must not see the actions. Here the keys are split over blocks as well (flash decoding): one
kernel writes partial sums (running maximum m, weight sum l, weighted values), a second one adds
them in a fixed order. With `fused` the last block of a row does that itself, in the same order.

The rows of the product are (token, head) pairs: heads that share a key head share its tiles, and
no key is repeated. Cached and new keys may lie in two tensors, so the cache is never copied.
Reference: `openpi_opt.pi0.ops.eager_attention` in float64.

Letters: B batch, S queries, P cached keys, T all keys, Hq query heads, Hkv key heads, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.launch import DECODE, Launch, applied, encoded
from openpi_opt.kernels.operators import operator
from openpi_opt.kernels.triton_common import (
    LOG2_E,
    LOWEST,
    arch,
    arrived_last,
    can_follow,
    counters,
    follow,
    load_rows,
    padded,
    prefetch_rows,
    unit_stride,
)
from openpi_opt.kernels.triton_visibility import bounds, mask_arguments
from openpi_opt.pi0.gemma import Rope
from openpi_opt.pi0.ops import Attention, Visibility


def _entry(block_m: int, block_n: int, num_warps: int, dependent: int) -> Launch:
    """An entry of the table: one tile of keys a split, a second kernel that adds the splits."""
    return Launch(block_m=block_m, block_n=block_n, num_warps=num_warps, dependent=dependent)


# By architecture and tokens of a call of one element, padded to 16, 32 or 64. fused is off on AMD,
# where blocks of one row run on different dies.
TABLE: dict[tuple[str, int], Launch] = {
    # H100, us of this kernel and of torch's SDPA in the two calls that the state token needs; the
    # warps by benchmarks/tune.py.
    ("sm90", 16): _entry(16, 64, 8, 1),  # 7.5, 54.0
    ("sm90", 64): _entry(64, 64, 8, 0),  # 10.7, 54.3
}


@triton.jit
def _combine(
    partial, sums, first, rows_padded, row, live, splits, width: tl.constexpr, block_d: tl.constexpr
):
    """Add the partial results of `splits` splits for rows `row` [R], in order of splits."""
    top = tl.load(sums + (first * rows_padded + row) * 2, mask=live, other=LOWEST)
    for split in range(splits):
        place = (first + split) * rows_padded + row
        top = tl.maximum(top, tl.load(sums + place * 2, mask=live, other=LOWEST))
    total = tl.zeros_like(top)
    out = tl.zeros((row.shape[0], block_d), tl.float32)
    for split in range(splits):
        place = (first + split) * rows_padded + row
        weight = tl.exp2(tl.load(sums + place * 2, mask=live, other=LOWEST) - top)
        total += weight * tl.load(sums + place * 2 + 1, mask=live, other=0.0)
        out += weight[:, None] * load_rows(partial, place, width, live, width, block_d)
    return out / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _turned(a, b, cos, sin, token, stride, live, half: tl.constexpr, block: tl.constexpr):
    """Both halves [R, block] of rows rotated by their tokens' angles, rounded once."""
    c = load_rows(cos, token, stride, live, half, block).to(tl.float32)
    s = load_rows(sin, token, stride, live, half, block).to(tl.float32)
    x, y = a.to(tl.float32), b.to(tl.float32)
    return (x * c - y * s).to(a.dtype), (y * c + x * s).to(a.dtype)


@triton.jit
def _visible(
    key, inside, seen, token, live, mask, length, padding_end, offset, stride_mq, stride_mk,
    masked: tl.constexpr, padded_keys: tl.constexpr,
):  # fmt: skip
    """Which of the keys [N] each row [R] sees -> [R, N]; `offset` keys are numbered before them."""
    visible = inside[None, :] & (key[None, :] < seen[:, None])
    if padded_keys:
        number = key + offset
        visible = visible & ((number < length) | (number >= padding_end))[None, :]
    if masked:
        place = token[:, None] * stride_mq + (key + offset)[None, :] * stride_mk
        allowed = tl.load(mask + place, mask=visible & live[:, None], other=0)
        visible = visible & (allowed != 0)
    return visible


@triton.jit
def _summed(acc, total, top, logits, values, visible):
    """The sums over keys with those of logits [R, N] and values [N, D]: what `_split` carries."""
    logits = tl.where(visible, logits, LOWEST)
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.where(visible, tl.exp2(logits - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
    return acc, total, higher


# Over 60 lines: each operand has its pointer and strides. More functions than these change the
# compiled code: the prefetch in one of its own reorders what is computed before it.
@triton.jit
def _split(
    q, past_k, past_v, new_k, new_v, cos, sin, mask, lengths, out, partial, sums, counter,
    past_keys, new_keys, past_splits, padding_end, rows, rows_padded, group, lead, lead_keys, scale,
    stride_qb, stride_qs, stride_qh, stride_pkb, stride_pks, stride_pkh,
    stride_pvb, stride_pvs, stride_pvh, stride_nkb, stride_nks, stride_nkh,
    stride_nvb, stride_nvs, stride_nvh, stride_mb, stride_mq, stride_mk, stride_tb, stride_ts,
    width: tl.constexpr, kv_heads: tl.constexpr, masked: tl.constexpr, rotating: tl.constexpr,
    padded_keys: tl.constexpr,
    fused: tl.constexpr, dependent: tl.constexpr, prefetch: tl.constexpr, splits: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_h: tl.constexpr, block_d: tl.constexpr,
    blocks: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one split of the keys: running maximum, weight sum, weighted values.

    The operands are those of `decode_attention`; `mask` [B, S, T] is read with `masked`, `lengths`
    [B] with `padded_keys`, cos and sin with `rotating`. partial [pairs, splits, rows_padded, D] and
    sums [.., 2] are float32. With `fused` the last block of a tile writes `out` [B, S, Hq, D].
    """
    half: tl.constexpr = width // 2
    split, row_block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = row_block * block_m + tl.arange(0, block_m)
    live = row < rows
    token = row // group
    head = kv_head * group + row % group
    place = token * stride_qs + head * stride_qh
    if prefetch and (split < past_splits) & (row_block == 0):
        ahead = split * blocks * block_n + tl.arange(0, blocks * block_n)
        ahead = tl.minimum(ahead, past_keys - 1)
        prefetch_rows(past_k + batch * stride_pkb + kv_head * stride_pkh, ahead, stride_pks, 0,
                      width, prefetch)  # fmt: skip
        prefetch_rows(past_v + batch * stride_pvb + kv_head * stride_pvh, ahead, stride_pvs, 0,
                      width, prefetch)  # fmt: skip
    follow(dependent)
    length = 0
    if padded_keys:  # loaded beside queries and keys: only what they yield is compared with it
        length = tl.load(lengths + batch)
    # Heads in halves: the rotary embedding turns one against the other.
    left = load_rows(q + batch * stride_qb, place, 1, live, half, block_h)
    right = load_rows(q + batch * stride_qb + half, place, 1, live, half, block_h)
    if rotating:
        table = batch * stride_tb
        left, right = _turned(left, right, cos + table, sin + table, token, stride_ts, live, half,
                              block_h)  # fmt: skip
    if split < past_splits:
        k = past_k + batch * stride_pkb + kv_head * stride_pkh
        v = past_v + batch * stride_pvb + kv_head * stride_pvh
        stride_k, stride_v = stride_pks, stride_pvs
        begin, end, offset = split * blocks * block_n, past_keys, 0
    else:
        k = new_k + batch * stride_nkb + kv_head * stride_nkh
        v = new_v + batch * stride_nvb + kv_head * stride_nvh
        stride_k, stride_v = stride_nks, stride_nvs
        begin, end, offset = (split - past_splits) * blocks * block_n, new_keys, past_keys
    # Keys are numbered over cache and new ones together, as in the mask.
    seen = tl.where(token < lead, lead_keys, past_keys + new_keys) - offset
    top = tl.full((block_m,), LOWEST, tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    acc = tl.zeros((block_m, block_d), tl.float32)
    for block in range(blocks):
        key = begin + block * block_n + tl.arange(0, block_n)
        inside = key < end
        # Both loads before the first product: one memory latency instead of two.
        keys = load_rows(k, key, stride_k, inside, half, block_h)
        others = load_rows(k + half, key, stride_k, inside, half, block_h)
        values = load_rows(v, key, stride_v, inside, width, block_d)
        if rotating and split >= past_splits:
            table = batch * stride_tb
            keys, others = _turned(keys, others, cos + table, sin + table, key, stride_ts, inside,
                                   half, block_h)  # fmt: skip
        logits = tl.dot(left, tl.trans(keys), input_precision="ieee")
        logits = tl.dot(right, tl.trans(others), logits, input_precision="ieee") * scale
        visible = _visible(
            key, inside, seen, token, live, mask + batch * stride_mb, length, padding_end, offset,
            stride_mq, stride_mk, masked, padded_keys,
        )  # fmt: skip
        acc, total, top = _summed(acc, total, top, logits, values, visible)
    place = (pair * splits + split) * rows_padded + row
    column = tl.arange(0, block_d)
    keep = live[:, None] & (column < width)[None, :]
    tl.store(partial + place[:, None] * width + column[None, :], acc, mask=keep)
    tl.store(sums + place * 2, top, mask=live)
    tl.store(sums + place * 2 + 1, total, mask=live)
    if fused and arrived_last(counter + pair * tl.num_programs(1) + row_block, splits - 1):
        first = pair * splits
        acc = _combine(partial, sums, first, rows_padded, row, live, splits, width, block_d)
        tokens = rows // group
        target = ((batch * tokens + token) * kv_heads * group + head) * width
        result = acc.to(out.dtype.element_ty)
        tl.store(out + target[:, None] + column[None, :], result, mask=keep)


@triton.jit
def _add_splits(
    partial, sums, out, rows, rows_padded, group, splits: tl.constexpr, width: tl.constexpr,
    kv_heads: tl.constexpr, dependent: tl.constexpr, block_s: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """One row of one key head: all splits in one tile."""
    follow(dependent)
    row, pair = tl.program_id(0), tl.program_id(1)
    split, column = tl.arange(0, block_s), tl.arange(0, block_d)
    live = split < splits
    place = (pair * splits + split) * rows_padded + row
    top = tl.load(sums + place * 2, mask=live, other=LOWEST)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(sums + place * 2 + 1, mask=live, other=0.0), 0)
    parts = load_rows(partial, place, width, live, width, block_d)
    result = tl.sum(weight[:, None] * parts, 0) / tl.where(total > 0, total, 1.0)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    token, head = row // group, kv_head * group + row % group
    target = ((batch * (rows // group) + token) * kv_heads * group + head) * width
    tl.store(out + target + column, result.to(out.dtype.element_ty), mask=column < width)


def table_key(q: Tensor, kv_heads: int) -> tuple[str, int]:
    """The key of `TABLE` for queries [1, S, Hq, D]."""
    return arch(q), padded(q.shape[1])


def default_launch(q: Tensor, kv_heads: int) -> Launch:
    """The measured parameters of this architecture, or the default.

    The default: 6 row blocks x 13 splits = 78 blocks at Pi0's shape. On AMD, computed and not
    measured: tiles of 32 keys, 6 x 26 blocks, two or three waves a SIMD instead of one or two.
    """
    few = q.shape[1] * q.shape[2] // kv_heads <= 128
    name = arch(q)
    rule = Launch(block_n=64) if few else Launch(block_m=32, block_n=64, blocks=2)
    if name.startswith("sm") and name != "sm90":  # less of a tile in each thread, which else spills
        rule = dataclasses.replace(rule, num_warps=8)
    if name.startswith("gfx"):
        rule = Launch(block_n=32, blocks=1 if few else 2, matrix_instr_nonkdim=16)
    if can_follow(name):
        rule = dataclasses.replace(rule, dependent=1)
    launch = TABLE.get(table_key(q, kv_heads), rule) if q.shape[0] == 1 else rule
    if q.dtype == torch.float32:  # twice the bytes in a tile, and no matrix instruction
        return dataclasses.replace(launch, block_n=min(launch.block_n, 32), num_stages=1)
    return launch


# A custom operator takes tensors and numbers only, so it has an argument for each.
@operator("triton_decode_attention")
def decode_attention(
    q: Tensor, past_k: Tensor, past_v: Tensor, new_k: Tensor | None, new_v: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, lead: int, lead_keys: int, past_keys: int,
    mask: Tensor | None, scale: float, launch: Sequence[int], padding: Tensor | None = None,
    padding_end: int = 0,
) -> Tensor:  # fmt: skip
    """q [B, S, Hq, D], cached keys [B, P, Hkv, D], new ones [B, T - P, Hkv, D] -> [B, S, Hq, D].

    The first `past_keys` cached keys are used, and all of the new ones. The first `lead` queries
    see `lead_keys` keys, the others all. mask: bool [B, T], or broadcastable to [B, 1, S, T], or
    None. A query that sees no key gets zeros. padding: [B] int32, read on the device: no query sees
    the keys [padding[b], padding_end), which must be finite. These count cached keys first.

    With cos and sin [B or 1, S, D/2], q and the new keys come before their rotary embedding and are
    rotated on the way, rounded as by `triton_rotary`; cached keys are rotated already. `launch`:
    see `launch.encoded`.
    """
    chosen = applied(default_launch(q, past_k.shape[2]), launch)
    batch, tokens, heads, width = q.shape
    kv_heads = past_k.shape[2]
    group = heads // kv_heads
    new_keys = 0 if new_k is None else new_k.shape[1]
    q, k, v = (unit_stride(t) for t in (q, past_k, past_v))
    new_k, new_v = (k, v) if new_k is None or new_v is None else map(unit_stride, (new_k, new_v))
    span = chosen.block_n * chosen.blocks
    past_splits, rows = triton.cdiv(past_keys, span), tokens * group
    splits = past_splits + triton.cdiv(new_keys, span)
    row_blocks = triton.cdiv(rows, chosen.block_m)
    rows_padded, pairs = row_blocks * chosen.block_m, batch * kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    places = pairs * splits * rows_padded
    partial = torch.empty(places * width, dtype=torch.float32, device=q.device)
    sums = torch.empty(places * 2, dtype=torch.float32, device=q.device)
    counter = counters(q.device, pairs * row_blocks) if chosen.fused else sums
    rotating = cos is not None
    cos, sin = (q, q) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    turns = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)) if rotating else (0, 0)
    seen, *mask_strides = mask_arguments(mask, batch, tokens, past_keys + new_keys, q)
    _split[(splits, row_blocks, pairs)](
        q, k, v, new_k, new_v, cos, sin, seen, q if padding is None else padding, out,
        partial, sums, counter, past_keys, new_keys, past_splits, padding_end, rows,
        rows_padded, group, lead, lead_keys, scale * LOG2_E,
        *(s for t in (q, k, v, new_k, new_v) for s in t.stride()[:3]), *mask_strides,
        *turns, width=width, kv_heads=kv_heads, masked=mask is not None,
        rotating=rotating, padded_keys=padding is not None,
        fused=bool(chosen.fused), dependent=chosen.dependent,
        prefetch=_prefetch(k, v, chosen), splits=splits, block_m=chosen.block_m,
        block_n=chosen.block_n, block_h=padded(width // 2), block_d=padded(width),
        blocks=chosen.blocks, **chosen.options(),
    )  # fmt: skip
    if not chosen.fused:
        _add_splits[(rows, pairs)](
            partial, sums, out, rows, rows_padded, group, splits=splits, width=width,
            kv_heads=kv_heads, block_s=triton.next_power_of_2(splits),
            block_d=triton.next_power_of_2(width), dependent=chosen.dependent,
            **dataclasses.replace(chosen, num_warps=4, num_stages=1).options(),
        )  # fmt: skip
    return out


def _prefetch(k: Tensor, v: Tensor, launch: Launch) -> int:
    """Bytes that one instruction prefetches of the cached keys and values; 0 for none."""
    whole = k.shape[-1] * k.element_size() % 128 == 0 and k.shape[-1].bit_count() == 1
    return 128 if launch.dependent and whole and k.shape[1] > 0 else 0


def attention(overrides: Mapping[str, int] | None = None) -> Attention:
    """The kernel behind the signature of `eager_attention`; `overrides` replace table entries."""
    launch = encoded(DECODE, overrides)

    def decode(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        seen = bounds(visibility, k.shape[1])
        return decode_attention(
            q, k, v, None, None, None, None, seen.lead, seen.lead_keys, seen.keys, seen.mask, scale,
            launch, *seen.padded,
        )  # fmt: skip

    return decode


CachedAttention = Callable[
    [Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Rope, Visibility, float], Tensor
]


def cached_attention(overrides: Mapping[str, int] | None = None) -> CachedAttention:
    """The same without concatenation, and with the rotary embedding of q and of the new keys.

    Arguments: q, cached k and v, new k and v, rope, visibility, scale.
    """
    launch = encoded(DECODE, overrides)

    def decode(
        q: Tensor,
        past: tuple[Tensor, Tensor],
        new: tuple[Tensor, Tensor],
        rope: Rope,
        visibility: Visibility,
        scale: float,
    ) -> Tensor:
        kept, keys = past[0].shape[1], past[0].shape[1] + new[0].shape[1]
        seen = bounds(visibility, keys)
        if seen.keys != keys:
            raise ValueError(f"the last queries must see all {keys} keys, not {seen.keys}")
        return decode_attention(
            q, *past, *new, *rope, seen.lead, seen.lead_keys, kept, seen.mask, scale, launch,
            *seen.padded,
        )  # fmt: skip

    return decode
