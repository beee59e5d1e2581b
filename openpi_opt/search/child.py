"""One child process under watch: its phases, its time limits, and the end of its whole group."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Between SIGTERM and SIGKILL; a trial has nothing to save.
GRACE_SECONDS = 2.0
# A process inside a driver call cannot be killed; the sweep goes on without it after this.
UNKILLABLE_SECONDS = 30.0
_POLL_SECONDS = 0.1  # only where the kernel has no pidfd
_LONGEST_LINE = 65_536
_VMSTAT = Path("/proc/vmstat")
_CGROUP_FILES = ("memory.events", "memory.oom_control")


@dataclass(frozen=True)
class Ended:
    """How a child ended, as seen from outside.

    `returncode` is negative for a signal and None for a process that could not be killed.
    `exceeded` is the limit in seconds that the last phase ran past, if it was ended for that.
    """

    returncode: int | None
    phase: str
    phase_seconds: dict[str, float]
    exceeded: float | None
    oom_killed: bool


def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    limits: Mapping[str, float],
    log: Path,
    on_phase: Callable[[str], None],
) -> Ended:
    """Run `argv --progress-fd N` in a group of its own and leave none of the group behind.

    The child writes `{"phase": NAME}` lines to the descriptor; `limits` holds the seconds of each
    phase, beginning with `start`. Standard output and error go to `log`.

    Raises:
        OSError: the process cannot be started, or the log cannot be written.
    """
    kills_before = oom_kills()
    read_fd, write_fd = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, read_fd)
        with contextlib.ExitStack() as starting:
            starting.callback(os.close, write_fd)
            output = starting.enter_context(log.open("wb"))
            process = subprocess.Popen(
                [*argv, "--progress-fd", str(write_fd)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[write_fd],
                start_new_session=True,
            )
        watch = _Watch(process, read_fd, limits, on_phase)
        try:
            watch.until_end()
        finally:
            returncode = watch.end_group()
    return Ended(
        returncode=returncode,
        phase=watch.phase,
        phase_seconds=watch.phase_seconds(),
        exceeded=watch.exceeded,
        oom_killed=oom_kills() > kills_before,
    )


@dataclass
class _Watch:
    process: subprocess.Popen[bytes]
    read_fd: int
    limits: Mapping[str, float]
    on_phase: Callable[[str], None]
    phase: str = "start"
    exceeded: float | None = None
    _began: float = field(default_factory=time.monotonic)
    _seconds: dict[str, float] = field(default_factory=dict)
    _buffer: bytes = b""

    def until_end(self) -> None:
        """Return when the child has exited or its phase ran past the limit."""
        os.set_blocking(self.read_fd, False)
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self.read_fd, selectors.EVENT_READ)
            polled = not self._register_exit(selector, stack)
            while not self._exited():
                remaining = self._began + self.limits[self.phase] - time.monotonic()
                if remaining <= 0:
                    self.exceeded = self.limits[self.phase]
                    return
                wait = min(remaining, _POLL_SECONDS) if polled else remaining
                for key, _ in selector.select(wait):
                    if key.fd == self.read_fd and not self._read():
                        selector.unregister(self.read_fd)
            self._read()

    def end_group(self) -> int | None:
        """End what is left of the group and reap the child.

        The child is reaped last: until then its number is taken, so the signal cannot reach a
        stranger who got the same number.
        """
        try:
            if not self._exited():
                self._signal(signal.SIGTERM)
                self._wait_exited(GRACE_SECONDS)
        finally:  # also when a second Ctrl-C interrupts the grace
            self._signal(signal.SIGKILL)
        try:
            return self.process.wait(UNKILLABLE_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase, the last one until now."""
        self._book()
        return dict(self._seconds)

    def _register_exit(self, selector: selectors.BaseSelector, stack: contextlib.ExitStack) -> bool:
        """Wake when the child exits; False where the kernel has no pidfd."""
        try:
            pidfd = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):
            return False
        stack.callback(os.close, pidfd)
        selector.register(pidfd, selectors.EVENT_READ)
        return True

    def _exited(self) -> bool:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def _wait_exited(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._exited() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _read(self) -> bool:
        """Take what the child has written; False at the end of the pipe."""
        try:
            chunk = os.read(self.read_fd, _LONGEST_LINE)
        except BlockingIOError:
            return True
        *lines, rest = (self._buffer + chunk).split(b"\n")
        self._buffer = rest[-_LONGEST_LINE:]
        for line in lines:
            self._enter(_phase_of(line))
        return bool(chunk)

    def _enter(self, phase: str | None) -> None:
        """Begin a phase. Saying the same one again gives no more time."""
        if phase is None or phase not in self.limits or phase == self.phase:
            return
        self._book()
        self.phase = phase
        self.on_phase(phase)

    def _book(self) -> None:
        now = time.monotonic()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._began
        self._began = now


def _phase_of(line: bytes) -> str | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    phase = message.get("phase") if isinstance(message, dict) else None
    return phase if isinstance(phase, str) else None


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
