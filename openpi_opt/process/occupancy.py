"""How much of the time each device had a trial, and not one that was still starting or gone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Use:
    """What one device did: trials that had it, seconds with one, and the seconds of all devices
    together, from when the first trial had one to the end of the last."""

    device: str
    trials: int
    busy: float
    span: float

    def text(self) -> str:
        """For the end of a sweep."""
        trials = f"{self.trials} trial{'s' * (self.trials != 1)}"
        return f"{self.device} {self.busy / self.span:.1%} ({trials})"


@dataclass
class Stay:
    """One trial on a device, told from the thread that watches it."""

    _device: str
    _spans: dict[str, list[tuple[float, float]]]
    _began: float | None = None

    def begin(self) -> None:
        """It has the device. Again is nothing."""
        if self._began is None:
            self._began = time.monotonic()

    def end(self) -> None:
        """Its process is gone; when it never had the device it does not count."""
        if self._began is not None:
            self._spans.setdefault(self._device, []).append((self._began, time.monotonic()))


@dataclass
class Occupancy:
    """When trials had devices, on the monotonic clock.

    A GPU of this host is had from when a trial has imported what it needs and passed its gate,
    which is when its process says the phase after that; cores and nodes from when it is started.
    The end is when the process is gone, not when the engine looked. So what a GPU waits for Python
    and imports, or for the engine, counts as idle.
    """

    imports_aside: bool = False  # it is about GPUs of this host
    _spans: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def stay(self, device: str) -> Stay:
        """For a trial that is being started for that device."""
        return Stay(device, self._spans)

    def uses(self) -> list[Use]:
        """Each device's use over the time of all of them, in the order of their names."""
        spans = [span for found in self._spans.values() for span in found]
        if not spans:
            return []
        whole = max(end for _, end in spans) - min(begin for begin, _ in spans)
        return [
            Use(device, len(found), sum(end - begin for begin, end in found), whole)
            for device, found in sorted(self._spans.items())
        ]

    def text(self) -> str:
        """For the end of a sweep; empty when no device had a trial."""
        uses = self.uses()
        if not uses:
            return ""
        aside = " (imports not counted)" if self.imports_aside else ""
        return f"in use over {uses[0].span:.0f} s{aside}: {', '.join(u.text() for u in uses)}"
