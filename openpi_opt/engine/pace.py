"""How fast a sweep gets on: trials done, trials an hour, the best so far, the time that is left."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# The time of a trial is that of the latest ones: caches fill, and the points become alike.
_LATEST = 20
# At the beginning of a budget a trial that takes twice as long has to be 7% faster.
_HURRY = 0.1
# Autotuning takes two to ten minutes of a device; of a shorter budget than this that is too much.
_LONG_MINUTES = 240.0


@dataclass
class Pace:
    """The clock of one sweep, which begins when this is made. `minutes` is its budget, or None."""

    minutes: float | None = None
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    over: bool = False  # the minutes are, as `is_over` found
    _since: float = 0.0
    _begun: dict[str, float] = field(default_factory=dict)
    _lasted: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def began(self, uid: str) -> None:
        """A trial was started."""
        self._begun[uid] = self.clock()

    def ended(self, uid: str) -> None:
        """A trial has its result; one that was answered without a process does not count."""
        begun = self._begun.pop(uid, None)
        if begun is not None:
            self._lasted.append(self.clock() - begun)
            self.done += 1

    def share(self) -> float:
        """The part of the minutes that is over; 0 without a budget."""
        return 0.0 if self.minutes is None else self._passed() / (60 * self.minutes)

    def patience(self) -> float:
        """How much the seconds of a trial count for a sampler: less as the minutes pass."""
        return 0.0 if self.minutes is None else _HURRY * max(0.0, 1.0 - self.share())

    def is_short(self) -> bool:
        """Whether a trial that compiles for minutes, alone on its device, is too much of it."""
        return self.minutes is not None and self.minutes < _LONG_MINUTES

    def is_over(self) -> bool:
        """Whether a trial that begins now would likely end after the minutes; then it stays so."""
        self.over = self.over or self._would_end_late()
        return self.over

    def _would_end_late(self) -> bool:
        if self.minutes is None:
            return False
        now, lasted = self.clock(), self._lasted[-_LATEST:]
        usual = statistics.median(lasted) if lasted else 0.0
        # Those that run longer than that say more than those that have ended: the short ones.
        ages = [now - begun for begun in self._begun.values() if now - begun > usual]
        usual = statistics.median([*lasted, *ages]) if ages else usual
        return self._passed() + usual > 60 * self.minutes

    def text(self, position: str = "") -> str:
        """Trials done, how many an hour, and the time left: "12 done, 240/h, 7.5 min left".

        Without a budget the time is estimated where `position` says how many there are: "[3/12]".
        """
        passed = self._passed()
        words = [f"{self.done} done"]
        if self.done and passed:
            words.append(f"{3600 * self.done / passed:.0f}/h")
        if self.minutes is not None:
            words.append(f"{max(0.0, self.minutes - passed / 60):.1f} min left")
        elif self.done and (known := re.fullmatch(r"\[(\d+)/(\d+)\]", position)):
            left = (int(known[2]) - int(known[1])) * passed / self.done
            words += [f"about {left / 60:.1f} min left"] if left else []
        return ", ".join(words)

    def _passed(self) -> float:
        return self.clock() - self._since
