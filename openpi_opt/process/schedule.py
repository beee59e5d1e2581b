"""Who may touch a device now: several trials prepare on it, one has it, the others stand still.

A trial imports, loads and compiles beside others. Before it checks and measures it asks for the
device (`Progress.ask`). It has the device until it says that it only reads its profile
(`Progress.free`), or until its process and all that it started are gone. Meanwhile the others
on that device are stopped by SIGSTOP, with everything below them: six stopped neighbours change
neither mean nor p99 of a captured call on an H100 (3.109 to 3.112 ms against 3.111 ms), running
ones do. A limit on a trial's time counts only while it is not stopped.

One process schedules a device: the one that holds its lease (`devices`). So nothing of this is in a
file. When that process ends, however it does, the watchers end what it had started (`watcher.py`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from openpi_opt.config import Config
from openpi_opt.measure.roofline import stage_work
from openpi_opt.process.child import Child, StoppedError
from openpi_opt.process.devices import Slot, float32_seats
from openpi_opt.process.run import noted
from openpi_opt.result import Failed, Ok, TrialResult

# A process inside a driver call stops when that ends. One that takes longer is named in the result.
_STOP_SECONDS = 10.0
# Kernels that a process had queued before it was stopped still run.
_SETTLE_SECONDS = 0.1
_POLL_SECONDS = 0.1
# Weights are held that a call does not read: most of the table of tokens.
_HELD = 1.3
# What a float32 policy and its inputs take more than 16 bits, in weights of 16 bits: 18.7 GiB in
# all, and 9.0 to 9.5 GiB afterwards (H100).
_FLOAT32 = 1.4
_CONTEXT_MIB = 2048  # a runtime's context and libraries, torch, activations
_MARGIN = 1.05  # between trials that differ in their knobs only


class DeviceLostError(Exception):
    """A process that cannot be killed may still use the device, so nobody else gets it."""


@dataclass(frozen=True)
class Need:
    """Memory that a trial takes in MiB; `float32` more of the device while it has such a policy."""

    device: float
    host: float
    float32: float = 0.0


@dataclass
class Room:
    """How many trials fit beside each other: by the memory of the GPU (None: unknown) and host."""

    device_mib: float | None
    host_mib: float
    _seen: dict[str, Need] = field(default_factory=dict)  # by context

    @staticmethod
    def of(slot: Slot, host_mib: float) -> Room:
        """The room that a slot has on a host with that much memory."""
        return Room(None if slot.gpu is None else slot.gpu.memory_mib, host_mib)

    def need(self, cfg: Config) -> Need:
        """From trials of the same context that have ended, else from the size of the weights."""
        seen = self._seen.get(cfg.context_hash())
        if cfg.model.name == "auto":
            cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"name": "pi0"})})
        weights = _HELD * sum(stage.weights for stage in stage_work(cfg).values()) / 2**20
        more = _FLOAT32 * weights
        if seen is not None:
            return Need(seen.device * _MARGIN + _CONTEXT_MIB, seen.host * _MARGIN, more)
        whole = weights + _CONTEXT_MIB
        return Need(whole, whole if self.device_mib else whole + weights, more)

    def learn(self, result: TrialResult) -> None:
        """Take in what a trial took."""
        if isinstance(result, Ok):
            seen = self._seen.get(result.context_hash, Need(0, 0))
            self._seen[result.context_hash] = Need(
                max(seen.device, result.memory.device_peak_mib or 0),
                max(seen.host, result.memory.host_peak_mib),
            )

    def holds(self, needs: list[Need]) -> bool:
        """Whether they fit beside each other. One alone always may try."""
        if len(needs) < 2:
            return True
        host = sum(need.host for need in needs)
        device = sum(need.device for need in needs)
        seats = min(float32_seats(self.device_mib), len(needs))
        device += seats * max(need.float32 for need in needs)
        return host <= self.host_mib and (self.device_mib is None or device <= self.device_mib)


class Turn:
    """A job's place in the line of its device, and its process there. Make it with `join`.

    The process inherits `gate` and `stopped`: it asks by the phase `wait`, then reads a byte from
    `gate`, and lets others have the device by the phase `report`; `stopped` holds for how many
    seconds it stood still, as text. As a context the turn leaves the line at its end.
    """

    def __init__(self, schedule: Schedule):
        self._schedule = schedule
        self.alone = False  # nobody else is on the device, or is to be
        self.need = Need(0, 0)
        self._reset()

    def _reset(self) -> None:
        self.gate = self.stopped = self.write = -1
        self.child: Child | None = None
        self.on = self.asked = False  # on the device; and it wants the device for itself
        self.freed = False  # it has measured, and had the device for itself
        self.beside = False  # others were there while it was
        self.withdrawn = False  # it was ended for others' sake
        self.disturbed: list[str] = []  # processes that ran while it had the device

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        with self._schedule.changed:
            self._schedule.line.remove(self)
            self._schedule.advance()

    def run(self, cfg: Config, start: Callable[[Turn], TrialResult]) -> TrialResult:
        """Run a process of `cfg` by `start`, and again alone when memory did not do beside others.

        Raises DeviceLostError behind what cannot be killed, and StoppedError when all is to end.
        """
        try:
            while True:
                self.need = self._schedule.room.need(cfg)
                result = self._once(start)
                if self.withdrawn:
                    continue
                self._schedule.room.learn(result)
                out = isinstance(result, Failed) and result.outcome == "oom"
                if self.alone or not (out and self.beside):
                    return self._noted(result)
                self.alone = True
        finally:
            self.alone = False

    def _once(self, start: Callable[[Turn], TrialResult]) -> TrialResult:
        """One process: begins while nobody has the device, and when there is memory for it."""
        self._reset()
        self.gate, self.write = os.pipe()
        self.stopped = os.memfd_create("stopped")
        try:
            self._schedule.let_in(self)
            result = start(self)
        finally:
            with self._schedule.changed:
                self.on = False
                self._schedule.free(self)
                for fd in (self.gate, self.write, self.stopped):
                    os.close(fd)
        if self.withdrawn:
            self._schedule.require_device()
        return result

    def _noted(self, result: TrialResult) -> TrialResult:
        if isinstance(result, Failed) and result.outcome == "oom" and self.alone:
            reason = f"{result.reason} (alone, after it had run out of memory beside other trials)"
            return result.model_copy(update={"reason": reason})
        if isinstance(result, Ok) and self.disturbed:
            names = ", ".join(self.disturbed)
            return noted(
                result, f"not all of its neighbours could be stopped while it was measured: {names}"
            )
        return result

    def began(self, child: Child) -> None:
        """Its process is there."""
        with self._schedule.changed:
            self.child = child
            if self.withdrawn:
                child.kill()
            elif self._schedule.taken:  # since this process was let in
                child.pause(_STOP_SECONDS)

    def asks(self) -> None:
        """It wants the device; asking again changes nothing."""
        with self._schedule.changed:
            if not self.asked:
                self.asked = True
                self._schedule.advance()

    def frees(self) -> None:
        """It needs the device no more; what it still computes stands still for the next."""
        with self._schedule.changed:
            if self._schedule.taken is self:
                self.asked, self.freed = False, True
                self._schedule.free(self)

    def ended(self, gone: bool) -> None:
        """It is over; not `gone`: something of it cannot be killed, and may keep the device."""
        with self._schedule.changed:
            self.child = None
            if not gone:
                self._schedule.lose(self)

    def withdraw(self) -> None:
        """End its process for others' sake."""
        self.withdrawn = True
        if self.child is not None:
            self.child.kill()


class Schedule:
    """The processes on one device. Every method may be called from any thread.

    With `in_order` the device is given in the order of the line, and else to the oldest that asks.
    `stop` ends all of it.
    """

    def __init__(self, stop: threading.Event, room: Room, in_order: bool = False):
        self.room = room
        self.changed = threading.Condition(threading.RLock())
        self.line: list[Turn] = []
        self.taken: Turn | None = None  # who has the device
        self.lost = False
        self.measured_seconds = 0.0
        self._stop, self._in_order = stop, in_order
        self._since = 0.0  # when the device was taken

    def join(self) -> Turn:
        """A place at the end of the line."""
        with self.changed:
            self.line.append(Turn(self))
            return self.line[-1]

    def on_device(self) -> list[Turn]:
        """Who has a process there."""
        return [turn for turn in self.line if turn.on]

    def advance(self) -> None:
        """Give the device to the next that asks, and let all go on when none does."""
        self.changed.notify_all()
        if self.taken is not None or self.lost or self._stop.is_set():
            return
        there = self.on_device()
        turn = next((each for each in self._heads() if each.on and each.asked), None)
        if turn is None:
            for each in there:
                if each.child is not None:
                    each.child.resume()
            return
        self.taken, self._since = turn, time.monotonic()
        others = [each.child for each in there if each is not turn and each.child]
        running = [child for child in others if not child.paused]
        for child in running:
            turn.disturbed += child.pause(_STOP_SECONDS)
        if running:
            time.sleep(_SETTLE_SECONDS)
        if turn.child is not None:
            turn.child.resume()
        os.write(turn.write, bytes([min(len(others), 255)]))

    def free(self, turn: Turn) -> None:
        """Take the device back from a turn, if it has it, and give it to the next."""
        if self.taken is turn:
            self.measured_seconds += time.monotonic() - self._since
            self.taken = None
        self.advance()

    def lose(self, by: Turn) -> None:
        """Something of `by` that cannot be killed is on the device: nobody gets it any more."""
        self.lost = True
        for each in self.on_device():
            # Who has the device, or had it, has only to read what was recorded of it.
            if each not in (by, self.taken) and not each.freed:
                each.withdraw()
        self.changed.notify_all()

    def require_device(self) -> None:
        """Raises DeviceLostError when nobody gets the device any more."""
        if self.lost:
            raise DeviceLostError("a process that cannot be killed has the device")

    def let_in(self, turn: Turn) -> None:
        """Wait while another has the device, or there is no memory left for the turn."""
        with self.changed:
            while not self._may_begin(turn):
                self.require_device()
                if self._stop.is_set():
                    raise StoppedError("ended before it had begun")
                self.changed.wait(_POLL_SECONDS)
            for each in self.on_device():
                each.beside = turn.beside = True
            turn.on = True

    def _heads(self) -> list[Turn]:
        """Who may have the device next."""
        return self.line[:1] if self._in_order else self.line

    def _may_begin(self, turn: Turn) -> bool:
        if self.lost or self._stop.is_set() or self.taken is not None:
            return False
        lonely = next((each for each in self._heads() if each.alone), None)
        head = self._in_order and self.line[0] is turn
        there = self.on_device()
        if turn.alone:
            if lonely is turn and head:  # who is behind it in the line waits for it, too
                for each in there:
                    each.withdraw()
            return lonely is turn and not there
        if lonely is not None:
            return False
        return head or self.room.holds([*(each.need for each in there), turn.need])
