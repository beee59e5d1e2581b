"""What on this machine would spoil a sweep or its numbers: findings with their mends.

Standard library only, so that it can say what is missing. Nothing is changed, and no GPU context is
created. Sources: AMD's workload tuning guide for MI300X, ROCm/aiter, this project's experiments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from openpi_opt import machine as machines
from openpi_opt.errors import RefusedError
from openpi_opt.kernels.aiter_tables import read_table, shipped, usable
from openpi_opt.machine import Machine
from openpi_opt.paths import conf_dir
from openpi_opt.vendor import BY_NAME, GPU_VENDORS, VENDORS, base
from openpi_opt.vendor.base import Finding, Gpu, Status, Vendor, version_numbers

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
    ("plotly", "plotly", "6"),
    ("jinja2", "jinja2", "3.1"),
    ("pandas", "pandas", "2"),
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

_BUSY = 0.5  # of the cores
# Time and MiB of `make sweep`. CPU: measured, two idle cores of an EPYC, the store alone. GPU: from
# the phases of the trials of experiments/0001-first-sweep (H100) without `compile`; AMD: not known.
_FIRST_SWEEP = {"cpu": ("1 to 3 minutes", 10), "gpu": ("1 to 2 minutes", 500)}


@dataclass(frozen=True)
class Host(base.Host):
    """Where to look, with what the probe found; `root` is / except in tests."""

    machine: Machine = field(default_factory=machines.probe)

    def of(self, vendor: Vendor) -> Host:
        """The same with the GPUs of one vendor."""
        return replace(self, gpus=self.machine.gpus_for(vendor.device), torch=self.machine.torch)

    @property
    def with_aiter(self) -> tuple[Gpu, ...]:
        """GPUs for which AMD's library has kernels."""
        return tuple(gpu for gpu in self.machine.gpus if BY_NAME[gpu.vendor].has_aiter)


def this_host() -> Host:
    """The machine that this runs on."""
    return Host(Path("/"), os.environ)


def audit(host: Host) -> list[Finding]:
    """Everything, in the order in which it is printed."""
    return [
        *_machine(host),
        *_drivers(host),
        *_torch(host),
        *_packages(),
        *_compilers(host),
        *_aiter(host),
        *_numa(host),
        *_governor(host),
        *_load(host),
        *_first_sweep(host),
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
    cores = f"{machine.cores} cores"
    if machine.quota is not None:
        cores += f" of which {machine.quota:g} may be busy (a quota of the container)"
    cpu = Finding("machine", "cpu", "ok", f"{machine.cpu}, {cores}, {memory}, {system}")
    gpus = [
        Finding(
            "machine", f"gpu {gpu.index}", "ok",
            f"{gpu.name} ({gpu.arch}), "
            + (f"{gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib is not None
               else "memory unknown (it may share the host's)") + f", driver {gpu.driver}",
        )
        for gpu in machine.gpus
    ]  # fmt: skip
    troubles = [
        Finding("machine", each.name, "problem" if each.hides else "warning", each.what, each.mend)
        for each in machine.troubles
    ]
    return [python, cpu, *(gpus or ([] if troubles else _no_gpu(host))), *troubles]


def _no_gpu(host: Host) -> list[Finding]:
    hidden = [n for n in host.environ if n.endswith("_VISIBLE_DEVICES")]
    if hidden:
        what = f"none is visible; {', '.join(hidden)} may hide it"
        mend = f"unset {' '.join(hidden)}, or name a GPU that exists"
    else:
        what = "none: sweeps take the small model pi0_mini on the CPU"
        mend = "for figures of the full model run on a machine with an AMD or NVIDIA GPU"
    return [Finding("machine", "gpu", "warning", what, mend)]


def _drivers(host: Host) -> list[Finding]:
    found = []
    for vendor in VENDORS:
        own = host.of(vendor)
        found += vendor.findings(own)
        found += [Finding("drivers", vendor.name, "ok", gpu.driver) for gpu in own.gpus[:1]]
    return found


def _torch(host: Host) -> list[Finding]:
    torch = host.machine.torch
    if torch is None:
        return []  # reported among the packages
    built = [f"{v.runtime} {torch.runtime(v.torch_runtime)}" for v in GPU_VENDORS
             if torch.runtime(v.torch_runtime)]  # fmt: skip
    build = built[0] if built else "CPU"
    for vendor in GPU_VENDORS:
        gpus = host.machine.gpus_for(vendor.device)
        if gpus and not host.machine.built_for(vendor.device):
            what = f"torch {torch.version} is built for {build}: it cannot use {gpus[0].name}"
            mend = f"install a {vendor.runtime} build of torch (pytorch.org); make sweep keeps it"
            return [Finding("packages", "torch build", "problem", what, mend)]
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
        elif version is not None and version_numbers(version) < version_numbers(least):
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
        "pip install --pre amd-aiter (a pre-release; `aiter` is another package), or build it from "
        "github.com/ROCm/aiter, where AITER_USE_SYSTEM_TRITON=1 keeps your Triton"
    )
    if package is None:
        if not host.with_aiter:
            return []
        what = "not installed: attention=aiter and blas=aiter end unavailable"
        return [Finding("packages", "aiter", "warning", what, install)]
    if package.kind == "unrelated":
        what = f"{package.location} ({package.version}) is PyPI's asyncio package, not AMD's"
        status: Status = "problem" if host.with_aiter else "warning"
        return [Finding("packages", "aiter", status, what, f"pip uninstall aiter; {install}")]
    found = [Finding("packages", "aiter", "ok", f"AMD's, {package.version}")]
    return [*found, *_tuned_products(host, Path(package.location))]


def _tuned_products(host: Host, package: Path) -> list[Finding]:
    """Products without a row in the table go to torch's BLAS, with one log line and no error."""
    name, gpu = "aiter tuned GEMM table", next(iter(host.with_aiter), None)
    if gpu is None:
        return []
    named = host.environ.get("AITER_CONFIG_GEMM_BF16", "")
    files = [Path(part) for part in named.split(os.pathsep) if part] or shipped(package)
    try:
        rows = [row for file in files for row in read_table(file)]
    except RefusedError as error:
        mend = "retune, or unset AITER_CONFIG_GEMM_BF16 (a sweep reads blas.aiter.table instead)"
        return [Finding("packages", name, "problem", str(error), mend)]
    own, units = usable(rows, gpu.arch, gpu.units), gpu.units or "an unknown number of"
    if own:
        what = f"{len(own)} of {len(rows)} rows for {gpu.arch} with {units} compute units"
        return [Finding("packages", name, "ok", what)]
    others = Counter(f"{row['gfx']} with {row['cu_num']}" for row in rows)
    listed = ", ".join(f"{count} for {which}" for which, count in others.most_common(4)) or "empty"
    what = f"no rows for {gpu.arch} with {units} compute units ({listed})"
    mend = (
        "python -m openpi_opt.tune gemm writes the shapes for aiter's tuner and says how to run "
        "it; or take blas=tunableop_tune"
    )
    return [Finding("packages", name, "warning", what, mend)]


def _machine_item(name: str, bad: bool, what: str, mend: str) -> list[Finding]:
    return [Finding("machine", name, *(("warning", what, mend) if bad else ("ok", what)))]


def _numa(host: Host) -> list[Finding]:
    value = host.read("proc/sys/kernel/numa_balancing")
    if value is None:
        return []
    on = f"on ({value}): pages move while being used, which costs time and adds scatter"
    mend = "sudo sysctl kernel.numa_balancing=0"
    return _machine_item("NUMA balancing", value != "0", on if value != "0" else "off", mend)


def _governor(host: Host) -> list[Finding]:
    files = host.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    found = {host.read(file.relative_to(host.root).as_posix()) for file in files}
    slow = sorted(name for name in found if name and name != "performance")
    said = f"{', '.join(slow)}: launches from the host take longer, and vary"
    mend = "sudo cpupower frequency-set -g performance"
    what = said if slow else "performance"
    return _machine_item("CPU governor", bool(slow), what, mend) if found else []


def _load(host: Host) -> list[Finding]:
    """Who else computes on this host: a trial on the CPU measures them, too."""
    words = (host.read("proc/loadavg") or "").split()
    if not words:
        return []
    load, cores = float(words[0]), host.machine.cores
    what = f"{load:g} processes on {cores} cores over the last minute"
    mend = "wait for them to end: launches and trials on the CPU take longer, and scatter"
    return _machine_item("load", load > max(1.0, _BUSY * cores), what, mend)


def _first_sweep(host: Host) -> list[Finding]:
    """What `make sweep` (two trials and the baseline) takes, against the disk that is free here."""
    machine = host.machine
    devices = [vendor.device for vendor in GPU_VENDORS if machine.gpus_for(vendor.device)]
    device = next(filter(machine.built_for, devices), "cpu")
    minutes, needed = _FIRST_SWEEP["gpu" if device != "cpu" else "cpu"]
    free = shutil.disk_usage(Path.cwd()).free / 2**20
    what = f"about {minutes} on {device}, up to {needed} MiB of disk; {free:.0f} MiB are free here"
    mend = "make room, or give another folder: store=DIR (caches of compilers lie in it, too)"
    return _machine_item("first sweep", free <= 2 * needed, what, mend)


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


def _matches(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
