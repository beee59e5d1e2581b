# mypy: disable-error-code="no-untyped-def"
"""RMSNorm and LayerNorm, alone or with the residual sum that comes before them.

One block normalises one row, which it reads once: Pi0's rows have 1024, 1152 or 2048 elements.
References: `openpi_opt.pi0.ops.rms_norm`, `adaptive_rms_norm` and `layer_norm`, and
`add_rms_norm_reference` here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.triton_common import as_rows, elementwise_warps
from openpi_opt.pi0 import ops


@triton.jit
def _norm(
    x, residual, weight, bias, total, out, stride_x, stride_residual, eps,
    width: tl.constexpr, block: tl.constexpr, add: tl.constexpr, center: tl.constexpr,
    has_weight: tl.constexpr, has_bias: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    keep = columns < width
    value = tl.load(x + row * stride_x + columns, mask=keep, other=0.0).to(tl.float32)
    if add:
        addend = tl.load(residual + row * stride_residual + columns, mask=keep, other=0.0)
        # Rounded before the norm, as the residual stream that later layers read is.
        rounded = (value + addend.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=keep)
        value = rounded.to(tl.float32)
    if center:
        value = tl.where(keep, value - tl.sum(value, 0) / width, 0.0)
    result = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    if has_weight:
        gain = tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32)
        result = result * gain if center else result * (1.0 + gain)
    if has_bias:
        result += tl.load(bias + columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=keep)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """-> the sum (x itself without a residual) and the normed sum."""
    rows = as_rows(x)
    added = rows if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    gain, shift = (x if t is None else t.contiguous() for t in (weight, bias))
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(rows.shape[0],)](
        rows, added, gain, shift, total, out, rows.stride(0), added.stride(0), eps, width=width,
        block=block, add=residual is not None, center=center, has_weight=weight is not None,
        has_bias=bias is not None, num_warps=elementwise_warps(block),
    )  # fmt: skip
    return total, out


@torch.library.custom_op("openpi_opt::triton_rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma's RMSNorm, gain 1 + weight [W], or 1 without; x [..., W] -> [..., W] of x's dtype."""
    return _launch(x, None, weight, None, eps, center=False)[1]


@torch.library.custom_op("openpi_opt::triton_adaptive_rms_norm", mutates_args=())
def adaptive_rms_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """RMSNorm, gain 1 + scale [W], plus shift [W]; x [..., W] -> [..., W] of x's dtype."""
    return _launch(x, None, scale, shift, eps, center=False)[1]


@torch.library.custom_op("openpi_opt::triton_layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis; x [..., W], weight and bias [W] or None -> [..., W]."""
    return _launch(x, None, weight, bias, eps, center=True)[1]


@torch.library.custom_op("openpi_opt::triton_add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x and residual [..., W] -> their sum, rounded to x's dtype, and its RMSNorm."""
    return _launch(x, residual, weight, None, eps, center=False)


@torch.library.custom_op("openpi_opt::triton_add_layer_norm", mutates_args=())
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x and residual [..., W] -> their sum, rounded to x's dtype, and its LayerNorm."""
    return _launch(x, residual, weight, bias, eps, center=True)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@adaptive_rms_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain PyTorch."""
    total = x + residual
    return total, ops.rms_norm(total, weight, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain PyTorch."""
    total = x + residual
    return total, ops.layer_norm(total, weight, bias, eps)
