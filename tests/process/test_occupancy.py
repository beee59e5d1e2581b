"""The share of the time in which each device had a trial."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from openpi_opt.process import occupancy
from openpi_opt.process.occupancy import Occupancy


def test_shares_are_of_the_time_from_the_first_on_a_device_to_the_last_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(occupancy, "time", SimpleNamespace(monotonic=lambda: now))
    found = Occupancy()
    assert found.uses() == []
    assert found.text() == ""
    now = 103.0
    first, second = found.stay("GPU 1"), found.stay("GPU 0")
    first.begin()
    second.begin()
    now = 107.0
    second.end()
    third, never = found.stay("GPU 0"), found.stay("GPU 0")  # both import
    now = 108.0
    third.begin()
    now = 111.0
    third.begin()  # of no effect: it is in a later phase
    never.end()
    now = 113.0
    third.end()
    first.end()
    assert [use.text() for use in found.uses()] == [
        "GPU 0 90.0% (2 trials)",
        "GPU 1 100.0% (1 trial)",
    ]
    assert found.uses()[0].span == 10.0
    assert found.text() == "in use over 10 s: GPU 0 90.0% (2 trials), GPU 1 100.0% (1 trial)"
    found.imports_aside = True
    assert found.text().startswith("in use over 10 s (imports not counted): GPU 0")
