import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal, stats

from openpi_opt.measure.stats import (
    inefficiency,
    mean_half_width,
    median_interval,
    relative_half_width,
    summarise,
)

LATENCIES = st.lists(st.floats(1e-3, 1e5), min_size=2, max_size=200)


# scipy's own remark on equal samples, whose standard deviation is 0
@pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")
@given(LATENCIES)
def test_every_statistic_agrees_with_scipy(samples):
    wall = [value + 0.5 for value in samples]
    latency = summarise(samples, wall, "device_events")

    assert latency.mean_ms == pytest.approx(stats.tmean(samples))
    assert latency.std_ms == pytest.approx(stats.tstd(samples), abs=1e-9)
    assert latency.min_ms == min(samples)
    for percentile, value in ((50, latency.p50_ms), (95, latency.p95_ms), (99, latency.p99_ms)):
        assert value == pytest.approx(stats.scoreatpercentile(samples, percentile))
    assert latency.wall_mean_ms == pytest.approx(float(np.mean(wall)))
    assert latency.samples_ms == samples
    assert latency.wall_samples_ms == wall
    assert latency.iterations == len(samples)


@given(LATENCIES.filter(lambda values: np.std(values) > 1e-6))
def test_interval_agrees_with_scipy_where_samples_are_independent(samples):
    latency = summarise(samples, samples, "wall")

    low, high = stats.t.interval(
        0.95, df=len(samples) - 1, loc=np.mean(samples), scale=stats.sem(samples)
    )
    assert latency.effective_samples is not None
    if latency.effective_samples == len(samples):
        assert (latency.ci95_low_ms, latency.ci95_high_ms) == pytest.approx((low, high), abs=1e-9)
    else:  # never narrower than if they were independent
        assert latency.ci95_low_ms < low
        assert latency.ci95_high_ms > high


@given(st.lists(st.floats(1e-3, 1e5), min_size=8, max_size=200, unique=True))
def test_median_interval_agrees_with_scipy_where_samples_are_independent(samples):
    values = np.array(samples)
    sides = (values < np.median(values)) + 0.5 * (values == np.median(values))
    low, high = median_interval(values)
    assert low <= np.median(values) <= high
    if inefficiency(sides) == 1:
        lower = stats.quantile_test(values, q=0, p=0.5, alternative="less")
        upper = stats.quantile_test(values, q=0, p=0.5, alternative="greater")
        expected = (
            upper.confidence_interval(0.975).low,
            lower.confidence_interval(0.975).high,
        )
        assert (low, high) == expected


def autoregressive(generator: np.random.Generator, count: int, memory: float) -> np.ndarray:
    """Standard normal samples, each correlated by `memory` with the one before."""
    noise = generator.normal(0, math.sqrt(1 - memory**2), count + 200)
    return signal.lfilter([1], [1, -memory], noise)[200:]


DISTRIBUTIONS = {
    "normal": lambda g, n: g.normal(0, 1, n),
    "heavy-tailed": lambda g, n: g.standard_t(3, n),
    "skewed": lambda g, n: g.exponential(1, n) - 1,
    "bimodal": lambda g, n: np.where(g.random(n) < 0.7, -0.6, 1.4) + g.normal(0, 0.1, n),
    "autocorrelated": lambda g, n: autoregressive(g, n, 0.5),
    "strongly autocorrelated": lambda g, n: autoregressive(g, n, 0.8),
}
MEDIANS = {"skewed": math.log(2) - 1, "bimodal": -0.6 + 0.1 * stats.norm.ppf(0.5 / 0.7)}


# Skewed and strongly autocorrelated samples are known to be covered less: 200 of them are few.
@pytest.mark.parametrize(
    ("name", "count", "least"),
    [
        ("normal", 12, 0.93),
        ("normal", 200, 0.93),
        ("heavy-tailed", 200, 0.93),
        ("skewed", 200, 0.92),
        ("bimodal", 200, 0.93),
        ("autocorrelated", 200, 0.92),
        ("strongly autocorrelated", 400, 0.90),
    ],
)
def test_intervals_cover_mean_and_median_as_often_as_they_say(name, count, least):
    generator = np.random.default_rng(7)
    runs, mean_hits, median_hits = 800, 0, 0
    for _ in range(runs):
        samples = 50 + DISTRIBUTIONS[name](generator, count)
        mean_hits += abs(samples.mean() - 50) <= mean_half_width(samples)
        low, high = median_interval(samples)
        median_hits += low <= 50 + MEDIANS.get(name, 0) <= high
    assert least <= mean_hits / runs <= 0.985
    assert least <= median_hits / runs <= 0.99


def test_intervals_that_take_neighbours_for_independent_do_not_cover():
    """What this module is there for: the textbook's interval on the same samples."""
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(500):
        samples = autoregressive(generator, 200, 0.8)
        hits += abs(samples.mean()) <= stats.t.ppf(0.975, 199) * stats.sem(samples)
    assert hits / 500 < 0.6


@pytest.mark.parametrize(("memory", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.8, 9.0)])
def test_inefficiency_of_a_known_process(memory, expected):
    samples = autoregressive(np.random.default_rng(3), 50_000, memory)
    assert inefficiency(50 + samples) == pytest.approx(expected, rel=0.1)


def test_equal_and_alternating_samples_are_independent():
    assert inefficiency(np.full(40, 16.1)) == 1
    assert inefficiency(np.array([16.0, 17.0] * 20)) == 1
    assert mean_half_width(np.full(40, 16.1)) == pytest.approx(0, abs=1e-9)


def test_relative_half_width_is_the_wider_interval():
    generator = np.random.default_rng(5)
    two = np.where(generator.random(100) < 0.5, 10.0, 20.0)
    low, high = median_interval(two)
    assert (low, high) == (10, 20)
    assert relative_half_width(two) == pytest.approx(5 / np.median(two))
    tail = np.concatenate([np.full(95, 10.0), np.full(5, 30.0)])[generator.permutation(100)]
    assert relative_half_width(tail) == mean_half_width(tail) / tail.mean()


def test_planning_and_uploads_enter_no_figure():
    samples = [10.0, 11.0, 12.0]
    plain = summarise(samples, samples, "device_events")
    full = summarise(
        samples,
        samples,
        "device_events",
        upload_samples_ms=[0.1, 0.2, 0.3],
        planning_samples_ms=[99.0],
        asked_rel_ci=0.005,
        ended="seconds",
    )
    assert full.upload_ms == pytest.approx(0.2)
    assert full.planning_samples_ms == [99.0]
    added = {"upload_ms", "upload_samples_ms", "planning_samples_ms", "asked_rel_ci", "ended"}
    assert full.model_dump(exclude=added) == plain.model_dump(exclude=added)


@pytest.mark.parametrize(("spread", "noisy"), [(0.099, False), (0.101, True)])
def test_noisy_from_a_tenth_of_the_mean(spread, noisy):
    pair = spread * 20 / math.sqrt(2)  # two samples mean +- pair have std sqrt(2) * pair
    assert summarise([20 - pair, 20 + pair], [1.0, 1.0], "wall").noisy is noisy


@pytest.mark.parametrize(
    "samples",
    [[], [1.0], [1.0, math.nan], [1.0, math.inf], [1.0, 0.0], [1.0, -2.0], [[1.0], [2.0]]],
)
def test_refuses_what_is_no_latency(samples):
    with pytest.raises(ValueError, match=r"^samples_ms"):
        summarise(samples, [1.0] * len(samples), "wall")
    if samples:
        with pytest.raises(ValueError, match=r"^wall_samples_ms"):
            summarise([1.0] * max(len(samples), 2), samples, "wall")


def test_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="2 samples_ms but 3 wall_samples_ms"):
        summarise([1.0, 2.0], [1.0, 2.0, 3.0], "wall")
