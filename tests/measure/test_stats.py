import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from openpi_opt.measure.stats import summarise

LATENCIES = st.lists(st.floats(1e-3, 1e5), min_size=2, max_size=200)


# scipy's own remark on equal samples, whose standard deviation is 0
@pytest.mark.filterwarnings("ignore:Precision loss occurred:RuntimeWarning")
@given(LATENCIES)
def test_every_statistic_agrees_with_scipy(samples: list[float]) -> None:
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
def test_interval_agrees_with_scipy(samples: list[float]) -> None:
    latency = summarise(samples, samples, "wall")

    expected = stats.t.interval(
        0.95, df=len(samples) - 1, loc=np.mean(samples), scale=stats.sem(samples)
    )
    assert (latency.ci95_low_ms, latency.ci95_high_ms) == pytest.approx(expected, abs=1e-9)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        latency = summarise(generator.normal(25.0, 0.5, 12).tolist(), [1.0] * 12, "wall")
        hits += latency.ci95_low_ms <= 25.0 <= latency.ci95_high_ms
    assert 930 <= hits <= 970


def test_hand_computed() -> None:
    latency = summarise([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 4.0], "device_events")

    assert latency.clock == "device_events"
    assert latency.mean_ms == 2.5
    assert latency.std_ms == pytest.approx(math.sqrt(5 / 3))
    assert latency.p50_ms == 2.5
    assert latency.p95_ms == pytest.approx(3.85)
    assert latency.ci95_high_ms == pytest.approx(2.5 + 3.182446 * math.sqrt(5 / 3) / 2)
    assert latency.wall_mean_ms == 2.5
    assert latency.noisy


@pytest.mark.parametrize(("spread", "noisy"), [(0.099, False), (0.101, True)])
def test_noisy_from_a_tenth_of_the_mean(spread: float, noisy: bool) -> None:
    pair = spread * 20 / math.sqrt(2)  # two samples mean +- pair have std sqrt(2) * pair
    assert summarise([20 - pair, 20 + pair], [1.0, 1.0], "wall").noisy is noisy


@pytest.mark.parametrize(
    "samples",
    [[], [1.0], [1.0, math.nan], [1.0, math.inf], [1.0, 0.0], [1.0, -2.0], [[1.0], [2.0]]],
)
def test_refuses_what_is_no_latency(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^samples_ms"):
        summarise(samples, [1.0] * len(samples), "wall")
    if samples:
        with pytest.raises(ValueError, match=r"^wall_samples_ms"):
            summarise([1.0] * max(len(samples), 2), samples, "wall")


def test_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 samples_ms but 3 wall_samples_ms"):
        summarise([1.0, 2.0], [1.0, 2.0, 3.0], "wall")
