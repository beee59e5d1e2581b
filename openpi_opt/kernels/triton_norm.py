# mypy: disable-error-code="no-untyped-def"
"""RMSNorm and LayerNorm.

One block normalises one row, which it reads once: Pi0's rows have 1024, 1152 or 2048 elements.
References: `openpi_opt.pi0.ops.rms_norm`, `adaptive_rms_norm` and `layer_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.operators import operator
from openpi_opt.kernels.triton_common import as_rows, elementwise_warps


@triton.jit
def _norm(
    x, weight, bias, out, stride_x, eps,
    width: tl.constexpr, block: tl.constexpr, center: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    keep = columns < width
    value = tl.load(x + row * stride_x + columns, mask=keep, other=0.0).to(tl.float32)
    if center:
        value = tl.where(keep, value - tl.sum(value, 0) / width, 0.0)
    result = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    if weight is not None:
        gain = tl.load(weight + columns, mask=keep, other=0.0).to(tl.float32)
        result = result * gain if center else result * (1.0 + gain)
    if bias is not None:
        result += tl.load(bias + columns, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=keep)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool
) -> Tensor:
    rows = as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gain, shift = (None if t is None else t.contiguous() for t in (weight, bias))
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(rows.shape[0],)](
        rows, gain, shift, out, rows.stride(0), eps, width=width, block=block, center=center,
        num_warps=elementwise_warps(block),
    )  # fmt: skip
    return out


@operator("triton_rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma's RMSNorm, gain 1 + weight [W], or 1 without; x [..., W] -> [..., W] of x's dtype."""
    return _launch(x, weight, None, eps, center=False)


@operator("triton_adaptive_rms_norm")
def adaptive_rms_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """RMSNorm, gain 1 + scale [W], plus shift [W]; x [..., W] -> [..., W] of x's dtype."""
    return _launch(x, scale, shift, eps, center=False)


@operator("triton_layer_norm")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis; x [..., W], weight and bias [W] or None -> [..., W]."""
    return _launch(x, weight, bias, eps, center=True)
