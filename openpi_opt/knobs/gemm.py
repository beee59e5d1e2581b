"""Knob `gemm`: an own kernel for linear layers of few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy


class GemmOptions(Options):
    """`triton_skinny` takes the layers of at most `max_rows` rows; torch keeps the others."""

    backend: Literal["torch", "triton_skinny"] = "torch"
    max_rows: int = Field(64, ge=1, le=64)


class Gemm(Knob[GemmOptions]):
    """Linear layers of few rows by a kernel that streams the weights. NVIDIA and AMD.

    In the denoising steps 11 rows meet 5 to 16 MB of weights a layer, which cuBLAS reads at a
    third of the memory's rate on an H100. Source: `openpi_opt.kernels.triton_skinny_gemm`;
    the same observation made realtime-vla write its decoder in Triton.
    """

    name = "gemm"
    options_type = GemmOptions
    # Few rows: the denoising steps, and the state token where it is run once.
    stages: ClassVar = {"backend": ("prefill", "denoise"), "max_rows": ("prefill", "denoise")}

    def check(self, cfg: Configuration, machine: Machine) -> Refusal | None:
        """Triton compiles for GPUs only."""
        if self.of(cfg).backend == "triton_skinny" and cfg.platform.device == "cpu":
            return Refusal(
                "unavailable",
                "gemm=triton_skinny needs a GPU; Triton kernels run on the CPU in interpreter "
                "mode only, for tests",
            )
        return None

    def canonical(self, cfg: Configuration) -> GemmOptions:
        """`max_rows` means nothing to torch."""
        options = self.of(cfg)
        return GemmOptions() if options.backend == "torch" else options

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Put the kernel into the policy's operations."""
        options = self.of(cfg)
        if options.backend == "torch":
            return
        from openpi_opt.kernels import triton_skinny_gemm

        policy.ops.linear = triton_skinny_gemm.linear(options.max_rows)

    def label(self, options: GemmOptions) -> str:
        """The backend, and the threshold if it is not the kernel's own."""
        default = options.max_rows == type(options)().max_rows
        return options.backend if default else f"{options.backend} max_rows={options.max_rows}"
