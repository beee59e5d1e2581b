"""Ways to break the engine on purpose, inside a sweep of stubs: what a stress run has to notice.

`tear` is no defect but a kill at the worst moment: in the middle of a line of the journal.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from openpi_opt.engine import ledger, recovery
from openpi_opt.process import locks
from openpi_opt.process import run as process
from openpi_opt.process.locks import Claims, Held
from openpi_opt.track.journal import Journal

TORN = "probability that this process is killed while it writes a line of the journal"


def tear(probability: float) -> None:
    """Kill this process in the middle of a line of the journal, every so often."""
    whole = Journal._write

    def write(journal: Journal, data: bytes) -> None:
        if random.random() >= probability:
            whole(journal, data)
            return
        handle = os.open(journal.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(handle, data[: random.randrange(1, len(data))])
        os.kill(os.getpid(), signal.SIGKILL)

    _put(Journal, "_write", write)


def _without_claims() -> None:
    """Everybody gets every claim."""

    def take(claims: Claims, config_hash: str, machine_hash: str, space: str = "") -> Held | None:
        folder: Path = claims.folder
        return locks.take(folder / f"{uuid4().hex}.lock", '{"space": "", "config_hash": ""}')

    _put(Claims, "take", take)


def _without_recovery() -> None:
    """Nobody looks at what a killed sweep left."""
    _put(ledger, "recover", lambda *_: [])


def _without_survivors() -> None:
    """Nobody ends the processes of a killed sweep."""
    _put(recovery, "end_marked", lambda uid: 0)
    _put(process, "end_marked", lambda uid: 0)


def _without_mending() -> None:
    """A torn line stays, and the next one is written behind it."""
    _put(Journal, "_mend", lambda journal: None)


def _put(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


WAYS: dict[str, Callable[[], None]] = {
    "claims": _without_claims,
    "recovery": _without_recovery,
    "survivors": _without_survivors,
    "mending": _without_mending,
}
