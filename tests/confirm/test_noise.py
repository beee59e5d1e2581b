"""The noise of processes: what is fitted, and that plans tried out on it say what happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from openpi_opt.confirm import promise
from openpi_opt.confirm.noise import Fit, Noise, fit, noise_of
from openpi_opt.confirm.promise import Costs, Tau, make_plan

NONE = Fit({}, (), 0)


def series(
    random: np.random.Generator, levels: list[float], rounds: int, tau: float, drift: float = 0.0
) -> list[tuple[str, float]]:
    found, walked = [], 0.0
    for _ in range(rounds):
        for place in random.permutation(len(levels)):
            walked += random.normal(0, drift)
            found.append((f"c{place}", levels[place] + walked + random.normal(0, tau)))
    return found


def test_without_drift_levels_are_near_the_means_and_the_spread_is_tau() -> None:
    random = np.random.default_rng(0)
    levels = random.normal(0, 0.1, 30).tolist()
    spreads, errors = [], []
    for _ in range(40):
        found = fit([series(random, levels, 4, 0.004)])
        errors.append(np.std([found.levels[f"c{n}"] - level for n, level in enumerate(levels)]))
        assert found.freedom == 120 - 30 - 120 // 15 + 1
        spreads.append(np.mean(np.square(found.residuals)))
    assert math.sqrt(np.mean(spreads)) == pytest.approx(0.004, rel=0.05)
    assert np.mean(errors) < 1.1 * 0.004 / 2


def test_drift_moves_neither_order_nor_spread() -> None:
    random = np.random.default_rng(1)
    plain, fitted, spreads = [], [], []
    for _ in range(40):
        drawn = series(random, [0.0] * 40, 3, 0.003, drift=0.002)
        found = fit([drawn])
        means = [np.mean([log for key, log in drawn if key == f"c{n}"]) for n in range(40)]
        plain.append(np.std(means))
        fitted.append(np.std(list(found.levels.values())))
        spreads.append(np.std(found.residuals))
    assert np.mean(fitted) < 0.75 * np.mean(plain)
    assert np.mean(spreads) < 0.0055, "what a round of confirmation shows; all drift would be 0.01"


def test_stretches_of_time_have_levels_of_their_own() -> None:
    """The sweep ran yesterday: all were 5% slower."""
    random = np.random.default_rng(2)
    levels = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]
    yesterday = [(key, log + 0.05) for key, log in series(random, levels, 1, 0.001)]
    found = fit([yesterday, series(random, levels, 2, 0.001)])
    differences = [found.levels[f"c{n}"] - found.levels["c0"] for n in range(7)]
    assert differences == pytest.approx(levels, abs=0.004)
    assert np.std(found.residuals) < 0.002


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5)), max_size=9)))
@settings(max_examples=60, deadline=None)
def test_any_series_has_a_fit(every: list[list[tuple[str, float]]]) -> None:
    found = fit(every)
    keys = {key for each in every for key, _ in each}
    assert set(found.levels) == keys
    assert len(found.residuals) == sum(map(len, every))
    assert all(math.isfinite(value) for value in found.levels.values())
    assert found.freedom < max(1, len(found.residuals))


def test_the_bound_is_the_chi_squared_one_where_noise_is_normal_and_larger_with_tails() -> None:
    logs = np.random.default_rng(3).uniform(-1, 1, 9).tolist()  # no tails
    alone = noise_of(logs, NONE)
    assert alone.tau == pytest.approx(np.std(logs, ddof=1))
    assert alone.upper == pytest.approx(alone.tau * math.sqrt(8 / stats.chi2.ppf(0.1, 8)))
    calm, wild = (
        Noise(tuple(r), 40, tuple(r), 40)
        for r in (np.r_[np.ones(20), -np.ones(20)], np.r_[np.full(2, 4.0), np.zeros(38)])
    )
    factor = math.sqrt(40 / stats.chi2.ppf(0.1, 40))
    assert calm.upper / calm.tau == pytest.approx(factor)
    assert wild.upper / wild.tau > 1.3 * factor


def test_the_calmer_of_two_samples_is_not_believed() -> None:
    left = Fit({}, tuple(np.random.default_rng(4).normal(0, 0.005, 50)), 40)
    assert noise_of([0.0, 0.001, -0.001], left).baseline == left.residuals
    loud = noise_of([0.0, 0.05, -0.05], left)
    assert loud.contenders == left.residuals
    assert math.sqrt(np.mean(np.square(loud.baseline))) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="two or more"):
        noise_of([1.0], left)


def test_on_normal_noise_power_and_chance_are_the_formulas() -> None:
    residuals = tuple(0.003 * stats.norm.ppf((np.arange(2000) + 0.5) / 2000))
    noise = Noise(residuals, 1_000_000, residuals, 1_000_000)  # so the bound is the spread
    for pairs in (6, 12):
        formula = promise.power(0.01, noise.upper, pairs, 0.001)
        assert noise.power(0.01, pairs, 0.001) == pytest.approx(formula, abs=0.03)
    for runs in (2, 30):
        formula = promise.chance_selected(0.004, noise.upper, runs, 40, 5)
        assert noise.chance_selected(0.004, runs, 40, 5) == pytest.approx(formula, abs=0.03)


def test_a_plan_for_tails_is_larger_and_fits_the_time_like_any_other() -> None:
    random = np.random.default_rng(5)
    slow = np.where(random.random(200) < 0.1, 0.02, random.normal(0, 0.001, 200))
    spiky = Noise(tuple(slow - slow.mean()), 150, tuple(slow - slow.mean()), 150)
    costs = Costs(20, 5)
    plan = make_plan(spiky, costs)
    plain = make_plan(Tau(spiky.upper / Tau(1.0, 100).upper, 100), costs)
    assert plan.pairs > plain.pairs
    assert spiky.power(0.01, plan.pairs, promise.level(5)) > promise.PROBABILITY
    short = make_plan(spiky, costs, costs.seconds(plan.screening, plan.pairs) / 3)
    assert short.promise.gain > plan.promise.gain
    assert make_plan(spiky, costs, None, screened=12).screening >= 12
