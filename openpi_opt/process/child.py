"""One child process under watch: its phases, its time limits, and the end of all it started."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from openpi_opt.process import watcher
from openpi_opt.process.environment import TRIAL_VARIABLE
from openpi_opt.process.output import BoundedLog

if TYPE_CHECKING:
    from openpi_opt.process.devices import Slot
    from openpi_opt.process.schedule import Turn

# Between SIGTERM and SIGKILL; a trial has nothing to save.
GRACE_SECONDS = 2.0
# A process inside a driver call cannot be killed; the sweep goes on without it after this.
UNKILLABLE_SECONDS = 30.0
_POLL_SECONDS = 0.2  # how soon a limit counts again after a pause, and a stop is seen
_LONGEST_LINE = 65_536
_ORPHAN_SECONDS = 10.0  # at most, for the end of what a dead watcher left
_VMSTAT = Path("/proc/vmstat")


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


@dataclass(frozen=True)
class Place:
    """What a child gets from its sweep: where it runs, and what ties it to the sweep.

    `uid` marks its processes and its cgroup. `caches` is the folder of compiled code. `fds` are
    locks: the child has them, and they are free when nothing is left of it. `stop` ends it. With
    a `turn` it asks for the device before it measures.
    """

    slot: Slot | None = None
    uid: str = ""
    caches: Path | None = None
    fds: tuple[int, ...] = ()
    stop: threading.Event | None = None
    turn: Turn | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores that it runs on; empty for all."""
        return self.slot.cores if self.slot else ()


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

    def kill(self, word: bytes = b"K") -> None:
        """End all of it at once, or with `T` ask it to end."""
        with self._lock:
            if not self._over:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._control, word)

    def reap(self, seconds: float) -> int | None:
        """The watcher's return code; None when it does not end in time."""
        with self._lock:
            self._over = True  # its number may be another's from now on
            self._since = None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def run_command(
    argv: Sequence[str],
    env: Mapping[str, str],
    limits: Mapping[str, float],
    log: Path,
    on_phase: Callable[[str], None],
    place: Place | None = None,
) -> Ended:
    """Run `argv --progress-fd N` under a watcher (`watcher.py`) and leave nothing of it behind.

    The child writes `{"phase": NAME}` lines to the descriptor; `limits` holds the seconds of each
    phase, beginning with `start`, on a clock that stands still while the child is stopped. Standard
    output and error go to `log`, of which beginning and end are kept.

    Raises OSError when the process or the log cannot be begun, StoppedError after `place.stop`.
    """
    place = place or Place()
    if not os.access(argv[0], os.X_OK):
        raise FileNotFoundError(errno.ENOENT, "no such program", argv[0])
    kills_before, turn = oom_kills(), place.turn
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(BoundedLog(log))
        progress, says = _pipe(stack)  # the trial's
        status, tells = _pipe(stack)  # the watcher's
        heeds, control = _pipe(stack)
        own = [says.fileno(), *((turn.gate, turn.stopped) if turn else ())]
        names = ("--progress-fd", "--gate-fd", "--stopped-fd")
        words = [text for name, fd in zip(names, own, strict=False) for text in (name, str(fd))]
        theirs = [heeds.fileno(), tells.fileno()]
        about = [*map(str, theirs), ",".join(map(str, own)), watcher.cgroup_of(place.uid)]
        about.append(f"{TRIAL_VARIABLE}={place.uid}" if place.uid else "")
        with _on_cores(place.cores):
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, *about, *argv, *words],
                stdin=subprocess.DEVNULL,
                stdout=output.write_fd,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[*theirs, *own, *place.fds],
                start_new_session=True,
            )
        for end in (heeds, tells, says):
            end.close()
        output.close_write_end()
        os.read(status.fileno(), 1)  # before there is a program, nothing can be stopped
        child = Child(process, control.fileno(), turn.stopped if turn else None)
        watch = _Watch(child, progress, status, output, limits, on_phase, place.stop)
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


def _pipe(stack: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """A pipe's reading and writing end, closed with `stack` at the latest."""
    read, write = os.pipe()
    return stack.enter_context(FileIO(read)), stack.enter_context(FileIO(write, "w"))


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
    progress: FileIO
    status: FileIO
    output: BoundedLog
    limits: Mapping[str, float]
    on_phase: Callable[[str], None]
    stop: threading.Event | None = None
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
        for end in (self.progress, self.status):
            os.set_blocking(end.fileno(), False)

    def until_end(self, turn: Turn | None) -> None:
        """Return when nothing of the child is left, or its phase ran past the limit."""
        with selectors.DefaultSelector() as selector:
            for each in (self.progress, self.status, self.output):
                selector.register(each, selectors.EVENT_READ)
            while not self.gone:
                if self.stop is not None and self.stop.is_set():
                    self.stopped = True
                    return
                remaining = self._began + self.limits[self.phase] - self.child.clock()
                if self.child.paused:
                    remaining = _POLL_SECONDS
                elif remaining <= 0:
                    self.exceeded = self.limits[self.phase]
                    return
                for key, _ in selector.select(min(remaining, _POLL_SECONDS)):
                    if key.fileobj is self.status:
                        self._look()
                    elif (key.fileobj is self.progress and not self._read(turn)) or (
                        key.fileobj is self.output and not self.output.read()
                    ):
                        selector.unregister(key.fileobj)
            self._read(None)

    def end(self) -> None:
        """End what is left, and reap the watcher."""
        try:
            if not self.gone:
                self.child.kill(b"T")
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
        seconds = dict(self._seconds)
        return Ended(self.returncode, self.phase, seconds, self.exceeded, oom_killed, self.left)

    def _wait(self, seconds: float) -> None:
        """Wait up to `seconds` until nothing is left."""
        deadline = time.monotonic() + seconds
        while not self.gone and time.monotonic() < deadline:
            self.output.drain()  # a full pipe would keep it from ending
            select.select([self.status], [], [], 0.02)
            self._look()

    def _look(self) -> None:
        """Read what the watcher says, whose end is the end of all."""
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self.status.fileno(), _LONGEST_LINE)
            self._status += chunk
            self.gone = not chunk
        if self._status.endswith(b"\n"):
            code, *left = self._status.decode(errors="replace").rstrip("\n").split("\t")
            self.returncode, self.left = int(code), tuple(left)

    def _read(self, turn: Turn | None) -> bool:
        """Take what the child has written; False at the end of the pipe."""
        try:
            chunk = os.read(self.progress.fileno(), _LONGEST_LINE)
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

    def _enter(self, phase: object) -> None:
        """Begin a phase. Saying the same one again gives no more time."""
        if isinstance(phase, str) and phase in self.limits and phase != self.phase:
            self._book()
            self.phase = phase
            self.on_phase(phase)

    def _book(self) -> None:
        now = self.child.clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._began
        self._began = now


def _phase_of(line: bytes) -> object:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message.get("phase") if isinstance(message, dict) else None


def end_marked(uid: str) -> int:
    """End this user's processes on this host that belong to trial `uid`; returns how many.

    They are found by their cgroup, where there is one, below the trial's watcher, and by the mark
    in their environment; a process number may belong to a stranger by now. Returns when they are
    gone, or after a while when the kernel keeps them.
    """
    mark = f"{TRIAL_VARIABLE}={uid}".encode()
    ended: set[int] = set()
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while time.monotonic() < deadline:
        own = [each for each in watcher.everybody() if each.is_ours()]
        watchers = [each for each in own if mark in each.words("cmdline")]
        found = [each for each in own if mark in each.words("environ")]
        below = [each for root in watchers for each in watcher.descendants(root.pid)]
        found += [each for each in below if each.lives]
        if not found and not watchers:
            break
        # Again and again: one of them may have started another in between. A watcher ends by
        # itself, unless it is stopped.
        for each in found or watchers:
            each.send(signal.SIGKILL)
        ended |= {each.pid for each in found}
        time.sleep(0.01)
    return len(ended) + watcher.remove_cgroup(watcher.cgroup_of(uid))


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer struck: on this host and in our cgroup."""
    counters = [re.search(r"^oom_kill (\d+)$", watcher.text(path), re.M) for path in oom_files()]
    return sum(int(found[1]) for found in counters if found)


def oom_files() -> list[Path]:
    """Files with a line `oom_kill COUNT`: the host's, and those of both kinds of cgroup."""
    found = [_VMSTAT]
    for line in watcher.text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = Path("/sys/fs/cgroup") / controllers
            folder = root / path.lstrip("/")
            own = folder if folder.is_dir() else root
            found += [own / "memory.events", own / "memory.oom_control"]
    return found
