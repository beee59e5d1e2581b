"""The jobs of a sweep: which configuration is next, who measures it, and what becomes of it."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, wait

from openpi_opt.engine.display import Display, label, shown
from openpi_opt.engine.executor import Executor, LostError, Task
from openpi_opt.engine.findings import Findings
from openpi_opt.engine.ledger import Job
from openpi_opt.engine.pace import Pace
from openpi_opt.engine.plan import StudyRequest, check_limits
from openpi_opt.engine.recovery import forget
from openpi_opt.errors import UserError
from openpi_opt.process.devices import Lease, Slot
from openpi_opt.process.run import cannot_run, lost, refused
from openpi_opt.result import TrialResult
from openpi_opt.space.optimizer import Proposal
from openpi_opt.space.points import LeftOut, NotSensibleError, Points
from openpi_opt.space.sources import Source
from openpi_opt.track.identity import summary
from openpi_opt.track.optuna_copy import note_point

# How often to look what other sweeps have finished, while there is something to wait for.
_POLL_SECONDS = 0.25


class Jobs:
    """All jobs without a result. `new` counts results, `passed_over` points of a named space."""

    source: Source  # where points come from; set before the first job is asked for

    def __init__(
        self,
        request: StudyRequest,
        points: Points,
        findings: Findings,
        executor: Executor,
        display: Display,
        pace: Pace,
    ):
        self.request, self.points, self.findings = request, points, findings
        self.executor, self.display, self.pace = executor, display, pace
        self.ledger = findings.ledger
        self.new = 0
        self.passed_over: Counter[LeftOut] = Counter()
        self.contradictions: list[UserError] = []
        self.ready: list[Job] = []  # claimed, without a device
        self.waiting: list[Job] = []  # measured by somebody else
        self.running: dict[Future[TrialResult], Job] = {}

    def all(self) -> list[Job]:
        """Every job without a result."""
        return [*self.ready, *self.waiting, *self.running.values()]

    @property
    def ended(self) -> str | None:
        """Why there are no more points: that of the source, or that the minutes are over."""
        return f"minutes={self.pace.minutes:g} are over" if self.pace.over else self.source.ended

    def next_for(self, slot: Slot | None) -> Job | None:
        """The first job that is ready and suits the slot, else the next of the source.

        Without a slot: none, but until one is ready the points of the source are looked at.
        """
        while True:
            job = self._take_ready(slot)
            if job is not None:
                return job
            if self.ended or len(self.ready) >= (self.executor.count() if slot else 1):
                return None
            with self.ledger.planning():
                proposal = None if self.pace.is_over() else self.source.next()
                if proposal is None:
                    return None
                self._consider(proposal)

    def start(self, job: Job, lease: Lease) -> None:
        """Start the job's trial. One that is surely slower than its race ends early."""
        job.lease = lease
        try:
            self.ledger.start(job)
        except OSError as error:
            raise cannot_run(self.ledger.study_dir, error) from error
        assert job.claim is not None
        assert job.alive is not None
        assert job.folder is not None
        self.display.begin(lease.slot.name, f"{job.position} {job.title}")
        task = Task(
            cfg=self.findings.raced(job),
            uid=job.uid,
            folder=job.folder,
            machine_hash=self.ledger.fingerprint_hash(job.cfg),
            fds=(job.claim.fd, job.alive.fd),
        )
        future = self.executor.start(task, lease)
        self.pace.began(job.uid)
        self.running[future] = job

    def look_at_waiting(self) -> None:
        """Answer what others have measured meanwhile, and take over what they gave up."""
        if not self.waiting:
            return
        self.ledger.journal.refresh()
        waiting, self.waiting = self.waiting, []
        with self.ledger.planning():
            for job in waiting:
                self._route(job)
        if len(self.waiting) < len(waiting):
            self.source.wake()
        self._learn()

    def collect(self) -> None:
        """Wait until something ends, here or where that has to be looked at, and keep it."""
        if not self.running:
            time.sleep(_POLL_SECONDS)
            return
        poll = self.waiting or self.ready or not self.ended
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
            self.source.wake()
        if done:
            self._learn()

    def open_hashes(self) -> set[str]:
        """What is being measured for this space, here and by other sweeps; learns the rest."""
        measured = self._own_hashes() | self.ledger.live(self.findings.space)
        self.ledger.journal.refresh()
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

    def _consider(self, proposal: Proposal) -> None:
        """Answer a point from the journal, refuse it, or make it a job, with its baseline."""
        position = self.source.position()
        try:
            cfg = self.points.config(proposal.params)
            check_limits(self.findings.criteria, cfg)
        except UserError as error:
            self._leave_out(proposal, position, error)
            self.source.seen(None, passed_over=isinstance(error, NotSensibleError))
            return
        job = Job(cfg, "trial", position, proposal, self.findings.space)
        if self.findings.bars(job) or self._is_double(job):
            self.source.seen(None)
            return
        if self.request.has_baselines and self.findings.wants_baseline(cfg):
            self._route(Job(cfg.baseline(), "baseline"), show=False)
        new = job.config_hash not in self.findings.optimizer.tried
        self._route(job, show=new or proposal.number is None)
        self.source.seen(job.config_hash)

    def _leave_out(self, proposal: Proposal, position: str, error: UserError) -> None:
        """A combination whose values contradict each other: said, learned from, not counted."""
        self.contradictions.append(error)
        self.findings.optimizer.give_up(proposal, learn=True)
        if isinstance(error, NotSensibleError):
            self.passed_over[error.left_out] += 1
        else:
            self.display.note(f"{position} {shown(proposal.params)} left out: {error}")

    def _is_double(self, job: Job) -> bool:
        """Whether the sampler proposed what is being measured already."""
        assert job.proposal is not None
        if job.proposal.number is None or job.config_hash not in self._own_hashes():
            return False
        self.findings.optimizer.give_up(job.proposal, learn=False)
        return True

    def _route(self, job: Job, show: bool = True) -> None:
        """Answer a job from the journal, or make it ready, or wait for who measures it."""
        record = self.ledger.find(job.cfg)
        if record is None:
            if not self.ledger.claim(job):
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
        if show and job.proposal is not None:
            title = label(job.cfg, job.role, job.params)
            changed = self.ledger.known.changes(record)
            title += f" [before {summary([changed])}]" if changed else ""
            self.display.end(job.position, title, record, known=True)

    def _finish(self, job: Job, result: TrialResult) -> None:
        """Keep a result, let go of device and claim, and tell it.

        The order matters: what is in the journal is safe, so the sampler hears of it only then.
        """
        record = self.ledger.keep(job, result)
        job.let_go(done=True)
        self.new += 1
        self.pace.ended(job.uid)
        self.findings.take(job, record)
        words = [self.findings.against_best(record.result)]
        if job.proposal is not None and self.request.swept:
            words.append(f"[{self.pace.text(job.position)}]")
        remark = " ".join(filter(None, words))
        self.display.end(job.position, job.title, record, known=False, remark=remark)

    def _lost(self, job: Job, error: LostError) -> None:
        """A trial went with its node: once more elsewhere, and then it counts as failed."""
        when = f"in phase {error.phase}" if error.phase else "before it had begun"
        self.display.note(f"{job.position} {job.title}: lost {when} ({error})")
        assert job.folder is not None
        if job.lost and not error.phase:
            raise UserError(
                f"a trial was lost twice before it had begun: {error}.\n"
                "Mend the nodes or their queue, then run the same command again to continue."
            )
        if job.lost or error.outcome == "oom":
            reason = f"ended with the node or process that ran it: {error}"[:500]
            phase = error.phase or "start"
            self._finish(job, lost(job.cfg, job.folder, error.outcome, phase, reason))
            return
        forget(job.folder)
        job.begin_again()
        self.ready.append(job)

    def _learn(self) -> None:
        asked = [*self.waiting, *self.running.values()]
        self.findings.learn(job.params for job in asked)

    def _own_hashes(self) -> set[str]:
        return {job.config_hash for job in self.all() if job.proposal is not None}
