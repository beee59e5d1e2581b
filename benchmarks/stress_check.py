"""What must hold of a store after any number of kills, looked at from outside.

Nothing here uses the engine's own classes: files are read as JSON, databases with `sqlite3`, locks
are tried with `fcntl`, and processes are found in `/proc`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEASES_VARIABLE = "OPENPI_OPT_LEASES"
TRIAL_VARIABLE = "OPENPI_OPT_TRIAL"
ADOPTED = "taken from disk"  # the note in a result whose sweep was killed before it was recorded
_EVERYWHERE = ("*.tmp", "*.new", "*.db-journal", "*.db-wal")


@dataclass
class Counts:
    """What was found, added up over stores. `violations` say in words what must not be."""

    results: int = 0  # in the journals
    finished: int = 0  # documents that trials had written whole
    adopted: int = 0  # of those, taken from disk by a later sweep
    lost: int = 0
    duplicates: int = 0
    processes: int = 0
    held: int = 0
    rubbish: int = 0
    torn: int = 0  # pieces of lines that were put aside
    violations: list[str] = field(default_factory=list)

    def bad(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(text)


@dataclass
class Watcher:
    """Looks at a study while it is being killed: a journal only grows, a result stays on disk."""

    study: Path
    counts: Counts
    _lines: bytes = b""
    _finished: dict[str, bytes] = field(default_factory=dict)

    def look(self) -> bool:
        """Compare with what was there before; returns whether there is more."""
        text = _journal(self.study)
        whole = text[: text.rfind(b"\n") + 1]
        if not whole.startswith(self._lines):
            self.counts.bad(f"{self.study.name}: a line of the journal was changed or removed")
        more = len(whole) > len(self._lines)
        self._lines = whole
        now = finished(self.study)
        for uid, document in self._finished.items():
            if now.get(uid) != document:
                self.counts.bad(f"{self.study.name}: the result of trial {uid} left the disk")
        self._finished = now
        return more


def finished(study: Path) -> dict[str, bytes]:
    """Whole result documents on disk, by the beginning of their trial's uid."""
    found = {}
    for path in (study / "trials").glob("*/result.json"):
        document = path.read_bytes()
        if "outcome" in (_json(document) or {}):
            found[path.parent.name] = document
    return found


def check_study(study: Path, said: dict[str, int], expected: int, counts: Counts) -> None:
    """Journal against disk. `said` are the uids of results, by the trials' own word, with seeds.

    `expected` is how many configurations the study has to have in the end.
    """
    lines = _journal(study).split(b"\n")
    records: list[dict[str, Any]] = [record for line in lines[:-1] if (record := _json(line))]
    if len(records) != len(lines) - 1 or lines[-1]:
        counts.bad(f"{study.name}: the journal has lines that cannot be read")
    counts.results += len(records)
    counts.torn += len(list(study.glob("journal.torn-*")))
    counts.adopted += sum(
        any(ADOPTED in note for note in record["result"].get("notes", [])) for record in records
    )
    if [record["number"] for record in records] != list(range(len(records))):
        counts.bad(f"{study.name}: the numbers are not 0 to {len(records) - 1} in order")
    _check_once(study, records, expected, counts)
    _check_finished(study, records, said, counts)


def _check_once(study: Path, records: list[dict[str, Any]], expected: int, counts: Counts) -> None:
    uids = Counter(record["uid"] for record in records)
    measured = Counter(
        (record["result"]["config_hash"], record["fingerprint_hash"]) for record in records
    )
    for what, number in [*uids.items(), *measured.items()]:
        if number > 1:
            counts.duplicates += number - 1
            counts.bad(f"{study.name}: {number} records of {what}")
    if len(measured) != expected:
        counts.bad(f"{study.name}: {len(measured)} configurations, {expected} were to be tried")


def _check_finished(
    study: Path, records: list[dict[str, Any]], said: dict[str, int], counts: Counts
) -> None:
    on_disk = {uid: _json(document) or {} for uid, document in finished(study).items()}
    kept = {record["uid"][:12]: record for record in records}
    counts.finished += len(on_disk.keys() | {uid[:12] for uid in said})
    for uid, document in on_disk.items():
        record = kept.get(uid)
        if record is None:
            counts.lost += 1
            counts.bad(f"{study.name}: trial {uid} had finished, the journal lacks it")
        elif _said(record["result"]) != _said(document):
            counts.bad(f"{study.name}: trial {uid} says another thing in the journal")
    for uid, seed in said.items():
        if uid[:12] not in on_disk:
            counts.lost += 1
            counts.bad(f"{study.name}: trial {uid} (seed {seed}) finished, its document is gone")
    for seed, number in Counter(said.values()).items():
        if number > 1:
            counts.duplicates += number - 1
            counts.bad(f"{study.name}: seed {seed} was measured to its end {number} times")
    for uid, record in kept.items():
        if record["result"]["outcome"] == "ok" and uid not in on_disk:
            counts.bad(f"{study.name}: record {uid} has a latency that no trial wrote")


def check_tidy(store: Path, leases: Path, temporary: Path, counts: Counts) -> None:
    """Nothing lives, nothing is held, nothing lies about."""
    for pid, trial in marked(leases).items():
        counts.processes += 1
        counts.bad(f"process {pid} is left ({'trial ' + trial if trial else 'a sweep'})")
    for path in [*leases.glob("*"), *store.rglob("*.lock")]:
        if _is_held(path):
            counts.held += 1
            counts.bad(f"{path} is held")
    rubbish = [path for pattern in _EVERYWHERE for path in store.rglob(pattern)]
    rubbish += [*store.glob("studies/*/claims/*"), *store.glob("studies/*/controllers/*-*")]
    rubbish += [*store.glob("studies/*/trials/*/alive.lock"), *temporary.glob("*")]
    for path in rubbish:
        counts.rubbish += 1
        counts.bad(f"{path} was left")


def check_copies(store: Path, studies: list[Path], counts: Counts) -> None:
    """Optuna's and MLflow's databases have each record of the journals once, and nothing else."""
    for study in studies:
        records = [record for line in _journal(study).splitlines() if (record := _json(line))]
        _check_optuna(store / "optuna.db", study, records, counts)
        _check_mlflow(store / "mlflow.db", study, records, counts)


def _check_optuna(
    database: Path, study: Path, records: list[dict[str, Any]], counts: Counts
) -> None:
    rows = _rows(
        database,
        "SELECT a.value_json, v.value FROM studies s JOIN trials t USING (study_id)"
        " LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = 'config_hash'"
        " LEFT JOIN trial_values v ON v.trial_id = t.trial_id"
        " WHERE s.study_name LIKE ? AND t.state IN ('COMPLETE', 'PRUNED')",
        f"{study.name} %",
    )
    copied = Counter((json.loads(text or "null"), _rounded(value)) for text, value in rows)
    wanted = Counter(_point(record) for record in records if record["role"] == "trial")
    for point in (wanted - copied).elements():
        counts.bad(f"{study.name}: optuna.db lacks {point}")
    # A point that is the baseline as well may be answered with that record, and is a point then.
    may = Counter({_point(record): 1 for record in records if record["role"] == "baseline"})
    for point in (copied - wanted - may).elements():
        counts.duplicates += 1
        counts.bad(f"{study.name}: optuna.db has {point} too often")


def _check_mlflow(
    database: Path, study: Path, records: list[dict[str, Any]], counts: Counts
) -> None:
    rows = _rows(
        database,
        "SELECT u.value, r.status, m.value FROM runs r"
        " JOIN tags s ON s.run_uuid = r.run_uuid AND s.key = 'openpi_opt.study' AND s.value = ?"
        " LEFT JOIN tags u ON u.run_uuid = r.run_uuid AND u.key = 'openpi_opt.uid'"
        " LEFT JOIN latest_metrics m"
        " ON m.run_uuid = r.run_uuid AND m.key = 'latency/mean_ms'",
        study.name,
    )
    parents = [status for uid, status, _ in rows if uid is None]
    if parents != ["FINISHED"]:
        counts.bad(f"{study.name}: MLflow has parent runs {parents}, not one that is finished")
    delivered = Counter(
        (uid, "FINISHED" if status == "FINISHED" else "FAILED", _rounded(mean))
        for uid, status, mean in rows
        if uid is not None and status in ("FINISHED", "FAILED")
    )
    unfinished = sum(uid is not None for uid, _, _ in rows) - delivered.total()
    wanted = Counter(
        (record["uid"], "FINISHED" if mean is not None else "FAILED", mean)
        for record in records
        for mean in [_point(record)[1]]
    )
    if unfinished:
        counts.bad(f"{study.name}: {unfinished} runs in MLflow were never ended")
    for run in (wanted - delivered).elements():
        counts.bad(f"{study.name}: MLflow lacks {run}")
    for run in (delivered - wanted).elements():
        counts.duplicates += 1
        counts.bad(f"{study.name}: MLflow has {run} too often")


def marked(leases: Path) -> dict[int, str | None]:
    """Processes that were started with this folder of leases, with the uid of their trial."""
    wanted = f"{LEASES_VARIABLE}={leases}".encode()
    mark = f"{TRIAL_VARIABLE}=".encode()
    found: dict[int, str | None] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(leases.parent).encode() in (entry / "cmdline").read_bytes().split(b"\0")[0]:
                    found[int(entry.name)] = None  # a daemon of `stub_trial`, without variables
                variables = (entry / "environ").read_bytes().split(b"\0")
                if wanted in variables:
                    uids = [text.removeprefix(mark) for text in variables if text.startswith(mark)]
                    found[int(entry.name)] = uids[0].decode() if uids else None
    return found


def _point(record: dict[str, Any]) -> tuple[str, float | None]:
    result = record["result"]
    mean = result["latency"]["mean_ms"] if result["outcome"] == "ok" else None
    return result["config_hash"], _rounded(mean)


def _said(result: dict[str, Any]) -> tuple[Any, ...]:
    latency = result.get("latency") or {}
    return result["outcome"], result["config_hash"], latency.get("mean_ms"), latency.get("std_ms")


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 9)


def _rows(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query, values).fetchall()


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _journal(study: Path) -> bytes:
    path = study / "journal.jsonl"
    return path.read_bytes() if path.exists() else b""


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def said_finished(log: Path) -> Iterator[tuple[str, int]]:
    """What the trials themselves noted when their document was on disk: uid and seed."""
    if log.exists():
        for line in log.read_text().splitlines():
            uid, _, seed = line.partition(" ")
            yield uid, int(seed)
