"""The rules of measuring, each a check with a name in the result.

A trial that breaks one is not refused, and its number is not corrected: it carries the flag
wherever it is shown. Rules of the field's Pi0 work: at least 3 warm-ups and 10 iterations, the
first run in no figure, std under 10% of the mean, 15 minutes to compile, an environment that was
looked at. Rules of measuring GPUs: an SM clock of at least 75% of its peak (nvbench's), nothing
that throttles, nobody else on the GPU. Rules of statistics: `shape.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from openpi_opt.config import MIN_ITERATIONS, MIN_WARMUP
from openpi_opt.measure.shape import findings
from openpi_opt.result import Check, Compilation, Gpu, GpuState, Latency
from openpi_opt.vendor import HOLDING

COMPILE_LIMIT_S = 15 * 60
LEAST_CLOCK = 0.75  # of the peak
LEAST_POWER_LIMIT = 0.99  # of the board's own: a rounded limit is no limit
THROTTLED_SHARE = 0.01  # of the time of the timed calls
WAITING_SHARE = 0.01
# Planning has a margin of chance; an interval slightly too wide needs no remark.
INTERVAL_SLACK = 1.1
_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_SHAPES = {
    "spread": "std at most 10% of the mean",
    "drift": "no drift or step of 1% or more",
    "modes": "one mode",
    "outliers": "no outliers that matter",
    "autocorrelation": "neighbouring calls are nearly independent",
}


def of_latency(latency: Latency, warmup: int, contents: int) -> list[Check]:
    """Counts, interval, and what the samples look like."""
    count = latency.iterations
    checks = [
        _check("warmup", warmup >= MIN_WARMUP, f"{warmup} untimed calls, {MIN_WARMUP} needed"),
        _check("iterations", count >= MIN_ITERATIONS, f"{count}, {MIN_ITERATIONS} needed"),
        _check("inputs", contents >= count, f"{contents} calls, each with content of its own"),
    ]
    if latency.rel_ci is not None and latency.asked_rel_ci is not None:
        narrow = latency.rel_ci <= INTERVAL_SLACK * latency.asked_rel_ci
        detail = (
            f"±{latency.rel_ci:.2%} after {count} iterations, ±{latency.asked_rel_ci:.2%} asked"
        )
        if not narrow and latency.ended != "interval":
            detail += f", measure.max_{latency.ended} reached"
        checks.append(_check("interval", narrow, detail))
    inefficiency = count / (latency.effective_samples or count)
    samples = np.asarray(latency.samples_ms)
    found: dict[str, str] = {f.kind: f.text for f in findings(samples, inefficiency)}
    checks += [_check(kind, kind not in found, found.get(kind, _SHAPES[kind])) for kind in _SHAPES]
    return checks


def of_start(first_call_seconds: float, compilation: Compilation | None) -> list[Check]:
    """What happens once: the first call with its compilation, and compilation after that."""
    checks = [
        _check("first_run", True, f"took {first_call_seconds:.3g} s, in no figure"),
        _check(
            "compile_time",
            first_call_seconds <= COMPILE_LIMIT_S,
            f"{first_call_seconds:.0f} s to the first action, {COMPILE_LIMIT_S} s at most",
        ),
    ]
    if compilation is not None:
        late, breaks = compilation.late, sum(compilation.graph_breaks.values())
        detail = (
            f"{compilation.graphs} graphs, {compilation.recompilations} recompiled, "
            f"{breaks} graph breaks, {late} after the warm-up"
        )
        good = late == 0 and compilation.recompilations == 0 and breaks == 0
        checks.append(_check("compilation", good, detail))
    return checks


def of_gpu(gpu: Gpu, measured_ms: float, standing: int = 0) -> list[Check]:
    """Clock, throttling, power limit and neighbours, before and after `measured_ms` of calls.

    Of the other processes on the GPU `standing` are trials that stand still for this one.
    """
    states = {"before": gpu.before, "after": gpu.after}
    return [
        _read(states, "gpu_clock", ("sm_clock_mhz", "max_sm_clock_mhz"), _slow_clock),
        _throttling(gpu, states, measured_ms),
        _read(
            states, "gpu_power_limit", ("power_limit_w", "default_power_limit_w"), _lowered_limit
        ),
        _read(states, "gpu_shared", ("other_processes",), partial(_neighbours, standing)),
    ]


class HostWait:
    """How long the calling thread was ready to run and had no core: somebody else had it."""

    def __init__(self, schedstat: Path = _SCHEDSTAT):
        self._path = schedstat
        self._began = self._read()

    def check(self, seconds: float) -> Check:
        """Compare the wait since this object was made with the time that passed."""
        name, now = "host_shared", self._read()
        if isinstance(now, str) or isinstance(self._began, str):
            return Check(name=name, status="unknown", detail=f"not read: {now}")
        share = (now - self._began) / 1e9 / seconds
        return _check(
            name, share <= WAITING_SHARE, f"kept waiting for a core for {share:.1%} of the time"
        )

    def _read(self) -> int | str:
        """Nanoseconds; field 2 of Documentation/scheduler/sched-stats.rst."""
        try:
            return int(self._path.read_text(encoding="ascii").split()[1])
        except (OSError, IndexError) as error:
            return str(error)


def _check(name: str, good: bool, detail: str) -> Check:
    return Check(name=name, status="ok" if good else "flag", detail=detail)


def _read(
    states: dict[str, GpuState],
    name: str,
    needed: tuple[str, ...],
    judge: Callable[[GpuState], tuple[bool, str]],
) -> Check:
    """Judge both states; where a value is missing the check is unknown, with the reason."""
    for state in states.values():
        reasons = [text for text in state.not_read if text.split(":")[0] in needed]
        if reasons:
            return Check(name=name, status="unknown", detail=f"not read: {reasons[0]}")
    judged = {when: judge(state) for when, state in states.items()}
    detail = ", ".join(f"{text} {when}" for when, (_, text) in judged.items())
    return _check(name, all(good for good, _ in judged.values()), detail)


def _slow_clock(state: GpuState) -> tuple[bool, str]:
    clock, peak = state.sm_clock_mhz or 0.0, state.max_sm_clock_mhz or 0.0
    text = f"{clock:.0f} of {peak:.0f} MHz"
    return clock >= LEAST_CLOCK * peak, text


def _lowered_limit(state: GpuState) -> tuple[bool, str]:
    limit, default = state.power_limit_w or 0.0, state.default_power_limit_w or 0.0
    return limit >= LEAST_POWER_LIMIT * default, f"{limit:.0f} of {default:.0f} W"


def _neighbours(standing: int, state: GpuState) -> tuple[bool, str]:
    others = state.other_processes or 0
    still = f" ({standing} trials stand still)" if standing else ""
    return others <= standing, f"{others} other process(es){still}"


def _throttling(gpu: Gpu, states: dict[str, GpuState], measured_ms: float) -> Check:
    """Reasons at either moment, and the driver's count of the time between them."""

    def judge(state: GpuState) -> tuple[bool, str]:
        reasons = state.throttle_reasons or []
        return not HOLDING & set(reasons), " and ".join(reasons) or "nothing"

    check = _read(states, "gpu_throttle", ("throttle_reasons",), judge)
    thermal = (gpu.throttled_ms or {}).get("thermal", 0.0)
    if thermal > THROTTLED_SHARE * measured_ms:
        detail = f"{check.detail}; for {thermal:.0f} of {measured_ms:.0f} ms by heat"
        return Check(name=check.name, status="flag", detail=detail)
    return check
