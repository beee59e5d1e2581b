"""Processes that a dead sweep or watcher left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from openpi_opt.process import watcher
from openpi_opt.process.environment import TRIAL_VARIABLE
from openpi_opt.process.watcher import Process

_ORPHAN_SECONDS = 10.0  # at most, for their end


def end_marked(uid: str) -> int:
    """End this user's processes on this host that belong to trial `uid`; returns how many.

    They are found by their cgroup, where there is one, below the trial's watcher, and by the mark
    in their environment, which only the trial and what it started have. A process number says
    nothing: it may belong to a stranger by now. Returns when they are gone, or after a while when
    the kernel keeps them.
    """
    mark = f"{TRIAL_VARIABLE}={uid}".encode()
    ended: set[int] = set()
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while time.monotonic() < deadline:
        own = _own_processes()
        watchers = [each for each in own if mark in _words(each.pid, "cmdline")]
        found = [each for each in own if mark in _words(each.pid, "environ")]
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


def _own_processes() -> list[Process]:
    user, me = os.getuid(), os.getpid()
    found = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal() and int(entry.name) != me:
                with contextlib.suppress(OSError):  # it is gone
                    if entry.stat().st_uid == user:
                        found.append(watcher.look(int(entry.name)))
    return [each for each in found if each is not None and each.lives]


def _words(pid: int, name: str) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except OSError:  # it is gone, or is not ours to look at
        return []
