"""Judging a promotion: gains from interleaved fresh processes, verdicts, and the winner.

The best of many equal configurations looks faster than the baseline nearly always, so the numbers
that chose the finalists say nothing about their gain. In confirmation every configuration runs
once per round, in an order drawn anew for each round, so that drift of the machine meets all
alike. A gain is judged from the paired differences of the rounds only, with a one-sided Student
interval on the log scale; the number of rounds is fixed beforehand (`confirm.power`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not

from openpi_opt.config import Config
from openpi_opt.confirm.power import GAIN
from openpi_opt.knobs import KNOBS

Verdict = Literal["faster", "same", "ambiguous", "slower"]


@dataclass(frozen=True)
class Gain:
    """How much less time a candidate takes than the baseline, as a fraction of the baseline.

    `low` and `high` bound the gain, each at the confidence asked for, from confirmation runs
    alone. The verdict is `faster` when `low` is above 0, `slower` when `high` is below 0, `same`
    when both lie within the margin around 0, and else `ambiguous`: too few runs to tell.
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


def gain(
    baseline_ms: Sequence[float],
    candidate_ms: Sequence[float],
    alpha: float,
    margin: float = GAIN,
) -> Gain:
    """Paired gain with a one-sided lower and upper bound at level `alpha` each.

    The paired t interval of the logarithms' differences. `same` is the two one-sided tests
    procedure (Schuirmann 1987) with the bounds +- `margin`.

    Raises:
        ValueError: fewer than two pairs, or lists of different length.
    """
    if len(baseline_ms) != len(candidate_ms) or len(baseline_ms) < 2:
        raise ValueError(f"need two or more pairs, got {len(baseline_ms)} and {len(candidate_ms)}")
    ratios = np.log(candidate_ms) - np.log(baseline_ms)
    n = len(ratios)
    half = float(scipy.stats.t.isf(alpha, n - 1)) * float(np.std(ratios, ddof=1)) / math.sqrt(n)
    center = float(np.mean(ratios))
    # A spread that no finite number holds gives no bound, and never a verdict.
    low, high, mean = (1 - math.exp(min(x, 700.0)) for x in (center + half, center - half, center))
    return Gain(mean=mean, low=low, high=high, verdict=_verdict(low, high, margin))


def _verdict(low: float, high: float, margin: float) -> Verdict:
    if low > 0:
        return "faster"
    if high < 0:
        return "slower"
    return "same" if -margin < low and high < margin else "ambiguous"


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
    for candidate in sorted(faster, key=lambda c: (c.subject.changed, c.subject.order)):
        if candidate is best:
            break
        if gain(candidate.means_ms, best.means_ms, alpha).verdict != "faster":
            return candidate
    return best


def changed_knobs(cfg: Config) -> int:
    """How many knobs differ from the baseline."""
    return len(differing(cfg))


def differing(cfg: Config) -> list[str]:
    """Names of the knobs that differ from the baseline, in the order of the registry."""
    plain, mine = cfg.baseline().canonical().knobs, cfg.canonical().knobs
    return [knob.name for knob in KNOBS if mine[knob.name] != plain[knob.name]]
