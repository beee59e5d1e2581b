"""What runs look like: each kind is found, and nothing is found where there is nothing."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from scipy import signal

from openpi_opt.measure.shape import findings

Generator = np.random.Generator
Draw = Callable[[Generator, int], np.ndarray]


def found(samples: np.ndarray, inefficiency: float = 1.0) -> dict[str, str]:
    return {finding.kind: finding.text for finding in findings(samples, inefficiency)}


def near(generator: Generator, count: int, level: float, spread: float = 0.05) -> np.ndarray:
    return level + generator.normal(0, spread, count)


def mixed(g: Generator, n: int) -> np.ndarray:
    return np.where(g.random(n) < 0.7, near(g, n, 15.9), near(g, n, 16.8))


def wandering(g: Generator, n: int) -> np.ndarray:
    return 16 + signal.lfilter([1], [1, -0.5], g.normal(0, 0.2, n + 100))[100:]


NOTHING: dict[str, Draw] = {
    "quiet": lambda g, n: near(g, n, 16),
    "spread by 3%": lambda g, n: near(g, n, 16, 0.5),
    "rounded": lambda g, n: near(g, n, 16).round(2),
    "uniform": lambda g, n: g.uniform(15.2, 16.8, n),
    "autocorrelated": wandering,
    "equal": lambda g, n: np.full(n, 16.0),
}
SOMETHING: dict[str, tuple[str, Draw]] = {
    "drifting": ("drift", lambda g, n: near(g, n, 16) * np.linspace(1, 1.03, n)),
    "stepping": ("drift", lambda g, n: near(g, n, 16) * np.where(np.arange(n) > n * 0.6, 1.05, 1)),
    "bimodal": ("modes", mixed),
    "two values": ("modes", lambda g, n: np.where(g.random(n) < 0.8, 15.9, 16.8)),
    "outliers": ("outliers", lambda g, n: near(g, n, 16) + 6 * (np.arange(n) % 40 == 7)),
    "noisy": ("spread", lambda g, n: near(g, n, 16, 2.5)),
}


@pytest.mark.parametrize("count", [30, 100, 1000])
@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_found_where_there_is_nothing(name, count):
    generator = np.random.default_rng(11)
    runs = 60
    kinds = Counter(kind for _ in range(runs) for kind in found(NOTHING[name](generator, count)))
    # Thirty samples of a uniform distribution may look like two heaps.
    assert sum(kinds.values()) <= (6 if count == 30 else 2), kinds


@pytest.mark.parametrize("count", [100, 1000])
@pytest.mark.parametrize("name", SOMETHING)
def test_what_is_there_is_found_and_nothing_else(name, count):
    kind, draw = SOMETHING[name]
    generator = np.random.default_rng(13)
    kinds = Counter(kind for _ in range(50) for kind in found(draw(generator, count)))
    assert kinds[kind] >= 48, kinds
    assert kinds.total() - kinds[kind] <= 2, kinds


def test_heavy_tails_show_as_outliers_and_as_nothing_else():
    generator = np.random.default_rng(2)
    samples = 16 * (1 + 0.02 * np.abs(generator.standard_t(1.5, 1000)))
    assert "outliers" in found(samples)
    assert not {"modes", "drift"} & set(found(samples))


def test_the_words():
    g = np.random.default_rng(0)
    drift = found(near(g, 400, 16, 0.02) * np.linspace(1, 1.03, 400))["drift"]
    assert drift in ("drifting up 3.0% over the run", "drifting up 2.9% over the run")
    fall = found(near(g, 400, 16, 0.02) * np.linspace(1.03, 1, 400))["drift"]
    assert fall.startswith("drifting down")
    step = found(np.where(np.arange(400) < 240, near(g, 400, 16), near(g, 400, 16.8)))["drift"]
    assert step == "a step up of 5.0% after 60% of the run"
    exact = np.concatenate([np.full(70, 15.9), np.full(30, 16.8)])[g.permutation(100)]
    assert found(exact)["modes"] == "bimodal: 70% at 15.9 ms, 30% at 16.8 ms"
    assert found(near(g, 100, 16, 2.4))["spread"].startswith("noisy: std is 1")
    assert found(near(g, 412, 16), 10.3)["autocorrelation"] == (
        "autocorrelated: 412 samples say as much as 40"
    )
    far = np.concatenate([near(g, 99, 16), [40.0]])
    assert found(far)["outliers"] == (
        "outliers: 1 of 100 beyond 3 interquartile ranges, as 40 ms; they move the mean by +1.5%"
    )


def test_changes_too_small_to_matter_are_not_reported():
    g = np.random.default_rng(1)
    small = 0.005
    assert found(near(g, 1000, 16, 0.001) * np.linspace(1, 1 + small, 1000)) == {}
    assert found(np.where(g.random(1000) < 0.5, 16, 16 * (1 + small))) == {}


@pytest.mark.parametrize("count", [2, 3, 10, 23])
def test_few_samples_have_no_shape(count):
    samples = np.linspace(10, 10.5, count)
    assert found(samples) == {}
