"""Statistics of latency samples: every figure of `result.Latency` is computed here, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from openpi_opt.result import Latency

Clock = Literal["device_events", "wall"]

# A standard deviation above this share of the mean flags a run as noisy: the usual cause is a
# recompilation or a throttled clock among the samples, not chance.
NOISY_SPREAD = 0.10
CONFIDENCE = 0.95


def summarise(
    samples_ms: Sequence[float], wall_samples_ms: Sequence[float], clock: Clock
) -> Latency:
    """Summarise the latencies of one process; both lists are in milliseconds, one per iteration.

    All statistics are of `samples_ms`; of `wall_samples_ms` only the mean is taken. Percentiles
    interpolate linearly between order statistics (numpy's default, Hyndman and Fan type 7), std
    is the sample standard deviation (n - 1). No sample is dropped.

    Raises:
        ValueError: fewer than two samples, lists of different lengths, or a sample that is not a
            positive finite number.
    """
    samples = _checked("samples_ms", samples_ms)
    wall = _checked("wall_samples_ms", wall_samples_ms)
    if len(samples) != len(wall):
        raise ValueError(
            f"{len(samples)} samples_ms but {len(wall)} wall_samples_ms: "
            "each iteration is read by both clocks"
        )
    mean = float(samples.mean())
    std = float(samples.std(ddof=1))
    half_width = interval_half_width(std, len(samples))
    p50, p95, p99 = np.percentile(samples, [50, 95, 99], method="linear")
    return Latency(
        clock=clock,
        mean_ms=mean,
        std_ms=std,
        min_ms=float(samples.min()),
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        ci95_low_ms=mean - half_width,
        ci95_high_ms=mean + half_width,
        wall_mean_ms=float(wall.mean()),
        noisy=std > NOISY_SPREAD * mean,
        iterations=len(samples),
        samples_ms=samples.tolist(),
        wall_samples_ms=wall.tolist(),
    )


def interval_half_width(std: float, count: int) -> float:
    """Half the width of Student's 95% interval of a mean: t(0.975, n - 1) * s / sqrt(n).

    It holds for independent, roughly normal samples; the unit is that of `std`.
    """
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return quantile * std / math.sqrt(count)


def _checked(name: str, values: Sequence[float]) -> NDArray[np.float64]:
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
