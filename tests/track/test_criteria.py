"""Objectives and limits: what is better, what is too much, and what is neither."""

import argparse

import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from track_samples import ENERGY, ok, record, refused, wrong

from openpi_opt.config import Limits
from openpi_opt.criteria import (
    Criteria,
    add_arguments,
    of_arguments,
    pareto,
)
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES, LIMITS, OBJECTIVES
from openpi_opt.paths import conf_dir
from openpi_opt.result import Memory, Ok, Pruned
from openpi_opt.track.report import rows

FEW = st.integers(0, 5).map(float)  # so few values that many are equal


def points(size: int) -> st.SearchStrategy[list[tuple[float, ...]]]:
    ordinary = st.floats(-1e6, 1e6)
    return st.lists(st.tuples(*[FEW | ordinary] * size), max_size=30)


def with_memory(mean_ms: float, peak_mib: float) -> Ok:
    memory = Memory(peak_mib=peak_mib, device_peak_mib=None, host_peak_mib=peak_mib)
    return ok(mean_ms).model_copy(update={"memory": memory})


def tails(result: Ok, **percentiles: float) -> Ok:
    return result.model_copy(update={"latency": result.latency.model_copy(update=percentiles)})


def test_every_figure_reads_a_result_and_stands_once():
    """What an objective or limit needs is there; one that is not measured is None, not 0."""
    measured = ok(10.0)
    for key, figure in FIGURES.items():
        value = figure.value(measured)
        assert key == figure.key
        assert (value is None) == (figure.cell(measured) == "")
        assert figure.title
    assert FIGURES["joule"].value(measured) is None
    for figure in [*OBJECTIVES.values(), *LIMITS.values()]:
        assert figure.better == "less"
        assert figure.head
    names = [figure.mlflow for figure in FIGURES.values() if figure.mlflow]
    assert len(set(names)) == len(names)
    options = yaml.safe_load((conf_dir() / "limits" / "default.yaml").read_text())
    assert set(options) == set(Limits.model_fields)


def test_a_percentile_alone_may_be_the_objective():
    assert Criteria(objectives=("p99",)).values(tails(ok(10.0), p99_ms=17.0)) == (17.0,)
    steady, fast = tails(ok(10.0), p99_ms=11.0), tails(ok(9.0), p99_ms=17.0)
    records = [record(each, number=number) for number, each in enumerate((steady, fast))]
    for objective, best in (("latency", 1), ("p99", 0)):
        found = rows(records, criteria=Criteria(objectives=(objective,)))
        assert [row.record.number for row in found if row.best] == [best]


@given(st.integers(1, 4).flatmap(points))
def test_the_pareto_set_is_what_its_definition_says(found):
    """No other point is at most as large everywhere and smaller somewhere, written out."""
    for point, chosen in zip(found, pareto(found), strict=True):
        better = [
            other
            for other in found
            if all(other[i] <= point[i] for i in range(len(point)))
            and any(other[i] < point[i] for i in range(len(point)))
        ]
        assert chosen == (not better)
    assert not found or any(pareto(found))


MEASURED = st.lists(
    st.tuples(st.integers(1, 6).map(float), st.integers(1, 6).map(float)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(MEASURED, st.none() | st.integers(1, 6).map(float))
def test_optuna_finds_the_same_set_under_the_same_limit(measured, limit):
    limits = {} if limit is None else {"peak_mib": limit}
    criteria = Criteria(objectives=("latency", "memory"), limits=limits)
    study = optuna.create_study(directions=["minimize", "minimize"])
    results = [with_memory(*pair) for pair in measured]
    for result in results:
        study.add_trial(
            optuna.trial.create_trial(
                values=criteria.values(result), constraints=criteria.excess(result)
            )
        )
    within = [number for number, result in enumerate(results) if not criteria.over(result)]
    chosen = pareto([measured[number] for number in within])
    ours = [number for number, on in zip(within, chosen, strict=True) if on]
    assert ours == [trial.number for trial in study.best_trials]


def test_objectives_have_one_order_and_latency_among_them():
    assert Criteria(objectives=("memory", "latency", "energy")).objectives == (
        "latency",
        "energy",
        "memory",
    )
    for wrong_one in ((), ("memory",), ("latency", "latency"), ("latency", "speed")):
        with pytest.raises(ValidationError):
            Criteria(objectives=wrong_one)


def test_values_are_those_of_the_objectives_or_none():
    every = Criteria(objectives=("latency", "memory", "energy", "guard"))
    measured = with_memory(10.0, 700.0).model_copy(update={"energy": ENERGY})
    assert every.objectives == ("latency", "energy", "guard", "memory")
    assert every.values(measured) == (10.0, 5.0, 0.002, 700.0)
    assert every.values(with_memory(10.0, 700.0)) is None, "its energy is not known"
    assert Criteria().values(wrong()) is None
    assert Criteria().values(refused()) is None


def test_every_limit_judges_its_own_figure():
    # 3 s for the first call, 0.002 of the guard
    result = tails(with_memory(10.0, 700.0), p95_ms=11.0, p99_ms=13.0)
    seen = {"latency_ms": 10.0, "peak_mib": 700.0, "compile_seconds": 3.0, "rel_l2": 0.002}
    seen |= {"p95_ms": result.latency.p95_ms, "p99_ms": result.latency.p99_ms}
    assert set(seen) == set(LIMITS)
    for name, value in seen.items():
        assert Criteria.of(["latency"], False, Limits(**{name: value})).over(result) == {}
        tight = Criteria.of(["latency"], False, Limits(**{name: value * 0.99}))
        assert list(tight.over(result)) == [name]
        assert tight.excess(result) == {name: pytest.approx(1 / 0.99 - 1)}
    assert Criteria.of(["latency"], False, Limits()) == Criteria()


def test_a_pruned_result_tells_what_it_has():
    kept = ok(10.0)
    pruned = Pruned(
        **kept.model_dump(include={"config", "config_hash", "context_hash", "started_at"}),
        guard=kept.guard,
        reason="slow",
        limit_ms=10.0,
        seen_mean_ms=30.0,
        seen_low_ms=20.0,
        seen_calls=10,
    )
    criteria = Criteria(limits={"latency_ms": 10.0, "peak_mib": 1.0, "rel_l2": 0.004})
    assert criteria.excess(pruned) == {"latency_ms": 1.0, "rel_l2": -0.5}


def test_they_are_kept_in_the_study_and_damage_is_told(tmp_path):
    assert Criteria.load(tmp_path) is None
    criteria = Criteria(objectives=("latency", "guard"), limits={"rel_l2": 0.01}, allow_lossy=True)
    criteria.save(tmp_path)
    assert Criteria.load(tmp_path) == criteria
    (tmp_path / "criteria.json").write_text('{"objectives": ["speed"]}')
    with pytest.raises(UserError, match="damaged"):
        Criteria.load(tmp_path)


def test_a_verb_judges_by_the_study_or_by_what_it_is_given(tmp_path):
    swept = {"peak_mib": 900.0, "rel_l2": 0.01}
    Criteria(objectives=("latency", "memory"), limits=swept, allow_lossy=True).save(tmp_path)
    parser = argparse.ArgumentParser()
    parser.add_argument("--allow-lossy", action="store_true")
    add_arguments(parser, objectives=True)

    def judged(*words: str) -> Criteria:
        return of_arguments(parser.parse_args(words), tmp_path)

    assert judged() == Criteria(objectives=("latency", "memory"), limits=swept)
    given_ = judged(
        "--limit", "peak_mib=50", "--limit", "rel_l2=none", "--objective", "[guard,latency]"
    )
    assert given_ == Criteria(objectives=("latency", "guard"), limits={"peak_mib": 50.0})
    assert judged("--allow-lossy").allow_lossy
    for words in (
        ("--limit", "memory=5"),
        ("--limit", "peak_mib=0"),
        ("--limit", "peak_mib=nan"),
        ("--limit", "peak_mib"),
        ("--objective", "memory"),
        ("--objective", "latency,x"),
    ):
        with pytest.raises(SystemExit):
            judged(*words)
