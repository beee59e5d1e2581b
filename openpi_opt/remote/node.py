"""What runs on a node of another engine, and what it and the sweep say to each other.

The trial is a process of its own, supervised here exactly as on the sweep's own host: leased
device, cleaned environment, phases with their limits, nothing left behind. Whatever ends this
process ends the trial, which watches its pipe.

Files pass through the store, which sweep and nodes share. Locks on it say who is alive. The sweep
holds `alive.lock` of a trial, and removes it when it wants the trial no more. The node holds
`node.lock` as long as it works on it. An order is void without the first, so a job that a queue
starts late, or once more, measures nothing that was given up.
"""

from __future__ import annotations

import json
import os
import platform as python_platform
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from openpi_opt.config import Config, Platform
from openpi_opt.engine.recovery import ALIVE, NODE_LOCK
from openpi_opt.errors import UserError
from openpi_opt.machine import Gpu, Machine, probe
from openpi_opt.process import devices, locks
from openpi_opt.process.child import Place, StoppedError, end_marked
from openpi_opt.process.devices import Devices, DeviceSettings, Lease
from openpi_opt.process.locks import Held
from openpi_opt.process.run import TRIAL_COMMAND, run_trial, whole_result
from openpi_opt.result import TrialResult
from openpi_opt.track.fingerprint import decisive, fingerprint, fingerprint_hash

# How often to look whether the sweep still wants the trial, and for a device that others have.
_POLL_SECONDS = 1.0
# An earlier start of the same job may still be ending, and who asks for the lock shares it shortly.
_PREDECESSOR_SECONDS = 20.0


@dataclass(frozen=True)
class Description:
    """A node: its machine (all GPUs of the host), what is installed, and how it sees the store.

    `fingerprint` is of a trial on its CPU; `problem` says why the node cannot be used.
    """

    host: str
    machine: Machine
    fingerprint: dict[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Order:
    """One trial to run. All paths are absolute and lie in the store.

    `machine_hash` is of the fingerprint that was promised, `lost` are trials of this sweep whose
    processes a dead node agent may have left, and `command` is the trial's program.
    """

    cfg: Config
    uid: str
    folder: Path
    references: Path
    caches: Path
    machine_hash: str
    cpu_slots: int = 1
    lost: tuple[str, ...] = ()
    command: tuple[str, ...] = TRIAL_COMMAND[1:]


@dataclass(frozen=True)
class Declined:
    """An order without a result.

    `refused`: this node cannot take it. `void`: it was given up, or somebody else is at it.
    `failed`: the operating system refused.
    """

    kind: Literal["refused", "void", "failed"]
    why: str


def describe(lock: Path, token: str) -> Description:
    """This node; `lock` in the store is held by the sweep, with `token` in it."""
    machine, folder, problem = probe(hidden=True), lock.parent, ""
    _ = machine.aiter  # found here, and kept with it
    if locks.note(lock) != token:
        problem = (
            f"it does not see the store: {folder} is not the sweep's folder of that name there"
        )
    elif not locks.is_held(lock):
        problem = f"locks in {folder} do not reach it (NFS: version 4, or mounted without nolock)"
    seen = fingerprint(machine, Platform(device="cpu"))
    return Description(python_platform.node(), machine, seen, problem)


def run(order: Order) -> TrialResult | Declined:
    """Carry out an order."""
    held, host = None, python_platform.node()
    try:
        held = _take_up(order)
        if held is None:
            return Declined("void", "given up by its sweep, or run by another process")
        write_note(held, host, "wait")
        for uid in order.lost:
            end_marked(uid)
        return _carry_out(order, held, host)
    except OSError as error:
        return Declined("failed", str(error))
    except UserError as error:
        return Declined("refused", f"{host}: {error}")
    except StoppedError:
        return Declined("void", "its sweep ended it")
    finally:
        if held is not None:
            held.release()


def write_note(held: Held, host: str, phase: str) -> None:
    """Say on the node's lock where a trial is; a reader on another host sees it when it opens."""
    os.ftruncate(held.fd, 0)
    os.pwrite(held.fd, json.dumps([host, phase]).encode(), 0)
    os.fsync(held.fd)


def read_note(folder: Path) -> tuple[str, str]:
    """Host and phase of a trial; empty before a node has it."""
    try:
        host, phase = json.loads(locks.note(folder / NODE_LOCK))
    except ValueError:  # not yet written, or this moment
        return "", ""
    return host, phase


def _take_up(order: Order) -> Held | None:
    """The node's lock of the trial, if a sweep still wants it."""
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    while (held := locks.take(order.folder / NODE_LOCK)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    # In this order: a sweep that recovers looks at the sweep's lock first, then at this one.
    if held is not None and not locks.is_held(order.folder / ALIVE):
        held.release()
        return None
    return held


def _carry_out(order: Order, held: Held, host: str) -> TrialResult:
    cfg, visible = order.cfg, probe()
    gpu = next(iter(visible.gpus_for(cfg.device)), None)
    if gpu is None and cfg.device != "cpu":
        raise UserError(
            f"the engine gave it no {cfg.device.upper()} GPU that is visible "
            "(executor.gpus or executor.gres for slurm; ray start --num-gpus for ray)"
        )
    seen = fingerprint(visible, Platform(device=cfg.device))
    if fingerprint_hash(seen) != order.machine_hash:
        about = "; ".join(f"{key} {value}" for key, value in decisive(seen).items())
        raise UserError(f"another machine than the first node that was asked ({about})")
    result = whole_result(order.folder, cfg)
    if result is None:  # else of an earlier start of this job, which ended before it could answer
        with _watched(order) as stop, closing(_lease(order, gpu, stop)) as lease:
            fds = (held.fd, *lease.fds)
            result = run_trial(
                *(cfg, order.folder, order.references),
                lambda phase: write_note(held, host, phase),
                *(visible, Place(lease.slot, order.uid, order.caches, fds, stop)),
                command=(sys.executable, *order.command),
            )
    return result.model_copy(update={"fingerprint": seen})


def _lease(order: Order, gpu: Gpu | None, stop: Event) -> Lease:
    """Lease the device on this host, waiting for who has it.

    A GPU comes with its share of the host's cores, as if the host's own sweep had chosen it.
    """
    whole = probe(hidden=True)
    if gpu is None:
        slots = Devices(DeviceSettings(cpu_slots=order.cpu_slots), whole).slots("cpu")
    else:
        (slot,) = Devices(DeviceSettings(gpus=[gpu.uuid]), whole).slots(order.cfg.device)
        slots = [replace(slot, gpu=gpu)]  # its index as HIP counts in this process

    def busy() -> None:
        if stop.wait(_POLL_SECONDS):
            raise StoppedError("ended while it waited for a device")

    return devices.wait_for(slots, busy)


@contextmanager
def _watched(order: Order) -> Iterator[Event]:
    """A stop that is set when the sweep does not want the trial any more, or is gone."""
    stop, over = Event(), Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            with suppress(OSError):  # the file server may be away for a while
                if not locks.is_held(order.folder / ALIVE):
                    stop.set()
                    return

    watcher = Thread(target=watch, name="sweep", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        over.set()
        watcher.join()
