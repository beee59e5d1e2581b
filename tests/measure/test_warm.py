"""How long a GPU is warmed, on a clock of its own."""

import pytest

from openpi_opt.measure import warm


class Gpu:
    """Every call takes 50 ms; the compute clock reads what is given, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *readings: float | None):
        self.now, self.calls, self.readings = 0.0, 0, list(readings)
        monkeypatch.setattr(warm.time, "monotonic", lambda: self.now)

    def call(self) -> None:
        self.calls += 1
        self.now += 0.05

    def clock(self) -> float | None:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def warm(self, device: str = "cuda") -> float:
        return warm.warm(self.call, device, self.clock, lambda: None)  # type: ignore[arg-type]


def test_it_ends_when_the_clock_is_steady(monkeypatch):
    quick = Gpu(monkeypatch, 1980.0).warm()
    assert warm.LEAST_SECONDS <= quick < 1.5
    slow = Gpu(monkeypatch, 900, 1200, 1500, 1700, 1900, 1960, 1975, 1980).warm()
    assert quick < slow < warm.MOST_SECONDS


def test_it_gives_up_on_a_clock_that_wanders(monkeypatch):
    gpu = Gpu(monkeypatch, *[1000.0, 1500.0] * 99)
    assert warm.MOST_SECONDS <= gpu.warm() < warm.MOST_SECONDS + 0.5


def test_without_a_clock_it_takes_a_while_and_a_cpu_none(monkeypatch):
    assert warm.BLIND_SECONDS <= Gpu(monkeypatch, None).warm() < warm.BLIND_SECONDS + 0.5
    gpu = Gpu(monkeypatch, 1980.0)
    assert gpu.warm("cpu") == 0.0
    assert gpu.calls == 0
