"""What fresh processes really differ by, and what that does to a plan made for normal noise.

A few processes in a crowd that are slow for a reason of their own (another program, another memory
layout) make a t test weaker than a normal distribution of the same spread would. So a plan is tried
out: promotions are drawn from the residuals that were seen, before the first confirmation run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.90
# Draws for a probability of 97%: it is then known to 0.3%.
_DRAWS = 4000
# Means of so many processes are normal whatever the noise is.
_MANY = 24
# Neighbours in time whose average is the drift: more than a round of confirmation has, so that
# what is left is what differs within a round.
WINDOW = 15
_TURNS = 4
_SEED = 20_240_607


@dataclass(frozen=True)
class Noise:
    """Residuals of the logarithms of processes' means, of the baseline and of the contenders.

    Each list has the variance of a process: residuals from the mean of n processes are widened by
    sqrt(n / (n - 1)). The numbers are the degrees of freedom in them.
    """

    baseline: tuple[float, ...]
    baseline_freedom: int
    contenders: tuple[float, ...]
    contenders_freedom: int

    @cached_property
    def tau(self) -> float:
        """The spread of a process (standard deviation) that gives the spread of a pair, by √2."""
        return math.sqrt((_variance(self.baseline) + _variance(self.contenders)) / 2)

    @cached_property
    def upper(self) -> float:
        """Upper bound of `tau` at `CONFIDENCE`.

        The sum of both variances as one chi-squared variable (Satterthwaite, Biometrics Bulletin 2,
        1946); tails that were seen make a variance less certain (O'Neill, The American Statistician
        68, 2014).
        """
        parts = [
            (_variance(self.baseline), _worth(self.baseline, self.baseline_freedom)),
            (_variance(self.contenders), _worth(self.contenders, self.contenders_freedom)),
        ]
        total = sum(variance for variance, _ in parts)
        if total == 0:
            return 0.0
        freedom = total**2 / sum(variance**2 / worth for variance, worth in parts)
        if self.baseline == self.contenders:  # one sample, not two
            freedom /= 2
        return self.tau * math.sqrt(freedom / float(scipy.stats.chi2.ppf(1 - CONFIDENCE, freedom)))

    @cached_property
    def excess_kurtosis(self) -> float:
        """0 for normal noise; large where few processes are slow by far more than others differ."""
        return max(_tails(self.baseline), _tails(self.contenders))

    def power(self, gain: float, pairs: int, alpha: float) -> float:
        """How often the paired t test at level `alpha` finds `gain` in pairs drawn from this noise,
        widened to the upper bound of its spread."""
        drawn = self._draw(self.contenders, (_DRAWS, pairs), 1)
        drawn = drawn - self._draw(self.baseline, (_DRAWS, pairs), 2)
        means = -math.log1p(-gain) + drawn.mean(axis=1)
        deviations = drawn.std(axis=1, ddof=1)
        critical = float(scipy.stats.t.isf(alpha, pairs - 1))
        return float(np.mean(means > critical * deviations / math.sqrt(pairs)))

    def chance_selected(self, gain: float, runs: int, contenders: int, finalists: int) -> float:
        """How often one that is faster by `gain` is among the `finalists` of `contenders` others
        equal, each with `runs` processes drawn from this noise."""
        if contenders <= finalists:
            return 1.0
        shape = (_DRAWS // 2, contenders)
        if runs > _MANY:
            spread = self.upper / self.tau * math.sqrt(_variance(self.contenders) / runs)
            means = np.random.default_rng(_SEED).normal(0, spread, shape)
        else:
            means = np.zeros(shape)
            for number in range(runs):
                means += self._draw(self.contenders, shape, 3 + number) / runs
        mine = means[:, 0] + math.log1p(-gain)
        return float(np.mean(np.sum(means[:, 1:] < mine[:, None], axis=1) < finalists))

    def _draw(self, residuals: Sequence[float], shape: tuple[int, ...], seed: int) -> Array:
        wider = self.upper / self.tau if self.tau else 1.0
        random = np.random.default_rng([_SEED, seed])
        return random.choice(np.asarray(residuals) * wider, shape)


def noise_of(baseline_logs: Sequence[float], fit: Fit) -> Noise:
    """The noise of logarithms of means: of the baseline's processes, and of the contenders' fit.

    Raises:
        ValueError: fewer than two processes of the baseline.
    """
    count = len(baseline_logs)
    if count < 2:
        raise ValueError(f"need two or more processes, got {count}")
    wider = math.sqrt(count / (count - 1))
    baseline = (np.asarray(baseline_logs) - np.mean(baseline_logs)) * wider
    contenders, freedom = fit.residuals, fit.freedom
    if freedom < 1:
        contenders, freedom = tuple(baseline.tolist()), count - 1
    if _variance(baseline) < _variance(contenders):
        # So few processes often show no tail where there is one.
        return Noise(contenders, freedom, contenders, freedom)
    return Noise(tuple(baseline.tolist()), count - 1, contenders, freedom)


@dataclass(frozen=True)
class Fit:
    """Levels of configurations on the log scale, free of drift, and what is left.

    `residuals` have the variance of a process; `freedom` are the degrees of freedom in them, 0 or
    less where nothing can be left.
    """

    levels: dict[str, float]
    residuals: tuple[float, ...]
    freedom: int


def fit(series: Iterable[Sequence[tuple[str, float]]]) -> Fit:
    """Fit processes that ran one after another, as (configuration, logarithm of its mean).

    Each series is a stretch of time of its own. A process is the level of its configuration, plus
    a drift common to all, plus noise. Levels and drift (a moving average over `WINDOW` neighbours)
    are fitted in turns: backfitting (Buja, Hastie and Tibshirani, The Annals of Statistics 17,
    1989). The order of the configurations is random, so the two hardly mix.
    """
    every = [list(each) for each in series if each]
    keys = list(dict.fromkeys(key for each in every for key, _ in each))
    place = {key: number for number, key in enumerate(keys)}
    who = [np.array([place[key] for key, _ in each]) for each in every]
    logs = [np.array([log for _, log in each]) for each in every]
    if not keys:
        return Fit({}, (), 0)
    drift = [np.zeros(len(each)) for each in logs]
    all_who = np.concatenate(who)
    counts = np.bincount(all_who, minlength=len(keys))
    for _ in range(_TURNS):
        free = np.concatenate(logs) - np.concatenate(drift)
        levels = np.bincount(all_who, free, minlength=len(keys)) / counts
        drift = [_smooth(each - levels[mine]) for each, mine in zip(logs, who, strict=True)]
    left = np.concatenate(logs) - np.concatenate(drift) - levels[all_who]
    taken = len(keys) + sum(max(1.0, len(each) / WINDOW) for each in logs) - 1
    freedom = math.floor(len(left) - taken)
    wider = math.sqrt(len(left) / freedom) if freedom > 0 else 0.0
    found = dict(zip(keys, levels.tolist(), strict=True))
    return Fit(found, tuple((left * wider).tolist()), freedom)


def _smooth(values: Array) -> Array:
    """Moving average [n] over `WINDOW` neighbours, fewer at the ends."""
    window = np.ones(min(WINDOW, 2 * len(values) - 1))
    return (
        np.convolve(values, window, "same")[: len(values)]
        / np.convolve(np.ones(len(values)), window, "same")[: len(values)]
    )


def _variance(residuals: Sequence[float]) -> float:
    return float(np.mean(np.square(residuals)))


def _worth(residuals: Sequence[float], freedom: int) -> float:
    """Degrees of freedom of a normal sample whose variance would be as uncertain."""
    return 2 / (2 / freedom + max(0.0, _tails(residuals)) / len(residuals))


def _tails(residuals: Sequence[float]) -> float:
    """Excess kurtosis around 0; 0 where there is no scatter."""
    variance = _variance(residuals)
    return float(np.mean(np.power(residuals, 4))) / variance**2 - 3 if variance else 0.0
