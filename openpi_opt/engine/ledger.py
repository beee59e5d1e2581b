"""Keeping results: claims, folders of trials, and the journal, which is the truth.

Also which recorded results answer for a configuration today, and why others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from openpi_opt.config import Config, Platform
from openpi_opt.engine.display import Display, label
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.recovery import Started, recover, runs_elsewhere
from openpi_opt.machine import Device, Gpu, Machine
from openpi_opt.process import locks
from openpi_opt.process.devices import Lease
from openpi_opt.process.locks import Claims, Controllers, Held
from openpi_opt.result import Pruned, Refused, TrialResult
from openpi_opt.space.optimizer import Proposal
from openpi_opt.space.points import left_out
from openpi_opt.track import identity, study_plots
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record, Role
from openpi_opt.track.store import Store, unusable


@dataclass(eq=False)
class Job:
    """A configuration to measure for a point of `space`, or for a baseline, which has no proposal.

    `claim` is there once the job is ours, `folder` and `alive` once it was started.
    """

    cfg: Config
    role: Role
    position: str = "[-]"
    proposal: Proposal | None = None
    space: str = ""
    claim: Held | None = None
    uid: str = field(default_factory=lambda: uuid4().hex)
    folder: Path | None = None
    alive: Held | None = None
    lease: Lease | None = None
    config_hash: str = ""
    lost: bool = False

    def __post_init__(self) -> None:
        self.config_hash = self.cfg.hash()  # asked for often

    @property
    def params(self) -> dict[str, str]:
        """The point's values; a baseline has none."""
        return self.proposal.params if self.proposal else {}

    @property
    def title(self) -> str:
        """What tells it apart on the screen."""
        return label(self.cfg, self.role, self.params)

    def begin_again(self) -> None:
        """Be another trial of the same claim: the device and what was started are given up."""
        if self.lease is not None:
            self.lease.release()
        if self.alive is not None:
            self.alive.release(remove=True)
        self.lease = self.folder = self.alive = None
        self.uid, self.lost = uuid4().hex, True

    def let_go(self, done: bool = False) -> None:
        """Release device and claim; `done` when the journal has the result."""
        if self.lease is not None:
            self.lease.release()
        for held in (self.alive, self.claim):
            if held is not None:
                held.release(remove=done)


@dataclass
class Known:
    """Judges records of one kind of machine. With `keep_source` changed files do not matter."""

    machine: Machine
    keep_source: bool = False
    _changes: dict[str, list[str]] = field(default_factory=dict)

    def answers(self, record: Record) -> bool:
        """Whether the record's result is what would be measured today, or is taken for it."""
        return self.keep_source or not self.changes(record)

    def changes(self, record: Record) -> list[str]:
        """What has changed since the result was measured; see `identity.changes`."""
        if record.uid not in self._changes:
            result = record.result
            found = identity.changes(result)
            if isinstance(result, Refused) and not result.files:  # no process: asking is cheap
                again = left_out(Config.load(result.config), self.machine, allow_lossy=True)
                found = [] if again else ["what the knobs check"]
            self._changes[record.uid] = found
        return self._changes[record.uid]

    def kept(self, records: Iterable[Record]) -> dict[str, str]:
        """What has changed since, by uid, of the records that answer all the same."""
        changed = {record.uid: self.changes(record) for record in records}
        return {uid: identity.summary([names]) for uid, names in changed.items() if names}


class Ledger:
    """The records of one study, shared by the sweeps that work on it, until `close`.

    Making it joins the study, and clears up behind sweeps that were killed. Only the thread that
    made it may use it. UserError says what in the study's folder cannot be used.
    """

    def __init__(
        self,
        store: Store,
        request: StudyRequest,
        display: Display,
        gpu_index: Callable[[Device], int] = lambda device: 0,
        nodes: Callable[[Device], dict[str, Any]] | None = None,
    ):
        """`gpu_index` tells which GPU stands for those that are used.

        Where trials run elsewhere, `nodes` tells the fingerprint that they share.
        """
        settings, self._machine = request.settings, request.machine
        self.study_dir = store.study_dir(request.name)
        self.known = Known(request.machine, settings.keep_source)
        self._display, self._gpu_index, self._nodes = display, gpu_index, nodes
        self._takes_pruned = settings.pruning is not None
        self._fingerprints: dict[Platform, tuple[dict[str, Any], str]] = {}
        self.journal = Journal.open(self.study_dir, request.command)
        for text in self.journal.notes:
            display.note(f"note: {text}")
        with self._user_errors():
            self.claims = Claims(self.study_dir)
            self.controllers = Controllers(self.study_dir, display.note)
            try:
                self._recover()
                self.known_from = self.journal.next_number if settings.fresh else 0
                with self.controllers.alone():
                    self.others = self.controllers.others()  # sweeps that were at work already
            except BaseException:
                self.close()
                raise

    def find(self, cfg: Config) -> Record | None:
        """The record of an equal configuration, measured by equal code on an equal machine."""
        found = cfg.hash(), self.fingerprint_hash(cfg)
        record = self.journal.find(*found, self.answers)
        if record is None or not isinstance(record.result, Pruned) or self._takes_pruned:
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

    def measured_here(self) -> list[Record]:
        """All records of trials on the machines that were asked for so far."""
        machines = {known for _, known in self._fingerprints.values()}
        return [
            record
            for record in self.journal.records()
            if record.role != "confirm" and record.fingerprint_hash in machines
        ]

    @contextmanager
    def planning(self) -> Iterator[None]:
        """While one sweep of the study decides what it measures next, no other does."""
        lock = locks.having(self.study_dir / "plan.lock", self._display.note)
        with self._user_errors(), lock:
            yield

    def claim(self, job: Job) -> bool:
        """Get the right to measure the job's configuration; False while somebody else has it.

        Look with `find` again afterwards: it may just have been measured.
        """
        asked = job.config_hash, self.fingerprint_hash(job.cfg)
        with self._user_errors():
            claim = self.claims.take(*asked, job.space)
            if claim is None:
                return False
            self.journal.refresh()
            if claim.found and self.find(job.cfg) is None:  # its last holder was killed
                self._recover()
                if runs_elsewhere(self.study_dir, self.journal, *asked):
                    claim.release()
                    return False
        job.claim = claim
        return True

    def live(self, space: str) -> set[str]:
        """Hashes of what is being measured for `space`, here and elsewhere.

        What killed sweeps had finished is journaled first: it counts, or there would be one more
        trial than asked for.
        """
        with self._user_errors():
            measured, left = self.claims.live(space)
            if left:
                self._recover()
                measured, _ = self.claims.live(space)
        return measured

    def fingerprint_hash(self, cfg: Config) -> str:
        """Hash of the machine and software that run `cfg`."""
        return self._fingerprint(cfg, None)[1]

    def start(self, job: Job) -> None:
        """Make the folder of a trial, and the lock that it holds as long as it lives."""
        folder = self.study_dir / "trials" / job.uid[:12]
        job.alive = self._about(job).write(folder)
        job.folder = folder

    def keep(self, job: Job, result: TrialResult) -> Record:
        """Put a result on disk; when this returns, it cannot be lost."""
        about = self._about(job)
        if self._nodes is not None and result.fingerprint:  # the node says which GPU it was
            about = about.model_copy(update={"fingerprint": result.fingerprint})
        return self.journal.append(about.record(self.study_dir, job.folder, job.cfg, result))

    def draw(self) -> None:
        """Leave plots and their data in the study's folder: the best so far, and Pareto sets."""
        self.journal.refresh()
        with self._user_errors():
            study_plots.write(self.study_dir, self.journal.records())

    def close(self) -> None:
        """Leave the study. No lock is waited for: its holder may be stopped."""
        self.controllers.leave()

    def _recover(self) -> None:
        with self.controllers.alone():
            say = self._display.note
            recover(self.study_dir, self.journal, self.controllers, self.claims, say)

    def _about(self, job: Job) -> Started:
        seen, seen_hash = self._fingerprint(job.cfg, job.lease.slot.gpu if job.lease else None)
        return Started(
            uid=job.uid,
            controller=self.controllers.name,
            role=job.role,
            params=job.params,
            space=job.space,
            config_hash=job.config_hash,
            context_hash=job.cfg.context_hash(),
            fingerprint=seen,
            fingerprint_hash=seen_hash,
        )

    def _fingerprint(self, cfg: Config, gpu: Gpu | None) -> tuple[dict[str, Any], str]:
        platform = cfg.platform
        if self._nodes is None and cfg.device != "cpu":
            number = platform.gpu if platform.gpu is not None else self._gpu_index(cfg.device)
            number = number if gpu is None else self._machine.gpus_for(cfg.device).index(gpu)
            platform = platform.model_copy(update={"gpu": number})
        if platform not in self._fingerprints:
            nodes = self._nodes
            seen = nodes(cfg.device) if nodes else fingerprint(self._machine, platform)
            self._fingerprints[platform] = seen, fingerprint_hash(seen)
        return self._fingerprints[platform]

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        """A folder that refuses files or locks is the user's to mend."""
        try:
            yield
        except OSError as error:
            what = f"use the study's folder {self.study_dir}"
            mend = "Free space or mend permissions (the file system must have locks)"
            raise unusable(what, self.study_dir, error, mend) from error
