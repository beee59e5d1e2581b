"""Knob `precision`: the number format of weights and activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from openpi_opt.knobs.base import Knob, Options

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.pi0.policy import Pi0Policy


class PrecisionOptions(Options):
    """`bfloat16` is openpi's mixed mode: norm weights and the outer projections stay float32."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class Precision(Knob[PrecisionOptions]):
    """Cast the policy to float32 or to openpi's bfloat16 mode. All vendors.

    Source: openpi `to_bfloat16_for_selected_params`; which tensors stay float32 is listed in
    `openpi_opt.pi0.precision`.
    """

    name = "precision"
    options_type = PrecisionOptions

    def configure(self, cfg: Config) -> None:
        """No TF32: a float32 product is a float32 product, on every vendor."""
        import torch

        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False

    def transform(self, policy: Pi0Policy, cfg: Config) -> None:
        """Cast in place."""
        import torch

        from openpi_opt.pi0 import precision

        precision.cast(policy, getattr(torch, self.of(cfg).dtype))

    def label(self, options: PrecisionOptions) -> str:
        """The format."""
        return options.dtype
