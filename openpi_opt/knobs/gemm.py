"""Knob `gemm`: an own kernel for linear layers of few rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.launch import LINEARS, LinearLaunch, arch_of
from openpi_opt.knobs.refusals import triton_refusals

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy


class GemmOptions(Options):
    """`triton_skinny` takes the layers of at most `max_rows` rows; torch keeps the others.

    `launch_*` are the launch parameters of the four products of a layer with
    `fusion.expert_layer`.
    """

    backend: Literal["torch", "triton_skinny"] = "torch"
    max_rows: int = Field(64, ge=1, le=64)
    launch_qkv: LinearLaunch = LinearLaunch()
    launch_out: LinearLaunch = LinearLaunch()
    launch_gate_up: LinearLaunch = LinearLaunch()
    launch_down: LinearLaunch = LinearLaunch()

    def launches(self) -> dict[str, LinearLaunch]:
        """By product."""
        return {name: getattr(self, f"launch_{name}") for name in LINEARS}


class Gemm(Knob[GemmOptions]):
    """Linear layers of few rows by a kernel that streams the weights. NVIDIA and AMD.

    In the denoising steps 11 rows meet 5 to 16 MB of weights a layer, which cuBLAS reads at a
    third of the memory's rate on an H100. Source: `openpi_opt.kernels.triton_skinny_gemm`;
    the same observation made realtime-vla write its decoder in Triton.
    """

    name = "gemm"
    options_type = GemmOptions
    # Few rows: the denoising steps, and the state token where it is run once.
    stages: ClassVar = dict.fromkeys(
        ("backend", "max_rows", *(f"launch_{name}" for name in LINEARS)), ("prefill", "denoise")
    )

    tuned: ClassVar = tuple(f"launch_{name}" for name in LINEARS)

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Triton compiles for GPUs only; launch parameters must fit the processor."""
        if self.of(cfg).backend == "triton_skinny":
            yield from triton_refusals("gemm=triton_skinny", cfg)
        for name, launch in self.canonical(cfg).launches().items():
            if not launch.given():
                continue
            problem = launch.problem(name, _rows(cfg), arch_of(cfg, machine))
            if problem is not None:
                yield Refusal("invalid", f"gemm.launch_{name} {problem}")

    def canonical(self, cfg: Configuration) -> GemmOptions:
        """`max_rows` means nothing to torch, launch parameters nothing without fused layers."""
        options = self.of(cfg)
        if options.backend == "torch":
            return GemmOptions()
        fused = cfg.knobs["fusion"].expert_layer
        read = bool(fused) and _rows(cfg) <= options.max_rows
        device = cfg.platform.device
        launches = {
            f"launch_{name}": launch.canonical(name, device) if read else LinearLaunch()
            for name, launch in options.launches().items()
        }
        return options.model_copy(update=launches)

    def float32_form(self, cfg: Configuration) -> GemmOptions:
        """Launch parameters are those of 16 bits: tiles of float32 would not fit."""
        launches = {f"launch_{name}": LinearLaunch() for name in LINEARS}
        return self.canonical(cfg).model_copy(update=launches)

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Put the kernel into the policy's operations."""
        options = self.of(cfg)
        if options.backend == "torch":
            return
        from openpi_opt.kernels import triton_skinny_gemm

        policy.ops.linear = triton_skinny_gemm.linear(options.max_rows)

    def label(self, options: GemmOptions) -> str:
        """As of all knobs, without `launch_` before the names of products."""
        return super().label(options).replace("launch_", "")


def _rows(cfg: Configuration) -> int:
    """Rows of a denoising step's products."""
    once = cfg.knobs["simplify"].state_once
    state = cfg.model.family == "pi0" and not once
    return cfg.workload.batch_size * (cfg.workload.horizon + state)
