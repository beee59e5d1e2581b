"""The result of a trial: one JSON document whose outcome decides which fields exist.

A configuration with wrong actions has no latency field at all, so no table, plot or sampler can
take it for a fast one.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from openpi_opt.samples import Samples

Phase = Literal[
    "start",
    "import",
    "queue",
    "load",
    "reference",
    "apply",
    "compile",
    "warmup",
    "guard",
    "wait",
    "measure",
    "profile",
    "energy",
    "ceilings",
    "report",
]
CacheState = Literal["cold", "partly", "warm"]
# Format 2 packs the samples and adds what says how sure a latency is; format 3 has the files that
# the trial imported, hashes without defaults, and what the guard saw of the structure and of the
# timed calls. Earlier ones are read: what they lack has the value None or is empty, and their
# hashes are renewed (`track.identity.renewed`).
SCHEMA_VERSION = 3
FILES_SINCE = 3


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Latency(_Part):
    """Latency of one whole `sample_actions` call in milliseconds, over `samples_ms`.

    `clock` says what was read: device events on a GPU, the wall clock on a CPU. The wall clock is
    kept as well. The intervals hold for this process; the spread between processes is
    not in them. `noisy`: std above 10% of the mean.

    - `ci95_*` bound the mean (Student's t over `effective_samples`, which is less than
      `iterations` where neighbours are alike), `p50_*_ms` the median (order statistics).
    - `rel_ci` is the relative half-width of the wider of the two; `asked_rel_ci` what was asked
      for, None for a fixed number of iterations.
    - `ended` says why there are not more iterations: the interval was expected to be narrow enough
      by then (`interval`), or the time (`seconds`) or number allowed (`iterations`) was used up.
    - `planning_samples_ms` are the calls by which the number of iterations was chosen. No figure
      contains them: a number of iterations chosen by the samples that it reports biases the mean.
    - `looks` says what the run does apart from scattering: "drifting up 3.0% over the run".
    - `upload_ms` is the mean time in which an observation reaches the GPU, measured before each
      call and in no other figure; None on a CPU.
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
    p50_low_ms: float | None = None
    p50_high_ms: float | None = None
    rel_ci: float | None = None
    asked_rel_ci: float | None = None
    effective_samples: float | None = None
    ended: Literal["interval", "seconds", "iterations"] | None = None
    looks: list[str] = Field(default_factory=list)
    wall_mean_ms: float
    upload_ms: float | None = None
    noisy: bool
    iterations: int
    samples_ms: Samples
    wall_samples_ms: Samples
    upload_samples_ms: Samples = Field(default_factory=list)
    planning_samples_ms: Samples = Field(default_factory=list)


class Check(_Part):
    """One rule of measuring, and whether this trial kept it. `ok` and `flag` speak for themselves;
    `unknown` says in `detail` what could not be read."""

    name: str
    status: Literal["ok", "flag", "unknown"]
    detail: str


class GpuState(_Part):
    """What the driver says of the trial's GPU at one moment, while it is busy with the call.

    `throttle_reasons` are the driver's names of what holds the clock down now. `other_processes`
    counts processes on the GPU that are not this one. `not_read` names what has no value here,
    with the reason.
    """

    sm_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    throttle_reasons: list[str] | None = None
    other_processes: int | None = None
    not_read: list[str] = Field(default_factory=list)


class Gpu(_Part):
    """State of the GPU right before and right after the timed iterations. `throttled_ms` is the
    driver's count, between the two, of the time in which thermal or power limits held the clock
    down; None where it does not count."""

    before: GpuState
    after: GpuState
    throttled_ms: dict[str, float] | None = None


class Compilation(_Part):
    """What torch.compile did in this process. `graphs` compiled in all, `recompilations` those of
    code compiled before, `graph_breaks` by reason, `late` graphs compiled after the warm-up, that
    is among the samples."""

    graphs: int
    recompilations: int
    graph_breaks: dict[str, int]
    late: int


class CacheEntries(_Part):
    """Compiled code of the first call: entries found in the caches that trials share, and made."""

    found: int = Field(ge=0)
    compiled: int = Field(ge=0)


class Kernels(_Part):
    """What one inference launched.

    On a GPU `kind` is `device_kernels`; on a CPU there are none, and operator calls are counted
    under their own name. `category_ms` and `stage_ms` are sums of device (or operator) time under
    the profiler, which is slower than the timed run; where kernels overlap, a moment counts for the
    one that began first. `by_stage` counts per stage.

    `counted_on` is `uncaptured` where the replay of a graph hides its kernels (ROCm): then they
    are those of the same call without its graph. `busy_ms` is the time in which at least one
    kernel ran, `idle_ms` the time between the first and the last one in which none did, under the
    profiler; both None on a CPU, `idle_ms` also for `uncaptured`, whose gaps are not the replay's.
    """

    kind: Literal["device_kernels", "operator_calls"]
    total: int
    by_category: dict[str, int]
    by_stage: dict[str, int] = Field(default_factory=dict)
    category_ms: dict[str, float]
    stage_ms: dict[str, float]
    counted_on: Literal["call", "uncaptured"] = "call"
    busy_ms: float | None = None
    idle_ms: float | None = None
    longest_gap_ms: float | None = None


class KernelRow(_Part):
    """One line of the kernel table."""

    name: str
    category: str
    calls: int
    total_ms: float


class TimedReport(_Part):
    """What watching the timed calls showed; see `openpi_opt.guarding.witness`.

    Of `calls` timed calls, each with new content, `compared` were compared with the reference
    (`rel_l2`, the worst; None where not finite) and `repeated` were made again and compared with
    themselves. `problem` says what is wrong. `seed` is that of the contents.

    `masks` says whether masks and prompt lengths were the workload's in all calls (an exact layout
    admits no other), or drawn in `other_masks` of them, which count for no latency. `held_mib` is
    what was kept of the calls in the device's memory, `inputs_mib` what the compared inputs take on
    the host. Results of earlier versions lack these four.
    """

    passed: bool
    calls: int
    compared: int
    rel_l2: float | None
    tolerance: float
    repeated: int
    repeated_rel_l2: float
    seed: int
    problem: str | None = None
    masks: Literal["workload", "drawn"] | None = None
    other_masks: int | None = None
    held_mib: float | None = None
    inputs_mib: float | None = None


class LocalCheck(_Part):
    """A kind of operation without float32 form, against its own rounding written plainly. `rel_l2`
    is the distance of the worst of `calls` calls, `tolerance` what it may be, and `place` where in
    the policy that was."""

    name: str
    place: str
    rel_l2: float | None
    tolerance: float
    calls: int


class StructureReport(_Part):
    """The candidate's structure apart from rounding; see `openpi_opt.guarding.structure`.

    `rel_l2` is the worst distance of its float32 form from the float32 reference, `local` are the
    operations that have no such form, `unchecked` those that nothing but the candidate's own
    precision checks, with the reason. `emulated` are the distances of a lossy candidate's rounding,
    written plainly, by case. `problem` says what is wrong.
    """

    passed: bool
    rel_l2: float | None
    tolerance: float
    case: str
    large_logits_rel_l2: float | None = None
    local: list[LocalCheck] = Field(default_factory=list)
    unchecked: list[str] = Field(default_factory=list)
    emulated: dict[str, float] = Field(default_factory=dict)
    problem: str | None = None


class GuardPower(_Part):
    """What the guard sees with this model, weights and workload, where that was measured.
    `smallest` is the least multiple of its tolerance by which a mutation is caught, `mutation` says
    which, `missed` what the guard cannot see, of `asked` out of `known` mutations (None: all). See
    `openpi_opt.guarding.power`."""

    smallest: float
    mutation: str
    missed: tuple[str, ...] = ()
    asked: int | None = None
    known: int | None = None


class GuardReport(_Part):
    """Distance of the actions from the float32 reference, that of the worst case.

    The worst is the one nearest to, or farthest beyond, its tolerance; `case` names it.
    `plain_rel_l2` is the distance of the plain eager policy in the same precision. `power` is None
    where `python -m openpi_opt.guard` has not measured it. `problem` is what is wrong besides the
    distance. Format 3 adds the last five fields.
    """

    passed: bool
    rel_l2: float | None = Field(description="None when the actions hold NaN or infinity")
    max_abs: float | None
    cosine: float | None
    plain_rel_l2: float
    tolerance: float
    inputs: int
    case: str | None = None
    structure: StructureReport | None = None
    timed: TimedReport | None = None
    power: GuardPower | None = None
    problem: str | None = None


class Memory(_Part):
    """Peak memory of the process in MiB: allocated on the device, and resident on the host."""

    peak_mib: float
    device_peak_mib: float | None
    host_peak_mib: float


class Ceilings(_Part):
    """What a machine can do at most: 1e9 bytes and 1e12 operations a second, by number format.
    `measured` by a copy, a sum and products of matrices on the machine itself, or the vendor's
    figures of the `datasheet`, which no program reaches. `cache_mib` is the last-level cache."""

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
    Without `ceilings` only work is known; the reason is among the notes."""

    ceilings: Ceilings | None
    stages: dict[str, StageRoofline]
    floor_ms: float | None
    fraction: float | None


class Energy(_Part):
    """Energy over `calls` calls in a row, measured apart from the latency.

    `method` is the meter's: a counter (nvml_counter, amdsmi_counter, rapl) or sampled power
    (nvml_samples, amdsmi_samples, hwmon_samples). `joule` is that of one call,
    `inferences_per_joule` counts observations (batch size divided by `joule`), `watt` is the mean
    power of the run, `hz_per_watt` the observations per second of the latency's run for each of
    these watts.
    `idle_watt` was read with the policy loaded and nothing running. `limit_watt` is the power
    limit, and `hz_per_limit_watt` sets the rate against it.
    """

    method: str
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
    """What every result has. `files` are those of this package that the trial imported, with a hash
    of their content; empty where no process was started.
    """

    schema_version: Literal[1, 2, 3] = 3
    config: dict[str, Any]
    config_hash: str
    context_hash: str
    fingerprint: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    started_at: str
    phase_seconds: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class Ok(_Common):
    """The actions are right and the latency was measured.

    `launch_overhead_ms` is the wall time of a call without the time in which the GPU was busy
    (`kernels.busy_ms`): what launching, waiting and gaps cost. None on a CPU and without a profile.
    `compile_seconds` is the first call; `compile_cache` says whether code for it was compiled
    (cold), was in the caches that trials share (warm), or some of both, `cache_entries` how many
    were there and how many not. None: there was none.
    """

    outcome: Literal["ok"] = "ok"
    latency: Latency
    throughput_hz: float
    compile_seconds: float
    compile_cache: CacheState | None = None
    cache_entries: CacheEntries | None = None
    guard: GuardReport
    memory: Memory
    kernels: Kernels | None
    kernel_table: list[KernelRow] = Field(default_factory=list)
    launch_overhead_ms: float | None = None
    compilation: Compilation | None = None
    gpu: Gpu | None = None
    checks: list[Check] = Field(default_factory=list)
    roofline: Roofline | None = None
    energy: Energy | None = None

    def flags(self) -> list[str]:
        """What a reader must know before believing the latency, one text for each flagged check."""
        return [f"{check.name}: {check.detail}" for check in self.checks if check.status == "flag"]


class Pruned(_Common):
    """The actions are right, and the call is surely slower than `limit_ms`, so it was left at that.
    `seen_*` are what the first calls after the warm-up showed. They are too few for a latency. The
    kernels are counted all the same."""

    outcome: Literal["pruned"] = "pruned"
    guard: GuardReport
    reason: str
    limit_ms: float = Field(gt=0, allow_inf_nan=False)
    seen_mean_ms: float = Field(gt=0, allow_inf_nan=False)
    seen_low_ms: float = Field(allow_inf_nan=False)
    seen_calls: int = Field(ge=1)
    kernels: Kernels | None = None
    kernel_table: list[KernelRow] = Field(default_factory=list)
    compile_seconds: float | None = None
    compile_cache: CacheState | None = None
    cache_entries: CacheEntries | None = None


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
    """The trial started and did not end by itself."""

    outcome: Literal["oom", "timeout", "crashed", "error"]
    reason: str
    phase: str
    log_tail: str = ""


TrialResult = Annotated[Ok | Pruned | Wrong | Refused | Failed, Field(discriminator="outcome")]
_ADAPTER: TypeAdapter[Ok | Pruned | Wrong | Refused | Failed] = TypeAdapter(TrialResult)


def parse(document: str | bytes) -> Ok | Pruned | Wrong | Refused | Failed:
    """Read a result; raises `pydantic.ValidationError` on anything that is not one."""
    return _ADAPTER.validate_json(document)


def parse_plain(document: Any) -> Ok | Pruned | Wrong | Refused | Failed:
    """Like `parse`, from already decoded JSON."""
    return _ADAPTER.validate_python(document)


def write_atomic(path: Path, content: str | bytes, replace: bool = True) -> None:
    """Write a file so that a reader sees the old content or the whole new one, never a part.

    Where the file system can, a file that is not finished has no name (O_TMPFILE), and a new one
    gets its own at once: a kill leaves nothing behind.

    Raises:
        FileExistsError: the file is there and `replace` is False. It is left as it is.
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    handle = _open_nameless(path.parent)
    try:
        with open(temporary if handle is None else handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            if handle is not None:
                # `src_dir_fd` makes Python follow the link in /proc (AT_SYMLINK_FOLLOW).
                nameless = f"/proc/self/fd/{handle}"
                try:
                    os.link(nameless, path, src_dir_fd=handle)
                except FileExistsError:
                    if not replace:
                        raise
                    os.link(nameless, temporary, src_dir_fd=handle)
                    os.replace(temporary, path)
            elif not replace:
                os.link(temporary, path)
            else:
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_nameless(folder: Path) -> int | None:
    """A file without a name in `folder`, for writing; None where the file system has none."""
    if not hasattr(os, "O_TMPFILE") or not os.path.exists("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # a file system without, or one whose errors the named file shows, too
        return None


def write(path: Path, result: Ok | Pruned | Wrong | Refused | Failed) -> None:
    """Write one result document atomically."""
    write_atomic(path, result.model_dump_json(indent=1))
