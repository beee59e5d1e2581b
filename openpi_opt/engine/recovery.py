"""What a killed sweep left: trials that still run, and results that the journal lacks.

Every trial has a `trial.json` in its folder before its process starts. A folder whose uid the
journal lacks belongs to a sweep that is at it, or to one that died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.process import locks
from openpi_opt.process.child import end_marked
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.process.run import noted, whole_result
from openpi_opt.result import TrialResult
from openpi_opt.track.journal import Journal, Record, Role

_FILE = "trial.json"
ALIVE = "alive.lock"  # held by the sweep and by the trial
NODE_LOCK = "node.lock"  # held by the node that runs the trial of a sweep elsewhere, and the trial
WAIT_SECONDS = 10.0


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

    def record(
        self, study_dir: Path, folder: Path | None, cfg: Config, result: TrialResult
    ) -> Record:
        """The record of its result; `folder` is None where there was no process."""
        about = self.model_dump(include={"uid", "role", "params", "space", "fingerprint_hash"})
        return Record(
            **about,
            study=study_dir.name,
            labels=cfg.labels(),
            result=result.model_copy(update={"fingerprint": self.fingerprint}),
            trial_dir=folder and folder.relative_to(study_dir).as_posix(),
        )


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
    """
    free_claims = claims.take_free()
    running: set[Path] = set()  # claims of what could not be ended
    adopted: list[Record] = []
    try:
        single = controllers.others() == 0
        for folder, started in _folders(study_dir, journal):
            if started is None:
                if single:
                    _tidy(folder)
                continue
            lives = controllers.is_alive(started.controller)
            if lives and not _was_let_go(folder, started, journal):
                continue
            claim = claims.path(started.config_hash, started.fingerprint_hash)
            if not _end(folder, started, say):
                running.add(claim)
                continue
            record = _finished(study_dir, folder, started)
            if record is None:
                forget(folder)  # its log stays; nobody looks at it again
            else:
                adopted.append(journal.append(record))
                # Nobody needs the claim any more; who asks for it holds it.
                held = locks.take(claim)
                if held is not None:
                    held.release(remove=True)
            _tidy(folder)
    finally:
        # Free before the look at the folders: what was measured under them is in the journal now.
        for held in free_claims:
            held.release(remove=held.path not in running)
    if adopted:
        say(f"{len(adopted)} result(s) that a killed sweep had finished were taken from disk")
    return adopted


def runs_elsewhere(study_dir: Path, journal: Journal, config: str, fingerprint: str) -> bool:
    """Whether a configuration is measured without its claim: on a node whose sweep is dead.

    `config` and `fingerprint` are hashes. Ask with the claim.
    """
    return any(
        (started.config_hash, started.fingerprint_hash) == (config, fingerprint)
        and (locks.is_held(folder / ALIVE) or locks.is_held(folder / NODE_LOCK))
        for folder, started in _folders(study_dir, journal)
        if started is not None
    )


def forget(folder: Path) -> None:
    """Give up a trial for good: what may still come of it is not taken in."""
    (folder / _FILE).unlink(missing_ok=True)


def _folders(study_dir: Path, journal: Journal) -> Iterator[tuple[Path, Started | None]]:
    """The folders of trials, with what was started where the journal lacks its result."""
    known = {record.uid[:12] for record in journal.records()}
    for folder in sorted((study_dir / "trials").glob("*")):
        try:
            yield folder, None if folder.name in known else _read(folder)
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            yield folder, None


def _read(folder: Path) -> Started:
    return Started.model_validate_json((folder / _FILE).read_bytes())


def _was_let_go(folder: Path, started: Started, journal: Journal) -> bool:
    """Whether a sweep that lives has given this trial up, as at Ctrl-C, and not journaled it."""
    if locks.is_held(folder / ALIVE):  # taken before trial.json is written
        return False
    journal.refresh()  # a result is journaled before its trial is let go
    return journal.by_uid(started.uid) is None


def _end(folder: Path, started: Started, say: Callable[[str], None]) -> bool:
    """End a trial; False when it runs on another host and does not end itself."""
    ended = end_marked(started.uid)
    if ended:
        say(f"ended {ended} process(es) of a trial that a killed sweep left ({folder.name})")
    for name in (ALIVE, NODE_LOCK):
        deadline = time.monotonic() + WAIT_SECONDS
        while locks.is_held(folder / name):
            if time.monotonic() > deadline:
                say(
                    f"{folder.name}: a trial of a killed sweep still runs, on another host; "
                    "left to it"
                )
                return False
            time.sleep(0.02)
    return True


def _finished(study_dir: Path, folder: Path, started: Started) -> Record | None:
    """The record of a result that is whole on disk."""
    try:
        cfg = Config.load(json.loads((folder / "config.json").read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, UserError):  # killed before it was written
        return None
    result = whole_result(folder, cfg)
    if result is None:
        return None
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    note = f"taken from disk at {when}: the sweep that ran it was killed before it was recorded"
    return started.record(study_dir, folder, cfg, noted(result, note))


def _tidy(folder: Path) -> None:
    """Remove what only a kill leaves; log and result stay."""
    for name in (ALIVE, NODE_LOCK):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
