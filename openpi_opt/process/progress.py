"""What a trial says of itself while it runs, and how it waits for the device.

The other end is `process.child`, which reads phases, opens the gate and tells the time that a trial
stood still.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Progress:
    """Says which phase begins, on a file descriptor of the parent or on stderr.

    The first phase, `start`, began with the process. With `gate_fd` the parent says when this
    process has the device, and at `stopped_fd` for how many seconds it stood still for others.
    `standing` trials stand still for this one.
    """

    fd: int | None
    gate_fd: int | None = None
    stopped_fd: int | None = None
    phase: str = "start"
    standing: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0
    _asked: bool = False

    def __post_init__(self) -> None:
        self._since = self.clock() - max(0.0, _age_seconds() - self._stopped())

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        self.leave()
        self.phase = phase
        line = json.dumps({"phase": phase}) + "\n"
        if self.fd is None:
            sys.stderr.write(f"[{phase}]\n")
        else:
            os.write(self.fd, line.encode())

    def ask(self) -> None:
        """Wait until this process has the device for itself; asking again has no effect.

        From then until it has ended, the others on the device stand still (`process.schedule`).
        """
        if self.gate_fd is None or self._asked:
            return
        self._asked = True
        self.enter("wait")
        opened = os.read(self.gate_fd, 1)
        if not opened:
            sys.exit("the gate was closed: this process is not needed")
        self.standing = opened[0]

    def free(self) -> None:
        """Let others have the device: from here on this process only reads and writes."""
        self.enter("report")

    def clock(self) -> float:
        """Seconds on a clock that stands still while this process is stopped."""
        return time.monotonic() - self._stopped()

    def leave(self) -> None:
        """Book the time of the current phase."""
        now = self.clock()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self._since = now

    def _stopped(self) -> float:
        if self.stopped_fd is None:
            return 0.0
        return float(os.pread(self.stopped_fd, 64, 0) or 0)


def _age_seconds() -> float:
    """Seconds since this process began: field 22 of proc(5)'s stat, after the name's bracket.

    Not by `watcher`: a result answers for the files that its trial imports.
    """
    ticks = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    started = int(ticks.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
