"""Keeping results: claims, folders of trials, and the journal, which is the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from openpi_opt.config import Config, Platform
from openpi_opt.engine.display import Display
from openpi_opt.engine.known import Known
from openpi_opt.engine.recovery import Started, recover, runs_elsewhere
from openpi_opt.machine import Device, Gpu, Machine
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.result import Pruned, TrialResult
from openpi_opt.track import curve, pareto
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record, Role
from openpi_opt.track.store import Store, unusable


class Ledger:
    """The records of one study, shared by the sweeps that work on it. Make it with `open`.

    Only the thread that opened it may use it.
    """

    def __init__(
        self,
        study_dir: Path,
        journal: Journal,
        machine: Machine,
        display: Display,
        controllers: Controllers,
        gpu_index: Callable[[Device], int],
        nodes: Callable[[Device], dict[str, Any]] | None = None,
        keep_source: bool = False,
    ):
        self.known = Known(machine, keep_source)
        self.study_dir = study_dir
        self.journal = journal
        self.claims = Claims(study_dir)
        self.controllers = controllers
        self._machine = machine
        self._display = display
        self._gpu_index = gpu_index
        self._nodes = nodes
        self._fingerprints: dict[Platform, tuple[dict[str, Any], str]] = {}
        self.known_from = 0
        self.takes_pruned = False  # as an answer: only a sweep that prunes itself does
        self.others = 0  # sweeps that were at work already
        self._plan_lock = FileLock(study_dir / "plan.lock")

    @staticmethod
    def open(
        store: Store,
        study: str,
        command: Sequence[str],
        machine: Machine,
        display: Display,
        gpu_index: Callable[[Device], int] = lambda device: 0,
        fresh: bool = False,
        nodes: Callable[[Device], dict[str, Any]] | None = None,
        keep_source: bool = False,
    ) -> Ledger:
        """Join the study, and clear up behind sweeps that were killed. End with `close`.

        `gpu_index` tells which GPU stands for those that are used; with `fresh` nothing that was
        recorded before counts as known, with `keep_source` also what other files of the package
        measured. Where trials run elsewhere, `nodes` tells the fingerprint that they share.

        Raises:
            UserError: its journal cannot be used.
        """
        study_dir = store.study_dir(study)
        journal = Journal.open(study_dir, command)
        for text in journal.notes:
            display.note(f"note: {text}")
        with _user_errors(study_dir):
            controllers = Controllers.join(study_dir)
            ledger = Ledger(
                *(study_dir, journal, machine, display, controllers),
                gpu_index=gpu_index,
                nodes=nodes,
                keep_source=keep_source,
            )
            try:
                with controllers.alone():
                    ledger._recover()
                    ledger.known_from = journal.next_number if fresh else 0
                    ledger.others = controllers.others()
            except BaseException:
                ledger.close()
                raise
        return ledger

    def find(self, cfg: Config) -> Record | None:
        """The record of an equal configuration, measured by equal code on an equal machine."""
        found = cfg.hash(), self.fingerprint_hash(cfg)
        record = self.journal.find(*found, self.answers)
        if record is None:
            return None
        if not isinstance(record.result, Pruned) or self.takes_pruned:
            return record
        # What is surely slower than the limit of today, too, would only be ended again.
        limit = cfg.limits.latency_ms
        return record if limit is not None and record.result.seen_low_ms > limit else None

    def answers(self, record: Record) -> bool:
        """Whether what was recorded counts as known."""
        return record.number >= self.known_from and self.known.answers(record)

    def outdated(self, cfg: Config) -> list[str]:
        """What has changed since `cfg` was measured here, if nothing answers for it."""
        if self.find(cfg) is not None:
            return []
        found = self.journal.find(cfg.hash(), self.fingerprint_hash(cfg))
        stands = found is not None and found.number >= self.known_from
        return self.known.changes(found) if found is not None and stands else []

    def exists(self) -> bool:
        """Whether the journal is still where it was."""
        return (self.study_dir / "journal.jsonl").is_file()

    def refresh(self) -> None:
        """Take in what other sweeps recorded."""
        self.journal.refresh()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """While one sweep of the study decides what it measures next, no other does."""
        with _user_errors(self.study_dir), self._plan_lock:
            yield

    def claim(self, cfg: Config, space: str) -> Held | None:
        """The right to measure `cfg`, or None while somebody else has it.

        Look with `find` again afterwards: it may just have been measured.
        """
        with _user_errors(self.study_dir):
            claim = self.claims.take(cfg.hash(), self.fingerprint_hash(cfg), space)
            if claim is not None:
                self.refresh()
                if claim.found and self.find(cfg) is None:  # its last holder was killed
                    with self.controllers.alone():
                        self._recover()
                    asked = cfg.hash(), self.fingerprint_hash(cfg)
                    if runs_elsewhere(self.study_dir, self.journal, *asked):
                        claim.release()
                        return None
        return claim

    def live(self, space: str) -> set[str]:
        """Hashes of what is being measured for `space`, here and elsewhere.

        What killed sweeps had finished is journaled first: it counts, or there would be one more
        trial than asked for.
        """
        with _user_errors(self.study_dir):
            measured, left = self.claims.live(space)
            if left:
                with self.controllers.alone():
                    self._recover()
                measured, _ = self.claims.live(space)
        return measured

    def fingerprint_hash(self, cfg: Config) -> str:
        """Hash of the machine and software that run `cfg`."""
        return self._fingerprint(cfg, None)[1]

    def fingerprint_hashes(self) -> set[str]:
        """Hashes of all that was asked for so far."""
        return {known for _, known in self._fingerprints.values()}

    def started(
        self, cfg: Config, role: Role, params: dict[str, str], space: str, uid: str, gpu: Gpu | None
    ) -> tuple[Path, Held]:
        """Make the folder of a trial; the lock is for it to hold as long as it lives.

        Raises:
            OSError: the folder cannot be written.
        """
        seen, seen_hash = self._fingerprint(cfg, gpu)
        folder = self.study_dir / "trials" / uid[:12]
        started = Started(
            uid=uid,
            controller=self.controllers.name,
            role=role,
            params=params,
            space=space,
            config_hash=cfg.hash(),
            context_hash=cfg.context_hash(),
            fingerprint=seen,
            fingerprint_hash=seen_hash,
        )
        return folder, started.write(folder)

    def keep(
        self,
        cfg: Config,
        result: TrialResult,
        role: Role,
        params: dict[str, str],
        uid: str,
        trial_dir: Path | None,
        space: str = "",
        gpu: Gpu | None = None,
    ) -> Record:
        """Put a result on disk; when this returns, it cannot be lost.

        Raises:
            UserError: the journal cannot be written.
        """
        seen, seen_hash = self._fingerprint(cfg, gpu)
        if self._nodes is not None:  # the node says which GPU it was
            seen = result.fingerprint or seen
        return self.journal.append(
            Record(
                uid=uid,
                study=self.study_dir.name,
                role=role,
                params=params,
                space=space,
                labels=cfg.labels(),
                result=result.model_copy(update={"fingerprint": seen}),
                trial_dir=trial_dir and trial_dir.relative_to(self.study_dir).as_posix(),
                fingerprint_hash=seen_hash,
            )
        )

    def draw(self) -> None:
        """Leave plots and their data in the study's folder: the best so far against minutes, or
        the Pareto sets where there are several objectives.

        Raises:
            UserError: the folder cannot be written.
        """
        self.refresh()
        with _user_errors(self.study_dir):
            pareto.write(self.study_dir, self.journal.records())
            curve.write(self.study_dir, self.journal.records())

    def report(self) -> str:
        """Write the study as one HTML file; a line that says where it is, or why there is none."""
        from openpi_opt.report import write

        begun = time.monotonic()
        try:
            path = write([self.study_dir])
        except Exception as error:  # noqa: BLE001
            # Results are kept and their table is to come: whatever this is must not cost them.
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return f"no report: {why}; python -m openpi_opt.report {self.study_dir} tries again"
        return f"report: {path} ({time.monotonic() - begun:.1f} s)"

    def close(self) -> None:
        """Leave the study. No lock is waited for: its holder may be stopped."""
        self.controllers.leave()

    def _recover(self) -> None:
        recover(self.study_dir, self.journal, self.controllers, self.claims, self._display.note)

    def _fingerprint(self, cfg: Config, gpu: Gpu | None) -> tuple[dict[str, Any], str]:
        platform = cfg.platform
        if self._nodes is not None:
            if platform not in self._fingerprints:
                seen = self._nodes(cfg.device)
                self._fingerprints[platform] = seen, fingerprint_hash(seen)
            return self._fingerprints[platform]
        if cfg.device != "cpu":
            gpus = self._machine.gpus_for(cfg.device)
            number = platform.gpu if platform.gpu is not None else self._gpu_index(cfg.device)
            number = number if gpu is None else gpus.index(gpu)
            platform = platform.model_copy(update={"gpu": number})
        if platform not in self._fingerprints:
            seen = fingerprint(self._machine, platform)
            self._fingerprints[platform] = seen, fingerprint_hash(seen)
        return self._fingerprints[platform]


@contextmanager
def _user_errors(study_dir: Path) -> Iterator[None]:
    """A folder that refuses files or locks is the user's to mend."""
    try:
        yield
    except OSError as error:
        mend = "Free space or mend permissions (the file system must have locks)"
        raise unusable(f"use the study's folder {study_dir}", study_dir, error, mend) from error
