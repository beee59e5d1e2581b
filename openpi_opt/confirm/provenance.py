"""Where a preset comes from, as `promote` writes it. `openpi_opt.provenance` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from openpi_opt.config import Config
from openpi_opt.confirm import power
from openpi_opt.confirm.judge import Confirmed
from openpi_opt.confirm.promotion import Judged
from openpi_opt.result import GuardReport, Ok

# What of a fingerprint a preset carries as its versions.
VERSIONS = ("python", "torch", "triton", "aiter", "openpi_opt", "source_hash")


def of_promotion(
    cfg: Config, judged: Judged, processes: Sequence[Ok], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of a winner: what it is of, where it ran, and what was measured.

    `processes` are the winner's confirmation processes. Percentiles are means over them, the guard
    is that of the process farthest from the reference.
    """
    gpu, git = fingerprint["gpu"], fingerprint["git"]
    return {
        "promoted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_hash": cfg.hash(),
        "lossy": cfg.lossy(),
        "machine": {
            "gpu": gpu and gpu["name"],
            "arch": gpu and gpu["arch"],
            "driver": gpu and gpu["driver"],
            "cpu": fingerprint["cpu"],
        },
        "versions": {name: fingerprint[name] for name in VERSIONS},
        "commit": git and git.removesuffix("-dirty"),
        "clean": None if git is None else not git.endswith("-dirty"),
        "model": cfg.model.model_dump(mode="json"),
        "workload": cfg.workload.model_dump(mode="json"),
        **_latency(judged.winner, processes),
        "guard": _worst_guard(processes),
        "flags": _flags(processes),
        "gain_over_baseline": _gain(judged.winner),
        "spread_between_processes": judged.schedule.tau and round(judged.schedule.tau, 5),
        "promise": judged.schedule.promise and judged.schedule.promise.model_dump(),
    }


def _latency(winner: Confirmed, processes: Sequence[Ok]) -> dict[str, Any]:
    p95, p99 = (
        float(np.mean([getattr(ok.latency, name) for ok in processes]))
        for name in ("p95_ms", "p99_ms")
    )
    return {
        "processes": len(winner.means_ms),
        "mean_ms": round(winner.mean_ms, 4),
        "p95_ms": round(p95, 4),
        "p99_ms": round(p99, 4),
        "std_ms": round(winner.between_std_ms, 4),
        "ci95_ms": [round(bound, 4) for bound in winner.ci95_ms()],
    }


def _gain(winner: Confirmed) -> dict[str, Any] | None:
    gain = winner.gain
    if gain is None:
        return None
    return {
        "verdict": gain.verdict,
        "mean": round(gain.mean, 4),
        "at_least": round(gain.low, 4),
        "confidence": 1 - power.TOTAL_ALPHA,
    }


def _worst_guard(processes: Sequence[Ok]) -> dict[str, Any]:
    """The plain figures of the guard that was farthest from the reference."""

    def distance(guard: GuardReport) -> float:
        return np.inf if guard.rel_l2 is None else guard.rel_l2

    worst = max((ok.guard for ok in processes), key=distance).model_dump(mode="json")
    return {name: value for name, value in worst.items() if isinstance(value, int | float)}


def _flags(processes: Sequence[Ok]) -> dict[str, int]:
    """By check: how many of the processes it flagged."""
    every = [name for ok in processes for name in {flag.partition(":")[0] for flag in ok.flags()}]
    return {name: every.count(name) for name in sorted(set(every))}
