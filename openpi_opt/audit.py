"""What on this machine would spoil a sweep or its numbers: findings with their mends.

Standard library only, so that it can say what is missing where everything is. Nothing is changed,
no GPU context is created, and no package but NVML's is imported.

Sources: AMD's workload tuning guide for MI300X (NUMA balancing, debugging variables), ROCm/aiter
(tables of tuned products), this project's experiments.
"""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

from openpi_opt import machine as machines
from openpi_opt.machine import Gpu, Machine
from openpi_opt.paths import conf_dir

Status = Literal["ok", "warning", "problem"]

PYTHONS = ((3, 10), (3, 14))
"""From, and below."""
REQUIRED = (
    # distribution, module, at least
    ("torch", "torch", "2.9"),
    ("triton", "triton", "3.5"),
    ("hydra-core", "hydra", "1.3.2"),
    ("omegaconf", "omegaconf", "2.3"),
    ("optuna", "optuna", "5"),
    ("mlflow", "mlflow", "3.10"),
    ("pydantic", "pydantic", "2.7"),
    ("rich", "rich", "13.7"),
    ("filelock", "filelock", "3.30"),
    ("matplotlib", "matplotlib", "3.9"),
    ("safetensors", "safetensors", "0.4.5"),
    ("numpy", "numpy", "1.26"),
    ("scipy", "scipy", "1.11"),
    ("nvidia-ml-py", "pynvml", "12.560"),
)
# ROCm and nightly builds of torch bring Triton under names of their own.
_OTHER_NAMES = {"triton": ("pytorch-triton-rocm", "pytorch-triton", "triton-rocm")}
_INSTALL = "make test or make sweep installs it into .venv; by hand: pip install -e ."
_SWEEP_CLEARS = "a sweep keeps it from its trials, other processes see it"

_SLOW = "serialises launches; nothing timed under it is worth knowing"
_LOGS = "writes logs or dumps while being timed"
_TUNES = "chooses or tunes kernels behind the configuration's back"
# Name or prefix (ending in *), value that is harmless, why it is not.
HAZARDS: tuple[tuple[str, str, str], ...] = (
    ("TORCHINDUCTOR_MAX_AUTOTUNE*", "0", "AMD's containers set it: compiling takes 15 minutes "
     "instead of 2, and other kernels run than compile=default means"),
    ("TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "0", _TUNES),
    ("TORCHINDUCTOR_FREEZING", "0", "weights become constants in whatever compiles"),
    ("TORCHINDUCTOR_CPP_WRAPPER", "0", _TUNES),
    ("TORCHDYNAMO_DISABLE", "0", "nothing is compiled, without a word"),
    ("TORCH_COMPILE_DISABLE", "0", "nothing is compiled, without a word"),
    ("TORCH_COMPILE_DEBUG", "0", _LOGS),
    ("PYTORCH_TUNABLEOP_ENABLED", "0", _TUNES),
    ("PYTORCH_TUNABLEOP_TUNING", "0", "matrix products are tuned while being timed"),
    ("AITER_TUNE_GEMM", "0", "each product is written to a file inside aiter while being timed"),
    ("AITER_LOG_MORE", "0", _LOGS),
    ("AMD_LOG_LEVEL", "0", _LOGS),
    ("TRITON_INTERPRET", "0", "Triton kernels run in Python"),
    ("HIP_LAUNCH_BLOCKING", "0", _SLOW),
    ("CUDA_LAUNCH_BLOCKING", "0", _SLOW),
    ("AMD_SERIALIZE_KERNEL", "0", _SLOW),
    ("AMD_SERIALIZE_COPY", "0", _SLOW),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "0", "each allocation goes to the driver"),
    ("NVIDIA_TF32_OVERRIDE", "", "TF32 is forced on or off whatever precision.tf32 says"),
)  # fmt: skip
# The same setting under several names, or settings that exclude one another.
CONTRADICTIONS: tuple[tuple[str, str, str], ...] = (
    ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "two names of one setting"),
    ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "two names of one setting"),
    ("TORCH_BLAS_PREFER_HIPBLASLT", "DISABLE_ADDMM_CUDA_LT", "one prefers the library that the "
     "other switches off"),
    ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "HIP reads both"),
)  # fmt: skip
_REPLAYS_ARE_SEEN = "7.2.2"
_CU_OF_GFX = {"256": "gfx950", "304": "gfx942", "80": "gfx942"}
_NVIDIA, _AMD = "0x10de", "0x1002"
_GPU_CLASSES = ("0x03", "0x12")  # display controller, processing accelerator


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` says what to do unless it is ok."""

    area: Literal["machine", "drivers", "packages", "environment"]
    name: str
    status: Status
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Host:
    """Where to look: `root` is / except in tests."""

    machine: Machine
    environ: Mapping[str, str]
    root: Path = Path("/")
    nvml: ModuleType | None = None
    early: tuple[Finding, ...] = field(default=())

    def read(self, path: str) -> str | None:
        """Stripped text of a file below the root, None where it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def has_vendor(self, vendor: str) -> bool:
        """Whether a PCI device of this vendor is a GPU."""
        for device in sorted(self.root.glob("sys/bus/pci/devices/*")):
            path = device.relative_to(self.root).as_posix()
            kind = self.read(f"{path}/class") or ""
            if self.read(f"{path}/vendor") == vendor and kind.startswith(_GPU_CLASSES):
                return True
        return False

    @property
    def amd(self) -> tuple[Gpu, ...]:
        """AMD GPUs that are visible."""
        return self.machine.gpus_for("rocm")

    @property
    def nvidia(self) -> tuple[Gpu, ...]:
        """NVIDIA GPUs that are visible."""
        return self.machine.gpus_for("cuda")


def this_host() -> Host:
    """The machine that this runs on."""
    nvml = importlib.import_module("pynvml") if importlib.util.find_spec("pynvml") else None
    errors = (nvml.NVMLError,) if nvml else ()
    try:
        return Host(machines.probe(), os.environ, nvml=nvml)
    except errors as error:
        found = Finding(
            "drivers", "NVML", "problem", f"a GPU does not answer: {error}",
            "look at nvidia-smi and dmesg; a lost GPU needs a reset or a reboot",
        )  # fmt: skip
        return Host(Machine((), None, "unknown", 0, 0), os.environ, early=(found,))


def audit(host: Host) -> list[Finding]:
    """Everything, in the order in which it is printed."""
    return [
        *_machine(host),
        *host.early,
        *_drivers(host),
        *_torch(host),
        *_packages(),
        *_compilers(host),
        *_aiter(host),
        *_numa(host),
        *_governor(host),
        *_power(host),
        *_processes(host),
        *_environment(host.environ),
    ]


def _machine(host: Host) -> list[Finding]:
    machine = host.machine
    low, high = PYTHONS
    version = platform.python_version()
    python = Finding("machine", "python", "ok", f"{version}, {sys.executable}")
    if not low <= sys.version_info[:2] < high:
        wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        python = Finding(
            "machine", "python", "problem", f"{version} is not among {wanted}",
            f"make sweep PYTHON=python{low[0]}.{high[1] - 2}",
        )  # fmt: skip
    memory = f"{machine.memory_mib / 1024:.0f} GiB of memory"
    system = f"{platform.system()} {platform.release()}"
    cpu = Finding(
        "machine", "cpu", "ok", f"{machine.cpu}, {machine.cores} cores, {memory}, {system}"
    )
    gpus = [
        Finding(
            "machine", f"gpu {gpu.index}", "ok",
            f"{gpu.name} ({gpu.arch}), {gpu.memory_mib / 1024:.0f} GiB, driver {gpu.driver}",
        )
        for gpu in machine.gpus
    ]  # fmt: skip
    return [python, cpu, *(gpus or _no_gpu(host))]


def _no_gpu(host: Host) -> list[Finding]:
    hidden = [n for n in host.environ if n.endswith("_VISIBLE_DEVICES")]
    if hidden and (host.has_vendor(_NVIDIA) or host.has_vendor(_AMD)):
        return [
            Finding(
                "machine", "gpu", "warning", f"none is visible; {', '.join(hidden)} may hide it",
                f"unset {' '.join(hidden)}, or name a GPU that exists",
            )
        ]  # fmt: skip
    return [
        Finding(
            "machine", "gpu", "warning", "none: sweeps take the small model pi0_mini on the CPU",
            "for figures of the full model run on a machine with an AMD or NVIDIA GPU",
        )
    ]  # fmt: skip


def _drivers(host: Host) -> list[Finding]:
    found = []
    hidden = any(name.endswith("_VISIBLE_DEVICES") for name in host.environ)
    if host.has_vendor(_NVIDIA) and not host.nvidia and not hidden:
        reason = "its driver is not loaded or does not fit NVML"
        if host.nvml is None:
            reason = "nvidia-ml-py, which asks its driver, is not installed"
        found.append(
            Finding(
                "drivers", "nvidia", "problem", f"there is an NVIDIA GPU, but {reason}",
                "nvidia-smi must work; after an update of the driver reboot" if host.nvml
                else _INSTALL,
            )
        )  # fmt: skip
    kfd = host.root / "dev/kfd"
    if host.has_vendor(_AMD) and not kfd.exists() and not host.amd:
        found.append(
            Finding(
                "drivers", "amdgpu", "problem", "there is an AMD GPU, but no /dev/kfd",
                "modprobe amdgpu; in a container: --device=/dev/kfd --device=/dev/dri",
            )
        )  # fmt: skip
    elif kfd.exists() and not os.access(kfd, os.R_OK | os.W_OK):
        found.append(
            Finding(
                "drivers", "amdgpu", "problem", "/dev/kfd may not be opened by this user",
                "sudo usermod -aG render,video $USER, then log in again; in a container "
                "--group-add render",
            )
        )  # fmt: skip
    names = {gpu.vendor: gpu.driver for gpu in host.machine.gpus}
    found += [Finding("drivers", vendor, "ok", driver) for vendor, driver in names.items()]
    torch = host.machine.torch
    if host.amd and torch and torch.hip and _numbers(torch.hip) < _numbers(_REPLAYS_ARE_SEEN):
        found.append(
            Finding(
                "drivers", "roctracer", "warning",
                f"torch is built for ROCm {torch.hip}: before {_REPLAYS_ARE_SEEN} the profiler "
                "loses kernels of replayed graphs",
                "counts are then those of the uncaptured call; install a newer build of torch",
            )
        )  # fmt: skip
    return found


def _torch(host: Host) -> list[Finding]:
    torch = host.machine.torch
    if torch is None:
        return []  # reported among the packages
    build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "CPU"
    for gpus, runtime, wanted in ((host.nvidia, torch.cuda, "CUDA"), (host.amd, torch.hip, "ROCm")):
        if gpus and not runtime:
            return [
                Finding(
                    "packages", "torch build", "problem",
                    f"torch {torch.version} is built for {build}: it cannot use {gpus[0].name}",
                    f"install a {wanted} build of torch (pytorch.org), then make sweep keeps it",
                )
            ]  # fmt: skip
    return [Finding("packages", "torch build", "ok", f"{torch.version}, for {build}")]


def _packages() -> list[Finding]:
    found = []
    if not conf_dir().is_dir():
        found.append(
            Finding(
                "packages", "conf", "problem", f"no folder {conf_dir()}: there are no options",
                "use a whole checkout, or an installed wheel",
            )
        )  # fmt: skip
    for distribution, module, least in REQUIRED:
        if distribution == "triton" and (platform.system(), platform.machine()) != (
            "Linux", "x86_64",
        ):  # fmt: skip
            continue
        version = _version(distribution, *_OTHER_NAMES.get(distribution, ()))
        if importlib.util.find_spec(module) is None:
            found.append(Finding("packages", distribution, "problem", "not installed", _INSTALL))
        elif version is not None and _numbers(version) < _numbers(least):
            what = f"{version} is older than {least}"
            found.append(Finding("packages", distribution, "problem", what, _INSTALL))
        else:
            found.append(Finding("packages", distribution, "ok", version or "version unknown"))
    return found


def _compilers(host: Host) -> list[Finding]:
    """Triton builds its launcher with a C compiler, Inductor its CPU loops with a C++ one."""
    found = []
    for name, candidates, needed in (
        ("C compiler", (host.environ.get("CC", ""), "gcc", "clang", "cc"), bool(host.machine.gpus)),
        ("C++ compiler", (host.environ.get("CXX", ""), "g++", "clang++", "c++"), False),
    ):
        path = next((p for c in candidates if c and (p := shutil.which(c))), None)
        if path:
            found.append(Finding("packages", name, "ok", path))
        else:
            what = "none: " + (
                "Triton cannot launch a kernel" if needed else "compile fails on the CPU"
            )
            mend = "apt install build-essential, or what your distribution calls it"
            status: Status = "problem" if needed else "warning"
            found.append(Finding("packages", name, status, what, mend))
    return found


def _aiter(host: Host) -> list[Finding]:
    package = host.machine.aiter
    install = (
        "AMD's is not on PyPI: build it from github.com/ROCm/aiter (distribution amd-aiter), "
        "AITER_USE_SYSTEM_TRITON=1 keeps your Triton"
    )
    if package is None:
        if not host.amd:
            return []
        what = "not installed: attention=aiter and blas=aiter end unavailable"
        return [Finding("packages", "aiter", "warning", what, install)]
    if package.kind == "unrelated":
        what = f"{package.location} ({package.version}) is PyPI's asyncio package, not AMD's"
        status: Status = "problem" if host.amd else "warning"
        return [Finding("packages", "aiter", status, what, f"pip uninstall aiter; {install}")]
    found = [Finding("packages", "aiter", "ok", f"AMD's, {package.version}")]
    return [*found, *_tuned_products(host, Path(package.location))]


def _tuned_products(host: Host, package: Path) -> list[Finding]:
    """Products without a row in the table go to torch's BLAS, with one log line and no error."""
    name, variable = "aiter tuned GEMM table", "AITER_CONFIG_GEMM_BF16"
    if not host.amd:
        return []
    arch = host.amd[0].arch
    named = host.environ.get(variable)
    if named:
        files = [Path(part) for part in named.split(os.pathsep) if part]
    else:
        configs = package / "configs"
        files = [configs / "bf16_tuned_gemm.csv"]
        files += sorted((configs / "model_configs").glob("*bf16_tuned_gemm*.csv"))
    rows: Counter[str] = Counter()
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                table = csv.DictReader(lines)
                if len(files) == 1 and "gfx" not in (table.fieldnames or ["gfx"]):
                    what = f"{file} has no column gfx: aiter raises KeyError at the first product"
                    mend = f"add the column (gfx of this GPU: {arch}), or retune"
                    return [Finding("packages", name, "problem", what, mend)]
                for row in table:
                    gfx = row.get("gfx") or _CU_OF_GFX.get(row.get("cu_num") or "", "unknown")
                    rows[gfx] += 1
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            if named:
                what = f"{file}, named by {variable}, cannot be read: {error}"
                mend = f"correct or unset {variable}"
                return [Finding("packages", name, "problem", what, mend)]
    if rows[arch]:
        return [Finding("packages", name, "ok", f"{rows[arch]} rows for {arch}")]
    others = ", ".join(f"{count} for {gfx}" for gfx, count in sorted(rows.items()) if count)
    what = f"no rows for {arch} ({others or 'empty'}): each product falls back to torch's BLAS"
    mend = (
        "tune the shapes with aiter's csrc/gemm_a16w16/gemm_a16w16_tune.py and give the table to "
        "blas=aiter, or take blas=tunableop_tune"
    )
    return [Finding("packages", name, "warning", what, mend)]


def _numa(host: Host) -> list[Finding]:
    value = host.read("proc/sys/kernel/numa_balancing")
    if value is None:
        return []
    if value == "0":
        return [Finding("machine", "NUMA balancing", "ok", "off")]
    what = f"on ({value}): pages move while being used, which costs time and adds scatter"
    mend = "sudo sysctl kernel.numa_balancing=0"
    return [Finding("machine", "NUMA balancing", "warning", what, mend)]


def _governor(host: Host) -> list[Finding]:
    governors = Counter(
        host.read(file.relative_to(host.root).as_posix())
        for file in host.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    )
    slow = [name for name in governors if name and name != "performance"]
    if not governors:
        return []
    if not slow:
        return [Finding("machine", "CPU governor", "ok", "performance")]
    what = f"{', '.join(sorted(slow))}: launches from the host take longer, and vary"
    mend = "sudo cpupower frequency-set -g performance"
    return [Finding("machine", "CPU governor", "warning", what, mend)]


def _power(host: Host) -> list[Finding]:
    """Power limits in watts against the default of the same board."""
    limits: list[tuple[str, float, float, str]] = []
    for index, handle in _handles(host):
        nvml = host.nvml
        assert nvml is not None
        try:
            limit = nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
            usual = nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3
        except nvml.NVMLError:  # not every board tells
            continue
        limits.append((f"gpu {index}", limit, usual, f"sudo nvidia-smi -i {index} -pl {usual:.0f}"))
    for cap in sorted(host.root.glob("sys/class/drm/renderD*/device/hwmon/hwmon*/power1_cap")):
        path = cap.relative_to(host.root).as_posix()
        limit_uw, usual_uw = host.read(path), host.read(f"{path}_default")
        vendor = host.read(f"{path.split('/hwmon/')[0]}/vendor")
        if vendor == _AMD and (limit_uw or "").isdigit() and (usual_uw or "").isdigit():
            name = path.split("/")[3]
            limit, usual = int(limit_uw or 0) / 1e6, int(usual_uw or 0) / 1e6
            limits.append((name, limit, usual, f"sudo amd-smi set --power-cap {usual:.0f}"))
    found = []
    for name, limit, usual, mend in limits:
        if limit < usual:
            what = f"{name}: {limit:.0f} W of {usual:.0f} W; figures hold for this limit only"
            found.append(Finding("machine", "power cap", "warning", what, mend))
        else:
            found.append(Finding("machine", "power cap", "ok", f"{name}: {limit:.0f} W"))
    return found


def _processes(host: Host) -> list[Finding]:
    """Other processes that have a GPU open."""
    users: dict[str, set[int]] = {}
    for index, handle in _handles(host):
        nvml = host.nvml
        assert nvml is not None
        try:
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except nvml.NVMLError:  # not permitted, as in some containers
            continue
        users[f"gpu {index}"] = {process.pid for process in running} - {os.getpid()}
    if host.amd:
        queues = host.root.glob("sys/class/kfd/kfd/proc/*")
        pids = {int(folder.name) for folder in queues if folder.name.isdigit()}
        users["AMD GPUs"] = pids - {os.getpid()}
    found = []
    for name, pids in users.items():
        if pids:
            listed = ", ".join(str(pid) for pid in sorted(pids)[:5])
            what = f"{name}: {len(pids)} ({'process' if len(pids) == 1 else 'processes'} {listed})"
            mend = "stop them, or choose another GPU with platform.gpu=N"
            found.append(Finding("machine", "other processes", "warning", what, mend))
        else:
            found.append(Finding("machine", "other processes", "ok", f"{name}: none"))
    return found


def _environment(environ: Mapping[str, str]) -> list[Finding]:
    found = []
    for pattern, harmless, why in HAZARDS:
        for name in sorted(environ):
            value = environ[name].strip()
            if _matches(name, pattern) and value not in ("", harmless):
                what = f"set to {value}: {why} ({_SWEEP_CLEARS})"
                found.append(Finding("environment", name, "warning", what, f"unset {name}"))
    for one, other, why in CONTRADICTIONS:
        if environ.get(one) and environ.get(other) and environ[one] != environ[other]:
            what = f"{one}={environ[one]} and {other}={environ[other]}: {why}"
            mend = f"unset {one} or {other}"
            found.append(Finding("environment", f"{one}, {other}", "warning", what, mend))
    return found or [
        Finding("environment", "variables", "ok", "none that changes what is measured")
    ]


def _handles(host: Host) -> list[tuple[int, object]]:
    """NVML's handles of the visible NVIDIA GPUs; NVML stays initialised, which costs nothing."""
    if host.nvml is None or not host.nvidia:
        return []
    host.nvml.nvmlInit()
    return [(gpu.index, host.nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)) for gpu in host.nvidia]


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparing: 2.13.0+cu130 -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
