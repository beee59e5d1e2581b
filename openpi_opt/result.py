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
    "start", "load", "reference", "apply", "compile", "warmup", "guard", "measure", "profile"
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
