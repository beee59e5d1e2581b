"""Results and records for the tests of this folder."""

from typing import Any, Literal

from openpi_opt.config import Config
from openpi_opt.machine import Gpu as MachineGpu
from openpi_opt.machine import Machine, TorchBuild
from openpi_opt.result import (
    Ceilings,
    Check,
    Compilation,
    Energy,
    Failed,
    Gpu,
    GpuState,
    GuardReport,
    KernelRow,
    Kernels,
    Latency,
    Memory,
    Ok,
    Refused,
    Roofline,
    StageRoofline,
    Wrong,
)
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Record, Role

CPU = Machine((), TorchBuild("2.13.0+cpu", None, None), "AMD EPYC", 2, 24_000)
H100 = Machine(
    (MachineGpu(0, "GPU-abc", "NVIDIA H100", "nvidia", "sm90", 81_000, "570.1"),),
    TorchBuild("2.13.0+cu130", "13.0", None),
    "Intel Xeon",
    16,
    128_000,
)
FINGERPRINT = fingerprint(CPU)
ENERGY = Energy(
    method="nvml_counter",
    seconds=3.0,
    calls=100,
    joule=5.0,
    inferences_per_joule=0.8,
    watt=500.0,
    hz_per_watt=0.25,
    idle_watt=90.0,
    limit_watt=700.0,
    hz_per_limit_watt=0.2,
)


def config(**overrides: Any) -> Config:
    raw = {
        "model": {"name": "pi0_mini"},
        "platform": {"device": "cpu"},
        "workload": {"name": "seed_b1"},
    }
    return Config.parse({**raw, **overrides})


def common(cfg: Config, fp: dict[str, Any] = FINGERPRINT) -> dict[str, Any]:
    return {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "context_hash": cfg.context_hash(),
        "fingerprint": fp,
        "started_at": "2026-01-02T03:04:05.000+00:00",
        "phase_seconds": {"load": 1.5, "warmup": 0.25},
    }


def latency(mean_ms: float, noisy: bool = False) -> Latency:
    return Latency(
        clock="wall",
        mean_ms=mean_ms,
        std_ms=0.5,
        min_ms=mean_ms - 1,
        p50_ms=mean_ms,
        p95_ms=mean_ms + 1,
        p99_ms=mean_ms + 2,
        ci95_low_ms=mean_ms - 0.25,
        ci95_high_ms=mean_ms + 0.25,
        wall_mean_ms=mean_ms,
        noisy=noisy,
        iterations=10,
        samples_ms=[mean_ms] * 10,
        wall_samples_ms=[mean_ms] * 10,
        p50_low_ms=mean_ms - 0.5,
        p50_high_ms=mean_ms + 0.5,
        rel_ci=0.05,
        asked_rel_ci=0.005,
        effective_samples=8.5,
        ended="seconds",
        upload_ms=0.25,
        upload_samples_ms=[0.25] * 10,
        planning_samples_ms=[mean_ms] * 10,
    )


def guard(passed: bool = True) -> GuardReport:
    return GuardReport(
        passed=passed,
        rel_l2=0.002,
        max_abs=0.01,
        cosine=0.9999,
        plain_rel_l2=0.001,
        tolerance=0.004,
        inputs=3,
    )


def kernels(kind: Literal["device_kernels", "operator_calls"] = "operator_calls") -> Kernels:
    return Kernels(
        kind=kind,
        total=321,
        by_category={"gemm": 300, "attention": 21},
        by_stage={"vision": 100, "denoise": 221},
        category_ms={"gemm": 9.0},
        stage_ms={"vision": 2.0, "denoise": 7.0},
        **({} if kind == "operator_calls" else {"busy_ms": 9.0, "idle_ms": 0.5}),
    )


def gpu_readings() -> Gpu:
    state = GpuState(sm_clock_mhz=1200, max_sm_clock_mhz=1980, temperature_c=60, other_processes=0)
    return Gpu(before=state, after=state, throttled_ms={"thermal": 0.0})


CHECKS = [
    Check(name="warmup", status="ok", detail="5 untimed calls, 3 needed"),
    Check(name="gpu_clock", status="flag", detail="1200 of 1980 MHz before"),
    Check(name="gpu_throttle", status="unknown", detail="not read: NVML: Not Supported"),
]


def ok(
    mean_ms: float = 10.0,
    cfg: Config | None = None,
    kind: Literal["device_kernels", "operator_calls"] = "operator_calls",
    noisy: bool = False,
    fp: dict[str, Any] = FINGERPRINT,
) -> Ok:
    return Ok(
        **common(cfg or config(), fp),
        latency=latency(mean_ms, noisy),
        throughput_hz=1000 / mean_ms,
        compile_seconds=3.0,
        guard=guard(),
        memory=Memory(peak_mib=900.0, device_peak_mib=None, host_peak_mib=900.0),
        kernels=kernels(kind),
        launch_overhead_ms=None if kind == "operator_calls" else 1.0,
        compilation=Compilation(graphs=3, recompilations=0, graph_breaks={"print": 2}, late=0),
        gpu=None if kind == "operator_calls" else gpu_readings(),
        checks=CHECKS,
        kernel_table=[KernelRow(name="aten::mm", category="gemm", calls=300, total_ms=9.0)],
    )


def roofline(source: Literal["measured", "datasheet"] = "measured") -> Roofline:
    """Floors of 1 and 3 ms in a call of 10 ms; nothing is known of the prefill's time."""

    def stage(floor_ms: float, measured_ms: float | None) -> StageRoofline:
        return StageRoofline(
            operations={"bfloat16": 1e9},
            bytes=1e6,
            floor_ms=floor_ms,
            bound="compute",
            measured_ms=measured_ms,
            fraction=measured_ms and floor_ms / measured_ms,
        )

    ceilings = Ceilings(
        source=source, device="x", bandwidth_gb_s=10, tflops={"bfloat16": 1}, cache_mib=32
    )
    stages = {"vision": stage(1.0, 4.0), "prefill": stage(3.0, None)}
    return Roofline(ceilings=ceilings, stages=stages, floor_ms=4.0, fraction=0.4)


def wrong(cfg: Config | None = None) -> Wrong:
    return Wrong(**common(cfg or config()), guard=guard(False), reason="rel_l2 0.2 above 0.004")


def refused(reason: str = "aiter is missing", cfg: Config | None = None) -> Refused:
    return Refused(**common(cfg or config()), outcome="unavailable", reason=reason)


def failed(reason: str = "killed by signal 9", cfg: Config | None = None) -> Failed:
    return Failed(**common(cfg or config()), outcome="crashed", reason=reason, phase="compile")


def record(
    result: Ok | Wrong | Refused | Failed | None = None,
    role: Role = "trial",
    study: str = "s",
    number: int = -1,
    params: dict[str, str] | None = None,
    trial_dir: str | None = None,
) -> Record:
    result = result or ok()
    return Record(
        study=study,
        number=number,
        role=role,
        params=params or {},
        labels=Config.load(result.config).labels(),
        result=result,
        trial_dir=trial_dir,
        fingerprint_hash=fingerprint_hash(result.fingerprint),
    )
