"""Knob `fusion`: projections of one input in one GEMM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openpi_opt.knobs.base import Knob, Options, switches_label

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.pi0.policy import Pi0Policy


class FusionOptions(Options):
    """Each switch on its own; the shapes are those of the full model, [out, in].

    `qkv`: Gemma towers, [2560, 2048] and [2560, 1024]. `gate_up`: Gemma towers, [32768, 2048] and
    [8192, 1024]. `vision_qkv`: SigLIP, [3456, 1152] with bias.
    """

    qkv: bool = False
    gate_up: bool = False
    vision_qkv: bool = False


class Fusion(Knob[FusionOptions]):
    """Two or three GEMMs of the same input become one: fewer launches, better tiles. All vendors.

    Exact, only the tiling of the sums changes. Weights are loaded and saved under their original
    names: these are views of the fused weight. Source: sunxxuns/openpi-1 on MI350 and H200
    (`USE_FUSED_PROJECTIONS`, `OPENPI_FUSE_SIGLIP_QKV`).
    """

    name = "fusion"
    options_type = FusionOptions

    def transform(self, policy: Pi0Policy, cfg: Config) -> None:
        """Fuse the weights as cast by `precision`, which comes before."""
        from openpi_opt.surgery import fused

        options = self.of(cfg)
        if options.qkv:
            fused.fuse_qkv(policy)
        if options.gate_up:
            fused.fuse_gate_up(policy)
        if options.vision_qkv:
            fused.fuse_vision_qkv(policy)

    def label(self, options: FusionOptions) -> str:
        """The switches that are on."""
        return switches_label(options)
