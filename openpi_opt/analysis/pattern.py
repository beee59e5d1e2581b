"""Stages of an inference from the repeating pattern of its kernels, where no marker tells them.

Each tower is a stack of equal layers, so the sequence of kernel categories repeats (names do not: a
compiler fuses the same work under several). A *run* is one pass through a tower: 27 layers of
vision, 18 of the prefix, 18 of the expert in each step. Runs of the same kernels are one tower; the
one that is passed most often is the expert, before it comes the prefix, and before that vision. A
run's borders are exact to the few kernels by which its first and last layer differ from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray

from openpi_opt.measure.categories import CATEGORIES, categorise
from openpi_opt.measure.trace import OUTSIDE, Timeline
from openpi_opt.pi0.config import PI0

VISION, PREFILL, DENOISE = "vision", "prefill", "denoise"
STAGES = [VISION, PREFILL, DENOISE, OUTSIDE]
STEPS = 10

MIN_REPEATS = 4
"""Layers that make a run. The smallest policy here has four."""
SHORTEST, LONGEST = 4, 200
"""Kernels of a layer: own kernels need seven, plain PyTorch some sixty."""
SAME_NAMES = 0.5
"""Share of kernel names that two passes through one tower have in common at least."""
_LAYER_ROWS = 2.0
"""Rows by which the layers of two passes through one tower differ at most, on average."""
_EVEN = 0.6
"""Attention kernels of several layers are so evenly spread at least: least over widest distance."""
SAME_TIME = 1.7
"""The times of two passes through one tower differ at most by this factor."""

_SYMBOL = {category: number for number, category in enumerate(CATEGORIES)}
_GEMM, _ATTENTION, _NORM = _SYMBOL["gemm"], _SYMBOL["attention"], _SYMBOL["norm"]


@dataclass(frozen=True)
class Run:
    """One pass through a tower: rows [begin, end) repeat with `period`.

    A layer has `layer` rows and `calls` attention kernels: where every third layer is another, the
    period is that of three. `whole` is where the last complete layer ends; what repeats after it
    only begins like a layer. `layers` counts those too that differ from the others, at either
    border. Runs of one tower have the same number in `tower`.
    """

    begin: int
    end: int
    period: int
    layer: float
    calls: int
    whole: int = -1
    layers: int = 0
    tower: int = -1


@dataclass(frozen=True)
class Inference:
    """Rows [begin, end) of one inference; an end of it may be missing in the trace. `vision_layers`
    and so on are what is visible: layers of each pass."""

    begin: int
    end: int
    vision: list[Run]
    prefill: list[Run]
    denoise: list[Run]

    def describe(self) -> str:
        """The layers of each pass in words."""
        parts = [
            f"{name} {_layers(runs)}"
            for name, runs in (
                (VISION, self.vision), (PREFILL, self.prefill), (DENOISE, self.denoise)
            )
        ]  # fmt: skip
        return ", ".join(parts)

    @property
    def complete(self) -> bool:
        """Whether all layers and steps of the full model are visible."""
        return (
            bool(self.vision)
            and all(run.layers == PI0.vision.depth for run in self.vision)
            and len(self.prefill) >= 1
            and self.prefill[0].layers in (PI0.language.depth - 1, PI0.language.depth)
            and len(self.denoise) == STEPS
            and all(run.layers == PI0.expert.depth for run in self.denoise)
        )


@dataclass(frozen=True)
class Pattern:
    """The stage of each row (index into `STAGES`, -1 unknown) and the inferences found."""

    stage: NDArray[np.int64]
    inferences: list[Inference]


def find_pattern(timeline: Timeline) -> Pattern | None:
    """The stages of a timeline of kernels, or None where nothing repeats like a policy."""
    sequence = categories(timeline)
    passes = _joined(timeline, _repeating(sequence))
    runs = _towers(timeline, _counted(passes, sequence) if passes else [])
    counts = Counter(run.tower for run in runs)
    if not counts or max(counts.values()) < 2:
        return None
    # Of two towers that are passed equally often the expert is the later one.
    last = {run.tower: i for i, run in enumerate(runs)}
    expert = max(counts, key=lambda tower: (counts[tower], last[tower]))
    inferences = _inferences(timeline, sequence, runs, expert)
    stage = np.full(len(timeline), STAGES.index(OUTSIDE))
    for inference in inferences:
        _mark(sequence == _GEMM, stage, inference)
    return Pattern(stage, inferences)


def categories(timeline: Timeline) -> NDArray[np.int64]:
    """The category of each row, as an index into `CATEGORIES`."""
    of_name = [_SYMBOL[categorise(name)] for name in timeline.names]
    return np.array(of_name, dtype=np.int64)[timeline.name]


def _repeating(sequence: NDArray[np.int64]) -> list[Run]:
    """The stretches that repeat like layers, in order. Attention kernels that are evenly spread
    over a period are those of several layers."""
    covered = np.zeros(len(sequence), dtype=bool)
    found = []
    for period in range(SHORTEST, min(LONGEST, len(sequence) // MIN_REPEATS) + 1):
        for begin, end in _repeats(sequence, period):
            word = sequence[begin : begin + period]
            # A multiple of a period repeats where the period does; neighbours share a few rows.
            known = 2 * np.count_nonzero(covered[begin:end]) > end - begin
            if known or not {_GEMM, _ATTENTION} <= set(word.tolist()):
                continue
            covered[begin:end] = True
            at = np.flatnonzero(word == _ATTENTION)
            apart = np.diff(np.r_[at, at[0] + period])
            layers = len(at) if apart.min() >= _EVEN * apart.max() else 1
            found.append(Run(begin, end, period, period / layers, len(at) // layers))
    return sorted(found, key=lambda run: (run.begin, run.end))


def _joined(timeline: Timeline, parts: Sequence[Run]) -> list[Run]:
    """One run for each pass: where some of a tower's layers differ, a pass repeats in parts. Seen
    of Pi0.5 on an MI300X: 12 layers of which every third has two more kernels repeat with the
    period of three layers, and 6 plain ones follow at once. Parts of one pass touch."""
    found: list[Run] = []
    for part in parts:
        before = found[-1] if found else None
        if before is None or part.begin > before.end or not _alike(timeline, before, part):
            found.append(part)
        else:
            period = min(before.period, part.period)
            found[-1] = replace(part, begin=before.begin, period=period)
    return found


def _alike(timeline: Timeline, one: Run, other: Run) -> bool:
    names, others = (set(timeline.name[each.begin : each.end].tolist()) for each in (one, other))
    shared = len(names & others) / min(len(names), len(others))
    return shared >= SAME_NAMES and abs(one.layer - other.layer) <= _LAYER_ROWS


def _counted(found: Sequence[Run], sequence: NDArray[np.int64]) -> list[Run]:
    """Runs with their layers: an attention call between two runs belongs to the nearer one."""
    rows, attention = len(sequence), np.flatnonzero(sequence == _ATTENTION)
    before, after = [0] * len(found), [0] * len(found)
    borders = [(0, 0), *((run.begin, run.end) for run in found), (rows, rows)]

    def calls(begin: int, end: int) -> NDArray[np.int64]:
        return attention[slice(*np.searchsorted(attention, (begin, end)))]

    inside = [calls(run.begin, run.end) for run in found]
    for i, ((_, left), (right, _)) in enumerate(pairwise(borders)):
        for call in calls(left, right):
            to_left = call - inside[i - 1][-1] if i > 0 else rows
            to_right = inside[i][0] - call if i < len(found) else rows
            if to_left <= to_right:
                after[i - 1] += 1
            else:
                before[i] += 1
    runs = []
    for i, run in enumerate(found):
        whole = _last_layer_ends(sequence, run, inside[i])
        odd = round(after[i] / run.calls)  # layers behind the run that differ
        whole = min(whole + round(odd * run.layer), max(borders[i + 2][0], run.end))
        layers = round((len(inside[i]) + before[i] + after[i]) / run.calls)
        runs.append(replace(run, whole=whole, layers=layers))
    return runs


def _last_layer_ends(sequence: NDArray[np.int64], run: Run, calls: NDArray[np.int64]) -> int:
    """Where the layer of the last of the run's attention calls ends, at most at the run's end. A
    layer begins with the norm before attention, wherever the repetition happens to begin. Where
    norms are several plain kernels it is taken to begin where the repetition does."""
    first_call, last_call = int(calls[0]), int(calls[-1])
    layer = sequence[first_call : first_call + run.period]  # from one call to the next
    norms = np.flatnonzero(layer == _NORM)
    if len(norms) and first_call + run.period <= run.end:
        return min(last_call + int(norms[-1]), run.end)
    whole = run.end - (run.end - run.begin) % run.period
    # The last layer may end early: what is not read is not computed.
    return max(whole, last_call + 1)


def _repeats(sequence: NDArray[np.int64], period: int) -> list[tuple[int, int]]:
    """Bounds of the longest stretches in which each row equals the one `period` later."""
    equal = np.r_[False, sequence[:-period] == sequence[period:], False]
    edges = np.flatnonzero(equal[1:] != equal[:-1])
    begin, end = edges[::2], edges[1::2]
    long = end - begin >= (MIN_REPEATS - 1) * period
    return [(int(b), int(e) + period) for b, e in zip(begin[long], end[long], strict=True)]


def _towers(timeline: Timeline, runs: Sequence[Run]) -> list[Run]:
    """Number the towers: runs of the same period, mostly the same names, about the same time."""
    known: list[tuple[Run, set[int], float]] = []
    towers = 0
    for run in runs:
        rows = slice(run.begin, max(run.whole, run.begin + run.period))
        names = set(timeline.name[rows].tolist())
        time = float(timeline.duration_us[rows].sum()) / max(run.layers, 1)
        tower = towers
        for other, others, other_time in known:
            alike = len(names & others) >= SAME_NAMES * len(names | others)
            near = max(time, other_time) <= SAME_TIME * min(time, other_time)
            if abs(other.layer - run.layer) <= _LAYER_ROWS and alike and near:
                tower = other.tower
        towers = max(towers, tower + 1)
        known.append((replace(run, tower=tower), names, time))
    return [run for run, _, _ in known]


def _inferences(
    timeline: Timeline, sequence: NDArray[np.int64], runs: Sequence[Run], expert: int
) -> list[Inference]:
    """Cut the runs after each series of denoising steps."""
    parts: list[tuple[list[Run], list[Run]]] = []
    before: list[Run] = []
    for is_expert, group in groupby(runs, key=lambda run: run.tower == expert):
        if is_expert:
            parts.append((before, list(group)))
            before = []
        else:
            before = list(group)
    if before:
        parts.append((before, []))
    cuts = [0]
    for (_, steps), (following, later_steps) in pairwise(parts):
        begin = (following or later_steps)[0].begin
        cuts.append(_widest_gap(timeline, steps[-1].whole, begin))
    cuts.append(len(timeline))
    return [
        _inference(sequence, begin, end, before, steps)
        for begin, end, (before, steps) in zip(cuts, cuts[1:], parts, strict=False)
    ]


def _inference(
    sequence: NDArray[np.int64], begin: int, end: int, before: list[Run], steps: list[Run]
) -> Inference:
    """Vision is the first tower, the prefix what follows; the state token alone belongs to it."""
    vision = [run for run in before if run.tower == before[0].tower]
    prefill = before[len(vision) :]
    if not prefill and vision and vision[0].layers <= PI0.expert.depth:
        vision, prefill = [], vision  # the trace begins in the prefill
    if len(steps) == STEPS + 1 and _is_apart(sequence, steps):
        prefill, steps = [*prefill, steps[0]], steps[1:]
    return Inference(begin, end, vision, prefill, steps)


def _is_apart(sequence: NDArray[np.int64], steps: Sequence[Run]) -> bool:
    """Whether other kernels follow the first pass than all later ones: it is no step."""
    between = [sequence[run.whole : other.begin].tolist() for run, other in pairwise(steps)]
    return between[0] != between[1] and between[1:] == between[1:2] * (len(between) - 1)


def _widest_gap(timeline: Timeline, begin: int, end: int) -> int:
    """The row in [begin, end] before which the device rested longest."""
    if end - begin < 2:
        return end
    start = timeline.start_us[begin:end]
    rest = start[1:] - (start[:-1] + timeline.duration_us[begin : end - 1])
    return begin + 1 + int(np.argmax(rest))


def _mark(is_gemm: NDArray[np.bool_], stage: NDArray[np.int64], inference: Inference) -> None:
    """Write the stages of one inference; what no stage claims stays outside."""
    begin, end = inference.begin, inference.end
    if inference.vision:
        # The last norm and the projection of the image tokens, up to its product.
        limit = inference.prefill[0].begin if inference.prefill else end
        after = inference.vision[-1].whole
        product = _first(is_gemm, after, limit)
        if product < limit:
            after = _first(~is_gemm, product, limit)  # behind its parts, where it is split
        stage[begin:after] = STAGES.index(VISION)
        begin = after
    if inference.prefill:
        run = inference.prefill[-1]
        after = _first(is_gemm, run.whole, max(run.whole, run.end))
        stage[begin:after] = STAGES.index(PREFILL)
        begin = after
    if inference.denoise:
        stage[begin:end] = STAGES.index(DENOISE)


def _first(wanted: NDArray[np.bool_], begin: int, end: int) -> int:
    """The first row of [begin, end) that is wanted, or `end`."""
    found = np.flatnonzero(wanted[begin:end])
    return begin + int(found[0]) if len(found) else end


def _layers(runs: Sequence[Run]) -> str:
    """`27 layers`, or `10 x 18 layers`."""
    if not runs:
        return "not visible"
    counts = Counter(run.layers for run in runs)
    return " + ".join(
        f"{n} x {layers} layers" if n > 1 else f"{layers} layers" for layers, n in counts.items()
    )
