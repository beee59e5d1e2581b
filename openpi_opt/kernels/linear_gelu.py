"""A linear layer and the GELU after it in one GEMM of torch's BLAS.

cuBLASLt and hipBLASLt (not run on AMD) have an epilogue that adds the bias and applies GELU in its
tanh form to the float32 sums, before they are rounded; torch reaches it by `_addmm_activation`.
That operator means another GELU on the CPU (erf), and Inductor takes it apart again, so it stands
behind an operator of our own. Reference: `openpi_opt.pi0.ops.linear_gelu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openpi_opt.kernels.operators import of_product, operator
from openpi_opt.pi0 import ops


@operator("linear_gelu", of_product)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(x [..., K] @ weight [N, K]^T + bias [N]) -> [..., N] of x's dtype."""
    return ops.linear_gelu(x, weight, bias)


@linear_gelu.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])
