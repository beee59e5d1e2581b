"""Knob `compile`: torch.compile of the stages."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Literal

from openpi_opt.knobs.base import Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy

STAGES = ("encode_images", "prefill", "denoise_step")


class CompileOptions(Options):
    """`default` is torch.compile's default mode."""

    mode: Literal["off", "default"] = "off"


class Compile(Knob[CompileOptions]):
    """Compile each stage (vision, prefill, one denoising step) with Inductor. All vendors.

    One graph per stage: the denoising step is compiled once and called `steps` times, so
    compilation takes a tenth of what the unrolled call would need. A graph break or a
    recompilation is an error, not a slower run: `fullgraph=True`, `dynamic=False`.
    """

    name = "compile"
    options_type = CompileOptions

    def check(self, cfg: Config, machine: Machine) -> Refusal | None:
        """Inductor needs a host compiler: for C++ on the CPU, for Triton's launchers on a GPU."""
        if self.of(cfg).mode == "off":
            return None
        names = ["g++", "clang++"] if cfg.platform.device == "cpu" else ["gcc", "clang", "cc"]
        variable = "CXX" if cfg.platform.device == "cpu" else "CC"
        candidates = [os.environ[variable]] if variable in os.environ else names
        if not any(shutil.which(name) for name in candidates):
            return Refusal(
                "unavailable",
                f"compile={self.of(cfg).mode} needs a host compiler and found none of "
                f"{', '.join(candidates)}; install one or set {variable}",
            )
        return None

    def transform(self, policy: Pi0Policy, cfg: Config) -> None:
        """Replace each stage by its compiled form; compilation happens at the first call."""
        if self.of(cfg).mode == "off":
            return
        import torch

        for stage in STAGES:
            compiled = torch.compile(getattr(policy, stage), fullgraph=True, dynamic=False)
            setattr(policy, stage, compiled)

    def label(self, options: CompileOptions) -> str:
        """The mode."""
        return options.mode
