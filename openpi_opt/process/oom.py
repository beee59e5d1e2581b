"""How often the kernel's out-of-memory killer struck."""

from __future__ import annotations

from pathlib import Path

_VMSTAT = Path("/proc/vmstat")
_CGROUP_FILES = ("memory.events", "memory.oom_control")


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer struck: on this host and in our cgroup."""
    files = [_VMSTAT, *_cgroup_files()]
    return sum(_counter(path) for path in files)


def _cgroup_files() -> list[Path]:
    found = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            folder = root / path.lstrip("/")
            found += [(folder if folder.is_dir() else root) / name for name in _CGROUP_FILES]
    return found


def _counter(path: Path) -> int:
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if name == "oom_kill":
            return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # another kernel, or a cgroup that is not ours to read
        return ""
