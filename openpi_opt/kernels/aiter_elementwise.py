"""AMD aiter's RMSNorm and GELU * up, as operators that mutate nothing. Not run on AMD.

aiter's own write into a tensor of the caller and say that they mutate all of their arguments. They
read 16-bit tensors, and the norm a weight of the same dtype: the policy's float32 weight is rounded
to it, which changes nothing for weights that were trained or stored in that dtype.

- `gelu_tanh_and_mul` reads gate and up as the halves of one row. Two halves of a fused projection
  (fusion.gate_up) are read where they are; others are copied together first.
- `rmsnorm` with `gemma_norm`, whose gain is 1 + weight, rows of at most 8192.

aiter's rotary embedding wants [S, B, H, D] and its LayerNorm rounds elsewhere: both stay torch's.
Sources: ROCm/aiter `aiter/ops/activation.py`, `aiter/ops/rmsnorm.py`,
`csrc/kernels/activation_kernels.cu`, `csrc/kernels/rmsnorm_quant_kernels.cu` at e4048607.
Letters: M rows, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openpi_opt.kernels.operators import operator

MAX_WIDTH = 8192  # of a row that `rmsnorm` takes


@operator("aiter_rms_norm")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Gemma's RMSNorm, gain 1 + weight [W], or 1 without; x [..., W] -> [..., W] of x's dtype."""
    from aiter.ops.rmsnorm import rmsnorm

    width = x.shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"aiter's rmsnorm takes rows of at most {MAX_WIDTH}, not {width}")
    rows = x.reshape(-1, width).contiguous()
    gain = x.new_zeros(width) if weight is None else weight.to(x.dtype)
    out = torch.empty_like(rows)
    rmsnorm(out, rows, gain, eps, gemma_norm=True)
    return out.view(x.shape)


@operator("aiter_gelu_mul")
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up; both [..., W] -> [..., W]."""
    from aiter.ops.activation import gelu_tanh_and_mul

    rows = _side_by_side(gate, up)
    out = gate.new_empty(rows.shape[0], gate.shape[-1])
    gelu_tanh_and_mul(out, rows)
    return out.view(gate.shape)


def _side_by_side(gate: Tensor, up: Tensor) -> Tensor:
    """[M, 2 W], gate first: the tensor that both are halves of, or a copy."""
    width = gate.shape[-1]
    whole = gate.new_empty(0)
    if (
        gate.stride() == up.stride()
        and gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        and up.storage_offset() == gate.storage_offset() + width
    ):
        shape = (*gate.shape[:-1], 2 * width)
        whole = gate.as_strided(shape, gate.stride())
    if not whole.numel() or not whole.is_contiguous():
        whole = torch.cat((gate, up), dim=-1)
    return whole.reshape(-1, 2 * width)
