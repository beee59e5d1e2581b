"""aiter's norm and activation by contract: modules with the names and signatures of the real ones.

`rmsnorm` and `gelu_tanh_and_mul` are those of ROCm/aiter `aiter/ops/rmsnorm.py` and
`aiter/ops/activation.py` at e4048607, their demands those of the kernels.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openpi_opt.kernels import aiter_elementwise
from openpi_opt.pi0 import ops

addresses: list[int] = []


def rmsnorm(
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    epsilon: float,
    gemma_norm: bool = False,
) -> None:
    assert input.ndim == 2
    assert input.is_contiguous()
    assert out.is_contiguous()
    assert out.dtype == input.dtype == weight.dtype
    wide = input.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    out.copy_(normed * (weight.float() + gemma_norm))


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    assert input.is_contiguous()
    assert out.is_contiguous()
    addresses.append(input.data_ptr())
    gate, up = input.float().chunk(2, dim=-1)
    out.copy_(F.gelu(gate, approximate="tanh") * up)


@pytest.fixture(autouse=True)
def aiter(put_aiter):
    activation = {"gelu_tanh_and_mul": gelu_tanh_and_mul}
    put_aiter(**{"ops.rmsnorm": {"rmsnorm": rmsnorm}, "ops.activation": activation})
    addresses.clear()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 11, 96), (3, 128), (2, 5, 48)])
def test_norm(shape, weighted):
    x, weight = draw(*shape), draw(shape[-1]).float() * 0.3 if weighted else None
    out = aiter_elementwise.rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, ops.rms_norm(x, weight, 1e-6), rtol=2**-6, atol=2**-8)
    torch.library.opcheck(torch.ops.openpi_opt.aiter_rms_norm, (x, weight, 1e-6))


def test_norm_of_a_slice_and_of_rows_that_are_too_wide():
    x = draw(2, 7, 64)[:, 1:]
    torch.testing.assert_close(
        aiter_elementwise.rms_norm(x, None, 1e-6), ops.rms_norm(x, None, 1e-6), rtol=2**-6, atol=0
    )
    with pytest.raises(ValueError, match="at most 8192, not 8200"):
        aiter_elementwise.rms_norm(draw(1, 8200), None, 1e-6)


@pytest.mark.parametrize("layout", ["fused", "fused slice", "swapped", "apart"])
def test_gated_product_reads_fused_halves_in_place(layout):
    fused = draw(2, 5, 2 * 48)
    rows = fused[:, 1:] if layout == "fused slice" else fused
    gate, up = rows.chunk(2, dim=-1)
    if layout == "swapped":
        gate, up = up, gate
    elif layout == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    out = aiter_elementwise.gelu_mul(gate, up)
    torch.testing.assert_close(out, ops.gelu_mul(gate, up), rtol=2**-6, atol=2**-8)
    assert (addresses == [fused.data_ptr()]) == (layout == "fused")
    torch.library.opcheck(torch.ops.openpi_opt.aiter_gelu_mul, (gate, up))
