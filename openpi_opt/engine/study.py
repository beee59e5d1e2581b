"""The engine of a sweep: keeps every device busy with the next configuration, and every result.

It knows nothing of Hydra: a point of the space becomes a configuration through the `compose` that
it is given, and a configuration a result through `run`. One thread decides, journals and tells;
each trial has a thread that watches its process, and a process of its own makes the copies for
Optuna's database and MLflow (`track/copies.py`). Several sweeps may work on one study: claims keep
them from measuring anything twice, and the journal tells each what the others found.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from openpi_opt import interrupt
from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display, label
from openpi_opt.engine.executor import Executor, LocalExecutor
from openpi_opt.engine.findings import Findings
from openpi_opt.engine.jobs import Jobs
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.pace import Pace
from openpi_opt.engine.plan import (
    Plan,
    StudyRequest,
    announce,
    check_same,
    enumerated,
    goals,
    make_plan,
    settle,
    space_hash,
    with_pruning,
)
from openpi_opt.process.devices import Devices
from openpi_opt.process.environment import cleared_names
from openpi_opt.process.run import Run, run_trial
from openpi_opt.remote.remote import Nodes, RemoteExecutor
from openpi_opt.result import Ok
from openpi_opt.space.neighbours import NOISE, Neighbours
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.space.points import Compose, Points
from openpi_opt.space.sources import Enumerated, Sampled
from openpi_opt.track import identity
from openpi_opt.track.copies import Copies
from openpi_opt.track.journal import Record
from openpi_opt.track.optuna_copy import write_space
from openpi_opt.track.store import Store


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

    Raises UserError for what the user has to mend, and KeyboardInterrupt when the running trials
    were ended; what was recorded is kept.
    """
    objective, machine = request.settings.objective, request.machine
    points = Points(request.space, compose, machine, objective.allow_lossy)
    checked = points.check()
    first, found = checked[0], Devices(request.settings.devices, machine)
    criteria = goals(objective, first, machine)
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
        executor = LocalExecutor(run, store, machine, found, display)
    else:
        executor = RemoteExecutor(nodes, store, display, first.device)
    announce(request, first, store, plan, display)
    count = executor.count()
    for text in [*found.notes, *([f"up to {count} trials at a time"] if count > 1 else [])]:
        display.note(text)
    of_nodes = None if nodes is None else nodes.fingerprint
    ledger = Ledger(store, request, display, found.gpu_index, of_nodes)
    copies: Copies | None = None
    try:
        space = space_hash(request.space, ledger.fingerprint_hash(first), criteria.objectives)
        with ledger.planning():
            known, busy = bool(ledger.journal.records()), ledger.others > 0
            settle(criteria, ledger.study_dir, display, known, busy)
            write_space(ledger.study_dir, space, request.space.distributions())
        optimizer = _optimizer(request, plan, ledger, criteria, points, pace)
        copies = Copies(
            *(store, ledger.study_dir, first.tracking, display.note),
            storage=request.settings.storage,
        )
        findings = Findings(request.settings, ledger, optimizer, criteria, display, space)
        loop = _Loop(Jobs(request, points, findings, executor, display, pace), plan)
        ended = loop.run()
        loop.note_what_it_did()
        ledger.draw()
        if request.swept:
            display.note(_report(ledger.study_dir))
    finally:
        try:
            executor.close()
        finally:
            ledger.close()
            if copies is not None:  # they end when nobody is at work any more
                copies.close(len(ledger.journal))
    return loop.outcome(store, ended)


def _optimizer(
    request: StudyRequest,
    plan: Plan,
    ledger: Ledger,
    criteria: Criteria,
    points: Points,
    pace: Pace,
) -> Optimizer:
    # Neither sweeps that begin at the same time nor one that goes on are to propose the same.
    seed = request.settings.seed + 7919 * ledger.others + len(ledger.journal)
    return Optimizer(
        *(request.space, plan.sampler, seed, criteria),
        allow_lossy=request.settings.objective.allow_lossy,
        points=points,
        patience=pace.patience,
        hurried=pace.is_short(),
    )


def _report(study_dir: Path) -> str:
    """Write the study as one HTML file; a line that says where it is, or why there is none."""
    from openpi_opt.report import write

    begun = time.monotonic()
    try:
        path = write([study_dir])
    except Exception as error:  # noqa: BLE001
        # Results are kept and their table is to come: whatever this is must not cost them.
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return f"no report: {why}; python -m openpi_opt.report {study_dir} tries again"
    return f"report: {path} ({time.monotonic() - begun:.1f} s)"


class _Loop:
    """Starts jobs on free devices and collects results, until there is nothing more to try."""

    def __init__(self, jobs: Jobs, plan: Plan):
        self._jobs, self._plan, self._findings = jobs, plan, jobs.findings
        self._request, self._display, self._ledger = jobs.request, jobs.display, jobs.ledger
        self._neighbours: Neighbours | None = None  # where a sampler chooses
        self._began = time.monotonic()

    def run(self) -> str:
        """Keep the devices busy until there is nothing more to try; returns why that is."""
        jobs = self._jobs
        try:
            self._findings.begin()
            cleared = ", ".join(cleared_names())
            if cleared:
                self._display.note(
                    f"not passed on to trials, since they would change them: {cleared}"
                )
            self._note_outdated()
            self._choose_source()
            while True:
                jobs.look_at_waiting()
                self._fill()
                if jobs.ended and not jobs.all():
                    return jobs.ended
                jobs.collect()
        except KeyboardInterrupt:
            self._display.note(
                f"interrupted: {self._kept()}, and {len(jobs.running)} running ended (Ctrl-C "
                "again: at once). To continue, run the same command with "
                f"study={self._request.name}"
            )
            interrupt.told()
            raise
        finally:
            left = jobs.all()
            try:  # also what an interruption kept from being counted among those that run
                jobs.executor.stop()
                jobs.executor.close()
            finally:
                for job in left:
                    job.let_go()

    def _fill(self) -> None:
        """Start a trial on every device that is free, as long as there is something to try."""
        jobs, executor = self._jobs, self._jobs.executor
        if jobs.ended and not jobs.ready:
            executor.rest()
            return
        for lease in executor.free():
            try:
                job = jobs.next_for(lease.slot)
                if job is None:
                    lease.release()
                else:
                    jobs.start(job, lease)
            except BaseException:
                lease.release()
                raise
        if executor.contended and not jobs.running:
            jobs.next_for(None)  # answer at least what is known

    def _choose_source(self) -> None:
        """Where the points come from; a sampler's budget ends with the neighbours of the best."""
        space, limit, jobs = self._request.space, self._request.settings.most_trials, self._jobs
        if self._plan.enumerated:
            jobs.source = Enumerated(space, limit)
            return
        optimizer = self._findings.optimizer
        if not self._findings.criteria.several:  # else no objective says which is the best
            self._neighbours = Neighbours(
                *(optimizer, space, jobs.points),
                share=lambda: max(sampled.share(), jobs.pace.share()),
                hurried=jobs.pace.is_short(),
            )
        sampled = Sampled(optimizer, space, limit, jobs.open_hashes, self._neighbours)
        jobs.source = sampled

    def _note_outdated(self) -> None:
        """Say how many known results of this command's points do not answer, and why."""
        ledger, listed = self._ledger, self._plan.enumerated
        old = [
            record
            for record in ledger.measured_here()
            if record.number >= ledger.known_from and not ledger.answers(record)
        ]
        asked = [Config.load(record.result.config) for record in old]
        if listed and old:
            asked = [cfg for _, cfg in enumerated(self._request, self._jobs.points)]
            asked += [cfg.baseline() for cfg in asked] if self._request.has_baselines else []
        found = {cfg.hash(): ledger.outdated(cfg) for cfg in asked}
        changes = [names for names in found.values() if names]
        if changes:
            self._display.note(
                f"{len(changes)} known result{'s are' if len(changes) > 1 else ' is'} "
                f"{'measured again' if listed else 'not used'}: {identity.summary(changes)} "
                "(--keep-source answers from them)"
            )

    def _kept(self) -> str:
        count = len(self._ledger.journal)
        if count and not self._ledger.journal.path.is_file():
            return "the study's folder was deleted or moved meanwhile"
        return f"the {count} finished trial(s) are kept"

    def note_what_it_did(self) -> None:
        """Say what was never started and why, and for how much of the time devices measured."""
        for reason, number in self._jobs.passed_over.most_common():
            self._display.note(f"passed over {number}, {reason.kind}: {reason.reason}")
        seconds = time.monotonic() - self._began
        measured = sorted(self._jobs.executor.measured().items())
        shares = [f"{name} {had / seconds:.0%}" for name, had in measured]
        if shares and self._jobs.new > 1:
            self._display.note(f"measured in {seconds:.0f} s: {', '.join(shares)} of the time")

    def outcome(self, store: Store, ended: str) -> StudyOutcome:
        """All that is known of the points of this space, also from earlier runs.
        UserError when the values contradict each other in every combination.
        """
        found = self._findings.points()
        if not found and self._jobs.contradictions:
            raise self._jobs.contradictions[0]
        baselines = [record for record in self._findings.baselines.values() if record is not None]
        kept = self._ledger.known.kept([*found, *baselines])
        return StudyOutcome(
            name=self._request.name,
            store=store,
            points=found,
            baselines=baselines,
            ended=ended,
            new=self._jobs.new,
            left_out=self._findings.barred(),
            remarks=self._remarks(),
            criteria=self._findings.criteria,
            kept=kept if self._request.settings.keep_source else {},
        )

    def _remarks(self) -> list[str]:
        """How much the best of a sampled study is known to be the best, and a simpler one."""
        if self._neighbours is None:
            return []
        near = self._neighbours.text(self._findings.optimizer.tried)
        simpler = self._neighbours.simplest()
        lines = [near] if near else []
        if simpler is not None:
            cfg = self._jobs.points.config(simpler[0])
            lines.append(
                f"simplest within {NOISE:.1%} of the best: {simpler[1]:.3f} ms, "
                f"{label(cfg, 'trial', {})}"
            )
        return lines
