"""Energy of an inference: a run of calls between two readings of the machine's energy counter.

Where there is no counter, power is sampled during the run. All of it happens in a phase of its own
after the latency was measured, so reading cannot disturb that. No torch here: the controller may
ask what a machine can tell.

What is covered is the whole board of a GPU, or all CPU packages of the machine with whatever else
runs on them; host and memory beside a GPU are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from openpi_opt.errors import RefusedError
from openpi_opt.result import Energy
from openpi_opt.vendor import BY_DEVICE
from openpi_opt.vendor.base import NoMeterError
from openpi_opt.vendor.meters import Meter

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.machine import Machine

T = TypeVar("T")
IDLE_SETTLE_S = 0.5
IDLE_S = 1.0
# Power readings of recent NVIDIA GPUs are means over a second, and clocks need a while.
WARM_S = 1.0


def require(cfg: Config, machine: Machine) -> None:
    """Refuse a trial that must tell its energy on a machine that does not.

    Raises RefusedError: unavailable, with the reason.
    """
    if cfg.profile.energy is not True:
        return
    try:
        with open_meter(cfg, machine):
            pass
    except NoMeterError as error:
        raise RefusedError(
            "unavailable",
            f"profile.energy=true: {error}; profile.energy=auto measures the rest without it",
        ) from error


def measure(
    call: Callable[[T], object],
    inputs: Sequence[T],
    cfg: Config,
    machine: Machine,
    throughput_hz: float,
    enter: Callable[[str], None],
) -> tuple[Energy | None, list[str]]:
    """Energy of warm calls over `profile.energy_seconds`, or None with the reason.

    `throughput_hz` are the observations per second of the latency's run; `enter` is told the phase
    when there is something to measure with.
    """
    try:
        with open_meter(cfg, machine) as meter:
            enter("energy")
            return _measure(call, inputs, cfg, meter, throughput_hz), []
    except NoMeterError as error:
        return None, [f"No energy: {error}."]


@contextmanager
def open_meter(cfg: Config, machine: Machine) -> Iterator[Meter]:
    """The meter of the device that `cfg` (resolved) runs on.

    Raises NoMeterError: this machine does not tell, or does not let this user read it.
    """
    vendor = BY_DEVICE[cfg.device]
    gpu = machine.gpu(cfg.device, cfg.platform.gpu) if vendor.is_gpu else None
    with vendor.meter(gpu) as meter:
        yield meter


def _measure(
    call: Callable[[T], object],
    inputs: Sequence[T],
    cfg: Config,
    meter: Meter,
    throughput_hz: float,
) -> Energy:
    from openpi_opt.measure.clock import synchronise

    def run(seconds: float) -> int:
        """Call after call, each to its end as when timed, for at least `seconds`."""
        calls, end = 0, time.monotonic() + seconds
        while not calls or time.monotonic() < end:
            call(inputs[calls % len(inputs)])
            synchronise(cfg.device)
            calls += 1
        return calls

    synchronise(cfg.device)
    time.sleep(IDLE_SETTLE_S)
    meter.start()
    time.sleep(IDLE_S)
    idle_joule, idle_seconds = meter.stop(0.0)
    idle_watt = idle_joule / idle_seconds
    run(WARM_S)
    meter.start()
    calls = run(cfg.profile.energy_seconds)
    joule, seconds = meter.stop(idle_watt)
    if joule <= 0:
        raise NoMeterError(
            f"the reading of {meter.method} stood still over {seconds:.1f} s of calls"
        )
    watt, limit, observations = joule / seconds, meter.limit_watt, calls * cfg.workload.batch_size
    return Energy(
        method=meter.method,
        seconds=seconds,
        calls=calls,
        joule=joule / calls,
        inferences_per_joule=observations / joule,
        watt=watt,
        hz_per_watt=throughput_hz / watt,
        idle_watt=idle_watt if idle_watt > 0 else None,
        limit_watt=limit,
        hz_per_limit_watt=throughput_hz / limit if limit else None,
    )
