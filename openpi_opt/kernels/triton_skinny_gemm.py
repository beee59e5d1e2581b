# mypy: disable-error-code="no-untyped-def"
"""Linear layers of at most 64 rows: weights streamed once, at the memory's rate.

In a denoising step a layer of 5 to 16 MB of weights meets 11 rows. cuBLAS reads them at a third of
the memory's rate on an H100 (11x1024->2560: 5.8 us against 1.7). What it takes to do better: every
processor streams (split over K where N is small), several tiles are in flight (`num_stages`), and
what follows is done in the same launch: a factor for each feature, bias, residual, GELU(gate) * up
of a fused projection, and RMSNorm before it (the row's scale is applied to the result, so one pass
over x is enough).

The factor is the gate of pi05's branches. A shift of pi05's norms is
a bias here: norm(x) W^T + shift W^T, the second of which is a constant of the step.

With a split, each block writes a partial result and the last block of a column (`fused`), or a
second kernel, adds them in the order of the splits: the result does not depend on timing.
Reference: `skinny_linear_reference`.

Letters: M rows, N output features, K input features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.launch import LINEAR, Launch, applied, encoded
from openpi_opt.kernels.triton_common import (
    arch,
    arrived_last,
    as_rows,
    can_follow,
    counters,
    follow,
    gelu_tanh,
    padded,
    prefetch_rows,
    unit_stride,
    units,
)
from openpi_opt.pi0 import ops

MAX_ROWS = 64

Kind = Literal["plain", "normed", "gated", "normed, gain", "gated, gain"]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _entry(
    block_n: int, block_k: int, split_k: int, num_warps: int, num_stages: int, prefetch: int = 0
) -> Launch:
    """An entry of the table: one kernel adds the splits, and it starts beside its predecessor."""
    return Launch(
        block_n=block_n, block_k=block_k, split_k=split_k, num_warps=num_warps,
        num_stages=num_stages, fused=1, dependent=1, prefetch=prefetch,
    )  # fmt: skip


# By architecture, rows padded to 16, 32 or 64, N, K, what else the kernel does (`gated`, with or
# without norm, and `normed` need the whole sum over K in one block; a gain of the norm has its own
# entry).
TABLE: dict[tuple[str, int, int, int, Kind], Launch] = {
    # H100, by benchmarks/expert.py: the chain of one denoising step's 18 layers.
    ("sm90", 16, 2560, 1024, "normed"): _entry(32, 512, 1, 2, 4, 512),
    ("sm90", 16, 1024, 2048, "plain"): _entry(32, 128, 2, 4, 4, 512),
    ("sm90", 16, 4096, 1024, "gated"): _entry(32, 256, 1, 2, 4, 512),
    ("sm90", 16, 1024, 4096, "plain"): _entry(32, 256, 4, 2, 3, 512),
    # By single kernels; us of this one and of cuBLAS.
    ("sm90", 16, 2560, 1024, "plain"): _entry(32, 256, 1, 2, 4),  # 4.7, 5.1
    ("sm90", 16, 2048, 1024, "plain"): _entry(32, 256, 1, 2, 4),  # 4.6, 4.9
    ("sm90", 16, 256, 1024, "plain"): _entry(16, 256, 4, 4, 3),  # 3.3, 4.3
    ("sm90", 16, 4096, 1024, "plain"): _entry(32, 512, 1, 4, 3),  # 5.7, 5.7
    ("sm90", 64, 2560, 1024, "normed"): Launch(
        block_n=32, block_k=128, num_warps=4, num_stages=4, fused=1
    ),
    ("sm90", 64, 2560, 1024, "plain"): _entry(32, 256, 1, 4, 3),  # 5.5, 5.1
    ("sm90", 64, 4096, 1024, "gated"): _entry(32, 64, 1, 4, 5),  # 9.4, 8.4 (its product)
}


@dataclass(frozen=True)
class _Shape:
    """What is compiled in: the sizes, the part of K that a block sums, and whether tiles fit."""

    n: int
    k: int
    span: int
    even: bool
    gated: bool
    rows: int
    """M padded to 16, 32 or 64"""


@triton.jit
def _weights(weight, column, begin, stride, shape: tl.constexpr, launch: tl.constexpr):
    """Rows `column` of the weight, columns from `begin` on -> [block_n, block_k]."""
    inner = begin + tl.arange(0, launch.block_k)
    pointers = weight + column[:, None] * stride + inner[None, :]
    if shape.even:
        return tl.load(pointers, eviction_policy="evict_first")
    inside = (column < shape.n)[:, None] & (inner < shape.k)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _scaled(acc, factor, bias, column, n: tl.constexpr):
    """acc * factor + bias, by feature; either may be None."""
    if factor is not None:
        acc *= tl.load(factor + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _finish(acc, factor, bias, residual, out, row, column, m, stride_residual, n: tl.constexpr):
    """Apply factor and bias [N], add the residual [M, N], all in float32, round once, store."""
    keep = (row < m)[:, None] & (column < n)[None, :]
    acc = _scaled(acc, factor, bias, column, n)
    if residual is not None:
        place = row[:, None] * stride_residual + column[None, :]
        acc += tl.load(residual + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _linear(
    x, weight, bias, residual, gain, factor, out, partial, counter, m, eps,
    stride_x, stride_weight, stride_residual, shape: tl.constexpr, launch: tl.constexpr,
):  # fmt: skip
    """One tile [M, block_n] of the result, or of one split of it.

    x [M, K] and weight [N or 2N, K] with rows at any stride; factor and bias [N] (gated: [2N]),
    residual [M, N], gain [K], out [M, N]. None leaves an operand out; without `eps` nothing is
    normed, with `partial` [split_k, rows, N] float32 the result goes there, and with `counter` the
    last block of a column adds the splits.
    """
    n: tl.constexpr = shape.n
    rows: tl.constexpr = shape.rows
    block_n: tl.constexpr = launch.block_n
    split, column_block = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, rows)
    column = column_block * block_n + tl.arange(0, block_n)
    second = weight + n * stride_weight
    if launch.prefetch:
        prefetch_rows(weight, column, stride_weight, split * shape.span, shape.span,
                      launch.prefetch)  # fmt: skip
        if shape.gated:
            prefetch_rows(second, column, stride_weight, split * shape.span, shape.span,
                          launch.prefetch)  # fmt: skip
    follow(launch.dependent)
    live = (row < m)[:, None]
    acc = tl.zeros((rows, block_n), tl.float32)
    up = tl.zeros((rows, block_n), tl.float32)
    squares = tl.zeros((rows, rows), tl.float32)
    for offset in range(0, shape.span, launch.block_k):
        begin = split * shape.span + offset
        w = _weights(weight, column, begin, stride_weight, shape, launch)
        inner = begin + tl.arange(0, launch.block_k)
        keep = live if shape.even else live & (inner < shape.k)[None, :]
        a = tl.load(x + row[:, None] * stride_x + inner[None, :], mask=keep, other=0.0)
        if eps is not None:
            squares = tl.dot(a, tl.trans(a), squares, input_precision="ieee")
            if gain is not None:
                g = tl.load(gain + inner, mask=inner < shape.k, other=0.0).to(tl.float32)
                a = (a.to(tl.float32) * (1.0 + g)[None, :]).to(a.dtype)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if shape.gated:
            w = _weights(second, column, begin, stride_weight, shape, launch)
            up = tl.dot(a, tl.trans(w), up, input_precision="ieee")
    if eps is not None:
        # The diagonal of x x^T: summing squares in registers took 2.8 us more on an H100, since
        # x then had to leave shared memory by another way than for the product.
        own = tl.where(row[:, None] == row[None, :], squares, 0.0)
        scale = tl.rsqrt(tl.sum(own, 1) / shape.k + eps)[:, None]
        acc = acc * scale
        up = up * scale
    if shape.gated:
        other = None if factor is None else factor + n
        shift = None if bias is None else bias + n
        acc = gelu_tanh(_scaled(acc, factor, bias, column, n)) * _scaled(
            up, other, shift, column, n
        )
        keep = live & (column < n)[None, :]
        place = row[:, None] * n + column[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=keep)
    elif partial is None:
        _finish(acc, factor, bias, residual, out, row, column, m, stride_residual, n)
    else:
        place = row[:, None] * n + column[None, :]
        keep = live & (column < n)[None, :]
        tl.store(partial + split * rows * n + place, acc, mask=keep)
        if counter is not None:  # noqa: SIM102 (Triton has no `and` that stops early)
            if arrived_last(counter + column_block, launch.split_k - 1):
                acc = tl.zeros((rows, block_n), tl.float32)
                for other in range(launch.split_k):
                    acc += tl.load(partial + other * rows * n + place, mask=keep, other=0.0)
                _finish(acc, factor, bias, residual, out, row, column, m, stride_residual, n)


@triton.jit
def _add_splits(
    partial, bias, residual, factor, out, m, stride_residual, shape: tl.constexpr,
    launch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`block` columns of one row: the sum over splits of `_linear`, and what its end adds."""
    splits: tl.constexpr = launch.split_k
    follow(launch.dependent)
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * block + tl.arange(0, block)
    keep = (column < shape.n)[None, :]
    acc = tl.zeros((1, block), tl.float32)
    for split in tl.static_range(splits):
        place = (split * shape.rows + row)[:, None] * shape.n + column[None, :]
        acc += tl.load(partial + place, mask=keep, other=0.0)
    _finish(acc, factor, bias, residual, out, row, column, m, stride_residual, shape.n)


def default_launch(x: Tensor, n: int, k: int, kind: Kind) -> Launch:
    """The measured parameters of this shape and architecture, or a choice by rule.

    The rule: tiles of 32 features, and as many splits as give 128 processors a block while a block
    keeps at least 256 input features. On AMD see `_for_units`.
    """
    name, rows = arch(x), padded(as_rows(x).shape[0])
    found = TABLE.get((name, rows, n, k, kind))
    if found is not None and x.element_size() == 2:  # the table is that of 16-bit types
        return found
    launch = _by_rule(x, n, k, kind, name)
    return dataclasses.replace(launch, dependent=1, prefetch=512) if can_follow(name) else launch


def _by_rule(x: Tensor, n: int, k: int, kind: Kind, name: str) -> Launch:
    wide = x.dtype == torch.float32
    block_k = min(64 if wide else 128, padded(k))
    if name.startswith("gfx"):
        return _for_units(units(x), padded(as_rows(x).shape[0]), n, k, kind, block_k)
    split_k, columns = 1, triton.cdiv(n, 32)
    while kind == "plain" and split_k * columns < 128 and k // (2 * split_k) >= 2 * block_k:
        split_k *= 2
    stages = 3 if kind.startswith("gated") or wide else 4
    return Launch(
        block_n=32, block_k=block_k, split_k=split_k, num_warps=4, num_stages=stages, fused=1
    )


def _for_units(count: int, rows: int, n: int, k: int, kind: Kind, block_k: int) -> Launch:
    """Launch on AMD, computed from the number of compute units and not measured.

    16 rows: tiles of 16 features by 256, which leave three to seven waves a SIMD and no spills;
    more rows: 32 by 128. As many splits as fill the compute units better, a block keeping two
    tiles. At Pi0's products that is 160 or 256 blocks for 304 units (MI300X) and 256 (MI350).
    """
    block_n, block_k = (16, min(2 * block_k, padded(k))) if rows == 16 else (32, block_k)
    columns = triton.cdiv(n, block_n)

    def busy(blocks: int) -> float:
        return blocks / (count * triton.cdiv(blocks, count))

    split_k = other = 1
    while kind == "plain" and k // (2 * other) >= 2 * block_k:
        other *= 2
        if busy(other * columns) > 1.05 * busy(split_k * columns):
            split_k = other
    # Blocks of one column run on different dies: a second kernel adds the splits.
    return Launch(
        block_n=block_n, block_k=block_k, split_k=split_k, num_warps=4, num_stages=2,
        matrix_instr_nonkdim=16,
    )  # fmt: skip


@dataclass(frozen=True)
class _Product:
    """The operands of one call, x as rows [M, K] and residual as rows [M, N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    gain: Tensor | None
    eps: float | None
    factor: Tensor | None
    gated: bool

    @property
    def features(self) -> int:
        """N: features of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)

    @property
    def kind(self) -> Kind:
        """Key of the table."""
        if self.eps is None and not self.gated:
            return "plain"
        if self.gain is None:
            return "gated" if self.gated else "normed"
        return "gated, gain" if self.gated else "normed, gain"

    def launch(self, overrides: Sequence[int] | None) -> Launch:
        """Table or rule with `overrides`; no split where a block needs the whole sum over K."""
        rows, inner = self.x.shape
        if rows > MAX_ROWS:
            raise ValueError(f"{rows} rows: this kernel is for at most {MAX_ROWS}")
        table = default_launch(self.x, self.features, inner, self.kind)
        chosen = applied(table, overrides)
        if self.kind != "plain":
            chosen = dataclasses.replace(chosen, split_k=1)
        if chosen.prefetch and not self._prefetchable(chosen):
            chosen = dataclasses.replace(chosen, prefetch=0)
        return chosen

    def shape(self, launch: Launch) -> _Shape:
        """What is compiled in under `launch`."""
        (m, k), n = self.x.shape, self.features
        span = triton.cdiv(triton.cdiv(k, launch.split_k), launch.block_k) * launch.block_k
        even = n % launch.block_n == 0 and k == span * launch.split_k
        return _Shape(n, k, span, even, self.gated, padded(m))

    def _prefetchable(self, launch: Launch) -> bool:
        """Whether a block's part of the weight is whole pieces of `prefetch` bytes, 2^n of them."""
        weight, shape = self.weight, self.shape(launch)
        size = weight.element_size()
        return (
            bool(launch.dependent)
            and shape.even
            and shape.span * size % launch.prefetch == 0
            and (shape.span * size // launch.prefetch).bit_count() == 1
            and weight.stride(0) * size % 16 == 0
            and weight.data_ptr() % 16 == 0
        )


def _run(p: _Product, overrides: Sequence[int] | None) -> Tensor:
    """-> [M, N]; one launch, or two where a second kernel adds the splits."""
    launch = p.launch(overrides)
    shape, m = p.shape(launch), p.x.shape[0]
    columns = triton.cdiv(shape.n, launch.block_n)
    out = p.x.new_empty(m, shape.n)
    partial = counter = None
    if launch.split_k > 1:
        places = launch.split_k * shape.rows * shape.n
        partial = torch.empty(places, dtype=torch.float32, device=out.device)
        counter = counters(out.device, columns) if launch.fused else None
    weight = unit_stride(p.weight)
    stride_residual = 0 if p.residual is None else p.residual.stride(0)
    _linear[(launch.split_k, columns)](
        p.x, weight, p.bias, p.residual, p.gain, p.factor, out, partial, counter, m, p.eps,
        p.x.stride(0), weight.stride(0), stride_residual, shape=shape, launch=launch,
        **launch.options(),
    )  # fmt: skip
    if partial is not None and counter is None:
        sum_launch = dataclasses.replace(launch, num_warps=1, num_stages=1)
        _add_splits[(m, triton.cdiv(shape.n, 256))](
            partial, p.bias, p.residual, p.factor, out, m, stride_residual, shape=shape,
            launch=sum_launch, block=256, **sum_launch.options(),
        )  # fmt: skip
    return out


@torch.library.custom_op("openpi_opt::triton_skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float | None = None,
    factor: Tensor | None = None,
    gated: bool = False,
    launch: Sequence[int] | None = None,
) -> Tensor:
    """norm(x) [..., K] @ weight [N, K]^T * factor [N] + bias [N] + residual [..., N] -> [..., N].

    With `eps`, norm is Gemma's RMSNorm by `gain` [K] (None: a gain of 1); without, x is taken as
    it is. `gated`: weight, factor and bias have 2N rows, of which the first N are gate and the
    others up, and the result is gelu_tanh(gate) * up; there is no residual then. Sums
    are float32 up to the one rounding at the end. `launch`: see `launch.encoded`.
    """
    if gated and residual is not None:
        raise ValueError("a gated product adds no residual")
    added = None if residual is None else as_rows(residual)
    product = _Product(as_rows(x), weight, bias, added, gain, eps, factor, gated)
    return _run(product, launch).view(*x.shape[:-1], product.features)


@skinny_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float | None = None,
    factor: Tensor | None = None,
    gated: bool = False,
    launch: Sequence[int] | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // (2 if gated else 1))


def linear(max_rows: int, overrides: Mapping[str, int] | None = None) -> Linear:
    """`Ops.linear` with this kernel for at most `max_rows` rows and torch's for more."""
    launch = encoded(LINEAR, overrides)

    def skinny(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() // x.shape[-1] > max_rows:
            return F.linear(x, weight, bias)
        out: Tensor = skinny_linear(x, weight, bias, launch=launch)
        return out

    return skinny


def skinny_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float | None = None,
    factor: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """`skinny_linear` in plain PyTorch, and its form for more rows: products by torch's BLAS."""
    normed = x if eps is None else ops.rms_norm(x, gain, eps)
    if factor is None:
        shift = None if bias is None else bias.to(x.dtype)
        out = F.linear(normed, weight.to(x.dtype), shift)
    else:
        out = (F.linear(normed, weight.to(x.dtype)) * factor).to(x.dtype)
        out = out if bias is None else (out + bias).to(x.dtype)
    if gated:
        out = ops.gelu_mul(*out.chunk(2, dim=-1))
    return out if residual is None else out + residual
