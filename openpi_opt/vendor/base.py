"""What a vendor of devices tells: its GPUs, how to choose one, its state, energy and findings.

A vendor is one module with one `Vendor`, registered in `openpi_opt.vendor`. Standard library only:
`doctor` runs where nothing is installed. What a driver does not answer is unknown and said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from openpi_opt.vendor.meters import CounterMeter, Meter, SampleMeter

T = TypeVar("T")
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


class Driver:
    """One GPU as its vendor's `library` shows it; this one tells nothing, for one `reason`.

    Readings are methods. Those that a subclass lacks raise NotReadError, as others may.
    `sm_clock_mhz` (of the compute units, now), `max_sm_clock_mhz`, `memory_clock_mhz`,
    `temperature_c` (the sensor that throttling goes by), `power_w`, `power_limit_w` (in force),
    `set_limit_w` (the operator's), `default_power_limit_w` (the board's own) and `joules` are
    numbers; `throttle_reasons` is what holds the clock down now, `throttled_ms` the time since the
    driver was loaded in which each cause did, `processes` the ids of those that compute there.
    """

    # In messages, and in the method of a meter.
    source: ClassVar[str] = ""

    def __init__(self, reason: str, library: Any = None, error: type[Exception] = OSError):
        self._reason, self._library, self._error = reason, library, error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def refuse() -> Any:
            raise NotReadError(self._reason)

        return refuse

    def _ask(self, function: str, *arguments: Any) -> Any:
        """What a function of the library says. Raises NotReadError: it is absent, or refuses."""
        call = getattr(self._library, function, None)
        if call is None:
            raise NotReadError(f"this {self._library.__name__} has no {function}")
        try:
            return call(*arguments)
        except self._error as error:
            raise NotReadError(f"{self.source}: {' '.join(str(error).split())}") from None


def told(ask: Callable[[], T]) -> T | None:
    """A reading, or None where it is not told."""
    try:
        return ask()
    except NotReadError:
        return None


class Vendor:
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
    # The command that sets the power limit of GPU `index` to `watts`.
    set_limit: ClassVar[str] = ""

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
    def state(self, gpu: Gpu) -> Iterator[Driver]:
        """The driver of this GPU; where there is none, one that says the reason."""
        with ExitStack() as stack:
            try:
                driver = self.driver(gpu, stack)
            except NotReadError as error:
                driver = Driver(str(error))
            yield driver

    def driver(self, gpu: Gpu, closing: ExitStack) -> Driver:
        """The library opened for this GPU; `closing` ends its use. Raises NotReadError."""
        raise NotReadError(f"no driver tells the state of {self.label}")

    @contextmanager
    def meter(self, gpu: Gpu | None) -> Iterator[Meter]:
        """The meter of this GPU: its counter of energy, or else its power, sampled.

        Raises NoMeterError: at entry, with the reason.
        """
        assert gpu is not None
        with self.state(gpu) as driver:
            yield metering(driver)

    def findings(self, host: Host) -> list[Finding]:
        """What `doctor` says of this vendor's drivers, power limits and processes."""
        found = []
        for gpu in host.gpus:
            with self.state(gpu) as driver:
                readings = driver.set_limit_w, driver.default_power_limit_w, driver.processes
                limit, usual, pids = map(told, readings)
            if limit is not None and usual is not None:
                mend = self.set_limit.format(index=gpu.index, watts=usual)
                found.append(_power_finding(f"gpu {gpu.index}", limit, usual, mend))
            if pids is not None:
                found.append(_processes_finding(f"gpu {gpu.index}", pids))
        return found

    def accelerator(self) -> Any:
        """The module of torch that has this device's events, streams and memory statistics."""
        import torch

        return torch.cuda


def select(
    gpus: Iterable[Gpu], variable: str, value: str | None
) -> tuple[tuple[Gpu, ...], tuple[Trouble, ...]]:
    """What a list in a `*_VISIBLE_DEVICES` variable admits, and what is wrong with it.

    It is read as the runtimes read it: ordinals or beginnings of UUIDs, up to the first that names
    no GPU. An empty list, and -1 at its beginning, hide all GPUs on purpose. Any other list without
    a GPU is a mistake, which is said. So is an entry that ends the list early.

    Sources: CUDA programming guide, CUDA environment variables ("if one of the indices is invalid,
    only the devices whose index precedes the invalid index are visible"); ROCR-Runtime,
    `RvdFilter::BuildUserDeviceList`, which ends at invalid and repeated entries, too.
    """
    known = tuple(gpus)
    if value is None:
        return known, ()
    found: tuple[Gpu, ...] = ()
    items = [part.strip() for part in value.split(",")]
    for item in items:
        named = [gpu for gpu in known if _is_named(gpu, item)]
        if len(named) == 1 and named[0] not in found:
            found += (named[0],)
            continue
        if item in ("", "-1") and (item == "-1" or len(items) == 1):
            break  # on purpose
        there = ", ".join(str(gpu.index) for gpu in known)
        why = "is named twice" if len(named) == 1 else "names no GPU" if not named else "is unclear"
        what = f"{item!r} {why} (there is {there}), and ends the list"
        mend = f"name GPUs that exist, each once, or unset {variable}"
        return found, (Trouble(f"{variable}={value}", what, mend, hides=not found),)
    return found, ()


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


def _power_finding(name: str, limit: float, usual: float, mend: str) -> Finding:
    """What `doctor` says of a power limit in watts, against the board's default."""
    if limit < usual:
        what = f"{name}: {limit:.0f} W of {usual:.0f} W; figures hold for this limit only"
        return Finding("machine", "power cap", "warning", what, mend)
    return Finding("machine", "power cap", "ok", f"{name}: {limit:.0f} W")


def _processes_finding(name: str, pids: Iterable[int]) -> Finding:
    """What `doctor` says of the processes that have a GPU open."""
    others = sorted({*pids} - {os.getpid()})
    if not others:
        return Finding("machine", "other processes", "ok", f"{name}: none")
    listed = ", ".join(map(str, others[:5]))
    what = f"{name}: {len(others)} ({'process' if len(others) == 1 else 'processes'} {listed})"
    mend = "stop them, or choose another GPU with platform.gpu=N"
    return Finding("machine", "other processes", "warning", what, mend)


def metering(driver: Driver) -> Meter:
    """The meter of a GPU: its counter of energy, or else its power, sampled.

    Raises NoMeterError: it tells neither; with the reason.
    """
    limit = told(driver.power_limit_w)
    if told(driver.joules) is not None:
        return CounterMeter(f"{driver.source.lower()}_counter", _metered(driver.joules), limit)
    read = _metered(driver.power_w)
    read()
    return SampleMeter(f"{driver.source.lower()}_samples", read, limit)


def _metered(read: Callable[[], float]) -> Callable[[], float]:
    """A reading of a meter, which has no energy without it."""

    def metered() -> float:
        try:
            return read()
        except NotReadError as error:
            raise NoMeterError(str(error)) from error

    return metered
