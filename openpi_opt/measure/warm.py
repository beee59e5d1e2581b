"""Bring a GPU's clock to where it stays under load, before the first sample.

A captured call was 7% slower in the first seconds on a cold H100 than after half a minute of load
(3.32 against 3.11 ms, a chain of small products). A sweep keeps its GPUs warm; its first trial and
one after a pause would be measured on a colder one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from openpi_opt.machine import Device

# Seconds of load: at least, at most, and where the clock cannot be read.
LEAST_SECONDS, MOST_SECONDS, BLIND_SECONDS = 1.0, 5.0, 2.0
_BETWEEN_SECONDS = 0.25  # two readings of the clock
_STEADY = 3  # readings that agree
_AGREE = 0.01  # relative


def warm(
    call: Callable[[], object],
    device: Device,
    clock_mhz: Callable[[], float | None],
    synchronise: Callable[[], None],
) -> float:
    """Call until the clock of the compute units is steady; returns the seconds that it took.

    `clock_mhz` reads it under load, None where the driver does not say. A CPU needs none of this.
    """
    if device == "cpu":
        return 0.0
    began, readings = time.monotonic(), list[float]()
    while True:
        until = time.monotonic() + _BETWEEN_SECONDS
        while time.monotonic() < until:
            call()
            synchronise()
        call()  # not waited for: the clock is read while it runs
        now = clock_mhz()
        synchronise()
        took = time.monotonic() - began
        if now is not None:
            readings.append(now)
        last = readings[-_STEADY:]
        steady = len(last) == _STEADY and max(last) - min(last) <= _AGREE * max(last)
        least = LEAST_SECONDS if readings else BLIND_SECONDS
        if took >= MOST_SECONDS or (took >= least and (steady or not readings)):
            return took
