"""The result of a trial: one JSON document whose outcome decides which fields exist.

A configuration with wrong actions has no latency field at all, so no table, plot or sampler can
take it for a fast one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Outcome = Literal["ok", "wrong", "unavailable", "invalid", "oom", "timeout", "crashed", "error"]
Phase = Literal[
    "start",
    "load",
    "reference",
    "apply",
    "compile",
    "warmup",
    "guard",
    "measure",
    "profile",
    "energy",
    "ceilings",
]
SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Latency(_Part):
    """Latency of one whole `sample_actions` call in milliseconds, over `samples_ms`.

    `clock` says what was read: device events on a GPU, the wall clock on a CPU. The wall clock is
    kept beside device events. `ci95_*` bound the mean (Student's t over the iterations of this
    process; the spread between processes is not in it). `noisy`: std above 10% of the mean.
    """

    clock: Literal["device_events", "wall"]
    mean_ms: float = Field(gt=0, allow_inf_nan=False)
    std_ms: float = Field(ge=0, allow_inf_nan=False)
    min_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    ci95_low_ms: float
    ci95_high_ms: float
    wall_mean_ms: float
    noisy: bool
    iterations: int
    samples_ms: list[float]
    wall_samples_ms: list[float]


class Kernels(_Part):
    """What one inference launched.

    On a GPU `kind` is `device_kernels`; on a CPU there are none, and operator calls are counted
    under their own name. `category_ms` and `stage_ms` are sums of device (or operator) time under
    the profiler, which is slower than the timed run.
    """

    kind: Literal["device_kernels", "operator_calls"]
    total: int
    by_category: dict[str, int]
    category_ms: dict[str, float]
    stage_ms: dict[str, float]


class KernelRow(_Part):
    """One line of the kernel table."""

    name: str
    category: str
    calls: int
    total_ms: float


class GuardReport(_Part):
    """Distance of the actions from the float32 reference, the worst over the inputs.

    `plain_rel_l2` is the distance of the plain eager policy in the same precision.
    """

    passed: bool
    rel_l2: float | None = Field(description="None when the actions hold NaN or infinity")
    max_abs: float | None
    cosine: float | None
    plain_rel_l2: float
    tolerance: float
    inputs: int


class Memory(_Part):
    """Peak memory of the process in MiB: allocated on the device, and resident on the host."""

    peak_mib: float
    device_peak_mib: float | None
    host_peak_mib: float


class Ceilings(_Part):
    """What a machine can do at most: 1e9 bytes and 1e12 operations a second, by number format.

    `measured` by a copy, a sum and products of matrices on the machine itself, or the vendor's
    figures of the `datasheet`, which no program reaches. `cache_mib` is the last-level cache.
    """

    source: Literal["measured", "datasheet"]
    device: str
    bandwidth_gb_s: float = Field(gt=0, allow_inf_nan=False)
    tflops: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    cache_mib: float = Field(ge=0, allow_inf_nan=False)


class StageRoofline(_Part):
    """Work of one stage in one call, and its floor; see `openpi_opt.measure.roofline`.

    `measured_ms` is the stage's busy time under the profiler, `fraction` the floor divided by it.
    """

    operations: dict[str, float]
    bytes: float
    floor_ms: float | None
    bound: Literal["memory", "compute"] | None
    measured_ms: float | None
    fraction: float | None


class Roofline(_Part):
    """How near the call is to the machine's limit: `fraction` is floor divided by mean latency.

    Without `ceilings` only work is known; the reason is among the notes.
    """

    ceilings: Ceilings | None
    stages: dict[str, StageRoofline]
    floor_ms: float | None
    fraction: float | None


class Energy(_Part):
    """Energy over `calls` calls in a row, measured apart from the latency.

    `joule` is that of one call, `inferences_per_joule` counts observations (batch size divided by
    `joule`), `watt` is the mean power of the run, `hz_per_watt` the observations per second of the
    latency's run for each of these watts. `idle_watt` was read with the policy loaded and nothing
    running. `limit_watt` is the power limit, and `hz_per_limit_watt` sets the rate against it.
    """

    method: Literal["nvml_counter", "nvml_samples", "amdsmi_counter", "hwmon_samples", "rapl"]
    seconds: float = Field(gt=0)
    calls: int = Field(ge=1)
    joule: float = Field(gt=0, allow_inf_nan=False)
    inferences_per_joule: float
    watt: float = Field(gt=0)
    hz_per_watt: float
    idle_watt: float | None
    limit_watt: float | None
    hz_per_limit_watt: float | None


class _Common(_Part):
    schema_version: Literal[1] = 1
    config: dict[str, Any]
    config_hash: str
    context_hash: str
    fingerprint: dict[str, Any] = Field(default_factory=dict)
    started_at: str
    phase_seconds: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class Ok(_Common):
    """The actions are right and the latency was measured."""

    outcome: Literal["ok"] = "ok"
    latency: Latency
    throughput_hz: float
    compile_seconds: float
    guard: GuardReport
    memory: Memory
    kernels: Kernels | None
    kernel_table: list[KernelRow] = Field(default_factory=list)
    roofline: Roofline | None = None
    energy: Energy | None = None


class Wrong(_Common):
    """The actions differ from the reference's: recorded, never timed."""

    outcome: Literal["wrong"] = "wrong"
    guard: GuardReport
    reason: str


class Refused(_Common):
    """Not run: this machine lacks something, or options contradict each other."""

    outcome: Literal["unavailable", "invalid"]
    reason: str


class Failed(_Common):
    """Started and did not come to an end of its own."""

    outcome: Literal["oom", "timeout", "crashed", "error"]
    reason: str
    phase: str
    log_tail: str = ""


TrialResult = Annotated[Ok | Wrong | Refused | Failed, Field(discriminator="outcome")]
_ADAPTER: TypeAdapter[Ok | Wrong | Refused | Failed] = TypeAdapter(TrialResult)


def parse(document: str | bytes) -> Ok | Wrong | Refused | Failed:
    """Read a result; raises `pydantic.ValidationError` on anything that is not one."""
    return _ADAPTER.validate_json(document)


def parse_plain(document: Any) -> Ok | Wrong | Refused | Failed:
    """Like `parse`, from already decoded JSON."""
    return _ADAPTER.validate_python(document)


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write(path: Path, result: Ok | Wrong | Refused | Failed) -> None:
    """Write one result document atomically."""
    write_atomic(path, result.model_dump_json(indent=1))
