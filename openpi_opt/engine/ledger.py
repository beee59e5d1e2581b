"""Keeping results: the journal first, then whoever wants a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from openpi_opt import interrupt
from openpi_opt.config import Config, Platform, Tracking
from openpi_opt.engine.background import Background
from openpi_opt.engine.display import Display
from openpi_opt.engine.recovery import Started, recover, runs_elsewhere
from openpi_opt.errors import UserError
from openpi_opt.machine import Device, Gpu, Machine
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.result import Pruned, TrialResult
from openpi_opt.track import pareto
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record, Role
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError
from openpi_opt.track.store import Store


class Ledger:
    """The records of one study, shared by the sweeps that work on it. Make it with `open`.

    Only the thread that opened it may use it; deliveries happen in a thread of their own.
    """

    def __init__(
        self,
        study_dir: Path,
        journal: Journal,
        log: MlflowLog | None,
        machine: Machine,
        display: Display,
        controllers: Controllers,
        gpu_index: Callable[[Device], int],
        nodes: Callable[[Device], dict[str, Any]] | None = None,
    ):
        self.study_dir = study_dir
        self.journal = journal
        self.claims = Claims(study_dir)
        self.controllers = controllers
        self.later = Background()
        self._log = log
        self._machine = machine
        self._display = display
        self._gpu_index = gpu_index
        self._nodes = nodes
        self._fingerprints: dict[Platform, tuple[dict[str, Any], str]] = {}
        self._told_away = False
        self._early: list[Record] | None = []  # finished before the log was begun
        self._log_opened = Future[None]()  # also when the server is away; the backlog comes after
        self._log_is_open = False
        self.known_from = 0
        self.takes_pruned = False  # as an answer: only a sweep that prunes itself does
        self.others = 0  # sweeps that were at work already
        self._plan_lock = FileLock(study_dir / "plan.lock")

    @staticmethod
    def open(
        store: Store,
        study: str,
        tracking: Tracking,
        command: Sequence[str],
        machine: Machine,
        display: Display,
        gpu_index: Callable[[Device], int] = lambda device: 0,
        fresh: bool = False,
        nodes: Callable[[Device], dict[str, Any]] | None = None,
    ) -> Ledger:
        """Join the study, and clear up behind sweeps that were killed. End with `close`.

        `gpu_index` tells which GPU stands for those that are used; with `fresh` nothing that was
        recorded before counts as known. Where trials run elsewhere, `nodes` tells the fingerprint
        that they share.

        Raises:
            UserError: its journal cannot be used.
        """
        study_dir = store.study_dir(study)
        journal = Journal.open(study_dir, command)
        for text in journal.notes:
            display.note(f"note: {text}")
        log = MlflowLog(store, tracking) if tracking.mlflow else None
        with _user_errors(study_dir):
            controllers = Controllers.join(study_dir)
            ledger = Ledger(
                *(study_dir, journal, log, machine, display, controllers),
                gpu_index=gpu_index,
                nodes=nodes,
            )
            try:
                with controllers.alone():
                    ledger._recover()
                    ledger.known_from = journal.next_number if fresh else 0
                    ledger.others = controllers.others()
            except BaseException:
                ledger._leave(at_once=log is None or not log.begun)
                raise
        return ledger

    def find(self, cfg: Config) -> Record | None:
        """The record of an equal configuration on an equal machine."""
        record = self.journal.find(cfg.hash(), self.fingerprint_hash(cfg))
        if record is None or record.number < self.known_from:
            return None
        if not isinstance(record.result, Pruned) or self.takes_pruned:
            return record
        # What is surely slower than the limit of today, too, would only be ended again.
        limit = cfg.limits.latency_ms
        return record if limit is not None and record.result.seen_low_ms > limit else None

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

    def begin_log(self) -> None:
        """Begin the study in MLflow, which takes seconds: the import. What is missing there is
        delivered afterwards, beside the trials.

        Raises:
            UserError: MLflow's database is of another version, or the experiment was deleted.
        """
        if self._log is None:
            return
        self._queue_begin()
        self._log_opened.result()

    def deliver(self, record: Record) -> None:
        """Log a record to MLflow, if it takes it, and not now; the journal has it anyhow.

        Raises:
            UserError: of an earlier delivery, for instance an experiment that was deleted.
        """
        self.later.check()
        if self._log is None:
            return
        if self._early is None:
            self.later.add(lambda: self._deliver(record))
        else:
            self._early.append(record)

    def draw(self) -> None:
        """Leave the Pareto sets as data and plots in the study's folder, where there are several
        objectives.

        Raises:
            UserError: the folder cannot be written.
        """
        self.refresh()
        with _user_errors(self.study_dir):
            pareto.write(self.study_dir, self.journal.records())

    def close(self, at_once: bool = False) -> None:
        """Wait for the deliveries and leave the study; the last sweep ends MLflow's run.

        `at_once`, or when interrupted: without MLflow, which the next sweep or `track sync` brings
        up to date.
        """
        try:
            if not at_once:
                if self._early is not None and self._log is not None:
                    self._queue_begin()
                self.later.finish(self._say_waiting)
        except KeyboardInterrupt:
            at_once = True
            raise
        finally:
            self._leave(at_once)

    def _leave(self, at_once: bool) -> None:
        with interrupt.shielded(), self.controllers.alone():
            try:
                if not at_once and self._log is not None and (self._log_is_open or self._log.begun):
                    self.refresh()
                    self._log.judge(self.study_dir, self.journal.records())
                    if self.controllers.others() == 0:
                        self._log.end_study(self.study_dir)
            except TrackingError as error:
                self._away(error)
            finally:
                self.controllers.leave()

    def _say_waiting(self) -> None:
        if self._log is None:  # Optuna's copies, which are made on this host
            return
        self._display.note(
            "waiting for MLflow to take the last results; the journal has them (Ctrl-C: end now; "
            "`python -m openpi_opt.track sync` delivers them)"
        )

    def _recover(self) -> None:
        recover(self.study_dir, self.journal, self.controllers, self.claims, self._display.note)

    def _deliver(self, record: Record) -> None:
        assert self._log is not None
        try:
            self._log.deliver(record, self.study_dir)
        except TrackingError as error:
            self._away(error)

    def _queue_begin(self) -> None:
        """In the thread of deliveries, and before them: Ctrl-C breaks MLflow's import."""
        self.later.add(self._begin_log)
        early, self._early = self._early, None
        for record in early or ():
            self.deliver(record)

    def _begin_log(self) -> None:
        assert self._log is not None
        try:
            self._log.begin_study(self.study_dir)
        except UserError as error:
            self._log_opened.set_exception(error)
            raise
        except TrackingError as error:
            self._away(error)
            begun = False
        else:
            begun = True
        self._log_is_open = True
        self._log_opened.set_result(None)
        if begun:
            self._sync_log()

    def _sync_log(self) -> None:
        """Deliver what an earlier sweep could not, and end the runs that it left open.

        It may take long, and nobody waits for it.
        """
        assert self._log is not None
        try:
            self._log.sync(self.study_dir, self.journal)
        except TrackingError as error:
            self._away(error)

    def _away(self, error: TrackingError) -> None:
        """Say it once: the rest of the sweep would repeat it after every trial."""
        if not self._told_away:
            self._told_away = True
            self._display.note(f"warning: {error}")

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
        raise UserError(
            f"cannot use the study's folder {study_dir}: {error.strerror or error}.\n"
            "Everything recorded before is kept. Free space or mend permissions (the file system "
            "must have locks), then run the same command again to continue."
        ) from error
