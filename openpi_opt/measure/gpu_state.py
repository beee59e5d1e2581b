"""What the driver says of one GPU: clocks, temperature, power, throttling, other processes.

Nothing here imports torch or makes a GPU context, and nothing is read between two timed calls: a
trial reads right before and right after them, while the GPU works on a call that nobody times (an
idle GPU lowers its clocks). What cannot be read is named in `GpuState.not_read` with the reason;
nothing is refused for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from openpi_opt.result import Gpu as Readings
from openpi_opt.result import GpuState
from openpi_opt.vendor import BY_NAME
from openpi_opt.vendor.base import Driver, Gpu, NotReadError


class Monitor:
    """Reads one GPU; make it before this process has a context on the GPU.

    In a container the driver may number processes in a way of its own. The processes that are
    there before our context are strangers, and of those that appear later one is ours.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        try:
            self._strangers = frozenset(driver.processes())
        except NotReadError:  # `read` will say so
            self._strangers = frozenset()

    def read(self) -> GpuState:
        """All that can be read now. It takes a few milliseconds."""
        not_read: list[str] = []

        def value(name: str, read: Callable[[], Any]) -> Any:
            try:
                return read()
            except NotReadError as error:
                not_read.append(f"{name}: {error}")
                return None

        names = (
            "sm_clock_mhz",
            "max_sm_clock_mhz",
            "memory_clock_mhz",
            "temperature_c",
            "power_w",
            "power_limit_w",
            "default_power_limit_w",
            "throttle_reasons",
        )
        found = {name: value(name, getattr(self._driver, name)) for name in names}
        found["other_processes"] = value("other_processes", self._others)
        return GpuState(**found, not_read=not_read)

    def throttled_ms(self) -> dict[str, float] | None:
        """Counters of throttled time in ms, whose differences count; None if there are none."""
        try:
            return self._driver.throttled_ms()
        except NotReadError:
            return None

    def _others(self) -> int:
        present = set(self._driver.processes())
        if os.getpid() in present:
            return len(present) - 1
        ours = 1 if present - self._strangers else 0
        return len(present) - ours


@contextmanager
def monitor(gpu: Gpu) -> Iterator[Monitor]:
    """A monitor of this GPU, by whatever library its vendor has."""
    with BY_NAME[gpu.vendor].state(gpu) as driver:
        yield Monitor(driver)


def between(
    before: GpuState | None,
    after: GpuState | None,
    throttled_before: Mapping[str, float] | None,
    throttled_after: Mapping[str, float] | None,
) -> Readings | None:
    """Two readings and the throttled time between them; None without readings."""
    if before is None or after is None:
        return None
    passed = None
    if throttled_before is not None and throttled_after is not None:
        passed = {name: throttled_after[name] - value for name, value in throttled_before.items()}
    return Readings(before=before, after=after, throttled_ms=passed)
