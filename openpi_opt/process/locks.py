"""Locks that say who is alive: held means alive, on one host or over a shared file system.

The kernel gives an `flock` back when the last copy of its descriptor closes, however its holder
ended, and a child that inherits the descriptor keeps it. So no clock and no process number is
needed to tell a live holder from a dead one. `filelock` takes the lock; the descriptor stays ours,
because its `FileLock` cannot be handed on to a child.
"""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from filelock import lock_descriptor

# World-writable folders: never follow a link that somebody put there.
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_LONGEST_NOTE = 4096


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

    Raises:
        OSError: no such folder, no permission, a link or other odd file in its place, or a file
            system without locks.
    """
    while True:
        fd, found = _open(path, mode)
        try:
            if not lock_descriptor(fd, blocking=False):
                os.close(fd)
                return None
            if os.fstat(fd).st_nlink == 1:
                os.ftruncate(fd, 0)
                os.pwrite(fd, note.encode()[:_LONGEST_NOTE], 0)
                return Held(path, fd, found)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder removed the file: begin again with the name


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


def _open(path: Path, mode: int) -> tuple[int, bool]:
    while True:
        found_it = True
        try:
            # Without O_CREAT first: Linux refuses it for a file of another user in a sticky folder.
            fd = os.open(path, _FLAGS)
        except FileNotFoundError:
            try:
                fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:
                continue
            os.fchmod(fd, mode)  # whatever the umask is
            found_it = False
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(fd)
            raise OSError(f"{path} is not a lock file")
        return fd, found_it
