"""Processes of a trial that outlived it, found by the mark in their environment.

A process number says nothing: it may belong to a stranger by now. The mark is the trial's own uid,
which only it and what it started have, also a daemon that left the process group. Signals go
through a pidfd where there is one: the process that was looked at is the one that is ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from openpi_opt.process.environment import TRIAL_VARIABLE

_PROC = Path("/proc")
_WAIT_SECONDS = 10.0


def end_marked(uid: str) -> int:
    """End this user's processes on this host that belong to trial `uid`; returns how many.

    Returns when they are gone, or after a while when the kernel does not let them go.
    """
    mark = f"{TRIAL_VARIABLE}={uid}".encode()
    ended: set[int] = set()
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        found = [pid for pid in _own_processes() if _has_mark(pid, mark)]
        if not found:
            break
        # Again and again: one of them may have started another in between.
        ended |= {pid for pid in found if _kill(pid, mark)}
        time.sleep(0.01)
    return len(ended)


def _own_processes() -> list[int]:
    user, me = os.getuid(), os.getpid()
    found = []
    with os.scandir(_PROC) as entries:
        for entry in entries:
            if entry.name.isdecimal() and int(entry.name) != me:
                try:
                    if entry.stat().st_uid == user:
                        found.append(int(entry.name))
                except OSError:  # it is gone
                    continue
    return found


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # it is gone, or is not ours to look at
        return False


def _kill(pid: int, mark: bytes) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
        except (AttributeError, OSError):  # a kernel without pidfd, or it is gone
            pidfd = -1
        if not _has_mark(pid, mark):  # that number belongs to another process now
            return False
        try:
            if pidfd < 0:
                os.kill(pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return True
