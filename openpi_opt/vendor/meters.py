"""Two kinds of meters: of a counter of energy, and of readings of power."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

# Counters are refreshed every 1 to 100 ms; one that stands still this long is not waited for.
_TICK_S = 0.5
_SAMPLE_S = 0.02


class Meter(ABC):
    """Something that tells energy, by `read`. `start` begins, `stop` ends a measurement."""

    def __init__(
        self, method: str, read: Callable[[], float], limit_watt: float | None = None
    ) -> None:
        self.method, self.limit_watt = method, limit_watt
        self._read = read

    @abstractmethod
    def start(self) -> None:
        """Begin."""

    @abstractmethod
    def stop(self, idle_watt: float) -> tuple[float, float]:
        """Joules and seconds since `start`; `idle_watt` is drawn after the end of the run."""


class CounterMeter(Meter):
    """Meter of a counter in joules that only grows, in steps of some milliseconds. A run begins
    right after a step. At its end the next step is waited for, with nothing running, and that
    wait's idle energy is taken off again."""

    def start(self) -> None:
        """Wait for a step, then begin."""
        self._joules, self._since = self._next_step()

    def stop(self, idle_watt: float) -> tuple[float, float]:
        """As `Meter.stop`."""
        ended = time.monotonic()
        joules, at = self._next_step()
        return joules - self._joules - idle_watt * (at - ended), ended - self._since

    def _next_step(self) -> tuple[float, float]:
        before, deadline = self._read(), time.monotonic() + _TICK_S
        while (now := self._read()) == before and time.monotonic() < deadline:
            time.sleep(0.0005)
        return now, time.monotonic()


class SampleMeter(Meter):
    """Meter of a power reading in watts: sampled by a thread, integrated by trapezoids."""

    def start(self) -> None:
        """Take the first sample, then one every 20 ms."""
        self._end = threading.Event()
        self._samples = [self._sample()]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, idle_watt: float) -> tuple[float, float]:
        """As `Meter.stop`; samples end with the run, so nothing is taken off."""
        self._end.set()
        self._thread.join()
        self._samples.append(self._sample())
        times, watts = zip(*self._samples, strict=True)
        steps = zip(times, times[1:], watts, watts[1:], strict=False)
        joule = sum((later - at) * (one + other) / 2 for at, later, one, other in steps)
        return joule, times[-1] - times[0]

    def _run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self._samples.append(self._sample())

    def _sample(self) -> tuple[float, float]:
        return time.monotonic(), self._read()
