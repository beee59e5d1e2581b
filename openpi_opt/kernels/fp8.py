"""Linear layers whose product is FP8, with one static scale per tensor.

Weights are quantised once. The scale of the activations is the largest absolute value seen in
calibration runs on seeded inputs, so nothing is reduced over a tensor at inference, and a captured
graph holds constants only. Products are `torch._scaled_mm`: cuBLASLt on NVIDIA (sm89 and newer),
hipBLASLt on AMD (not run on AMD), a reference implementation on the CPU. Or, on AMD, aiter's
`gemm_a8w8` (not run on AMD): Composable Kernel with a scale per row and per column, here the same
for all. Its tuned table chooses a kernel, without a row a rule does; torch is never fallen back to.
Source: ROCm/aiter `aiter/ops/gemm_op_a8w8.py`, `csrc/ck_gemm_a8w8/gemm_a8w8.cu` at e4048607.

The format depends on the architecture: e4m3fn (largest value 448) on NVIDIA and gfx950, e4m3fnuz
(largest 240) on gfx942; bytes of one read as the other are numerically wrong.

Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openpi_opt.kernels.operators import operator
from openpi_opt.pi0 import layers
from openpi_opt.pi0.layers import Linear

# The exponent of e4m3 reaches over 2^15, so headroom for values larger than in calibration costs
# no precision: a value loses mantissa bits only when it is some 2^14 below the largest.
HEADROOM = 2.0
MULTIPLE = 16  # of K and N, required by cuBLASLt and hipBLASLt
_FNUZ_ARCHS = ("gfx940", "gfx941", "gfx942")


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
    buffers = _scaled(linear, largest_input, dtype)
    return layers.become(linear, Fp8Linear, buffers, fast_accum=fast_accum)


def _scaled(linear: Linear, largest_input: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    weight = linear.weight.detach()
    scale = scale_for(weight.abs().amax(), dtype)
    return {
        "weight_fp8": quantise(weight, scale, dtype),
        "weight_scale": scale,
        "input_scale": scale_for(largest_input * HEADROOM, dtype),
    }


@operator(
    "aiter_gemm_a8w8",
    lambda x, weight, _x, _w, _b, dtype: x.new_empty(x.shape[0], weight.shape[0], dtype=dtype),
)
def _gemm_a8w8(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """FP8 x [M, K] and weight [N, K], scales [M, 1] and [N, 1] float32 -> [M, N] of `dtype`.

    An operator of its own, because aiter's says that it mutates every tensor, weights too.
    """
    from aiter.ops.gemm_op_a8w8 import gemm_a8w8

    out: Tensor = gemm_a8w8(x, weight, x_scale, weight_scale, bias, dtype)
    return out


class AiterFp8Linear(Fp8Linear):
    """As `Fp8Linear`, by aiter's kernel, which reads one scale for each row and column."""

    input_scales: Tensor
    weight_scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] of x's dtype."""
        rows = quantise(x.reshape(-1, self.in_features), self.input_scale, self.weight_fp8.dtype)
        if len(rows) > len(self.input_scales):  # the kernel would read past their end
            raise ValueError(
                f"{len(rows)} rows, and scales for {len(self.input_scales)}: the most seen in "
                "calibration"
            )
        scales = self.input_scales[: len(rows)]
        out: Tensor = _gemm_a8w8(
            rows, self.weight_fp8, scales, self.weight_scales, self.bias, x.dtype
        )
        return out.view(*x.shape[:-1], self.out_features)


def become_aiter(linear: Linear, seen: Seen, dtype: torch.dtype) -> AiterFp8Linear:
    """As `become`, with aiter's kernel for at most `seen.rows` rows."""
    buffers = _scaled(linear, seen.largest, dtype)
    for name, count in (("input_scale", seen.rows), ("weight_scale", linear.out_features)):
        buffers[f"{name}s"] = buffers[name].expand(count, 1).contiguous()
    return layers.become(linear, AiterFp8Linear, buffers)


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a layer's inputs: largest absolute value [], most rows of a call."""

    largest: Tensor
    rows: int


def convert(
    towers: Iterable[nn.Module],
    run: Callable[[], None],
    dtype: torch.dtype,
    fast_accum: bool,
    aiter: bool = False,
) -> int:
    """Turn the linear layers below `towers` into FP8 ones, calibrated by `run`; how many.

    A layer that `run` never reaches, or whose widths are no multiples of 16, stays as it is.
    """
    with seen_inputs(towers) as seen:
        run()
    fitting = {
        linear: inputs
        for linear, inputs in seen.items()
        if linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
    }
    for linear, inputs in fitting.items():
        if aiter:
            become_aiter(linear, inputs, dtype)
        else:
            become(linear, inputs.largest, dtype, fast_accum)
    return len(fitting)


@contextmanager
def seen_inputs(towers: Iterable[nn.Module]) -> Iterator[dict[Linear, Seen]]:
    """The inputs of each linear layer that runs inside, over all of its calls."""
    seen: dict[Linear, Seen] = {}

    def observe(linear: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(linear, Linear)
        x = arguments[0].detach()
        largest, rows = x.abs().amax().float(), x.numel() // x.shape[-1]
        if linear in seen:
            largest = torch.maximum(seen[linear].largest, largest)
            rows = max(seen[linear].rows, rows)
        seen[linear] = Seen(largest, rows)

    linears = [m for tower in towers for m in tower.modules() if isinstance(m, Linear)]
    handles = [linear.register_forward_pre_hook(observe) for linear in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
