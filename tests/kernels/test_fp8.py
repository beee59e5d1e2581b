"""FP8 arithmetic on the CPU, whose `torch._scaled_mm` is a reference implementation."""

import pytest
import torch
from distances import distance
from torch import Tensor, nn

from openpi_opt.kernels import fp8
from openpi_opt.pi0.layers import Linear, on_top
from openpi_opt.pi0.ops import Ops

FORMATS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
# Relative rounding of 3 bits of mantissa is at most 2^-4; on average over a product of two
# rounded factors about 2^-4 / sqrt(3) * sqrt(2).
TOLERANCE = 0.06


def linear(k: int, n: int, bias: bool = True) -> Linear:
    generator = torch.Generator().manual_seed(k + n)
    layer = Linear(k, n, bias, Ops()).requires_grad_(False)
    layer.weight.normal_(0.0, k**-0.5, generator=generator)
    if bias:
        layer.bias.normal_(generator=generator)
    return layer.bfloat16()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("sm89", torch.float8_e4m3fn),
        ("sm90", torch.float8_e4m3fn),
        ("gfx942", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
        ("cpu", torch.float8_e4m3fn),
    ],
)
def test_the_format_is_that_of_the_architecture(arch, dtype):
    assert fp8.fp8_dtype(arch) == dtype


@pytest.mark.parametrize("dtype", FORMATS)
def test_quantised_values_against_float(dtype):
    x = torch.cat([rows(1000).float(), torch.tensor([0.0, 1e-3, -1e-3])])
    scale = fp8.scale_for(x.abs().amax(), dtype)
    back = fp8.quantise(x, scale, dtype).float() * scale
    normal = x.abs() > scale * torch.finfo(dtype).smallest_normal
    assert bool(((back - x).abs()[normal] <= x.abs()[normal] * 2.0**-4 * 1.001).all())
    assert float((back - x).abs().max()) <= float(x.abs().max()) * 2.0**-4
    torch.testing.assert_close(back.abs().max(), x.abs().max())


@pytest.mark.parametrize("dtype", FORMATS)
def test_too_large_values_saturate(dtype):
    """A plain cast to e4m3fnuz makes NaN of them."""
    limit = torch.finfo(dtype).max
    out = fp8.quantise(torch.tensor([1e6, -1e6]), torch.tensor(1.0), dtype).float()
    assert out.tolist() == [limit, -limit]


def test_a_tensor_of_zeros_has_a_scale():
    scale = fp8.scale_for(torch.tensor(0.0), torch.float8_e4m3fn)
    assert fp8.quantise(torch.zeros(4), scale, torch.float8_e4m3fn).float().tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 11, 96), (3, 7, 96), (96,), (1, 96)])
def test_layer_against_the_float_product(shape, bias, dtype):
    layer, x = linear(96, 208, bias), rows(*shape)
    expected = nn.functional.linear(
        x.float(), layer.weight.float(), layer.bias.float() if bias else None
    )
    out = fp8.become(layer, x.abs().amax().float(), dtype)(x)
    assert out.dtype == torch.bfloat16
    assert out.shape == expected.shape
    assert 0.001 < distance(out, expected) < TOLERANCE  # not zero: it did compute in FP8


def test_scales_are_static():
    """Larger inputs than in calibration do not move the scale; within the headroom they fit."""
    layer = linear(96, 96, bias=False)
    x = rows(8, 96)
    expected = nn.functional.linear(x.float(), layer.weight.float())
    fp8.become(layer, x.abs().amax().float(), torch.float8_e4m3fn)
    assert distance(layer(x * 2), expected * 2) < TOLERANCE
    assert distance(layer(x * 16), expected * 16) > 3 * TOLERANCE


def test_names_values_and_one_class_per_kind():
    first, second = linear(32, 32), linear(32, 32)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    for layer in (first, second):
        fp8.become(layer, torch.tensor(1.0), torch.float8_e4m3fn)
    after = first.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    class Stacked(Linear):
        """As a fused layer: something else to load and save."""

    kinds = {on_top(fp8.Fp8Linear, Stacked) for _ in range(2)}
    assert len(kinds) == 1
    (kind,) = kinds
    assert issubclass(kind, Stacked)
    assert kind.forward is fp8.Fp8Linear.forward


def test_calibration_takes_the_largest_of_all_calls():
    layer, unused, odd = linear(32, 32), linear(32, 32), linear(33, 32)
    tower = nn.ModuleList([layer, unused, odd])

    def run() -> None:
        for factor in (1.0, 5.0, 2.0):
            layer(torch.full((1, 32), -factor).bfloat16())
        odd(torch.ones(1, 33).bfloat16())

    assert fp8.convert([tower], run, torch.float8_e4m3fn, True) == 1
    assert isinstance(layer, fp8.Fp8Linear)
    expected = 5.0 * fp8.HEADROOM / 448.0
    torch.testing.assert_close(layer.input_scale, torch.tensor(expected))
    assert type(unused) is Linear  # never ran: it has no scale
    assert type(odd) is Linear  # no multiple of 16
    assert not layer._forward_pre_hooks


def test_it_compiles_without_a_break():
    layer, x = linear(96, 48), rows(1, 11, 96)
    fp8.become(layer, x.abs().amax().float(), torch.float8_e4m3fn)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
