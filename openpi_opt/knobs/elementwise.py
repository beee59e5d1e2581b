"""Knob `elementwise`: norms, activations and rotary embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.refusals import aiter_refusals, triton_refusals

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy


class ElementwiseOptions(Options):
    """`torch`: PyTorch's operations, which Inductor fuses; `triton`: own kernels, one launch each.

    `aiter`: AMD's RMSNorm and GELU * up; the rest stays torch's. Under `compile` kernels are opaque
    to Inductor, which then fuses less around them. `rotary=triton` takes that one kernel alone: it
    turns queries and keys in one launch; Inductor makes two.
    """

    backend: Literal["torch", "triton", "aiter"] = "torch"
    rotary: Literal["backend", "triton"] = "backend"


class Elementwise(Knob[ElementwiseOptions]):
    """RMSNorm, LayerNorm, GELU, GELU * up and rotary embedding by own Triton kernels. All vendors.

    Or, on AMD, RMSNorm and GELU * up by aiter (`openpi_opt.kernels.aiter_elementwise`; not run on
    AMD; sunxxuns/openpi-1, USE_OPTIMIZED_OPS).

    Sources of the idea: linkedin/Liger-Kernel `ops/rms_norm.py`, `ops/geglu.py`, `ops/rope.py`;
    AMD's aiter Triton `rmsnorm` and `rope`. Written here: `openpi_opt.kernels.triton_norm`,
    `triton_activation`, `triton_rotary`.
    """

    name = "elementwise"
    options_type = ElementwiseOptions

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Triton compiles for GPUs only, aiter for AMD's and 16 bits."""
        if self.of(cfg).backend == "aiter":
            yield from aiter_refusals("elementwise=aiter", cfg, machine)
        elif "triton" in self.of(cfg).model_dump().values():
            yield from triton_refusals("elementwise=triton", cfg)

    def canonical(self, cfg: Configuration) -> ElementwiseOptions:
        """The own backend has the own kernels already."""
        options = self.of(cfg)
        return ElementwiseOptions(backend="triton") if options.backend == "triton" else options

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Put the kernels into the policy's operations."""
        options, ops = self.of(cfg), policy.ops
        if options.backend == "aiter":
            from openpi_opt.kernels import aiter_elementwise
            from openpi_opt.kernels.aiter import import_part

            for part in ("aiter.ops.rmsnorm", "aiter.ops.activation"):
                import_part(part, "elementwise=aiter")
            ops.rms_norm = aiter_elementwise.rms_norm
            ops.gelu_mul = aiter_elementwise.gelu_mul
        if "triton" in (options.backend, options.rotary):
            from openpi_opt.kernels import triton_rotary

            ops.rotary = triton_rotary.rotary
            ops.rotary_qk = triton_rotary.rotary_qk
        if options.backend == "triton":
            from openpi_opt.kernels import triton_activation, triton_norm

            ops.rms_norm = triton_norm.rms_norm
            ops.adaptive_rms_norm = triton_norm.adaptive_rms_norm
            ops.layer_norm = triton_norm.layer_norm
            ops.gelu = triton_activation.gelu
            ops.gelu_mul = triton_activation.gelu_mul

    def float32_form(self, cfg: Configuration) -> ElementwiseOptions:
        """Aiter's kernels take 16 bits only."""
        options = self.of(cfg)
        return ElementwiseOptions() if options.backend == "aiter" else options
