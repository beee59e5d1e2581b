"""What a killed sweep left: trials that still run, and results that the journal lacks.

Every trial has a `trial.json` in its folder before its process starts. A folder whose uid the
journal lacks belongs to a sweep that is at it, or to one that died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.process import locks
from openpi_opt.process.leftovers import end_marked
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.process.run import whole_result
from openpi_opt.track.journal import Journal, Record, Role

_FILE = "trial.json"
ALIVE = "alive.lock"  # held by the sweep and by the trial
NODE_LOCK = "node.lock"  # held by the node that runs the trial of a sweep elsewhere, and the trial
_WAIT_SECONDS = 10.0


class Started(BaseModel):
    """`trial.json`: what a record of the trial needs beside its result."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uid: str = Field(pattern="^[0-9a-f]{32}$")
    controller: str
    role: Role
    params: dict[str, str]
    space: str
    config_hash: str
    context_hash: str
    fingerprint: dict[str, Any]
    fingerprint_hash: str

    def write(self, folder: Path) -> Held:
        """Leave it in the trial's folder, which is made; returns the lock that means alive."""
        folder.mkdir(parents=True)
        held = locks.take(folder / ALIVE)
        assert held is not None  # the folder is new
        results.write_atomic(folder / _FILE, self.model_dump_json(indent=1))
        return held


def recover(
    study_dir: Path,
    journal: Journal,
    controllers: Controllers,
    claims: Claims,
    say: Callable[[str], None],
) -> list[Record]:
    """End what dead sweeps left running, and journal what they finished; returns those records.

    Call it under `controllers.alone`. What lies about is removed when no other sweep is at work:
    one that has just begun a trial could not be told from one that died there.

    Raises:
        UserError: the journal cannot be written.
    """
    free_claims = claims.take_free()
    running: set[Path] = set()  # claims of what could not be ended
    try:
        return _recover(study_dir, journal, controllers, claims, say, running)
    finally:
        # Free before the look at the folders: what was measured under them is in the journal now.
        for claim in free_claims:
            claim.release(remove=claim.path not in running)


def _recover(
    study_dir: Path,
    journal: Journal,
    controllers: Controllers,
    claims: Claims,
    say: Callable[[str], None],
    running: set[Path],
) -> list[Record]:
    known = {record.uid[:12] for record in journal.records()}
    single = controllers.others() == 0
    adopted = []
    for folder in sorted((study_dir / "trials").glob("*")):
        started = None if folder.name in known else _started(folder)
        if started is None:
            if single:
                _tidy(folder)
            continue
        if controllers.is_alive(started.controller) and not _was_let_go(folder, started, journal):
            continue
        ended = end_marked(started.uid)
        if ended:
            say(f"ended {ended} process(es) of a trial that a killed sweep left ({folder.name})")
        if not (_wait_gone(folder / ALIVE) and _wait_gone(folder / NODE_LOCK)):
            say(f"{folder.name}: a trial of a killed sweep still runs, on another host; left to it")
            running.add(claims.path(started.config_hash, started.fingerprint_hash))
            continue
        cfg = _config(folder)
        record = _record(study_dir, folder, started, cfg)
        if record is None:
            # Its log stays; without this file nobody looks at it again.
            (folder / _FILE).unlink(missing_ok=True)
        else:
            adopted.append(journal.append(record))
            _remove_claim(claims, started)
        _tidy(folder)
    if adopted:
        say(f"{len(adopted)} result(s) that a killed sweep had finished were taken from disk")
    return adopted


def runs_elsewhere(study_dir: Path, journal: Journal, config: str, fingerprint: str) -> bool:
    """Whether a configuration is measured without its claim: on a node whose sweep is dead.

    `config` and `fingerprint` are hashes. Ask with the claim.
    """
    known = {record.uid[:12] for record in journal.records()}
    for folder in (study_dir / "trials").glob("*"):
        started = None if folder.name in known else _started(folder)
        same = started and (started.config_hash, started.fingerprint_hash) == (config, fingerprint)
        if same and (locks.is_held(folder / ALIVE) or locks.is_held(folder / NODE_LOCK)):
            return True
    return False


def forget(folder: Path) -> None:
    """Give up a trial of this sweep for good: what may still come of it is not taken in."""
    (folder / _FILE).unlink(missing_ok=True)


def _was_let_go(folder: Path, started: Started, journal: Journal) -> bool:
    """Whether a sweep that lives has given this trial up, as at Ctrl-C, and not journaled it."""
    if locks.is_held(folder / ALIVE):  # taken before trial.json is written
        return False
    journal.refresh()  # a result is journaled before its trial is let go
    return journal.by_uid(started.uid) is None


def _tidy(folder: Path) -> None:
    """Remove what only a kill leaves; log and result stay."""
    for name in (ALIVE, NODE_LOCK):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _remove_claim(claims: Claims, started: Started) -> None:
    """The journal has the result, so nobody needs it any more; who asks for it holds it."""
    claim = claims.take(started.config_hash, started.fingerprint_hash)
    if claim is not None:
        claim.release(remove=True)


def _record(study_dir: Path, folder: Path, started: Started, cfg: Config | None) -> Record | None:
    """The record of a result that is whole on disk."""
    parsed = None if cfg is None else whole_result(folder, cfg)
    if cfg is None or parsed is None:
        return None
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = f"taken from disk at {when}: the sweep that ran it was killed before it was recorded"
    update = {"notes": [*parsed.notes, note], "fingerprint": started.fingerprint}
    return Record(
        uid=started.uid,
        study=study_dir.name,
        role=started.role,
        params=started.params,
        space=started.space,
        labels=cfg.labels(),
        result=parsed.model_copy(update=update),
        trial_dir=folder.relative_to(study_dir).as_posix(),
        fingerprint_hash=started.fingerprint_hash,
    )


def _started(folder: Path) -> Started | None:
    try:
        return Started.model_validate_json((folder / _FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _config(folder: Path) -> Config | None:
    try:
        return Config.load(json.loads((folder / "config.json").read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, UserError):  # killed before it was written
        return None


def _wait_gone(alive: Path) -> bool:
    """Wait for a trial that is ending itself."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while locks.is_held(alive):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
