"""Confirmation of a winner: finalists and baseline again, in fresh interleaved processes.

The best of many equal configurations looks faster than the baseline nearly always, so the numbers
that chose the finalists say nothing about their gain. Here every configuration runs once per
round, in an order drawn anew for each round, so that drift of the machine meets all alike. The
gain is judged from the paired differences of the rounds only, with a one-sided Student interval
(Bonferroni over the finalists) on the log scale; the number of rounds is fixed beforehand.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from openpi_opt.config import Config
from openpi_opt.knobs import KNOBS
from openpi_opt.result import Ok, TrialResult

Verdict = Literal["faster", "same", "slower"]


@dataclass(frozen=True)
class Gain:
    """How much less time a candidate takes than the baseline, as a fraction of the baseline.

    `low` bounds the gain from below at the confidence asked for, from confirmation runs alone.
    """

    mean: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Confirmed:
    """A configuration with its confirmation runs, one per round, and its gain."""

    config: Config
    means_ms: list[float]
    results: list[Ok]
    gain: Gain | None

    @property
    def mean_ms(self) -> float:
        """Mean over the processes."""
        return float(np.mean(self.means_ms))

    @property
    def between_std_ms(self) -> float:
        """Standard deviation between the processes."""
        return float(np.std(self.means_ms, ddof=1))

    def ci95_ms(self) -> tuple[float, float]:
        """95% interval of the mean over processes (Student's t)."""
        n = len(self.means_ms)
        half = float(stats.t.ppf(0.975, n - 1)) * self.between_std_ms / math.sqrt(n)
        return self.mean_ms - half, self.mean_ms + half


def measure_interleaved(
    configs: Sequence[Config],
    rounds: int,
    run: Callable[[Config, int], TrialResult],
    seed: int,
) -> dict[str, list[TrialResult]]:
    """Run every configuration once per round, in random order; results by configuration hash.

    A configuration that is not `ok` once is not run again: it cannot be promoted any more.
    """
    shuffled = random.Random(seed)
    found: dict[str, list[TrialResult]] = {cfg.hash(): [] for cfg in configs}
    dropped: set[str] = set()
    for number in range(rounds):
        order = list(configs)
        shuffled.shuffle(order)
        for cfg in order:
            if cfg.hash() in dropped:
                continue
            result = run(cfg, number)
            found[cfg.hash()].append(result)
            if not isinstance(result, Ok):
                dropped.add(cfg.hash())
    return found


def gain(baseline_ms: Sequence[float], candidate_ms: Sequence[float], alpha: float) -> Gain:
    """Paired gain with a one-sided lower (and upper) bound at level `alpha` each.

    Raises:
        ValueError: fewer than two pairs, or lists of different length.
    """
    if len(baseline_ms) != len(candidate_ms) or len(baseline_ms) < 2:
        raise ValueError(f"need two or more pairs, got {len(baseline_ms)} and {len(candidate_ms)}")
    ratios = np.log(np.asarray(candidate_ms) / np.asarray(baseline_ms))
    n = len(ratios)
    half = float(stats.t.ppf(1 - alpha, n - 1)) * float(np.std(ratios, ddof=1)) / math.sqrt(n)
    center = float(np.mean(ratios))
    low, high = 1 - math.exp(center + half), 1 - math.exp(center - half)
    verdict: Verdict = "faster" if low > 0 else "slower" if high < 0 else "same"
    return Gain(mean=1 - math.exp(center), low=low, high=high, verdict=verdict)


def choose(baseline: Confirmed, candidates: Sequence[Confirmed], alpha: float) -> Confirmed:
    """The winner: confirmed faster than the baseline, ties to the one nearer the baseline.

    When no candidate is confirmed faster the baseline wins: it is the simplest that is as fast.
    """
    faster = [c for c in candidates if c.gain is not None and c.gain.verdict == "faster"]
    if not faster:
        return baseline
    best = min(faster, key=lambda c: c.mean_ms)
    for candidate in sorted(faster, key=lambda c: (changed_knobs(c.config), c.mean_ms)):
        if candidate is best:
            break
        if gain(candidate.means_ms, best.means_ms, alpha).verdict != "faster":
            return candidate
    return best


def changed_knobs(cfg: Config) -> int:
    """How many knobs differ from the baseline."""
    plain = cfg.baseline().canonical().knobs
    return sum(cfg.canonical().knobs[knob.name] != plain[knob.name] for knob in KNOBS)
