"""Reading a Chrome trace: which events are launches, and in which stage.

Traces of torch.profiler, and of rocprof converted to the same format. Which events count:

- on a GPU each kernel, device copy and fill (`cat` kernel, gpu_memcpy, gpu_memset of torch, gpu of
  rocprof), also those inside a replayed graph, where all carry the correlation of its launch;
- on a CPU each operator call that is not inside another operator call of the same thread:
  `aten::linear` is one call, though `aten::addmm` runs inside it. Its time is its whole duration.

The stage of an operator call is the innermost marker around its start; that of a kernel is the
innermost marker around the call that launched it.

`Recording` takes the events one by one and keeps some forty bytes of each that matters, so a trace
of hundreds of megabytes need not fit in memory.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

TraceEvent = dict[str, Any]

MARKER_PREFIX = "openpi_opt::"
"""`record_function` names with this prefix mark stages: "openpi_opt::vision"."""
OUTSIDE = "other"
"""The stage of what ran outside all markers, in a profile that has markers."""

_COPIES = ("gpu_memcpy", "gpu_memset")
_ON_DEVICE = ("kernel", "gpu", *_COPIES)
_RUNTIME = ("cuda_runtime", "cuda_driver")  # kineto files HIP's runtime under these names too
_OPERATOR_CALL = "cpu_op"
_ANNOTATION = "user_annotation"
_LAUNCH = re.compile(r"^(?:cu|cuda|hip)\w*Launch(?!HostFunc)")
# `Memcpy DtoD (Device -> Device)` of a stream, and the kernel that a CUDA graph makes of it.
_DEVICE_COPY = re.compile(r"Memcpy DtoD|memcpy\d+_post$")
# `Memset (Device)` of a stream is `Memset (Unknown)` in a graph.
_COPY, _FILL = "device copy", "device fill"
_OPERATOR = re.compile(r"^(?!profiler::)[A-Za-z_]\w*::\w")
_COMPILED_ON_CPU = "CompiledFxGraph"
_GRAPH_LAUNCH = re.compile(r"^(?:cu|cuda|hip)GraphLaunch")

_MISSING = -(2**63)  # an id that an event does not have
_LATEST_US = 9e15  # whole nanoseconds up to here fit in 64 bits
_UNKNOWN_STAGE = -1


class ProfileError(RuntimeError):
    """The profiler saw nothing, or its trace cannot be read: there are no counts to report."""


@dataclass(frozen=True)
class Timeline:
    """Launches as columns, one row each, in order of their start.

    `name` and `stage` are indices into `names` and `stages`, stage -1 is unknown. `lane` tells
    devices apart (threads, for operator calls). Times are in microseconds.
    """

    names: list[str]
    stages: list[str]
    name: NDArray[np.int64]
    stage: NDArray[np.int64]
    start_us: NDArray[np.float64]
    duration_us: NDArray[np.float64]
    lane: NDArray[np.int64]
    is_copy: NDArray[np.bool_]
    correlation: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.name)

    def rows(self, kept: slice | NDArray[np.bool_]) -> Timeline:
        """Some of the rows."""
        columns = ("name", "stage", "start_us", "duration_us", "lane", "is_copy")
        found = {key: getattr(self, key)[kept] for key in (*columns, "correlation")}
        return Timeline(names=self.names, stages=self.stages, **found)

    @property
    def launched(self) -> list[str]:
        """The name of each row."""
        return [self.names[i] for i in self.name]

    @property
    def staged(self) -> list[str | None]:
        """The stage of each row, None where it is not known."""
        return [None if i == _UNKNOWN_STAGE else self.stages[i] for i in self.stage]

    def shares_us(self) -> NDArray[np.float64]:
        """The part of each duration in which nothing ran that started before.

        Kernels of programmatic dependent launch start beside their predecessor and wait for it, and
        streams run side by side: a moment counts once, for the launch that began first.
        """
        end = self.start_us + self.duration_us
        free = np.maximum(self.start_us[1:], np.maximum.accumulate(end)[:-1])
        return np.maximum(end - np.append(self.start_us[:1], free), 0.0)

    def gaps_us(self) -> NDArray[np.float64]:
        """The time before each row but the first in which nothing ran, over all streams."""
        end = np.maximum.accumulate(self.start_us + self.duration_us)
        return np.maximum(self.start_us[1:] - end[:-1], 0.0)


@dataclass
class _Columns:
    """Rows of one kind of event: what it is, when, where, and by which ids others refer to it."""

    name: array[int] = field(default_factory=lambda: array("q"))
    start_us: array[float] = field(default_factory=lambda: array("d"))
    duration_us: array[float] = field(default_factory=lambda: array("d"))
    thread: array[int] = field(default_factory=lambda: array("i"))
    correlation: array[int] = field(default_factory=lambda: array("q"))
    external_id: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self.name)


MAX_LAUNCHES = 1_000_000
"""Of a recording: about 300 inferences, and 300 MB while they are sorted."""


class Recording:
    """What a trace says of launches, gathered event by event in any order."""

    def __init__(self) -> None:
        self.events = 0
        self.has_markers = False
        self._names: dict[str, int] = {}
        self._threads: dict[str, int] = {}
        self._device = _Columns()
        self._is_copy = array("b")
        self._runtime = _Columns()
        self._operators = _Columns()
        self._annotations = _Columns()

    @classmethod
    def of(cls, events: Iterable[Any]) -> Recording:
        """All of `events`. Raises ProfileError on a damaged one."""
        recording = cls()
        for event in events:
            recording.add(event)
        return recording

    def add(self, event: Any) -> None:
        """Take what matters of one event.

        Raises ProfileError: it is no event at all, or one that counts is damaged: no name,
        no times, a time that is negative or not a number.
        """
        self.events += 1
        if len(self._device.start_us) + len(self._operators.start_us) > MAX_LAUNCHES:
            raise ProfileError(
                f"more than {MAX_LAUNCHES:,} kernels and operator calls; record a shorter time"
            )
        if not isinstance(event, dict):
            raise ProfileError(f"Damaged event in the trace: {_shown(event)}")
        if event.get("ph") != "X":  # complete events only: those with a start and a duration
            return
        category = event.get("cat")
        if category in _ON_DEVICE:
            self._keep(self._device, event)
            self._is_copy.append(category in _COPIES)
        elif category in _RUNTIME:
            self._keep(self._runtime, event)
        elif category == _OPERATOR_CALL:
            self._keep(self._operators, event)
        elif category == _ANNOTATION:
            self._keep(self._annotations, event)
            self.has_markers |= event["name"].startswith(MARKER_PREFIX)

    def kernels(self) -> Timeline:
        """Each kernel, device copy and fill in order of its start on the device."""
        columns = self._device
        stages, stage = self._stages_of_kernels()
        order = np.argsort(_floats(columns.start_us), kind="stable")
        return Timeline(
            names=list(self._names),
            stages=stages,
            name=_integers(columns.name)[order],
            stage=stage[order],
            start_us=_floats(columns.start_us)[order],
            duration_us=_floats(columns.duration_us)[order],
            lane=_integers(columns.thread)[order],
            is_copy=_integers(self._is_copy)[order].astype(bool),
            correlation=_integers(columns.correlation)[order],
        )

    def operators(self) -> Timeline:
        """Each operator call that is not inside another one of its thread, in order of its start.

        An operator is an event of category cpu_op named `namespace::name`; torch's wrappers around
        compiled code have other names and are looked into.
        """
        columns = self._operators
        is_operator = np.array([bool(_OPERATOR.match(name)) for name in self._names], dtype=bool)
        name, thread = _integers(columns.name), _integers(columns.thread)
        start, end = _nanoseconds(columns)
        rows = np.flatnonzero(is_operator[name]) if len(name) else np.array([], dtype=np.int64)
        # Of two that start in the same nanosecond the longer one is outside.
        rows = rows[np.lexsort((-end[rows], start[rows]))]
        outer, busy_until = [], defaultdict[int, int](int)
        for row, where, begin, until in zip(
            rows.tolist(), thread[rows].tolist(), start[rows].tolist(), end[rows].tolist(),
            strict=True,
        ):  # fmt: skip
            if begin >= busy_until[where]:
                busy_until[where] = until
                outer.append(row)
        kept = np.array(outer, dtype=np.int64)
        stages, stage = self._stages_at(thread[kept], start[kept])
        return Timeline(
            names=list(self._names),
            stages=stages,
            name=name[kept],
            stage=stage,
            start_us=_floats(columns.start_us)[kept],
            duration_us=_floats(columns.duration_us)[kept],
            lane=thread[kept],
            is_copy=np.zeros(len(kept), dtype=bool),
            correlation=np.full(len(kept), _MISSING),
        )

    def lost_launches(self) -> int:
        """How many calls that launch a kernel or a graph have nothing on the device."""
        launches = np.array([bool(_LAUNCH.match(name)) for name in self._names], dtype=bool)
        name = _integers(self._runtime.name)
        calls = launches[name] if len(name) else np.array([], dtype=bool)
        seen = np.isin(_integers(self._runtime.correlation), _integers(self._device.correlation))
        return int(np.count_nonzero(calls & ~seen))

    def has_generated_loops(self) -> bool:
        """Whether code of Inductor ran on the host, whose loops are not operator calls."""
        compiled = {index for name, index in self._names.items() if _COMPILED_ON_CPU in name}
        return bool(compiled & set(self._operators.name))

    def replays_graph(self) -> bool:
        """Whether the host launched a captured graph."""
        launches = {index for name, index in self._names.items() if _GRAPH_LAUNCH.match(name)}
        return bool(launches & set(self._runtime.name))

    def marked(self, stage: str) -> int:
        """How many markers of `stage` there are."""
        index = self._names.get(MARKER_PREFIX + stage)
        return 0 if index is None else self._annotations.name.count(index)

    def _keep(self, columns: _Columns, event: TraceEvent) -> None:
        """Append the event."""
        name, args = event.get("name"), event.get("args", {})
        start: Any = event.get("ts")
        duration: Any = event.get("dur")
        if not (
            isinstance(name, str)
            and _is_time(start)
            and _is_time(duration)
            and isinstance(args, dict)
        ):
            raise ProfileError(f"Damaged event in the trace: {_shown(event)}")
        columns.name.append(self._names.setdefault(name, len(self._names)))
        columns.start_us.append(start)
        columns.duration_us.append(duration)
        where = repr((event.get("pid"), event.get("tid")))
        if columns is self._device:  # streams of one device are one lane
            where = repr(args.get("device", event.get("pid")))
        columns.thread.append(self._threads.setdefault(where, len(self._threads)))
        columns.correlation.append(_as_id(args.get("correlation")))
        columns.external_id.append(_as_id(args.get("External id")))

    def _stages_of_kernels(self) -> tuple[list[str], NDArray[np.int64]]:
        """Names of stages, and the stage of each row of `_device`, -1 where it is not known."""
        count = len(self._device)
        if not self.has_markers:
            return [], np.full(count, _UNKNOWN_STAGE)
        call = _find(self._runtime.correlation, self._device.correlation)
        thread = _pick(self._runtime.thread, call)
        start = _pick(_nanoseconds(self._runtime)[0], call)
        found = call >= 0
        # Kineto leaves out some driver calls; what was around the call is known even then.
        for columns in (self._annotations, self._operators):
            around = _find(columns.external_id, self._device.external_id)
            use = ~found & (around >= 0)
            thread[use] = _pick(columns.thread, around)[use]
            start[use] = _pick(_nanoseconds(columns)[0], around)[use]
            found |= use
        stages, stage = self._stages_at(thread, start)
        stage[~found] = _UNKNOWN_STAGE
        return stages, stage

    def _stages_at(
        self, thread: NDArray[np.int64], moment: NDArray[np.int64]
    ) -> tuple[list[str], NDArray[np.int64]]:
        """The innermost marker around each moment (ns) of a thread; -1 without any markers."""
        if not self.has_markers:
            return [], np.full(len(moment), _UNKNOWN_STAGE)
        names, stages = list(self._names), {OUTSIDE: 0}
        markers: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        start, end = _nanoseconds(self._annotations)
        for row, index in enumerate(self._annotations.name):
            if names[index].startswith(MARKER_PREFIX):
                stage = names[index].removeprefix(MARKER_PREFIX)
                number = stages.setdefault(stage, len(stages))
                where = self._annotations.thread[row]
                # Of two that start together the longer one is outside, so it comes first.
                markers[where].append((int(start[row]), -int(end[row]), number))
        found = np.zeros(len(moment), dtype=np.int64)
        for where, listed in markers.items():
            rows = np.flatnonzero(thread == where)
            rows = rows[np.argsort(moment[rows], kind="stable")]
            found[rows] = list(_innermost(sorted(listed), moment[rows].tolist()))
        return list(stages), found


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


def _innermost(markers: Sequence[tuple[int, int, int]], moments: Iterable[int]) -> Iterator[int]:
    """For each moment, in order, the number of the last started marker that has not ended, or 0.

    `markers` are (start, -end, number), sorted.
    """
    open_markers: list[tuple[int, int]] = []
    following = 0
    for moment in moments:
        while following < len(markers) and markers[following][0] <= moment:
            _, negative_end, number = markers[following]
            open_markers.append((-negative_end, number))
            following += 1
        while open_markers and open_markers[-1][0] <= moment:
            open_markers.pop()
        yield open_markers[-1][1] if open_markers else 0


def _find(ids: array[int], wanted: array[int]) -> NDArray[np.int64]:
    """For each wanted id the last row that has it, or -1."""
    keys, targets = _integers(ids), _integers(wanted)
    if not len(keys):
        return np.full(len(targets), -1)
    order = np.argsort(keys, kind="stable")
    at = np.searchsorted(keys[order], targets, side="right") - 1
    rows = order[np.maximum(at, 0)]
    known = (at >= 0) & (keys[rows] == targets) & (targets != _MISSING)
    return np.where(known, rows, -1)


def _pick(column: array[int] | NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The column's values at `rows`; 0 where the row is -1."""
    values = _integers(column) if isinstance(column, array) else column
    picked = np.zeros(len(rows), dtype=np.int64)
    picked[rows >= 0] = values[rows[rows >= 0]]
    return picked


# Traces give microseconds with three decimals: whole nanoseconds compare exactly.
def _nanoseconds(columns: _Columns) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Start and end."""
    start = np.rint(_floats(columns.start_us) * 1e3).astype(np.int64)
    return start, start + np.rint(_floats(columns.duration_us) * 1e3).astype(np.int64)


def _integers(column: array[int]) -> NDArray[np.int64]:
    return np.array(column, dtype=np.int64)


def _floats(column: array[float]) -> NDArray[np.float64]:
    return np.array(column, dtype=np.float64)


def _is_time(value: Any) -> bool:
    # NaN and infinity fail the comparison.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= _LATEST_US


def _as_id(value: Any) -> int:
    """An id as 64 bits; what is none, or does not fit, is missing."""
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) < value < 2**63:
        return value
    return _MISSING


def _shown(event: Any, limit: int = 200) -> str:
    text = repr(event)
    return text if len(text) <= limit else text[:limit] + "..."
