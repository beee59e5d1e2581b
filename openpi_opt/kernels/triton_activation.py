# mypy: disable-error-code="no-untyped-def"
"""GELU (tanh), and the gated product GELU(gate) * up.

Gate and up may be two tensors or the two halves of one fused projection: the kernel takes a row
stride for each, so a half is read where it is. The activation is not rounded before the product
(eager code rounds it): float32 throughout, one rounding at the end.
References: `openpi_opt.pi0.ops.gelu` and `gelu_mul`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.operators import operator
from openpi_opt.kernels.triton_common import arch, as_rows, gelu_tanh

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _activate(
    gate, up, out, stride_gate, stride_up, width, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    keep = columns < width
    value = tl.load(gate + row * stride_gate + columns, mask=keep, other=0.0).to(tl.float32)
    value = gelu_tanh(value)
    if up is not None:
        factor = tl.load(up + row * stride_up + columns, mask=keep, other=0.0)
        value = value * factor.to(tl.float32)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=keep)


def _launch(gate: Tensor, up: Tensor | None) -> Tensor:
    rows = as_rows(gate)
    factor = None if up is None else as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    # 16 bytes a lane: 64 lanes a wave on AMD.
    block = 2 * _BLOCK if arch(gate).startswith("gfx") else _BLOCK
    grid = (len(rows), triton.cdiv(width, block))
    _activate[grid](
        rows, factor, out, rows.stride(0), 0 if factor is None else factor.stride(0), width,
        block=block, num_warps=_WARPS,
    )  # fmt: skip
    return out


@operator("triton_gelu")
def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, elementwise."""
    return _launch(x, None)


@operator("triton_gelu_mul")
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up; both [..., W], rows at any stride."""
    return _launch(gate, up)
