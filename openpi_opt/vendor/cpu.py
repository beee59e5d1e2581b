"""The CPU as a device: what the kernel tells of it, its energy, and what a container may use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openpi_opt.vendor.base import Gpu, NoMeterError, Vendor, millionths, read
from openpi_opt.vendor.meters import CounterMeter, Meter

POWERCAP = Path("/sys/class/powercap")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


class Cpu(Vendor):
    """The host's processor."""

    name = "cpu"
    device = "cpu"
    label = "CPU"
    runtime = "CPU"
    torch_runtime = ""
    torch_device = "cpu"
    is_gpu = False

    @contextmanager
    def meter(self, gpu: Gpu | None) -> Iterator[Meter]:
        """All packages, by RAPL."""
        yield rapl_meter(POWERCAP)

    def accelerator(self) -> Any:
        """None: there is nothing to wait for."""
        return None


def model() -> str:
    """The processor's name, or unknown."""
    found = re.search(r"model name\s*:\s*(.+)", read(Path("/proc/cpuinfo")))
    return found.group(1) if found else "unknown"


def memory_mib() -> int:
    """The host's memory; 0 where it is not told."""
    found = re.search(r"MemTotal:\s+(\d+)", read(Path("/proc/meminfo")))
    return int(found.group(1)) // 1024 if found else 0


def own_cgroups(
    controller: str, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP
) -> Iterator[tuple[Path, Path]]:
    """Root and group of this process, of each version of control groups that has the controller.

    In a container the group may be outside of what is mounted.
    """
    for line in read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = cgroups / controller if controllers else cgroups
            yield root, root / path.lstrip("/")


def quota(cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> float | None:
    """Cores' worth of time that this process's control groups admit; None: no limit, or not told.
    The least of the process's own group and those above it (Linux, cgroup-v2.rst, `cpu.max`;
    version 1: `cpu.cfs_quota_us`)."""
    limits = []
    for root, group in own_cgroups("cpu", cgroups, own):
        folders = [root, *(f for f in (group, *group.parents) if root in f.parents or f == root)]
        limits += [limit for folder in folders if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    words = read(folder / "cpu.max").split()
    if not words:
        words = [read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")]
    try:
        allowed, period = map(int, words)
    except ValueError:  # max, or no such file
        return None
    return allowed / period if allowed > 0 and period > 0 else None


def rapl_meter(folder: Path) -> CounterMeter:
    """All CPU packages of a powercap folder, `/sys/class/powercap`. Raises NoMeterError: there are
    none, or only root may read them."""
    zones = [
        zone
        for zone in sorted(folder.glob("intel-rapl:*"))  # AMD's packages, too, have this name
        if re.fullmatch(r"intel-rapl:\d+", zone.name) and read(zone / "name").startswith("package")
    ]
    if not zones:
        raise NoMeterError(f"this machine has no RAPL counters of its CPU in {folder}")
    try:
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        counters = [
            _Unwrapped(zone / "energy_uj", top) for zone, top in zip(zones, ranges, strict=True)
        ]
        for counter in counters:
            counter.read()
    except OSError as error:
        raise NoMeterError(
            f"{error.filename} cannot be read ({error.strerror}); root can, or give read permission"
        ) from error
    limits = [millionths(zone / "constraint_0_power_limit_uw") for zone in zones]
    known = [limit for limit in limits if limit is not None]
    limit = sum(known) if len(known) == len(limits) else None
    return CounterMeter("rapl", lambda: sum(c.read() for c in counters), limit)


class _Unwrapped:
    """A counter in microjoules that begins again at 0 after `top`, as joules that only grow."""

    def __init__(self, path: Path, top: int) -> None:
        self._path, self._top = path, top
        self._last = self._turns = 0

    def read(self) -> float:
        """Joules. To be called at least once a turn, which takes minutes."""
        now = int(self._path.read_text())
        self._turns += now < self._last
        self._last = now
        return (self._turns * self._top + now) / 1e6
