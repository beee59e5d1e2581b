"""Where trials are run: devices that are free, and a thread that watches each trial's process.

`Executor` is the seam for other engines than this host: what they need is a place that is free, a
trial started there, and its result as a future.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from openpi_opt.config import Config
from openpi_opt.machine import Machine
from openpi_opt.result import TrialResult
from openpi_opt.search import devices
from openpi_opt.search.child import Stop
from openpi_opt.search.devices import Devices, Lease, Slot
from openpi_opt.search.display import Display
from openpi_opt.search.process import Place
from openpi_opt.track.store import Store

_MOST_THREADS = 1024  # made when needed; there are never more trials than slots


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
    """

    contended: bool

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether `cfg` can run there; makes room for its kind of device known."""

    def count(self) -> int:
        """How many trials can run at a time, if nobody else uses the devices."""

    def free(self) -> Iterator[Lease]:
        """Places that are free now, each leased; to be released by the caller when not used."""

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
    """The devices of this host."""

    def __init__(self, run: Run, store: Store, machine: Machine, found: Devices, display: Display):
        self._run = run
        self._store = store
        self._machine = machine
        self._devices = found
        self._display = display
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="trial")
        self._stop = Stop()
        self._started: set[Future[TrialResult]] = set()
        self._ours: list[Lease] = []
        self._told = False
        self._gates: list[int] | None = None  # of trials that are not to measure yet
        self.contended = False

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
        """Slots that nobody uses. Says once who has them when others have all of them."""
        self._ours = [lease for lease in self._ours if lease.held]
        ours = {lease.slot for lease in self._ours}
        others = []
        for slot in self._devices.all():
            if slot in ours:
                continue
            lease = devices.lease(slot)
            if lease is None:
                others.append(slot)
            else:
                self.contended = False
                self._ours.append(lease)
                yield lease
        self.contended = bool(others)
        if others and not any(lease.held for lease in self._ours) and not self._told:
            self._told = True
            names = "; ".join(f"{slot.name} by {devices.holder(slot)}" for slot in others)
            self._display.note(f"waiting for a device: in use are {names}")

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Start the process, and a thread that watches it."""
        slot = lease.slot
        gate = self._gate()
        place = Place(
            slot=slot,
            uid=task.uid,
            caches=self._store.caches / task.machine_hash,
            fds=(*task.fds, *lease.fds),
            stop=self._stop,
            gate=gate,
        )

        def on_phase(name: str) -> None:
            self._display.phase(slot.name, name)

        def run() -> TrialResult:
            try:
                return self._run(
                    task.cfg, task.folder, self._store.references, on_phase, self._machine, place
                )
            finally:
                if gate is not None:
                    os.close(gate)

        future = self._threads.submit(run)
        self._started.add(future)
        future.add_done_callback(self._started.discard)
        return future

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Trials started in here load, compile and warm up, and measure when it ends."""
        gates: list[int] = []
        self._gates = gates
        try:
            yield
            for gate in gates:
                with contextlib.suppress(BrokenPipeError):  # it has ended
                    os.write(gate, b".")
        finally:
            self._gates = None
            for gate in gates:
                os.close(gate)

    def _gate(self) -> int | None:
        """What a trial reads from at its two gates: the one before it loads is open."""
        if self._gates is None:
            return None
        read, write = os.pipe()
        self._gates.append(write)
        os.write(write, b".")
        return read

    def stop(self, at_once: bool = False) -> None:
        """End all processes: with time to end themselves, or without."""
        self._stop.set(at_once)

    def close(self) -> None:
        """Wait for all that runs."""
        # Not by joining threads: a join that Ctrl-C interrupts takes its thread for ended (CPython
        # up to 3.12), and the trial that the thread was about to kill would outlive the sweep.
        wait(set(self._started))
        self._threads.shutdown(wait=True)
