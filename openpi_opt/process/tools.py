"""A vendor's profiler in front of a trial: `profile.tool`.

The trial is the same; its times are those under the tool, so its configuration is another one to
every comparison (`Config.hash`). CUDA's tools record one call, between cudaProfilerStart and -Stop
(`measure.profile.call_for_tool`); rocprofv3 records the process. None has been run here.

Sources: ROCm 7 "Using rocprofv3"; Nsight Compute CLI and Nsight Systems user guides, 2025.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.knobs.base import Refusal

FOLDER = "profile"
_DEVICE = {"rocprofv3": "rocm", "ncu": "cuda", "nsys": "cuda"}


def command(tool: str, trial_dir: Path) -> list[str]:
    """The words before the trial's own; files go to `trial_dir`/profile, which is made."""
    if tool == "none":
        return []
    program = shutil.which(tool)
    if program is None:
        raise FileNotFoundError(f"profile.tool={tool}: there is no such program on PATH")
    folder = trial_dir / FOLDER
    folder.mkdir(exist_ok=True)
    target = str(folder / "trace")
    return [program, *{
        "rocprofv3": ["--kernel-trace", "--output-format", "csv", "-d", str(folder), "-o", "trace",
                      "--"],
        "ncu": ["--profile-from-start", "off", "--target-processes", "application-only",
                "--set", "full", "--force-overwrite", "--export", target],
        "nsys": ["profile", "--trace", "cuda,nvtx", "--capture-range", "cudaProfilerApi",
                 "--capture-range-end", "stop", "--export", "sqlite", "--force-overwrite", "true",
                 "--output", target],
    }[tool]]  # fmt: skip


def refusal(cfg: Config) -> Refusal | None:
    """Why `profile.tool` cannot run here, or None."""
    tool = cfg.profile.tool
    if tool == "none":
        return None
    if cfg.device != _DEVICE[tool]:
        return Refusal(
            "unavailable",
            f"profile.tool={tool} is for {_DEVICE[tool]}; this trial runs on {cfg.device}",
        )
    if shutil.which(tool) is None:
        return Refusal("unavailable", f"profile.tool={tool}: there is no such program on PATH")
    return None
