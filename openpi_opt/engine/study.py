"""The engine of a sweep: keeps every device busy with the next configuration, and every result.

It knows nothing of Hydra: a point of the space becomes a configuration through the `compose` that
it is given, and a configuration a result through `run`. One thread decides, journals and tells;
each trial has a thread that watches its process, and a process of its own makes the copies for
Optuna's database and MLflow (`track/copies.py`). Several sweeps may work on one study: claims keep
them from measuring anything twice, and the journal tells each what the others found.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

from openpi_opt import interrupt
from openpi_opt.config import RACE_FILE, Config, is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import Executor, LocalExecutor, LostError, Run
from openpi_opt.engine.goals import check_limits, check_same, goals, settle, with_pruning
from openpi_opt.engine.known import measured_again
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.lessons import Lessons
from openpi_opt.engine.pace import Pace, Timed
from openpi_opt.engine.plan import Plan, StudyRequest, announce, make_plan, space_hash
from openpi_opt.engine.recovery import forget
from openpi_opt.engine.trials import Job, Race, Trials, cannot_run, label, lost_result, refused
from openpi_opt.errors import UserError
from openpi_opt.process.devices import Devices, Slot
from openpi_opt.process.environment import cleared_names
from openpi_opt.process.run import run_trial
from openpi_opt.remote.remote import Nodes, RemoteExecutor
from openpi_opt.result import Ok, TrialResult, write_atomic
from openpi_opt.space.neighbours import NOISE, Neighbours
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.points import Compose, Points
from openpi_opt.space.sensible import LeftOut, NotSensibleError
from openpi_opt.space.sources import Enumerated, Sampled, Source
from openpi_opt.track.copies import Copies
from openpi_opt.track.identity import summary
from openpi_opt.track.journal import Record
from openpi_opt.track.optuna_copy import write_space
from openpi_opt.track.store import Store

# How often to look what other sweeps have finished, while there is something to wait for.
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class StudyOutcome:
    """What there is now: the records of the points of this space, and of their baselines.

    `left_out` says which classes of combinations were not tried, and why; `remarks` what is known
    of the best one's neighbours; `kept` what has changed since, by uid, of records that answer by
    `keep_source`.
    """

    name: str
    store: Store
    points: list[Record]
    baselines: list[Record]
    ended: str
    new: int
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    criteria: Criteria = field(default_factory=Criteria)
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def records(self) -> list[Record]:
        """Points and baselines, each once, in the order of their numbers."""
        both = {record.number: record for record in [*self.points, *self.baselines]}
        return [both[number] for number in sorted(both)]

    @property
    def exit_code(self) -> int:
        """0 when at least one point is ok, whether new or earlier."""
        return 0 if any(isinstance(record.result, Ok) for record in self.points) else 1


def run_study(
    request: StudyRequest,
    compose: Compose,
    display: Display,
    run: Run = run_trial,
    nodes: Nodes | None = None,
) -> StudyOutcome:
    """Try the points of a space, one on each free device, and return all that is known of them.

    With `nodes` the trials run there, and `request.machine` is theirs.

    Raises:
        UserError: a wrong value, or a store, study or database that cannot be used; what was
            recorded before is kept.
        KeyboardInterrupt: the running trials were ended, the finished ones are kept.
    """
    allow_lossy = request.settings.objective.allow_lossy
    points = Points(request.space, compose, request.machine, allow_lossy)
    checked = points.check()
    first = checked[0]
    criteria = goals(request.settings.objective, first, request.machine)
    found = Devices(request.settings.devices, request.machine)
    if nodes is None:
        found.check(checked)
    plan = make_plan(request)
    request = with_pruning(request, plan, criteria, display)
    store = Store.open(request.settings.store)
    check_same(criteria, store.study_dir(request.name))
    pace = Pace(request.settings.minutes)
    executor: Executor
    if nodes is None:
        found.slots(first.device)
        executor = LocalExecutor(run, store, request.machine, found, display)
    else:
        executor = RemoteExecutor(nodes, store, display, first.device)
    count = executor.count()
    announce(request, first, store, plan, display)
    for text in [*found.notes, *([f"up to {count} trials at a time"] if count > 1 else [])]:
        display.note(text)
    ledger = Ledger.open(
        *(store, request.name, request.command, request.machine, display),
        gpu_index=found.gpu_index,
        fresh=request.settings.fresh,
        keep_source=request.settings.keep_source,
        nodes=None if nodes is None else nodes.fingerprint,
    )
    ledger.takes_pruned = request.settings.pruning is not None
    engine: _Engine | None = None
    copies: Copies | None = None
    try:
        settle(criteria, ledger, display)
        machine_hash = ledger.fingerprint_hash(first)
        space = space_hash(request.space, machine_hash, criteria.objectives)
        optimizer = _optimizer(request, plan, ledger, criteria, points, pace)
        with ledger.planning():
            write_space(ledger.study_dir, space, request.space.distributions())
        copies = Copies(
            *(store, ledger.study_dir, first.tracking, display.note),
            storage=request.settings.storage,
        )
        trials = Trials(ledger, executor, request.machine, display, space)
        engine = _Engine(
            request, points, ledger, optimizer, trials, executor, display, criteria, pace
        )
        ended = engine.run(plan)
        engine.note_passed_over()
        engine.note_measured()
        ledger.draw()
    finally:
        executor.close()
        ledger.close()
        if copies is not None:
            copies.close(len(ledger.journal))
    return engine.outcome(store, ended)


def _optimizer(
    request: StudyRequest,
    plan: Plan,
    ledger: Ledger,
    criteria: Criteria,
    points: Points,
    pace: Pace,
) -> Optimizer:
    settings = request.settings
    # Neither sweeps that begin at the same time nor one that goes on are to propose the same.
    seed = settings.seed + 7919 * ledger.others + len(ledger.journal)
    return Optimizer(
        *(request.space, plan.sampler, seed, criteria),
        allow_lossy=settings.objective.allow_lossy,
        points=points,
        patience=pace.patience,
        hurried=pace.is_short(),
    )


@dataclass
class _Engine:
    request: StudyRequest
    points: Points
    ledger: Ledger
    optimizer: Optimizer
    trials: Trials
    executor: Executor
    display: Display
    criteria: Criteria
    pace: Pace
    _ready: list[Job] = field(default_factory=list)  # claimed, without a device
    _waiting: list[Job] = field(default_factory=list)  # measured by somebody else
    _running: dict[Future[TrialResult], Job] = field(default_factory=dict)
    _refused: list[UserError] = field(default_factory=list)
    _passed_over: Counter[LeftOut] = field(default_factory=Counter)
    _baselines: dict[str, Record | None] = field(default_factory=dict)
    _lessons: Lessons = field(default_factory=Lessons)
    _best: dict[str, float] = field(default_factory=dict)  # milliseconds, by context
    _left_out: dict[str, int] = field(default_factory=dict)
    _used: Callable[[], float] = float  # the part of the number of trials that is used
    neighbours: Neighbours | None = None  # where a sampler chooses
    _read: int = 0  # records of the journal that were looked at
    _started: float = field(default_factory=time.monotonic)

    def run(self, plan: Plan) -> str:
        """Keep the devices busy until there is nothing more to try; returns why that is."""
        try:
            self._begin()
            self._note_outdated(plan)
            source = self._source(plan)
            while True:
                self._look_at_waiting(source)
                self._fill(source)
                if source.ended and not (self._running or self._ready or self._waiting):
                    return source.ended
                self._collect(source)
        except KeyboardInterrupt:
            self.display.note(
                f"interrupted: the {len(self.ledger.journal)} finished trial(s) are kept, and "
                f"{len(self._running)} running ended (Ctrl-C again: at once). "
                f"To continue, run the same command with study={self.request.name}"
            )
            interrupt.told()
            raise
        finally:
            self._end()

    def _begin(self) -> None:
        """Take in what is known, and name what trials do not inherit."""
        if self.request.settings.fresh:  # the sampler keeps what it learned
            self._learn(known_from=0)
            self.optimizer.forget()
        self._learn()
        cleared = cleared_names()
        if cleared:
            self.display.note(
                f"not passed on to trials, since they would change them: {', '.join(cleared)}"
            )

    def _note_outdated(self, plan: Plan) -> None:
        """Say which known results of this command's points do not answer, and why."""
        machines = self.ledger.fingerprint_hashes()
        old = [
            record
            for record in self.ledger.journal.records()
            if record.role != "confirm"
            and record.fingerprint_hash in machines
            and record.number >= self.ledger.known_from
            and not self.ledger.answers(record)
        ]
        asked = [Config.load(record.result.config) for record in old]
        if plan.enumerated and old:
            asked = self._enumerated()
        changed = {cfg.hash(): self.ledger.outdated(cfg) for cfg in asked}
        text = measured_again(filter(None, changed.values()), sampled=not plan.enumerated)
        if text is not None:
            self.display.note(text)

    def _enumerated(self) -> list[Config]:
        """The configurations of an enumeration, with their baselines."""
        found: dict[str, Config] = {}
        for params in self.request.space.all():
            try:
                cfg = self.points.config(params)
            except UserError:
                continue
            found.setdefault(cfg.hash(), cfg)
            if len(found) >= self.request.settings.most_trials:
                break
        plain = [cfg.baseline() for cfg in found.values()]
        with_baseline = self.request.swept and self.request.settings.baseline
        return [*found.values(), *(plain if with_baseline else [])]

    def _source(self, plan: Plan) -> Source:
        """Where the points come from."""
        space, limit = self.request.space, self.request.settings.most_trials
        source: Source
        if plan.enumerated:
            source = Enumerated(space, limit)
        else:
            source = sampled = Sampled(
                *(self.optimizer, space, limit, self._open_hashes), self._neighbours()
            )
            self._used = sampled.share
        return Timed(source, self.pace)

    def _neighbours(self) -> Neighbours | None:
        """Those of the best point, where one objective says which that is."""
        if self.criteria.several:
            return None
        self.neighbours = Neighbours(
            *(self.optimizer, self.request.space, self.points),
            share=lambda: max(self._used(), self.pace.share()),
            hurried=self.pace.is_short(),
        )
        return self.neighbours

    def _end(self) -> None:
        """End what still runs."""
        jobs = [*self._ready, *self._waiting, *self._running.values()]
        try:
            # Also what an interruption kept from being counted among those that run.
            self.executor.stop()
            self.executor.close()
        finally:
            for job in jobs:
                job.let_go()

    def note_passed_over(self) -> None:
        """Say what of a named space was never started, and why."""
        for reason, number in self._passed_over.most_common():
            self.display.note(f"passed over {number}, {reason.kind}: {reason.reason}")

    def note_measured(self) -> None:
        """Say for how much of the time a trial had each device for itself."""
        seconds = time.monotonic() - self._started
        measured = sorted(self.executor.measured().items())
        shares = [f"{name} {had / seconds:.0%}" for name, had in measured]
        if shares and self.trials.new > 1:
            self.display.note(f"measured in {seconds:.0f} s: {', '.join(shares)} of the time")

    def outcome(self, store: Store, ended: str) -> StudyOutcome:
        """All that is known of the points of this space, also from earlier runs.

        Raises:
            UserError: the values contradict each other in every combination.
        """
        machines = self.ledger.fingerprint_hashes()
        newest = {
            record.result.config_hash: record
            for record in self.ledger.journal.records()
            if record.role != "confirm"
            and record.fingerprint_hash in machines
            and self.ledger.known.answers(record)
        }
        found = [newest[tried] for tried in self.optimizer.tried if tried in newest]
        if not found and self._refused:
            raise self._refused[0]
        texts = {known.text(0): known for known in self._lessons.classes}
        kept = self.ledger.known.kept([*found, *filter(None, self._baselines.values())])
        return StudyOutcome(
            name=self.request.name,
            store=store,
            points=sorted(found, key=lambda record: record.number),
            baselines=[record for record in self._baselines.values() if record is not None],
            ended=ended,
            new=self.trials.new,
            left_out=[
                known.text(self._left_out[text])
                for text, known in texts.items()
                if text in self._left_out
            ],
            criteria=self.criteria,
            kept=kept if self.request.settings.keep_source else {},
            remarks=self._remarks(),
        )

    def _remarks(self) -> list[str]:
        """How much the best of a sampled study is known to be the best, and a simpler one."""
        if self.neighbours is None:
            return []
        near, simpler = self.neighbours.text(self.optimizer.tried), self.neighbours.simplest()
        lines = [near] if near else []
        if simpler is not None:
            cfg = self.points.config(simpler[0])
            lines.append(
                f"simplest within {NOISE:.1%} of the best: {simpler[1]:.3f} ms, "
                f"{label(cfg, 'trial', {})}"
            )
        return lines

    def _fill(self, source: Source) -> None:
        """Start a trial on every device that is free, as long as there is something to try."""
        if source.ended and not self._ready:
            self.executor.rest()
            return
        for lease in self.executor.free():
            try:
                job = self._job_for(lease.slot, source)
                if job is None:
                    lease.release()
                else:
                    future = self.trials.start(job, lease, self._race(job))
                    self.pace.began(job.uid)
                    self._running[future] = job
            except BaseException:
                lease.release()
                raise
        if self.executor.contended and not self._running:
            self._job_for(None, source)  # answer at least what is known

    def _job_for(self, slot: Slot | None, source: Source) -> Job | None:
        """The first job that is ready and suits the slot, else the next of the source.

        Without a slot: none, but until one is ready the points of the source are looked at.
        """
        while True:
            job = self._take_ready(slot)
            if job is not None:
                return job
            if source.ended or len(self._ready) >= (self.executor.count() if slot else 1):
                return None
            with self.ledger.planning():
                proposal = source.next()
                if proposal is None:
                    return None
                self._consider(proposal, source)

    def _take_ready(self, slot: Slot | None) -> Job | None:
        """The first job that suits the slot; those that cannot run here are refused on the way."""
        while slot is not None:
            suiting = (job for job in self._ready if self.executor.suits(slot, job.cfg))
            job = next(suiting, None)
            if job is None:
                return None
            self._ready.remove(job)
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
            check_limits(self.criteria, cfg)
        except UserError as error:
            self._leave_out(proposal, position, error)
            source.seen(None, passed_over=isinstance(error, NotSensibleError))
            return
        job = Job(cfg, "trial", position, proposal)
        if self._is_barred(job) or self._is_double(job):
            source.seen(None)
            return
        self._want_baseline(cfg)
        new = job.config_hash not in self.optimizer.tried
        self._route(job, shown=new or proposal.number is None)
        source.seen(job.config_hash)

    def _is_barred(self, job: Job) -> bool:
        """Whether the point belongs to a class that fails, and is not known either."""
        assert job.proposal is not None
        known = self._lessons.bars(job.params)
        if known is None or self.ledger.find(job.cfg) is not None:
            return False
        self._left_out[known.text(0)] = self._left_out.get(known.text(0), 0) + 1
        self.optimizer.give_up(job.proposal, learn=True)
        return True

    def _is_double(self, job: Job) -> bool:
        """Whether the sampler proposed what is being measured already."""
        assert job.proposal is not None
        if job.proposal.number is None or job.config_hash not in self._own_hashes():
            return False
        self.optimizer.give_up(job.proposal, learn=False)
        return True

    def _want_baseline(self, cfg: Config) -> None:
        """The plain eager policy, before the first trial of each context."""
        if not (self.request.swept and self.request.settings.baseline):
            return
        if cfg.context_hash() not in self._baselines:
            self._baselines[cfg.context_hash()] = None
            self._route(Job(cfg.baseline(), "baseline", "[-]"), shown=False)

    def _route(self, job: Job, shown: bool = True) -> None:
        """Answer a job from the journal, or make it ready, or wait for who measures it."""
        record = self.ledger.find(job.cfg)
        if record is not None:
            self._answer(job, record, shown)
        elif not self.trials.claim(job):
            self._waiting.append(job)
        else:
            self._claimed(job, shown)

    def _claimed(self, job: Job, shown: bool = True) -> None:
        record = self.ledger.find(job.cfg)
        if record is not None:  # measured between the first look and the claim
            self._answer(job, record, shown)
            return
        self._ready.append(job)

    def _look_at_waiting(self, source: Source) -> None:
        """Answer what others have measured meanwhile, and take over what they gave up."""
        if not self._waiting:
            return
        self.ledger.refresh()
        waiting, self._waiting = self._waiting, []
        with self.ledger.planning():
            for job in waiting:
                self._route(job)
        if len(self._waiting) < len(waiting):
            source.wake()
        self._learn()

    def _collect(self, source: Source) -> None:
        """Wait until something ends, here or where that has to be looked at, and keep it."""
        poll = self._waiting or self._ready or not source.ended
        if not self._running:
            time.sleep(_POLL_SECONDS)
            return
        done, _ = wait(self._running, _POLL_SECONDS if poll else None, FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self._running[future].position):
            job = self._running.pop(future)
            assert job.lease is not None
            self.display.stop(job.lease.slot.name)
            try:
                result = future.result()
                self._finish(job, result)
            except LostError as error:
                self._lost(job, error)
            except OSError as error:
                raise cannot_run(job.folder or self.ledger.study_dir, error) from error
            finally:
                if job not in self._ready:
                    job.let_go()
            source.wake()
        if done:
            self._learn()

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
        self._ready.append(job)

    def _finish(self, job: Job, result: TrialResult) -> None:
        """Keep a result, and tell it.

        The order matters: what is in the journal is safe, so Optuna hears of it only then.
        """
        record = self.trials.keep(job, result)
        self.pace.ended(job.uid)
        self._tell(job, record)
        self.display.end(
            *(job.position, job.title, record), known=False, remark=self._remark(record)
        )

    def _answer(self, job: Job, record: Record, shown: bool) -> None:
        """A job whose result is known."""
        job.let_go(done=True)
        self._tell(job, record)
        if shown and job.proposal is not None:
            title = label(job.cfg, job.role, job.params)
            changed = self.ledger.known.changes(record)
            if changed:
                title += f" [before {summary([changed])}]"
            self.display.end(job.position, title, record, known=True)

    def _remark(self, record: Record) -> str:
        """How a result stands against the best so far, and how the sweep gets on."""
        result = record.result
        best, words = self._best.get(result.context_hash), []
        if best is not None and isinstance(result, Ok):
            gain = result.latency.mean_ms / best - 1
            words.append("best so far" if gain <= 0 else f"{gain:+.1%} to the best")
        if record.role == "trial" and self.request.swept:
            words.append(f"[{self.pace.text()}]")
        return ", ".join(words[:-1]) + " " + words[-1] if words else ""

    def _race(self, job: Job) -> Race:
        """What a trial runs against; a baseline is to compare with, however slow."""
        pruning, best = self.request.settings.pruning, self._best.get(job.cfg.context_hash())
        if job.proposal is None or self.criteria.objectives != ("latency",):
            return Race()
        assert pruning != "auto"  # settled before anything runs
        return Race(best, pruning)

    def _note_best(self, result: TrialResult) -> None:
        if not isinstance(result, Ok):
            return
        if self.criteria.over(result):  # fast perhaps, but never the best
            return
        may_win = self.criteria.allow_lossy or not is_lossy(result.config)
        if may_win and result.latency.mean_ms < self._best.get(result.context_hash, math.inf):
            self._best[result.context_hash] = result.latency.mean_ms
            write_atomic(self.ledger.study_dir / RACE_FILE, json.dumps(self._best))

    def _tell(self, job: Job, record: Record) -> None:
        self._note_best(record.result)
        if job.proposal is None:
            self._baselines[job.cfg.context_hash()] = record
        else:
            self.optimizer.tell(job.proposal, record.result)
            self._teach(job.params, record.result)

    def _teach(self, params: dict[str, str], result: TrialResult) -> None:
        known = self._lessons.add(params, result)
        if known is not None:
            shown = " ".join(f"{key}={value}" for key, value in sorted(known.pairs))
            self.display.note(f"no more of {shown}: {known.seen} of it ended {known.way}")

    def _learn(self, known_from: int | None = None) -> None:
        """Take in what other sweeps recorded for this space, and earlier ones."""
        new = self.ledger.journal.since(self._read)
        self._read += len(new)
        known_from = self.ledger.known_from if known_from is None else known_from
        space, answers = self.trials.space, self.ledger.known.answers
        ours = [
            record
            for record in new
            if record.space == space and record.number >= known_from and answers(record)
        ]
        # A point that is asked is told, when its job looks at the journal.
        open_points = [job.params for job in [*self._waiting, *self._running.values()]]
        found = [record for record in ours if record.params not in open_points]
        self.optimizer.learn((record.params, record.result) for record in found)
        for record in found:
            self._note_best(record.result)
            self._teach(record.params, record.result)

    def _own_hashes(self) -> set[str]:
        jobs = [*self._ready, *self._waiting, *self._running.values()]
        return {job.config_hash for job in jobs if job.proposal is not None}

    def _open_hashes(self) -> set[str]:
        """What is being measured for this space, here and by other sweeps; learns the rest."""
        measured = self._own_hashes() | self.ledger.live(self.trials.space)
        self.ledger.refresh()
        self._learn()
        return measured

    def _leave_out(self, proposal: Proposal, position: str, error: UserError) -> None:
        """A combination whose values contradict each other: said, learned from, not counted."""
        self._refused.append(error)
        if isinstance(error, NotSensibleError):
            self._passed_over[error.left_out] += 1
            self.optimizer.give_up(proposal, learn=True)
            return
        shown = " ".join(f"{key}={text}" for key, text in proposal.params.items())
        self.display.note(f"{position} {shown} left out: {error}")
        self.optimizer.give_up(proposal, learn=True)
