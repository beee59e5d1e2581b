"""Knob `precision`: the number format of weights and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy

_TF32_MIN_SM = 80
# gfx942 has an instruction for it; gfx950 has none, and hipBLASLt computes it by three products in
# bfloat16 (ROCm 7, "TF32 emulation").
_XF32_ARCHS = ("gfx942", "gfx950")


class PrecisionOptions(Options):
    """`bfloat16` is openpi's mixed mode: norm weights and the outer projections stay float32.
    `tf32` lets float32 products round their factors to 10 bits of mantissa. In a 16-bit mode that
    concerns the patch convolution and the projections of state, actions and time."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    tf32: bool = False


class Precision(Knob[PrecisionOptions]):
    """Cast the policy to float32 or to openpi's mixed 16-bit mode. All vendors.

    Source: openpi `to_bfloat16_for_selected_params`; which tensors stay float32 is listed in
    `openpi_opt.pi0.precision`. `tf32` is AMD's and NVIDIA's
    `torch.set_float32_matmul_precision("high")`; on ROCm it needs HIPBLASLT_ALLOW_TF32 and an
    MI300 (not run on AMD). FP8 is not a precision of the policy but a way to compute products: see
    knob `blas`.
    """

    name = "precision"
    options_type = PrecisionOptions
    quick: ClassVar = {"dtype": "bfloat16"}  # float32 takes four times as long, and more memory

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """TF32 exists on some GPUs; a CPU multiplies float32 in float32."""
        if not self.of(cfg).tf32 or cfg.platform.device == "cpu":
            return
        arch = machine.gpu(cfg.device, cfg.platform.gpu).arch
        if cfg.platform.device == "cuda":
            able, needed = int(arch.removeprefix("sm")) >= _TF32_MIN_SM, "sm80 or newer"
        else:
            able, needed = arch in _XF32_ARCHS, f"one of {', '.join(_XF32_ARCHS)}"
        if not able:
            yield Refusal("unavailable", f"precision.tf32 needs {needed}; this GPU is {arch}")

    def canonical(self, cfg: Configuration) -> PrecisionOptions:
        """A CPU has no TF32."""
        options = self.of(cfg)
        if options.tf32 and cfg.platform.device == "cpu":
            return options.model_copy(update={"tf32": False})
        return options

    def acts(self, cfg: Configuration) -> bool:
        """Always: the default casts, too."""
        return True

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """hipBLASLt uses the reduced format only when told so by this variable, too."""
        if self.canonical(cfg).tf32 and cfg.platform.device == "rocm":
            return {"HIPBLASLT_ALLOW_TF32": "1"}
        return {}

    def configure(self, cfg: Configuration) -> None:
        """Without `tf32` a float32 product is a float32 product, on every vendor."""
        import torch

        tf32 = self.canonical(cfg).tf32
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Cast in place."""
        import torch

        from openpi_opt.pi0 import precision

        precision.cast(policy, getattr(torch, self.of(cfg).dtype))

    def float32_form(self, cfg: Configuration) -> PrecisionOptions:
        """float32, all of its bits."""
        return PrecisionOptions(dtype="float32")

    def notes(self, cfg: Configuration) -> list[str]:
        """Say so when the CPU took the switch's meaning away."""
        if self.of(cfg).tf32 and not self.canonical(cfg).tf32:
            return ["precision.tf32 has no effect on a CPU."]
        return []
