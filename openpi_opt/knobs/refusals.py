"""Reasons that several knobs refuse an option for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from openpi_opt.knobs.base import Configuration, Refusal

if TYPE_CHECKING:
    from openpi_opt.machine import Machine


def triton_refusals(option: str, cfg: Configuration) -> Iterator[Refusal]:
    """Triton compiles for GPUs only."""
    if cfg.platform.device == "cpu":
        why = "needs a GPU; Triton kernels run on the CPU in interpreter mode only, for tests"
        yield Refusal("unavailable", f"{option} {why}")


def sixteen_bits_refusals(option: str, cfg: Configuration) -> Iterator[Refusal]:
    """Of what has no float32 form."""
    if cfg.knobs["precision"].dtype == "float32":
        yield Refusal(
            "invalid",
            f"{option} computes in 16 bits; precision=float32 contradicts it, precision=bfloat16 "
            "does not",
        )


def aiter_refusals(
    option: str, cfg: Configuration, machine: Machine, elsewhere: bool = False
) -> Iterator[Refusal]:
    """AMD's package on an AMD GPU in 16 bits; with `elsewhere` also on other GPUs."""
    device, found = cfg.platform.device, machine.aiter
    if device != "rocm" and not (elsewhere and device == "cuda"):
        more = ", or an NVIDIA GPU for its Triton kernels" if elsewhere else ""
        here = "the CPU" if device == "cpu" else device
        needs = f"needs an AMD GPU with ROCm{more}; this trial runs on {here}"
        yield Refusal("unavailable", f"{option} {needs}")
    if found is None:
        yield Refusal(
            "unavailable",
            f"{option} needs AMD's aiter, which is not installed (pip install --pre amd-aiter, or "
            "its source)",
        )
    elif found.kind != "amd":
        yield Refusal(
            "unavailable",
            f"{option} needs AMD's aiter, but `import aiter` finds PyPI's unrelated asyncio "
            f"package of that name (version {found.version}); uninstall it and install AMD's",
        )
    yield from sixteen_bits_refusals(option, cfg)
