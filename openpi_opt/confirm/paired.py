"""What pairs of fresh processes say: of a configuration against itself, and against another.

A round holds three processes in random order: A, A again, and B. The pair A, A again must show
nothing (it shows what the machine does by itself); the pair A, B is the comparison. Differences are
those of the logarithms of the processes' means, as everywhere in a promotion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not

from openpi_opt.confirm import power
from openpi_opt.confirm.judge import Gain, gain

CONFIDENCE = 0.95
MIN_PAIRS = 3
# Of the check by flipped signs; with fewer than 15 pairs scipy goes through all flips instead.
FLIPS = 19_999


@dataclass(frozen=True)
class Compared:
    """Pairs of processes of a first and a second configuration.

    `differences` are log(second / first) by round. `change` is what the second takes more than the
    first, as a share, with its two-sided 95% interval (`low`, `high`; Student's t on the
    logarithms) and its `p_value`; `flip_p_value` is that of the same question asked without a
    distribution, by flipping the signs of the differences. `judged` is the promotion's own
    judgement of the second against the first, at the level of a promotion with one finalist.
    """

    differences: list[float]
    change: float
    low: float
    high: float
    p_value: float
    flip_p_value: float
    judged: Gain

    @property
    def spread(self) -> float:
        """Spread between processes (tau) that these pairs show: that of a difference, over √2.

        What moves both processes of a round alike (slow drift) is not in it.
        """
        return float(np.std(self.differences, ddof=1)) / math.sqrt(2)


def compare(first_ms: Sequence[float], second_ms: Sequence[float], seed: int = 0) -> Compared:
    """Compare the means of paired processes in milliseconds.

    Raises:
        ValueError: fewer than `MIN_PAIRS` pairs, or lists of different length.
    """
    if len(first_ms) != len(second_ms) or len(first_ms) < MIN_PAIRS:
        raise ValueError(
            f"need {MIN_PAIRS} or more pairs, got {len(first_ms)} and {len(second_ms)}"
        )
    first, second = np.log(first_ms), np.log(second_ms)
    differences = second - first
    judged = gain(first_ms, second_ms, power.level(1))
    if not np.any(differences != differences[0]):  # no scatter, so no test
        certain = float(differences[0] == 0)
        same = math.expm1(float(differences[0]))
        return Compared(differences.tolist(), same, same, same, certain, certain, judged)
    test = scipy.stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    flipped = scipy.stats.permutation_test(
        (second, first),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        random_state=seed,  # scipy calls it rng from 1.15 on, and still knows this name
    )
    return Compared(
        differences=differences.tolist(),
        change=math.expm1(float(differences.mean())),
        low=math.expm1(float(interval.low)),
        high=math.expm1(float(interval.high)),
        p_value=float(test.pvalue),
        flip_p_value=float(flipped.pvalue),
        judged=judged,
    )


@dataclass(frozen=True)
class Spread:
    """Tau of processes of one configuration, with its 95% interval, and how they lie in time.

    The interval is the chi-squared one: right for normal noise. `excess_kurtosis` is 0 for such
    noise and larger for one with heavy tails. `trend` is Kendall's correlation of latency and
    time with its p-value `trend_p`: drift.
    """

    tau: float
    low: float
    high: float
    processes: int
    excess_kurtosis: float
    trend: float
    trend_p: float


def spread_of(means_ms: Sequence[float]) -> Spread:
    """The spread of processes of one configuration, given in order of time.

    Raises:
        ValueError: fewer than four.
    """
    if len(means_ms) < 4:
        raise ValueError(f"need four or more processes, got {len(means_ms)}")
    logs = np.log(means_ms)
    tau, freedom = power.spread(means_ms), len(logs) - 1
    tail = (1 - CONFIDENCE) / 2
    low, high = (
        tau.value * math.sqrt(freedom / float(scipy.stats.chi2.ppf(q, freedom)))
        for q in (1 - tail, tail)
    )
    if tau.value == 0:
        return Spread(0.0, 0.0, 0.0, len(logs), 0.0, 0.0, 1.0)
    rank = scipy.stats.kendalltau(np.arange(len(logs)), logs)
    return Spread(
        tau=tau.value,
        low=low,
        high=high,
        processes=len(logs),
        excess_kurtosis=float(scipy.stats.kurtosis(logs, bias=False)),
        trend=float(rank.statistic),
        trend_p=float(rank.pvalue),
    )
