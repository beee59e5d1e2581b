"""What a vendor of devices tells: its GPUs, how to choose one, its state, energy and findings.

A vendor is one module with one `Vendor`, registered in `openpi_opt.vendor`. Standard library only:
`doctor` runs where nothing is installed. What a driver does not answer is unknown and said.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

Status = Literal["ok", "warning", "problem"]
# Bandwidth (GB/s), last-level cache (MiB), dense products (TFLOP/s by number format).
Datasheet = tuple[float, float, dict[str, float]]


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it; `index` counts in the order of the driver.

    `memory_mib` is None where the driver does not tell, as of GPUs that share the host's memory.
    `uuid` names the GPU on this host. It is the driver's, or made from the PCI address. `units` are
    AMD's compute units, None where they are not told.
    """

    index: int
    uuid: str
    name: str
    vendor: str
    arch: str
    memory_mib: int | None
    driver: str
    pci: str = ""
    units: int | None = None


@dataclass(frozen=True)
class TorchBuild:
    """Version of the installed torch and the GPU runtime that it was built for, if any. `more`
    holds runtimes beside CUDA and HIP, by their names in `torch.version`."""

    version: str
    cuda: str | None
    hip: str | None
    more: tuple[tuple[str, str], ...] = ()

    def runtime(self, name: str) -> str | None:
        """Version of one runtime, by its name in `torch.version`; None: not built for it."""
        found: str | None = getattr(self, name, None) or dict(self.more).get(name)
        return found


@dataclass(frozen=True)
class Trouble:
    """Something that a probe was not told: which part, what happened, and what to do. `hides`: a
    GPU that is there or was asked for is missing because of it."""

    name: str
    what: str
    mend: str
    hides: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True)
class Finding:
    """One thing that `doctor` looked at; `mend` says what to do unless it is ok."""

    area: Literal["machine", "drivers", "packages", "environment"]
    name: str
    status: Status
    what: str
    mend: str = ""


@dataclass(frozen=True)
class Host:
    """Where `doctor` looks: `root` is / except in tests."""

    root: Path
    environ: Mapping[str, str]
    gpus: tuple[Gpu, ...] = ()
    torch: TorchBuild | None = None

    def read(self, path: str) -> str | None:
        """Stripped text of a file below the root, None where it cannot be read."""
        return read(self.root / path) or None

    def has_pci_gpu(self, vendor_id: str) -> bool:
        """Whether a PCI device of this vendor is a display controller or an accelerator."""
        for device in sorted(self.root.glob("sys/bus/pci/devices/*")):
            kind = read(device / "class")
            if read(device / "vendor") == vendor_id and kind.startswith(("0x03", "0x12")):
                return True
        return False


class NotReadError(Exception):
    """A value that this driver, GPU or container does not give; the text says why."""


class NoMeterError(Exception):
    """This machine does not tell its energy; the message says why, as the end of a sentence."""


class Meter(Protocol):
    """Something that tells energy. `start` begins, `stop` ends a measurement."""

    method: str
    limit_watt: float | None

    def start(self) -> None:
        """Begin."""

    def stop(self, idle_watt: float) -> tuple[float, float]:
        """Joules and seconds since `start`; `idle_watt` is drawn after the end of the run."""


class Driver(Protocol):
    """One GPU as its vendor's library shows it; each reading raises `NotReadError` or returns.

    Numbers are the methods `sm_clock_mhz` (of the compute units, now), `max_sm_clock_mhz`,
    `memory_clock_mhz`, `temperature_c` (the sensor that throttling goes by), `power_w`,
    `power_limit_w` (in force), `default_power_limit_w` (the board's own) and `joules`.
    """

    def throttle_reasons(self) -> list[str]:
        """What holds the clock down now."""

    def processes(self) -> list[int]:
        """Ids of the processes that compute on this GPU, as the driver numbers them."""

    def throttled_ms(self) -> dict[str, float]:
        """Time since the driver was loaded in which each cause held the clock down."""


class Unreadable:
    """A GPU of which nothing can be read, for one reason."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def refuse() -> Any:
            raise NotReadError(self._reason)

        return refuse


class Vendor(ABC):
    """All that differs between vendors. Subclasses override what they have. `name` stands in
    `Gpu.vendor`, `device` in `platform=`, `label` and `runtime` in messages, `torch_runtime` in
    `torch.version`, `torch_device` in `torch.device`."""

    name: ClassVar[str]
    device: ClassVar[str]
    label: ClassVar[str]
    runtime: ClassVar[str]
    torch_runtime: ClassVar[str]
    torch_device: ClassVar[str]
    is_gpu: ClassVar[bool] = True
    # AMD's library aiter has kernels of its own for it, beside those in Triton.
    has_aiter: ClassVar[bool] = False
    # A replayed graph shows the profiler none of its kernels.
    replay_hides_kernels: ClassVar[bool] = False
    # Variables by which users and schedulers choose GPUs, and of those the ones below which
    # `selection` chooses: they stay as they are.
    visibility: ClassVar[tuple[str, ...]] = ()
    outer_visibility: ClassVar[tuple[str, ...]] = ()
    # Throttle reasons that slow a GPU against its operator's will.
    holding: ClassVar[frozenset[str]] = frozenset()
    datasheets: ClassVar[Mapping[str, Datasheet]] = {}

    def probe(self) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """All GPUs in the driver's order, without a context, and what it did not tell."""
        return (), ()

    def visible(
        self, gpus: tuple[Gpu, ...], environ: Mapping[str, str]
    ) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
        """Those that the variables in `environ` admit, in their order."""
        return gpus, ()

    def selection(self, gpu: Gpu) -> dict[str, str]:
        """Variables that show a process this GPU alone; none where there is nothing to choose."""
        return {}

    @contextmanager
    def state(self, gpu: Gpu) -> Iterator[Any]:
        """A `Driver` of this GPU, `Unreadable` with the reason where there is none."""
        with ExitStack() as stack:
            try:
                driver = self.driver(gpu, stack)
            except NotReadError as error:
                driver = Unreadable(str(error))
            yield driver

    def driver(self, gpu: Gpu, closing: ExitStack) -> Any:
        """The library opened for this GPU; `closing` ends its use. Raises NotReadError."""
        raise NotReadError(f"no driver tells the state of {self.label}")

    @abstractmethod
    def meter(self, gpu: Gpu | None) -> AbstractContextManager[Meter]:
        """The meter of this GPU. Raises NoMeterError: at entry, with the reason."""

    def findings(self, host: Host) -> list[Finding]:
        """What `doctor` says of this vendor's drivers, power limits and processes."""
        return []

    def accelerator(self) -> Any:
        """The module of torch that has this device's events, streams and memory statistics."""
        import torch

        return torch.cuda


@dataclass
class Selected:
    """What a list in a `*_VISIBLE_DEVICES` variable admits, read as the runtimes read it."""

    gpus: list[Gpu] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)


def select(gpus: Iterable[Gpu], variable: str, value: str | None) -> Selected:
    """Read such a list: ordinals or beginnings of UUIDs, up to the first that names no GPU.

    An empty list, and -1 at its beginning, hide all GPUs on purpose. Any other list without a GPU
    is a mistake, which is said. So is an entry that ends the list early.

    Sources: CUDA programming guide, CUDA environment variables ("if one of the indices is invalid,
    only the devices whose index precedes the invalid index are visible"); ROCR-Runtime,
    `RvdFilter::BuildUserDeviceList`, which ends at invalid and repeated entries, too.
    """
    known = list(gpus)
    if value is None:
        return Selected(known)
    found = Selected()
    items = [part.strip() for part in value.split(",")]
    for item in items:
        named = [gpu for gpu in known if _is_named(gpu, item)]
        if len(named) == 1 and named[0] not in found.gpus:
            found.gpus.append(named[0])
            continue
        if item in ("", "-1") and (item == "-1" or len(items) == 1):
            break  # on purpose
        there = ", ".join(str(gpu.index) for gpu in known)
        why = "is named twice" if len(named) == 1 else "names no GPU" if not named else "is unclear"
        found.troubles.append(
            Trouble(
                f"{variable}={value}", f"{item!r} {why} (there is {there}), and ends the list",
                f"name GPUs that exist, each once, or unset {variable}", hides=not found.gpus,
            )
        )  # fmt: skip
        break
    return found


def _is_named(gpu: Gpu, item: str) -> bool:
    if item.isdecimal():
        return gpu.index == int(item)
    return len(item) > len("GPU-") and gpu.uuid.startswith(item)


def read(path: Path) -> str:
    """Stripped text of a file; empty where it is not there or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def version_numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version, for comparing: 2.13.0+cu130 -> (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def millionths(path: Path) -> float | None:
    """A file of the kernel that counts millionths; None where it is not to be read."""
    try:
        return int(path.read_text()) / 1e6
    except (OSError, ValueError):
        return None


def power_finding(name: str, limit: float, usual: float, mend: str) -> Finding:
    """What `doctor` says of a power limit in watts, against the board's default."""
    if limit < usual:
        what = f"{name}: {limit:.0f} W of {usual:.0f} W; figures hold for this limit only"
        return Finding("machine", "power cap", "warning", what, mend)
    return Finding("machine", "power cap", "ok", f"{name}: {limit:.0f} W")


def processes_finding(name: str, pids: Iterable[int]) -> Finding:
    """What `doctor` says of the processes that have a GPU open."""
    others = sorted({*pids} - {os.getpid()})
    if not others:
        return Finding("machine", "other processes", "ok", f"{name}: none")
    listed = ", ".join(map(str, others[:5]))
    what = f"{name}: {len(others)} ({'process' if len(others) == 1 else 'processes'} {listed})"
    mend = "stop them, or choose another GPU with platform.gpu=N"
    return Finding("machine", "other processes", "warning", what, mend)
