"""Locks that say who is alive: held means alive, on one host or over a shared file system.

The kernel gives an `flock` back when the last copy of its descriptor closes, however its holder
ended, and a child that inherits the descriptor keeps it. So no clock and no process number is
needed to tell a live holder from a dead one. `filelock` takes the lock; the descriptor stays ours,
because its `FileLock` cannot be handed on to a child.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import platform
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from filelock import lock_descriptor

# World-writable folders: never follow a link that somebody put there.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LONGEST_NOTE = 4096
SAID_AFTER_SECONDS = 2.0


@dataclass
class Held:
    """A lock that this process has, until `release` or its end; `fd` may be passed to a child.

    `found`: its file was there before, so an earlier holder did not remove it.
    """

    path: Path
    fd: int
    found: bool = False

    def share(self) -> Held:
        """The same lock once more: it is free when both are released."""
        return Held(self.path, os.dup(self.fd), self.found)

    def release(self, remove: bool = False) -> None:
        """Let go. A child that inherited `fd` still holds the lock. Twice does no harm."""
        if self.fd < 0:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self.fd)  # not LOCK_UN: that would take it from the child as well
        self.fd = -1


def take(path: Path, note: str = "", mode: int = 0o644) -> Held | None:
    """Take the lock, or None while somebody holds it. `note` tells others who has it.

    Raises OSError where no lock can be, also for a link or another odd file in its place.
    """
    while True:
        found = True
        try:
            # Without O_CREAT first: Linux refuses it for a file of another user in a sticky folder.
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            try:
                fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                continue
            os.fchmod(fd, mode)  # whatever the umask is
            found = False
        with ExitStack() as unless_held:
            unless_held.callback(os.close, fd)
            seen = os.fstat(fd)
            if not stat.S_ISREG(seen.st_mode) or seen.st_nlink > 1:
                raise OSError(f"{path} is not a lock file")
            if not lock_descriptor(fd, blocking=False):
                return None
            if os.fstat(fd).st_nlink == 1:  # else its last holder removed it: begin again
                os.ftruncate(fd, 0)
                os.pwrite(fd, note.encode()[:_LONGEST_NOTE], 0)
                unless_held.pop_all()
                return Held(path, fd, found)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock. Asking shares it for a moment; all may ask at once."""
    try:
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def note(path: Path) -> str:
    """What the last holder said of itself; empty when there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    try:
        return os.read(fd, _LONGEST_NOTE).decode(errors="replace")
    finally:
        os.close(fd)


def this_process() -> str:
    """A note for people: which process has a lock."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"process {os.getpid()} of user {user}"


@contextmanager
def having(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have a lock, as soon as nobody else has it; `say` is told once who keeps this waiting."""
    since: float | None = time.monotonic()
    while (held := take(path, f"{this_process()} on {platform.node()}")) is None:
        if since is not None and time.monotonic() - since > SAID_AFTER_SECONDS:
            since = None
            say(f"waiting for {path.name}, which {note(path) or 'another process'} holds")
        time.sleep(0.02)
    try:
        yield
    finally:
        held.release()


class Claims:
    """The claims of one study: who measures what right now, over all sweeps and hosts.

    A claim is a lock of a configuration on a kind of machine. Its holder is a sweep and then also
    the trial, so a claim ends when neither lives. It is removed only when the journal has the
    result: who gets it afterwards looks there first.
    """

    def __init__(self, study_dir: Path):
        self.folder = study_dir / "claims"
        self.folder.mkdir(parents=True, exist_ok=True)

    def take(self, config_hash: str, machine_hash: str, space: str = "") -> Held | None:
        """Claim a configuration for a point of `space`, or None while somebody else has it."""
        about = json.dumps({"config_hash": config_hash, "space": space})
        return take(self.path(config_hash, machine_hash), about)

    def take_free(self) -> list[Held]:
        """Take every claim that a killed sweep left without removing it."""
        found = (take(path) for path in self.folder.glob("*.lock"))
        return [held for held in found if held is not None]

    def live(self, space: str) -> tuple[set[str], bool]:
        """Hashes of what is being measured for `space`, and whether a dead sweep left a claim."""
        found, left = set(), False
        for path in self.folder.glob("*.lock"):
            try:
                about = json.loads(note(path))
            except ValueError:  # taken this moment, or gone
                continue
            if about["space"] != space:
                continue
            if is_held(path):
                found.add(about["config_hash"])
            elif path.exists():  # who has the result removes it first and lets go then
                left = True
        return found, left

    def path(self, config_hash: str, machine_hash: str) -> Path:
        """Where the claim of a configuration on a kind of machine is."""
        return self.folder / f"{config_hash}-{machine_hash}.lock"


class Controllers:
    """This sweep among those that work on a study: each holds a lock of its own until `leave`.

    `say` is told who keeps it waiting.
    """

    def __init__(self, study_dir: Path, say: Callable[[str], None] = lambda _: None):
        self._say = say
        self._folder = study_dir / "controllers"
        self._folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:60]
        self.name = f"{host}-{os.getpid()}-{uuid4().hex[:8]}"
        path = self._folder / f"{self.name}.lock"
        try:
            with self.alone():  # or `others` may try the lock before it is taken
                held = take(path)
            assert held is not None  # nobody else has that name
            self._held = held
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What only one sweep of the study does at a time: settling and beginning."""
        with having(self._folder / "settle.lock", self._say):
            yield

    def is_alive(self, name: str) -> bool:
        """Whether that sweep still works on the study. Ask under `alone`."""
        return is_held(self._folder / f"{name}.lock")

    def others(self) -> int:
        """How many other sweeps there are; traces of dead ones are removed. Ask under `alone`."""
        count = 0
        for path in self._folder.glob("*-*.lock"):
            if path.name == f"{self.name}.lock":
                continue
            held = take(path)
            if held is None:
                count += 1
            else:
                held.release(remove=True)
        return count

    def leave(self, remove: bool = True) -> None:
        """This sweep is over."""
        self._held.release(remove)
