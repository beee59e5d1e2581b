"""What this machine has, found without importing torch and without a GPU context.

The controller must not touch a GPU (a CUDA or HIP context takes memory and disturbs the trial it
measures), so NVIDIA GPUs are read through NVML and AMD GPUs from the kernel's KFD topology in
sysfs, which needs no ROCm installation.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda", "rocm"]

_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_VRAM_HEAPS = ("1", "2")  # KFD heap types: frame buffer public, frame buffer private


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it; `index` counts in the order of the driver."""

    index: int
    uuid: str
    name: str
    vendor: Literal["nvidia", "amd"]
    arch: str
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class TorchBuild:
    """Version of the installed torch and the GPU runtime that it was built for, if any."""

    version: str
    cuda: str | None
    hip: str | None


@dataclass(frozen=True)
class AiterPackage:
    """What `import aiter` would find: AMD's library, or PyPI's unrelated asyncio package."""

    kind: Literal["amd", "unrelated"]
    version: str
    location: str


@dataclass(frozen=True)
class Machine:
    """Hardware and packages that decide which options can run here."""

    gpus: tuple[Gpu, ...]
    torch: TorchBuild | None
    cpu: str
    cores: int
    memory_mib: int

    @cached_property
    def aiter(self) -> AiterPackage | None:
        """The `aiter` package on the import path, without importing it."""
        return find_aiter()

    def gpus_for(self, device: Device) -> tuple[Gpu, ...]:
        """GPUs that `device` can mean."""
        vendor = {"cuda": "nvidia", "rocm": "amd", "cpu": None}[device]
        return tuple(gpu for gpu in self.gpus if gpu.vendor == vendor)

    def gpu(self, device: Device, index: int | None) -> Gpu:
        """GPU number `index` of that kind (None: any); in a trial, which sees one only, that one.

        Raises:
            IndexError: there is none of that kind.
        """
        gpus = self.gpus_for(device)
        return gpus[0] if len(gpus) == 1 else gpus[index or 0]

    def usable_device(self) -> Device:
        """The best device that both the hardware and the installed torch have."""
        if self.torch is not None:
            if self.torch.cuda and self.gpus_for("cuda"):
                return "cuda"
            if self.torch.hip and self.gpus_for("rocm"):
                return "rocm"
        return "cpu"


def probe(hidden: bool = False) -> Machine:
    """Look at this machine. Never imports torch, never creates a GPU context.

    `hidden`: also the GPUs that `*_VISIBLE_DEVICES` keep from this process, numbered by the driver.
    """
    if hidden:
        return _machine((*_nvidia_gpus(), *amd_gpus(_KFD_NODES)))
    visible = _visible_only(_nvidia_gpus(), "CUDA_VISIBLE_DEVICES")
    # ROCr hides GPUs from HIP, which counts what is left from 0 again.
    shown = _visible_only(amd_gpus(_KFD_NODES), "ROCR_VISIBLE_DEVICES")
    renumbered = tuple(replace(gpu, index=index) for index, gpu in enumerate(shown))
    visible += _visible_only(renumbered, "HIP_VISIBLE_DEVICES")
    return _machine(visible)


def _machine(gpus: tuple[Gpu, ...]) -> Machine:
    memory_kib = re.search(r"MemTotal:\s+(\d+)", _read(Path("/proc/meminfo")))
    cpu = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return Machine(
        gpus=gpus,
        torch=_torch_build(),
        cpu=cpu.group(1) if cpu else "unknown",
        cores=len(os.sched_getaffinity(0)),
        memory_mib=int(memory_kib.group(1)) // 1024 if memory_kib else 0,
    )


def find_aiter() -> AiterPackage | None:
    """Tell AMD's aiter from the package of that name on PyPI.

    AMD's has an `ops` folder. It has no `__version__`, and importing it without ROCm raises, so
    the version comes from the distribution `amd-aiter` or the file `_version.py`.
    """
    spec = importlib.util.find_spec("aiter")
    if spec is None or not spec.submodule_search_locations:
        return None
    location = Path(next(iter(spec.submodule_search_locations)))
    if (location / "ops").is_dir():
        return AiterPackage("amd", _amd_aiter_version(location), str(location))
    try:
        version = importlib.metadata.version("aiter")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return AiterPackage("unrelated", version, str(location))


def amd_gpus(nodes: Path) -> tuple[Gpu, ...]:
    """AMD GPUs of a KFD topology folder, in its order (CPU nodes have no SIMD units)."""
    found: list[Gpu] = []
    if not nodes.is_dir():
        return ()
    driver = _read(Path("/sys/module/amdgpu/version")).strip() or "unknown"
    for node in sorted(nodes.iterdir(), key=lambda path: int(path.name)):
        properties = dict(re.findall(r"(\w+) (\d+)", _read(node / "properties")))
        if int(properties.get("simd_count", 0)) == 0:
            continue
        render = Path(f"/sys/class/drm/renderD{properties.get('drm_render_minor', '0')}/device")
        arch = _gfx_name(int(properties["gfx_target_version"]))
        found.append(
            Gpu(
                index=len(found),
                uuid=f"GPU-{int(properties.get('unique_id', 0)):016x}",
                name=_read(render / "product_name").strip() or f"AMD {arch}",
                vendor="amd",
                arch=arch,
                memory_mib=_vram_mib(node),
                driver=driver,
            )
        )
    return tuple(found)


def _nvidia_gpus() -> tuple[Gpu, ...]:
    if importlib.util.find_spec("pynvml") is None:  # nothing but Python here: `doctor` says so
        return ()
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver on this machine
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                Gpu(
                    index=index,
                    uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                    name=str(pynvml.nvmlDeviceGetName(handle)),
                    vendor="nvidia",
                    arch=f"sm{major}{minor}",
                    memory_mib=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) // 2**20,
                    driver=driver,
                )
            )
        return tuple(gpus)
    finally:
        pynvml.nvmlShutdown()


def _visible_only(gpus: tuple[Gpu, ...], variable: str) -> tuple[Gpu, ...]:
    """Keep what the user's `*_VISIBLE_DEVICES` admits, in its order (ordinals or UUIDs)."""
    wanted = os.environ.get(variable)
    if wanted is None:
        return gpus
    chosen = []
    for item in filter(None, (part.strip() for part in wanted.split(","))):
        chosen += [g for g in gpus if str(g.index) == item or g.uuid.startswith(item)]
    return tuple(chosen)


def _torch_build() -> TorchBuild | None:
    """Read `torch/version.py` as text: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = _read(Path(spec.origin).with_name("version.py"))

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
        return match.group(1) if match else None

    version = value("__version__") or importlib.metadata.version("torch")
    return TorchBuild(version, value("cuda"), value("hip"))


def _amd_aiter_version(location: Path) -> str:
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        match = re.search(r"version\s*=\s*['\"]([^'\"]+)", _read(location / "_version.py"))
        return match.group(1) if match else "source tree, version unknown"


def _gfx_name(target: int) -> str:
    """90402 -> gfx942: decimal major, hexadecimal minor and stepping."""
    return f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"


def _vram_mib(node: Path) -> int:
    total = 0
    for bank in sorted((node / "mem_banks").glob("*/properties")):
        properties = dict(re.findall(r"(\w+) (\d+)", _read(bank)))
        if properties.get("heap_type") in _VRAM_HEAPS:
            total += int(properties.get("size_in_bytes", 0))
    return total // 2**20


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there, or not ours to read: the caller has a default
        return ""
