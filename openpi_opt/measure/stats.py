"""Statistics of latency samples: every figure of `result.Latency` is computed here, once.

Successive calls are not independent: clocks, caches and neighbours change slower than a call
takes. An interval that takes them for independent is too narrow (at a correlation of 0.6 between
neighbours it holds the mean in 67% of runs instead of 95%), so intervals are computed over the
number of *independent* samples that the run is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special  # not `stats`, which every trial would load for half a second

from openpi_opt.measure.shape import findings
from openpi_opt.result import Latency

Clock = Literal["device_events", "wall"]
Ended = Literal["interval", "seconds", "iterations"]
Array = NDArray[np.float64]

CONFIDENCE = 0.95
_LEAST_WORTH = 3  # independent samples that a run is taken for at least


def summarise(
    samples_ms: Sequence[float],
    wall_samples_ms: Sequence[float],
    clock: Clock,
    *,
    upload_samples_ms: Sequence[float] = (),
    planning_samples_ms: Sequence[float] = (),
    asked_rel_ci: float | None = None,
    ended: Ended | None = None,
) -> Latency:
    """Summarise the latencies of one process; all lists are in milliseconds, in order of time.

    All statistics are of `samples_ms`; of `wall_samples_ms` and `upload_samples_ms` only the mean
    is taken, `planning_samples_ms` are kept and enter no figure. Percentiles interpolate linearly
    between order statistics (numpy's default, Hyndman and Fan type 7), std is the sample standard
    deviation (n - 1). No sample is dropped.

    Raises ValueError: fewer than two samples, lists of different lengths, or a sample that is
    not a positive finite number.
    """
    samples = _checked("samples_ms", samples_ms)
    wall = _checked("wall_samples_ms", wall_samples_ms)
    upload = _checked("upload_samples_ms", upload_samples_ms) if upload_samples_ms else None
    for name, other in (("wall_samples_ms", wall), ("upload_samples_ms", upload)):
        if other is not None and len(samples) != len(other):
            raise ValueError(
                f"{len(samples)} samples_ms but {len(other)} {name}: each iteration is read by all"
            )
    mean, half_width = float(samples.mean()), mean_half_width(samples)
    inefficient = inefficiency(samples)
    low, high = median_interval(samples)
    p50, p95, p99 = map(float, np.percentile(samples, [50, 95, 99], method="linear"))
    found = findings(samples, inefficient)
    return Latency(
        clock=clock,
        mean_ms=mean,
        std_ms=float(samples.std(ddof=1)),
        min_ms=float(samples.min()),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        ci95_low_ms=mean - half_width,
        ci95_high_ms=mean + half_width,
        p50_low_ms=low,
        p50_high_ms=high,
        rel_ci=relative_half_width(samples),
        asked_rel_ci=asked_rel_ci,
        effective_samples=len(samples) / inefficient,
        ended=ended,
        looks=[finding.text for finding in found],
        wall_mean_ms=float(wall.mean()),
        upload_ms=None if upload is None else float(upload.mean()),
        noisy=any(finding.kind == "spread" for finding in found),
        iterations=len(samples),
        samples_ms=samples.tolist(),
        wall_samples_ms=wall.tolist(),
        upload_samples_ms=list(upload_samples_ms),
        planning_samples_ms=list(planning_samples_ms),
    )


def inefficiency(samples: Array) -> float:
    """How many of the samples [n] say as much about the mean as one independent one; at least 1.

    It is 1 + 2 * (sum of the autocorrelations), summed as far as pairs of neighbouring lags are
    positive and falling: Geyer's initial monotone sequence (Statistical Science 7, 1992, section
    3.3), which Stan uses too. Samples that repel each other are taken for independent ones.
    """
    count = len(samples)
    deviations = samples - samples.mean()
    spectrum = np.fft.rfft(deviations, 2 * count)
    covariance = np.fft.irfft(spectrum * spectrum.conj(), 2 * count)[:count]
    # Equal samples: what is left of them after the mean is rounding.
    if covariance[0] <= (1e-12 * float(np.abs(samples).max())) ** 2 * count:
        return 1.0
    even = count // 2 * 2
    pairs = (covariance[:even:2] + covariance[1:even:2]) / covariance[0]
    ends = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: ends[0]] if len(ends) else pairs)
    worth_at_least = min(_LEAST_WORTH, count)
    return float(min(max(1.0, 2 * pairs.sum() - 1), count / worth_at_least))


def mean_half_width(samples: Array) -> float:
    """Half the width of the 95% interval of the mean of samples [n], in their unit.

    Student's t(0.975, m - 1) * s * sqrt(k / n) with the inefficiency k and m = n / k; the variance
    s^2 is the sum of squares over n - k, for correlated samples vary less around their own mean
    than around the true one. For independent samples it is the textbook's interval.
    """
    count = len(samples)
    k = inefficiency(samples)
    variance = float(((samples - samples.mean()) ** 2).sum()) / (count - k)
    quantile = float(special.stdtrit(count / k - 1, (1 + CONFIDENCE) / 2))
    return quantile * math.sqrt(variance * k / count)


def median_interval(samples: Array) -> tuple[float, float]:
    """Two samples between which the median lies with 95%: order statistics by the binomial.

    No distribution is assumed. The ranks are those of m independent samples, m from the
    inefficiency of `sample < median`, spread over all n. Fewer than six independent ones have no
    two that hold it so surely: then it is all that was seen, first to last.
    """
    count = len(samples)
    middle = np.median(samples)
    sides = (samples < middle).astype(np.float64) + 0.5 * (samples == middle)
    worth = max(1, int(count / inefficiency(sides)))
    rank = _binomial_rank(worth) * count / worth
    ordered = np.sort(samples)
    index = max(math.floor(rank), 1) - 1
    return float(ordered[index]), float(ordered[count - 1 - index])


def _binomial_rank(count: int) -> int:
    """The lower 2.5% quantile of the successes in `count` throws of a coin."""
    level = (1 - CONFIDENCE) / 2
    return int(np.searchsorted(special.bdtr(np.arange(count + 1.0), count, 0.5), level))


def relative_half_width(samples: Array) -> float:
    """The wider of the two 95% intervals, of the mean and of the median: half of it, relative."""
    low, high = median_interval(samples)
    return max(
        mean_half_width(samples) / float(samples.mean()),
        (high - low) / 2 / float(np.median(samples)),
    )


def _checked(name: str, values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ValueError(
            f"{name} has shape {array.shape}; a flat list of at least two samples is needed"
        )
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] is {array[bad[0]]}; a latency is a positive finite number "
            f"({bad.size} of {array.size} are not)"
        )
    return array
