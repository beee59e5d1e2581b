# mypy: disable-error-code="no-untyped-def"
"""Linear layers of at most 64 rows: weights streamed once, at the memory's rate.

In a denoising step a layer of 5 to 16 MB of weights meets 11 rows. cuBLAS reads them at a third of
the memory's rate on an H100 (11x1024->2560: 5.8 us against 1.7). What it takes to do better: every
processor streams (split over K where N is small), several tiles are in flight (`num_stages`), and
what surrounds the product is done in the same launch: a factor for each feature, bias, residual,
GELU(gate) * up of a fused projection, and its part of RMSNorm.

RMSNorm is shared by two products. `skinny_linear_onward` makes the residual stream x and has its
final values at hand: it also writes the sum of squares of its columns, and x * (1 + gain) where the
next norm has a gain. `skinny_linear` adds those sums, in a fixed order, and scales its rows.

The factor is the gate of pi05's branches. A shift of pi05's norms is
a bias here: norm(x) W^T + shift W^T, the second of which is a constant of the step.

With a split, each block writes a partial result and the last block of a column (`fused`), or a
second kernel, adds them in the order of the splits: the result does not depend on timing.
Reference: `skinny_linear_reference`.

Letters: M rows, N output features, K input features, P parts of a sum of squares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.launch import LINEAR, Launch, applied, encoded
from openpi_opt.kernels.operators import operator
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

Kind = Literal["plain", "normed", "gated"]
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
# without norm, and `normed` need the whole sum over K in one block).
TABLE: dict[tuple[str, int, int, int, Kind], Launch] = {
    # H100, by benchmarks/tune.py: the chain of one denoising step's 18 layers.
    ("sm90", 16, 2560, 1024, "normed"): _entry(32, 256, 1, 2, 4, 512),
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
    parts: int
    """P of the sums that are read"""
    parts_padded: int


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
def _operand(pointer, place, keep, absent: tl.constexpr):
    """What is at `place`, as float32; `absent` without a pointer.

    Loaded before the product, so that its end does not wait for memory once more.
    """
    value = absent
    if pointer is not None:
        value = tl.load(pointer + place, mask=keep, other=0.0).to(tl.float32)
    return value


@triton.jit
def _finish(acc, gain, gains, out, scaled, squares, part, row, column, m, n: tl.constexpr):
    """Round the result [M, N] once and store it.

    For the next norm also store the sum of squares of these columns, as `part` of `squares`
    [P, M], and the result times 1 + gain [N]; None leaves either out.
    """
    keep = (row < m)[:, None] & (column < n)[None, :]
    place = row[:, None] * n + column[None, :]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=keep)
    if squares is not None:
        wide = tl.where(keep, rounded.to(tl.float32), 0.0)
        tl.store(squares + part * m + row, tl.sum(wide * wide, 1), mask=row < m)
        if gain is not None:
            wide = (wide * (1.0 + gains)).to(out.dtype.element_ty)
            tl.store(scaled + place, wide, mask=keep)


# 70 lines: every operand may be absent, and what is loaded before the product is used after it.
@triton.jit
def _linear(
    x, weight, squares, bias, residual, factor, gain, out, scaled, squares_out, partial, counter,
    m, eps, stride_x, stride_weight, stride_residual, shape: tl.constexpr, launch: tl.constexpr,
):  # fmt: skip
    """One tile [M, block_n] of the result, or of one split of it.

    x [M, K] and weight [N or 2N, K] with rows at any stride; squares [P, M], factor [N], bias
    [N] (gated: [2N]), residual [M, N], out [M, N]; `_finish` says what gain, scaled and squares_out
    are. None leaves an operand out; without `eps` nothing is normed, with `partial`
    [split_k, rows, N] float32 the result goes there, and with `counter` the last block of a column
    adds the splits.
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
    live, inside = (row < m)[:, None], (column < n)[None, :]
    keep = live & inside
    factors = _operand(factor, column[None, :], inside, 1.0)
    biases = _operand(bias, column[None, :], inside, 0.0)
    gains = _operand(gain, column[None, :], inside, 0.0)
    place = row[:, None] * stride_residual + column[None, :]
    added = _operand(residual, place, keep, 0.0)
    if shape.gated:
        ups = _operand(None if bias is None else bias + n, column[None, :], inside, 0.0)
    if eps is not None:
        part = tl.arange(0, shape.parts_padded)
        there = (part < shape.parts)[:, None] & (row < m)[None, :]
        sums = tl.load(squares + part[:, None] * m + row[None, :], mask=there, other=0.0)
    acc = tl.zeros((rows, block_n), tl.float32)
    up = tl.zeros((rows, block_n), tl.float32)
    for offset in range(0, shape.span, launch.block_k):
        begin = split * shape.span + offset
        w = _weights(weight, column, begin, stride_weight, shape, launch)
        inner = begin + tl.arange(0, launch.block_k)
        known = live if shape.even else live & (inner < shape.k)[None, :]
        a = tl.load(x + row[:, None] * stride_x + inner[None, :], mask=known, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if shape.gated:
            w = _weights(second, column, begin, stride_weight, shape, launch)
            up = tl.dot(a, tl.trans(w), up, input_precision="ieee")
    if eps is not None:
        scale = tl.rsqrt(tl.sum(sums, 0) / shape.k + eps)[:, None]
        acc = acc * scale
        up = up * scale
    place = row[:, None] * n + column[None, :]
    if shape.gated:
        acc = gelu_tanh(acc + biases) * (up + ups)
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=keep)
    elif partial is None:
        acc = acc * factors + biases + added
        _finish(acc, gain, gains, out, scaled, squares_out, column_block, row, column, m, n)
    else:
        tl.store(partial + split * rows * n + place, acc, mask=keep)
        if counter is not None:  # noqa: SIM102 (Triton has no `and` that stops early)
            if arrived_last(counter + column_block, launch.split_k - 1):
                acc = tl.zeros((rows, block_n), tl.float32)
                for other in range(launch.split_k):
                    acc += tl.load(partial + other * rows * n + place, mask=keep, other=0.0)
                acc = acc * factors + biases + added
                _finish(acc, gain, gains, out, scaled, squares_out, column_block, row, column, m, n)


@triton.jit
def _add_splits(
    partial, bias, residual, factor, gain, out, scaled, squares, m, stride_residual,
    shape: tl.constexpr, launch: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`block` columns of one row: the sum over splits of `_linear`, and what its end adds."""
    splits: tl.constexpr = launch.split_k
    follow(launch.dependent)
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * block + tl.arange(0, block)
    keep = (column < shape.n)[None, :]
    factors = _operand(factor, column[None, :], keep, 1.0)
    biases = _operand(bias, column[None, :], keep, 0.0)
    gains = _operand(gain, column[None, :], keep, 0.0)
    added = _operand(residual, row[:, None] * stride_residual + column[None, :], keep, 0.0)
    acc = tl.zeros((1, block), tl.float32)
    for split in tl.static_range(splits):
        place = (split * shape.rows + row)[:, None] * shape.n + column[None, :]
        acc += tl.load(partial + place, mask=keep, other=0.0)
    acc = acc * factors + biases + added
    part = tl.program_id(1)
    _finish(acc, gain, gains, out, scaled, squares, part, row, column, m, shape.n)


def table_key(x: Tensor, n: int, k: int, kind: Kind) -> tuple[str, int, int, int, Kind]:
    """The key of `TABLE` for rows x [M, K]."""
    return arch(x), padded(as_rows(x).shape[0]), n, k, kind


def default_launch(x: Tensor, n: int, k: int, kind: Kind) -> Launch:
    """The measured parameters of this shape and architecture, or a choice by rule.

    The rule: tiles of 32 features, and as many splits as give 128 processors a block while a block
    keeps at least 256 input features. On AMD see `_for_units`.
    """
    name, found = arch(x), TABLE.get(table_key(x, n, k, kind))
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
    bias: Tensor | None = None
    residual: Tensor | None = None
    squares: Tensor | None = None
    eps: float | None = None
    factor: Tensor | None = None
    gated: bool = False

    @property
    def features(self) -> int:
        """N: features of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)

    def launch(self, overrides: Sequence[int] | None) -> Launch:
        """Table or rule with `overrides`; no split where a block needs the whole sum over K."""
        rows, inner = self.x.shape
        if rows > MAX_ROWS:
            raise ValueError(f"{rows} rows: this kernel is for at most {MAX_ROWS}")
        kind: Kind = "gated" if self.gated else "plain" if self.eps is None else "normed"
        chosen = applied(default_launch(self.x, self.features, inner, kind), overrides)
        return chosen if kind == "plain" else dataclasses.replace(chosen, split_k=1)

    def shape(self, launch: Launch) -> _Shape:
        """What is compiled in under `launch`."""
        (m, k), n = self.x.shape, self.features
        span = triton.cdiv(triton.cdiv(k, launch.split_k), launch.block_k) * launch.block_k
        even = n % launch.block_n == 0 and k == span * launch.split_k
        parts = 1 if self.squares is None else self.squares.shape[0]
        return _Shape(n, k, span, even, self.gated, padded(m), parts, triton.next_power_of_2(parts))

    def prefetchable(self, launch: Launch) -> bool:
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


_ADDED_COLUMNS = 256


def _parts(n: int, launch: Launch) -> int:
    """P: blocks of columns that `_finish` is called for."""
    second_kernel = launch.split_k > 1 and not launch.fused
    return int(triton.cdiv(n, _ADDED_COLUMNS if second_kernel else launch.block_n))


class Onward(NamedTuple):
    """What the next norm's product needs of a residual stream."""

    gain: Tensor | None
    """[N]"""
    scaled: Tensor | None
    """[M, N]"""
    squares: Tensor
    """[P, M] float32"""


def _run(p: _Product, launch: Launch, onward: Onward | None = None) -> Tensor:
    """-> [M, N]; one launch, or two where a second kernel adds the splits."""
    if launch.prefetch and not p.prefetchable(launch):
        launch = dataclasses.replace(launch, prefetch=0)
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
    gain, scaled, squares = onward or (None, None, None)
    _linear[(launch.split_k, columns)](
        p.x, weight, p.squares, p.bias, p.residual, p.factor, gain, out, scaled, squares, partial,
        counter, m, p.eps, p.x.stride(0), weight.stride(0), stride_residual, shape=shape,
        launch=launch, **launch.options(),
    )  # fmt: skip
    if partial is not None and counter is None:
        sum_launch = dataclasses.replace(launch, num_warps=1, num_stages=1)
        _add_splits[(m, triton.cdiv(shape.n, _ADDED_COLUMNS))](
            partial, p.bias, p.residual, p.factor, gain, out, scaled, squares, m, stride_residual,
            shape=shape, launch=sum_launch, block=_ADDED_COLUMNS, **sum_launch.options(),
        )  # fmt: skip
    return out


@operator(
    "triton_skinny_linear",
    lambda x, weight, _bias=None, _squares=None, _eps=None, gated=False, _launch=None: x.new_empty(
        *x.shape[:-1], weight.shape[0] // (2 if gated else 1)
    ),
)
def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float | None = None,
    gated: bool = False,
    launch: Sequence[int] | None = None,
) -> Tensor:
    """norm(x) [..., K] @ weight [N, K]^T + bias [N] -> [..., N].

    With `eps`, rows are scaled as in RMSNorm, by the sums of squares `squares` [P, M]: of x, or of
    what x was before its gain. `gated`: weight and bias have 2N rows, of which the first N are gate
    and the others up, and the result is gelu_tanh(gate) * up. Sums are float32 up to the one
    rounding at the end. `launch`: see `launch.encoded`.
    """
    if (eps is None) != (squares is None):
        raise ValueError("a norm needs both squares and eps")
    product = _Product(as_rows(x), weight, bias, None, squares, eps, None, gated)
    return _run(product, product.launch(launch)).view(*x.shape[:-1], product.features)


def _onward(
    x: Tensor, weight: Tensor, residual: Tensor, factor: Tensor | None, gain: Tensor | None,
    launch: Sequence[int] | None,
) -> tuple[_Product, Launch, Onward]:  # fmt: skip
    product = _Product(as_rows(x), weight, residual=as_rows(residual), factor=factor)
    chosen, n = product.launch(launch), weight.shape[0]
    squares = x.new_empty(_parts(n, chosen), product.x.shape[0], dtype=torch.float32)
    return (
        product,
        chosen,
        Onward(gain, None if gain is None else torch.empty_like(residual), squares),
    )


def _onward_shapes(
    x: Tensor, weight: Tensor, residual: Tensor, factor: Tensor | None = None,
    gain: Tensor | None = None, launch: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, _, onward = _onward(x, weight, residual, factor, gain, launch)
    scaled = x.new_empty(0) if onward.scaled is None else onward.scaled
    return residual.new_empty(residual.shape), scaled, onward.squares


@operator("triton_skinny_linear_onward", _onward_shapes)
def skinny_linear_onward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
    launch: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = x [..., K] @ weight [N, K]^T * factor [N] + residual [..., N], and for the norm after it.

    -> y [..., N], y * (1 + gain [N]) (empty without a gain), and the sums of squares of y [P, M].
    """
    product, chosen, onward = _onward(x, weight, residual, factor, gain, launch)
    out = _run(product, chosen, onward).view(residual.shape)
    return out, x.new_empty(0) if onward.scaled is None else onward.scaled, onward.squares


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
    squares: Tensor | None = None,
    eps: float | None = None,
    gated: bool = False,
) -> Tensor:
    """`skinny_linear` in plain PyTorch."""
    if squares is not None and eps is not None:
        mean = squares.to(x.dtype).sum(0) / x.shape[-1]
        x = x * torch.rsqrt(mean + eps).view(*x.shape[:-1], 1)
    out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return ops.gelu_mul(*out.chunk(2, dim=-1)) if gated else out


def skinny_linear_onward_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    factor: Tensor | None = None,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`skinny_linear_onward` in plain PyTorch, with one part of the sums of squares."""
    out = F.linear(x, weight)
    out = (out if factor is None else out * factor) + residual
    squares = out.float().square().sum(-1).view(1, -1)
    return out, x.new_empty(0) if gain is None else out * (1.0 + gain), squares
