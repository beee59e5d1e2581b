"""Knob `attention`: the attention backend of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from openpi_opt.knobs.base import Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy

Backend = Literal["eager", "sdpa", "aiter"]
STAGES = ("vision", "prefill", "denoise")


class AttentionOptions(Options):
    """One backend per stage."""

    vision: Backend = "eager"
    prefill: Backend = "eager"
    denoise: Backend = "eager"


class Attention(Knob[AttentionOptions]):
    """Attention backend per stage, always with exact masks.

    `sdpa` is torch's scaled_dot_product_attention (flash on both vendors); `aiter` is AMD's flash
    attention: the CK kernel behind `torch.ops.aiter.mha_fwd` on ROCm, the same package's Triton
    kernel elsewhere. Backends that take no mask get the same function by a static split of
    queries and keys (`openpi_opt.pi0.ops.Visibility.segments`).
    """

    name = "attention"
    options_type = AttentionOptions

    def check(self, cfg: Config, machine: Machine) -> Refusal | None:
        """AMD's aiter needs a GPU, the package, and a 16-bit precision."""
        if "aiter" not in self._backends(cfg):
            return None
        device = cfg.platform.device
        if device == "cpu":
            return Refusal(
                "unavailable",
                "attention=aiter needs an AMD GPU with ROCm, or an NVIDIA GPU for its Triton "
                "kernels; this trial runs on the CPU",
            )
        missing = _missing_aiter(machine)
        if missing:
            return Refusal("unavailable", missing)
        if cfg.knobs["precision"].dtype == "float32":  # type: ignore[attr-defined]
            return Refusal(
                "invalid", "attention=aiter computes in 16 bits; precision=float32 contradicts it"
            )
        return None

    def environment(self, cfg: Config) -> Mapping[str, str]:
        """Without ROCm only the Triton part of aiter can be imported, and only when told so."""
        if "aiter" in self._backends(cfg) and cfg.platform.device == "cuda":
            return {"AITER_TRITON_ONLY": "1"}
        return {}

    def transform(self, policy: Pi0Policy, cfg: Config) -> None:
        """Put the backend of each stage into the policy's operations."""
        from openpi_opt.kernels import attention as backends
        from openpi_opt.pi0.inputs import Layout

        options, workload = self.of(cfg), cfg.workload
        if self._backends(cfg) != {"eager"}:
            policy.declare_layout(
                Layout(workload.active_cameras, workload.prompt_slots, workload.prompt_tokens)
            )
        for stage in STAGES:
            function = backends.backend(getattr(options, stage), cfg.platform.device)
            setattr(policy.ops, f"attention_{stage}", function)

    def label(self, options: AttentionOptions) -> str:
        """One word when the stages agree."""
        chosen = {stage: getattr(options, stage) for stage in STAGES}
        if len(set(chosen.values())) == 1:
            return str(options.vision)
        return " ".join(f"{stage}={backend}" for stage, backend in chosen.items())

    def _backends(self, cfg: Config) -> set[str]:
        options = self.of(cfg)
        return {options.vision, options.prefill, options.denoise}


def _missing_aiter(machine: Machine) -> str | None:
    found = machine.aiter
    if found is None:
        return (
            "attention=aiter needs AMD's aiter (distribution amd-aiter, from its source "
            "repository; not on PyPI), which is not installed"
        )
    if found.kind == "unrelated":
        return (
            f"attention=aiter needs AMD's aiter, but `import aiter` finds PyPI's unrelated asyncio "
            f"package of that name (version {found.version}); uninstall it and install AMD's"
        )
    return None
