# mypy: disable-error-code="no-untyped-def"
"""Attention of few queries over many cached keys: split over keys, exact Pi0 masks, one call.

In a denoising step 11 queries of 8 heads see 799 keys of one head. A flash kernel that walks the
keys has 6 blocks for 132 processors and takes 11 us; cuDNN's takes 25 us, twice, because the state
token must not see the actions. Here the keys are split over blocks as well (flash decoding): one
kernel writes partial sums (running maximum m, weight sum l, weighted values), a second one adds
them in a fixed order.

The keys of the call itself, which are few, belong to the second kernel. What it needs of them is
older than the first kernel, so it attends to them before it waits for that one's sums; and the
first needs no branch for keys that must be rotated. With `held` it loads its cached keys and values
before it waits for the product that makes the queries.

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
    can_follow,
    follow,
    load_rows,
    padded,
    prefetch_rows,
    unit_stride,
)
from openpi_opt.kernels.triton_visibility import bounds, mask_arguments
from openpi_opt.pi0.gemma import Rope
from openpi_opt.pi0.ops import Attention, Visibility

# By architecture and tokens of a call of one element, padded to 16, 32 or 64.
TABLE: dict[tuple[str, int], Launch] = {
    # H100, us of this kernel and of torch's SDPA in the two calls that the state token needs; the
    # warps by benchmarks/tune.py.
    ("sm90", 16): Launch(block_m=16, block_n=64, num_warps=8, dependent=1),  # 7.5, 54.0
    ("sm90", 64): Launch(block_m=64, block_n=64, num_warps=8),  # 10.7, 54.3
}

# How the second kernel follows, by how the first one does.
_DEPENDENT_SUM = (0, 1, 2, 1)


@triton.jit
def _rows(base, index, stride, live, width: tl.constexpr, block: tl.constexpr):
    """As `load_rows`, not from L1: what is read before the wait may lie there as it was before."""
    columns = tl.arange(0, block)
    keep = live[:, None]
    if width != block:
        keep = keep & (columns < width)[None, :]
    place = index[:, None] * stride + columns[None, :]
    return tl.load(base + place, mask=keep, other=0.0, cache_modifier=".cg")


@triton.jit
def _halves(base, place, token, stride, live, cos, sin, stride_t, rotating: tl.constexpr,
            width: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Both halves [R, block] of rows, rotated by their tokens' angles and rounded once."""
    half: tl.constexpr = width // 2
    a = _rows(base, place, stride, live, half, block)
    b = _rows(base + half, place, stride, live, half, block)
    if rotating:
        c = load_rows(cos, token, stride_t, live, half, block).to(tl.float32)
        s = load_rows(sin, token, stride_t, live, half, block).to(tl.float32)
        x, y = a.to(tl.float32), b.to(tl.float32)
        a, b = (x * c - y * s).to(a.dtype), (y * c + x * s).to(b.dtype)
    return a, b


@triton.jit
def _visible(key, inside, token, live, seen, mask, stride_mq, stride_mk, length, padding_end,
             masked: tl.constexpr, padded_keys: tl.constexpr):  # fmt: skip
    """Which keys [N] these rows [R] see; keys are numbered over cached and new ones."""
    visible = inside[None, :] & (key[None, :] < seen[:, None])
    if padded_keys:
        visible = visible & ((key < length) | (key >= padding_end))[None, :]
    if masked:
        place = token[:, None] * stride_mq + key[None, :] * stride_mk
        visible = visible & (tl.load(mask + place, mask=visible & live[:, None], other=0) != 0)
    return visible


@triton.jit
def _added(top, total, acc, left, right, keys, others, values, visible, scale):
    """A tile of keys added to maximum [R], sum of weights [R] and weighted values [R, D]."""
    logits = tl.dot(left, tl.trans(keys), input_precision="ieee")
    logits = tl.dot(right, tl.trans(others), logits, input_precision="ieee") * scale
    logits = tl.where(visible, logits, LOWEST)
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.where(visible, tl.exp2(logits - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def _split(
    q, k, v, cos, sin, mask, lengths, partial, sums, keys, padding_end, rows, rows_padded, group,
    lead, lead_keys, scale, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_mb, stride_mq, stride_mk, stride_tb, stride_ts,
    width: tl.constexpr, kv_heads: tl.constexpr, masked: tl.constexpr, rotating: tl.constexpr,
    padded_keys: tl.constexpr, splits: tl.constexpr, prefetch: tl.constexpr, block_h: tl.constexpr,
    block_d: tl.constexpr, launch: tl.constexpr,
):  # fmt: skip
    """Partial result of `block_m` rows over the keys of a split: rows are (token, head) pairs."""
    half: tl.constexpr = width // 2
    block_m: tl.constexpr = launch.block_m
    block_n: tl.constexpr = launch.block_n
    split, pair = tl.program_id(0), tl.program_id(2)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = tl.program_id(1) * block_m + tl.arange(0, block_m)
    live = row < rows
    token = row // group
    place = token * stride_qs + (kv_head * group + row % group) * stride_qh
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    begin = split * launch.blocks * block_n
    key = begin + tl.arange(0, block_n)
    if launch.held:
        first = load_rows(k, key, stride_ks, key < keys, half, block_h)
        second = load_rows(k + half, key, stride_ks, key < keys, half, block_h)
        values = load_rows(v, key, stride_vs, key < keys, width, block_d)
    elif prefetch and (tl.program_id(1) == 0):
        ahead = tl.minimum(begin + tl.arange(0, launch.blocks * block_n), keys - 1)
        prefetch_rows(k, ahead, stride_ks, 0, width, prefetch)
        prefetch_rows(v, ahead, stride_vs, 0, width, prefetch)
    follow(launch.dependent)
    length = 0
    if padded_keys:
        length = tl.load(lengths + batch)
    table = batch * stride_tb
    left, right = _halves(q + batch * stride_qb, place, token, 1, live, cos + table, sin + table,
                          stride_ts, rotating, width, block_h)  # fmt: skip
    seen = tl.where(token < lead, lead_keys, keys)
    top = tl.full((block_m,), LOWEST, tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    acc = tl.zeros((block_m, block_d), tl.float32)
    for block in range(launch.blocks):
        key = begin + block * block_n + tl.arange(0, block_n)
        inside = key < keys
        if not launch.held:  # all loads before the first product: one memory latency
            first = load_rows(k, key, stride_ks, inside, half, block_h)
            second = load_rows(k + half, key, stride_ks, inside, half, block_h)
            values = load_rows(v, key, stride_vs, inside, width, block_d)
        visible = _visible(key, inside, token, live, seen, mask + batch * stride_mb, stride_mq,
                           stride_mk, length, padding_end, masked, padded_keys)  # fmt: skip
        top, total, acc = _added(top, total, acc, left, right, first, second, values, visible,
                                 scale)  # fmt: skip
    place = (pair * splits + split) * rows_padded + row
    column = tl.arange(0, block_d)
    keep = live[:, None] & (column < width)[None, :]
    tl.store(partial + place[:, None] * width + column[None, :], acc, mask=keep)
    tl.store(sums + place * 2, top, mask=live)
    tl.store(sums + place * 2 + 1, total, mask=live)


@triton.jit
def _gather(
    q, k, v, cos, sin, mask, lengths, partial, sums, out, past_keys, keys, padding_end, rows,
    rows_padded, group, lead, lead_keys, scale, stride_qb, stride_qs, stride_qh, stride_kb,
    stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, stride_mb, stride_mq, stride_mk,
    stride_tb, stride_ts, width: tl.constexpr, kv_heads: tl.constexpr, masked: tl.constexpr,
    rotating: tl.constexpr, padded_keys: tl.constexpr, splits: tl.constexpr, tiles: tl.constexpr,
    early: tl.constexpr, dependent: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr,
    block_s: tl.constexpr, block_h: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """`block_m` rows: the splits' results added in one tile, to that of `tiles` tiles of new keys.

    With `early` the new keys come before the wait: q, k and v are older than the kernel before.
    """
    pair = tl.program_id(1)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = tl.program_id(0) * block_m + tl.arange(0, block_m)
    live = row < rows
    token, head = row // group, kv_head * group + row % group
    top = tl.full((block_m,), LOWEST, tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    acc = tl.zeros((block_m, block_d), tl.float32)
    if not early:
        follow(dependent)
    if tiles > 0:
        length = 0
        if padded_keys:
            length = tl.load(lengths + batch)
        table = batch * stride_tb
        left, right = _halves(q + batch * stride_qb, token * stride_qs + head * stride_qh, token, 1,
                              live, cos + table, sin + table, stride_ts, rotating, width,
                              block_h)  # fmt: skip
        seen = tl.where(token < lead, lead_keys, past_keys + keys)
        for tile in tl.static_range(tiles):
            key = tile * block_n + tl.arange(0, block_n)
            inside = key < keys
            base = k + batch * stride_kb + kv_head * stride_kh
            first, second = _halves(base, key, key, stride_ks, inside, cos + table, sin + table,
                                    stride_ts, rotating, width, block_h)  # fmt: skip
            values = _rows(v + batch * stride_vb + kv_head * stride_vh, key, stride_vs, inside,
                           width, block_d)  # fmt: skip
            visible = _visible(past_keys + key, inside, token, live, seen, mask + batch * stride_mb,
                               stride_mq, stride_mk, length, padding_end, masked,
                               padded_keys)  # fmt: skip
            top, total, acc = _added(top, total, acc, left, right, first, second, values, visible,
                                     scale)  # fmt: skip
    if early:
        follow(dependent)
    column = tl.arange(0, block_d)
    keep = live[:, None] & (column < width)[None, :]
    if splits > 0:
        split = tl.arange(0, block_s)
        place = (pair * splits + split)[:, None] * rows_padded + row[None, :]
        there = (split < splits)[:, None] & live[None, :]
        tops = tl.load(sums + place * 2, mask=there, other=LOWEST)
        totals = tl.load(sums + place * 2 + 1, mask=there, other=0.0)
        parts = tl.load(partial + place[:, :, None] * width + column[None, None, :],
                        mask=there[:, :, None] & (column < width)[None, None, :],
                        other=0.0)  # fmt: skip
        higher = tl.maximum(top, tl.max(tops, 0))
        weight, shrink = tl.exp2(tops - higher[None, :]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight * totals, 0)
        acc = acc * shrink[:, None] + tl.sum(weight[:, :, None] * parts, 0)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    target = ((batch * (rows // group) + token) * kv_heads * group + head) * width
    tl.store(out + target[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=keep)


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
    launch = TABLE.get((name, padded(q.shape[1])), rule) if q.shape[0] == 1 else rule
    if q.dtype == torch.float32:  # twice the bytes in a tile, and no matrix instruction
        return dataclasses.replace(launch, block_n=min(launch.block_n, 32), num_stages=1)
    return launch


def _run(
    q: Tensor, past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor] | None, lead: int,
    lead_keys: int, past_keys: int, mask: Tensor | None, scale: float, launch: Launch,
    padding: tuple[Tensor | None, int], rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Both public operators; `past_keys` keys of `past` are used, and all of `new`.

    With `rope` queries and new keys are rotated on the way, by cosines and sines [B or 1, S, D/2].
    """
    batch, tokens, heads, width = q.shape
    kv_heads = past[0].shape[2]
    group = heads // kv_heads
    q, k, v = (unit_stride(t) for t in (q, *past))
    new_k, new_v = (k, v) if new is None else (unit_stride(t) for t in new)
    new_keys = 0 if new is None else new_k.shape[1]
    if launch.blocks > 1 or new is None:
        launch = dataclasses.replace(launch, held=0)
    splits, rows = triton.cdiv(past_keys, launch.block_n * launch.blocks), tokens * group
    row_blocks = triton.cdiv(rows, launch.block_m)
    rows_padded, pairs = row_blocks * launch.block_m, batch * kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    places = pairs * splits * rows_padded
    partial = torch.empty(places * width, dtype=torch.float32, device=q.device)
    sums = torch.empty(places * 2, dtype=torch.float32, device=q.device)
    cos, sin = (q, q) if rope is None else (t.contiguous() for t in rope)
    turns = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)) if rope else (0, 0)
    seen, *mask_strides = mask_arguments(mask, batch, tokens, past_keys + new_keys, q)
    lengths = q if padding[0] is None else padding[0]
    known = {
        "width": width, "kv_heads": kv_heads, "masked": mask is not None,
        "rotating": rope is not None, "padded_keys": padding[0] is not None, "splits": splits,
        "block_h": padded(width // 2), "block_d": padded(width),
    }  # fmt: skip

    def strides(*tensors: Tensor) -> list[int]:
        return [*(s for t in tensors for s in t.stride()[:3]), *mask_strides, *turns]

    if splits:
        _split[(splits, row_blocks, pairs)](
            q, k, v, cos, sin, seen, lengths, partial, sums, past_keys, padding[1], rows,
            rows_padded, group, lead, lead_keys, scale * LOG2_E, *strides(q, k, v), **known,
            prefetch=_prefetch(k, v, launch), launch=launch, **launch.options(),
        )  # fmt: skip
    last = dataclasses.replace(
        launch, num_warps=4 if torch.version.hip else 8, num_stages=1,
        dependent=_DEPENDENT_SUM[launch.dependent],
    )  # fmt: skip
    # The new keys are read again by every block of rows: more rows a block where they are many.
    block_m = 1 if new_keys <= 16 else 4
    block_n = min(32, padded(new_keys))
    _gather[(triton.cdiv(rows, block_m), pairs)](
        q, new_k, new_v, cos, sin, seen, lengths, partial, sums, out, past_keys, new_keys,
        padding[1], rows, rows_padded, group, lead, lead_keys, scale * LOG2_E,
        *strides(q, new_k, new_v), **known, tiles=triton.cdiv(new_keys, block_n),
        early=splits > 0 and launch.dependent != 2, dependent=last.dependent, block_m=block_m,
        block_n=block_n, block_s=triton.next_power_of_2(max(splits, 1)), **last.options(),
    )  # fmt: skip
    return out


def _prefetch(k: Tensor, v: Tensor, launch: Launch) -> int:
    """Bytes that one instruction prefetches of the cached keys and values; 0 for none."""
    whole = k.shape[-1] * k.element_size() % 128 == 0 and k.shape[-1].bit_count() == 1
    return 128 if launch.dependent in (1, 2) and whole and k.shape[1] > 0 else 0


@operator("triton_decode_attention")
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lead: int, lead_keys: int, keys: int, mask: Tensor | None,
    scale: float, launch: Sequence[int], padding: Tensor | None = None, padding_end: int = 0,
) -> Tensor:  # fmt: skip
    """q [B, S, Hq, D], k and v [B, T, Hkv, D] -> [B, S, Hq, D].

    The first `lead` queries see `lead_keys` keys, the others `keys`. mask: bool [B, T], or
    broadcastable to [B, 1, S, T], or None. A query that sees no key gets
    zeros. padding: [B] int32, read on the device: no query sees the keys [padding[b],
    padding_end), which must be finite. `launch`: see `launch.encoded`.
    """
    chosen = applied(default_launch(q, k.shape[2]), launch)
    full = mask if mask is None or keys == k.shape[1] else mask[..., :keys]
    padded_keys = (padding, padding_end)
    return _run(q, (k, v), None, lead, lead_keys, keys, full, scale, chosen, padded_keys)


@operator("triton_decode_attention_rotary")
def decode_attention_rotary(
    q: Tensor, past_k: Tensor, past_v: Tensor, new_k: Tensor, new_v: Tensor, cos: Tensor,
    sin: Tensor, lead: int, lead_keys: int, mask: Tensor | None, scale: float,
    launch: Sequence[int], padding: Tensor | None = None, padding_end: int = 0,
) -> Tensor:  # fmt: skip
    """As `decode_attention`, with cached keys [B, P, Hkv, D] and new ones [B, T - P, Hkv, D] apart.

    q and the new keys come before their rotary embedding (cos and sin [B or 1, S, D/2]) and are
    rotated on the way, rounded as by `triton_rotary`; cached keys are rotated already. `lead_keys`,
    padding and mask count cached keys first, then new ones. With `held` the cached ones are read
    before the wait: they must be older than the kernel before this one, which makes q.
    """
    chosen = applied(default_launch(q, past_k.shape[2]), launch)
    past, new = (past_k, past_v), (new_k, new_v)
    keys = past_k.shape[1]
    padded_keys = (padding, padding_end)
    rope = (cos, sin)
    return _run(q, past, new, lead, lead_keys, keys, mask, scale, chosen, padded_keys, rope)


def attention(overrides: Mapping[str, int] | None = None) -> Attention:
    """The kernel behind the signature of `eager_attention`; `overrides` replace table entries."""
    launch = encoded(DECODE, overrides)

    def decode(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        seen = bounds(visibility, k.shape[1])
        return decode_attention(
            q, k, v, seen.lead, seen.lead_keys, seen.keys, seen.mask, scale, launch, *seen.padded
        )

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
        keys = past[0].shape[1] + new[0].shape[1]
        seen = bounds(visibility, keys)
        if seen.keys != keys:
            raise ValueError(f"the last queries must see all {keys} keys, not {seen.keys}")
        return decode_attention_rotary(
            q,
            *past,
            *new,
            *rope,
            seen.lead,
            seen.lead_keys,
            seen.mask,
            scale,
            launch,
            *seen.padded,
        )

    return decode
