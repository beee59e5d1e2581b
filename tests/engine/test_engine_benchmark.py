"""The benchmark of the engine measures this engine: it runs, and knows what it finds."""

from benchmarks import engine


def test_the_benchmark_runs_on_a_study_that_has_trials():
    found = engine.measure(finished=5, trials=3)
    assert found["finished"] == 5
    assert 0 < found["overhead_median_ms"] <= found["overhead_most_ms"]
