"""The journal of a study: append-only JSON lines, the source of truth of its results.

A record counts as kept once its line ends with a newline on disk. Every line is one write and one
fsync under a file lock. What follows the last newline, after a kill or on a full disk, is a torn
line; opening the journal moves it aside.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openpi_opt import result as results
from openpi_opt.errors import UserError, masked
from openpi_opt.result import TrialResult, write_atomic
from openpi_opt.track import identity
from openpi_opt.track.brief import Brief
from openpi_opt.track.fingerprint import package_version
from openpi_opt.track.store import unusable

SCHEMA_VERSION = 1
Role = Literal["trial", "baseline", "confirm"]
# An append takes milliseconds. Whoever holds the lock this long is stopped or on a dead disk.
LOCK_TIMEOUT_S = 120
_CHECK = b',"check":"01234567"}'


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Record(BaseModel):
    """One trial of a study: what was asked, and what came of it.

    `params` are the swept Hydra keys with their values, `labels` the short text of every knob,
    `space` tells the search space that `params` are a point of, `shown` is what a process of a
    confirmation is called (role and round), `trial_dir` is relative to the
    study's folder. `number` is given by `Journal.append`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    uid: str = Field(default_factory=lambda: uuid4().hex, pattern="^[0-9a-f]{32}$")
    study: str
    number: int = Field(-1, ge=-1)
    role: Role = "trial"
    params: dict[str, str] = Field(default_factory=dict)
    space: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    result: TrialResult
    trial_dir: str | None = None
    shown: str = ""
    fingerprint_hash: str
    created_at: str = Field(default_factory=utc_now)
    check: str | None = None  # of the line itself; lines of older versions have none


class Header(BaseModel):
    """`study.json`: where a study comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    created_at: str
    command: list[str]
    openpi_opt: str


class Journal:
    """The records of one study, in memory and on disk. Make it with `open` or `read`."""

    def __init__(self, study_dir: Path, header: Header | None, brief: Brief | None = None):
        self.study_dir = study_dir
        self._brief = brief
        self.path = study_dir / "journal.jsonl"
        self.header = header
        self.notes: list[str] = []
        self._lock = FileLock(study_dir / "journal.lock", timeout=LOCK_TIMEOUT_S)
        self._records: list[Record] = []
        self._by_uid: dict[str, Record] = {}
        self._by_hashes: dict[tuple[str, str], list[Record]] = {}
        self._read_to = 0  # bytes of the file that are in memory
        self._lines = 0  # that were read

    @staticmethod
    def open(study_dir: Path, command: Sequence[str] = ()) -> Journal:
        """Open for appending; makes the folder and `study.json` when absent, mends a torn end.
        `notes` then says what was mended. Raises UserError: a damaged line before the end, a newer
        format, or a folder that cannot be written."""
        with _user_errors(study_dir):
            study_dir.mkdir(parents=True, exist_ok=True)
            journal = Journal(study_dir, None)
            with journal._locked():
                journal.header = _make_header(study_dir, command)
                journal._catch_up()
        return journal

    @staticmethod
    def read(study_dir: Path, brief: bool = False) -> Journal:
        """Read without a lock and without changing anything, for instance of a running sweep. With
        `brief`, records have neither samples nor a kernel table, and lack nothing else. Raises
        UserError: a damaged line before the end, a newer format, or an unreadable file."""
        with _user_errors(study_dir):
            journal = Journal(study_dir, _read_header(study_dir), Brief() if brief else None)
            rest = journal._take_new_lines()
        if _is_record(rest):  # whole, only its newline is missing
            journal._take(Record.model_validate_json(rest))
        elif rest:
            journal.notes.append(f"{journal.path}: left out an incomplete last line")
        return journal

    def records(self) -> list[Record]:
        """All records that were read or appended, in the order of their numbers."""
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def next_number(self) -> int:
        """Number of the record that is appended next, if nobody else appends one."""
        return self._records[-1].number + 1 if self._records else 0

    def find(
        self,
        config_hash: str,
        fingerprint_hash: str,
        answers: Callable[[Record], bool] = lambda record: True,
    ) -> Record | None:
        """The newest measurement of a configuration that `answers`, leaving out confirmations."""
        found = self._by_hashes.get((config_hash, fingerprint_hash), [])
        return next(filter(answers, reversed(found)), None)

    def by_uid(self, uid: str) -> Record | None:
        """The record of that uid."""
        return self._by_uid.get(uid)

    def refresh(self) -> None:
        """Take in what other processes appended. Raises UserError: as `open`."""
        with _user_errors(self.study_dir), self._locked():
            self._catch_up()

    def append(self, record: Record) -> Record:
        """Number a record and put it on disk; returns it as written.

        A uid that is already there is not written again: its record is returned.

        Raises:
            UserError: the disk is full or the file cannot be written. Nothing is half written.
            pydantic.ValidationError: the record would not be read back as it is (NaN in it).
        """
        with _user_errors(self.study_dir), self._locked():
            self._catch_up()
            known = self._by_uid.get(record.uid)
            if known is not None:
                return known
            numbered = record.model_copy(update={"number": self.next_number})
            line = _sealed(numbered.model_dump_json(exclude={"check"}).encode())
            written = Record.model_validate_json(line)  # never a line that could not be read back
            self._write(line + b"\n")
            self._lines += 1
            self._take(written)
            return written

    def _write(self, data: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            done = os.write(handle, data)
            while done < len(data):  # a short write: what stopped it is raised by the next one
                done += os.write(handle, data[done:])
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, self._read_to)  # frees space, so it works on a full disk as well
            raise
        finally:
            os.close(handle)
        self._read_to += len(data)

    def _take(self, record: Record) -> None:
        record = _renewed(record)
        self._records.append(record)
        self._by_uid[record.uid] = record
        if record.role != "confirm":
            key = record.result.config_hash, record.fingerprint_hash
            self._by_hashes.setdefault(key, []).append(record)

    def _take_new_lines(self) -> bytes:
        """Read on from where reading ended; returns what follows the last newline."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._read_to:
            raise UserError(
                f"{self.path} was deleted, moved or cut short meanwhile: {size} of "
                f"{self._read_to} bytes that were read are left.\nPut it back, or start anew with "
                "study=NAME."
            )
        if not size:
            return b""
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return line
                self._lines += 1
                where = f"{self.path} line {self._lines}"
                self._check_and_take(_parse_line(line[:-1], where, self._brief))
                self._read_to += len(line)
        return b""

    def _check_and_take(self, record: Record) -> None:
        """Take a line that was read; one that is there twice or out of order is noted."""
        where = f"{self.path} line {self._lines}"
        if record.uid in self._by_uid:
            self.notes.append(f"{where} repeats record {self._by_uid[record.uid].number}: left out")
            return
        if record.number != self.next_number:
            self.notes.append(
                f"{where} has number {record.number} where {self.next_number} should follow: lines "
                "were moved or removed"
            )
        self._take(record)

    def _catch_up(self) -> None:
        """Under the lock: take in new lines. A torn last one is put aside; a whole one that lacks
        its newline gets it."""
        rest = self._take_new_lines()
        if not rest:
            return
        if _is_record(rest):
            with self.path.open("ab") as file:
                file.write(b"\n")
            self._take_new_lines()
            return
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        aside = self.study_dir / f"journal.torn-{stamp}-{uuid4().hex[:8]}"
        with aside.open("xb") as file:
            file.write(rest)
            file.flush()
            os.fsync(file.fileno())
        os.truncate(self.path, self._read_to)
        self.notes.append(
            f"{self.path}: the last line was torn ({len(rest)} bytes), as after a kill or a full "
            f"disk; it is kept in {aside.name} and its trial counts as not finished"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.path}: another process has held its lock for {LOCK_TIMEOUT_S} s.\n"
                "End the stopped sweep that uses this study, then run the same command again."
            ) from None
        try:
            yield
        finally:
            self._lock.release()


def _make_header(study_dir: Path, command: Sequence[str]) -> Header:
    header = _read_header(study_dir)
    if header is None:
        header = Header(
            name=study_dir.name,
            created_at=utc_now(),
            command=[masked(word) for word in command],
            openpi_opt=package_version(),
        )
        write_atomic(study_dir / "study.json", header.model_dump_json(indent=1) + "\n")
    return header


def _read_header(study_dir: Path) -> Header | None:
    path = study_dir / "study.json"
    if not path.exists():
        return None
    text = path.read_bytes()
    try:
        return Header.model_validate_json(text)
    except ValidationError:
        raise _unreadable(text, str(path)) from None


def _renewed(record: Record) -> Record:
    """A record of an earlier format under the hashes of today."""
    result = identity.renewed(record.result)
    if result is record.result:
        return record
    machine = identity.renewed_fingerprint(result, record.fingerprint_hash)
    return record.model_copy(update={"result": result, "fingerprint_hash": machine})


def _sealed(line: bytes) -> bytes:
    """A record as JSON, with the CRC-32 of what stands before it as its last field."""
    return line[:-1] + b',"check":"%08x"}' % zlib.crc32(line[:-1])


def _parse_line(line: bytes, where: str, brief: Brief | None = None) -> Record:
    text, kept = (line, {}) if brief is None else brief.shortened(line)
    try:
        record = Record.model_validate_json(text)
    except ValidationError:
        raise _unreadable(line, where) from None
    if record.check is not None and _sealed(line[: -len(_CHECK)] + b"}") != line:
        raise UserError(
            f"{where} was changed since it was written: its checksum is another. Nothing was "
            "changed now.\nRestore it from a backup, or move it into a file of another name, then "
            "try again."
        )
    if brief is not None:
        brief.give_back(record.result, kept)
    return record


def _unreadable(text: bytes, where: str) -> UserError:
    """Tell a newer format from damage."""
    try:
        document: Any = json.loads(text)
    except ValueError:
        document = None
    if isinstance(document, dict):
        result = document.get("result")
        parts = [(document, SCHEMA_VERSION), (result, results.SCHEMA_VERSION)]
        for part, known in parts:
            version = part.get("schema_version") if isinstance(part, dict) else None
            if isinstance(version, int) and version > known:
                return UserError(
                    f"{where}: format {version} was written by a newer openpi_opt; this one "
                    f"({package_version()}) reads format {known}.\n"
                    "Update openpi_opt, or use another study."
                )
    return UserError(
        f"{where} is damaged: it is not what this project writes there. Nothing was changed.\n"
        "Restore it from a backup, or move it into a file of another name, then try again."
    )


def _is_record(line: bytes) -> bool:
    try:
        Record.model_validate_json(line)
    except ValidationError:
        return False
    return True


@contextmanager
def _user_errors(study_dir: Path) -> Iterator[None]:
    """An operating system that refuses is the user's to mend; what is on disk stays valid."""
    try:
        yield
    except OSError as error:
        what = f"use the journal in {study_dir}"
        raise unusable(what, study_dir, error, "Free space or mend permissions") from error
