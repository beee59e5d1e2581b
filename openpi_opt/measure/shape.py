"""What a run looks like, beyond its mean: drift, steps, two modes, outliers, memory.

An interval of a mean is worth something only where the samples scatter around one value. These
tests say when they do not, and what they do instead. Thresholds are in relative latency, because a
deviation that is certain and tiny is of no interest; tests/measure/test_shape.py holds the error
rates on runs where nothing is to be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy  # its `stats` takes half a second to load, so when it is used
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A standard deviation above this share of the mean flags a run as noisy: the usual cause is a
# recompilation or a throttled clock among the samples, not chance.
NOISY_SPREAD = 0.10
LEAST_CHANGE = 0.01  # a drift or a step below 1% decides nothing that this project promises
LEAST_GAP = 0.01  # as for two modes
LEAST_SHARE = 0.05  # of the smaller mode; fewer samples are outliers
CERTAINTY = 0.003  # p-value of the trend test
CLEAR_STEP = 5.0  # standard deviations of the block medians around their two levels
FAR_FENCE = 3.0  # interquartile ranges, Tukey's outer fence
OUTLIER_SHARE = 0.01
_FEW = 3  # outliers; fewer matter by what they do to the mean only
OUTLIER_PULL = 0.005  # of the mean, moved by outliers
MEMORY = 4.0  # samples that say as much as one independent sample
_BLOCKS = 20
_FEWEST = 24  # samples; with fewer neither trend nor modes can be told from chance
_RESOLUTION = 1e-4  # of the median: clocks round, and two values may be all that there is

Kind = Literal["spread", "drift", "modes", "outliers", "autocorrelation"]


@dataclass(frozen=True)
class Finding:
    """One thing that a run does; `text` is for a table, as `drifting up 3.0% over the run`."""

    kind: Kind
    text: str


def findings(samples: Array, inefficiency: float) -> list[Finding]:
    """All that deviates in one run of samples [n] in milliseconds, in their order.

    `inefficiency` is the statistical inefficiency of the mean (`stats.inefficiency`): how many
    samples say as much as one independent one.
    """
    mean = float(samples.mean())
    found: list[Finding] = []
    std = float(samples.std(ddof=1))
    if std > NOISY_SPREAD * mean:
        found.append(Finding("spread", f"noisy: std is {std / mean:.0%} of the mean"))
    # A run that moves has as many modes as it has places, and its memory is the way it takes.
    moved = trend(samples)
    if moved is not None:
        return [*found, moved]
    two = modes(samples)
    found += [finding for finding in (two or outliers(samples),) if finding is not None]
    if inefficiency > MEMORY:
        worth = max(1, round(len(samples) / inefficiency))
        text = f"autocorrelated: {len(samples)} samples say as much as {worth}"
        found.append(Finding("autocorrelation", text))
    return found


def trend(samples: Array) -> Finding | None:
    """A drift or a step of at least `LEAST_CHANGE`, by the medians of up to 20 equal blocks.

    A drift is significant by Kendall's tau of the medians against time (Mann and Kendall's test)
    and as large as Theil and Sen's slope says: neither minds outliers. It is a step if one jump
    leaves less than half of a line's squares, and is clear of what it leaves.
    """
    if len(samples) < _FEWEST:
        return None
    blocks = np.array_split(samples, min(_BLOCKS, len(samples) // 3))
    medians = np.array([np.median(block) for block in blocks])
    if np.ptp(medians) == 0:
        return None
    time = np.arange(len(medians), dtype=np.float64)
    later, earlier = np.tril_indices(len(medians), -1)
    slope = float(np.median((medians[later] - medians[earlier]) / (time[later] - time[earlier])))
    intercept = np.median(medians) - slope * np.median(time)
    at, jump, step_squares = _best_step(medians)
    line_squares = float(((medians - intercept - slope * time) ** 2).sum())
    level = float(np.median(samples))
    left = np.sqrt(step_squares / (len(medians) - 2))
    if step_squares < line_squares / 2 and abs(jump) > CLEAR_STEP * left:
        text = f"a step {_direction(jump)} of {abs(jump) / level:.1%} after {at:.0%} of the run"
        return Finding("drift", text) if abs(jump) >= LEAST_CHANGE * level else None
    change = slope * len(medians) / level
    if abs(change) < LEAST_CHANGE or scipy.stats.kendalltau(time, medians).pvalue > CERTAINTY:
        return None
    return Finding("drift", f"drifting {_direction(change)} {abs(change):.1%} over the run")


def _best_step(medians: Array) -> tuple[float, float, float]:
    """Where the best single jump is (share of the run), its height, the squares that it leaves."""
    best = (0.0, 0.0, np.inf)
    for at in range(2, len(medians) - 1):
        before, after = medians[:at], medians[at:]
        squares = float(before.var() * len(before) + after.var() * len(after))
        if squares < best[2]:
            best = (at / len(medians), float(after.mean() - before.mean()), squares)
    return best


def _direction(change: float) -> str:
    return "up" if change > 0 else "down"


def modes(samples: Array) -> Finding | None:
    """Two modes, `bimodal: 70% at 15.90 ms, 30% at 16.80 ms`, or None.

    The cut is the one with the greatest likelihood of two normal distributions; it must win over
    one distribution by twice what BIC asks, with the classification likelihood (Biernacki, Celeux
    and Govaert 2000: the price of assigning each sample keeps a broad single mode from being cut
    in two), and a
    kernel density estimate must have a valley at most half as high as the lower peak between the
    two medians. Each side holds at least `LEAST_SHARE` and their medians are `LEAST_GAP` apart.
    """
    count = len(samples)
    least = max(3, int(np.ceil(LEAST_SHARE * count)))
    if count < _FEWEST:
        return None
    ordered = np.sort(samples)
    at, gain = _best_cut(ordered, least)
    lower, upper = ordered[:at], ordered[at:]
    low, high = float(np.median(lower)), float(np.median(upper))
    if gain <= 3 * np.log(count) or high - low < LEAST_GAP * float(np.median(ordered)):
        return None
    if not _has_valley(lower, upper, low, high):
        return None
    share = at / count
    return Finding(
        "modes", f"bimodal: {share:.0%} at {low:.4g} ms, {1 - share:.0%} at {high:.4g} ms"
    )


def _best_cut(ordered: Array, least: int) -> tuple[int, float]:
    """The best number of samples on the lower side, and the log likelihood gained by the cut."""
    count = len(ordered)
    centred = ordered - ordered.mean()
    floor = (_RESOLUTION * float(ordered[count // 2])) ** 2
    sums, squares = np.cumsum(centred), np.cumsum(centred**2)
    cuts = np.arange(least, count - least + 1)
    sizes, below = cuts.astype(np.float64), cuts - 1

    def variance(total: Array, square: Array, size: Array) -> Array:
        return np.maximum(square / size - (total / size) ** 2, floor)

    whole = max(float(squares[-1]) / count, floor)
    left = variance(sums[below], squares[below], sizes)
    rest = count - sizes
    right = variance(sums[-1] - sums[below], squares[-1] - squares[below], rest)
    shares = sizes / count
    gains = count / 2 * np.log(whole) - sizes / 2 * np.log(left) - rest / 2 * np.log(right)
    gains += sizes * np.log(shares) + rest * np.log(1 - shares)
    best = int(np.argmax(gains))
    return int(cuts[best]), float(gains[best])


def _has_valley(lower: Array, upper: Array, low: float, high: float) -> bool:
    """Whether the density falls to half of the lower peak somewhere between the two medians.

    The bandwidth is Silverman's of the narrower side, so that the broad whole does not hide it.
    """
    width = max(_silverman(lower), _silverman(upper))
    if width == 0:
        return True
    grid = np.linspace(low, high, 101)
    both = np.concatenate([lower, upper])
    density = np.exp(-0.5 * ((grid[:, None] - both) / width) ** 2).sum(axis=1)
    return bool(density.min() <= min(density[0], density[-1]) / 2)


def _silverman(values: Array) -> float:
    first, third = np.percentile(values, [25, 75])
    std = float(values.std())
    spread = min(std, float(third - first) / 1.349) or std
    return float(0.9 * spread * len(values) ** -0.2)


def outliers(samples: Array) -> Finding | None:
    """Samples far beyond Tukey's outer fences, where they are many or move the mean."""
    first, third = np.percentile(samples, [25, 75])
    reach = FAR_FENCE * (third - first)
    far = samples[(samples < first - reach) | (samples > third + reach)]
    if len(far) == 0 or reach == 0:
        return None
    middle = float(np.median(samples))
    pull = float((far - middle).sum()) / len(samples) / middle
    many = len(far) >= _FEW and len(far) > OUTLIER_SHARE * len(samples)
    if not many and abs(pull) < OUTLIER_PULL:
        return None
    extreme = float(far[np.argmax(np.abs(far - middle))])
    return Finding(
        "outliers",
        f"outliers: {len(far)} of {len(samples)} beyond {FAR_FENCE:g} interquartile ranges, as "
        f"{extreme:.4g} ms; they move the mean by {pull:+.1%}",
    )
