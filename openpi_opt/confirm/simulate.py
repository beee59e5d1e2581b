"""Sweeps and promotions with drawn numbers, through the code that promotes for real.

Noise is what fresh processes of one configuration differ by: normal with a given tau, or drawn
from recorded processes. Drift is a random walk of the machine from process to process.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray
from pydantic import ValidationError

from openpi_opt import result as results
from openpi_opt.confirm import promotion
from openpi_opt.confirm.judge import Subject
from openpi_opt.confirm.promotion import Judged, Mean, Place, Schedule, Stage, Wanted
from openpi_opt.errors import UserError
from openpi_opt.result import Ok

BASELINE = "baseline"
# Any: gains are ratios.
_LEVEL_MS = 20.0
_BLOCK = 4096
_SHIPPED = Path(__file__).with_name("recorded_noise.json")
MIN_RESIDUALS = 8

Noise = Callable[[int], NDArray[np.float64]]


@dataclass(frozen=True)
class Scene:
    """What is true: by how much each configuration is faster than the baseline, in their order."""

    gains: NDArray[np.float64]
    drift: float = 0.0


@dataclass(frozen=True)
class Rate:
    """How often something happened, with its exact 95% interval (Clopper and Pearson 1934)."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.of

    def interval(self) -> tuple[float, float]:
        """95% interval."""
        found = scipy.stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.1%} ({self.count} of {self.of}; 95% interval {low:.1%} to {high:.1%})"


class SimulatedBench:
    """A `promotion.Bench` that draws. One for each simulated sweep."""

    def __init__(self, scene: Scene, noise: Noise, seed: int):
        self._random = np.random.default_rng(seed)
        self._noise, self._scene = noise, scene
        self._walked, self._place = 0.0, 0
        self._values = np.empty(0)
        keys = [BASELINE, *(f"c{number}" for number in range(len(scene.gains)))]
        levels = np.concatenate([[0.0], np.log1p(-scene.gains)]) + np.log(_LEVEL_MS)
        self._levels = dict(zip(keys, levels.tolist(), strict=True))

    def subjects(self) -> list[Subject]:
        """The configurations as a sweep leaves them: one process each, in order."""
        return [
            Subject(key, changed=1 + number % 3, order=number, first_ms=self._draw(key))
            for number, key in enumerate(self._levels)
            if key != BASELINE
        ]

    def means(self, stage: Stage, places: Iterable[Place]) -> Generator[Mean, None, None]:
        """Draw the means of processes."""
        for key, number in places:
            yield key, number, self._draw(key)

    def seconds(self, key: str) -> float:
        """Time is no matter here."""
        return 1.0

    def note(self, text: str) -> None:
        """Nothing to say, 500 times."""

    def schedule(self) -> Schedule | None:
        """A new promotion each time."""
        return None

    def keep(self, schedule: Schedule) -> None:
        """Nothing: it is not interrupted."""

    def _draw(self, key: str) -> float:
        if self._place == len(self._values):
            self._values = self._block()
            self._place = 0
        value = self._values[self._place]
        self._place += 1
        return float(np.exp(self._levels[key] + value))

    def _block(self) -> NDArray[np.float64]:
        """Noise and drift of the next processes, which go on from the last."""
        values = self._noise(int(self._random.integers(2**32)))
        if self._scene.drift:
            steps = self._random.normal(0, self._scene.drift, len(values))
            walk = self._walked + np.cumsum(steps)
            self._walked = float(walk[-1])
            values = values + walk
        return values


def normal(tau: float) -> Noise:
    """Noise of a given standard deviation, relative."""
    return lambda seed: np.random.default_rng(seed).normal(0, tau, _BLOCK)


def recorded(residuals: NDArray[np.float64], tau: float) -> Noise:
    """Noise drawn with replacement from what processes really differed by, scaled to `tau`."""
    scaled = residuals * (tau / np.std(residuals))
    return lambda seed: np.random.default_rng(seed).choice(scaled, _BLOCK)


def shipped() -> tuple[NDArray[np.float64], str]:
    """Residuals of processes that were recorded for this project, and what they are of."""
    document = json.loads(_SHIPPED.read_text(encoding="utf-8"))
    return np.asarray(document["residuals"]), document["what"]


def simulate(scene: Scene, noise: Noise, wanted: Wanted, seed: int) -> Judged:
    """One sweep and its promotion."""
    bench = SimulatedBench(scene, noise, seed)
    contenders = bench.subjects()
    return promotion.run(bench, Subject(BASELINE), contenders, replace(wanted, seed=seed))


def equal(
    configurations: int, sweeps: int, noise: Noise, wanted: Wanted, drift: float = 0.0
) -> Rate:
    """How often something is promoted though no configuration is faster than the baseline."""
    scene = Scene(np.zeros(configurations), drift)
    return Rate(
        sum(
            simulate(scene, noise, wanted, seed).winner.subject.key != BASELINE
            for seed in range(sweeps)
        ),
        sweeps,
    )


def one_faster(
    gain: float, configurations: int, sweeps: int, noise: Noise, wanted: Wanted, drift: float = 0.0
) -> tuple[Rate, Rate]:
    """How often the one that is faster by `gain` is promoted, and how often too much is claimed.

    Which of the configurations it is changes from sweep to sweep.
    """
    promoted = overclaimed = 0
    for seed in range(sweeps):
        true = seed % configurations
        gains = np.zeros(configurations)
        gains[true] = gain
        winner = simulate(Scene(gains, drift), noise, wanted, seed).winner
        promoted += winner.subject.key == f"c{true}"
        overclaimed += (
            winner.gain is not None and winner.gain.low > gains[int(winner.subject.key[1:])]
        )
    return Rate(promoted, sweeps), Rate(overclaimed, sweeps)


def all_faster(
    gain: float, configurations: int, sweeps: int, noise: Noise, wanted: Wanted, drift: float = 0.0
) -> Rate:
    """All are faster than the baseline by `gain`: how often a tie goes to the farther one."""
    scene = Scene(np.full(configurations, gain), drift)
    wrong = 0
    for seed in range(sweeps):
        found = simulate(scene, noise, wanted, seed)
        nearest = min((c.subject for c in found.candidates), key=lambda s: (s.changed, s.order))
        wrong += found.winner.subject.key not in (nearest.key, BASELINE)
    return Rate(wrong, sweeps)


def residuals(files: Iterable[Path]) -> NDArray[np.float64]:
    """What recorded processes differ by from the mean of their configuration, on the log scale.

    Takes result documents, journals, and reports of `pairs`. Processes are grouped by configuration
    and machine; each group's residuals are widened by sqrt(n / (n - 1)) for the mean that was taken
    off.

    Raises:
        UserError: an unreadable file, or too few repeated processes.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for file in files:
        for key, mean_ms in _means(file):
            groups[key].append(float(np.log(mean_ms)))
    parts = [
        (np.asarray(logs) - np.mean(logs)) * np.sqrt(len(logs) / (len(logs) - 1))
        for logs in groups.values()
        if len(logs) > 1
    ]
    count = sum(map(len, parts))
    if count < MIN_RESIDUALS or not any(np.any(part) for part in parts):
        raise UserError(
            f"--samples: {count} processes of configurations that were measured more than once; "
            f"at least {MIN_RESIDUALS} that differ are needed.\nGive the journal of a study that "
            "was promoted (mlruns/studies/NAME/journal.jsonl), or result.json files of repeated "
            "trials."
        )
    return np.concatenate(parts)


def _means(file: Path) -> list[tuple[tuple[str, str], float]]:
    """Configuration with machine, and mean in ms, of each process of a file that was ok."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--samples {file}: cannot be read ({error}).") from error
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    try:
        plain = [json.loads(line) for line in lines if line.strip()]
        return [mean for document in plain for mean in _means_of(document)]
    except (ValueError, TypeError, AttributeError, KeyError, ValidationError) as error:
        raise UserError(
            f"--samples {file}: neither a result document (result.json), a journal "
            "(journal.jsonl), nor a report of pairs (pairs.json) of this project."
        ) from error


def _means_of(document: dict[str, Any]) -> list[tuple[tuple[str, str], float]]:
    if "processes" in document and "a_b" in document:  # a report of pairs
        hashes = {"B": document["b"]["config_hash"]}
        machine = str(document["fingerprint_hash"])
        return [
            ((hashes.get(p["role"], document["a"]["config_hash"]), machine), float(p["mean_ms"]))
            for p in document["processes"]
        ]
    found = results.parse_plain(document.get("result", document))
    if not isinstance(found, Ok):
        return []
    machine = json.dumps(found.fingerprint, sort_keys=True)
    return [((found.config_hash, machine), found.latency.mean_ms)]
