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
from openpi_opt.confirm.promotion import Judged, Wanted
from openpi_opt.confirm.rounds import Mean, Numbered, Stage
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

    def interval(self) -> tuple[float, float]:
        """95% interval."""
        found = scipy.stats.binomtest(self.count, self.of).proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.1%} ({self.count} of {self.of}; 95% interval {low:.1%} to {high:.1%})"


class SimulatedBench(promotion.Bench):
    """A `promotion.Bench` that draws; one for each simulated sweep.

    `gains` are true: by how much each configuration is faster than the baseline, in their order.
    """

    def __init__(self, gains: NDArray[np.float64], noise: Noise, seed: int, drift: float = 0.0):
        self._random = np.random.default_rng(seed)
        self._drawn = self._draws(noise, drift)
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

    def means(self, stage: Stage, places: Iterable[Numbered]) -> Generator[Mean, None, None]:
        """Draw the means of processes."""
        for key, number in places:
            yield key, number, self._draw(key)

    def _draw(self, key: str) -> float:
        return float(np.exp(self._levels[key] + next(self._drawn)))

    def _draws(self, noise: Noise, drift: float) -> Iterator[float]:
        """Noise and drift of one process after the other."""
        walked = 0.0
        while True:
            values = noise(int(self._random.integers(2**32)))
            if drift:
                walk = walked + np.cumsum(self._random.normal(0, drift, len(values)))
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

    def promoted(self, gains: NDArray[np.float64], number: int) -> Judged:
        """One sweep and its promotion; `gains` are true, `number` draws the noise."""
        seed = self.wanted.seed * _SEEDS + number
        bench = SimulatedBench(gains, self.noise, seed, self.drift)
        wanted = replace(self.wanted, seed=seed)
        return promotion.run(bench, Subject(BASELINE), bench.subjects(), wanted)

    def equal(self) -> Rate:
        """How often something is promoted though no configuration is faster than the baseline."""
        gains = np.zeros(self.configurations)
        winners = (self.promoted(gains, n).winner for n in range(self.count))
        return Rate(sum(winner.subject.key != BASELINE for winner in winners), self.count)

    def one_faster(self, gain: float) -> tuple[Rate, Rate]:
        """How often the one faster by `gain` is promoted, and how often too much is claimed.

        Which of the configurations it is changes from sweep to sweep.
        """
        promoted = overclaimed = 0
        for number in range(self.count):
            gains = np.zeros(self.configurations)
            gains[true := number % self.configurations] = gain
            winner = self.promoted(gains, number).winner
            promoted += winner.subject.key == f"c{true}"
            overclaimed += (
                winner.gain is not None and winner.gain.low > gains[int(winner.subject.key[1:])]
            )
        return Rate(promoted, self.count), Rate(overclaimed, self.count)

    def all_faster(self, gain: float) -> Rate:
        """All are faster than the baseline by `gain`: how often a tie goes to the farther one."""
        wrong = 0
        for number in range(self.count):
            found = self.promoted(np.full(self.configurations, gain), number)
            nearest = min((c.subject for c in found.candidates), key=lambda s: (s.changed, s.order))
            wrong += found.winner.subject.key not in (nearest.key, BASELINE)
        return Rate(wrong, self.count)


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
        tau, noise, source = arguments.tau or own, partial(recorded, found), _described(found)
    sweeps = Sweeps(
        configurations=arguments.configurations,
        count=arguments.sweeps,
        noise=noise(tau),
        wanted=Wanted(seed=arguments.seed, finalists=arguments.finalists),
        drift=arguments.drift,
    )
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


def _described(residuals: NDArray[np.float64]) -> str:
    return (
        f"distributed as {len(residuals)} recorded processes: skewness "
        f"{scipy.stats.skew(residuals):+.1f}, excess kurtosis "
        f"{scipy.stats.kurtosis(residuals):+.1f}"
    )


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
    count, share, positive = cli.at_least(1), _share, _positive_share
    for name, kind, default, text in (
        ("tau", positive, None, "spread between processes, as 0.003 or 0.3%% (default: 0.3%%; with "
         "--samples theirs, at most 1%%)"),
        ("gain", positive, power.GAIN, "gain of the faster one (default: 1%%)"),
        ("drift", share, 0.0, "random walk per process (default: 0)"),
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


def _positive_share(text: str) -> float:
    if not (value := _share(text)):
        raise argparse.ArgumentTypeError(f"{text} is neither a spread nor a gain: give more than 0")
    return value


_share.__name__ = _positive_share.__name__ = "number"


def residuals(files: Iterable[Path]) -> NDArray[np.float64]:
    """What recorded processes differ by from the mean of their configuration, on the log scale.

    Takes result documents and journals. Processes are grouped by configuration and machine; each
    group's residuals are widened by sqrt(n / (n - 1)) for the mean that was taken off. Raises
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
        lines = text.splitlines() if file.suffix == ".jsonl" else [text]
        plain = [json.loads(line) for line in lines if line.strip()]
        parsed = [results.parse_plain(each.get("result", each)) for each in plain]
    except OSError as error:
        raise UserError(f"--samples {file}: cannot be read ({error}).") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"--samples {file}: neither a result document (result.json) nor a journal "
            "(journal.jsonl) of this project."
        ) from error
    return [
        ((found.config_hash, json.dumps(found.fingerprint, sort_keys=True)), found.latency.mean_ms)
        for found in parsed
        if isinstance(found, Ok)
    ]
