"""The number of iterations, on simulated calls: what it is, and that it biases nothing."""

from collections.abc import Callable

import numpy as np
import pytest

from openpi_opt.config import Measure
from openpi_opt.measure.clock import Timing
from openpi_opt.measure.planning import plan
from openpi_opt.measure.stats import mean_half_width, relative_half_width

Draw = Callable[[np.random.Generator, int], np.ndarray]


class Calls:
    """Simulated calls: their latencies are drawn, their time passes on a clock of its own."""

    def __init__(self, draw: Draw, seed: int, seconds_per_call: float = 0.001):
        self.generator = np.random.default_rng(seed)
        self.draw = draw
        self.seconds_per_call = seconds_per_call
        self.blocks: list[int] = []

    def time(self, count: int) -> Timing:
        self.blocks.append(count)
        samples = self.draw(self.generator, count).tolist()
        return Timing(samples, samples, "wall", [], count * self.seconds_per_call)


def normal(spread: float) -> Draw:
    return lambda g, n: g.normal(10, 10 * spread, n)


def disturbed(g: np.random.Generator, n: int) -> np.ndarray:
    """2% of the calls take 20% longer; the mean is 10 all the same."""
    return 10 * (g.normal(1, 0.003, n) + 0.2 * (g.random(n) < 0.02) - 0.004)


def test_a_quiet_call_needs_the_least():
    calls = Calls(normal(0.001), 0)
    found = plan(calls.time, Measure(max_seconds=20))
    assert (found.iterations, found.ended) == (30, "interval")
    assert calls.blocks == [10, 20]
    assert len(found.samples_ms) == 30


def test_a_noisier_call_gets_as_many_as_its_interval_needs():
    numbers = []
    for seed in range(30):
        calls = Calls(normal(0.03), seed)
        found = plan(calls.time, Measure(max_seconds=20))
        numbers.append(found.iterations)
        assert found.ended == "interval"
        assert min(calls.blocks) >= 10
    # The median of normal samples needs pi / 2 times as many as the mean.
    needed = (1.96 * 0.03 / 0.005) ** 2 * np.pi / 2
    assert needed < np.median(numbers) < 2 * needed


@pytest.mark.parametrize("spread", [0.02, 0.04])
def test_most_runs_reach_the_interval_asked(spread):
    reached = nearly = 0
    for seed in range(60):
        calls = Calls(normal(spread), seed)
        found = plan(calls.time, Measure(max_seconds=1000))
        assert found.ended == "interval"
        fresh = np.array(calls.time(found.iterations).samples_ms)
        width = relative_half_width(fresh)
        reached += width <= 0.005
        nearly += width <= 0.0055
    assert reached >= 48
    assert nearly >= 55


def test_a_fixed_number_times_nothing():
    calls = Calls(normal(0.1), 0)
    found = plan(calls.time, Measure(rel_ci=None, iterations=17))
    assert (found.iterations, found.samples_ms, calls.blocks) == (17, [], [])


def test_time_ends_it_and_is_kept():
    calls = Calls(normal(0.2), 0, seconds_per_call=0.01)
    found = plan(calls.time, Measure(max_seconds=4))
    assert found.ended == "seconds"
    planned = len(found.samples_ms)
    assert 180 <= planned <= 220  # half of 4 s
    assert planned + found.iterations <= 410


def test_calls_slower_than_the_budget_are_still_measured():
    calls = Calls(normal(0.2), 0, seconds_per_call=5)
    found = plan(calls.time, Measure(max_seconds=4, iterations=10))
    assert (found.iterations, found.ended, calls.blocks) == (10, "seconds", [10])


@pytest.mark.parametrize(
    ("seconds_per_call", "blocks"),
    [(0.084, [10]), (0.082, [10, 20])],  # 5 s have room for 59 calls, or for 60
)
def test_nothing_is_planned_where_time_allows_the_least_only(seconds_per_call, blocks):
    calls = Calls(normal(0.2), 0, seconds_per_call)
    found = plan(calls.time, Measure(max_seconds=5))
    assert (found.iterations, found.ended, calls.blocks) == (30, "seconds", blocks)


def test_the_number_allowed_ends_it():
    calls = Calls(normal(0.2), 0, seconds_per_call=1e-6)
    found = plan(calls.time, Measure(max_seconds=20, max_iterations=100))
    assert (found.iterations, found.ended) == (100, "iterations")
    assert len(found.samples_ms) < 140


def watched(calls: Calls) -> tuple[float, bool]:
    """The rule that this module avoids: go on until the samples look narrow enough."""
    samples = np.array(calls.time(30).samples_ms)
    while mean_half_width(samples) > 0.005 * samples.mean() and len(samples) < 3000:
        samples = np.concatenate([samples, calls.time(10).samples_ms])
    return float(samples.mean()), bool(abs(samples.mean() - 10) <= mean_half_width(samples))


def planned(calls: Calls) -> tuple[float, bool]:
    found = plan(calls.time, Measure(max_seconds=1000, max_iterations=3000))
    samples = np.array(calls.time(found.iterations).samples_ms)
    return float(samples.mean()), bool(abs(samples.mean() - 10) <= mean_half_width(samples))


def errors(rule: Callable[[Calls], tuple[float, bool]], draw: Draw, runs: int) -> tuple[float, ...]:
    """Mean error of the mean in percent, its standard error, share of intervals that hold it."""
    results = [rule(Calls(draw, seed)) for seed in range(runs)]
    off = np.array([mean - 10 for mean, _ in results]) * 10
    return (
        float(off.mean()),
        float(off.std() / np.sqrt(runs)),
        float(np.mean([h for _, h in results])),
    )


def test_the_mean_is_not_biased_by_when_it_stops():
    bias, error, coverage = errors(planned, disturbed, 250)
    assert abs(bias) <= 3 * error
    assert abs(bias) < 0.05
    watched_bias, watched_error, watched_coverage = errors(watched, disturbed, 250)
    assert watched_bias < -0.15
    assert watched_bias < -3 * watched_error
    assert coverage > watched_coverage + 0.1


def test_intervals_hold_the_mean_as_often_as_they_say():
    _, _, coverage = errors(planned, lambda g, n: 9.5 + g.exponential(0.5, n), 200)
    assert coverage >= 0.91
