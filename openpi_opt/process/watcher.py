"""The process between a sweep and its trial: whatever the trial starts ends with it.

    python -I -S watcher.py CONTROL STATUS CLOSE MARK PROGRAM WORD...

It is the subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) of everything that PROGRAM starts: a
descendant that leaves its session, clears its environment and is orphaned stays below this process.
When PROGRAM ends, what is left is ended; when the sweep ends, however it went, everything is. That
holds for processes that are stopped, too: this one never is.

CONTROL is a pipe from the sweep: `T` asks all to end, `K` and the pipe's end kill them. STATUS gets
a `+` when PROGRAM is there, and one line at the end: its return code and the names of what outlived
it, with tabs between.
CLOSE names descriptors, with commas, that are for PROGRAM alone. MARK, as NAME=VALUE, goes into
PROGRAM's environment and not into this process's own. This process keeps the others, so
locks among them are free when nothing is left.

As a program it imports nothing of the package and begins in 20 ms. The package imports from here
what it needs to stop a trial and everything below it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# What a program started ends by itself within this time after it, or is counted as left behind.
_LINGER_SECONDS = 0.2
_POLL_SECONDS = 0.01
_MOST_NAMES = 8


class Process:
    """One entry of /proc. `began` tells it from a later process of the same number."""

    __slots__ = ("began", "name", "parent", "pid", "state")

    def __init__(self, pid: int, stat: str):
        name, _, rest = stat.partition("(")[2].rpartition(")")
        fields = rest.split()
        self.pid, self.parent, self.name = pid, int(fields[1]), name
        self.state, self.began = fields[0], fields[19]

    @property
    def runs(self) -> bool:
        """Whether it is neither stopped nor dead."""
        return self.state not in "TtZX"

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.state not in "ZX"

    def is_ours(self) -> bool:
        """Whether it lives, is this user's, and is not this process itself."""
        try:
            owner = os.stat(f"/proc/{self.pid}").st_uid
        except OSError:  # it is gone
            return False
        return owner == os.getuid() and self.pid != os.getpid() and self.lives

    def words(self, name: str) -> list[bytes]:
        """Its `cmdline` or `environ`; empty when it is gone, or not ours to look at."""
        try:
            with open(f"/proc/{self.pid}/{name}", "rb") as file:
                return file.read().split(b"\0")
        except OSError:
            return []

    def send(self, number: signal.Signals) -> None:
        """Signal this very process; one that is gone, or not ours, gets nothing."""
        now = look(self.pid)
        if now is not None and now.began == self.began:
            try:
                os.kill(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass


def look(pid: int) -> Process | None:
    """A process by its number, or None when there is none; fields of proc(5)'s stat."""
    stat = text(f"/proc/{pid}/stat")
    return Process(pid, stat) if stat else None


def everybody() -> list[Process]:
    """All processes of this host, dead ones included."""
    found = [look(int(entry)) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [each for each in found if each is not None]


def descendants(root: int) -> list[Process]:
    """Everything below process `root`, itself left out, dead ones included."""
    children: dict[int, list[Process]] = {}
    for each in everybody():
        children.setdefault(each.parent, []).append(each)
    below: list[Process] = []
    todo = [root]
    while todo:
        found_here = children.get(todo.pop(), [])
        below += found_here
        todo += [each.pid for each in found_here]
    return below


def stop_below(root: int, seconds: float) -> list[str]:
    """Stop everything below `root` with SIGSTOP; returns names of what did not stop in time.

    A process may start another while it is being stopped, so this looks until it has seen all of
    them stopped twice.
    """
    deadline, quiet = time.monotonic() + seconds, 0
    while True:
        running = [each for each in descendants(root) if each.runs]
        quiet = 0 if running else quiet + 1
        if quiet == 2:
            return []
        if running and time.monotonic() > deadline:
            return [each.name for each in running]
        for each in running:
            each.send(signal.SIGSTOP)
        if running:
            time.sleep(0.001)


def continue_below(root: int) -> None:
    """Let everything below `root` go on."""
    for each in descendants(root):
        each.send(signal.SIGCONT)


def text(path: object) -> str:
    """What the kernel says there; empty when it says nothing."""
    try:
        with open(str(path), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


class _Watcher:
    """The watcher's own process: a loop until PROGRAM and all that it started are gone."""

    def __init__(self, control: int, status: int):
        self._control, self._status = control, status
        self._pid = 0
        self._returncode: int | None = None

    def run(self, argv: list[str], env: dict[str, str], close: list[int]) -> None:
        """Start the program and return when nothing is left of it."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        wake, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._start(argv, env, close)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while self._returncode is None:
            ready = {fd for fd, _ in poll.poll()}
            if wake in ready:
                os.read(wake, 4096)
            if self._control in ready and not self._heed():
                poll.unregister(self._control)
            self._reap()
        left = self._linger()
        while self._send(signal.SIGKILL):
            time.sleep(_POLL_SECONDS)
            self._reap()
        try:
            os.write(self._status, "\t".join([str(self._returncode), *left]).encode() + b"\n")
        except BrokenPipeError:  # the sweep is gone
            pass

    def _start(self, argv: list[str], env: dict[str, str], close: list[int]) -> None:
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setsid()
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != parent:
                    os._exit(1)
                for fd in (self._control, self._status):
                    os.close(fd)
                os.execve(argv[0], argv, env)
            except OSError as error:
                os.write(2, f"{argv[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        os.write(self._status, b"+")
        for fd in close:
            os.close(fd)

    def _heed(self) -> bool:
        """Do what the sweep says; False when it is gone."""
        word = os.read(self._control, 1)
        self._send(signal.SIGTERM if word == b"T" else signal.SIGKILL, signal.SIGCONT)
        return bool(word)

    def _send(self, *numbers: signal.Signals) -> list[Process]:
        """Signal all that lives below this process; returns it."""
        living = [each for each in descendants(os.getpid()) if each.lives]
        for each in living:
            for number in numbers:
                each.send(number)
        return living

    def _reap(self) -> None:
        """Take note of everything below that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._pid:
                self._returncode = os.waitstatus_to_exitcode(status)

    def _linger(self) -> list[str]:
        """Names of what has not ended by itself a moment after the program."""
        deadline = time.monotonic() + _LINGER_SECONDS
        while left := self._send():
            if self._returncode is not None and self._returncode < 0:
                return []  # it was killed, and could not end what it had started
            if time.monotonic() > deadline:
                return sorted(each.name for each in left)[:_MOST_NAMES]
            time.sleep(_POLL_SECONDS)
            self._reap()
        return []


def main(words: list[str]) -> None:
    """Watch one program."""
    control, status, close, mark, *argv = words
    name, _, value = mark.partition("=")
    env = {**os.environ, name: value} if name else dict(os.environ)
    _Watcher(int(control), int(status)).run(argv, env, [int(fd) for fd in close.split(",") if fd])


if __name__ == "__main__":
    main(sys.argv[1:])
