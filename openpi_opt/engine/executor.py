"""Where trials are run: devices that are free, and a thread that watches each trial.

`Executor` is the seam for other engines than this host (`remote`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.machine import Machine
from openpi_opt.process import devices
from openpi_opt.process.child import Place
from openpi_opt.process.devices import Devices, Lease, Queue, Slot
from openpi_opt.process.run import Run
from openpi_opt.process.schedule import DeviceLostError, Room, Schedule, Turn
from openpi_opt.result import TrialResult
from openpi_opt.track.store import Store

_MOST_THREADS = 1024  # made when needed


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


class Executor(ABC):
    """Somewhere to run trials, used from one thread.

    `contended`: `free` would have yielded more, but others have them; ask again after a while.
    """

    def __init__(self, store: Store, display: Display):
        self.store, self.display = store, display
        self.ending = Event()
        self.contended = False
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="trial")
        self._started: set[Future[TrialResult]] = set()

    @abstractmethod
    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether `cfg` can run there; makes room for its kind of device known."""

    @abstractmethod
    def count(self) -> int:
        """How many trials can have a device at a time, if nobody else uses the devices."""

    @abstractmethod
    def free(self) -> Iterator[Lease]:
        """Places that are free now, each leased; to be released by the caller when not used."""

    @abstractmethod
    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Run a trial there. The lease stays the caller's to release, when the future is done.

        The future raises `LostError` when another place can try it again, and `StoppedError` after
        `stop`.
        """

    def rest(self) -> None:  # noqa: B027  not all have others
        """There is nothing to start at the moment: others need not leave a place to this sweep."""

    def measured(self) -> dict[str, float]:
        """Seconds in which a trial had each device for itself; empty where that is not known."""
        return {}

    def stop(self) -> None:
        """End all that runs."""
        self.ending.set()

    def submit(self, work: Callable[..., TrialResult], *given: object) -> Future[TrialResult]:
        """Call `work` in a thread that `close` waits for."""
        future = self._threads.submit(work, *given)
        self._started.add(future)
        future.add_done_callback(self._started.discard)
        return future

    def close(self) -> None:
        """Wait for the end of all that runs."""
        # Not by joining threads: a join that Ctrl-C interrupts takes its thread for ended (CPython
        # up to 3.12), and the trial that the thread was about to kill would outlive the sweep.
        wait(set(self._started))
        self._threads.shutdown(wait=True)
        self.rest()


class LocalExecutor(Executor):
    """The devices of this host: several trials prepare on each, one at a time measures."""

    def __init__(self, run: Run, store: Store, machine: Machine, found: Devices, display: Display):
        super().__init__(store, display)
        self._run, self._machine, self._devices = run, machine, found
        self._ours: dict[Slot, list[Lease]] = {}  # of places, by the whole slot
        self._schedules: dict[Slot, Schedule] = {}
        self._queue = Queue()
        self._told = False

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether it is of the kind, and the GPU, that the configuration names."""
        self._devices.slots(cfg.device)
        number = cfg.platform.gpu
        if slot.device != cfg.device:
            return False
        return number is None or slot.gpu == self._machine.gpus_for(cfg.device)[number]

    def count(self) -> int:
        """Number of places."""
        return sum(len(self._devices.places(slot)) for slot in self._devices.all())

    def free(self) -> Iterator[Lease]:
        """Places on slots that nobody uses, then further ones on those that this sweep uses.

        Says once who has the slots when others have all of them. On a slot that another process
        waits for no trial is started beside one, so that it is free when that has ended.
        """
        others = []
        for slot in self._devices.all():
            if not self._held(slot):
                lease = self._queue.lease(slot)
                if lease is None:
                    others.append(slot)
                else:
                    yield self._first(slot, lease)
        for slot in self._devices.all():
            while (place := self._further(slot)) is not None:
                yield place
                if not place.held:  # there is no trial for it
                    break
        self.contended = bool(others)
        if others and not self._told and not any(self._held(slot) for slot in self._ours):
            self._told = True
            self.display.note(devices.in_use(others))

    def rest(self) -> None:
        """Do not wait for devices of others any more, until `free` is asked again."""
        self._queue.leave(self._devices.all())

    def measured(self) -> dict[str, float]:
        """Seconds in which a trial had each device for itself."""
        return {slot.name: each.measured_seconds for slot, each in self._schedules.items()}

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Start the process when its device's schedule lets it, and a thread that watches it."""
        whole = next(own for own, leases in self._ours.items() if lease in leases)
        return self.submit(self._work, task, lease, self._schedules[whole])

    def _work(self, task: Task, lease: Lease, schedule: Schedule) -> TrialResult:
        def start(turn: Turn) -> TrialResult:
            place = Place(
                slot=lease.slot,
                uid=task.uid,
                caches=self.store.caches / task.machine_hash,
                fds=(*task.fds, *lease.fds),
                stop=self.ending,
                turn=turn,
            )

            def on_phase(name: str) -> None:
                self.display.phase(lease.slot.name, name)

            references = self.store.references
            return self._run(task.cfg, task.folder, references, on_phase, self._machine, place)

        with schedule.join() as turn:
            try:
                return turn.run(task.cfg, start)
            except DeviceLostError as error:
                raise LostError(f"{lease.slot.name}: {error}", "wait") from error

    def _held(self, slot: Slot) -> list[Lease]:
        """Our places there that were not given back."""
        self._ours[slot] = [lease for lease in self._ours.get(slot, []) if lease.held]
        return self._ours[slot]

    def _first(self, slot: Slot, lease: Lease) -> Lease:
        """The first place of a slot that was just leased, with a schedule of its own."""
        old = self._schedules.get(slot)
        host_mib = self._machine.memory_mib / len(self._devices.all())
        self._schedules[slot] = Schedule(self.ending, old.room if old else Room.of(slot, host_mib))
        self._schedules[slot].measured_seconds = old.measured_seconds if old else 0.0
        lease.slot = self._devices.places(slot)[0]
        self._ours[slot] = [lease]
        return lease

    def _further(self, slot: Slot) -> Lease | None:
        """Another place beside trials of ours, unless somebody waits for the slot."""
        taken = self._held(slot)
        used = {lease.slot for lease in taken}
        left = [place for place in self._devices.places(slot) if place not in used]
        if not (taken and left) or self._schedules[slot].lost or self._queue.is_wanted(slot):
            return None
        lease = taken[0].share(left[0])
        self._ours[slot].append(lease)
        return lease
