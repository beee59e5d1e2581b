"""The share of the time in which each device had a trial."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from openpi_opt.result import TrialResult
from openpi_opt.search import occupancy
from openpi_opt.search.occupancy import Occupancy


def test_shares_are_of_the_time_from_first_start_to_last_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(occupancy, "time", SimpleNamespace(monotonic=lambda: now))
    found = Occupancy()
    assert found.uses() == []
    first, second, third = Future[TrialResult](), Future[TrialResult](), Future[TrialResult]()
    found.started("GPU 1", first)
    found.started("GPU 0", second)
    now = 104.0
    second.set_exception(RuntimeError("ends like any other"))
    now = 105.0
    found.started("GPU 0", third)
    now = 110.0
    third.cancel()
    first.set_exception(RuntimeError())
    assert [use.text() for use in found.uses()] == [
        "GPU 0 90.0% (2 trials)",
        "GPU 1 100.0% (1 trial)",
    ]
    assert found.uses()[0].span == 10.0
