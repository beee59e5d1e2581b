import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from openpi_opt.config import Config
from openpi_opt.result import Failed, Ok, TrialResult
from openpi_opt.search.confirm import (
    Confirmed,
    changed_knobs,
    choose,
    gain,
    measure_interleaved,
)

PLAIN = Config.parse({})
SDPA = Config.parse({"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}})
BOTH = Config.parse({"attention": {"vision": "sdpa"}, "compile": {"mode": "default"}})


def confirmed(cfg: Config, means: list[float], base: list[float] | None = None) -> Confirmed:
    return Confirmed(cfg, means, [], gain(base, means, 0.01) if base else None)


def noisy(mean: float, count: int = 8, seed: int = 0) -> list[float]:
    return list(mean * (1 + 0.002 * np.random.default_rng(seed).standard_normal(count)))


@given(
    st.lists(st.floats(1, 100), min_size=3, max_size=12),
    st.floats(0.5, 2.0),
    st.integers(0, 1000),
)
def test_bounds_are_those_of_the_paired_t_test(base: list[float], factor: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.05, len(base))
    candidate = list(np.asarray(base) * factor * np.exp(noise))
    result = gain(base, candidate, alpha=0.025)
    differences = np.log(candidate) - np.log(base)
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert 1 - result.low == pytest.approx(np.exp(interval.high))
    assert 1 - result.high == pytest.approx(np.exp(interval.low))


def test_a_drift_that_meets_both_alike_does_not_hide_a_gain() -> None:
    drift = [10.0, 12.0, 15.0, 19.0, 24.0, 30.0]
    result = gain(
        drift, [value * factor for value, factor in zip(drift, [0.9, 0.91] * 3, strict=True)], 0.01
    )
    assert result.verdict == "faster"
    assert 0.08 < result.low < result.mean < 0.11


def test_equal_configurations_are_rarely_called_faster() -> None:
    """At alpha 5% a false positive in one of twenty; 1000 sweeps stay near that."""
    generator = np.random.default_rng(0)
    pairs = generator.normal(10, 0.1, (1000, 2, 5))
    faster = sum(gain(a, b, 0.05).verdict == "faster" for a, b in pairs)
    assert 25 <= faster <= 75


@pytest.mark.parametrize(("base", "candidate"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_too_few_or_unpaired_samples_are_refused(base: list, candidate: list) -> None:
    with pytest.raises(ValueError, match="pairs"):
        gain(base, candidate, 0.05)


def test_nothing_faster_leaves_the_baseline() -> None:
    base = noisy(10)
    baseline = confirmed(PLAIN, base)
    assert choose(baseline, [confirmed(SDPA, noisy(10, seed=1), base)], 0.01) is baseline
    assert choose(baseline, [], 0.01) is baseline


def test_a_tie_goes_to_the_configuration_nearer_the_baseline() -> None:
    base = noisy(10)
    simple = confirmed(SDPA, noisy(8.002, seed=2), base)
    complex_ = confirmed(BOTH, noisy(8.0, seed=3), base)
    assert (changed_knobs(SDPA), changed_knobs(BOTH)) == (1, 2)
    assert choose(confirmed(PLAIN, base), [complex_, simple], 0.01) is simple
    clearly = confirmed(BOTH, noisy(7.0, seed=3), base)
    assert choose(confirmed(PLAIN, base), [clearly, simple], 0.01) is clearly


def test_rounds_are_interleaved_and_a_failure_is_not_run_again() -> None:
    order: list[tuple[int, str]] = []

    def run(cfg: Config, number: int) -> TrialResult:
        order.append((number, cfg.hash()))
        common = {"config": {}, "config_hash": cfg.hash(), "context_hash": "", "started_at": ""}
        if cfg is BOTH:
            return Failed(outcome="crashed", reason="x", phase="load", **common)
        return Ok.model_construct(outcome="ok", **common)

    found = measure_interleaved([PLAIN, SDPA, BOTH], 6, run, seed=1)
    assert [len(found[c.hash()]) for c in (PLAIN, SDPA, BOTH)] == [6, 6, 1]
    rounds = [[h for n, h in order if n == number] for number in range(6)]
    assert all({PLAIN.hash(), SDPA.hash()} <= set(r) for r in rounds)
    assert len({tuple(r) for r in rounds[1:]}) > 1, "the order never changes"
