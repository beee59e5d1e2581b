"""What a sweep and its nodes say to each other, as JSON text that any engine can carry.

Files pass through the store, which sweep and nodes share. Locks on it say who is alive. The sweep
holds `alive.lock` of a trial, and removes it when it wants the trial no more. The node holds
`node.lock` as long as it works on it. An order is void without the first, so a job that a queue
starts late, or once more, measures nothing that was given up.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter

from openpi_opt.engine.recovery import ALIVE, NODE_LOCK
from openpi_opt.machine import AiterPackage, Machine
from openpi_opt.process import locks
from openpi_opt.process.locks import Held
from openpi_opt.process.run import TRIAL_COMMAND

_MACHINE = TypeAdapter(Machine)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def dumped(self) -> str:
        """As JSON."""
        return self.model_dump_json()


class Question(_Message):
    """What are you, and do you see this store? `lock` is held by the sweep, with `token` in it."""

    lock: Path
    token: str


class Description(_Message):
    """A node: its machine (all GPUs of the host), what is installed, and how it sees the store.

    `fingerprint` is of a trial on its CPU; `problem` says why the node cannot be used.
    """

    host: str
    machine: dict[str, Any]
    aiter: dict[str, Any] | None
    fingerprint: dict[str, Any]
    problem: str = ""

    def as_machine(self) -> Machine:
        """The machine, with the `aiter` that was found there instead of the one here."""
        machine = _MACHINE.validate_python(self.machine)
        # Where `cached_property` keeps it.
        vars(machine)["aiter"] = self.aiter and AiterPackage(**self.aiter)
        return machine


def as_plain(machine: Machine) -> dict[str, Any]:
    """A machine as `Description` carries it."""
    plain: dict[str, Any] = _MACHINE.dump_python(machine, mode="json")
    return plain


class Order(_Message):
    """One trial to run. All paths are absolute and lie in the store.

    `fingerprint_hash` is of the machine that was promised, `lost` are trials of this sweep whose
    processes a dead node agent may have left, and `command` is the trial's program.
    """

    config: dict[str, Any]
    uid: str
    folder: Path
    references: Path
    caches: Path
    fingerprint_hash: str
    cpu_slots: int = 1
    lost: tuple[str, ...] = ()
    command: tuple[str, ...] = TRIAL_COMMAND[1:]


class Answer(_Message):
    """What became of an order.

    `result`: the result document of a trial. `refused`: why this node cannot take it. `void`: the
    order was given up, or somebody else is at it. `failed`: the operating system refused.
    """

    kind: Literal["result", "refused", "void", "failed"]
    text: str = ""


def is_wanted(folder: Path) -> bool:
    """Whether a sweep still wants this trial; asked on the node.

    Raises:
        OSError: the store cannot be reached.
    """
    return locks.is_held(folder / ALIVE)


def write_note(held: Held, host: str, phase: str) -> None:
    """Say on the node's lock where a trial is; a reader on another host sees it when it opens."""
    note = json.dumps({"host": host, "phase": phase}).encode()
    os.ftruncate(held.fd, 0)
    os.pwrite(held.fd, note, 0)
    os.fsync(held.fd)


def read_note(folder: Path) -> tuple[str, str]:
    """Host and phase of a trial; empty before a node has it."""
    try:
        about = json.loads(locks.note(folder / NODE_LOCK))
    except ValueError:  # not yet written, or this moment
        return "", ""
    return str(about["host"]), str(about["phase"])
