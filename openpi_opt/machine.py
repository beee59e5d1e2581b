"""What this machine has, found without importing torch and without a GPU context.

The controller must not touch a GPU (a context takes memory and disturbs the trial it measures), so
each vendor's module asks its driver. What is not told is unknown, and stands in `troubles`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from openpi_opt.errors import UserError
from openpi_opt.vendor import BY_DEVICE, GPU_VENDORS, cpu
from openpi_opt.vendor.base import Gpu, TorchBuild, Trouble, read

# ROCm and nightly builds of torch bring Triton under names of their own.
TRITON = ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm")
Device = str
"""One of `vendor.DEVICES`."""


@dataclass(frozen=True)
class AiterPackage:
    """What `import aiter` would find: AMD's library, or PyPI's unrelated asyncio package."""

    kind: Literal["amd", "unrelated"]
    version: str
    location: str


@dataclass(frozen=True)
class Machine:
    """Hardware and packages that decide which options can run here. `cores` may be used by this
    process; `quota` is how many of them its container may keep busy."""

    gpus: tuple[Gpu, ...]
    torch: TorchBuild | None
    cpu: str
    cores: int
    memory_mib: int
    quota: float | None = None
    troubles: tuple[Trouble, ...] = ()

    @cached_property
    def aiter(self) -> AiterPackage | None:
        """The `aiter` package on the import path, without importing it."""
        return find_aiter()

    def threads(self, cores: int) -> int:
        """How many threads go with a share of the cores: as many, unless a quota admits fewer."""
        if self.quota is None:
            return cores
        return max(1, min(cores, int(self.quota * cores / self.cores)))

    def gpus_for(self, device: Device) -> tuple[Gpu, ...]:
        """GPUs that `device` can mean."""
        return tuple(gpu for gpu in self.gpus if gpu.vendor == BY_DEVICE[device].name)

    def gpu(self, device: Device, index: int | None) -> Gpu:
        """GPU number `index` of that kind (None: any); in a trial, which sees one only, that one.
        Raises IndexError: there is none of that kind."""
        gpus = self.gpus_for(device)
        return gpus[0] if len(gpus) == 1 else gpus[index or 0]

    def built_for(self, device: Device) -> bool:
        """Whether the installed torch was built for that kind of device."""
        vendor = BY_DEVICE[device]
        runtime = self.torch.runtime(vendor.torch_runtime) if self.torch else None
        return not vendor.is_gpu or bool(runtime)

    def usable_device(self) -> Device:
        """The best device that both the hardware and the installed torch have. Raises UserError:
        none, though a GPU is there or was asked for: the CPU is not taken quietly."""
        for vendor in GPU_VENDORS:
            if self.gpus_for(vendor.device) and self.built_for(vendor.device):
                return vendor.device
        hidden = [trouble for trouble in self.troubles if trouble.hides]
        if hidden and not self.gpus:
            mend = hidden[0].mend[0].upper() + hidden[0].mend[1:]
            raise UserError(
                f"no GPU can be used: {hidden[0]}.\n{mend}; or say platform=cpu to run on the CPU."
            )
        return "cpu"


def probe(hidden: bool = False) -> Machine:
    """Look at this machine. Never imports torch, never creates a GPU context. `hidden`: also the
    GPUs that `*_VISIBLE_DEVICES` keep from this process, numbered by the driver."""
    gpus: list[Gpu] = []
    troubles: list[Trouble] = []
    for vendor in GPU_VENDORS:
        found, said = vendor.probe()
        if found and not hidden:
            found, chosen = vendor.visible(found, os.environ)
            # Beside a choice that holds, a GPU that does not answer concerns nobody.
            outside = found and not chosen and _is_chosen(vendor.visibility)
            said = () if outside else (*chosen, *said)
        gpus += found
        troubles += said
    return Machine(
        gpus=tuple(gpus),
        torch=torch_build(),
        cpu=cpu.model(),
        cores=len(os.sched_getaffinity(0)),
        memory_mib=cpu.memory_mib(),
        quota=cpu.quota(),
        troubles=tuple(troubles),
    )


def _is_chosen(variables: tuple[str, ...]) -> bool:
    return any(name in os.environ for name in variables)


def find_aiter() -> AiterPackage | None:
    """Tell AMD's aiter from the package of that name on PyPI. AMD's has an `ops` folder. It has no
    `__version__`, and importing it without ROCm raises, so the version comes from the distribution
    `amd-aiter` or the file `_version.py`."""
    spec = importlib.util.find_spec("aiter")
    if spec is None or not spec.submodule_search_locations:
        return None
    location = Path(next(iter(spec.submodule_search_locations)))
    if (location / "ops").is_dir():
        said = re.search(r"version\s*=\s*['\"]([^'\"]+)", read(location / "_version.py"))
        version = said[1] if said else "source tree, version unknown"
        return AiterPackage("amd", installed("amd-aiter") or version, str(location))
    return AiterPackage("unrelated", installed("aiter") or "unknown", str(location))


def installed(*distributions: str) -> str | None:
    """Version of the first of these distributions that is installed; None: none is."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def torch_build() -> TorchBuild | None:
    """Read `torch/version.py` as text: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = read(Path(spec.origin).with_name("version.py"))

    def value(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*'([^']+)'", text, re.MULTILINE)
        return match.group(1) if match else None

    version = value("__version__") or importlib.metadata.version("torch")
    others = [v.torch_runtime for v in GPU_VENDORS if v.torch_runtime not in ("cuda", "hip")]
    more = tuple((name, found) for name in others if (found := value(name)))
    return TorchBuild(version, value("cuda"), value("hip"), more)
