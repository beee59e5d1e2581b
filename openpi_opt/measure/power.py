"""Energy of an inference: a run of calls between two readings of the machine's energy counter.

Where there is no counter, power is sampled during the run. All of it happens in a phase of its own
after the latency was measured, so reading cannot disturb that. No torch here: the controller may
ask what a machine can tell.

What is covered is the whole board of a GPU, or all CPU packages of the machine with whatever else
runs on them; host and memory beside a GPU are not in it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np

from openpi_opt.errors import RefusedError
from openpi_opt.result import Energy

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.machine import Gpu, Machine

T = TypeVar("T")
Method = Literal["nvml_counter", "nvml_samples", "amdsmi_counter", "hwmon_samples", "rapl"]

_POWERCAP = Path("/sys/class/powercap")
_DRM = Path("/sys/class/drm")
IDLE_SETTLE_S = 0.5
IDLE_S = 1.0
# Power readings of recent NVIDIA GPUs are means over a second, and clocks need a while.
WARM_S = 1.0
# Counters are refreshed every 1 to 100 ms; one that stands still this long is not waited for.
_TICK_S = 0.5
_SAMPLE_S = 0.02


class NoMeterError(Exception):
    """This machine does not tell its energy; the message says why, as the end of a sentence."""


class Meter(Protocol):
    """Something that tells energy. `read` begins, `joules_since` ends a measurement."""

    method: Method
    limit_watt: float | None

    def start(self) -> None:
        """Begin."""

    def stop(self, idle_watt: float) -> tuple[float, float]:
        """Joules and seconds since `start`; `idle_watt` is drawn after the end of the run."""


class CounterMeter:
    """Meter of a counter in joules that only grows, in steps of some milliseconds.

    A run begins right after a step. At its end the next step is waited for, with nothing running,
    and that wait's idle energy is taken off again.
    """

    def __init__(
        self, method: Method, read: Callable[[], float], limit_watt: float | None = None
    ) -> None:
        self.method, self.limit_watt = method, limit_watt
        self._read = read
        self._joules = self._since = 0.0

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


class SampleMeter:
    """Meter of a power reading in watts: sampled by a thread, integrated by trapezoids."""

    def __init__(
        self, method: Method, read: Callable[[], float], limit_watt: float | None = None
    ) -> None:
        self.method, self.limit_watt = method, limit_watt
        self._read = read
        self._samples: list[tuple[float, float]] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take the first sample, then one every 20 ms."""
        self._end.clear()
        self._samples = [self._sample()]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self, idle_watt: float) -> tuple[float, float]:
        """As `Meter.stop`; samples end with the run, so nothing is taken off."""
        assert self._thread is not None
        self._end.set()
        self._thread.join()
        self._samples.append(self._sample())
        times, watts = np.array(self._samples).T
        return float(np.trapezoid(watts, times)), float(times[-1] - times[0])

    def _run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self._samples.append(self._sample())

    def _sample(self) -> tuple[float, float]:
        return time.monotonic(), self._read()


def require(cfg: Config, machine: Machine) -> None:
    """Refuse a trial that must tell its energy on a machine that does not.

    Raises:
        RefusedError: unavailable, with the reason.
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

    Raises:
        NoMeterError: this machine does not tell, or does not let this user read it.
    """
    if cfg.device == "cpu":
        yield rapl_meter(_POWERCAP)
        return
    gpu = machine.gpu(cfg.device, cfg.platform.gpu)
    with _nvml_meter(gpu) if gpu.vendor == "nvidia" else _amd_meter(gpu) as meter:
        yield meter


def rapl_meter(folder: Path) -> CounterMeter:
    """All CPU packages of a powercap folder, `/sys/class/powercap`.

    Raises:
        NoMeterError: there are none, or only root may read them.
    """
    zones = [
        zone
        for zone in sorted(folder.glob("intel-rapl:*"))  # AMD's packages, too, have this name
        if re.fullmatch(r"intel-rapl:\d+", zone.name)
        and (zone / "name").read_text().startswith("package")
    ]
    if not zones:
        raise NoMeterError(f"this machine has no RAPL counters of its CPU in {folder}")
    try:
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        counters = [
            _Unwrapped(zone / "energy_uj", top) for zone, top in zip(zones, ranges, strict=True)
        ]
        for counter in counters:
            counter.read()
    except OSError as error:
        raise NoMeterError(
            f"{error.filename} cannot be read ({error.strerror}); root can, or give read permission"
        ) from error
    limits = [_micro(zone / "constraint_0_power_limit_uw") for zone in zones]
    known = [limit for limit in limits if limit is not None]
    limit = sum(known) if len(known) == len(limits) else None
    return CounterMeter("rapl", lambda: sum(c.read() for c in counters), limit)


class _Unwrapped:
    """A counter in microjoules that begins again at 0 after `top`, as joules that only grow."""

    def __init__(self, path: Path, top: int) -> None:
        self._path, self._top = path, top
        self._last = self._turns = 0

    def read(self) -> float:
        """Joules. To be called at least once a turn, which takes minutes."""
        now = int(self._path.read_text())
        self._turns += now < self._last
        self._last = now
        return (self._turns * self._top + now) / 1e6


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
    return energy_of(
        meter, joule, seconds, calls, idle_watt, cfg.workload.batch_size, throughput_hz
    )


def energy_of(
    meter: Meter,
    joule: float,
    seconds: float,
    calls: int,
    idle_watt: float,
    batch_size: int,
    throughput_hz: float,
) -> Energy:
    """The figures of a run of `calls` calls that took `joule` in all."""
    watt, limit = joule / seconds, meter.limit_watt
    return Energy(
        method=meter.method,
        seconds=seconds,
        calls=calls,
        joule=joule / calls,
        inferences_per_joule=calls * batch_size / joule,
        watt=watt,
        hz_per_watt=throughput_hz / watt,
        idle_watt=idle_watt if idle_watt > 0 else None,
        limit_watt=limit,
        hz_per_limit_watt=throughput_hz / limit if limit else None,
    )


@contextmanager
def _nvml_meter(gpu: Gpu) -> Iterator[Meter]:
    """NVML's energy counter (since Volta), or else its power reading."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoMeterError(f"NVML cannot be used ({error})") from error
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        limit = _told(pynvml, lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)

        def joules() -> float:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

        def watts() -> float:
            return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1e3

        if _told(pynvml, joules) is not None:
            yield CounterMeter("nvml_counter", joules, limit)
        elif _told(pynvml, watts) is not None:
            yield SampleMeter("nvml_samples", watts, limit)
        else:
            raise NoMeterError(f"NVML tells neither energy nor power of {gpu.name}")
    except pynvml.NVMLError as error:
        raise NoMeterError(f"NVML does not tell it ({error})") from error
    finally:
        pynvml.nvmlShutdown()


def _told(pynvml: ModuleType, read: Callable[[], float]) -> float | None:
    try:
        return read()
    except pynvml.NVMLError:  # not supported by this GPU, or not in this container
        return None


@contextmanager
def _amd_meter(gpu: Gpu) -> Iterator[Meter]:
    """amdsmi's energy counter where the package is installed, or else the kernel's power reading.

    Not run on AMD hardware yet.
    """
    device = amd_device(_DRM, gpu.uuid)
    if device is None:
        raise NoMeterError(f"{_DRM} has no device with the unique_id of {gpu.name} ({gpu.uuid})")
    limit = _hwmon(device, "power1_cap")
    try:
        import amdsmi
    except (ImportError, OSError, KeyError):  # not installed, or without its library
        amdsmi = None
    if amdsmi is not None:
        try:
            amdsmi.amdsmi_init()
            handle = amdsmi.amdsmi_get_processor_handle_from_bdf(device.resolve().name)

            def joules() -> float:
                told = amdsmi.amdsmi_get_energy_count(handle)
                # `power` is what ROCm 6.0 called it.
                ticks = told["energy_accumulator" if "energy_accumulator" in told else "power"]
                return float(ticks) * float(told["counter_resolution"]) / 1e6

            joules()
        except amdsmi.AmdSmiException:  # virtual machines have no counter
            pass
        else:
            try:
                yield CounterMeter("amdsmi_counter", joules, limit)
            finally:
                amdsmi.amdsmi_shut_down()
            return
    if (name := _power_file(device)) is None:
        raise NoMeterError(f"neither amdsmi nor the driver's hwmon tells the power of {gpu.name}")

    def watts() -> float:
        return int(name.read_text()) / 1e6

    yield SampleMeter("hwmon_samples", watts, limit)


def amd_device(drm: Path, uuid: str) -> Path | None:
    """The PCI device of an AMD GPU in `/sys/class/drm`, by the id that `machine` names it with."""
    for node in sorted(drm.glob("renderD*")):
        file = node / "device" / "unique_id"
        if file.is_file() and f"GPU-{int(file.read_text(), 16):016x}" == uuid:
            return node / "device"
    return None


def _power_file(device: Path) -> Path | None:
    """Board power in microwatts; newer chips tell an instant reading only."""
    for name in ("power1_average", "power1_input"):
        for path in sorted(device.glob(f"hwmon/hwmon*/{name}")):
            if _micro(path) is not None:
                return path
    return None


def _hwmon(device: Path, name: str) -> float | None:
    return next((_micro(path) for path in sorted(device.glob(f"hwmon/hwmon*/{name}"))), None)


def _micro(path: Path) -> float | None:
    """A file of the kernel that counts millionths; None where it is not there or not to be read."""
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None
