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
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

CONFIDENCE = 0.95
# Draws for a probability of 97%: it is then known to 0.3%.
_DRAWS = 4000
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
        return self.tau * math.sqrt(freedom / float(stats.chi2.ppf(1 - CONFIDENCE, freedom)))

    def power(self, gain: float, pairs: int, alpha: float) -> float:
        """How often the paired t test at level `alpha` finds `gain` in pairs drawn from this noise,
        widened to the upper bound of its spread."""
        drawn = self._draw(self.contenders, (_DRAWS, pairs), 1)
        drawn = drawn - self._draw(self.baseline, (_DRAWS, pairs), 2)
        means = -math.log1p(-gain) + drawn.mean(axis=1)
        deviations = drawn.std(axis=1, ddof=1)
        critical = float(stats.t.isf(alpha, pairs - 1))
        return float(np.mean(means > critical * deviations / math.sqrt(pairs)))

    def chance_selected(self, gain: float, runs: int, contenders: int, finalists: int) -> float:
        """How often one that is faster by `gain` is among the `finalists` of `contenders` others
        equal, each with `runs` processes drawn from this noise."""
        if contenders <= finalists:
            return 1.0
        means = self._draw(self.contenders, (runs, _DRAWS // 2, contenders), 3).mean(axis=0)
        mine = means[:, 0] + math.log1p(-gain)
        return float(np.mean(np.sum(means[:, 1:] < mine[:, None], axis=1) < finalists))

    def _draw(self, residuals: Sequence[float], shape: tuple[int, ...], seed: int) -> Array:
        wider = self.upper / self.tau if self.tau else 1.0
        random = np.random.default_rng([_SEED, seed])
        return random.choice(np.asarray(residuals) * wider, shape)


def noise_of(
    baseline_logs: Sequence[float], contender_logs: Iterable[Sequence[float]] = ()
) -> Noise:
    """The noise that logarithms of means show: of the baseline, and of each contender.

    Contenders with one process say nothing; when none has two, the baseline stands for them.
    """
    baseline, freedom = _residuals([baseline_logs])
    contenders, others = _residuals(contender_logs)
    if not others:
        contenders, others = baseline, freedom
    elif _variance(baseline) < _variance(contenders):
        # So few processes often show no tail where there is one.
        baseline, freedom = contenders, others
    return Noise(baseline, freedom, contenders, others)


def _residuals(groups: Iterable[Sequence[float]]) -> tuple[tuple[float, ...], int]:
    found: list[float] = []
    freedom = 0
    for logs in groups:
        if len(logs) > 1:
            wider = math.sqrt(len(logs) / (len(logs) - 1))
            found += ((np.asarray(logs) - np.mean(logs)) * wider).tolist()
            freedom += len(logs) - 1
    return tuple(found), freedom


def _variance(residuals: Sequence[float]) -> float:
    return float(np.mean(np.square(residuals)))


def _worth(residuals: Sequence[float], freedom: int) -> float:
    """Degrees of freedom of a normal sample whose variance would be as uncertain."""
    if _variance(residuals) == 0:
        return float(freedom)
    tails = float(np.mean(np.power(residuals, 4))) / _variance(residuals) ** 2 - 3
    return 2 / (2 / freedom + max(0.0, tails) / len(residuals))
