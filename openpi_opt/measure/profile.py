"""What one inference launches: kernels on a GPU, operator calls on a CPU, by category and stage.

`profile_call` records one call with torch.profiler and reads the Chrome trace that it exports, the
same file that a user can open in Perfetto; `trace.py` says what counts.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile, schedule

from openpi_opt.machine import Device
from openpi_opt.measure.categories import CATEGORIES, categorise
from openpi_opt.measure.clock import synchronise
from openpi_opt.measure.trace import (
    OUTSIDE,
    ProfileError,
    Recording,
    Timeline,
    TraceEvent,
    stage_by_sequence,
)
from openpi_opt.result import KernelRow, Kernels
from openpi_opt.vendor import BY_DEVICE

T = TypeVar("T")

_NO_MARKERS = "No stages: no marker was recorded; graph replay and torch.compile leave them out."
_GENERATED_LOOPS = (
    "Loops that Inductor generated are not operator calls: neither counts nor times of operators "
    "include them."
)
_COUNTED_WITHOUT_GRAPH = (
    "Kernels were counted on the same call without its graph: here the replay hides them."
)
_HIDDEN_REPLAY = (
    "Counts may be too low: on ROCm the replay of a graph can hide its kernels, and Inductor's own "
    "capture cannot be left out to compare."
)


@dataclass(frozen=True)
class Profile:
    """Totals, the kernel table (longest first), the launches in order of their start, and remarks.

    `notes` says, one sentence each, what is missing or not exact, and why; it belongs beside the
    figures wherever they are shown.
    """

    kernels: Kernels
    table: list[KernelRow]
    timeline: Timeline
    notes: list[str]


@dataclass(frozen=True)
class Work:
    """What one call launched, and how long that kept a GPU busy; on a CPU the time is 0."""

    launches: int
    busy_ms: float

    def __str__(self) -> str:
        if self.busy_ms == 0.0:
            return f"{self.launches} operations"
        return f"{self.launches} kernels in {self.busy_ms:.3f} ms"


def work(call: Callable[[T], object], inputs: T, device: torch.device) -> Work:
    """Count the kernels of one call, or on a CPU its operators.

    Where a GPU shows no kernel (ROCm hides those of a graph) the time is that of the wall's clock.
    """
    if device.type == "cpu":
        with autograd_profiler.profile(use_kineto=True) as recorder:
            call(inputs)
        return Work(len(recorder.kineto_results.events()), 0.0)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start_ns = time.perf_counter_ns()
        call(inputs)
        torch.cuda.synchronize(device)
        wall_ns = time.perf_counter_ns() - start_ns
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    spent_ns = [
        event.duration_ns()
        for event in results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return Work(len(spent_ns), (sum(spent_ns) or wall_ns) / 1e6)


def profile_call(
    call: Callable[[T], object],
    inputs: T,
    device: Device,
    trace_path: Path | None = None,
    uncaptured: Callable[[T], object] | None = None,
    recorded: Callable[[], None] = lambda: None,
) -> Profile:
    """Profile one inference of a call that is warm already (compiled, captured).

    The second of two runs is recorded. A replayed graph has no markers: with `uncaptured`, the same
    call without its graph, stages are those of the same kernels there. On ROCm the profiler may not
    show the kernels of a replay: then counts and times are those of `uncaptured`, and a note says
    so. After all calls `recorded` is called; what follows takes seconds without the device.
    `trace_path` receives the Chrome trace of the call itself, gzipped.

    Raises ProfileError: no kernel or operator call was recorded.
    """
    with tempfile.TemporaryDirectory() as folder:
        own, plain = Path(folder) / "trace.json", Path(folder) / "uncaptured.json"
        _record(call, inputs, device, own)
        if uncaptured is call:  # its own trace has the stages, or nothing has
            uncaptured = None
        if uncaptured is not None:
            _record(uncaptured, inputs, device, plain)
        recorded()
        if trace_path is not None:
            _compress(own, trace_path)
        events, without = _events(own), None if uncaptured is None else _events(plain)
    if BY_DEVICE[device].replay_hides_kernels and Recording.of(events).replays_graph():
        return profile_of_replay_on_rocm(events, without)
    found = profile_of(events, device)
    if found.kernels.stage_ms or without is None:
        return found
    return with_stages_of(found, profile_of(without, device))


def call_for_tool(call: Callable[[T], object], inputs: T, device: Device) -> None:
    """One call for a profiler around this process, marked for CUDA's tools."""
    if device == "cuda":
        import torch

        torch.cuda.profiler.start()
        call(inputs)
        synchronise(device)
        torch.cuda.profiler.stop()
    else:
        call(inputs)
        synchronise(device)


def keep_generated_code(target: Path) -> list[str]:
    """Pack what Inductor generated in this process into `target`; returns what to say of it."""
    cache = sys.modules.get("torch._inductor.codecache")
    modules = cache.PyCodeCache.modules if cache is not None else []
    sources = sorted({str(module.__file__) for module in modules})
    if not sources:
        return []
    with tarfile.open(target, "w:gz") as archive:
        for source in sources:
            archive.add(source, arcname=Path(source).name)
    return [f"What Inductor generated is in {target.name}: {len(sources)} modules."]


def profile_of_replay_on_rocm(
    events: Sequence[TraceEvent], without_graph: Sequence[TraceEvent] | None
) -> Profile:
    """The profile of a call on ROCm that replays a graph, whose kernels its trace may lack.

    `without_graph` is the trace of the same call without its graph: what it shows and the replay
    does not, the replay hides.

    Raises ProfileError: there is nothing to count them on, or it recorded nothing.
    """
    if without_graph is None or Recording.of(without_graph).replays_graph():
        # Inductor's own capture: the call without it cannot be had in this process.
        found = profile_of(events, "rocm")
        return replace(found, notes=[*found.notes, _HIDDEN_REPLAY])
    reference = profile_of(without_graph, "rocm")
    if len(Recording.of(events).kernels()) >= reference.kernels.total:
        return with_stages_of(profile_of(events, "rocm"), reference)
    kernels = reference.kernels.model_copy(
        # The gaps of a call without its graph say nothing of the replay's.
        update={"counted_on": "uncaptured", "idle_ms": None, "longest_gap_ms": None}
    )
    return replace(reference, kernels=kernels, notes=[*reference.notes, _COUNTED_WITHOUT_GRAPH])


def profile_of(events: Sequence[TraceEvent], device: Device) -> Profile:
    """Read the trace of one inference. Raises ProfileError where nothing was recorded."""
    recording, on_cpu = Recording.of(events), device == "cpu"
    timeline = recording.operators() if on_cpu else recording.kernels()
    if not len(timeline):
        what = "operator call" if on_cpu else "device kernel"
        raise ProfileError(
            f"torch.profiler recorded no {what}. On a GPU, CUPTI or roctracer may be missing or "
            "in use by another profiler; profile.kernels=false leaves the counts out."
        )
    notes = (_notes_on_cpu if on_cpu else _notes_on_gpu)(recording, timeline.staged)
    return _summary(timeline, device, notes)


def kernels_of(timeline: Timeline, device: Device) -> Kernels:
    """Count launches and sum their time in milliseconds, per category and per stage.

    Each category is named, also with 0. The stages are either complete, so that they sum to the
    same as the categories, or `by_stage` and `stage_ms` are empty: one launch of unknown stage
    suffices. On a GPU `busy_ms` is the time in which at least one launch ran.
    """
    on_cpu, spent_ms = device == "cpu", _spent_ms(timeline, device)
    of_category = _sums(map(categorise, timeline.launched), spent_ms)
    stages = timeline.staged
    of_stage = {} if None in stages else _sums(map(str, stages), spent_ms)
    gaps_ms = timeline.gaps_us() / 1e3
    return Kernels(
        kind="operator_calls" if on_cpu else "device_kernels",
        total=len(timeline),
        by_category={name: len(of_category.get(name, ())) for name in CATEGORIES},
        by_stage={name: len(each) for name, each in of_stage.items()},
        category_ms={name: sum(of_category.get(name, ())) for name in CATEGORIES},
        stage_ms={name: sum(each) for name, each in of_stage.items()},
        busy_ms=None if on_cpu else sum(spent_ms),
        idle_ms=None if on_cpu else float(gaps_ms.sum()),
        longest_gap_ms=None if on_cpu else float(gaps_ms.max(initial=0.0)),
    )


def _spent_ms(timeline: Timeline, device: Device) -> list[float]:
    """Time of each launch; on a GPU, where kernels may overlap, its share of the busy time."""
    us = timeline.duration_us if device == "cpu" else timeline.shares_us()
    return (us / 1e3).tolist()


def _sums(names: Iterable[str], spent_ms: Sequence[float]) -> dict[str, list[float]]:
    """The times of each name."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, spent in zip(names, spent_ms, strict=True):
        found[name].append(spent)
    return found


def table_of(timeline: Timeline, device: Device) -> list[KernelRow]:
    """One row per name, the one with the most time first; times as in `kernels_of`."""
    rows = [
        KernelRow(name=name, category=categorise(name), calls=len(each), total_ms=sum(each))
        for name, each in _sums(timeline.launched, _spent_ms(timeline, device)).items()
    ]
    return sorted(rows, key=lambda row: (-row.total_ms, row.name))


def with_stages_of(replay: Profile, reference: Profile) -> Profile:
    """`replay` with the stages of `reference`, or with a note that says why it has none."""
    notes = [note for note in replay.notes if note != _NO_MARKERS]
    if not reference.kernels.stage_ms:
        note = "No stages: the call without its graph has none either."
        return replace(replay, notes=[*notes, note])
    ours, theirs = replay.timeline, reference.timeline
    copies = {n for t in (ours, theirs) for n in t.rows(t.is_copy).launched}
    known = [
        (name, stage or OUTSIDE) for name, stage in zip(theirs.launched, theirs.staged, strict=True)
    ]
    stages = stage_by_sequence(known, ours.launched, frozenset(copies))
    if stages is None:
        note = (
            f"No stages: the replay ran {len(ours)} kernels and copies, the call "
            f"without its graph {len(theirs)}, and not the same ones in order."
        )
        return replace(replay, notes=[*notes, note])
    named, stage = np.unique(stages, return_inverse=True)
    note = "Stages by the order of the kernels, from the same call without its graph."
    timeline = replace(ours, stages=named.tolist(), stage=stage)
    return _summary(timeline, "cuda", [*notes, note])


def _summary(timeline: Timeline, device: Device, notes: list[str]) -> Profile:
    return Profile(kernels_of(timeline, device), table_of(timeline, device), timeline, notes)


def _notes_on_gpu(recording: Recording, stages: Sequence[str | None]) -> list[str]:
    notes = []
    lost = recording.lost_launches()
    if lost:
        notes.append(f"Counts are too low: {lost} launches have no kernel in the trace.")
    unknown = stages.count(None)
    if unknown == len(stages):
        notes.append(_NO_MARKERS)
    elif unknown:
        notes.append(f"No stages: the launch of {unknown} kernels is not in the trace.")
    return notes


def _notes_on_cpu(recording: Recording, stages: Sequence[str | None]) -> list[str]:
    notes = [_GENERATED_LOOPS] if recording.has_generated_loops() else []
    return [*notes, _NO_MARKERS] if stages[0] is None else notes


def _record(call: Callable[[T], object], inputs: T, device: Device, trace: Path) -> None:
    """Write the trace of the second of two calls."""
    if device == "cpu":
        _trace_on_cpu(call, inputs, trace)
    else:
        _trace_on_gpu(call, inputs, device, trace)


def _events(trace: Path) -> list[TraceEvent]:
    events: list[TraceEvent] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return events


def _trace_on_cpu(call: Callable[[T], object], inputs: T, trace: Path) -> None:
    """With the recorder below torch.profiler, which would import Inductor to ask it about CUDA."""
    for _ in range(2):
        with autograd_profiler.profile(use_kineto=True) as profiler:
            call(inputs)
    profiler.export_chrome_trace(str(trace))


def _trace_on_gpu(call: Callable[[T], object], inputs: T, device: Device, trace: Path) -> None:
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
        schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
        acc_events=True,  # one cycle only; without it torch warns that cycles are cleared
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(trace)),
    ) as profiler:
        for _ in range(2):
            call(inputs)
            synchronise(device)  # nothing of one call may fall into the next
            profiler.step()


def _compress(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with source.open("rb") as plain, gzip.open(temporary, "wb") as packed:
        shutil.copyfileobj(plain, packed)
    os.replace(temporary, target)
