"""Judging a promotion: gains from interleaved fresh processes, verdicts, and the winner.

The best of many equal configurations nearly always looks faster than the baseline. So the numbers
that chose the finalists say nothing about their gain. In confirmation every configuration runs
once per round, in an order drawn for that round, so that drift of the machine meets all alike. A
gain is judged from the paired differences of the rounds only, with a one-sided Student interval on
the log scale. The number of rounds is fixed beforehand (`confirm.power`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not

from openpi_opt.config import Config
from openpi_opt.confirm.power import GAIN, level, spread
from openpi_opt.knobs import KNOBS

Verdict = Literal["faster", "same", "ambiguous", "slower"]
CONFIDENCE = 0.95
# Of the check by flipped signs; with fewer than 15 pairs scipy goes through all flips instead.
FLIPS = 19_999


@dataclass(frozen=True)
class Gain:
    """How much less time a candidate takes than the baseline, as a fraction of the baseline.

    `low` and `high` bound the gain, each at the confidence asked for, from confirmation runs
    alone. The verdict is `faster` when `low` is above 0, `slower` when `high` is below 0, `same`
    when both lie within 1% around 0, and else `ambiguous`: too few runs to tell.
    """

    mean: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Subject:
    """What a promotion has to know of a configuration.

    `key` tells it apart, `changed` counts the knobs that differ from the baseline, `order` is its
    place in the study, `first_ms` the mean that the study measured.
    """

    key: str
    changed: int = 0
    order: int = 0
    first_ms: float = 1.0


@dataclass(frozen=True)
class Confirmed:
    """A configuration with the means of its confirmation processes, one per round, and its gain."""

    subject: Subject
    means_ms: list[float]
    gain: Gain | None = None

    @property
    def mean_ms(self) -> float:
        """Mean over the processes."""
        return float(np.mean(self.means_ms))

    @property
    def between_std_ms(self) -> float:
        """Standard deviation between the processes."""
        return float(np.std(self.means_ms, ddof=1))

    def ci95_ms(self) -> tuple[float, float]:
        """95% interval of the mean over processes (Student's t), cut at 0: no latency is below."""
        n = len(self.means_ms)
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * self.between_std_ms / math.sqrt(n)
        return max(0.0, self.mean_ms - half), self.mean_ms + half


def gain(baseline_ms: Sequence[float], candidate_ms: Sequence[float], alpha: float) -> Gain:
    """Paired gain with a one-sided lower and upper bound at level `alpha` each.

    The paired t interval of the logarithms' differences. `same` is the two one-sided tests
    procedure (Schuirmann 1987) with the bounds +- `power.GAIN`. Raises ValueError: fewer than two
    pairs, or lists of different length.
    """
    if len(baseline_ms) != len(candidate_ms) or len(baseline_ms) < 2:
        raise ValueError(f"need two or more pairs, got {len(baseline_ms)} and {len(candidate_ms)}")
    ratios = np.log(candidate_ms) - np.log(baseline_ms)
    n = len(ratios)
    half = float(scipy.stats.t.isf(alpha, n - 1)) * float(np.std(ratios, ddof=1)) / math.sqrt(n)
    center = float(np.mean(ratios))
    # A spread that no finite number holds gives no bound, and never a verdict.
    low, high, mean = (1 - math.exp(min(x, 700.0)) for x in (center + half, center - half, center))
    verdict: Verdict = "same" if low > -GAIN and high < GAIN else "ambiguous"
    verdict = "faster" if low > 0 else "slower" if high < 0 else verdict
    return Gain(mean, low, high, verdict)


def choose(baseline: Confirmed, candidates: Sequence[Confirmed], alpha: float) -> Confirmed:
    """The winner: confirmed faster than the baseline, ties to the one nearer the baseline.

    Nearer is: fewer knobs changed, then earlier in the study. One that is farther wins over the
    nearer only when the pairs of the two confirm that it is faster, at level `alpha`. When no
    candidate is confirmed faster the baseline wins: it is the simplest that is as fast.
    """
    faster = [c for c in candidates if c.gain is not None and c.gain.verdict == "faster"]
    if not faster:
        return baseline
    best = min(faster, key=lambda c: c.mean_ms)
    nearest_first = sorted(faster, key=lambda c: (c.subject.changed, c.subject.order))
    for candidate in nearest_first[: nearest_first.index(best)]:
        if gain(candidate.means_ms, best.means_ms, alpha).verdict != "faster":
            return candidate
    return best


def differing(cfg: Config) -> list[str]:
    """Names of the knobs that differ from the baseline, in the order of the registry."""
    plain, mine = cfg.baseline().canonical().knobs, cfg.canonical().knobs
    return [knob.name for knob in KNOBS if mine[knob.name] != plain[knob.name]]


def paired_spread(first_ms: Sequence[float], second_ms: Sequence[float]) -> float:
    """Spread between processes (tau) that pairs show: that of their log differences, over √2.

    What moves both processes of a round alike (slow drift) is not in it.
    """
    differences = np.log(second_ms) - np.log(first_ms)
    return float(np.std(differences, ddof=1)) / math.sqrt(2)


def compare(first_ms: Sequence[float], second_ms: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Compare the means of paired processes of two configurations in milliseconds, as plain data.

    `change` is the share of time that the second takes more, `ci95` its two-sided 95% interval
    (Student's t on the logarithms), `p_value` that of no change; `sign_flip_p_value` is that of the
    same question asked without a distribution. `verdict` and `gain` are the promotion's own
    judgement, at the level of one finalist. `differences` are log(second / first) by round. Raises
    ValueError: fewer than two pairs, or lists of different length.
    """
    interval = gain(first_ms, second_ms, (1 - CONFIDENCE) / 2)
    differences = np.log(second_ms) - np.log(first_ms)
    p_value = flip_p_value = float(differences[0] == 0)  # without scatter there is no test
    if np.any(differences != differences[0]):
        p_value = float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)
        flipped = scipy.stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=FLIPS,
            random_state=seed,  # scipy calls it rng from 1.15 on, and still knows this name
        )
        flip_p_value = float(flipped.pvalue)
    judged = gain(first_ms, second_ms, level(1))
    return {
        "change": -interval.mean,
        "ci95": [-interval.high, -interval.low],
        "p_value": p_value,
        "sign_flip_p_value": flip_p_value,
        "spread_between_processes": paired_spread(first_ms, second_ms),
        "verdict": judged.verdict,
        "gain": {"mean": judged.mean, "at_least": judged.low, "at_most": judged.high},
        "confidence": 1 - level(1),
        "differences": differences.tolist(),
    }


def spread_of(means_ms: Sequence[float]) -> dict[str, float]:
    """Tau of processes of one configuration in order of time, and how they lie in it.

    `low` and `high` bound its 95% interval: the chi-squared one, right for normal noise.
    `excess_kurtosis` is 0 for such noise and larger for one with heavy tails. `trend` is Kendall's
    correlation of latency and time with its p-value `trend_p`: drift. Raises ValueError: fewer
    than four.
    """
    count, logs = len(means_ms), np.log(means_ms)
    if count < 4:
        raise ValueError(f"need four or more processes, got {count}")
    tau = spread(means_ms).value
    low = high = tails = trend = 0.0
    trend_p = 1.0
    if tau:
        bounds = scipy.stats.chi2.interval(CONFIDENCE, count - 1)
        high, low = (tau * math.sqrt((count - 1) / float(bound)) for bound in bounds)
        trend, trend_p = map(float, scipy.stats.kendalltau(np.arange(count), logs))
        tails = float(scipy.stats.kurtosis(logs, bias=False))
    return {
        **{"tau": tau, "low": low, "high": high, "processes": count},
        **{"excess_kurtosis": tails, "trend": trend, "trend_p": trend_p},
    }
