"""What the driver says of one GPU: clocks, temperature, power, throttling, other processes.

NVIDIA through NVML, AMD through `amdsmi`, the Python binding that comes with ROCm. Nothing here
imports torch or makes a GPU context, and nothing is read between two timed calls: a trial reads
right before and right after them, while the GPU works on a call that nobody times (an idle GPU
lowers its clocks). What cannot be read is named in `GpuState.not_read` with the reason; nothing is
refused for it. **The part for AMD is written against the sources of amdsmi and has not run on AMD
hardware.**
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

from openpi_opt.machine import Gpu
from openpi_opt.result import Gpu as Readings
from openpi_opt.result import GpuState

# What slows a GPU against its operator's will. A software power cap is how large GPUs run under
# full load; what it costs shows in the clock.
HOLDING = frozenset(
    {
        "hw_slowdown",
        "hw_thermal_slowdown",
        "hw_power_brake_slowdown",
        "sw_thermal_slowdown",
        "prochot_thermal",
        "socket_thermal",
        "voltage_regulator_thermal",
        "hbm_thermal",
    }
)
_NVML_REASONS = {
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "hw_thermal_slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw_power_brake_slowdown": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "sw_thermal_slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
}
_AMD_REASONS = {
    "power_cap": "active_ppt_pwr",
    "prochot_thermal": "active_prochot_thrm",
    "socket_thermal": "active_socket_thrm",
    "voltage_regulator_thermal": "active_vr_thrm",
    "hbm_thermal": "active_hbm_thrm",
}


class NotReadError(Exception):
    """A value that this driver, GPU or container does not give; the text says why."""


class Driver(Protocol):
    """One GPU as its vendor's library shows it; each method raises `NotReadError` or returns."""

    def sm_clock_mhz(self) -> float:
        """Clock of the compute units now."""

    def max_sm_clock_mhz(self) -> float:
        """The highest that clock can be."""

    def memory_clock_mhz(self) -> float:
        """Clock of the device memory now."""

    def temperature_c(self) -> float:
        """The sensor that throttling goes by, in degrees Celsius."""

    def power_w(self) -> float:
        """Power drawn now, in watts."""

    def power_limit_w(self) -> float:
        """The limit in force, in watts."""

    def default_power_limit_w(self) -> float:
        """The limit that the board comes with, in watts."""

    def throttle_reasons(self) -> list[str]:
        """What holds the clock down now."""

    def processes(self) -> list[int]:
        """Ids of the processes that compute on this GPU, as the driver numbers them."""

    def throttled_ms(self) -> dict[str, float]:
        """Time since the driver was loaded in which each cause held the clock down."""


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
    vendor: Callable[[Gpu], Any] = _nvidia if gpu.vendor == "nvidia" else _amd
    with vendor(gpu) as driver:
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


class Nvml:
    """An NVIDIA GPU. `nvml` is the module `pynvml`, initialised."""

    def __init__(self, nvml: Any, uuid: str):
        self._nvml = nvml
        self._handle = self._ask("nvmlDeviceGetHandleByUUID", uuid)

    def sm_clock_mhz(self) -> float:
        """NVML_CLOCK_SM."""
        return float(self._of("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM))

    def max_sm_clock_mhz(self) -> float:
        """The highest NVML_CLOCK_SM."""
        return float(self._of("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM))

    def memory_clock_mhz(self) -> float:
        """NVML_CLOCK_MEM."""
        return float(self._of("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM))

    def temperature_c(self) -> float:
        """The sensor on the GPU die."""
        return float(self._of("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU))

    def power_w(self) -> float:
        """Averaged by the board over up to a second."""
        return float(self._of("nvmlDeviceGetPowerUsage")) / 1e3

    def power_limit_w(self) -> float:
        """The least of all limits in force."""
        return float(self._of("nvmlDeviceGetEnforcedPowerLimit")) / 1e3

    def default_power_limit_w(self) -> float:
        """What the limit is after a reboot."""
        return float(self._of("nvmlDeviceGetPowerManagementDefaultLimit")) / 1e3

    def throttle_reasons(self) -> list[str]:
        """The bits that are set; an idle GPU and clocks chosen by the user are no throttling."""
        bits = int(self._of("nvmlDeviceGetCurrentClocksEventReasons"))
        return [name for name, bit in _NVML_REASONS.items() if bits & getattr(self._nvml, bit)]

    def processes(self) -> list[int]:
        """Compute processes."""
        return [int(process.pid) for process in self._of("nvmlDeviceGetComputeRunningProcesses")]

    def throttled_ms(self) -> dict[str, float]:
        """NVML's violation times, in ns since the driver was loaded."""
        policies = {
            "thermal": self._nvml.NVML_PERF_POLICY_THERMAL,
            "power": self._nvml.NVML_PERF_POLICY_POWER,
        }
        return {
            name: int(self._of("nvmlDeviceGetViolationStatus", policy).violationTime) / 1e6
            for name, policy in policies.items()
        }

    def _of(self, function: str, *arguments: Any) -> Any:
        return self._ask(function, self._handle, *arguments)

    def _ask(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError as error:
            raise NotReadError(f"NVML: {error}") from None


class AmdSmi:
    """An AMD GPU. `smi` is the module `amdsmi`, initialised; caps are in microwatts there."""

    def __init__(self, smi: Any, uuid: str):
        self._smi = smi
        serial = int(uuid.removeprefix("GPU-"), 16)  # KFD's unique_id, see machine.amd_gpus
        for handle in self._ask("amdsmi_get_processor_handles"):
            asic = self._ask("amdsmi_get_gpu_asic_info", handle)
            if _hexadecimal(asic["asic_serial"]) == serial:
                self._handle = handle
                return
        raise NotReadError(f"amdsmi shows no GPU with the serial number {serial:#x}")

    def sm_clock_mhz(self) -> float:
        """The GFX clock."""
        return self._number("amdsmi_get_clock_info", "clk", self._smi.AmdSmiClkType.GFX)

    def max_sm_clock_mhz(self) -> float:
        """The highest GFX clock."""
        return self._number("amdsmi_get_clock_info", "max_clk", self._smi.AmdSmiClkType.GFX)

    def memory_clock_mhz(self) -> float:
        """The memory clock."""
        return self._number("amdsmi_get_clock_info", "clk", self._smi.AmdSmiClkType.MEM)

    def temperature_c(self) -> float:
        """The hottest spot of the die."""
        value = self._of(
            "amdsmi_get_temp_metric",
            self._smi.AmdSmiTemperatureType.HOTSPOT,
            self._smi.AmdSmiTemperatureMetric.CURRENT,
        )
        return float(value)

    def power_w(self) -> float:
        """Of the socket; older GPUs have the average only."""
        try:
            return self._number("amdsmi_get_power_info", "current_socket_power")
        except NotReadError:
            return self._number("amdsmi_get_power_info", "average_socket_power")

    def power_limit_w(self) -> float:
        """The cap in force."""
        return self._number("amdsmi_get_power_cap_info", "power_cap") / 1e6

    def default_power_limit_w(self) -> float:
        """The cap that the board comes with."""
        return self._number("amdsmi_get_power_cap_info", "default_power_cap") / 1e6

    def throttle_reasons(self) -> list[str]:
        """What amdsmi calls active violations (MI300 and later)."""
        status = self._of("amdsmi_get_violation_status")
        return [name for name, key in _AMD_REASONS.items() if status.get(key) is True]

    def processes(self) -> list[int]:
        """Compute processes."""
        return [int(process["pid"]) for process in self._of("amdsmi_get_gpu_process_list")]

    def throttled_ms(self) -> dict[str, float]:
        """amdsmi's counters have no unit of time."""
        raise NotReadError("amdsmi counts violations, not their time")

    def _number(self, function: str, key: str, *arguments: Any) -> float:
        value = self._of(function, *arguments).get(key, "N/A")
        if not isinstance(value, int | float):
            raise NotReadError(f"amdsmi: {key} is {value}")
        return float(value)

    def _of(self, function: str, *arguments: Any) -> Any:
        return self._ask(function, self._handle, *arguments)

    def _ask(self, function: str, *arguments: Any) -> Any:
        call = getattr(self._smi, function, None)
        if call is None:
            raise NotReadError(f"this amdsmi has no {function}")
        try:
            return call(*arguments)
        except self._smi.AmdSmiException as error:
            raise NotReadError(f"amdsmi: {' '.join(str(error).split())}") from None


class Unreadable:
    """A GPU of which nothing can be read, for one reason."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getattr__(self, name: str) -> Callable[[], Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def refuse() -> Any:
            raise NotReadError(self._reason)

        return refuse


@contextmanager
def _nvidia(gpu: Gpu) -> Iterator[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Unreadable(f"NVML: {error}")
        return
    try:
        yield _made(Nvml, pynvml, gpu)
    finally:
        pynvml.nvmlShutdown()


@contextmanager
def _amd(gpu: Gpu) -> Iterator[Any]:
    try:
        smi = importlib.import_module("amdsmi")
    except (ImportError, OSError) as error:  # the package is there, its library is not
        yield Unreadable(f"amdsmi, which comes with ROCm, cannot be imported: {error}")
        return
    try:
        smi.amdsmi_init()
    except smi.AmdSmiException as error:
        yield Unreadable(f"amdsmi: {' '.join(str(error).split())}")
        return
    try:
        yield _made(AmdSmi, smi, gpu)
    finally:
        smi.amdsmi_shut_down()


def _made(kind: Callable[[ModuleType, str], Any], library: ModuleType, gpu: Gpu) -> Any:
    try:
        return kind(library, gpu.uuid)
    except NotReadError as error:
        return Unreadable(str(error))


def _hexadecimal(text: str) -> int | None:
    try:
        return int(text, 16)
    except ValueError:  # N/A
        return None
