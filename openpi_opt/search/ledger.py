"""Keeping results: the journal first, then whoever wants a copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from openpi_opt.config import Config, Platform, Tracking
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.result import TrialResult
from openpi_opt.search.display import Display
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record, Role
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError
from openpi_opt.track.store import Store


class Ledger:
    """The records of one study, held by one sweep at a time. Make it with `open`."""

    def __init__(
        self,
        study_dir: Path,
        journal: Journal,
        log: MlflowLog | None,
        machine: Machine,
        display: Display,
    ):
        self.study_dir = study_dir
        self.journal = journal
        self._log = log
        self._machine = machine
        self._display = display
        self._fingerprints: dict[Platform, tuple[dict[str, Any], str]] = {}
        self._told_away = False
        self._lock = FileLock(study_dir / "sweep.lock")

    @staticmethod
    def open(
        store: Store,
        study: str,
        tracking: Tracking,
        command: Sequence[str],
        machine: Machine,
        display: Display,
    ) -> Ledger:
        """Take the study for this process. End with `close`.

        Raises:
            UserError: another sweep has the study, its journal cannot be used, or MLflow's
                database is of another version.
        """
        study_dir = store.study_dir(study)
        journal = Journal.open(study_dir, command)
        for text in journal.notes:
            display.note(f"note: {text}")
        log = MlflowLog(store, tracking) if tracking.mlflow else None
        ledger = Ledger(study_dir, journal, log, machine, display)
        ledger._take()
        try:
            ledger._begin_log()
        except BaseException:
            ledger._lock.release()
            raise
        return ledger

    def find(self, cfg: Config) -> Record | None:
        """The record of an equal configuration on an equal machine."""
        return self.journal.find(cfg.hash(), self.fingerprint_hash(cfg))

    def fingerprint_hash(self, cfg: Config) -> str:
        """Hash of the machine and software that run `cfg`."""
        return self._fingerprint(cfg)[1]

    def fingerprint_hashes(self) -> set[str]:
        """Hashes of all that was asked for so far."""
        return {known for _, known in self._fingerprints.values()}

    def keep(
        self,
        cfg: Config,
        result: TrialResult,
        role: Role,
        params: dict[str, str],
        uid: str,
        trial_dir: Path | None,
    ) -> Record:
        """Put a result on disk; when this returns, it cannot be lost.

        Raises:
            UserError: the journal cannot be written.
        """
        seen, seen_hash = self._fingerprint(cfg)
        return self.journal.append(
            Record(
                uid=uid,
                study=self.study_dir.name,
                role=role,
                params=params,
                labels=cfg.labels(),
                result=result.model_copy(update={"fingerprint": seen}),
                trial_dir=trial_dir and trial_dir.relative_to(self.study_dir).as_posix(),
                fingerprint_hash=seen_hash,
            )
        )

    def deliver(self, record: Record) -> None:
        """Log a record to MLflow, if it takes it; the journal has it anyhow."""
        if self._log is not None:
            try:
                self._log.deliver(record, self.study_dir)
            except TrackingError as error:
                self._away(error)

    def close(self) -> None:
        """Give the study back."""
        try:
            if self._log is not None:
                self._log.end_study(self.study_dir)
        except TrackingError as error:
            self._away(error)
        finally:
            self._lock.release()

    def _begin_log(self) -> None:
        """Open MLflow's run, and deliver what an earlier sweep could not."""
        if self._log is not None:
            try:
                self._log.begin_study(self.study_dir)
                self._log.sync(self.study_dir, self.journal)
            except TrackingError as error:
                self._away(error)

    def _away(self, error: TrackingError) -> None:
        """Say it once: the rest of the sweep would repeat it after every trial."""
        if not self._told_away:
            self._told_away = True
            self._display.note(f"warning: {error}")

    def _take(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"study {self.study_dir.name}: another sweep is running it.\n"
                "Wait for that one, or give this one another name with study=NAME."
            ) from None

    def _fingerprint(self, cfg: Config) -> tuple[dict[str, Any], str]:
        if cfg.platform not in self._fingerprints:
            seen = fingerprint(self._machine, cfg.platform)
            self._fingerprints[cfg.platform] = seen, fingerprint_hash(seen)
        return self._fingerprints[cfg.platform]
