"""Sweeps and promotions with drawn numbers, by the code that promotes: `promote --simulate`.

Noise is what fresh processes of one configuration differ by: normal with a given tau, or drawn
from recorded processes. Drift is a random walk of the machine from process to process.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray

from openpi_opt import cli
from openpi_opt import result as results
from openpi_opt.confirm import power, promotion
from openpi_opt.confirm.judge import Subject
from openpi_opt.confirm.promotion import Judged, Stage, Wanted
from openpi_opt.errors import UserError
from openpi_opt.result import Ok

BASELINE = "baseline"
# Any: gains are ratios.
_LEVEL_MS = 20.0
_BLOCK = 4096
_SHIPPED = Path(__file__).with_name("recorded_noise.json")
MIN_RESIDUALS = 8
MAX_FALSE = 0.01
DEFAULT_TAU = 0.003
# Noise of --samples is scaled down to this: with more, a gain of 1% takes thousands of processes.
MAX_TAU = 0.01
# The gain where all are faster by far more than the noise, for the ties among them.
MOST_FASTER = 0.9
# `--seed N` draws other sweeps than any smaller seed.
_SEEDS = 1_000_000

Noise = Callable[[int], NDArray[np.float64]]


@dataclass(frozen=True)
class Rate:
    """How often something happened, with its exact 95% interval (Clopper and Pearson 1934)."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.of

    def __str__(self) -> str:
        found = scipy.stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        interval = f"95% interval {found.low:.1%} to {found.high:.1%}"
        return f"{self.value:.1%} ({self.count} of {self.of}; {interval})"


class SimulatedBench(promotion.Bench):
    """A `promotion.Bench` that draws; one for each simulated sweep.

    `gains` are true: by how much each configuration is faster than the baseline, in their order.
    """

    def __init__(self, gains: NDArray[np.float64], noise: Noise, seed: int, drift: float = 0.0):
        self._drawn = _draws(noise, np.random.default_rng(seed), drift)
        keys = [BASELINE, *(f"c{number}" for number in range(len(gains)))]
        levels = np.concatenate([[0.0], np.log1p(-gains)]) + np.log(_LEVEL_MS)
        self._levels = dict(zip(keys, levels.tolist(), strict=True))

    def subjects(self) -> list[Subject]:
        """The configurations as a sweep leaves them: one process each, in order."""
        return [
            Subject(key, changed=1 + number % 3, order=number, first_ms=self._draw(key))
            for number, key in enumerate(self._levels)
            if key != BASELINE
        ]

    def means(
        self, stage: Stage, places: Iterable[tuple[str, int]]
    ) -> Generator[tuple[str, float | None], None, None]:
        """Draw the means of processes."""
        for key, _ in places:
            yield key, self._draw(key)

    def _draw(self, key: str) -> float:
        return float(np.exp(self._levels[key] + next(self._drawn)))


def _draws(noise: Noise, random: np.random.Generator, drift: float) -> Iterator[float]:
    """Noise and drift of one process after the other."""
    walked = 0.0
    while True:
        values = noise(int(random.integers(2**32)))
        if drift:
            walk = walked + np.cumsum(random.normal(0, drift, len(values)))
            values, walked = values + walk, float(walk[-1])
        yield from values.tolist()


def normal(tau: float) -> Noise:
    """Noise of a given standard deviation, relative."""
    return lambda seed: np.random.default_rng(seed).normal(0, tau, _BLOCK)


def recorded(residuals: NDArray[np.float64], tau: float) -> Noise:
    """Noise drawn with replacement from what processes really differed by, scaled to `tau`."""
    scaled = residuals * (tau / np.std(residuals))
    return lambda seed: np.random.default_rng(seed).choice(scaled, _BLOCK)


def shipped() -> NDArray[np.float64]:
    """Residuals of processes that were recorded for this project."""
    return np.asarray(json.loads(_SHIPPED.read_text(encoding="utf-8"))["residuals"])


@dataclass(frozen=True)
class Sweeps:
    """What is simulated: `count` sweeps of `configurations` each, and their promotions."""

    configurations: int
    count: int
    noise: Noise
    wanted: Wanted
    drift: float = 0.0

    def promoted(self, *gains: float) -> Iterator[tuple[dict[str, float], Judged]]:
        """The promotion of each sweep, with the true gains of its configurations.

        The first ones have `gains`, the others none; which these are moves on from sweep to sweep.
        """
        given = np.zeros(self.configurations)
        given[: len(gains)] = gains
        for number in range(self.count):
            true, seed = np.roll(given, number), self.wanted.seed * _SEEDS + number
            bench = SimulatedBench(true, self.noise, seed, self.drift)
            wanted = replace(self.wanted, seed=seed)
            truth = {BASELINE: 0.0, **{f"c{n}": gain for n, gain in enumerate(true.tolist())}}
            yield truth, promotion.run(bench, Subject(BASELINE), bench.subjects(), wanted)

    def equal(self) -> Rate:
        """How often something is promoted though no configuration is faster than the baseline."""
        return _rate(judged.winner.subject.key != BASELINE for _, judged in self.promoted())

    def one_faster(self, gain: float) -> tuple[Rate, Rate]:
        """How often the one faster by `gain` is promoted, and how often too much is claimed."""
        won = [(truth[j.winner.subject.key], j.winner.gain) for truth, j in self.promoted(gain)]
        found = _rate(true == gain for true, _ in won)
        return found, _rate(claimed is not None and claimed.low > true for true, claimed in won)

    def all_faster(self, gain: float) -> Rate:
        """All are faster than the baseline by `gain`: how often a tie goes to the farther one."""

        def wrong(found: Judged) -> bool:
            nearest = min((c.subject for c in found.candidates), key=lambda s: (s.changed, s.order))
            return found.winner.subject.key not in (nearest.key, BASELINE)

        return _rate(wrong(found) for _, found in self.promoted(*[gain] * self.configurations))


def _rate(happened: Iterable[bool]) -> Rate:
    each = list(happened)
    return Rate(sum(each), len(each))


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print rates with exact 95% intervals; 0 when the promise is kept, else 1.

    Raises UserError: samples that cannot be read.
    """
    arguments = _parser().parse_args(argv)
    if arguments.normal:
        tau, noise, source = arguments.tau or DEFAULT_TAU, normal, "normal"
    else:
        found = residuals(arguments.samples) if arguments.samples else shipped()
        own = min(float(np.std(found)), MAX_TAU) if arguments.samples else DEFAULT_TAU
        tau, noise = arguments.tau or own, partial(recorded, found)
        source = (
            f"distributed as {len(found)} recorded processes: skewness "
            f"{scipy.stats.skew(found):+.1f}, excess kurtosis {scipy.stats.kurtosis(found):+.1f}"
        )
    wanted = Wanted(seed=arguments.seed, finalists=arguments.finalists)
    counts = arguments.configurations, arguments.sweeps
    sweeps = Sweeps(*counts, noise(tau), wanted, arguments.drift)
    print(
        f"{sweeps.count} sweeps of {sweeps.configurations} configurations each, spread between "
        f"processes {tau:.2%} ({source}), drift {sweeps.drift:.2%} per process, up to "
        f"{arguments.finalists} finalists"
    )
    false = sweeps.equal()
    print(f"all equal: something was promoted in {false}")
    found_rate, overclaimed = sweeps.one_faster(arguments.gain)
    print(f"one {arguments.gain:.1%} faster: it was promoted in {found_rate}")
    print(f"  more gain was claimed than there is in {overclaimed}")
    obvious = min(10 * arguments.gain, MOST_FASTER)
    print(
        f"all {obvious:.0%} faster, equal among themselves: the tie went to one "
        f"farther from the baseline in {sweeps.all_faster(obvious)}"
    )
    kept = false.value <= MAX_FALSE and found_rate.value >= power.PROBABILITY
    print(
        f"promise (at most {MAX_FALSE:.0%}, at least {power.PROBABILITY:.0%}): "
        + ("kept" if kept else "NOT kept")
    )
    return 0 if kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.promote --simulate",
        description="Simulate sweeps and promote them with the code that promotes for real: how "
        "often is something promoted that is not faster, how often is what is faster found?",
    )
    parser.add_argument("--simulate", action="store_true", help=argparse.SUPPRESS)
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument(
        "--samples",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="draw the noise from these recorded processes: result.json or journal.jsonl "
        "files (default: processes that come with the project)",
    )
    noise.add_argument("--normal", action="store_true", help="draw normal noise instead")
    count = cli.at_least(1)
    for name, kind, default, text in (
        ("tau", _positive, None, "spread between processes, as 0.003 or 0.3%% (default: 0.3%%; "
         "with --samples theirs, at most 1%%)"),
        ("gain", _positive, power.GAIN, "gain of the faster one (default: 1%%)"),
        ("drift", _share, 0.0, "random walk per process (default: 0)"),
        ("configurations", count, 60, "of a sweep (default: 60)"),
        ("sweeps", count, 500, "of each kind (default: 500)"),
        ("seed", cli.at_least(0), 0, "another one draws other sweeps (default: 0)"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    add_finalists(parser)
    return parser


def add_finalists(parser: argparse.ArgumentParser) -> None:
    """The option `--finalists`, the same for a promotion and for simulated ones."""
    parser.add_argument(
        "--finalists",
        type=int,
        choices=range(1, power.MAX_FINALISTS + 1),
        default=power.MAX_FINALISTS,
        help="candidates in confirmation, at most (default: %(default)s)",
    )


def _share(text: str) -> float:
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.5 (50%)")
    return value


def _positive(text: str) -> float:
    if not (value := _share(text)):
        raise argparse.ArgumentTypeError(f"{text} is neither a spread nor a gain: give more than 0")
    return value


_share.__name__ = _positive.__name__ = "number"


def residuals(files: Iterable[Path]) -> NDArray[np.float64]:
    """What recorded processes differ by from the mean of their configuration, on the log scale.

    Takes result documents and journals. Processes are grouped by configuration and machine; each
    group's residuals are widened by sqrt(n / (n - 1)) for the mean that was taken off. Raises
    UserError: an unreadable file, or too few repeated processes.
    """
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for found in (each for file in files for each in _results(file)):
        if isinstance(found, Ok):
            machine = json.dumps(found.fingerprint, sort_keys=True)
            groups[found.config_hash, machine].append(float(np.log(found.latency.mean_ms)))
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


def _results(file: Path) -> list[results.TrialResult]:
    """The results that a journal or a result document holds."""
    try:
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        plain = [json.loads(line) for line in lines if line.strip()]
        return [results.parse_plain(each.get("result", each)) for each in plain]
    except OSError as error:
        raise UserError(f"--samples {file}: cannot be read ({error}).") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"--samples {file}: neither a result document (result.json) nor a journal "
            "(journal.jsonl) of this project."
        ) from error
