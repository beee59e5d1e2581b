"""The jobs of a sweep: which configuration is next, who measures it, and what becomes of it."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import Executor, LostError, Task
from openpi_opt.engine.findings import Findings
from openpi_opt.engine.goals import check_limits
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.pace import Pace
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.recovery import forget
from openpi_opt.engine.trials import Job, cannot_run, label, lost_result, refused
from openpi_opt.errors import UserError
from openpi_opt.process.devices import Lease, Slot
from openpi_opt.result import TrialResult
from openpi_opt.space.optimizer import Proposal
from openpi_opt.space.points import LeftOut, NotSensibleError, Points
from openpi_opt.space.sources import Source
from openpi_opt.track.identity import summary
from openpi_opt.track.optuna_copy import note_point

# How often to look what other sweeps have finished, while there is something to wait for.
_POLL_SECONDS = 0.25


@dataclass
class Jobs:
    """All jobs without a result. `new` counts results, `passed_over` points of a named space."""

    request: StudyRequest
    points: Points
    ledger: Ledger
    findings: Findings
    executor: Executor
    display: Display
    pace: Pace
    new: int = 0
    passed_over: Counter[LeftOut] = field(default_factory=Counter)
    contradictions: list[UserError] = field(default_factory=list)
    ready: list[Job] = field(default_factory=list)  # claimed, without a device
    waiting: list[Job] = field(default_factory=list)  # measured by somebody else
    running: dict[Future[TrialResult], Job] = field(default_factory=dict)

    def all(self) -> list[Job]:
        """Every job without a result."""
        return [*self.ready, *self.waiting, *self.running.values()]

    def next_for(self, slot: Slot | None, source: Source) -> Job | None:
        """The first job that is ready and suits the slot, else the next of the source.

        Without a slot: none, but until one is ready the points of the source are looked at.
        """
        while True:
            job = self._take_ready(slot)
            if job is not None:
                return job
            if source.ended or len(self.ready) >= (self.executor.count() if slot else 1):
                return None
            with self.ledger.planning():
                proposal = source.next()
                if proposal is None:
                    return None
                self._consider(proposal, source)

    def start(self, job: Job, lease: Lease) -> None:
        """Start the job's trial. One that is surely slower than its race is not measured to its
        end.

        Raises:
            UserError: its folder cannot be made.
        """
        job.lease = lease
        try:
            job.folder, job.alive = self.ledger.started(
                *(job.cfg, job.role, job.params, self._space(job), job.uid, lease.slot.gpu)
            )
        except OSError as error:
            raise cannot_run(self.ledger.study_dir, error) from error
        assert job.claim is not None
        self.display.begin(lease.slot.name, f"{job.position} {job.title}")
        task = Task(
            cfg=self.findings.race(job).limits(job.cfg),
            uid=job.uid,
            folder=job.folder,
            machine_hash=self.ledger.fingerprint_hash(job.cfg),
            fds=(job.claim.fd, job.alive.fd),
        )
        future = self.executor.start(task, lease)
        self.pace.began(job.uid)
        self.running[future] = job

    def look_at_waiting(self, source: Source) -> None:
        """Answer what others have measured meanwhile, and take over what they gave up."""
        if not self.waiting:
            return
        self.ledger.refresh()
        waiting, self.waiting = self.waiting, []
        with self.ledger.planning():
            for job in waiting:
                self._route(job)
        if len(self.waiting) < len(waiting):
            source.wake()
        self._learn()

    def collect(self, source: Source) -> None:
        """Wait until something ends, here or where that has to be looked at, and keep it."""
        if not self.running:
            time.sleep(_POLL_SECONDS)
            return
        poll = self.waiting or self.ready or not source.ended
        done, _ = wait(self.running, _POLL_SECONDS if poll else None, FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self.running[future].position):
            job = self.running.pop(future)
            assert job.lease is not None
            self.display.stop(job.lease.slot.name)
            try:
                self._finish(job, future.result())
            except LostError as error:
                self._lost(job, error)
            except OSError as error:
                raise cannot_run(job.folder or self.ledger.study_dir, error) from error
            finally:
                if job not in self.ready:
                    job.let_go()
            source.wake()
        if done:
            self._learn()

    def open_hashes(self) -> set[str]:
        """What is being measured for this space, here and by other sweeps; learns the rest."""
        measured = self._own_hashes() | self.ledger.live(self.findings.space)
        self.ledger.refresh()
        self._learn()
        return measured

    def _take_ready(self, slot: Slot | None) -> Job | None:
        """The first job that suits the slot; those that cannot run here are refused on the way."""
        while slot is not None:
            suiting = (job for job in self.ready if self.executor.suits(slot, job.cfg))
            job = next(suiting, None)
            if job is None:
                return None
            self.ready.remove(job)
            result = refused(job.cfg, self.request.machine)
            if result is None:
                return job
            self._finish(job, result)
        return None

    def _consider(self, proposal: Proposal, source: Source) -> None:
        """Answer a point from the journal, refuse it, or make it a job, with its baseline."""
        position = source.position()
        try:
            cfg = self.points.config(proposal.params)
            check_limits(self.findings.criteria, cfg)
        except UserError as error:
            self._leave_out(proposal, position, error)
            source.seen(None, passed_over=isinstance(error, NotSensibleError))
            return
        job = Job(cfg, "trial", position, proposal)
        if self.findings.bars(job) or self._is_double(job):
            source.seen(None)
            return
        swept = self.request.swept and self.request.settings.baseline
        if swept and self.findings.wants_baseline(cfg):
            self._route(Job(cfg.baseline(), "baseline", "[-]"), shown=False)
        new = job.config_hash not in self.findings.optimizer.tried
        self._route(job, shown=new or proposal.number is None)
        source.seen(job.config_hash)

    def _leave_out(self, proposal: Proposal, position: str, error: UserError) -> None:
        """A combination whose values contradict each other: said, learned from, not counted."""
        self.contradictions.append(error)
        self.findings.optimizer.give_up(proposal, learn=True)
        if isinstance(error, NotSensibleError):
            self.passed_over[error.left_out] += 1
            return
        shown = " ".join(f"{key}={text}" for key, text in proposal.params.items())
        self.display.note(f"{position} {shown} left out: {error}")

    def _is_double(self, job: Job) -> bool:
        """Whether the sampler proposed what is being measured already."""
        assert job.proposal is not None
        if job.proposal.number is None or job.config_hash not in self._own_hashes():
            return False
        self.findings.optimizer.give_up(job.proposal, learn=False)
        return True

    def _route(self, job: Job, shown: bool = True) -> None:
        """Answer a job from the journal, or make it ready, or wait for who measures it."""
        record = self.ledger.find(job.cfg)
        if record is None:
            job.claim = self.ledger.claim(job.cfg, self._space(job))
            if job.claim is None:
                self.waiting.append(job)
                return
            record = self.ledger.find(job.cfg)  # measured between the first look and the claim
        if record is None:
            self.ready.append(job)
            return
        job.let_go(done=True)
        self.findings.take(job, record)
        if job.proposal is not None and record.params != job.params:
            note_point(self.ledger.study_dir, self.findings.space, record.uid, job.params)
        if shown and job.proposal is not None:
            title = label(job.cfg, job.role, job.params)
            changed = self.ledger.known.changes(record)
            title += f" [before {summary([changed])}]" if changed else ""
            self.display.end(job.position, title, record, known=True)

    def _finish(self, job: Job, result: TrialResult) -> None:
        """Keep a result, let go of device and claim, and tell it.

        The order matters: what is in the journal is safe, so the sampler hears of it only then.

        Raises:
            UserError: the journal cannot be written.
        """
        record = self.ledger.keep(
            *(job.cfg, result, job.role, job.params, job.uid, job.folder),
            space=self._space(job),
            gpu=job.lease.slot.gpu if job.lease else None,
        )
        job.let_go(done=True)
        self.new += 1
        self.pace.ended(job.uid)
        self.findings.take(job, record)
        words = [self.findings.against_best(record.result)]
        if job.proposal is not None and self.request.swept:
            words.append(f"[{self.pace.text(job.position)}]")
        self.display.end(
            *(job.position, job.title, record),
            known=False,
            remark=" ".join(filter(None, words)),
        )

    def _lost(self, job: Job, error: LostError) -> None:
        """A trial went with its node: once more elsewhere, and then it counts as failed.

        Raises:
            UserError: twice before it had begun, so the configuration has nothing to do with it.
        """
        when = f"in phase {error.phase}" if error.phase else "before it had begun"
        self.display.note(f"{job.position} {job.title}: lost {when} ({error})")
        assert job.folder is not None
        if job.lost and not error.phase:
            raise UserError(
                f"a trial was lost twice before it had begun: {error}.\n"
                "Mend the nodes or their queue, then run the same command again to continue."
            )
        if job.lost or error.outcome == "oom":
            self._finish(job, lost_result(job.cfg, job.folder, error))
            return
        forget(job.folder)
        job.begin_again()
        self.ready.append(job)

    def _learn(self) -> None:
        asked = [*self.waiting, *self.running.values()]
        self.findings.learn(job.params for job in asked)

    def _own_hashes(self) -> set[str]:
        return {job.config_hash for job in self.all() if job.proposal is not None}

    def _space(self, job: Job) -> str:
        """A baseline is no point of the space."""
        return "" if job.proposal is None else self.findings.space
