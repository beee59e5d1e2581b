"""NVIDIA GPUs, through NVML (package nvidia-ml-py, module `pynvml`), without a CUDA context."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from openpi_opt.vendor.base import (
    Datasheet,
    Driver,
    Finding,
    Gpu,
    Host,
    NotReadError,
    Trouble,
    Vendor,
    select,
)

T = TypeVar("T")
_PCI_VENDOR = "0x10de"
_VARIABLE = "CUDA_VISIBLE_DEVICES"
_INSTALL = "make test or make sweep installs it into .venv; by hand: pip install -e ."
_LOST = "look at nvidia-smi and dmesg; a lost GPU needs a reset or a reboot"
_NO_DRIVER = ("NVML_ERROR_LIBRARY_NOT_FOUND", "NVML_ERROR_DRIVER_NOT_LOADED")
_REASONS = {
    "sw_power_cap": "nvmlClocksEventReasonSwPowerCap",
    "hw_slowdown": "nvmlClocksEventReasonHwSlowdown",
    "hw_thermal_slowdown": "nvmlClocksEventReasonHwThermalSlowdown",
    "hw_power_brake_slowdown": "nvmlClocksEventReasonHwPowerBrakeSlowdown",
    "sw_thermal_slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "sync_boost": "nvmlClocksEventReasonSyncBoost",
}
_HOPPER = {"float32": 66.9, "tf32": 494.7, "bfloat16": 989.4, "float16": 989.4, "fp8": 1978.9}
_H100_PCIE = {"float32": 51.2, "tf32": 378, "bfloat16": 756, "float16": 756, "fp8": 1513}

_DATASHEETS: dict[str, Datasheet] = {
    "NVIDIA H100 80GB HBM3": (3350, 50, _HOPPER),
    "NVIDIA H100 PCIe": (2039, 50, _H100_PCIE),
    "NVIDIA H200": (4800, 50, _HOPPER),
}


class Nvidia(Vendor):
    """NVIDIA: CUDA, NVML."""

    name = "nvidia"
    device = "cuda"
    label = "NVIDIA"
    runtime = "CUDA"
    torch_runtime = "cuda"
    torch_device = "cuda"
    visibility = (_VARIABLE,)
    # A software power cap is how large GPUs run under full load; what it costs shows in the clock.
    holding = frozenset(
        {"hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown"}
    )
    datasheets = _DATASHEETS
    set_limit = "sudo nvidia-smi -i {index} -pl {watts:.0f}"

    def probe(self) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """GPUs in NVML's order; of a GPU in MIG mode its instances instead, which CUDA sees."""
        nvml = library()
        if nvml is None:  # nothing but Python here: `doctor` says so
            return (), ()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            absent = [getattr(nvml, name, None) for name in _NO_DRIVER]
            if getattr(error, "value", None) in absent:  # no NVIDIA driver on this machine
                return (), ()
            return (), (Trouble("NVML", f"cannot be used: {error}", _LOST),)
        try:
            return _all(nvml)
        finally:
            nvml.nvmlShutdown()

    def visible(
        self, gpus: tuple[Gpu, ...], environ: Mapping[str, str]
    ) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """What CUDA_VISIBLE_DEVICES admits."""
        return select(gpus, _VARIABLE, environ.get(_VARIABLE))

    def selection(self, gpu: Gpu) -> dict[str, str]:
        """By UUID; by number, in the order of the PCI bus, where the driver tells no UUID."""
        if gpu.uuid.startswith("PCI-"):
            return {_VARIABLE: str(gpu.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return {_VARIABLE: gpu.uuid}

    def driver(self, gpu: Gpu, closing: ExitStack) -> Nvml:
        """NVML's view of it."""
        nvml = library()
        if nvml is None:
            raise NotReadError("nvidia-ml-py is not installed")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NotReadError(f"NVML: {error}") from None
        closing.callback(nvml.nvmlShutdown)
        return Nvml(nvml, gpu)

    def findings(self, host: Host) -> list[Finding]:
        """Driver, power limit and processes of each GPU."""
        found: list[Finding] = []
        hidden = any(name.endswith("_VISIBLE_DEVICES") for name in host.environ)
        if host.has_pci_gpu(_PCI_VENDOR) and not host.gpus and not hidden:
            missing = library() is None
            why = (
                "nvidia-ml-py, which asks its driver, is not installed"
                if missing
                else "its driver is not loaded or does not fit NVML"
            )
            mend = _INSTALL if missing else "nvidia-smi must work; after an update reboot"
            what = f"there is an NVIDIA GPU, but {why}"
            found.append(Finding("drivers", "nvidia", "problem", what, mend))
        return found + super().findings(host)


def _reading(
    function: str, constant: str | None = None, unit: float = 1.0
) -> Callable[[Nvml], float]:
    """A method that asks NVML's `function` (of `constant`), which counts in 1 / `unit`."""

    def read(self: Nvml) -> float:
        arguments = [] if constant is None else [getattr(self._library, constant)]
        return float(self._of(function, *arguments)) / unit

    return read


class Nvml(Driver):
    """An NVIDIA GPU. `nvml` is the module `pynvml`, initialised."""

    source = "NVML"

    def __init__(self, nvml: Any, gpu: Gpu):
        super().__init__("NVML does not tell it", nvml, nvml.NVMLError)
        if gpu.uuid.startswith("PCI-"):
            self._handle = self._ask("nvmlDeviceGetHandleByPciBusId", gpu.pci.encode())
        else:
            self._handle = self._ask("nvmlDeviceGetHandleByUUID", gpu.uuid)

    sm_clock_mhz = _reading("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM")
    max_sm_clock_mhz = _reading("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM")
    memory_clock_mhz = _reading("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM")
    temperature_c = _reading("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU")
    power_w = _reading("nvmlDeviceGetPowerUsage", unit=1e3)  # averaged over up to a second
    power_limit_w = _reading("nvmlDeviceGetEnforcedPowerLimit", unit=1e3)  # the least of all
    set_limit_w = _reading("nvmlDeviceGetPowerManagementLimit", unit=1e3)  # the operator's
    default_power_limit_w = _reading("nvmlDeviceGetPowerManagementDefaultLimit", unit=1e3)
    joules = _reading("nvmlDeviceGetTotalEnergyConsumption", unit=1e3)  # since Volta

    def throttle_reasons(self) -> list[str]:
        """The bits that are set; an idle GPU and clocks chosen by the user are no throttling."""
        bits = int(self._of("nvmlDeviceGetCurrentClocksEventReasons"))
        return [name for name, bit in _REASONS.items() if bits & getattr(self._library, bit)]

    def processes(self) -> list[int]:
        """Compute processes."""
        return [int(process.pid) for process in self._of("nvmlDeviceGetComputeRunningProcesses")]

    def throttled_ms(self) -> dict[str, float]:
        """NVML's violation times, in ns since the driver was loaded."""
        policies = {
            "thermal": self._library.NVML_PERF_POLICY_THERMAL,
            "power": self._library.NVML_PERF_POLICY_POWER,
        }
        return {
            name: int(self._of("nvmlDeviceGetViolationStatus", policy).violationTime) / 1e6
            for name, policy in policies.items()
        }

    def _of(self, function: str, *arguments: Any) -> Any:
        return self._ask(function, self._handle, *arguments)


def library() -> Any:
    """The module `pynvml`; None where it is not installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


def _all(nvml: Any) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
    gpus: list[Gpu] = []
    troubles: list[Trouble] = []
    driver = _told(nvml, nvml.nvmlSystemGetDriverVersion, "unknown")
    for index in range(_told(nvml, nvml.nvmlDeviceGetCount, 0)):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            gpus += _instances(nvml, handle, index, driver) or [
                _gpu(nvml, handle, handle, index, driver)
            ]
        except nvml.NVMLError as error:
            troubles.append(Trouble(f"NVIDIA GPU {index}", f"does not answer: {error}", _LOST))
    return tuple(gpus), tuple(troubles)


def _gpu(nvml: Any, handle: Any, parent: Any, index: int, driver: str) -> Gpu:
    """A GPU, or an instance of one, whose architecture only the whole tells. Raises NVMLError: its
    architecture is not told, without which no option can be judged."""
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(parent)
    pci = str(_told(nvml, lambda: _text(nvml.nvmlDeviceGetPciInfo(parent).busId), f"#{index}"))
    memory = _told(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total) // 2**20, None)
    return Gpu(
        index=index,
        uuid=_text(_told(nvml, lambda: nvml.nvmlDeviceGetUUID(handle), "")) or f"PCI-{pci}",
        name=_text(_told(nvml, lambda: nvml.nvmlDeviceGetName(handle), f"NVIDIA sm{major}{minor}")),
        vendor="nvidia",
        arch=f"sm{major}{minor}",
        memory_mib=memory,
        driver=str(driver),
        pci=pci,
    )


def _instances(nvml: Any, handle: Any, index: int, driver: str) -> list[Gpu]:
    """Instances of a GPU in MIG mode, empty where it is not in that mode. CUDA shows instances
    instead of the GPU then (NVIDIA MIG user guide, "CUDA visible devices")."""
    if _told(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle)[0], 0) != 1:
        return []
    found = []
    for number in range(_told(nvml, lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle), 0)):
        ask = partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        instance = _told(nvml, ask, None)
        if instance is not None:  # profiles may leave gaps
            found.append(_gpu(nvml, instance, handle, index, driver))
    return found


def _told(nvml: Any, ask: Callable[[], T], otherwise: T) -> T:
    """An answer, or `otherwise` where this GPU, driver or container does not give it."""
    try:
        return ask()
    except (nvml.NVMLError, AttributeError):  # AttributeError: a pynvml older than the function
        return otherwise


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
