"""How many trials each sampler needs: `python -m benchmarks.samplers [RECORDED ...]`.

Searches `space=full` as a sweep does, with the real knobs' refusals and the real optimizer, on a
machine that is a function. With RECORDED (journals, or folders of results) the function is a model
of these trials: per stage a linear model of the log time and the nearest trials' deviations from it
(a Gaussian process over the number of options that differ), failures as the nearest trial has them.
Without, it is made up for each seed: an effect of each option on the stages that it touches, eight
pairs of options in each stage with an effect of their own, and three options that fail.

Prints after how many trials each sampler is within 10, 5 and 2% of the best point that is known of
the function: the median over seeds, and how many seeds reached it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.knobs.base import STAGES
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.result import Failed, Ok, TrialResult
from openpi_opt.space.compose import Composer
from openpi_opt.space.features import IDLE, TUNED, features, is_tuned, parts, touched
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.points import Points
from openpi_opt.space.prepare import prepare
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.space.stages import Map, Place

WITHIN = (0.10, 0.05, 0.02)
H100 = Machine(
    (Gpu(0, "GPU-0", "NVIDIA H100 80GB HBM3", "nvidia", "sm90", 81_559, "580"),),
    TorchBuild("2.11.0+cu130", "13.0", None),
    "cpu",
    cores=16,
    memory_mib=128_000,
)
# Times of the plain eager policy on an H100: experiments/0002, and what its launches cost.
BASE_MS = {"vision": 4.8, "prefill": 9.7, "denoise": 25.0, IDLE: 125.0}
_NOISE = 0.002
_RESTARTS = 6

Call = Callable[[Mapping[str, str]], dict[str, float] | None]
"""Features -> milliseconds of each part, None for a failure."""


def made_up(seed: int, atlas: Map) -> Call:
    """A machine whose effects are drawn; only a captured graph hides the launches."""
    pairs = sorted(_pairs(atlas, seed))
    chosen = random.Random(seed)
    effects = {
        (stage, pair): chosen.gauss(*TUNED)
        if is_tuned(pair[0])
        else chosen.uniform(-0.15, 0.12) * (2.0 if pair[0].startswith("compile.m") else 1)
        for pair in pairs
        for stage in STAGES
        if stage in touched(pair[0])
    }
    joint: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for stage in STAGES:
        own = [pair for pair in pairs if stage in touched(pair[0])]
        for _ in range(8):
            joint[stage, frozenset(chosen.sample(own, 2))] = chosen.gauss(0.0, 0.04)
    failing = set(chosen.sample(pairs, 3))

    def call(found: Mapping[str, str]) -> dict[str, float] | None:
        items = set(found.items())
        if items & failing:
            return None
        times = dict(BASE_MS)
        for stage in STAGES:
            log = sum(effects.get((stage, pair), 0.0) for pair in items)
            log += sum(effect for (s, two), effect in joint.items() if s == stage and two <= items)
            times[stage] *= math.exp(log)
        captured = found.get("graph.mode") == "manual" or found.get("compile.mode") in (
            "reduce_overhead",
            "max_autotune",
        )
        times[IDLE] = 0.2 if captured else times[IDLE]
        return times

    return call


def _pairs(atlas: Map, seed: int) -> set[tuple[str, str]]:
    """The options that occur in the space, by looking at random points."""
    chosen = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    for _ in range(150):
        place = atlas.anywhere(chosen)
        seen |= set(place.features.items()) if place else set()
    return seen


def recorded(paths: Iterable[Path], space: Space) -> tuple[Call, int]:
    """A machine like the one that these trials ran on, and the number of trials."""
    trials = []
    for path in paths:
        for found in _results(path):
            cfg = Config.load(found.config)
            if cfg.workload.name == "three_cameras" and cfg.workload.batch_size == 1:
                trials.append((features(cfg, space, {}), parts(found), isinstance(found, Ok)))
    timed = [(on, times) for on, times, _ in trials if times]
    models = {name: _Surface(name, timed) for name in (*STAGES, IDLE)}

    def call(found: Mapping[str, str]) -> dict[str, float] | None:
        near = min(trials, key=lambda trial: _distance(found, trial[0], ""))
        if not near[1] and not near[2] and _distance(found, near[0], "") <= 2:
            return None
        return {name: model(found) for name, model in models.items()}

    return call, len(trials)


class _Surface:
    """Log milliseconds of one part: ridge regression, and a Gaussian process of what is left."""

    def __init__(self, name: str, trials: list[tuple[dict[str, str], dict[str, float]]]):
        self._stage = name if name in STAGES else ""
        own = [{k: v for k, v in on.items() if self._reads(k)} for on, _ in trials]
        self._rows = own
        self._columns = sorted({pair for on in own for pair in on.items()})
        x = np.asarray([self._row(on) for on in own])
        y = np.log([max(times.get(name, 0.0), 1e-2) for _, times in trials])
        self._centre = float(y.mean())
        gram = x.T @ x + 0.1 * np.eye(x.shape[1])
        self._weights = np.linalg.solve(gram, x.T @ (y - self._centre))
        kernel = np.asarray([[self._near(a, b) for b in own] for a in own])
        left = y - self._centre - x @ self._weights
        self._alpha = np.linalg.solve(kernel + 0.05 * np.eye(len(own)), left)

    def __call__(self, found: Mapping[str, str]) -> float:
        own = {k: v for k, v in found.items() if self._reads(k)}
        near = np.asarray([self._near(own, row) for row in self._rows])
        log = self._centre + float(np.dot(self._row(own), self._weights) + near @ self._alpha)
        return math.exp(log)

    def _reads(self, key: str) -> bool:
        return not self._stage or self._stage in touched(key)

    def _row(self, on: Mapping[str, str]) -> list[float]:
        return [1.0, *(float(on.get(key) == text) for key, text in self._columns)]

    def _near(self, one: Mapping[str, str], other: Mapping[str, str]) -> float:
        return math.exp(-_distance(one, other, self._stage) / 2)


def _distance(one: Mapping[str, str], other: Mapping[str, str], stage: str) -> int:
    keys = {key for key, _ in set(one.items()) ^ set(other.items())}
    return sum(not stage or stage in touched(key) for key in keys)


def _results(path: Path) -> Iterable[TrialResult]:
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            document = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(document, dict) and "outcome" in document:
                yield results.parse_plain(document)
        return
    for line in _lines(path):
        yield results.parse_plain(line["result"])


def recorded_points(journal: Path, space: Space) -> Iterable[tuple[dict[str, str], TrialResult]]:
    """Points of another study of this space, with what it did not sweep yet at its default."""
    plain = {key: dimension.values[0] for key, dimension in space.dimensions.items()}
    for line in _lines(journal):
        params = {key: line["params"].get(key, text) for key, text in plain.items()}
        if all(text in space.dimensions[key].values for key, text in params.items()):
            yield params, results.parse_plain(line["result"])


def _lines(path: Path) -> Iterable[Any]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return map(json.loads, text.splitlines())


def best_of(call: Call, atlas: Map, seed: int) -> float:
    """The least time that changing one key at a time finds, from several places."""
    chosen = random.Random(seed)
    found = math.inf
    for _ in range(_RESTARTS):
        here = atlas.anywhere(chosen)
        assert here is not None
        while True:
            here, cost, better = _step(call, atlas, here)
            if not better:
                break
        found = min(found, cost)
    return found


def _step(call: Call, atlas: Map, start: Place) -> tuple[Place, float, bool]:
    here, cost = start, _total(call(start.features))
    before = cost
    for key, texts in atlas.values.items():
        for text in texts:
            other = atlas.changed(here, key, text) if text != here.params[key] else None
            if other is not None and (found := _total(call(other.features))) < cost:
                here, cost = other, found
    return here, cost, cost < before


def _total(times: Mapping[str, float] | None) -> float:
    return math.inf if times is None else sum(times.values())


def search(
    sampler: str, seed: int, call: Call, points: tuple[Space, Points], trials: int, pending: int = 0
) -> list[float]:
    """The best true time after each trial, as a sweep counts them: known points are none.

    So many of them are `pending` whenever the sampler is asked.
    """
    space, composed = points
    optimizer = Optimizer(space, sampler, seed, points=composed, hurried=True)
    noise = random.Random(seed)
    atlas = Map(space, composed)
    best, curve, passes = math.inf, [], 0
    known: dict[str, TrialResult] = {}
    running: deque[tuple[Proposal, str]] = deque()
    while len(curve) < trials and passes < 200 * trials:
        passes += 1
        proposal = optimizer.ask()
        place = atlas.place(proposal.params)
        if place is None:
            optimizer.give_up(proposal, learn=True)
            continue
        cfg = composed.config(proposal.params)
        if cfg.hash() in known and all(cfg.hash() != each for _, each in running):
            optimizer.tell(proposal, known[cfg.hash()])
            continue
        if cfg.hash() in known:  # a sweep gives up what it measures already
            optimizer.give_up(proposal, learn=False)
            continue
        times = call(place.features)
        known[cfg.hash()] = _result(cfg, times, noise)
        running.append((proposal, cfg.hash()))
        best = min(best, _total(times))
        curve.append(best)
        if len(running) > pending:
            ended, text = running.popleft()
            optimizer.tell(ended, known[text])
    return curve + [best] * (trials - len(curve))


def _result(cfg: Config, times: Mapping[str, float] | None, noise: random.Random) -> TrialResult:
    """A result as far as an optimizer looks at it."""
    common = {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "phase_seconds": {"compile": 20.0},
    }
    if times is None:
        return Failed.model_construct(outcome="error", reason="", phase="compile", **common)
    seen = {name: ms * (1 + noise.gauss(0, _NOISE)) for name, ms in times.items()}
    stages = {name: ms for name, ms in seen.items() if name != IDLE}
    return Ok.model_construct(
        latency=results.Latency.model_construct(mean_ms=sum(seen.values())),
        kernels=results.Kernels.model_construct(stage_ms=stages),
        **common,
    )


def main(argv: list[str] | None = None) -> int:
    """Search with each sampler and seed, and print the table."""
    own = _parser().parse_args(argv)
    space, compose = _full()
    space, _ = prepare(space, compose, H100, allow_lossy=False)
    points = Points(space, compose, H100)
    atlas = Map(space, points)
    source = "made up for each seed"
    shared: Call | None = None
    if own.recorded:
        shared, count = recorded(own.recorded, space)
        source = f"a model of {count} recorded trials"
    print(f"{source}; {own.seeds} seeds, {own.trials} trials each", flush=True)
    curves: dict[str, list[list[float]]] = {name: [] for name in own.sampler}
    shared_best = math.inf if shared is None else best_of(shared, atlas, 0)
    for seed in range(own.seeds):
        call = shared or made_up(seed, atlas)
        best = shared_best if shared else best_of(call, atlas, seed)
        found = {}
        for name in own.sampler:
            began = time.process_time()
            found[name] = search(name, seed, call, (space, points), own.trials, own.pending)
            took = (time.process_time() - began) / own.trials
            print(f"seed {seed} {name}: {took:.2f} s a trial", file=sys.stderr, flush=True)
        best = min(best, *(curve[-1] for curve in found.values()))
        for name, curve in found.items():
            curves[name].append([ms / best - 1 for ms in curve])
        ends = ", ".join(f"{name} {each[-1][-1]:+.1%}" for name, each in curves.items())
        print(f"seed {seed}: {ends}", file=sys.stderr, flush=True)
        if own.json is not None:
            own.json.write_text(json.dumps(curves) + "\n")
    for line in table(curves, own.trials):
        print(line)
    return 0


def table(curves: Mapping[str, list[list[float]]], trials: int) -> list[str]:
    """Markdown: trials until within each share of the best, and the gap at the end."""
    heads = [f"within {share:.0%}" for share in WITHIN]
    lines = [
        f"| sampler | {' | '.join(heads)} | after {trials} |",
        "|---" * (len(WITHIN) + 2) + "|",
    ]
    for name, found in curves.items():
        cells = []
        for share in WITHIN:
            reached = [
                next((n + 1 for n, gap in enumerate(c) if gap <= share), None) for c in found
            ]
            counts = [n if n is not None else math.inf for n in reached]
            middle = statistics.median_high(counts)
            text = f"{middle:.0f}" if math.isfinite(middle) else f"more than {trials}"
            cells.append(f"{text} ({sum(n is not None for n in reached)} of {len(found)})")
        gap = statistics.median(c[-1] for c in found)
        lines.append(f"| {name} | {' | '.join(cells)} | {gap:+.1%} |")
    return lines


def _full() -> tuple[Space, Composer]:
    """`space=full` for the full model, as a sweep's command line gives it."""
    words = ["space=full", "model=pi0", "workload=three_cameras", "platform=cuda"]
    composer = Composer()
    named = Settings.parse(composer.settings(words)).space
    return named.join(words, composer.options), composer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.samplers",
        description="Trials until within 10, 5 and 2% of the best, for each sampler.",
    )
    parser.add_argument(
        "recorded", nargs="*", type=Path, help="journal.jsonl[.gz] or a folder of results"
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--pending", type=int, default=0, help="trials that run when one begins")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave every curve there")
    parser.add_argument(
        "--sampler", nargs="+", default=["stages", "tpe", "gp", "random"], metavar="NAME"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
