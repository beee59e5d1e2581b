"""Pairs of processes against scipy and against what is known of drawn ones."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from openpi_opt.confirm.judge import FLIPS, compare, spread_of

MEANS = st.lists(st.floats(1.0, 100.0), min_size=4, max_size=12)


@given(MEANS, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_interval_is_scipys_paired_one(first, seed):
    second = np.array(first) * np.exp(np.random.default_rng(seed).normal(0.01, 0.02, len(first)))
    found = compare(first, second.tolist())
    test = stats.ttest_rel(np.log(second), np.log(first))
    interval = test.confidence_interval(0.95)
    assert found["p_value"] == pytest.approx(test.pvalue, rel=1e-6)
    low, high = found["ci95"]
    assert math.log1p(low) == pytest.approx(interval.low, rel=1e-6, abs=1e-9)
    assert math.log1p(high) == pytest.approx(interval.high, rel=1e-6, abs=1e-9)
    assert low <= found["change"] == -found["gain"]["mean"] <= high


def test_flipped_signs_are_all_flips_where_there_are_few():
    """Six pairs of one sign: of 64 flips, two are as extreme."""
    found = compare([1.0] * 6, [1.01, 1.02, 1.03, 1.04, 1.05, 1.06])
    assert found["sign_flip_p_value"] == pytest.approx(2 / 64)
    assert found["verdict"] == "slower"
    assert compare([1.01, 1.02, 1.03, 1.04, 1.05, 1.06], [1.0] * 6)["change"] < 0


def test_both_tests_agree_on_normal_noise_and_the_same_seed_gives_the_same():
    random = np.random.default_rng(1)
    first, second = (np.exp(random.normal(level, 0.003, 20)) for level in (0.0, 0.002))
    found = compare(first.tolist(), second.tolist(), seed=3)
    assert found["sign_flip_p_value"] == pytest.approx(found["p_value"], rel=0.2)
    assert found["sign_flip_p_value"] >= 1 / (FLIPS + 1)
    assert compare(first.tolist(), second.tolist(), seed=3) == found


def test_spread_is_that_of_one_process_and_drift_of_rounds_is_not_in_the_pairs():
    random = np.random.default_rng(2)
    rounds = np.repeat(np.linspace(0.0, 0.2, 200), 2)  # the machine slows down by 20%
    logs = rounds + random.normal(0, 0.004, 400)
    first, second = np.exp(logs[::2]), np.exp(logs[1::2])
    assert compare(first, second)["spread_between_processes"] == pytest.approx(0.004, rel=0.15)
    drifting = spread_of(np.exp(logs).tolist())
    assert drifting["tau"] > 0.04
    assert drifting["trend"] > 0.5
    assert drifting["trend_p"] < 1e-6


def test_the_interval_of_the_spread_is_the_chi_squared_one():
    logs = np.random.default_rng(3).normal(0, 0.003, 16)
    found = spread_of(np.exp(logs).tolist())
    low, high = stats.chi2.interval(0.95, 15)
    assert found["tau"] == pytest.approx(np.std(logs, ddof=1))
    assert found["low"] == pytest.approx(found["tau"] * math.sqrt(15 / high))
    assert found["high"] == pytest.approx(found["tau"] * math.sqrt(15 / low))
    assert found["excess_kurtosis"] == pytest.approx(stats.kurtosis(logs, bias=False))


def test_no_scatter_and_too_few():
    same = compare([2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert (same["change"], same["p_value"], same["verdict"]) == (0.0, 1.0, "same")
    assert compare([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])["verdict"] == "faster"
    assert spread_of([2.0] * 4)["tau"] == 0.0
    for first, second in (([1.0], [1.0]), ([1.0] * 3, [1.0] * 4)):
        with pytest.raises(ValueError, match="two or more pairs"):
            compare(first, second)
    with pytest.raises(ValueError, match="four or more"):
        spread_of([1.0] * 3)
