"""Look this machine over: `python -m openpi_opt.doctor`.

Machine, drivers, packages, and what would spoil a sweep or its numbers, each with ok, warning or
problem and the mend. Standard library only, so that it can say what is missing. Nothing is changed,
and no GPU context is created.

Sources: AMD's workload tuning guide for MI300X, ROCm/aiter, this project's experiments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from openpi_opt import machine as machines
from openpi_opt.cli import run
from openpi_opt.errors import RefusedError
from openpi_opt.kernels.aiter_tables import read_table, shipped, usable
from openpi_opt.machine import TRITON, Machine, installed
from openpi_opt.paths import conf_dir, package_dir
from openpi_opt.vendor import BY_NAME, GPU_VENDORS, VENDORS, base
from openpi_opt.vendor.base import Finding, Gpu, Status, Vendor, version_numbers
from openpi_opt.verbs import verb_parser

PROBLEM = 1
_WIDTH = 100
_INDENT = " " * 11
PYTHONS = ((3, 10), (3, 14))
"""From, and below."""
_INSTALL = "make test or make sweep installs it into .venv; by hand: pip install -e ."
_INSTALL_AITER = (
    "pip install --pre amd-aiter (a pre-release; `aiter` is another package), or build it from "
    "github.com/ROCm/aiter, where AITER_USE_SYSTEM_TRITON=1 keeps your Triton"
)
_SWEEP_CLEARS = "a sweep keeps it from its trials, other processes see it"
_TABLE = "aiter tuned GEMM table"

# Why a variable is not harmless: names, or beginnings with a *. Empty or 0 is, but for TF32's 0.
HAZARDS = {
    "AMD's containers set it: compiling takes 15 minutes instead of 2, and other kernels run than "
    "compile=default means": ("TORCHINDUCTOR_MAX_AUTOTUNE*",),
    "chooses or tunes kernels behind the configuration's back": (
        "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING",
        "TORCHINDUCTOR_CPP_WRAPPER",
        "PYTORCH_TUNABLEOP_ENABLED",
    ),
    "weights become constants in whatever compiles": ("TORCHINDUCTOR_FREEZING",),
    "nothing is compiled, without a word": ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"),
    "writes logs or dumps while being timed": (
        "TORCH_COMPILE_DEBUG",
        "AITER_LOG_MORE",
        "AMD_LOG_LEVEL",
    ),
    "matrix products are tuned while being timed": ("PYTORCH_TUNABLEOP_TUNING",),
    "each product is written to a file inside aiter while being timed": ("AITER_TUNE_GEMM",),
    "Triton kernels run in Python": ("TRITON_INTERPRET",),
    "serialises launches; nothing timed under it is worth knowing": (
        "HIP_LAUNCH_BLOCKING",
        "CUDA_LAUNCH_BLOCKING",
        "AMD_SERIALIZE_KERNEL",
        "AMD_SERIALIZE_COPY",
    ),
    "each allocation goes to the driver": ("PYTORCH_NO_CUDA_MEMORY_CACHING",),
    "TF32 is forced on or off whatever precision.tf32 says": ("NVIDIA_TF32_OVERRIDE",),
}
# The same setting under several names, or settings that exclude one another.
_CONTRADICTIONS = (
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


def audit(host: Host) -> Iterator[Finding]:
    """Everything, in the order in which it is printed."""
    yield from _machine(host)
    for vendor in VENDORS:
        own = host.of(vendor)
        yield from vendor.findings(own)
        yield from (Finding("drivers", vendor.name, "ok", gpu.driver) for gpu in own.gpus[:1])
    yield from _torch(host)
    yield from _packages()
    yield from _compilers(host)
    yield from _aiter(host)
    yield from _surroundings(host)
    yield from _environment(host.environ)


def _machine(host: Host) -> Iterator[Finding]:
    machine, (low, high) = host.machine, PYTHONS
    what, mend = f"{platform.python_version()}, {sys.executable}", ""
    if not low <= sys.version_info[:2] < high:
        wanted = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
        what = f"{platform.python_version()} is not among {wanted}"
        mend = f"make sweep PYTHON=python{low[0]}.{high[1] - 2}"
    yield Finding("machine", "python", "problem" if mend else "ok", what, mend)
    cores = f"{machine.cores} cores"
    if machine.quota is not None:
        cores += f" of which {machine.quota:g} may be busy (a quota of the container)"
    memory = f"{machine.memory_mib / 1024:.0f} GiB of memory"
    system = f"{platform.system()} {platform.release()}"
    yield Finding("machine", "cpu", "ok", f"{machine.cpu}, {cores}, {memory}, {system}")
    for gpu in machine.gpus:
        memory = "memory unknown (it may share the host's)"
        if gpu.memory_mib is not None:
            memory = f"{gpu.memory_mib / 1024:.0f} GiB"
        what = f"{gpu.name} ({gpu.arch}), {memory}, driver {gpu.driver}"
        yield Finding("machine", f"gpu {gpu.index}", "ok", what)
    for each in machine.troubles:
        status: Status = "problem" if each.hides else "warning"
        yield Finding("machine", each.name, status, each.what, each.mend)
    if not (machine.gpus or machine.troubles):
        what = "none: sweeps take the small model pi0_mini on the CPU"
        mend = "for figures of the full model run on a machine with an AMD or NVIDIA GPU"
        hidden = [name for name in host.environ if name.endswith("_VISIBLE_DEVICES")]
        if hidden:
            what = f"none is visible; {', '.join(hidden)} may hide it"
            mend = f"unset {' '.join(hidden)}, or name a GPU that exists"
        yield Finding("machine", "gpu", "warning", what, mend)


def _torch(host: Host) -> Iterator[Finding]:
    torch = host.machine.torch
    if torch is None:
        return  # reported among the packages
    runtimes = [(vendor.runtime, torch.runtime(vendor.torch_runtime)) for vendor in GPU_VENDORS]
    build = next((f"{name} {version}" for name, version in runtimes if version), "CPU")
    what, mend = f"{torch.version}, for {build}", ""
    for vendor in GPU_VENDORS:
        gpus = host.machine.gpus_for(vendor.device)
        if gpus and not host.machine.built_for(vendor.device):
            what = f"torch {torch.version} is built for {build}: it cannot use {gpus[0].name}"
            mend = f"install a {vendor.runtime} build of torch (pytorch.org); make sweep keeps it"
            break
    yield Finding("packages", "torch build", "problem" if mend else "ok", what, mend)


def required() -> dict[str, str]:
    """Distributions that this package needs, with their least versions, as it declares them."""
    try:
        text = (package_dir().parent / "pyproject.toml").read_text(encoding="utf-8")
        text = text.partition('name = "openpi_opt"')[2].partition("\ndependencies = [")[2]
        text = text.partition("\n]")[0]
    except OSError:  # not a checkout
        declared = importlib.metadata.requires("openpi_opt") or []
        text = "\n".join(line for line in declared if "extra ==" not in line)
    return dict(re.findall(r"^\W*([\w-]+)[^;\n]*?>=([\d.]+)", text, re.MULTILINE))


def _packages() -> Iterator[Finding]:
    if not conf_dir().is_dir():
        what = f"no folder {conf_dir()}: there are no options"
        mend = "use a whole checkout, or an installed wheel"
        yield Finding("packages", "conf", "problem", what, mend)
    has_triton = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    for name, least in required().items():
        found = installed(*(TRITON if name == "triton" else (name,)))
        if name == "triton" and not has_triton:
            continue
        if found is None:
            yield Finding("packages", name, "problem", "not installed", _INSTALL)
        elif version_numbers(found) < version_numbers(least):
            what = f"{found} is older than {least}"
            yield Finding("packages", name, "problem", what, _INSTALL)
        else:
            yield Finding("packages", name, "ok", found)


def _compilers(host: Host) -> Iterator[Finding]:
    """Triton builds its launcher with a C compiler, Inductor its CPU loops with a C++ one."""
    needs: Status = "problem" if host.machine.gpus else "warning"
    without = "Triton cannot launch a kernel" if host.machine.gpus else "compile fails on the CPU"
    for name, candidates, status, so in (
        ("C compiler", (host.environ.get("CC", ""), "gcc", "clang", "cc"), needs, without),
        ("C++ compiler", (host.environ.get("CXX", ""), "g++", "clang++", "c++"), "warning",
         "compile fails on the CPU"),
    ):  # fmt: skip
        path = next(filter(None, map(shutil.which, candidates)), None)
        if path:
            yield Finding("packages", name, "ok", path)
        else:
            mend = "apt install build-essential, or what your distribution calls it"
            yield Finding("packages", name, status, f"none: {so}", mend)


def _aiter(host: Host) -> Iterator[Finding]:
    package = host.machine.aiter
    if package is None:
        if host.with_aiter:
            what = "not installed: attention=aiter and blas=aiter end unavailable"
            yield Finding("packages", "aiter", "warning", what, _INSTALL_AITER)
    elif package.kind == "unrelated":
        what = f"{package.location} ({package.version}) is PyPI's asyncio package, not AMD's"
        status: Status = "problem" if host.with_aiter else "warning"
        mend = f"pip uninstall aiter; {_INSTALL_AITER}"
        yield Finding("packages", "aiter", status, what, mend)
    else:
        yield Finding("packages", "aiter", "ok", f"AMD's, {package.version}")
        for gpu in host.with_aiter[:1]:
            yield _tuned_products(host, Path(package.location), gpu)


def _tuned_products(host: Host, package: Path, gpu: Gpu) -> Finding:
    """Products without a row in the table go to torch's BLAS, with one log line and no error."""
    named = host.environ.get("AITER_CONFIG_GEMM_BF16", "")
    files = [Path(part) for part in named.split(os.pathsep) if part] or shipped(package)
    try:
        rows = [row for file in files for row in read_table(file)]
    except RefusedError as error:
        mend = "retune, or unset AITER_CONFIG_GEMM_BF16 (a sweep reads blas.aiter.table instead)"
        return Finding("packages", _TABLE, "problem", str(error), mend)
    own, units = usable(rows, gpu.arch, gpu.units), gpu.units or "an unknown number of"
    if own:
        what = f"{len(own)} of {len(rows)} rows for {gpu.arch} with {units} compute units"
        return Finding("packages", _TABLE, "ok", what)
    others = Counter(f"{row['gfx']} with {row['cu_num']}" for row in rows)
    listed = ", ".join(f"{count} for {which}" for which, count in others.most_common(4)) or "empty"
    what = f"no rows for {gpu.arch} with {units} compute units ({listed})"
    mend = (
        "python -m openpi_opt.tune gemm writes the shapes for aiter's tuner and says how to run "
        "it; or take blas=tunableop_tune"
    )
    return Finding("packages", _TABLE, "warning", what, mend)


def _surroundings(host: Host) -> Iterator[Finding]:
    """What else slows trials down: the kernel's settings, who else computes here, a full disk."""

    def item(name: str, good: str, bad: str, mend: str) -> Finding:
        return Finding("machine", name, *(("warning", bad, mend) if bad else ("ok", good)))

    value = host.read("proc/sys/kernel/numa_balancing")
    if value is not None:
        on = f"on ({value}): pages move while being used, which costs time and adds scatter"
        mend = "sudo sysctl kernel.numa_balancing=0"
        yield item("NUMA balancing", "off", on if value != "0" else "", mend)
    files = host.root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    governors = {base.read(file) for file in files}
    if slow := ", ".join(sorted(governors - {"performance", ""})):
        slow += ": launches from the host take longer, and vary"
    if governors:
        mend = "sudo cpupower frequency-set -g performance"
        yield item("CPU governor", "performance", slow, mend)
    machine = host.machine
    if words := (host.read("proc/loadavg") or "").split():
        what = f"{float(words[0]):g} processes on {machine.cores} cores over the last minute"
        busy = float(words[0]) > max(1.0, _BUSY * machine.cores)
        mend = "wait for them to end: launches and trials on the CPU take longer, and scatter"
        yield item("load", what, what if busy else "", mend)
    devices = [vendor.device for vendor in GPU_VENDORS if machine.gpus_for(vendor.device)]
    device = next(filter(machine.built_for, devices), "cpu")
    minutes, needed = _FIRST_SWEEP["gpu" if device != "cpu" else "cpu"]
    free = shutil.disk_usage(Path.cwd()).free / 2**20
    what = f"about {minutes} on {device}, up to {needed} MiB of disk; {free:.0f} MiB are free here"
    mend = "make room, or give another folder: store=DIR (caches of compilers lie in it, too)"
    yield item("first sweep", what, what if free <= 2 * needed else "", mend)


def _environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    patterns = [(pattern, why) for why, names in HAZARDS.items() for pattern in names]
    none = True
    for name, given in sorted(environ.items()):
        value = given.strip()
        harmless = value == "" or (value == "0" and name != "NVIDIA_TF32_OVERRIDE")
        why = next((why for pattern, why in patterns if fnmatchcase(name, pattern)), None)
        if why is not None and not harmless:
            none = False
            what = (
                f"set to {value}: {why} (a sweep keeps it from its trials, other processes see it)"
            )
            yield Finding("environment", name, "warning", what, f"unset {name}")
    for one, other, why in _CONTRADICTIONS:
        if environ.get(one) and environ.get(other) and environ[one] != environ[other]:
            none = False
            what = f"{one}={environ[one]} and {other}={environ[other]}: {why}"
            mend = f"unset {one} or {other}"
            yield Finding("environment", f"{one}, {other}", "warning", what, mend)
    if none:
        yield Finding("environment", "variables", "ok", "none that changes what is measured")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings on stdout; 1 when one is a problem, else 0."""
    arguments = _parser().parse_args(argv)
    findings = list(audit(this_host()))
    count = Counter(finding.status for finding in findings)
    if arguments.json:
        document = {
            "problems": count["problem"],
            "warnings": count["warning"],
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(document, indent=1))
    else:
        print(report(findings))
    return PROBLEM if count["problem"] else 0


def report(findings: Sequence[Finding]) -> str:
    """The findings by area, and how many are not ok."""
    lines: list[str] = []
    for area in dict.fromkeys(finding.area for finding in findings):
        lines.append(area)
        for each in (finding for finding in findings if finding.area == area):
            said = f"{each.status:<8} {each.name}: {each.what}"
            lines += textwrap.wrap(said, _WIDTH, initial_indent="  ", subsequent_indent=_INDENT)
            if each.mend:
                lines += textwrap.wrap(
                    f"mend: {each.mend}", _WIDTH, initial_indent=_INDENT,
                    subsequent_indent=_INDENT + "      ",
                )  # fmt: skip
    count = Counter(finding.status for finding in findings)
    numbers = [f"{count[s]} {s}{'' if count[s] == 1 else 's'}" for s in ("problem", "warning")]
    return "\n".join([*lines, ", ".join(numbers)])


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "doctor",
        description="Machine, drivers, packages, and what would spoil a sweep, with the mends. "
        "Exit code 1 on a problem.",
    )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON document")
    return parser


if __name__ == "__main__":
    run(main)
