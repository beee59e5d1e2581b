from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from hypothesis import given
from hypothesis import strategies as st
from search_samples import failed, ok

from openpi_opt.config import Config
from openpi_opt.engine.findings import MIN_FAILURES, Lessons, way
from openpi_opt.result import Failed, TrialResult

KEYS = "abc"


def result(params: Mapping[str, str], how: str | None) -> TrialResult:
    return made("".join(params[key] for key in sorted(params)), how)


@cache
def made(digits: str, how: str | None) -> TrialResult:
    seed = int(digits)
    cfg = Config.parse({"weights": {"seed": seed}})
    return ok(cfg, 5.0) if how is None else failed(cfg, how)


def taught(*points: tuple[Mapping[str, str], str | None]) -> Lessons:
    lessons = Lessons()
    for params, how in points:
        lessons.add(params, result(params, how))
    return lessons


def test_a_value_that_fails_three_times_is_barred() -> None:
    good = ({"a": "0", "b": "0"}, None)
    bad = [({"a": "1", "b": str(n)}, "crashed") for n in range(3)]
    assert not taught(good, *bad[:2]).classes
    (known,) = taught(good, *bad).classes
    assert known.pairs == {("a", "1")}
    assert known.seen == 3
    assert (str(known), known.way) == ("a=1", "crashed in phase load")


def test_failures_of_different_kinds_or_with_a_success_bar_nothing() -> None:
    good = ({"a": "0", "b": "0"}, None)
    bad = [({"a": "1", "b": str(n)}, how) for n, how in enumerate(("oom", "timeout", "oom", None))]
    assert not taught(good, *bad).classes


def test_where_everything_fails_nothing_is_learned() -> None:
    assert not taught(*(({"a": str(n), "b": "0"}, "crashed") for n in range(9))).classes


def test_what_cannot_be_told_apart_is_barred_together_only() -> None:
    """a=1 and b=1 were never seen without each other: neither alone is known to fail."""
    bad = [({"a": "1", "b": "1", "c": str(n)}, "crashed") for n in range(3)]
    lessons = taught(({"a": "0", "b": "0", "c": "0"}, None), *bad)
    (known,) = lessons.classes
    assert known.pairs == {("a", "1"), ("b", "1")}
    assert lessons.bars({"a": "1", "b": "0", "c": "9"}) is None
    assert lessons.bars({"a": "1", "b": "1", "c": "9"}) is known


def test_a_pair_is_barred_where_each_alone_works() -> None:
    fine = [({"a": "1", "b": "0", "c": "0"}, None), ({"a": "0", "b": "1", "c": "0"}, None)]
    bad = [({"a": "1", "b": "1", "c": str(n)}, "oom") for n in range(3)]
    (known,) = taught(*fine, *bad).classes
    assert known.pairs == {("a", "1"), ("b", "1")}


def test_the_same_configuration_counts_once_however_it_was_written() -> None:
    lessons = Lessons()
    same = failed(Config.parse({}))
    lessons.add({"a": "0", "b": "0"}, result({"a": "0", "b": "0"}, None))
    for n in range(5):
        lessons.add({"a": "1", "b": str(n)}, same)
    assert not lessons.classes


points = st.fixed_dictionaries({key: st.sampled_from("012") for key in KEYS})
ways = st.sampled_from([None, None, "oom", "crashed"])


@given(st.lists(st.tuples(points, ways), max_size=40))
def test_nothing_is_barred_that_was_not_seen_to_fail(
    tried: list[tuple[dict[str, str], str | None]],
) -> None:
    lessons, told = Lessons(), {}
    for params, how in tried:
        outcome = result(params, how)
        found = lessons.add(params, outcome)
        told.setdefault(frozenset(params.items()), (params, way(outcome)))
        if found is None:
            continue
        members = [how for params, how in told.values() if found.pairs <= params.items()]
        assert len(members) >= MIN_FAILURES
        assert set(members) == {found.way}
        assert any(how != found.way for _, how in told.values())


def test_a_way_is_outcome_and_phase() -> None:
    crashed = failed(Config.parse({}))
    assert isinstance(crashed, Failed)
    assert way(crashed) == "crashed in phase load"
    assert way(ok(Config.parse({}), 1.0)) is None
