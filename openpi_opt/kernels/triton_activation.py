# mypy: disable-error-code="no-untyped-def"
"""GELU (tanh), and the gated products GELU(gate) * up and SiLU(gate) * up.

Gate and up may be two tensors or the two halves of one fused projection: the kernel takes a row
stride for each, so a half is read where it is. The activation is not rounded before the product
(eager code rounds it): float32 throughout, one rounding at the end.
References: `openpi_opt.pi0.ops.gelu` and `gelu_mul`, `silu_mul_reference` here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.triton_common import arch, as_rows, gelu_tanh

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _activate(
    gate, up, out, stride_gate, stride_up, width,
    silu: tl.constexpr, product: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    keep = columns < width
    value = tl.load(gate + row * stride_gate + columns, mask=keep, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) if silu else gelu_tanh(value)
    if product:
        factor = tl.load(up + row * stride_up + columns, mask=keep, other=0.0)
        value = value * factor.to(tl.float32)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=keep)


def _launch(gate: Tensor, up: Tensor | None, silu: bool) -> Tensor:
    rows = as_rows(gate)
    factor = rows if up is None else as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    # 16 bytes a lane: 64 lanes a wave on AMD.
    block = 2 * _BLOCK if arch(gate).startswith("gfx") else _BLOCK
    grid = (len(rows), triton.cdiv(width, block))
    _activate[grid](
        rows, factor, out, rows.stride(0), factor.stride(0), width, silu=silu,
        product=up is not None, block=block, num_warps=_WARPS,
    )  # fmt: skip
    return out


@torch.library.custom_op("openpi_opt::triton_gelu", mutates_args=())
def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, elementwise."""
    return _launch(x, None, silu=False)


@torch.library.custom_op("openpi_opt::triton_gelu_mul", mutates_args=())
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up; both [..., W], rows at any stride."""
    return _launch(gate, up, silu=False)


@torch.library.custom_op("openpi_opt::triton_silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both [..., W], rows at any stride."""
    return _launch(gate, up, silu=True)


def gelu_mul_fused(gate_up: Tensor) -> Tensor:
    """[gate | up] [..., 2 W] -> gelu_tanh(gate) * up [..., W]; copies neither half."""
    return gelu_mul(*gate_up.chunk(2, dim=-1))


@gelu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@gelu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@silu_mul.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` in plain PyTorch."""
    return F.silu(gate) * up
