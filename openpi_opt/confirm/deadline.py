"""Rounds of processes within a time: it ends them, never what they show."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

# A round is begun only when this many times what one took so far is left.
_MARGIN = 1.05


@dataclass
class Deadline:
    """`limit_s` seconds from now on, or no end with None."""

    limit_s: float | None
    _began: float = field(default_factory=lambda: time.monotonic())
    _first: float | None = None  # when the first round was begun

    def another(self, begun: int, done: float) -> bool:
        """Whether one more round would end in time, when so many were `begun` and `done`.

        Processes are started ahead, so some of the rounds that were begun have not ended: `done`
        counts processes, in rounds. The first round is begun in any case within the time.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = now
        if self.limit_s is None:
            return True
        left = _MARGIN * (now - self._first) / done * (begun + 1 - done) if done else 0.0
        return now - self._began + left <= self.limit_s
