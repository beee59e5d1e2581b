"""What a promotion can promise, and how many processes that takes.

The promise: a configuration at least `GAIN` faster than the baseline is promoted with at least
`PROBABILITY`; one that is not faster is promoted in fewer than 1% of promotions. The second half
holds by the level of the test, whatever the spread is (`confirm.judge`). The first half is power.
It needs the spread between fresh processes (tau). Every plan is made before the first confirmation
run; nothing here looks at one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from pydantic import BaseModel, ConfigDict

from openpi_opt.errors import UserError

GAIN = 0.01
PROBABILITY = 0.95
# A plan aims higher than the promise: the formulas take noise for normal, and recorded noise has
# tails. With this aim the simulator finds a gain in 95% of promotions on recorded noise, too.
PLANNED = 0.99
CHOSEN = 0.995  # the part of it that screening has
# The widest gain that is promised when time is short.
WIDEST_GAIN = 0.9
# Each of the two ways to promote wrongly (not faster than the baseline; not faster than a finalist
# nearer to it) has this probability at most, over a whole promotion.
TOTAL_ALPHA = 0.005
MAX_FINALISTS = 5
TAU_PROCESSES = 8
# Where every contender is a finalist, none is screened out. About this many degrees of freedom are
# then measured on the contenders, to know their spread.
NOISE_FREEDOM = 12
NOISE_SHARE = 0.25  # of the time, at most
MIN_PAIRS = 3
# Spreads between processes of a machine that hardly scatters, and of a usual one.
CALM_TAU = 0.0005
USUAL_TAU = 0.003
MIN_SCREENING = 2
# A plan uses the upper bound of tau at this confidence, so that its power holds on average.
TAU_CONFIDENCE = 0.975
# A contender is left out of screening when it is this many standard deviations of a difference
# behind the last finalist's place. For one that belongs there the probability is below 1e-4.
CUT = 6.0
# Above this excess kurtosis a few processes are so slow that a plan may fall short.
WILD = 5.0

_MAX_RUNS = 1 << 20
# Tau is rounded up to this for planning: plans are then remembered, and err to the safe side.
_TAU_STEP = 1e-5
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(61)


@dataclass(frozen=True)
class Tau:
    """The spread between fresh processes: standard deviation of the logarithm of their means.

    For the small values that occur this is the standard deviation relative to the mean. `freedom`
    are the degrees of freedom of the estimate.
    """

    value: float
    freedom: int

    @property
    def upper(self) -> float:
        """Upper bound at `TAU_CONFIDENCE`: freedom s² / tau² is chi-squared for normal noise."""
        return self.value * math.sqrt(
            self.freedom / float(scipy.stats.chi2.ppf(1 - TAU_CONFIDENCE, self.freedom))
        )


def spread(means_ms: Sequence[float]) -> Tau:
    """Tau of the means of processes of one configuration, in milliseconds.

    Raises ValueError: fewer than two processes.
    """
    if len(means_ms) < 2:
        raise ValueError(f"need two or more processes, got {len(means_ms)}")
    return Tau(float(np.std(np.log(means_ms), ddof=1)), len(means_ms) - 1)


def of_pair(baseline: Tau, contenders: Tau) -> Tau:
    """The tau of a process that gives the spread of a pair, baseline against contender.

    All processes are pooled. Where the two differ, the larger of the pooled spread and the mean
    variance of the two counts: many calm contenders do not hide a restless baseline.
    """
    if contenders.freedom < 1:
        return baseline
    freedom = baseline.freedom + contenders.freedom
    pooled = baseline.freedom * baseline.value**2 + contenders.freedom * contenders.value**2
    mean = (baseline.value**2 + contenders.value**2) / 2
    return Tau(math.sqrt(max(pooled / freedom, mean)), freedom)


def level(comparisons: int) -> float:
    """One-sided level of each of some comparisons: `TOTAL_ALPHA` for all of them (Bonferroni).

    They may share processes; Bonferroni needs no independence.
    """
    return TOTAL_ALPHA / max(1, comparisons)


def power(gain: float, tau: float, pairs: int, alpha: float) -> float:
    """Probability that `pairs` pairs of processes show a true `gain` at one-sided level `alpha`.

    The paired t test on logarithms: the statistic is noncentral t with `pairs` - 1 degrees of
    freedom and noncentrality log(1 / (1 - gain)) sqrt(pairs) / (sqrt(2) tau).
    """
    if tau <= 0:
        return 1.0
    shift = -math.log1p(-gain) * math.sqrt(pairs / 2) / tau
    critical = float(scipy.stats.t.isf(alpha, pairs - 1))
    if shift > critical + 40:  # beyond what the noncentral t computes, and certain
        return 1.0
    return float(scipy.stats.nct.sf(critical, pairs - 1, shift))


def pairs_needed(gain: float, tau: float, alpha: float, probability: float) -> int:
    """The least number of pairs whose `power` is at least `probability`."""
    enough = range(MIN_PAIRS, _MAX_RUNS)
    return MIN_PAIRS + bisect_left(enough, probability, key=lambda n: power(gain, tau, n, alpha))


def chance_selected(gain: float, tau: float, runs: int, contenders: int, finalists: int) -> float:
    """Probability that the one contender that is faster by `gain` is among the finalists.

    The others are equal, which is the hardest case, and each has `runs` processes. At the true
    one's mean x the number of others below it is binomial; the integral over x is Gaussian
    quadrature.
    """
    if contenders <= finalists:
        return 1.0
    shift = -math.log1p(-gain) * math.sqrt(runs) / tau if tau > 0 else math.inf
    overtaken = scipy.stats.binom.cdf(
        finalists - 1, contenders - 1, scipy.stats.norm.sf(_NODES + shift)
    )
    return float(np.sum(_WEIGHTS * overtaken) / math.sqrt(2 * math.pi))


class Promise(BaseModel):
    """What is kept: `gain` found with `probability`, for spreads between processes up to `tau`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain: float
    probability: float
    tau: float


@dataclass(frozen=True)
class Plan:
    """Processes per contender in screening, and pairs per finalist in confirmation."""

    screening: int
    pairs: int
    promise: Promise


@dataclass(frozen=True)
class Costs:
    """How many configurations there are, and what a process of each takes in seconds.

    `known` counts screening processes that are there already: one per contender after a sweep.
    """

    contenders: int
    finalists: int
    contender_s: float = 1.0
    baseline_s: float = 1.0
    known: int = 1

    def seconds(self, screening: int, pairs: int) -> float:
        """Time that a plan takes. The finalists of a round share the round's baseline process."""
        missing = max(0, screening - self.known) * self.contenders * self.contender_s
        return missing + pairs * (self.finalists * self.contender_s + self.baseline_s)

    @property
    def least_s(self) -> float:
        """Time that the smallest plan takes, whatever the spread is."""
        screening = 0 if self.contenders <= self.finalists else MIN_SCREENING
        return self.seconds(screening, MIN_PAIRS)


class TooShortError(UserError):
    """Not even the widest plan fits into `limit_s` seconds; `least_s` would do for it."""

    def __init__(self, limit_s: float, least_s: float):
        super().__init__(
            f"--minutes {limit_s / 60:g} is too short to show even a gain of {WIDEST_GAIN:.0%}: "
            f"at least {math.ceil(least_s / 60)} minutes are needed.\n"
            "The processes that ran are kept. Give more --minutes, or fewer --finalists."
        )
        self.least_s = least_s


def make_plan(tau: Tau, costs: Costs, limit_s: float | None = None, screened: int = 0) -> Plan:
    """The plan that keeps the promise, or the best promise that fits into `limit_s`.

    No fewer screening processes than `screened` are planned for each contender. When time is short
    the gain is widened, in steps of 0.1%, and never the probability or the level. Raises
    TooShortError: not even `WIDEST_GAIN` could be shown within the limit.
    """
    bound = round(math.ceil(tau.upper / _TAU_STEP) * _TAU_STEP, 5)
    limit_s = math.inf if limit_s is None else limit_s

    def takes(thousandths: int) -> float:
        return costs.seconds(*_needed(thousandths / 1000, bound, costs, screened))

    gains = range(round(GAIN * 1000), round(WIDEST_GAIN * 1000) + 1)
    fits = bisect_left(gains, True, key=lambda thousandths: takes(thousandths) <= limit_s)
    if fits == len(gains):
        raise TooShortError(limit_s, takes(gains[-1]))
    gain = gains[fits] / 1000
    promise = Promise(gain=gain, probability=PROBABILITY, tau=bound)
    return Plan(*_needed(gain, bound, costs, screened), promise)


@lru_cache(maxsize=65_536)
def _needed(gain: float, tau: float, costs: Costs, screened: int) -> tuple[int, int]:
    """Screening processes and pairs that find a gain with the probability `PLANNED`.

    Both stages use fresh processes of their own, so their probabilities multiply.
    """
    chance = CHOSEN if costs.contenders > costs.finalists else 1.0
    screening = bisect_left(
        range(_MAX_RUNS),
        chance,
        lo=MIN_SCREENING if chance < 1 else 0,
        key=lambda runs: chance_selected(gain, tau, runs, costs.contenders, costs.finalists),
    )
    pairs = pairs_needed(gain, tau, level(costs.finalists), PLANNED / chance)
    return max(screening, screened), pairs
