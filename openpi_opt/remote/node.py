"""What runs on a node of another engine: it describes the node, and runs one trial there.

The trial is a process of its own, supervised here exactly as on the sweep's own host: leased
device, cleaned environment, phases with their limits, nothing left behind. Whatever ends this
process ends the trial, which watches its pipe.
"""

from __future__ import annotations

import dataclasses
import platform as python_platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from openpi_opt.config import Config, Platform
from openpi_opt.engine.recovery import NODE_LOCK
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine, probe
from openpi_opt.process import devices, locks
from openpi_opt.process.child import Stop, StoppedError
from openpi_opt.process.devices import Devices, Lease, Slot
from openpi_opt.process.leftovers import end_marked
from openpi_opt.process.locks import Held
from openpi_opt.process.run import Place, run_trial, whole_result
from openpi_opt.remote.orders import (
    Answer,
    Description,
    Order,
    Question,
    as_plain,
    is_wanted,
    write_note,
)
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import DeviceSettings
from openpi_opt.track.fingerprint import decisive, fingerprint, fingerprint_hash

# How often to look whether the sweep still wants the trial, and for a device that others have.
_POLL_SECONDS = 1.0
# An earlier start of the same job may still be ending, and who asks for the lock shares it shortly.
_PREDECESSOR_SECONDS = 20.0


def describe(question: str) -> str:
    """Answer a `Question` with a `Description`, both as JSON."""
    asked = Question.model_validate_json(question)
    machine = probe(hidden=True)
    aiter = machine.aiter
    return Description(
        host=python_platform.node(),
        machine=as_plain(machine),
        aiter=aiter and dataclasses.asdict(aiter),
        fingerprint=fingerprint(machine, Platform(device="cpu")),
        problem=_store_problem(asked),
    ).dumped()


def _store_problem(asked: Question) -> str:
    folder = asked.lock.parent
    if locks.note(asked.lock) != asked.token:
        return f"it does not see the store: {folder} is not the sweep's folder of that name there"
    if not locks.is_held(asked.lock):
        return f"locks in {folder} do not reach it (NFS: version 4, or mounted without nolock)"
    return ""


def run(order: str) -> str:
    """Carry out an `Order` and return its `Answer`, both as JSON."""
    asked = Order.model_validate_json(order)
    try:
        return _answer(asked).dumped()
    except OSError as error:
        return Answer(kind="failed", text=str(error)).dumped()


class _RefusedError(Exception):
    """This node cannot take the order."""


def _answer(order: Order) -> Answer:
    held = _take_up(order)
    if held is None:
        return Answer(kind="void", text="given up by its sweep, or run by another process")
    try:
        host = python_platform.node()
        write_note(held, host, "wait")
        for uid in order.lost:
            end_marked(uid)
        result = _carry_out(order, held, host)
    except (_RefusedError, UserError) as error:
        return Answer(kind="refused", text=f"{host}: {error}")
    except StoppedError:
        return Answer(kind="void", text="its sweep ended it")
    finally:
        held.release()
    return Answer(kind="result", text=result.model_dump_json())


def _take_up(order: Order) -> Held | None:
    """The node's lock of the trial, if it is still wanted.

    Raises:
        OSError: the trial's folder is not here.
    """
    deadline = time.monotonic() + _PREDECESSOR_SECONDS
    while True:
        held = locks.take(order.folder / NODE_LOCK)
        if held is not None or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    # In this order: a sweep that recovers looks at the sweep's lock first, then at this one.
    if held is not None and not is_wanted(order.folder):
        held.release()
        return None
    return held


def _carry_out(order: Order, held: Held, host: str) -> TrialResult:
    cfg = Config.load(order.config)
    whole = probe(hidden=True)
    visible = probe()
    number = _own_gpu(cfg, whole, visible)
    seen = fingerprint(whole, Platform(device=cfg.device, gpu=number))
    if fingerprint_hash(seen) != order.fingerprint_hash:
        about = "; ".join(f"{key} {value}" for key, value in decisive(seen).items())
        raise _RefusedError(f"another machine than the first node that was asked ({about})")
    known = whole_result(order.folder, cfg)
    if known is not None:  # of an earlier start of this job, which ended before it could answer
        return known.model_copy(update={"fingerprint": seen})
    with _watched(order) as stop:
        lease = _lease(order, cfg, whole, visible, number, stop)
        try:
            place = Place(
                slot=lease.slot,
                uid=order.uid,
                caches=order.caches,
                fds=(held.fd, *lease.fds),
                stop=stop,
            )
            result = run_trial(
                *(cfg, order.folder, order.references),
                lambda phase: write_note(held, host, phase),
                *(visible, place),
                command=(sys.executable, *order.command),
            )
        finally:
            lease.release()
    return result.model_copy(update={"fingerprint": seen})


def _own_gpu(cfg: Config, whole: Machine, visible: Machine) -> int | None:
    """Number among the host's GPUs of the one that the engine gave to this process."""
    if cfg.device == "cpu":
        return None
    shown = visible.gpus_for(cfg.device)
    if not shown:
        raise _RefusedError(
            f"the engine gave it no {cfg.device.upper()} GPU that is visible "
            "(executor.gpus or executor.gres for slurm; ray start --num-gpus for ray)"
        )
    uuids = [gpu.uuid for gpu in whole.gpus_for(cfg.device)]
    return uuids.index(shown[0].uuid)


def _lease(
    order: Order, cfg: Config, whole: Machine, visible: Machine, number: int | None, stop: Stop
) -> Lease:
    """Lease the device on this host, waiting for who has it.

    A GPU comes with its share of the host's cores, as if the host's own sweep had chosen it.
    """
    if number is None:
        slots = Devices(DeviceSettings(cpu_slots=order.cpu_slots), whole).slots("cpu")
    else:
        uuid = whole.gpus_for(cfg.device)[number].uuid
        (slot,) = Devices(DeviceSettings(gpus=[uuid]), whole).slots(cfg.device)
        # Its index as HIP counts in this process.
        own = next(gpu for gpu in visible.gpus_for(cfg.device) if gpu.uuid == uuid)
        slots = [Slot(slot.name, slot.device, own, slot.cores)]

    def busy() -> None:
        if stop.wait(_POLL_SECONDS):
            raise StoppedError("ended while it waited for a device")

    return devices.wait_for(slots, busy)


@contextmanager
def _watched(order: Order) -> Iterator[Stop]:
    """A stop that is set when the sweep does not want the trial any more, or is gone."""
    stop, over = Stop(), threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            try:
                wanted = is_wanted(order.folder)
            except OSError:  # the file server is away for a while
                continue
            if not wanted:
                stop.set()
                return

    watcher = threading.Thread(target=watch, name="sweep", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        over.set()
        watcher.join()
