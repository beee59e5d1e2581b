"""Where a study can be looked at: its page in MLflow, or the command that opens it.

A page has an address only while a server runs: the tracking server that the study was delivered
to, or `python -m openpi_opt.ui`, which holds a lock in the store as long as it serves.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from openpi_opt.result import write_atomic
from openpi_opt.track.store import DEFAULT_STORE

_PAGE, _UI = "page.json", ".ui"


def note_page(study_dir: Path, server: str | None, page: str) -> None:
    """Keep the address of a study's page, `page` below `server` (None: the store's own)."""
    write_atomic(study_dir / _PAGE, json.dumps({"server": server, "page": page}) + "\n")


def page_of(study_dir: Path) -> str:
    """The address of a study's page below that of the server. Raises OSError: MLflow was never
    shown the study."""
    return str(json.loads((study_dir / _PAGE).read_bytes())["page"])


@contextmanager
def serving(store: Path, server: str) -> Iterator[None]:
    """Say that `server` shows the store, until the end of the block or of this process."""
    lock = FileLock(store / f"{_UI}.lock", timeout=0)
    try:
        with lock:
            write_atomic(store / f"{_UI}.json", json.dumps({"server": server}) + "\n")
            yield
    except Timeout:  # another one shows it already, at an address of its own
        yield


def where(study_dir: Path) -> str:
    """The address of a study's page; without a server, the command that opens it."""
    store = study_dir.parents[1]
    here = "" if store == Path(DEFAULT_STORE).absolute() else f" --store {shlex.quote(str(store))}"
    command = f"python -m openpi_opt.ui {study_dir.name}{here}"
    try:
        known = json.loads((study_dir / _PAGE).read_bytes())
        server = known["server"] or _served(store)
    except (OSError, ValueError, KeyError):
        return command
    return f"{server.rstrip('/')}/{known['page']}" if str(server).startswith("http") else command


def _served(store: Path) -> str:
    """The address at which the store is shown now; empty when it is not."""
    if not (store / f"{_UI}.json").exists():
        return ""
    try:
        with FileLock(store / f"{_UI}.lock", timeout=0):
            return ""
    except Timeout:
        return str(json.loads((store / f"{_UI}.json").read_bytes())["server"])
