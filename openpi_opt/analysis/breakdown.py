"""Where the time of a trace goes: stages, categories, kernels, and the gaps between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openpi_opt.analysis.pattern import DENOISE, STAGES, STEPS, Pattern, categories, find_pattern
from openpi_opt.analysis.trace_file import read_trace
from openpi_opt.measure.categories import CATEGORIES, categorise
from openpi_opt.measure.trace import OUTSIDE, ProfileError, Recording, Timeline

GAP_BOUNDS_US = (0.0, 2.0, 5.0, 10.0, 50.0, 1000.0)
"""Lower bounds of the classes of gaps. A device needs 1 to 5 us between dependent kernels."""
_LONGEST_GAPS = 5
_TOUCHING_US = 0.005
"""Traces are written with three decimals, and large numbers of microseconds lose the last one."""
_MOSTLY = 0.5
# Kernels at either end of a trace that are farther from the rest than both of these are strays.
_MOST_STRAYS, _STRAY_US, _STRAY_SPANS = 3, 1e7, 100.0


@dataclass(frozen=True)
class Part:
    """Some of the launches: how many, and the sum of their times in milliseconds."""

    launches: int
    ms: float


@dataclass(frozen=True)
class KernelTotal:
    """All launches of one name."""

    name: str
    category: str
    launches: int
    ms: float


@dataclass(frozen=True)
class Gap:
    """A time in which nothing ran, `at_ms` after the first launch."""

    at_ms: float
    us: float
    after: str
    before: str


@dataclass(frozen=True)
class GapClass:
    """Gaps longer than `above_us`, up to the next class."""

    above_us: float
    gaps: int
    ms: float


@dataclass(frozen=True)
class Breakdown:
    """One trace. Sums are over the whole trace, whatever the number of `inferences`.

    `total_ms` is the sum of the launches' times, `busy_ms` the time in which at least one ran,
    `span_ms` from the first start to the last end; `idle_ms` is the difference of the last two.
    `stages` is empty where none could be told; else the stages sum to `total_ms`.
    """

    file: str
    kind: Literal["device_kernels", "operator_calls"]
    events: int
    launches: int
    inferences: int | None
    steps: int | None
    total_ms: float
    busy_ms: float
    span_ms: float
    idle_ms: float
    stages_from: Literal["markers", "pattern"] | None
    stages: dict[str, Part]
    categories: dict[str, Part]
    stage_categories: dict[str, dict[str, Part]]
    kernels: list[KernelTotal]
    gaps: list[GapClass]
    longest_gaps: list[Gap]
    notes: list[str] = field(default_factory=list)


def analyse(path: Path) -> Breakdown:
    """Read a trace file and break its time down. Raises ProfileError: it cannot be read, is
    damaged, or has no kernel and no operator call."""
    recording = read_trace(path)
    return break_down(recording, path.name)


def break_down(recording: Recording, file: str) -> Breakdown:
    """The breakdown of a recording: of its kernels, or of its operator calls if it has no kernel.
    Raises ProfileError: it has neither."""
    timeline, kind = recording.kernels(), "device_kernels"
    if not len(timeline):
        timeline, kind = recording.operators(), "operator_calls"
    if not len(timeline):
        raise ProfileError(
            f"none of its {recording.events} events is a kernel (category kernel or gpu, with a "
            "start and a duration) or an operator call (category cpu_op)"
        )
    notes: list[str] = []
    timeline = _without_strays(timeline, notes)
    names, stage, source, found = _stages(recording, timeline, notes)
    inferences, steps = _counts(recording, source, found, notes)
    total = float(timeline.duration_us.sum())
    span = float((timeline.start_us + timeline.duration_us).max() - timeline.start_us[0])
    rest = timeline.gaps_us()
    rest = np.where(rest > _TOUCHING_US, rest, 0.0)
    busy = max(span - float(rest.sum()), 0.0)
    _note_the_rest(recording, timeline, kind, total - busy, notes)
    category = categories(timeline)
    return Breakdown(
        file=file,
        kind="device_kernels" if kind == "device_kernels" else "operator_calls",
        events=recording.events,
        launches=len(timeline),
        inferences=inferences,
        steps=steps,
        total_ms=total / 1e3,
        busy_ms=busy / 1e3,
        span_ms=span / 1e3,
        idle_ms=max(span - busy, 0.0) / 1e3,
        stages_from=source,
        stages=_parts(timeline, stage, names),
        categories=_parts(timeline, category, list(CATEGORIES)),
        stage_categories={
            name: _parts(timeline, np.where(stage == i, category, -1), list(CATEGORIES))
            for i, name in enumerate(names)
        },
        kernels=_kernels(timeline),
        gaps=_classes(rest[rest > 0]),
        longest_gaps=_longest(timeline, rest),
        notes=notes,
    )


Source = Literal["markers", "pattern"]


def _without_strays(timeline: Timeline, notes: list[str]) -> Timeline:
    """Without kernels whose timestamp is far from all others: a recorder's mistake, noted."""
    start = timeline.start_us
    for drop in range(1, min(_MOST_STRAYS, len(start) // 4) + 1):
        for kept in (slice(drop, None), slice(None, -drop)):
            left = start[kept]
            span = float(left[-1] - left[0])
            gap = float(start[drop] - start[drop - 1] if kept.start else start[-drop] - left[-1])
            if gap > max(_STRAY_US, _STRAY_SPANS * span):
                notes.append(
                    f"{drop} kernel(s) with a timestamp {gap / 1e6:,.1f} s away from all others "
                    "set aside."
                )
                return _without_strays(timeline.rows(kept), notes)
    return timeline


def _stages(
    recording: Recording, timeline: Timeline, notes: list[str]
) -> tuple[list[str], NDArray[np.int64], Source | None, Pattern | None]:
    """Names of stages and the stage of each launch: from markers, else from the pattern."""
    of_markers = timeline.stages, timeline.stage
    lost = int(np.count_nonzero(timeline.stage < 0))
    outside = 1.0
    if recording.has_markers and not lost:
        is_outside = timeline.stage == timeline.stages.index(OUTSIDE)
        outside = float(timeline.duration_us[is_outside].sum() / (timeline.duration_us.sum() or 1))
        if outside <= _MOSTLY:
            return *_used(*of_markers), "markers", None
    found = find_pattern(timeline)
    if found is not None:
        if recording.has_markers:
            what = (
                f"{lost} launches have no call in the trace"
                if lost
                else f"{outside:.0%} of the time was launched outside of them, as replays are"
            )
            notes.append(f"Markers were not used: {what}.")
        return *_used(STAGES, found.stage), "pattern", found
    if recording.has_markers and not lost:
        return *_used(*of_markers), "markers", None
    notes.append(
        "No stages: there are no markers, and the kernels do not repeat like layers and steps."
        if not recording.has_markers
        else f"No stages: {lost} launches have no call in the trace, and the kernels do not repeat."
    )
    return [], np.full(len(timeline), -1), None, None


def _used(names: list[str], stage: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Stages that occur, in the order of an inference, those of no policy behind."""
    order = [n for n in STAGES if n in names] + [n for n in names if n not in STAGES]
    kept = [name for name in order if np.any(stage == names.index(name))]
    renumbered = np.full(len(stage), -1)
    for number, name in enumerate(kept):
        renumbered[stage == names.index(name)] = number
    return kept, renumbered


def _counts(
    recording: Recording, source: Source | None, found: Pattern | None, notes: list[str]
) -> tuple[int | None, int | None]:
    """How many inferences, and how many denoising steps each."""
    if source == "markers":
        inferences = recording.marked("prefill")
        each = recording.marked(DENOISE) // inferences if inferences else None
        return inferences or None, each
    if found is None:
        return None, None
    visible = Counter(inference.describe() for inference in found.inferences)
    for what, times in visible.items():
        notes.append(f"Visible{f' {times} times' if times > 1 else ''}: {what}.")
    whole = [inference for inference in found.inferences if inference.complete]
    if len(whole) < len(found.inferences):
        notes.append(
            "Not all of this is a whole inference of the full model (27 layers of vision, 18 of "
            f"prefill, {STEPS} steps of 18): a part is missing in the trace, or the model is "
            "another."
        )
    steps = {
        len(inference.denoise) if len({run.layers for run in inference.denoise}) == 1 else None
        for inference in whole or found.inferences
    }
    return len(found.inferences), steps.pop() if len(steps) == 1 else None


def _note_the_rest(
    recording: Recording, timeline: Timeline, kind: str, overlap_us: float, notes: list[str]
) -> None:
    if kind == "operator_calls":
        notes.append("No kernels in the trace: these are operator calls on the host.")
        if recording.has_generated_loops():
            notes.append("Loops that Inductor generated are no operator calls and are missing.")
        return
    lost = recording.lost_launches()
    if lost:
        notes.append(f"Counts are too low: {lost} launches have no kernel in the trace.")
    devices = len(np.unique(timeline.lane))
    if devices > 1:
        notes.append(f"Kernels of {devices} devices: idle is where none of them works.")
    rest = timeline.start_us[1:] - (timeline.start_us + timeline.duration_us)[:-1]
    touching = np.count_nonzero(np.abs(rest) <= _TOUCHING_US)
    if touching > _MOSTLY * len(rest) > 0:
        notes.append(
            f"{touching} of {len(rest)} kernels begin exactly where the one before ends, which no "
            "device does: the recorder closed the gaps, so idle time is not in this trace."
        )
    if overlap_us > 1e-3 * float(timeline.duration_us.sum()):
        notes.append(f"Kernels overlap for {overlap_us / 1e3:.3f} ms: the sums count this twice.")


def _parts(timeline: Timeline, group: NDArray[np.int64], names: list[str]) -> dict[str, Part]:
    chosen = group >= 0
    launches = np.bincount(group[chosen], minlength=len(names))
    us = np.bincount(group[chosen], timeline.duration_us[chosen], minlength=len(names))
    return {name: Part(int(launches[i]), float(us[i]) / 1e3) for i, name in enumerate(names)}


def _kernels(timeline: Timeline) -> list[KernelTotal]:
    """One row per name, the one with the most time first."""
    rows = [
        KernelTotal(name, categorise(name), part.launches, part.ms)
        for name, part in _parts(timeline, timeline.name, timeline.names).items()
        if part.launches
    ]
    return sorted(rows, key=lambda row: (-row.ms, row.name))


def _classes(us: NDArray[np.float64]) -> list[GapClass]:
    bounds = np.array(GAP_BOUNDS_US)
    group = np.searchsorted(bounds, us, side="left") - 1
    return [
        GapClass(float(bound), int(np.count_nonzero(group == i)), float(us[group == i].sum()) / 1e3)
        for i, bound in enumerate(bounds)
    ]


def _longest(timeline: Timeline, rest: NDArray[np.float64]) -> list[Gap]:
    """The longest of the gaps; `rest[i]` is the time between rows i and i + 1."""
    rows = [i for i in np.argsort(-rest, kind="stable")[:_LONGEST_GAPS] if rest[i] > 0]
    return [
        Gap(
            at_ms=float(timeline.start_us[i + 1] - rest[i] - timeline.start_us[0]) / 1e3,
            us=float(rest[i]),
            after=timeline.names[timeline.name[i]],
            before=timeline.names[timeline.name[i + 1]],
        )
        for i in rows
    ]
