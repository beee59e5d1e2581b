"""One child process under watch: its phases, its time limits, and the end of its whole group."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

# Between SIGTERM and SIGKILL; a trial has nothing to save.
GRACE_SECONDS = 2.0
# A process inside a driver call cannot be killed; the sweep goes on without it after this.
UNKILLABLE_SECONDS = 30.0
_POLL_SECONDS = 0.1  # only where the kernel has no pidfd
_LONGEST_WAIT_SECONDS = 3600.0  # of one select; a phase without a limit waits in several
_LONGEST_LINE = 65_536
# Of what a child prints, so much is kept from the beginning, and so much from the end.
LOG_HEAD_BYTES = 4 * 2**20
LOG_TAIL_BYTES = 2**20
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


class StoppedError(Exception):
    """A child was ended because its sweep ends: it has no result."""


class Stop:
    """Tells the threads that watch children to end them; once set, it stays set."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        self._set = threading.Event()
        self._at_once = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether children are to end."""
        return self._set.is_set()

    @property
    def at_once(self) -> bool:
        """Whether they are to end without the time that SIGTERM leaves them."""
        return self._at_once.is_set()

    def set(self, at_once: bool = False) -> None:
        """End all children, and those that start later."""
        if at_once:
            self._at_once.set()
        if not self._set.is_set():
            self._set.set()
            os.write(self._write_fd, b".")  # never read: it wakes every watcher

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until this is set; returns whether it is."""
        return self._set.wait(seconds)

    def fileno(self) -> int:
        """A descriptor that can be read from once this is set."""
        return self._read_fd

    def __del__(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)


def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    limits: Mapping[str, float],
    log: Path,
    on_phase: Callable[[str], None],
    stop: Stop | None = None,
    fds: Sequence[int] = (),
    cores: Sequence[int] = (),
) -> Ended:
    """Run `argv --progress-fd N` in a group of its own and leave none of the group behind.

    The child writes `{"phase": NAME}` lines to the descriptor; `limits` holds the seconds of each
    phase, beginning with `start`. Standard output and error go to `log`, of which beginning and
    end are kept. The child inherits `fds`, and runs on `cores` only.

    Raises:
        OSError: the process cannot be started, or the log cannot be written.
        StoppedError: `stop` was set.
    """
    kills_before = oom_kills()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_BoundedLog(log))
        read_fd, write_fd = os.pipe()
        stack.callback(os.close, read_fd)
        with contextlib.ExitStack() as starting:
            starting.callback(os.close, write_fd)
            starting.callback(output.close_write_end)
            with _on_cores(cores):
                process = subprocess.Popen(
                    [*argv, "--progress-fd", str(write_fd)],
                    stdin=subprocess.DEVNULL,
                    stdout=output.write_fd,
                    stderr=subprocess.STDOUT,
                    env=dict(env),
                    pass_fds=[write_fd, *fds],
                    start_new_session=True,
                )
        watch = _Watch(process, read_fd, output, limits, on_phase, stop)
        try:
            watch.until_end()
        finally:
            returncode = watch.end_group()
            output.drain()
    if watch.stopped:
        raise StoppedError(f"ended in phase {watch.phase}")
    return Ended(
        returncode=returncode,
        phase=watch.phase,
        phase_seconds=watch.phase_seconds(),
        exceeded=watch.exceeded,
        oom_killed=oom_kills() > kills_before,
    )


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and so what it starts, on `cores`; the child has them from the start."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _BoundedLog:
    """What a child prints: the beginning goes to disk at once, of the rest the end is kept.

    A pipe and not the file itself, or a child in a loop would fill the disk.
    """

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("wb", buffering=0)
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self._room = LOG_HEAD_BYTES
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._left_out = 0

    def __enter__(self) -> _BoundedLog:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._left_out:
                self._file.write(b"\n[... %d bytes left out ...]\n" % self._left_out)
            for chunk in self._tail:
                self._file.write(chunk)
        finally:
            self.close_write_end()
            os.close(self.read_fd)
            self._file.close()

    def close_write_end(self) -> None:
        """The child has its own copy."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def read(self) -> bool:
        """Take some of what there is; False at its end."""
        try:
            chunk = os.read(self.read_fd, _LONGEST_LINE)
        except BlockingIOError:
            return True
        self._keep(chunk)
        return bool(chunk)

    def drain(self) -> None:
        """Take what is left in the pipe. Whoever still writes to it does not hold this up."""
        for _ in range(LOG_TAIL_BYTES // _LONGEST_LINE):
            try:
                chunk = os.read(self.read_fd, _LONGEST_LINE)
            except BlockingIOError:
                return
            if not chunk:
                return
            self._keep(chunk)

    def _keep(self, chunk: bytes) -> None:
        head, rest = chunk[: self._room], chunk[self._room :]
        self._room -= len(head)
        if head:
            self._file.write(head)
        if rest:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
        while self._tail_bytes - len(self._tail[0] if self._tail else b"") > LOG_TAIL_BYTES:
            dropped = len(self._tail.popleft())
            self._tail_bytes -= dropped
            self._left_out += dropped


@dataclass
class _Watch:
    process: subprocess.Popen[bytes]
    read_fd: int
    output: _BoundedLog
    limits: Mapping[str, float]
    on_phase: Callable[[str], None]
    stop: Stop | None = None
    phase: str = "start"
    exceeded: float | None = None
    stopped: bool = False
    _began: float = field(default_factory=time.monotonic)
    _seconds: dict[str, float] = field(default_factory=dict)
    _buffer: bytes = b""

    def until_end(self) -> None:
        """Return when the child has exited or its phase ran past the limit."""
        os.set_blocking(self.read_fd, False)
        with contextlib.ExitStack() as stack:
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self.read_fd, selectors.EVENT_READ)
            selector.register(self.output.read_fd, selectors.EVENT_READ)
            if self.stop is not None:
                selector.register(self.stop, selectors.EVENT_READ)
            polled = not self._register_exit(selector, stack)
            while not self._exited():
                if self.stop is not None and self.stop.is_set:
                    self.stopped = True
                    return
                remaining = self._began + self.limits[self.phase] - time.monotonic()
                if remaining <= 0:
                    self.exceeded = self.limits[self.phase]
                    return
                wait = min(remaining, _POLL_SECONDS if polled else _LONGEST_WAIT_SECONDS)
                for key, _ in selector.select(wait):
                    if (key.fd == self.read_fd and not self._read()) or (
                        key.fd == self.output.read_fd and not self.output.read()
                    ):
                        selector.unregister(key.fd)
            self._read()

    def end_group(self) -> int | None:
        """End what is left of the group and reap the child.

        The child is reaped last: until then its number is taken, so the signal cannot reach a
        stranger who got the same number.
        """
        try:
            if not self._exited() and not (self.stop and self.stop.at_once):
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
            if self.stop is not None and self.stop.at_once:
                return
            self.output.drain()  # a full pipe would keep it from ending
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
