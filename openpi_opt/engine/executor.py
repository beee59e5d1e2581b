"""Where trials are run: devices that are free, and a thread that watches each trial's process.

`Executor` is the seam for other engines than this host: what they need is a place that is free, a
trial started there, and its result as a future.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.machine import Machine
from openpi_opt.process import devices
from openpi_opt.process.child import Stop
from openpi_opt.process.devices import Devices, Lease, Slot, Wanting
from openpi_opt.process.occupancy import Occupancy
from openpi_opt.process.run import Place
from openpi_opt.process.turns import Line, Turn
from openpi_opt.result import Failed, TrialResult
from openpi_opt.track.store import Store

_MOST_THREADS = 1024  # made when needed; there are never more trials than two for each slot
# Phases in which the device is not wanted yet; `start`, the first, is never told.
_BEFORE_DEVICE = ("import", "wait")
# A GPU that another sweep waits for is left to it for so long: it looks four times a second.
_LEFT_TO_OTHERS_SECONDS = 1.0


class Run(Protocol):
    """Runs one trial to its end; `process.run_trial` and what stands in for it."""

    def __call__(
        self,
        cfg: Config,
        trial_dir: Path,
        store_references: Path,
        on_phase: Callable[[str], None],
        machine: Machine | None = None,
        place: Place | None = None,
    ) -> TrialResult:
        """The result of `cfg`, whatever became of it."""


class LostError(Exception):
    """A trial ended with the node or the process that ran it: whether it works is not known.

    `phase` is the last that was seen, empty before the trial had begun; `outcome` is what it is
    called when it is not tried again.
    """

    def __init__(
        self, reason: str, phase: str = "", outcome: Literal["crashed", "oom"] = "crashed"
    ):
        super().__init__(reason)
        self.phase = phase
        self.outcome = outcome


@dataclass(frozen=True)
class Task:
    """A trial to run. `fds` are locks for it to hold; `machine_hash` is its fingerprint's."""

    cfg: Config
    uid: str
    folder: Path
    machine_hash: str
    fds: tuple[int, ...] = ()


class Executor(Protocol):
    """Somewhere to run trials, used from one thread.

    `contended`: `free` would have yielded more, but others have them; ask again after a while.
    `occupancy` knows when trials had the devices.
    """

    contended: bool
    occupancy: Occupancy

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether `cfg` can run there; makes room for its kind of device known."""

    def count(self) -> int:
        """How many trials can have a device at a time, if nobody else uses the devices."""

    def free(self) -> Iterator[Lease]:
        """Places that are free now, each leased; to be released by the caller when not used."""

    def rest(self) -> None:
        """There is nothing to start at the moment: others need not leave a place to this sweep."""

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Run a trial there. The lease stays the caller's to release, when the future is done.

        The future may raise `LostError`, when another place can try it again.
        """

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """While the caller keeps this host busy: trials started here measure only afterwards."""

    def stop(self, at_once: bool = False) -> None:
        """End all that runs; the futures then raise `StoppedError`."""

    def close(self) -> None:
        """Wait for the end of all that runs."""


class LocalExecutor:
    """The devices of this host.

    Where a slot has two seats, the next trial is started in the one while the other's has the
    device, and waits at its gate (`turns`). Both have leases that share the device's lock.
    """

    def __init__(self, run: Run, store: Store, machine: Machine, found: Devices, display: Display):
        self._run = run
        self._store = store
        self._machine = machine
        self._devices = found
        self._display = display
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="trial")
        self._stop = Stop()
        self._started: set[Future[TrialResult]] = set()
        self._ours: dict[Slot, list[Lease]] = {}  # by the whole slot
        self._lines: dict[Slot, Line] = {}  # by the whole slot, of those with two seats
        self._given_up: dict[Slot, float] = {}  # when, of those with two seats
        self._wanting = Wanting()
        self._told = False
        self._loading: list[tuple[Line, Turn]] | None = None  # who is not to measure yet
        self.contended = False
        self.occupancy = Occupancy()

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether it is of the kind, and the GPU, that the configuration names."""
        self._devices.slots(cfg.device)
        number = cfg.platform.gpu
        if slot.device != cfg.device:
            return False
        return number is None or slot.gpu == self._machine.gpus_for(cfg.device)[number]

    def count(self) -> int:
        """Number of slots."""
        return len(self._devices.all())

    def free(self) -> Iterator[Lease]:
        """Slots that nobody uses, then second seats of those that this sweep uses.

        Says once who has the slots when others have all of them, and as long as that is so, to
        other sweeps that this one waits.
        """
        self._forget_released()
        others, left = [], 0
        for slot in self._devices.all():
            if self._ours.get(slot):
                continue
            if self._is_left_to_others(slot):
                left += 1
                continue
            lease = None if self._is_stuck(slot) else devices.lease(slot)
            if lease is None:
                others.append(slot)
            else:
                self.contended = False
                self._wanting.release()
                lease.slot = self._devices.seats(slot)[0]
                self._ours[slot] = [lease]
                yield lease
        self._forget_released()
        for slot in self._devices.all():
            lease = self._second(slot)
            if lease is not None:
                self._ours[slot].append(lease)
                yield lease
        self.contended = bool(others) or left > 0
        if not others or left or any(self._held(slot) for slot in self._ours):
            return
        self._wanting.add(slot for slot in others if slot.gpu is not None)
        if not self._told:
            self._told = True
            self._display.note(devices.in_use(others))

    def rest(self) -> None:
        """Do not ask others for their devices any more, until `free` is asked again."""
        self._wanting.release()

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Start the process, and a thread that watches it."""
        slot = lease.slot
        whole = next(own for own, leases in self._ours.items() if lease in leases)
        line = None
        if len(self._devices.seats(whole)) > 1:
            line = self._lines.setdefault(whole, Line(self._stop))
        elif self._loading is not None:
            line = Line(self._stop)  # of this trial alone
        turn = None if line is None else line.join(measures=self._loading is None)
        if self._loading is not None and line is not None and turn is not None:
            self._loading.append((line, turn))
        stay = self.occupancy.stay(whole.name)
        if slot.gpu is None:
            stay.begin()
        else:
            self.occupancy.imports_aside = True
        place = Place(
            slot=slot,
            uid=task.uid,
            caches=self._store.caches / task.machine_hash,
            fds=(*task.fds, *lease.fds),
            stop=self._stop,
            gate=None if turn is None else turn.gate,
        )

        def on_phase(name: str) -> None:
            if name not in _BEFORE_DEVICE:
                stay.begin()
            self._display.phase(slot.name, name)

        def work() -> TrialResult:
            try:
                result = self._run(
                    task.cfg, task.folder, self._store.references, on_phase, self._machine, place
                )
            finally:
                stay.end()
                if line is not None and turn is not None:
                    line.leave(turn)
            if turn is not None and turn.withdrawn and isinstance(result, Failed):
                raise LostError(f"{whole.name} has a process that cannot be killed", "wait")
            return result

        future = self._threads.submit(work)
        self._started.add(future)
        future.add_done_callback(self._started.discard)
        return future

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Trials started in here load, compile and warm up, and measure when it ends."""
        begun: list[tuple[Line, Turn]] = []
        self._loading = begun
        try:
            yield
        except BaseException:
            for line, turn in begun:
                line.withdraw(turn)
            raise
        finally:
            self._loading = None
        for line, turn in begun:
            line.let_measure(turn)

    def stop(self, at_once: bool = False) -> None:
        """End all processes: with time to end themselves, or without."""
        self._stop.set(at_once)

    def close(self) -> None:
        """Wait for all that runs."""
        # Not by joining threads: a join that Ctrl-C interrupts takes its thread for ended (CPython
        # up to 3.12), and the trial that the thread was about to kill would outlive the sweep.
        wait(set(self._started))
        self._threads.shutdown(wait=True)
        self._wanting.release()

    def _held(self, slot: Slot) -> list[Lease]:
        return [lease for lease in self._ours.get(slot, []) if lease.held]

    def _forget_released(self) -> None:
        for slot, leases in self._ours.items():
            held = self._held(slot)
            if leases and not held and len(self._devices.seats(slot)) > 1:
                self._given_up[slot] = time.monotonic()
            self._ours[slot] = held

    def _is_left_to_others(self, slot: Slot) -> bool:
        """Whether it was ours right now and somebody waits for it: sweeps take turns."""
        given_up = self._given_up.get(slot)
        if given_up is None or time.monotonic() - given_up > _LEFT_TO_OTHERS_SECONDS:
            return False
        return self._is_wanted(slot)

    def _is_wanted(self, slot: Slot) -> bool:
        """Whether another sweep or a confirmation waits for it."""
        return slot not in self._wanting and devices.is_wanted(slot)

    def _is_stuck(self, slot: Slot) -> bool:
        """Whether a process of ours that could not be killed may still have it."""
        line = self._lines.get(slot)
        return line is not None and line.stuck

    def _second(self, slot: Slot) -> Lease | None:
        """The seat that is left of a slot of ours, unless somebody waits for it."""
        taken = self._held(slot)
        left = [
            seat for seat in self._devices.seats(slot) if all(lease.slot != seat for lease in taken)
        ]
        if not (taken and left) or self._is_stuck(slot) or self._is_wanted(slot):
            return None
        return taken[0].share(left[0])
