"""The default operations against their formulas, in the dtypes they run in."""

from collections.abc import Callable

import pytest
import torch
from distances import distance
from torch import Tensor

from openpi_opt.pi0.ops import (
    NOT_ALLOWED,
    Ops,
    Visibility,
    eager_attention,
    gelu_mul,
    rms_norm,
    rotary,
)
from openpi_opt.pi0.workload import make_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def openpi_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The eager code of the reference: keys repeated, an additive float32 mask."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    additive = torch.where(mask, 0.0, NOT_ALLOWED)
    logits = torch.matmul(q, k.transpose(2, 3)) * scale + additive
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 1, 32), (6, 2, 10), (3, 3, 7)])
@pytest.mark.parametrize("mask_shape", [(2, 1, 5, 13), (2, 1, 1, 13), (1, 1, 5, 13)])
def test_attention_has_the_roundings_of_openpi(dtype, heads, kv_heads, width, mask_shape):
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(2, 5, heads, width, generator=generator).to(dtype)
    k = (3 * torch.randn(2, 13, kv_heads, width, generator=generator)).to(dtype)
    v = torch.randn(2, 13, kv_heads, width, generator=generator).to(dtype)
    mask = torch.rand(mask_shape, generator=generator) < 0.6
    mask[..., 0] = True
    ours = eager_attention(q, k, v, Visibility(mask, None), width**-0.5)
    expected = openpi_attention(q, k, v, mask, width**-0.5)
    assert ours.dtype == dtype
    assert ours.shape == q.shape
    # Only the order of sums inside the two products may differ.
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    assert distance(ours, expected) < limit


def test_attention_of_a_query_that_sees_nothing_is_finite():
    q = torch.randn(1, 3, 2, 8)
    k = v = torch.randn(1, 4, 1, 8)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    out = eager_attention(q, k, v, Visibility(mask, None), 1.0)
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-6)


def test_masked_keys_have_no_weight_at_all():
    q, k, v = (torch.randn(1, 6, 1, 8) for _ in range(3))
    mask = torch.tensor([True, True, True, True, False, False])
    expected = eager_attention(q, k, v, Visibility(mask, None), 1.0)
    k[:, 4:], v[:, 4:] = 100.0, 1e6
    assert torch.equal(eager_attention(q, k, v, Visibility(mask, None), 1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_once_after_the_gain(dtype):
    x, weight = (4 * torch.randn(3, 7, 33)).to(dtype), torch.randn(33)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    # float32 has more than the last rounding.
    roundings = 4 if dtype == torch.float32 else 1
    error = (out.double() - exact.to(dtype).double()).abs() / exact.abs()
    assert float(error.max()) <= roundings * torch.finfo(dtype).eps


def test_rotary_is_a_rotation_of_halves():
    x = torch.randn(2, 5, 3, 8)
    angles = torch.randn(2, 5, 4)
    out = rotary(x, angles.cos(), angles.sin())
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, :, None]
    assert torch.allclose(out, torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-6)


def test_gelu_mul_rounds_the_gelu_before_the_product():
    random = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(1000, generator=random).bfloat16() for _ in range(2))
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh").bfloat16()
    # The float32 and the float64 GELU may round to neighbours, seldom.
    assert (gelu_mul(gate, up) == gelu * up).double().mean() > 0.99


def test_every_operation_is_used_through_the_shared_ops(policy, masked_workload):
    """Replacing a field acts on every call."""
    inputs = make_inputs(masked_workload, policy.config, 0, "cpu")
    calls: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Tensor]:
        function = getattr(policy.ops, name)

        def call(*args: object) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            out: Tensor = function(*args)
            return out

        return call

    for name in vars(Ops()):
        setattr(policy.ops, name, counted(name))
    policy.sample_actions(inputs)
    vision, layers, steps = policy.config.vision.depth, policy.config.language.depth, policy.steps
    passes = layers * (1 + steps)
    assert calls == {
        "attention_vision": vision,
        "attention_prefill": layers,
        "attention_denoise": layers * steps,
        "rms_norm": 2 * passes + steps,
        "layer_norm": 2 * vision + 1,
        "gelu": vision,
        "gelu_mul": passes,
        "rotary_qk": passes,
        "linear": 6 * vision + 1 + 7 * passes,
    }
