from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.errors import UserError
from openpi_opt.space.settings import Settings, check_not_swept, default_study_name, identity
from openpi_opt.space.space import Space, quoted
from openpi_opt.track.store import Store

DAY = datetime(2026, 5, 4, 23, 59, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"n_trials": 0}, ["n_trials=0", "greater than or equal to 1"]),
        ({"n_trials": "many"}, ["n_trials=many"]),
        ({"n_trials": 2.5}, ["n_trials=2.5"]),
        ({"minutes": 0}, ["minutes=0"]),
        ({"pruning": 0.5}, ["pruning=0.5"]),
        ({"sampler": "best"}, ["sampler=best", "'auto', 'grid', 'stages'"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"baseline": "perhaps"}, ["baseline=perhaps"]),
        ({"store": ""}, ["store="]),
    ],
)
def test_a_bad_setting_is_named(given_, words):
    with pytest.raises(UserError) as caught:
        Settings.parse(given_)
    assert all(word in str(caught.value) for word in words)


def test_minutes_take_the_place_of_a_number_of_trials():
    assert Settings().most_trials == 50
    assert Settings(minutes=5).most_trials > 100_000
    assert Settings(minutes=5, n_trials=7).most_trials == 7


def test_a_number_is_a_name():
    assert Settings.parse({"study": 2024, "store": 7}).study == "2024"


@pytest.mark.parametrize("override", ["n_trials=1,2", "study=a,b", "store=x,y", "seed=range(3)"])
def test_settings_are_not_swept(override):
    with pytest.raises(UserError, match="cannot itself be swept"):
        check_not_swept(Space.parse([override]))


def test_the_identity_leaves_out_what_changes_no_result():
    deciding = ["attention=aiter,sdpa", "workload=openpi"]
    rest = ["store=/x", "n_trials=7", "tracking=none", "limits.load=3", "study=s", "sampler=tpe"]
    assert identity([*rest, *deciding]) == deciding
    assert default_study_name([*rest, *deciding], DAY) == default_study_name(deciding, DAY)


def test_the_name_says_day_and_overrides():
    name = default_study_name(["attention=aiter,sdpa"], DAY)
    assert name.startswith("20260504-attention=aiter,sdpa-")
    assert name == default_study_name(["attention=aiter,sdpa"], DAY)
    assert default_study_name([], DAY).startswith("20260504-defaults-")


def test_names_that_read_the_same_differ():
    long = "a=" + ",".join(f"v{i}" for i in range(99))
    pairs = [("a='x y',z", "a='x-y',z"), (long + ",1", long + ",2")]
    for one, other in pairs:
        assert default_study_name([one], DAY) != default_study_name([other], DAY)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))))
def test_the_name_is_always_a_study_name(values):
    overrides = [f"key{i}={quoted(value)}" for i, value in enumerate(values) if value]
    name = default_study_name(overrides, DAY)
    assert Store(Path("/store")).study_dir(name) == Path("/store/studies", name)
