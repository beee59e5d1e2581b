"""Trials on other hosts: an `Executor` over whatever engine starts a function there.

An engine (`ray_executor`, `slurm_executor`) starts `node.run` somewhere with one device and says
when it ended or was lost. What a trial is, its limits and its lease are the node's (`node.py`), and
what is measured next stays with the sweep.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import LostError, Task
from openpi_opt.engine.recovery import ALIVE, NODE_LOCK
from openpi_opt.errors import UserError
from openpi_opt.machine import Device, Machine
from openpi_opt.process import locks
from openpi_opt.process.child import StoppedError
from openpi_opt.process.devices import Lease, Slot
from openpi_opt.process.run import TRIAL_COMMAND, whole_result
from openpi_opt.remote.orders import (
    Answer,
    Description,
    Order,
    Question,
    read_note,
)
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import ExecutorSettings, RaySettings, SlurmSettings
from openpi_opt.track.fingerprint import described, differences, source_hash
from openpi_opt.track.store import Store

_POLL_SECONDS = 0.5
# A node ends a trial within the grace of SIGTERM, or a second later when nobody holds the trial.
_ENDING_SECONDS = 10.0
_MOST_THREADS = 1024


class Handle(Protocol):
    """One call of a function on a node. Used from one thread."""

    def wait(self, seconds: float, gone: bool) -> bool:
        """Wait at most so long for its end; `gone`: the process on the node is known to be."""

    def answer(self) -> str:
        """What the function returned, after its end.

        Raises:
            LostError: the engine, the node or the process ended it.
        """

    def cancel(self) -> None:
        """End it, wherever it is. After its end this does nothing."""


class Engine(Protocol):
    """Starts `node.describe` and `node.run` on nodes."""

    name: str

    def describe(self, question: Question, display: Display, folder: Path) -> list[Description]:
        """Ask every kind of node that trials may run on. `folder` is for the engine's files.

        Raises:
            UserError: no node can be asked.
        """

    def slots(self, device: Device) -> int:
        """How many trials to have started or queued at a time."""

    def submit(self, order: Order, cfg: Config) -> Handle:
        """Start a trial, now or when there is room.

        Raises:
            UserError: the engine does not take it.
        """

    def close(self) -> None:
        """Let go of the engine."""


@contextmanager
def connected(settings: ExecutorSettings, cpu_slots: int = 1) -> Iterator[Engine | None]:
    """The engine that `executor` names, let go of at the end; None for this host alone.

    Raises:
        UserError: its package is missing, or it cannot be reached.
    """
    engine: Engine | None = None
    try:  # what an engine needs is imported only when it is named
        if isinstance(settings, RaySettings):
            from openpi_opt.remote.ray_executor import RayEngine

            engine = RayEngine(settings, cpu_slots)
        elif isinstance(settings, SlurmSettings):
            from openpi_opt.remote.slurm_executor import SlurmEngine

            engine = SlurmEngine(settings)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("ray", "submitit"):
            raise
        raise UserError(
            f"executor={settings.kind} needs the package {package}, which is not installed.\n"
            f"Install it here and on the nodes: pip install 'openpi_opt[{settings.kind}]'"
        ) from error
    try:
        yield engine
    finally:
        if engine is not None:
            engine.close()


@dataclass(frozen=True)
class Nodes:
    """What was found out about the nodes of an engine, and the machine that they all are."""

    engine: Engine
    found: list[Description]
    machine: Machine
    cpu_slots: int = 1
    command: Sequence[str] = TRIAL_COMMAND[1:]

    @staticmethod
    def ask(
        engine: Engine,
        store: Store,
        display: Display,
        cpu_slots: int = 1,
        command: Sequence[str] = TRIAL_COMMAND[1:],
    ) -> Nodes:
        """Ask the nodes of `engine`; `command` is the trials' program, behind Python.

        Raises:
            UserError: there is none, one does not see the store or its locks, or they would
                measure different things.
        """
        token = uuid4().hex
        folder = store.path / "nodes" / token
        folder.mkdir(parents=True)
        held = locks.take(folder / "probe.lock", token)
        assert held is not None  # the folder is new
        try:
            question = Question(lock=held.path, token=token)
            found = engine.describe(question, display, folder)
        finally:
            held.release(remove=True)
            shutil.rmtree(folder, ignore_errors=True)  # an engine's files may be on their way
        _check(engine, found)
        with_gpu = [one for one in found if one.machine["gpus"]]
        machine = (with_gpu or found)[0].as_machine()
        return Nodes(engine, found, machine, cpu_slots, tuple(command))

    def fingerprint(self, device: Device) -> dict[str, Any]:
        """Of a trial on these nodes, as they describe themselves.

        Raises:
            UserError: their GPUs are of different models.
        """
        base = self.found[0].fingerprint
        gpus = [gpu for one in self.found for gpu in one.as_machine().gpus_for(device)]
        for gpu in gpus[1:]:
            _same(self.engine, {**base, "gpu": described(gpus[0])}, {**base, "gpu": described(gpu)})
        return {**base, "gpu": described(gpus[0]) if gpus else None}


def _check(engine: Engine, found: Sequence[Description]) -> None:
    for one in found:
        if one.problem:
            raise UserError(
                f"executor={engine.name}: {one.host} cannot be used: {one.problem}.\n"
                "Sweep and nodes need one file system with the store (store=DIR), with locks."
            )
        _same(engine, found[0].fingerprint, one.fingerprint)
        if one.fingerprint["source_hash"] != source_hash():
            raise UserError(
                f"executor={engine.name}: {one.host} has another openpi_opt than this host "
                f"(source {one.fingerprint['source_hash']}, here {source_hash()}).\n"
                "Install the same one, or use one checkout on a shared file system."
            )


def _same(engine: Engine, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    found = differences(first, other)
    if found:
        raise UserError(
            f"executor={engine.name}: the nodes are not of one kind ({'; '.join(found)}), so their "
            "latencies cannot be compared with one another.\n"
            "Name nodes of one kind: executor.resources for ray; executor.partition, "
            "executor.constraint or executor.nodelist for slurm."
        )


@dataclass
class _Ticket(Lease):
    """Room for one more trial at the engine; the device is leased on the node."""

    locks: list[locks.Held] = field(default_factory=list)
    taken: bool = True

    @property
    def held(self) -> bool:
        return self.taken

    def release(self) -> None:
        self.taken = False


class RemoteExecutor:
    """The nodes of an engine as an `Executor`."""

    def __init__(self, nodes: Nodes, store: Store, display: Display, device: Device):
        self._nodes = nodes
        self._engine = nodes.engine
        self._store = store
        self._display = display
        self._devices: list[Device] = [device]
        self._tickets: list[_Ticket] = []
        self._lost: list[str] = []
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="trial")
        self._stop = threading.Event()
        self.contended = False

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether it is of the kind of device that the configuration names.

        Raises:
            UserError: it names one GPU of this host.
        """
        if cfg.platform.gpu is not None:
            raise UserError(
                f"platform.gpu={cfg.platform.gpu} names a GPU of this host, and with "
                f"executor={self._engine.name} the engine chooses. Leave it out."
            )
        if cfg.device not in self._devices:
            self._devices.append(cfg.device)
        return slot.device == cfg.device

    def count(self) -> int:
        """How many trials the engine is given at a time."""
        return sum(self._engine.slots(device) for device in self._devices)

    def free(self) -> Iterator[Lease]:
        """Room for more trials. It grows and shrinks with the engine."""
        self._tickets = [ticket for ticket in self._tickets if ticket.taken]
        for device in self._devices:
            names = {ticket.slot.name for ticket in self._tickets}
            for number in range(self._engine.slots(device)):
                name = f"{self._engine.name} {device} {number}"
                if name not in names:
                    ticket = _Ticket(Slot(name, device, None, ()))
                    self._tickets.append(ticket)
                    yield ticket

    def rest(self) -> None:
        """Nothing: nobody waits for this sweep's places."""

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Give the trial to the engine, and watch it in a thread."""
        # Made here: a name that was looked for in vain stays absent for a while on NFS.
        (task.folder / NODE_LOCK).touch()
        root = self._store
        order = Order(
            config=task.cfg.dump(),
            uid=task.uid,
            folder=task.folder.resolve(),
            references=root.references.resolve(),
            caches=root.caches.resolve() / task.machine_hash,
            fingerprint_hash=task.machine_hash,
            cpu_slots=self._nodes.cpu_slots,
            lost=tuple(self._lost),
            command=tuple(self._nodes.command),
        )
        return self._threads.submit(self._watch, order, task.cfg, lease.slot.name)

    def measured(self) -> dict[str, float]:
        """Nothing: that is known on the nodes."""
        return {}

    def stop(self) -> None:
        """End all trials."""
        self._stop.set()

    def close(self) -> None:
        """Wait for all threads."""
        self._threads.shutdown(wait=True)

    def _watch(self, order: Order, cfg: Config, slot: str) -> TrialResult:
        handle = self._engine.submit(order, cfg)
        shown, gone = ("", ""), False
        while not handle.wait(_POLL_SECONDS, gone):
            if self._stop.is_set():
                self._end(handle, order)
                raise StoppedError("the sweep ends")
            about = read_note(order.folder)
            if about[0]:
                gone = not locks.is_held(order.folder / NODE_LOCK)
            if about != shown:
                shown = about
                self._display.phase(slot, f"{about[1]} on {about[0]}")
        try:
            answer = Answer.model_validate_json(handle.answer())
        except LostError as error:
            self._lost.append(order.uid)
            known = whole_result(order.folder, cfg)
            if known is not None:
                note = f"taken from disk: its node was lost afterwards ({error})"
                return known.model_copy(update={"notes": [*known.notes, note[:500]]})
            raise LostError(str(error), read_note(order.folder)[1], error.outcome) from error
        if answer.kind == "result":
            (order.folder / NODE_LOCK).unlink(missing_ok=True)
            return results.parse(answer.text)
        if answer.kind == "failed":
            raise OSError(answer.text)
        if answer.kind == "refused":
            raise UserError(f"executor={self._engine.name}: {answer.text}.")
        if self._stop.is_set():
            raise StoppedError("the sweep ends")
        raise LostError(answer.text, read_note(order.folder)[1])

    def _end(self, handle: Handle, order: Order) -> None:
        """End a trial, and wait until its node has; nobody holds it for the node afterwards."""
        (order.folder / ALIVE).unlink(missing_ok=True)  # what nobody holds, nobody wants
        handle.cancel()
        deadline = time.monotonic() + _ENDING_SECONDS
        while locks.is_held(order.folder / NODE_LOCK) and time.monotonic() < deadline:
            time.sleep(0.1)
