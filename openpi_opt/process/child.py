"""One child process under watch: its phases, its time limits, and the end of all it started."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
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
from openpi_opt.vendor.base import read
from openpi_opt.vendor.cpu import own_cgroups

if TYPE_CHECKING:
    from openpi_opt.process.devices import Slot
    from openpi_opt.process.schedule import Turn

# Between SIGTERM and SIGKILL; a trial has nothing to save.
GRACE_SECONDS = 2.0
# A process inside a driver call cannot be killed; the sweep goes on without it after this.
UNKILLABLE_SECONDS = 30.0
# Of what a child prints, so much is kept from the beginning, and so much from the end.
HEAD_BYTES = 4 * 2**20
TAIL_BYTES = 2**20
_POLL_SECONDS = 0.2  # how soon a limit counts again after a pause, and a stop is seen
_CHUNK = 65_536
_ORPHAN_SECONDS = 10.0  # at most, for the end of what a dead watcher left


@dataclass
class Ended:
    """How a child ended, as seen from outside.

    `returncode` is negative for a signal and None for a process that could not be killed.
    `exceeded` is the limit in seconds that the last phase ran past, if it was ended for that.
    `left` names processes that it had started and that outlived it; they were ended.
    """

    returncode: int | None = None
    phase: str = "start"
    phase_seconds: dict[str, float] = field(default_factory=dict)
    exceeded: float | None = None
    oom_killed: bool = False
    left: tuple[str, ...] = ()


class StoppedError(Exception):
    """A child was ended because its sweep ends: it has no result."""


@dataclass(frozen=True)
class Place:
    """What a child gets from its sweep: where it runs, and what ties it to the sweep.

    `uid` marks its processes. `caches` is the folder of compiled code. `fds` are locks: the child
    has them, and they are free when nothing is left of it. `stop` ends it. With a `turn` it asks
    for the device before it measures.
    """

    slot: Slot | None = None
    uid: str = ""
    caches: Path | None = None
    fds: tuple[int, ...] = ()
    stop: threading.Event | None = None
    turn: Turn | None = None


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
    if not os.access(argv[0], os.X_OK):
        raise FileNotFoundError(errno.ENOENT, "no such program", argv[0])
    kills_before = oom_kills()
    with contextlib.ExitStack() as stack:
        child = Child(stack, limits, log, on_phase, place or Place())
        child.start(argv, env)
        try:
            child.follow()
        finally:
            child.end()
    child.ended.oom_killed = oom_kills() > kills_before
    return child.ended


class Child:
    """A running child and everything below it, which can be made to stand still with its clock.

    `pause`, `resume` and `kill` may be called from any thread, all else from the one that made it.
    Its pipes and its log are closed with `stack`.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        limits: Mapping[str, float],
        log: Path,
        on_phase: Callable[[str], None],
        place: Place,
    ):
        self.ended = Ended()
        self._stack, self._limits, self._on_phase = stack, limits, on_phase
        self._place, self._turn = place, place.turn
        self._lock = threading.Lock()
        self._gone = False  # the watcher has ended, so nothing is left
        self._ending = self._over = False
        self._since: float | None = None  # when it was stopped
        self._stood = 0.0  # seconds for which it was, before
        self._line = self._status = b""
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._log = stack.enter_context(contextlib.closing(_Log(log)))

    def start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the watcher, which starts the program."""
        says, tells = self._hear(self._read_phases), self._hear(self._read_status)
        prints, (heeds, self._control) = self._hear(self._log.take), self._pipe()
        turn, uid, slot = self._turn, self._place.uid, self._place.slot
        theirs = [heeds.fileno(), tells.fileno()]
        own = [says.fileno(), *((turn.gate, turn.stopped) if turn else ())]
        names = ("--progress-fd", "--gate-fd", "--stopped-fd")
        words = [text for name, fd in zip(names, own, strict=False) for text in (name, str(fd))]
        about = [*map(str, theirs), ",".join(map(str, own)), uid and f"{TRIAL_VARIABLE}={uid}"]
        with _on_cores(slot.cores if slot else ()):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, *about, *argv, *words],
                stdin=subprocess.DEVNULL,
                stdout=prints,
                stderr=subprocess.STDOUT,
                env=dict(env),
                pass_fds=[*theirs, *own, *self._place.fds],
                start_new_session=True,
            )
        for end in (heeds, tells, says, prints):
            end.close()
        self._began = self.clock()

    def follow(self) -> None:
        """Return when nothing of the child is left, or its phase ran past the limit."""
        while not (self._status or self._gone):  # without a program nothing can be stopped
            self._serve(None)
        if self._turn is not None:
            self._turn.began(self)
        while not self._gone:
            if self._place.stop is not None and self._place.stop.is_set():
                raise StoppedError(f"ended in phase {self.ended.phase}")
            limit = self._limits[self.ended.phase]
            remaining = self._began + limit - self.clock()
            if self.paused:
                remaining = _POLL_SECONDS
            elif remaining <= 0:
                self.ended.exceeded = limit
                return
            self._serve(min(remaining, _POLL_SECONDS))
        self._drain()

    def end(self) -> None:
        """End what is left, and reap the watcher."""
        turn = self._turn
        self._ending = True  # what it says from now on is no phase any more
        with contextlib.ExitStack() as whatever_fails:
            if turn is not None:
                whatever_fails.callback(lambda: turn.ended(self._gone))
            whatever_fails.callback(self._reap)
            whatever_fails.callback(self._end_by, b"K", UNKILLABLE_SECONDS)
            self._end_by(b"T", GRACE_SECONDS)

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
            self._stood += time.monotonic() - self._since
            self._since = None
            if self._turn is not None:
                os.pwrite(self._turn.stopped, f"{self._stood:.6f}\n".encode(), 0)
            watcher.continue_below(self._process.pid)

    @property
    def paused(self) -> bool:
        """Whether it stands still."""
        return self._since is not None

    def clock(self) -> float:
        """Seconds on a clock that stands still while the child does."""
        with self._lock:
            now = time.monotonic() if self._since is None else self._since
            return now - self._stood

    def kill(self, word: bytes = b"K") -> None:
        """End all of it at once, or with `T` ask it to end."""
        with self._lock:
            if not self._over:
                with contextlib.suppress(BrokenPipeError):
                    os.write(self._control.fileno(), word)

    def _pipe(self) -> tuple[FileIO, FileIO]:
        """A pipe's reading and writing end."""
        read, write = os.pipe()
        enter = self._stack.enter_context
        return enter(FileIO(read)), enter(FileIO(write, "w"))

    def _hear(self, take: Callable[[bytes], None]) -> FileIO:
        """The writing end of a pipe; `take` gets what is said there, and nothing at its end."""
        read, write = self._pipe()
        self._selector.register(read, selectors.EVENT_READ, take)
        return write

    def _serve(self, seconds: float | None) -> None:
        """Hear what is said within that time."""
        for key, _ in self._selector.select(seconds):
            chunk = os.read(key.fd, _CHUNK)
            if not chunk:
                self._selector.unregister(key.fileobj)
            key.data(chunk)

    def _drain(self) -> None:
        """Hear what is left in the pipes. Whoever still writes there does not hold this up."""
        for _ in range(TAIL_BYTES // _CHUNK):
            self._serve(0)

    def _read_phases(self, chunk: bytes) -> None:
        *lines, rest = (self._line + chunk).split(b"\n")
        self._line = rest[-_CHUNK:]
        for phase in map(_phase_of, lines if not self._ending else ()):
            # Saying the same one again gives no more time.
            if isinstance(phase, str) and phase in self._limits and phase != self.ended.phase:
                self._book()
                self.ended.phase = phase
                self._on_phase(phase)
            if self._turn is not None and not self._gone:
                if self.ended.phase == "wait":
                    self._turn.asks()
                elif self.ended.phase == "report":
                    self._turn.frees()

    def _read_status(self, chunk: bytes) -> None:
        """What the watcher says, whose end is the end of all."""
        self._status += chunk
        self._gone = not chunk
        if self._status.endswith(b"\n"):
            text = self._status.decode(errors="replace").removeprefix("+").rstrip("\n")
            code, *left = text.split("\t")
            self.ended.returncode, self.ended.left = int(code), tuple(left)

    def _end_by(self, word: bytes, seconds: float) -> None:
        """Send `word`, and wait up to `seconds` until nothing is left."""
        if not self._gone:
            self.kill(word)
        deadline = time.monotonic() + seconds
        while not self._gone and time.monotonic() < deadline:
            self._serve(0.02)  # a full pipe would keep it from ending

    def _reap(self) -> None:
        with self._lock:
            self._over = True  # its number may be another's from now on
            self._since = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(UNKILLABLE_SECONDS if self._gone else 0.0)
            if self._gone and self.ended.returncode is None:
                self.ended.returncode = code  # the watcher was killed, and the child with it
        self._drain()
        self._book()

    def _book(self) -> None:
        now, seconds = self.clock(), self.ended.phase_seconds
        seconds[self.ended.phase] = seconds.get(self.ended.phase, 0.0) + now - self._began
        self._began = now


class _Log:
    """What a child prints: the beginning goes to disk at once, of the rest the end is kept.

    Not the file itself is its output, or a child in a loop would fill the disk.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._room, self._left_out = HEAD_BYTES, 0
        self._tail = bytearray()

    def take(self, chunk: bytes) -> None:
        """Keep what belongs to either end."""
        self._file.write(chunk[: self._room])
        self._tail += chunk[self._room :]
        self._room -= min(self._room, len(chunk))
        if len(self._tail) > 2 * TAIL_BYTES:
            self._cut()

    def close(self) -> None:
        """Write the end."""
        self._cut()
        with self._file as file:
            if self._left_out:
                file.write(b"\n[... %d bytes left out ...]\n" % self._left_out)
            file.write(self._tail)

    def _cut(self) -> None:
        over = max(0, len(self._tail) - TAIL_BYTES)
        self._left_out += over
        del self._tail[:over]


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


def _phase_of(line: bytes) -> object:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message.get("phase") if isinstance(message, dict) else None


def end_marked(uid: str) -> int:
    """End this user's processes on this host that belong to trial `uid`; returns how many.

    They are found below the trial's watcher, and by the mark in their environment; a process
    number may belong to a stranger by now. Returns when they are gone, or after a while when the
    kernel keeps them.
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
    return len(ended)


def oom_kills() -> int:
    """How often the kernel's out-of-memory killer struck: on this host and in our cgroup."""
    counters = [re.search(r"^oom_kill (\d+)$", read(path), re.M) for path in oom_files()]
    return sum(int(found[1]) for found in counters if found)


def oom_files() -> list[Path]:
    """Files with a line `oom_kill COUNT`: the host's, and those of both kinds of cgroup."""
    groups = [group if group.is_dir() else root for root, group in own_cgroups("memory")]
    names = "memory.events", "memory.oom_control"
    return [Path("/proc/vmstat"), *(folder / name for folder in groups for name in names)]
