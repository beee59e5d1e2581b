"""One child process under watch: its phases, its time limits, and the end of all it started."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from openpi_opt.process import watcher
from openpi_opt.process.environment import TRIAL_VARIABLE
from openpi_opt.process.oom import oom_kills
from openpi_opt.process.output import BoundedLog

# Between SIGTERM and SIGKILL; a trial has nothing to save.
GRACE_SECONDS = 2.0
# A process inside a driver call cannot be killed; the sweep goes on without it after this.
UNKILLABLE_SECONDS = 30.0
_PAUSED_POLL_SECONDS = 0.2  # how soon a limit counts again after a pause
_LONGEST_WAIT_SECONDS = 3600.0  # of one select; a phase without a limit waits in several
_LONGEST_LINE = 65_536


@dataclass(frozen=True)
class Ended:
    """How a child ended, as seen from outside.

    `returncode` is negative for a signal and None for a process that could not be killed.
    `exceeded` is the limit in seconds that the last phase ran past, if it was ended for that.
    `left` names processes that it had started and that outlived it; they were ended.
    """

    returncode: int | None
    phase: str
    phase_seconds: dict[str, float]
    exceeded: float | None
    oom_killed: bool
    left: tuple[str, ...] = ()


class StoppedError(Exception):
    """A child was ended because its sweep ends: it has no result."""


class Stop:
    """Tells the threads that watch children to end them; once set, it stays set."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        self._set = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether children are to end."""
        return self._set.is_set()

    def set(self) -> None:
        """End all children, and those that start later."""
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


class Turn(Protocol):
    """A child's place in the schedule of its device (`schedule.Turn`).

    The child inherits both descriptors: it asks by the phase `wait`, then reads a byte from `gate`,
    and lets others have the device by the phase `report`. In `stopped` it finds for how many
    seconds it stood still, as text.
    """

    gate: int
    stopped: int

    def began(self, child: Child) -> None:
        """Its process is there."""

    def asks(self) -> None:
        """It wants the device for itself."""

    def frees(self) -> None:
        """It needs the device no more."""

    def ended(self, gone: bool) -> None:
        """It is over; not `gone`: something of it is left that cannot be killed."""


@dataclass(frozen=True)
class Tether:
    """What ties a child to its sweep.

    `stop` ends it. `fds` are locks: the child has them, and they are free when nothing is left of
    it. It runs on `cores`. `name` is the mark of its processes and of its cgroup.
    """

    name: str = ""
    stop: Stop | None = None
    fds: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    turn: Turn | None = None

    @property
    def mark(self) -> str:
        """What the environment of its processes has, and the watcher's command line."""
        return f"{TRIAL_VARIABLE}={self.name}" if self.name else ""


class Child:
    """A running child and everything below it, which can be made to stand still with its clock."""

    def __init__(self, process: subprocess.Popen[bytes], control: int, stopped: int | None):
        self._process, self._control, self._stopped = process, control, stopped
        self._lock = threading.Lock()
        self._over = False
        self._since: float | None = None  # when it was stopped
        self._seconds = 0.0  # for which it was, before

    def pause(self, seconds: float) -> list[str]:
        """Stop all of it; returns names of processes that do not stop in time."""
        with self._lock:
            if self._over or self._since is not None:
                return []
            self._since = time.monotonic()
            return watcher.stop_below(self._process.pid, seconds)

    def resume(self) -> None:
        """Let it go on. Without a pause this does nothing."""
        with self._lock:
            if self._over or self._since is None:
                return
            self._seconds += time.monotonic() - self._since
            self._since = None
            if self._stopped is not None:
                os.pwrite(self._stopped, f"{self._seconds:.6f}\n".encode(), 0)
            watcher.continue_below(self._process.pid)

    @property
    def paused(self) -> bool:
        """Whether it stands still."""
        return self._since is not None

    def clock(self) -> float:
        """Seconds on a clock that stands still while the child does."""
        with self._lock:
            now = time.monotonic() if self._since is None else self._since
            return now - self._seconds

    def kill(self) -> None:
        """End all of it at once."""
        with self._lock:
            self._tell(b"K")

    def terminate(self) -> None:
        """Ask all of it to end."""
        with self._lock:
            self._tell(b"T")

    def reap(self, seconds: float) -> int | None:
        """The watcher's return code; None when it does not end in time."""
        with self._lock:
            self._over = True  # its number may be another's from now on
            self._since = None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _tell(self, word: bytes) -> None:
        if not self._over:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._control, word)


def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    limits: Mapping[str, float],
    log: Path,
    on_phase: Callable[[str], None],
    tether: Tether | None = None,
) -> Ended:
    """Run `argv --progress-fd N` under a watcher (`watcher.py`) and leave nothing of it behind.

    The child writes `{"phase": NAME}` lines to the descriptor; `limits` holds the seconds of each
    phase, beginning with `start`, on a clock that stands still while the child is stopped. Standard
    output and error go to `log`, of which beginning and end are kept.

    Raises:
        OSError: the process cannot be started, or the log cannot be written.
        StoppedError: `tether.stop` was set.
    """
    tether = tether or Tether()
    if not os.access(argv[0], os.X_OK):
        raise FileNotFoundError(errno.ENOENT, "no such program", argv[0])
    kills_before = oom_kills()
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(BoundedLog(log))
        pipes = stack.enter_context(_Pipes())
        turn = tether.turn
        own = [pipes.progress[1], *(() if turn is None else (turn.gate, turn.stopped))]
        words = [*argv, "--progress-fd", str(own[0])]
        if turn is not None:
            words += ["--gate-fd", str(turn.gate), "--stopped-fd", str(turn.stopped)]
        theirs = [pipes.control[0], pipes.status[1]]
        about = [
            *map(str, theirs),
            ",".join(map(str, own)),
            watcher.cgroup_of(tether.name),
            tether.mark,
        ]
        with _on_cores(tether.cores):
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, *about, *words],
                stdin=subprocess.DEVNULL,
                stdout=output.write_fd,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[*theirs, *own, *tether.fds],
                start_new_session=True,
            )
        pipes.close(*theirs, pipes.progress[1])
        output.close_write_end()
        os.read(pipes.status[0], 1)  # before there is a program, nothing can be stopped
        child = Child(process, pipes.control[1], None if turn is None else turn.stopped)
        watch = _Watch(child, pipes, output, limits, on_phase, tether.stop)
        try:
            if turn is not None:
                turn.began(child)
            watch.until_end(turn)
        finally:
            try:
                watch.end()
            finally:
                if turn is not None:
                    turn.ended(watch.gone)
    if watch.stopped:
        raise StoppedError(f"ended in phase {watch.phase}")
    return watch.summary(oom_kills() > kills_before)


class _Pipes:
    """The three pipes of a child, each as its reading and its writing end.

    `progress` is the trial's, `status` and `control` are the watcher's.
    """

    def __init__(self) -> None:
        self.progress, self.status, self.control = os.pipe(), os.pipe(), os.pipe()
        self._open = {*self.progress, *self.status, *self.control}

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def close(self, *fds: int) -> None:
        """Close some of them, once."""
        for fd in fds:
            self._open.remove(fd)
            os.close(fd)


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


@dataclass
class _Watch:
    """Reads what a child says, and ends it when a phase has run past its limit."""

    child: Child
    pipes: _Pipes
    output: BoundedLog
    limits: Mapping[str, float]
    on_phase: Callable[[str], None]
    stop: Stop | None = None
    phase: str = "start"
    exceeded: float | None = None
    stopped: bool = False
    gone: bool = False  # the watcher has ended, so nothing is left
    returncode: int | None = None
    left: tuple[str, ...] = ()
    _began: float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict)
    _buffer: bytes = b""
    _status: bytes = b""

    def __post_init__(self) -> None:
        self._began = self.child.clock()
        for fd in (self.pipes.progress[0], self.pipes.status[0]):
            os.set_blocking(fd, False)

    def until_end(self, turn: Turn | None) -> None:
        """Return when nothing of the child is left, or its phase ran past the limit."""
        progress, status = self.pipes.progress[0], self.pipes.status[0]
        with selectors.DefaultSelector() as selector:
            for fd in (progress, status, self.output.read_fd):
                selector.register(fd, selectors.EVENT_READ)
            if self.stop is not None:
                selector.register(self.stop, selectors.EVENT_READ)
            while not self.gone:
                if self.stop is not None and self.stop.is_set:
                    self.stopped = True
                    return
                remaining = self._began + self.limits[self.phase] - self.child.clock()
                if self.child.paused:
                    remaining = _PAUSED_POLL_SECONDS
                elif remaining <= 0:
                    self.exceeded = self.limits[self.phase]
                    return
                for key, _ in selector.select(min(remaining, _LONGEST_WAIT_SECONDS)):
                    if key.fd == status:
                        self._look()
                    elif (key.fd == progress and not self._read(turn)) or (
                        key.fd == self.output.read_fd and not self.output.read()
                    ):
                        selector.unregister(key.fd)
            self._read(None)

    def end(self) -> None:
        """End what is left, and reap the watcher."""
        try:
            if not self.gone:
                self.child.terminate()
                self._wait(GRACE_SECONDS)
        finally:
            if not self.gone:
                self.child.kill()
                self._wait(UNKILLABLE_SECONDS)
            ended = self.child.reap(UNKILLABLE_SECONDS if self.gone else 0.0)
            if self.gone and self.returncode is None:
                self.returncode = ended  # the watcher was killed, and the child with it
            self.output.drain()

    def summary(self, oom_killed: bool) -> Ended:
        """How it ended."""
        self._book()
        return Ended(
            *(self.returncode, self.phase, dict(self._seconds), self.exceeded),
            oom_killed=oom_killed,
            left=self.left,
        )

    def _wait(self, seconds: float) -> None:
        """Wait up to `seconds` until nothing is left."""
        deadline = time.monotonic() + seconds
        while not self.gone and time.monotonic() < deadline:
            self.output.drain()  # a full pipe would keep it from ending
            select.select([self.pipes.status[0]], [], [], 0.02)
            self._look()

    def _look(self) -> None:
        """Read what the watcher says, whose end is the end of all."""
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.pipes.status[0], _LONGEST_LINE)
            self._status += chunk
            self.gone = not chunk
        if self._status.endswith(b"\n"):
            code, *left = self._status.decode(errors="replace").rstrip("\n").split("\t")
            self.returncode, self.left = int(code), tuple(left)

    def _read(self, turn: Turn | None) -> bool:
        """Take what the child has written; False at the end of the pipe."""
        try:
            chunk = os.read(self.pipes.progress[0], _LONGEST_LINE)
        except BlockingIOError:
            return True
        *lines, rest = (self._buffer + chunk).split(b"\n")
        self._buffer = rest[-_LONGEST_LINE:]
        for line in lines:
            self._enter(_phase_of(line))
            if self.phase == "wait" and turn is not None:
                turn.asks()
            elif self.phase == "report" and turn is not None:
                turn.frees()
        return bool(chunk)

    def _enter(self, phase: str | None) -> None:
        """Begin a phase. Saying the same one again gives no more time."""
        if phase is None or phase not in self.limits or phase == self.phase:
            return
        self._book()
        self.phase = phase
        self.on_phase(phase)

    def _book(self) -> None:
        now = self.child.clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._began
        self._began = now


def _phase_of(line: bytes) -> str | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    phase = message.get("phase") if isinstance(message, dict) else None
    return phase if isinstance(phase, str) else None
