"""How much of the time between the first trial and the last each device had a trial."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from openpi_opt.result import TrialResult


@dataclass(frozen=True)
class Use:
    """What one slot did: trials, seconds with one, and the seconds from first start to last end."""

    slot: str
    trials: int
    busy: float
    span: float

    def text(self) -> str:
        """For the end of a sweep."""
        trials = f"{self.trials} trial{'s' * (self.trials != 1)}"
        return f"{self.slot} {self.busy / self.span:.1%} ({trials})"


@dataclass
class Occupancy:
    """Starts and ends of trials by slot, on the monotonic clock.

    An end is when the trial's process was gone, not when the engine looked: what the engine takes
    to give a device its next trial counts as idle.
    """

    _spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def started(self, slot: str, future: Future[TrialResult]) -> None:
        """A trial was started on that slot, and ends with the future."""
        begin = time.monotonic()
        spans = self._spans.setdefault(slot, [])
        future.add_done_callback(lambda _: spans.append((begin, time.monotonic())))

    def uses(self) -> list[Use]:
        """Each slot's use over the time of all of them, in the order of their names."""
        spans = [span for found in self._spans.values() for span in found]
        if not spans:
            return []
        whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return [
            Use(slot, len(found), sum(end - begin for begin, end in found), whole)
            for slot, found in sorted(self._spans.items())
            if found
        ]
