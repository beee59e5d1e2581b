# mypy: disable-error-code="no-untyped-def"
"""Linear layers of at most 64 rows: weights streamed once, at the memory's rate.

In a denoising step a layer of 5 to 16 MB of weights meets 11 rows. cuBLAS reads them at a third of
the memory's rate on an H100 (11x1024->2560: 5.8 us against 1.7). What it takes to do better: every
processor streams (split over K where N is small), several tiles are in flight (`num_stages`), and
what follows is done in the same launch: bias, residual, GELU(gate) * up of a fused projection, and
RMSNorm before it (the row's scale factor is applied to the result, so one pass over x is enough).

With a split, each block writes a partial result and the last block of a column (`fused`), or a
second kernel, adds them in the order of the splits: the result does not depend on timing.
References: `skinny_linear_reference`, `skinny_gelu_mul_reference`.

Letters: M rows, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.triton_common import (
    amd_options,
    applied,
    arch,
    arrived_last,
    as_rows,
    can_follow,
    counters,
    dependent_options,
    elementwise_warps,
    encoded,
    follow,
    gelu_tanh,
    padded,
    prefetch_rows,
    unit_stride,
)
from openpi_opt.pi0 import ops

MAX_ROWS = 64

Kind = Literal["plain", "normed", "gated"]
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Launch(NamedTuple):
    """Launch parameters; `fused` adds the splits in the same kernel.

    `dependent` (see `triton_common.follow`) starts the kernel beside its predecessor, where it asks
    for its weights in L2, `prefetch` bytes an instruction, before it waits.
    """

    block_n: int
    block_k: int
    split_k: int
    num_warps: int = 4
    num_stages: int = 4
    fused: int = 1
    dependent: int = 0
    prefetch: int = 0
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0


# By architecture, rows padded to 16, 32 or 64, N, K, and what else the kernel does: `gated` (with
# or without norm) and `normed` need the whole sum over K in one block.
TABLE: dict[tuple[str, int, int, int, Kind], Launch] = {
    # H100, by benchmarks/expert.py: the chain of one denoising step's 18 layers.
    ("sm90", 16, 2560, 1024, "normed"): Launch(32, 512, 1, 2, 4, 1, 1, 512),
    ("sm90", 16, 1024, 2048, "plain"): Launch(32, 128, 2, 4, 4, 1, 1, 512),
    ("sm90", 16, 4096, 1024, "gated"): Launch(32, 256, 1, 2, 4, 1, 1, 512),
    ("sm90", 16, 1024, 4096, "plain"): Launch(32, 256, 4, 2, 3, 1, 1, 512),
    # By benchmarks/kernels.py, single kernels; us of this one and of cuBLAS.
    ("sm90", 16, 2560, 1024, "plain"): Launch(32, 256, 1, 2, 4, 1, 1),  # 4.7, 5.1
    ("sm90", 16, 2048, 1024, "plain"): Launch(32, 256, 1, 2, 4, 1, 1),  # 4.6, 4.9
    ("sm90", 16, 256, 1024, "plain"): Launch(16, 256, 4, 4, 3, 1, 1),  # 3.3, 4.3
    ("sm90", 16, 4096, 1024, "plain"): Launch(32, 512, 1, 4, 3, 1, 1),  # 5.7, 5.7
    ("sm90", 64, 2560, 1024, "plain"): Launch(32, 256, 1, 4, 3, 1, 1),  # 5.5, 5.1
    ("sm90", 64, 4096, 1024, "gated"): Launch(32, 64, 1, 4, 5, 1, 1),  # 9.4, 8.4 (its product)
}


@triton.jit
def _weights(weight, column, begin, stride, n, k: tl.constexpr, block_k: tl.constexpr,
             even: tl.constexpr):  # fmt: skip
    """Rows `column` of the weight, columns from `begin` on -> [block_n, block_k]."""
    inner = begin + tl.arange(0, block_k)
    pointers = weight + column[:, None] * stride + inner[None, :]
    if even:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=(column < n)[:, None] & (inner < k)[None, :], other=0.0)


@triton.jit
def _finish(acc, bias, residual, out, row, column, m, n, stride_residual,
            has_bias: tl.constexpr, has_residual: tl.constexpr):  # fmt: skip
    """Add bias [N] and residual [M, N] to the float32 result, round once, store."""
    keep = (row < m)[:, None] & (column < n)[None, :]
    if has_bias:
        acc += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if has_residual:
        place = row[:, None] * stride_residual + column[None, :]
        acc += tl.load(residual + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], acc.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _linear(
    x, weight, bias, residual, gain, out, partial, counter, m, eps,
    stride_x, stride_weight, stride_residual,
    n: tl.constexpr, k: tl.constexpr, span: tl.constexpr, even: tl.constexpr,
    gated: tl.constexpr, normed: tl.constexpr, has_gain: tl.constexpr, has_bias: tl.constexpr,
    has_residual: tl.constexpr, split_k: tl.constexpr, direct: tl.constexpr,
    fused: tl.constexpr, dependent: tl.constexpr, prefetch: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    split, column_block = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, block_m)
    column = column_block * block_n + tl.arange(0, block_n)
    if prefetch:
        prefetch_rows(weight, column, stride_weight, split * span, span, prefetch)
        if gated:
            second = weight + n * stride_weight
            prefetch_rows(second, column, stride_weight, split * span, span, prefetch)
    follow(dependent)
    live = (row < m)[:, None]
    acc = tl.zeros((block_m, block_n), tl.float32)
    up = tl.zeros((block_m, block_n), tl.float32)
    squares = tl.zeros((block_m, block_m), tl.float32)
    for offset in range(0, span, block_k):
        begin = split * span + offset
        w = _weights(weight, column, begin, stride_weight, n, k, block_k, even)
        inner = begin + tl.arange(0, block_k)
        keep = live if even else live & (inner < k)[None, :]
        a = tl.load(x + row[:, None] * stride_x + inner[None, :], mask=keep, other=0.0)
        if normed:
            squares = tl.dot(a, tl.trans(a), squares, input_precision="ieee")
            if has_gain:
                factor = tl.load(gain + inner, mask=inner < k, other=0.0).to(tl.float32)
                a = (a.to(tl.float32) * (1.0 + factor)[None, :]).to(a.dtype)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
        if gated:
            w = _weights(
                weight + n * stride_weight, column, begin, stride_weight, n, k, block_k, even
            )
            up = tl.dot(a, tl.trans(w), up, input_precision="ieee")
    if normed:
        # The diagonal of x x^T: summing squares in registers took 2.8 us more on an H100, since
        # x then had to leave shared memory by another way than for the product.
        own = tl.where(row[:, None] == row[None, :], squares, 0.0)
        scale = tl.rsqrt(tl.sum(own, 1) / k + eps)[:, None]
        acc = acc * scale
        up = up * scale
    if gated:
        acc = gelu_tanh(acc) * up
    if direct:
        _finish(acc, bias, residual, out, row, column, m, n, stride_residual, has_bias,
                has_residual)  # fmt: skip
    else:
        place = row[:, None] * n + column[None, :]
        keep = live & (column < n)[None, :]
        tl.store(partial + split * block_m * n + place, acc, mask=keep)
        if fused and arrived_last(counter + column_block, split_k - 1):
            acc = tl.zeros((block_m, block_n), tl.float32)
            for other in range(split_k):
                acc += tl.load(partial + other * block_m * n + place, mask=keep, other=0.0)
            _finish(acc, bias, residual, out, row, column, m, n, stride_residual, has_bias,
                    has_residual)  # fmt: skip


@triton.jit
def _add_splits(
    partial, bias, residual, gain, out, normed_out, m, eps, stride_residual,
    n: tl.constexpr, split_k: tl.constexpr, has_bias: tl.constexpr, has_residual: tl.constexpr,
    normed: tl.constexpr, has_gain: tl.constexpr, dependent: tl.constexpr,
    block_m: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row of the sum over splits, with bias and residual; with `normed` also its RMSNorm."""
    follow(dependent)
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    keep = column < n
    acc = tl.zeros((block,), tl.float32)
    for split in tl.static_range(split_k):
        acc += tl.load(partial + (split * block_m + row) * n + column, mask=keep, other=0.0)
    if has_bias:
        acc += tl.load(bias + column, mask=keep, other=0.0).to(tl.float32)
    if has_residual:
        place = row * stride_residual + column
        acc += tl.load(residual + place, mask=keep, other=0.0).to(tl.float32)
    total = acc.to(out.dtype.element_ty)
    tl.store(out + row * n + column, total, mask=keep)
    if normed:
        wide = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
        result = wide * scale
        if has_gain:
            result *= 1.0 + tl.load(gain + column, mask=keep, other=0.0).to(tl.float32)
        result = result.to(out.dtype.element_ty)
        tl.store(normed_out + row * n + column, result, mask=keep)


def default_launch(x: Tensor, n: int, k: int, kind: Kind) -> Launch:
    """The measured parameters of this shape and architecture, or a choice by rule.

    The rule: tiles of 32 features, and as many splits as give every processor a block (132 on an
    H100, 304 on an MI300X) while a block keeps at least 256 input features.
    """
    name, rows = arch(x), padded(as_rows(x).shape[0])
    found = TABLE.get((name, rows, n, k, kind))
    if found is not None and x.element_size() == 2:  # the table is that of 16-bit types
        return found
    beside = {"dependent": 1, "prefetch": 512} if can_follow(name) else {}
    return _by_rule(x, n, k, kind, name)._replace(**beside)


def _by_rule(x: Tensor, n: int, k: int, kind: Kind, name: str) -> Launch:
    amd = name.startswith("gfx")
    block_k = min(64 if x.dtype == torch.float32 else 128, padded(k))
    split_k, columns = 1, triton.cdiv(n, 32)
    while kind == "plain" and split_k * columns < 128 and k // (2 * split_k) >= 2 * block_k:
        split_k *= 2
    if amd:  # blocks of one column run on different dies: add the splits in a second kernel
        return Launch(32, block_k, split_k, 4, 2, fused=0, matrix_instr_nonkdim=16)
    return Launch(32, block_k, split_k, 4, 3 if kind == "gated" or x.dtype == torch.float32 else 4)


class _Product(NamedTuple):
    """The tensors of one call; x as rows [M, K], residual as rows [M, N].

    With `eps` x is normed first, by `gain` [K] or by a gain of 1.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    gain: Tensor | None = None
    eps: float | None = None
    gated: bool = False

    @property
    def features(self) -> int:
        """N: features of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)

    @property
    def kind(self) -> Kind:
        """Key of the table."""
        if self.gated:
            return "gated"
        return "plain" if self.eps is None else "normed"

    def launch(self, overrides: Sequence[int]) -> Launch:
        """Table or rule with `overrides`; no split where a block needs the whole sum over K."""
        rows, inner = self.x.shape
        if rows > MAX_ROWS:
            raise ValueError(f"{rows} rows: this kernel is for at most {MAX_ROWS}")
        chosen = applied(default_launch(self.x, self.features, inner, self.kind), overrides)
        return chosen if self.kind == "plain" else chosen._replace(split_k=1)

    def partial(self, launch: Launch) -> Tensor:
        """An empty workspace for the splits: [split, padded M, N] float32."""
        size = launch.split_k * padded(self.x.shape[0]) * self.features
        return torch.empty(size, dtype=torch.float32, device=self.x.device)


def _multiply(p: _Product, launch: Launch, out: Tensor, partial: Tensor | None) -> None:
    """x @ weight^T into `out`, or into `partial` if the splits are added later or by `fused`."""
    (m, k), n = p.x.shape, p.features
    columns = triton.cdiv(n, launch.block_n)
    span = triton.cdiv(triton.cdiv(k, launch.split_k), launch.block_k) * launch.block_k
    fused = partial is not None and bool(launch.fused)
    weight = unit_stride(p.weight)
    bias, residual, gain = (out if t is None else t for t in (p.bias, p.residual, p.gain))
    even = n % launch.block_n == 0 and k == span * launch.split_k
    prefetch = launch.prefetch if _prefetchable(weight, span, even, launch) else 0
    _linear[(launch.split_k, columns)](
        p.x, weight, bias, residual, gain, out, out if partial is None else partial,
        counters(out.device, columns) if fused else out, m, p.eps or 0.0,
        p.x.stride(0),
        weight.stride(0), residual.stride(0), n=n, k=k, span=span,
        even=even, gated=p.gated,
        normed=p.eps is not None, has_gain=p.gain is not None, has_bias=p.bias is not None,
        has_residual=p.residual is not None, split_k=launch.split_k, direct=partial is None,
        fused=fused, dependent=launch.dependent, prefetch=prefetch, block_m=padded(m),
        block_n=launch.block_n, block_k=launch.block_k, num_warps=launch.num_warps,
        num_stages=launch.num_stages, **dependent_options(launch.dependent),
        **amd_options(launch.waves_per_eu, launch.matrix_instr_nonkdim),
    )  # fmt: skip


def _prefetchable(weight: Tensor, span: int, even: bool, launch: Launch) -> bool:
    """Whether a block's part of the weight is whole pieces of `prefetch` bytes, a power of two."""
    size = weight.element_size()
    return (
        bool(launch.dependent and launch.prefetch)
        and even
        and span * size % launch.prefetch == 0
        and (span * size // launch.prefetch).bit_count() == 1
        and weight.stride(0) * size % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def _sum(
    p: _Product, launch: Launch, partial: Tensor, out: Tensor, normed: Tensor | None,
    gain: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Add the splits; with `normed`, one block has a whole row and normalises it."""
    m, n = p.x.shape[0], p.features
    block = 256 if normed is None else triton.next_power_of_2(n)
    bias, residual = (out if t is None else t for t in (p.bias, p.residual))
    _add_splits[(m, triton.cdiv(n, block))](
        partial, bias, residual, out if gain is None else gain, out,
        out if normed is None else normed, m, eps, residual.stride(0), n=n,
        split_k=launch.split_k, has_bias=p.bias is not None,
        has_residual=p.residual is not None, normed=normed is not None,
        has_gain=gain is not None, dependent=launch.dependent, block_m=padded(m), block=block,
        num_warps=elementwise_warps(block), **dependent_options(launch.dependent),
    )  # fmt: skip


def _run(p: _Product, shape: torch.Size, overrides: Sequence[int]) -> Tensor:
    launch = p.launch(overrides)
    out = p.x.new_empty(p.x.shape[0], p.features)
    partial = p.partial(launch) if launch.split_k > 1 else None
    _multiply(p, launch, out, partial)
    if partial is not None and not launch.fused:
        _sum(p, launch, partial, out, None, None, 0.0)
    return out.view(*shape[:-1], p.features)


@torch.library.custom_op("openpi_opt::triton_skinny_linear", mutates_args=())
def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None,
    eps: float | None, launch: Sequence[int],
) -> Tensor:  # fmt: skip
    """norm(x) [..., K] @ weight [N, K]^T + bias [N] + residual [..., N] -> [..., N].

    With `eps`, norm is Gemma's RMSNorm by `gain` [K] (None: a gain of 1); without, x is taken as
    it is. Sums are float32 up to the one rounding at the end. `launch`: see
    `triton_common.encoded`.
    """
    added = None if residual is None else as_rows(residual)
    product = _Product(as_rows(x), weight, bias, added, gain, eps)
    return _run(product, x.shape, launch)


@torch.library.custom_op("openpi_opt::triton_skinny_gelu_mul", mutates_args=())
def skinny_gelu_mul(
    x: Tensor, gate_up: Tensor, gain: Tensor | None, eps: float | None, launch: Sequence[int],
) -> Tensor:  # fmt: skip
    """gelu_tanh(gate) * up -> [..., N], where [gate | up] = norm(x) @ gate_up [2 N, K]^T."""
    product = _Product(as_rows(x), gate_up, gain=gain, eps=eps, gated=True)
    return _run(product, x.shape, launch)


@torch.library.custom_op("openpi_opt::triton_skinny_linear_add_rms_norm", mutates_args=())
def skinny_linear_add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    eps: float,
    launch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """x [..., K] @ weight [N, K]^T + residual [..., N] -> the sum and its RMSNorm by `gain` [N].

    Two launches, the second of which adds the splits, the residual and the norm.
    """
    product = _Product(as_rows(x), weight, residual=as_rows(residual))
    chosen = product.launch(launch)._replace(fused=0)
    partial = product.partial(chosen)
    total = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty_like(total)
    _multiply(product, chosen, total, partial)
    _sum(product, chosen, partial, total, normed, gain, eps)
    return total, normed


@skinny_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None,
    eps: float | None, launch: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@skinny_gelu_mul.register_fake
def _(
    x: Tensor, gate_up: Tensor, gain: Tensor | None, eps: float | None, launch: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], gate_up.shape[0] // 2)


@skinny_linear_add_rms_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    eps: float,
    launch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return x.new_empty(residual.shape), x.new_empty(residual.shape)


def linear(max_rows: int, overrides: Mapping[str, int] | None = None) -> Linear:
    """`Ops.linear` with this kernel for at most `max_rows` rows and torch's for more."""
    launch = encoded(Launch, overrides)

    def skinny(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() // x.shape[-1] > max_rows:
            return F.linear(x, weight, bias)
        return skinny_linear(x, weight, bias, None, None, None, launch)

    return skinny


def skinny_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    gain: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`skinny_linear` in plain PyTorch."""
    normed = x if eps is None else ops.rms_norm(x, gain, eps)
    out = F.linear(normed, weight, bias)
    return out if residual is None else out + residual


def skinny_gelu_mul_reference(
    x: Tensor, gate_up: Tensor, gain: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`skinny_gelu_mul` in plain PyTorch."""
    return ops.gelu_mul(*skinny_linear_reference(x, gate_up, gain=gain, eps=eps).chunk(2, dim=-1))
