"""Reading a Chrome trace of torch.profiler: which events are launches, and in which stage.

Pure functions over the list of trace events. Which events count:

- on a GPU each kernel, device copy and fill (`cat` kernel, gpu_memcpy, gpu_memset), also those
  inside a replayed graph, where all of them carry the correlation of the graph's launch;
- on a CPU each operator call that is not inside another operator call of the same thread:
  `aten::linear` is one call, though `aten::addmm` runs inside it. Its time is its whole duration.

The stage of an operator call is the innermost marker around its start; that of a kernel is the
innermost marker around the call that launched it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TraceEvent = dict[str, Any]
Thread = tuple[Any, Any]

MARKER_PREFIX = "openpi_opt::"
"""`record_function` names with this prefix mark stages: "openpi_opt::vision"."""
OUTSIDE = "other"
"""The stage of what ran outside all markers, in a profile that has markers."""

_KERNEL = "kernel"
_COPIES = ("gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")  # kineto files HIP's runtime under these names too
_LAUNCH = re.compile(r"^(?:cu|cuda|hip)\w*Launch(?!HostFunc)")
# `Memcpy DtoD (Device -> Device)` of a stream, and the kernel that a CUDA graph makes of it.
_DEVICE_COPY = re.compile(r"Memcpy DtoD|memcpy\d+_post$")
# `Memset (Device)` of a stream is `Memset (Unknown)` in a graph.
_COPY, _FILL = "device copy", "device fill"
_OPERATOR = re.compile(r"^(?!profiler::)[A-Za-z_]\w*::\w")
_COMPILED_ON_CPU = "CompiledFxGraph"
_GRAPH_LAUNCH = re.compile(r"^(?:cu|cuda|hip)GraphLaunch")


class ProfileError(RuntimeError):
    """The profiler saw nothing, or its trace cannot be read: there are no counts to report."""


@dataclass(frozen=True)
class Launch:
    """One kernel, device copy or fill, or operator call.

    `stage` is None where it is not known. `stream` and `correlation` are the device's; they are
    None for an operator call.
    """

    name: str
    start_us: float
    duration_us: float
    stage: str | None
    is_copy: bool = False
    stream: int | None = None
    correlation: int | None = None


def list_kernels(events: Sequence[TraceEvent]) -> list[Launch]:
    """Each kernel, device copy and fill in order of its start on the device."""
    stage_at = _stages(events)
    by_correlation = {
        event["args"]["correlation"]: event
        for event in _complete(events, _RUNTIME)
        if "correlation" in event.get("args", {})
    }
    by_external_id = {
        event["args"]["External id"]: event
        for event in _complete(events, ("cpu_op", "user_annotation"))
        if "External id" in event.get("args", {})
    }
    launches = []
    for event in _complete(events, (_KERNEL, *_COPIES)):
        args = event.get("args", {})
        # Kineto leaves out some driver calls; what was around the call is known even then.
        site = by_correlation.get(args.get("correlation"))
        site = site or by_external_id.get(args.get("External id"))
        launches.append(
            Launch(
                name=event["name"],
                start_us=event["ts"],
                duration_us=event["dur"],
                stage=None if site is None else stage_at(site),
                is_copy=event["cat"] in _COPIES,
                stream=args.get("stream"),
                correlation=args.get("correlation"),
            )
        )
    return sorted(launches, key=lambda launch: launch.start_us)


def list_operators(events: Sequence[TraceEvent]) -> list[Launch]:
    """Each operator call that is not inside another one of its thread, in order of its start.

    An operator is an event of category cpu_op named `namespace::name`; torch's wrappers around
    compiled code have other names and are looked into.
    """
    stage_at = _stages(events)
    operators = [e for e in _complete(events, ("cpu_op",)) if _OPERATOR.match(e["name"])]
    # Of two that start in the same nanosecond the longer one is outside.
    operators.sort(key=lambda event: (_start_ns(event), -_end_ns(event)))
    busy_until: dict[Thread, int] = {}
    launches = []
    for event in operators:
        thread = _thread(event)
        if _start_ns(event) < busy_until.get(thread, 0):
            continue
        busy_until[thread] = _end_ns(event)
        launches.append(Launch(event["name"], event["ts"], event["dur"], stage_at(event)))
    return launches


def lost_launches(events: Sequence[TraceEvent], launches: Iterable[Launch]) -> int:
    """How many calls that launch a kernel or a graph have nothing on the device in the trace."""
    seen = {launch.correlation for launch in launches}
    return sum(
        event.get("args", {}).get("correlation") not in seen
        for event in _complete(events, _RUNTIME)
        if _LAUNCH.match(event["name"])
    )


def replays_graph(events: Sequence[TraceEvent]) -> bool:
    """Whether the host launched a captured graph."""
    return any(_GRAPH_LAUNCH.match(event["name"]) for event in _complete(events, _RUNTIME))


@dataclass(frozen=True)
class Occupation:
    """How a device spent the time from the start of its first launch to the end of its last."""

    busy_us: float
    idle_us: float
    longest_gap_us: float


def occupation(launches: Iterable[Launch]) -> Occupation:
    """Time in which at least one launch ran, and in which none did, over all streams.

    Launches that overlap count once, so `busy_us` may be less than the sum of their durations.
    """
    spans = sorted((launch.start_us, launch.start_us + launch.duration_us) for launch in launches)
    busy = idle = longest = 0.0
    until = spans[0][0] if spans else 0.0
    for start, end in spans:
        gap = max(0.0, start - until)
        idle, longest = idle + gap, max(longest, gap)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return Occupation(busy, idle, longest)


def has_generated_loops(events: Sequence[TraceEvent]) -> bool:
    """Whether code of Inductor ran on the host, whose loops are not operator calls."""
    return any(_COMPILED_ON_CPU in event["name"] for event in _complete(events, ("cpu_op",)))


def stage_by_sequence(
    reference: Sequence[tuple[str, str]], replayed: Sequence[str], copies: frozenset[str]
) -> list[str] | None:
    """Stages of a replayed kernel sequence from those of the uncaptured call, or None.

    Both must have the same names in the same order, apart from `copies` (names of copies and
    fills) before the first and after the last kernel: a replay copies its inputs in and its
    result out. Those that the uncaptured call made in the same place keep their stage; the
    others are `OUTSIDE`.
    """
    names = [_canonical(name) for name, _ in reference]
    replayed = [_canonical(name) for name in replayed]
    first, last = _core(names, copies)
    begin, end = _core(replayed, copies)
    if first == last or names[first:last] != list(replayed[begin:end]):
        return None
    stages = [OUTSIDE] * len(replayed)
    before = first if names[:first] == list(replayed[max(begin - first, 0) : begin]) else 0
    after = len(names) - last
    if names[last:] != list(replayed[end : end + after]):
        after = 0
    known = [stage for _, stage in reference[first - before : last + after]]
    stages[begin - before : end + after] = known
    return stages


def _canonical(name: str) -> str:
    """One name for a copy, one for a fill, however stream and graph call them."""
    if _DEVICE_COPY.match(name):
        return _COPY
    return _FILL if name.startswith("Memset (") else name


def _core(names: Sequence[str], copies: frozenset[str]) -> tuple[int, int]:
    """The bounds of `names` without the copies and fills at its two ends."""
    outer = copies | {_COPY, _FILL}
    inner = [i for i, name in enumerate(names) if name not in outer]
    return (inner[0], inner[-1] + 1) if inner else (0, 0)


def _stages(events: Sequence[TraceEvent]) -> Callable[[TraceEvent], str | None]:
    """A function from an event of the host to the stage around its start.

    It gives None for each event when there are no markers at all.
    """
    markers: defaultdict[Thread, list[tuple[int, int, str]]] = defaultdict(list)
    for event in _complete(events, ("user_annotation",)):
        if event["name"].startswith(MARKER_PREFIX):
            stage = event["name"].removeprefix(MARKER_PREFIX)
            markers[_thread(event)].append((_start_ns(event), _end_ns(event), stage))

    def stage_at(event: TraceEvent) -> str | None:
        if not markers:
            return None
        moment = _start_ns(event)
        around = [m for m in markers.get(_thread(event), []) if m[0] <= moment < m[1]]
        return max(around)[2] if around else OUTSIDE  # the last to start is the innermost

    return stage_at


def _complete(events: Iterable[TraceEvent], categories: tuple[str, ...]) -> list[TraceEvent]:
    """Events with a duration of these categories; raises ProfileError on a damaged one."""
    chosen = [e for e in events if e.get("ph") == "X" and e.get("cat") in categories]
    for event in chosen:
        numbers = event.get("ts"), event.get("dur")
        if not isinstance(event.get("name"), str) or not all(
            isinstance(number, int | float) and number >= 0 for number in numbers
        ):
            raise ProfileError(f"Damaged event in the profiler's trace: {event}")
    return chosen


def _thread(event: TraceEvent) -> Thread:
    return event.get("pid"), event.get("tid")


# Traces give microseconds with three decimals: whole nanoseconds compare exactly.
def _start_ns(event: TraceEvent) -> int:
    return round(event["ts"] * 1e3)


def _end_ns(event: TraceEvent) -> int:
    return _start_ns(event) + round(event["dur"] * 1e3)
