from __future__ import annotations

from openpi_opt.engine.pace import Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_trial_begins_that_would_end_after_the_minutes() -> None:
    clock = Clock()
    pace = Pace(10.0, clock)
    for number in range(3):
        assert not pace.is_over()
        pace.began(str(number))
        clock.now += 120
        pace.ended(str(number))
    pace.ended("answered from the journal")
    assert pace.text() == "3 done, 30/h, 4.0 min left"
    assert pace.share() == 0.6
    assert not pace.is_over()
    clock.now += 121  # 119 s are left, and a trial takes 120
    assert pace.is_over()
    pace.ended("2")
    clock.now -= 121
    assert pace.is_over(), "it stays so"


def test_without_minutes_there_is_no_end_and_no_hurry() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    clock.now += 1e9
    assert not pace.is_over()
    assert pace.patience() == 0.0
    assert pace.text("[1/4]") == "0 done"
    assert Pace(10.0, clock).patience() > 0


def test_the_time_left_is_estimated_where_the_number_of_trials_is_known() -> None:
    clock = Clock()
    pace = Pace(None, clock)
    for number in range(2):
        pace.began(str(number))
        clock.now += 90
        pace.ended(str(number))
    assert pace.text("[2/4]") == "2 done, 40/h, about 3.0 min left"
    assert pace.text("[4/4]") == pace.text("[7]") == "2 done, 40/h"


def test_a_trial_that_runs_for_long_says_how_long_the_next_may_take() -> None:
    clock = Clock()
    pace = Pace(10.0, clock)
    pace.began("long")
    pace.began("short")
    clock.now += 10
    pace.ended("short")
    clock.now += 300
    assert pace.is_over() is False  # 290 s are left, and the median of 10 and 310 s is 160
    clock.now += 140
    assert pace.is_over()
