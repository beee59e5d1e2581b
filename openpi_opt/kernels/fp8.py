"""Linear layers whose product is FP8, with one static scale per tensor.

Weights are quantised once. The scale of the activations is the largest absolute value seen in
calibration runs on seeded inputs, so nothing is reduced over a tensor at inference, and a captured
graph holds constants only. Products are `torch._scaled_mm`: cuBLASLt on NVIDIA (sm89 and newer),
hipBLASLt on AMD (not run on AMD), a reference implementation on the CPU.

The format depends on the architecture: e4m3fn (largest value 448) on NVIDIA and gfx950, e4m3fnuz
(largest 240) on gfx942; bytes of one read as the other are numerically wrong.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openpi_opt.pi0.layers import Linear

# The exponent of e4m3 reaches over 2^15, so headroom for values larger than in calibration costs
# no precision: a value loses mantissa bits only when it is some 2^14 below the largest.
HEADROOM = 2.0
MULTIPLE = 16  # of K and N, required by cuBLASLt and hipBLASLt
_FNUZ_ARCHS = ("gfx940", "gfx941", "gfx942")
_SPECIALISED: dict[tuple[type[Linear], type[Linear]], type[Linear]] = {}


def fp8_dtype(arch: str) -> torch.dtype:
    """The FP8 format that the matrix cores of `arch` compute with."""
    return torch.float8_e4m3fnuz if arch in _FNUZ_ARCHS else torch.float8_e4m3fn


def device_arch(device: torch.device) -> str:
    """gfx name on ROCm (without feature flags), "cpu" on the CPU, sm number elsewhere."""
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm{properties.major}{properties.minor}"


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [] float32 by which a tensor of this largest absolute value fits into `dtype`."""
    return largest.float().clamp_min(1e-12) / torch.finfo(dtype).max


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, rounded to `dtype`, saturated: e4m3fnuz would turn what is too large into NaN."""
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)


class Fp8Linear(Linear):
    """A linear layer of a tower in FP8, made by `become`; its parameters stay as they were."""

    weight_fp8: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    fast_accum: bool

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of x's dtype."""
        rows = quantise(x.reshape(-1, self.in_features), self.input_scale, self.weight_fp8.dtype)
        out = torch._scaled_mm(
            rows,
            self.weight_fp8.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=x.dtype,
            use_fast_accum=self.fast_accum,
        )
        return out.view(*x.shape[:-1], self.out_features)


def become(
    linear: Linear, largest_input: Tensor, dtype: torch.dtype, fast_accum: bool = True
) -> Fp8Linear:
    """Turn `linear` into an FP8 layer in place, with `largest_input` [] from calibration."""
    weight = linear.weight.detach()
    weight_scale = scale_for(weight.abs().amax(), dtype)
    buffers = {
        "weight_fp8": quantise(weight, weight_scale, dtype),
        "weight_scale": weight_scale,
        "input_scale": scale_for(largest_input * HEADROOM, dtype),
    }
    for name, value in buffers.items():
        linear.register_buffer(name, value, persistent=False)
    linear.__class__ = specialised(Fp8Linear, type(linear))
    assert isinstance(linear, Fp8Linear)
    linear.fast_accum = fast_accum
    return linear


def specialised(kind: type[Linear], base: type[Linear]) -> type[Linear]:
    """`kind` on top of `base`: computes like the one, loads and saves like the other.

    One class per pair, however many layers: torch.compile tells modules apart by their class.
    """
    if base is Linear:
        return kind
    if (kind, base) not in _SPECIALISED:
        _SPECIALISED[kind, base] = type(kind.__name__ + base.__name__, (kind, base), {})
    return _SPECIALISED[kind, base]


def convert(
    towers: Iterable[nn.Module], run: Callable[[], None], dtype: torch.dtype, fast_accum: bool
) -> int:
    """Turn the linear layers below `towers` into FP8 ones, calibrated by `run`; how many.

    A layer that `run` never reaches, or whose widths are no multiples of 16, stays as it is.
    """
    with largest_inputs(towers) as largest:
        run()
    fitting = {
        linear: value
        for linear, value in largest.items()
        if linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
    }
    for linear, value in fitting.items():
        become(linear, value, dtype, fast_accum)
    return len(fitting)


@contextmanager
def largest_inputs(towers: Iterable[nn.Module]) -> Iterator[dict[Linear, Tensor]]:
    """Largest absolute input [] of each linear layer that runs inside, over all of its calls."""
    largest: dict[Linear, Tensor] = {}

    def observe(linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
        found = arguments[0].detach().abs().amax().float()
        largest[linear] = torch.maximum(largest[linear], found) if linear in largest else found

    linears = [m for tower in towers for m in tower.modules() if isinstance(m, Linear)]
    handles = [linear.register_forward_pre_hook(observe) for linear in linears]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
