"""A machine without GPU, configurations for it, and results without a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.machine import Machine, TorchBuild
from openpi_opt.process.child import Place
from openpi_opt.result import (
    Check,
    Failed,
    GuardReport,
    Latency,
    Memory,
    Ok,
    Pruned,
    TrialResult,
)

CPU = Machine((), TorchBuild("2.13.0", None, None), "test cpu", cores=2, memory_mib=8000)


def ok(cfg: Config, mean_ms: float, flags: Sequence[str] = ()) -> Ok:
    latency = Latency(
        clock="wall",
        mean_ms=mean_ms,
        std_ms=0.1,
        min_ms=mean_ms,
        p50_ms=mean_ms,
        p95_ms=mean_ms,
        p99_ms=mean_ms,
        ci95_low_ms=mean_ms,
        ci95_high_ms=mean_ms,
        wall_mean_ms=mean_ms,
        noisy=False,
        iterations=10,
        samples_ms=[mean_ms] * 10,
        wall_samples_ms=[mean_ms] * 10,
    )
    guard = GuardReport(
        passed=True, rel_l2=0.0, max_abs=0.0, cosine=1.0, plain_rel_l2=0.0, tolerance=1.0, inputs=3
    )
    return Ok(
        latency=latency,
        throughput_hz=1000 / mean_ms,
        compile_seconds=1.0,
        guard=guard,
        memory=Memory(peak_mib=1.0, device_peak_mib=None, host_peak_mib=1.0),
        kernels=None,
        checks=[Check(name=name, status="flag", detail="as seen") for name in flags],
        **common(cfg),
    )


def pruned(cfg: Config, seen_ms: float) -> Pruned:
    assert cfg.limits.latency_ms is not None
    return Pruned(
        guard=ok(cfg, 1.0).guard,
        reason="surely slower",
        limit_ms=cfg.limits.latency_ms,
        seen_mean_ms=seen_ms,
        seen_low_ms=seen_ms - 1,
        seen_calls=10,
        **common(cfg),
    )


def failed(cfg: Config, outcome: str = "crashed") -> Failed:
    return Failed(outcome=outcome, reason="because", phase="load", **common(cfg))


def common(cfg: Config) -> dict:
    return {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "context_hash": cfg.context_hash(),
        "started_at": "2026-01-01T00:00:00+00:00",
    }


class FakeRun:
    """Stands in for a trial's process: `judge` says how each configuration ends."""

    def __init__(self, judge: Callable[[Config], TrialResult]):
        self.judge = judge
        self.ran: list[Config] = []

    def __call__(
        self,
        cfg: Config,
        trial_dir: Path,
        references: Path,
        on_phase: Callable[[str], None],
        machine: Machine | None = None,
        place: Place | None = None,
    ) -> TrialResult:
        self.ran.append(cfg)
        on_phase("load")
        return self.judge(cfg)
