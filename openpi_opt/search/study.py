"""The engine of a sweep: which configuration next, run it, keep what it gave.

It knows nothing of Hydra: a point of the space becomes a configuration through the `compose` that
it is given, and a configuration a result through `run`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.result import Ok, TrialResult
from openpi_opt.search.display import Display
from openpi_opt.search.environment import cleared_names
from openpi_opt.search.ledger import Ledger
from openpi_opt.search.optimizer import Optimizer, Proposal
from openpi_opt.search.plan import Plan, StudyRequest, announce, make_plan, space_hash
from openpi_opt.search.points import Compose, Points
from openpi_opt.search.process import run_trial
from openpi_opt.search.sensible import LeftOut, NotSensibleError
from openpi_opt.search.trials import Run, Trials, label
from openpi_opt.track.journal import Record
from openpi_opt.track.store import Store

# A sampler that proposes this many known points on end has no new one to propose.
MAX_REPEATS = 50
# The same for combinations of a named space that are passed over: there may be many of them.
MAX_PASSED_OVER = 2_000


@dataclass(frozen=True)
class StudyOutcome:
    """What there is now: the records of the points of this space, and of their baselines."""

    name: str
    store: Store
    points: list[Record]
    baselines: list[Record]
    ended: str
    new: int

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
    request: StudyRequest, compose: Compose, display: Display, run: Run = run_trial
) -> StudyOutcome:
    """Try the points of a space one after another and return all that is known of them.

    Raises:
        UserError: a wrong value, or a store, study or database that cannot be used; what was
            recorded before is kept.
        KeyboardInterrupt: the running trial was ended, the finished ones are kept.
    """
    allow_lossy = request.settings.objective.allow_lossy
    points = Points(request.space, compose, request.machine, allow_lossy)
    first = points.check()
    plan = make_plan(request)
    store = Store.open(request.settings.store)
    announce(request, first, store, plan, display)
    ledger = Ledger.open(
        store, request.name, first.tracking, request.command, request.machine, display
    )
    try:
        optimizer = _optimizer(request, store, plan, ledger.fingerprint_hash(first))
        trials = Trials(store, ledger, request.machine, display, run)
        engine = _Engine(request, points, ledger, optimizer, trials, display)
        engine.settle()
        ended = engine.enumerate() if plan.enumerated else engine.sample()
        engine.note_passed_over()
        return engine.outcome(store, ended)
    except KeyboardInterrupt:
        display.note(
            f"interrupted: the {len(ledger.journal.records())} finished trial(s) are kept. "
            f"To continue, run the same command with study={request.name}"
        )
        raise
    finally:
        ledger.close()


def _optimizer(request: StudyRequest, store: Store, plan: Plan, machine_hash: str) -> Optimizer:
    name = f"{request.name}#{space_hash(request.space, machine_hash)}"
    settings = request.settings
    return Optimizer.open(
        store, name, request.space, plan.sampler, settings.seed, settings.objective.allow_lossy
    )


@dataclass
class _Engine:
    request: StudyRequest
    points: Points
    ledger: Ledger
    optimizer: Optimizer
    trials: Trials
    display: Display
    _refused: list[UserError] = field(default_factory=list)
    _passed_over: Counter[LeftOut] = field(default_factory=Counter)
    _baselines: dict[str, Record] = field(default_factory=dict)

    def settle(self) -> None:
        """Clear up behind a sweep that was killed, and name what trials do not inherit."""
        left = self.optimizer.settle(self._recorded)
        if left:
            self.display.note(f"{left} proposal(s) that a killed sweep left open were settled")
        cleared = cleared_names()
        if cleared:
            self.display.note(
                f"not passed on to trials, since they would change them: {', '.join(cleared)}"
            )

    def enumerate(self) -> str:
        """Every combination in order, up to `n_trials` different configurations."""
        limit = self.request.settings.n_trials
        total = min(self.request.space.combinations() or 0, limit)
        seen: set[str] = set()
        for number, params in enumerate(self.request.space.all(), start=1):
            if len(seen) >= limit:
                return f"n_trials={limit} reached"
            cfg = self._try(Proposal(params), f"[{number}/{total}]")
            seen |= {cfg.hash()} if cfg else set()
        return "every combination is tried"

    def sample(self) -> str:
        """What the sampler proposes, up to `n_trials` different configurations."""
        limit, count = self.request.settings.n_trials, self.request.space.combinations()
        repeats = passed_over = 0
        starts = list(self.request.space.start.values())
        while (done := len(self.optimizer.tried)) < limit:
            if count is not None and len(self.optimizer.points) >= count:
                return "every combination is tried"
            if self.request.space.count is not None and done >= self.request.space.count:
                return "every sensible combination is tried"
            if repeats >= MAX_REPEATS or passed_over >= MAX_PASSED_OVER:
                return (
                    f"the last {repeats + passed_over} proposals held nothing new: the space "
                    "seems exhausted"
                )
            before = self._passed_over.total()
            proposal = Proposal(starts.pop(0)) if starts else self.optimizer.ask()
            self._try(proposal, f"[{done + 1}/{limit}]")
            if len(self.optimizer.tried) > done:
                repeats = passed_over = 0
            elif self._passed_over.total() > before:
                passed_over += 1
            else:
                repeats += 1
        return f"n_trials={limit} reached"

    def note_passed_over(self) -> None:
        """Say what of a named space was never started, and why."""
        for reason, number in self._passed_over.most_common():
            self.display.note(f"passed over {number}, {reason.kind}: {reason.reason}")

    def outcome(self, store: Store, ended: str) -> StudyOutcome:
        """All that is known of the points of this space, also from earlier runs.

        Raises:
            UserError: the values contradict each other in every combination.
        """
        machines = self.ledger.fingerprint_hashes()
        newest = {
            record.result.config_hash: record
            for record in self.ledger.journal.records()
            if record.role != "confirm" and record.fingerprint_hash in machines
        }
        found = [newest[tried] for tried in self.optimizer.tried if tried in newest]
        if not found and self._refused:
            raise self._refused[0]
        return StudyOutcome(
            name=self.request.name,
            store=store,
            points=sorted(found, key=lambda record: record.number),
            baselines=list(self._baselines.values()),
            ended=ended,
            new=self.trials.new,
        )

    def _try(self, proposal: Proposal, position: str) -> Config | None:
        """One point, with the baseline of its context before it; None when it is no point."""
        try:
            cfg = self.points.config(proposal.params)
        except UserError as error:
            self._leave_out(proposal, position, error)
            return None
        new = cfg.hash() not in self.optimizer.tried

        def tell(result: TrialResult) -> None:
            self.optimizer.tell(proposal, result)

        try:
            self._measure_baseline(cfg)
            record, known = self.trials.conduct(cfg, "trial", proposal.params, position, tell)
        except BaseException:
            self.optimizer.give_up(proposal, learn=False)
            raise
        if known and (new or proposal.number is None):
            self.display.end(position, label(cfg, "trial", proposal.params), record, known)
        return cfg

    def _measure_baseline(self, cfg: Config) -> None:
        """The plain eager policy, before the first trial of each context."""
        if not (self.request.swept and self.request.settings.baseline):
            return
        if cfg.context_hash() not in self._baselines:
            record, _ = self.trials.conduct(cfg.baseline(), "baseline", {}, "[-]")
            self._baselines[cfg.context_hash()] = record

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

    def _recorded(self, params: dict[str, str]) -> TrialResult | None:
        try:
            record = self.ledger.find(self.points.config(params))
        except UserError:
            return None
        return None if record is None else record.result
