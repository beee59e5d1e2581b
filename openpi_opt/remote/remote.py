"""Trials on other hosts: an `Executor` over whatever engine starts a function there.

An engine (`ray_executor`, `slurm_executor`) starts `node.run` somewhere with one device and says
when it ended or was lost. What a trial is, its limits and its lease are the node's (`node.py`), and
what is measured next stays with the sweep.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import Executor, LostError, Task
from openpi_opt.engine.recovery import ALIVE, NODE_LOCK
from openpi_opt.errors import UserError
from openpi_opt.machine import Device, Machine
from openpi_opt.process import locks
from openpi_opt.process.child import StoppedError
from openpi_opt.process.devices import Lease, Slot
from openpi_opt.process.run import TRIAL_COMMAND, noted, whole_result
from openpi_opt.remote.node import Declined, Description, Order, read_note
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import ExecutorSettings, RaySettings, SlurmSettings
from openpi_opt.track.fingerprint import described, differences, source_hash
from openpi_opt.track.store import Store

# A node ends a trial within the grace of SIGTERM, or a second later when nobody holds the trial.
ENDING_SECONDS = 10.0


class Engine(Protocol):
    """Starts `node.describe` and `node.run` on nodes."""

    name: str

    def describe(self, lock: Path, token: str, display: Display) -> list[Description]:
        """Ask every kind of node that trials may run on; the lock's folder is for the engine, too.

        Raises UserError: no node can be asked. LostError: one did not answer.
        """

    def slots(self, device: Device) -> int:
        """How many trials to have started or queued at a time."""

    def run(self, order: Order, look: Callable[[], bool]) -> TrialResult | Declined:
        """Run a trial, now or when there is room; what `node.run` returned.

        Calls `look` several times in a second, which tells whether the process on the node is known
        to be gone. What that raises ends the trial, wherever it is, and is raised. Raises
        LostError: the engine, the node or the process ended it. UserError: the engine does not take
        it, or is gone.
        """

    def close(self) -> None:
        """Let go of the engine."""


@contextmanager
def connected(settings: ExecutorSettings, cpu_slots: int = 1) -> Iterator[Engine | None]:
    """The engine that `executor` names, let go of at the end; None for this host alone.

    Raises UserError: its package is missing, or it cannot be reached.
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

        Raises UserError: there is none, one does not see the store or its locks, or they would
        measure different things.
        """
        token = uuid4().hex
        folder = store.path / "nodes" / token
        folder.mkdir(parents=True)
        held = locks.take(folder / "probe.lock", token)
        assert held is not None  # the folder is new
        try:
            found = engine.describe(held.path, token, display)
        except LostError as error:
            raise UserError(
                f"executor={engine.name}: a node did not say what it is: {error}.\n"
                "It needs openpi_opt with its packages in the same place as here."
            ) from error
        finally:
            held.release(remove=True)
            shutil.rmtree(folder, ignore_errors=True)  # an engine's files may be on their way
        for one in found:
            if one.problem:
                raise UserError(
                    f"executor={engine.name}: {one.host} cannot be used: {one.problem}.\n"
                    "Sweep and nodes need one file system with the store (store=DIR), with locks."
                )
            _same(engine, found[0].fingerprint, one.fingerprint)
            there, here = one.fingerprint["source_hash"], source_hash()
            if there != here:
                raise UserError(
                    f"executor={engine.name}: {one.host} has another openpi_opt than this host "
                    f"(source {there}, here {here}).\n"
                    "Install the same one, or use one checkout on a shared file system."
                )
        machine = next((one.machine for one in found if one.machine.gpus), found[0].machine)
        return Nodes(engine, found, machine, cpu_slots, tuple(command))

    def fingerprint(self, device: Device) -> dict[str, Any]:
        """Of a trial on these nodes, as they describe themselves.

        Raises UserError: their GPUs are of different models.
        """
        gpus: list[Any] = [described(g) for one in self.found for g in one.machine.gpus_for(device)]
        seen = [{**self.found[0].fingerprint, "gpu": gpu} for gpu in gpus or [None]]
        for other in seen[1:]:
            _same(self.engine, seen[0], other)
        return seen[0]


def _same(engine: Engine, first: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    found = differences(first, other)
    if found:
        raise UserError(
            f"executor={engine.name}: the nodes are not of one kind ({'; '.join(found)}), so their "
            "latencies cannot be compared with one another.\n"
            "Name nodes of one kind: executor.resources for ray; executor.partition, "
            "executor.constraint or executor.nodelist for slurm."
        )


class RemoteExecutor(Executor):
    """The nodes of an engine as an `Executor`."""

    def __init__(self, nodes: Nodes, store: Store, display: Display, device: Device):
        super().__init__(store, display)
        self._nodes, self._engine = nodes, nodes.engine
        self._devices: list[Device] = [device]
        self._tickets: list[Lease] = []
        self._lost: list[str] = []

    def suits(self, slot: Slot, cfg: Config) -> bool:
        """Whether it is of the kind of device that the configuration names.

        Raises UserError: it names one GPU of this host.
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
        self._tickets = [ticket for ticket in self._tickets if ticket.held]
        for device in self._devices:
            names = {ticket.slot.name for ticket in self._tickets}
            for number in range(self._engine.slots(device)):
                name = f"{self._engine.name} {device} {number}"
                if name not in names:
                    ticket = Lease(Slot(name, device, None, ()))
                    self._tickets.append(ticket)
                    yield ticket

    def start(self, task: Task, lease: Lease) -> Future[TrialResult]:
        """Give the trial to the engine, and watch it in a thread."""
        # Made here: a name that was looked for in vain stays absent for a while on NFS.
        (task.folder / NODE_LOCK).touch()
        order = Order(
            cfg=task.cfg,
            uid=task.uid,
            folder=task.folder.resolve(),
            references=self.store.references.resolve(),
            caches=self.store.caches.resolve() / task.machine_hash,
            machine_hash=task.machine_hash,
            cpu_slots=self._nodes.cpu_slots,
            lost=tuple(self._lost),
            command=tuple(self._nodes.command),
        )
        return self.submit(self._watch, order, lease.slot.name)

    def _watch(self, order: Order, slot: str) -> TrialResult:
        shown = "", ""

        def look() -> bool:
            nonlocal shown
            if self.ending.is_set():
                (order.folder / ALIVE).unlink(missing_ok=True)  # what nobody holds, nobody wants
                raise StoppedError("the sweep ends")
            about = read_note(order.folder)
            if about != shown:
                shown = about
                self.display.phase(slot, f"{about[1]} on {about[0]}")
            return bool(about[0]) and not locks.is_held(order.folder / NODE_LOCK)

        try:
            answer = self._engine.run(order, look)
        except StoppedError:
            deadline = time.monotonic() + ENDING_SECONDS
            while locks.is_held(order.folder / NODE_LOCK) and time.monotonic() < deadline:
                time.sleep(0.1)
            raise
        except LostError as error:
            self._lost.append(order.uid)
            known = whole_result(order.folder, order.cfg)
            if known is not None:
                note = f"taken from disk: its node was lost afterwards ({error})"
                return noted(known, note[:500])
            raise LostError(str(error), read_note(order.folder)[1], error.outcome) from error
        if not isinstance(answer, Declined):
            (order.folder / NODE_LOCK).unlink(missing_ok=True)
            return answer
        if answer.kind == "failed":
            raise OSError(answer.why)
        if answer.kind == "refused":
            raise UserError(f"executor={self._engine.name}: {answer.why}.")
        if self.ending.is_set():
            raise StoppedError("the sweep ends")
        raise LostError(answer.why, read_note(order.folder)[1])
