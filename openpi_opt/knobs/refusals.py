"""Reasons that several knobs refuse an option for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openpi_opt.knobs.base import Configuration, Refusal

if TYPE_CHECKING:
    from openpi_opt.machine import Machine


def triton_problem(option: str, cfg: Configuration) -> Refusal | None:
    """Triton compiles for GPUs only."""
    if cfg.platform.device != "cpu":
        return None
    return Refusal(
        "unavailable",
        f"{option} needs a GPU; Triton kernels run on the CPU in interpreter mode only, for tests",
    )


def sixteen_bits_problem(option: str, cfg: Configuration) -> Refusal | None:
    """Of what has no float32 form."""
    if cfg.knobs["precision"].dtype != "float32":  # type: ignore[attr-defined]
        return None
    return Refusal(
        "invalid",
        f"{option} computes in 16 bits; precision=float32 contradicts it, precision=bfloat16 does "
        "not",
    )


def aiter_problem(
    option: str, cfg: Configuration, machine: Machine, elsewhere: bool = False
) -> Refusal | None:
    """AMD's package on an AMD GPU in 16 bits; with `elsewhere` also on other GPUs."""
    device = cfg.platform.device
    if device != "rocm" and not (elsewhere and device == "cuda"):
        more = ", or an NVIDIA GPU for its Triton kernels" if elsewhere else ""
        here = "the CPU" if device == "cpu" else device
        return Refusal(
            "unavailable",
            f"{option} needs an AMD GPU with ROCm{more}; this trial runs on {here}",
        )
    found = machine.aiter
    if found is None:
        return Refusal(
            "unavailable",
            f"{option} needs AMD's aiter, which is not installed (pip install --pre amd-aiter, or "
            "its source)",
        )
    if found.kind != "amd":
        return Refusal(
            "unavailable",
            f"{option} needs AMD's aiter, but `import aiter` finds PyPI's unrelated asyncio "
            f"package of that name (version {found.version}); uninstall it and install AMD's",
        )
    return sixteen_bits_problem(option, cfg)
