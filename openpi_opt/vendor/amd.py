"""AMD GPUs: the kernel's KFD topology and hwmon in sysfs, and `amdsmi`, which comes with ROCm.

**Written against the sources of amdsmi, ROCR-Runtime and the amdgpu driver, tested with fakes of
them. It has not run on AMD hardware.**
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpi_opt.vendor.base import (
    Datasheet,
    Driver,
    Finding,
    Gpu,
    Host,
    NotReadError,
    Trouble,
    Vendor,
    metering,
    millionths,
    read,
    select,
    told,
    version_numbers,
)
from openpi_opt.vendor.meters import Meter

KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
DRM = Path("/sys/class/drm")
_PCI_VENDOR = "0x1002"
# Without its library the binding fails with whatever it meets first (pytorch/pytorch#188724).
_IMPORT_ERRORS = (ImportError, OSError, LookupError, AttributeError, RuntimeError, TypeError)
_VRAM_HEAPS = ("1", "2")  # KFD heap types: frame buffer public, frame buffer private
_REPLAYS_ARE_SEEN = (7, 2, 2)
_REASONS = {
    "power_cap": "active_ppt_pwr",
    "prochot_thermal": "active_prochot_thrm",
    "socket_thermal": "active_socket_thrm",
    "voltage_regulator_thermal": "active_vr_thrm",
    "hbm_thermal": "active_hbm_thrm",
}

# Compute units x clock x operations per clock and unit (CDNA 3 and 4 white papers); gfx950 has
# no TF32. The cache is the Infinity Cache.
_DATASHEETS: dict[str, Datasheet] = {
    "AMD Instinct MI300X": (
        5300,
        256,
        {"float32": 163.4, "tf32": 653.7, "bfloat16": 1307.4, "float16": 1307.4, "fp8": 2614.9},
    ),
    "AMD Instinct MI350X": (
        8000,
        256,
        {"float32": 144.2, "bfloat16": 2306.9, "float16": 2306.9, "fp8": 4613.7},
    ),
    "AMD Instinct MI355X": (
        8000,
        256,
        {"float32": 157.3, "bfloat16": 2516.6, "float16": 2516.6, "fp8": 5033.2},
    ),
}


class Amd(Vendor):
    """AMD: ROCm, KFD, amdsmi."""

    name = "amd"
    device = "rocm"
    label = "AMD"
    runtime = "ROCm"
    torch_runtime = "hip"
    torch_device = "cuda"  # torch's HIP build has that name
    has_aiter = True
    # roctracer before ROCm 7.2.2 sees no kernel of a replayed graph (ROCm/ROCm#6102).
    replay_hides_kernels = True
    visibility = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    outer_visibility = ("ROCR_VISIBLE_DEVICES",)
    holding = frozenset(
        {"prochot_thermal", "socket_thermal", "voltage_regulator_thermal", "hbm_thermal"}
    )
    datasheets = _DATASHEETS
    set_limit = "sudo amd-smi set --power-cap {watts:.0f}"

    def probe(self) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """GPUs of the KFD topology, in its order."""
        return kfd_gpus(KFD_NODES)

    def visible(
        self, gpus: tuple[Gpu, ...], environ: Mapping[str, str]
    ) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """ROCr hides GPUs from HIP, which counts what is left from 0 again. HIP reads
        CUDA_VISIBLE_DEVICES where its own variable is not set (clr, `rocdevice.cpp`)."""
        seen, troubles = select(gpus, "ROCR_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES"))
        shown = tuple(replace(gpu, index=index) for index, gpu in enumerate(seen))
        own = "HIP_VISIBLE_DEVICES"
        own = own if own in environ else "CUDA_VISIBLE_DEVICES"
        seen, more = select(shown, own, environ.get(own) if shown else None)
        return seen, (*troubles, *more)

    def selection(self, gpu: Gpu) -> dict[str, str]:
        """By number: HIP knows no UUIDs."""
        return {"HIP_VISIBLE_DEVICES": str(gpu.index)}

    def driver(self, gpu: Gpu, closing: ExitStack) -> Driver:
        """amdsmi's view of it; where that has none, the kernel's, which tells less."""
        try:
            smi = library()
            closing.callback(smi.amdsmi_shut_down)
            return AmdSmi(smi, gpu)
        except NotReadError as error:
            if (device := drm_device(DRM, gpu)) is None:
                raise
            return Hwmon(device, str(error))

    @contextmanager
    def meter(self, gpu: Gpu | None) -> Iterator[Meter]:
        """As for others; in virtual machines amdsmi tells neither energy nor power."""
        assert gpu is not None
        with self.state(gpu) as driver:
            silent = told(driver.joules) is None and told(driver.power_w) is None
            device = drm_device(DRM, gpu)
            if silent and device is not None and isinstance(driver, AmdSmi):
                driver = Hwmon(device, "amdsmi tells no power")
            yield metering(driver)

    def findings(self, host: Host) -> list[Finding]:
        """Driver, profiler, amdsmi, power limits and processes."""
        found = _kfd_findings(host)
        hip = host.torch.hip if host.torch else None
        if host.gpus and hip and version_numbers(hip) < _REPLAYS_ARE_SEEN:
            needed = ".".join(map(str, _REPLAYS_ARE_SEEN))
            found.append(
                Finding(
                    "drivers", "roctracer", "warning",
                    f"torch is built for ROCm {hip}: before {needed} the profiler loses kernels of "
                    "replayed graphs",
                    "counts are then those of the uncaptured call; install a newer build of torch",
                )
            )  # fmt: skip
        if host.gpus:
            try:
                library().amdsmi_shut_down()
            except NotReadError as error:
                mend = "pip install /opt/rocm/share/amd_smi; trials run without, less is known"
                found.append(Finding("drivers", "amdsmi", "warning", str(error), mend))
        return found + super().findings(host)


def _reading(
    function: str, key: str, clock: str | None = None, unit: float = 1.0
) -> Callable[[AmdSmi], float]:
    """A method that reads `key` of what `function` (of a clock) tells, in 1 / `unit`."""

    def read(self: AmdSmi) -> float:
        arguments = [] if clock is None else [getattr(self._library.AmdSmiClkType, clock)]
        return self._number(function, key, *arguments) / unit

    return read


class AmdSmi(Driver):
    """An AMD GPU. `smi` is the module `amdsmi`, initialised."""

    source = "amdsmi"

    def __init__(self, smi: Any, gpu: Gpu):
        super().__init__("amdsmi counts violations, not their time", smi, smi.AmdSmiException)
        self._handle = self._find(gpu)

    sm_clock_mhz = _reading("amdsmi_get_clock_info", "clk", "GFX")
    max_sm_clock_mhz = _reading("amdsmi_get_clock_info", "max_clk", "GFX")
    memory_clock_mhz = _reading("amdsmi_get_clock_info", "clk", "MEM")
    power_limit_w = _reading("amdsmi_get_power_cap_info", "power_cap", unit=1e6)
    set_limit_w = power_limit_w
    default_power_limit_w = _reading("amdsmi_get_power_cap_info", "default_power_cap", unit=1e6)

    def temperature_c(self) -> float:
        """The hottest spot of the die."""
        kind, metric = self._library.AmdSmiTemperatureType, self._library.AmdSmiTemperatureMetric
        return float(self._of("amdsmi_get_temp_metric", kind.HOTSPOT, metric.CURRENT))

    def power_w(self) -> float:
        """Of the socket; older GPUs have the average only."""
        try:
            return self._number("amdsmi_get_power_info", "current_socket_power")
        except NotReadError:
            return self._number("amdsmi_get_power_info", "average_socket_power")

    def joules(self) -> float:
        """The energy accumulator, which ROCm 6.0 called `power`."""
        told = self._of("amdsmi_get_energy_count")
        try:
            ticks = told["energy_accumulator" if "energy_accumulator" in told else "power"]
            return float(ticks) * float(told["counter_resolution"]) / 1e6
        except (KeyError, TypeError, ValueError) as error:
            raise NotReadError(f"amdsmi: no energy in {told} ({error})") from None

    def throttle_reasons(self) -> list[str]:
        """What amdsmi calls active violations (MI300 and later)."""
        status = self._of("amdsmi_get_violation_status")
        return [name for name, key in _REASONS.items() if status.get(key) is True]

    def processes(self) -> list[int]:
        """Compute processes."""
        return [int(process["pid"]) for process in self._of("amdsmi_get_gpu_process_list")]

    def _find(self, gpu: Gpu) -> Any:
        """The handle of the GPU at this PCI address, or with this serial number (`unique_id`)."""
        for handle in self._ask("amdsmi_get_processor_handles"):
            try:
                place = str(self._ask("amdsmi_get_gpu_device_bdf", handle)).lower()
            except NotReadError:
                place = ""
            if gpu.pci and place:
                if place == gpu.pci:
                    return handle
                continue
            serial = self._ask("amdsmi_get_gpu_asic_info", handle).get("asic_serial", "")
            if _unique_uuid(_hexadecimal(serial)) == gpu.uuid:
                return handle
        raise NotReadError(f"amdsmi shows no GPU that is {gpu.uuid} at {gpu.pci or 'any address'}")

    def _number(self, function: str, key: str, *arguments: Any) -> float:
        value = self._of(function, *arguments).get(key, "N/A")
        if not isinstance(value, int | float):
            raise NotReadError(f"amdsmi: {key} is {value}")
        return float(value)

    def _of(self, function: str, *arguments: Any) -> Any:
        return self._ask(function, self._handle, *arguments)


class Hwmon(Driver):
    """An AMD GPU as the kernel's hwmon shows it, in microwatts; `reason`: why not amdsmi."""

    source = "hwmon"

    def __init__(self, device: Path, reason: str):
        super().__init__(reason)
        self._device = device

    def power_w(self) -> float:
        """Of the board; newer chips tell an instant reading only."""
        return self._first("power1_average", "power1_input")

    def power_limit_w(self) -> float:
        """In force."""
        return self._first("power1_cap")

    def default_power_limit_w(self) -> float:
        """The board's own."""
        return self._first("power1_cap_default")

    set_limit_w = power_limit_w

    def processes(self) -> list[int]:
        """Those of the whole host that compute on AMD's GPUs."""
        queues = KFD_NODES.parents[1] / "proc"
        if not queues.is_dir():
            raise NotReadError(f"there is no {queues}, and {self._reason}")
        return [int(folder.name) for folder in queues.iterdir() if folder.name.isdigit()]

    def _first(self, *names: str) -> float:
        paths = [
            path for name in names for path in sorted(self._device.glob(f"hwmon/hwmon*/{name}"))
        ]
        found = [value for path in paths if (value := millionths(path)) is not None]
        if not found:
            raise NotReadError(f"hwmon has no {' or '.join(names)}, and {self._reason}")
        return found[0]


def library() -> Any:
    """The module `amdsmi`, initialised. Raises NotReadError: it is not installed, lacks its
    library, or refuses."""
    try:
        smi = importlib.import_module("amdsmi")
    except _IMPORT_ERRORS as error:
        raise NotReadError(
            f"amdsmi, which comes with ROCm, cannot be imported: {type(error).__name__}: {error}"
        ) from None
    try:
        smi.amdsmi_init()
    except smi.AmdSmiException as error:
        raise NotReadError(f"amdsmi: {' '.join(str(error).split())}") from None
    return smi


def kfd_gpus(nodes: Path) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
    """AMD GPUs of a KFD topology folder, in its order (CPU nodes have no SIMD units). The driver
    gives consumer GPUs and guests of a hypervisor no `unique_id`, and partitions of one GPU the
    same: those are named by their PCI address, and by their number where that is equal."""
    if not nodes.is_dir():
        return (), ()
    found: list[Gpu] = []
    troubles: list[Trouble] = []
    driver = read(Path("/sys/module/amdgpu/version")) or "unknown"
    numbered = [path for path in nodes.iterdir() if path.name.isdecimal()]
    for node in sorted(numbered, key=lambda path: int(path.name)):
        told = dict(re.findall(r"(\w+) (\d+)", read(node / "properties")))
        if int(told.get("simd_count", 0)) == 0:
            continue  # a CPU, or a GPU that this container may not see
        if "gfx_target_version" not in told:
            mend = "update the amdgpu driver; dmesg says what is wrong with the GPU"
            what = f"{node} does not tell its architecture"
            troubles.append(Trouble(f"AMD GPU {len(found)}", what, mend))
            continue
        render = Path(f"/sys/class/drm/renderD{told.get('drm_render_minor', '0')}/device")
        arch = _gfx_name(int(told["gfx_target_version"]))
        found.append(
            Gpu(
                index=len(found),
                uuid=_unique_uuid(int(told.get("unique_id", 0))) or f"PCI-{_pci(told)}",
                name=read(render / "product_name") or f"AMD {arch}",
                vendor="amd",
                arch=arch,
                memory_mib=_vram_mib(node) or None,
                driver=driver,
                pci=_pci(told),
                units=int(told["simd_count"]) // int(told.get("simd_per_cu", 4)),
            )
        )
    return _told_apart(found), tuple(troubles)


def drm_device(drm: Path, gpu: Gpu) -> Path | None:
    """The PCI device of an AMD GPU in `/sys/class/drm`, by its address or its `unique_id`."""
    for node in sorted(drm.glob("renderD*")):
        device = node / "device"
        serial = _hexadecimal(read(device / "unique_id"))
        if (gpu.pci and device.resolve().name == gpu.pci) or _unique_uuid(serial) == gpu.uuid:
            return device
    return None


def _told_apart(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """The same with names that differ: leases and records are kept by them."""
    for name in (lambda gpu: f"PCI-{gpu.pci}", lambda gpu: f"{gpu.uuid}-{gpu.index}"):
        count = Counter(gpu.uuid for gpu in gpus)
        gpus = [replace(gpu, uuid=name(gpu)) if count[gpu.uuid] > 1 else gpu for gpu in gpus]
    return tuple(gpus)


def _unique_uuid(serial: int | None) -> str:
    return f"GPU-{serial:016x}" if serial else ""


def _pci(told: Mapping[str, str]) -> str:
    """KFD's `location_id` is bus << 8 | device << 3 | function."""
    place = int(told.get("location_id", 0))
    bus, device, function = place >> 8 & 0xFF, place >> 3 & 0x1F, place & 7
    return f"{int(told.get('domain', 0)):04x}:{bus:02x}:{device:02x}.{function:x}" if place else ""


def _gfx_name(target: int) -> str:
    """90402 -> gfx942: decimal major, hexadecimal minor and stepping."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def _vram_mib(node: Path) -> int:
    total = 0
    for bank in sorted((node / "mem_banks").glob("*/properties")):
        properties = dict(re.findall(r"(\w+) (\d+)", read(bank)))
        if properties.get("heap_type") in _VRAM_HEAPS:
            total += int(properties.get("size_in_bytes", 0))
    return total // 2**20


def _kfd_findings(host: Host) -> list[Finding]:
    kfd = host.root / "dev/kfd"
    if host.has_pci_gpu(_PCI_VENDOR) and not kfd.exists() and not host.gpus:
        what = "there is an AMD GPU, but no /dev/kfd"
        mend = "modprobe amdgpu; in a container: --device=/dev/kfd --device=/dev/dri"
        return [Finding("drivers", "amdgpu", "problem", what, mend)]
    if kfd.exists() and not os.access(kfd, os.R_OK | os.W_OK):
        what = "/dev/kfd may not be opened by this user"
        mend = (
            "sudo usermod -aG render,video $USER, then log in again; in a container "
            "--group-add render"
        )
        return [Finding("drivers", "amdgpu", "problem", what, mend)]
    return []


def _hexadecimal(text: Any) -> int | None:
    try:
        return int(str(text), 16)
    except ValueError:  # N/A
        return None
