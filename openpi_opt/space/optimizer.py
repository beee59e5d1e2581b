"""Optuna's side of a study: what was tried, what to try next.

Ask and tell on a study in memory, made from the journal when a sweep begins, so that no database
stands between a free device and its next trial. `track/optuna_copy.py` makes the copy of the
journal that other tools read.

An outcome without a latency is told PRUNED: TPE learns from that and stays away, while it learns
nothing from FAIL. FAIL is for what was never finished. A lossy trial violates a constraint unless
lossy ones may win, so that no sampler is drawn to where it was fast. So does a trial above a limit,
by as much as it is above it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openpi_opt.criteria import Criteria, pareto
from openpi_opt.result import Pruned, TrialResult
from openpi_opt.space.features import PARTS, SECONDS, TOTAL, mean_ms, parts, seconds
from openpi_opt.space.points import Points
from openpi_opt.space.space import Space
from openpi_opt.track.optuna_copy import HASH_ATTRIBUTE, constraints

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

# TPE's time for one proposal grows with what it has seen: 14 ms with 1,000 trials, 300 ms with
# 10,000. It loses nothing by seeing the fastest and the latest ones only.
MOST_SEEN = 1000
_FASTEST_SEEN = 250
_SLACK = 200  # so many more before the selection is made anew


@dataclass(frozen=True)
class Proposal:
    """A point to try. `number` is None for a point that Optuna did not choose."""

    params: dict[str, str]
    number: int | None = None


class Optimizer:
    """One search space of one study."""

    def __init__(
        self,
        space: Space,
        sampler: str,
        seed: int,
        criteria: Criteria | None = None,
        allow_lossy: bool = False,
        points: Points | None = None,
        patience: Callable[[], float] = lambda: 0.0,
        hurried: bool = False,
    ):
        """Begin with nothing known: `learn` takes in what the journal has.

        `sampler=stages` also needs the `points` of the space, and may ask how much the seconds of a
        trial count, or leave out what compiles for minutes (`stages.StagesSampler`).

        A study that goes on wants another seed than it began with, or random proposals would begin
        again with the ones already made.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._criteria = (criteria or Criteria()).allowing(allow_lossy)
        self._space = space
        self._distributions = space.distributions()
        self._finished: list[FrozenTrial] = []
        self._asked: dict[int, optuna.Trial] = {}  # by the numbers of their proposals
        self._numbers = itertools.count()
        self.tried: set[str] = set()  # configuration hashes
        self.points: set[tuple[str, ...]] = set()
        if sampler == "stages":
            from openpi_opt.space.stages import StagesSampler

            assert points is not None
            self._study = self._begun(StagesSampler(space, points, seed % 2**32, patience, hurried))
        else:
            self._study = self._begun(_sampler(sampler, seed % 2**32))

    @property
    def trials(self) -> list[FrozenTrial]:
        """What the sampler sees: finished trials, and those asked."""
        return self._study.get_trials(deepcopy=False)

    def forget(self) -> None:
        """Count nothing as tried, for `--fresh`; the sampler keeps what it learned."""
        self.tried.clear()
        self.points.clear()

    def ask(self, params: Mapping[str, str] | None = None) -> Proposal:
        """Let the sampler choose a point; with `params`, it takes that one as its own choice."""
        if params is not None:
            self._study.enqueue_trial(self._space.values(params))
        trial = self._study.ask(self._distributions)
        number = next(self._numbers)
        self._asked[number] = trial
        return Proposal(self._space.texts(trial.params), number)

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """Tell the outcome of a point: its objectives, or that it has none.

        Of a point that the sampler did not choose it is told once.
        """
        if proposal.number is None:
            self.learn([(proposal.params, result)])
            return
        finished = self._frozen(proposal.params, result)
        trial = self._asked.pop(proposal.number)
        for key, violation in finished.constraints.items():
            trial.set_constraint(key, violation)
        for step, seen in finished.intermediate_values.items():
            trial.report(seen, step)
        for name, value in finished.user_attrs.items():
            trial.set_user_attr(name, value)
        self._study.tell(trial, finished.values, state=finished.state)
        self._keep(finished)
        self._remember(proposal.params, result.config_hash)

    def learn(self, found: Iterable[tuple[dict[str, str], TrialResult]]) -> None:
        """Take in what earlier and other sweeps found out."""
        new = []
        for params, result in found:
            if not self.has(params):
                new.append(self._frozen(params, result))
            self._remember(params, result.config_hash)
        if len(new) <= _SLACK:
            self._study.add_trials(new)
        self._keep(*new)

    def give_up(self, proposal: Proposal, learn: bool) -> None:
        """End a point without a result: with `learn`, the sampler is to keep away from it."""
        import optuna

        states = optuna.trial.TrialState
        if proposal.number is None or proposal.number not in self._asked:  # it was told already
            return
        trial = self._asked.pop(proposal.number)
        self._study.tell(trial, state=states.PRUNED if learn else states.FAIL)
        if learn:
            self._keep(self._frozen(proposal.params, None))

    def best(self) -> tuple[dict[str, str], float] | None:
        """The point with the least first objective, and that; None while there is none."""
        found = _best(self._finished, 1)
        if not found or any(excess > 0 for excess in found[0].constraints.values()):
            return None
        return self._space.texts(found[0].params), found[0].values[0]

    def cost(self) -> Callable[[dict[str, str]], float] | None:
        """What the sampler expects of points, to order them by; None where it does not say."""
        guess = getattr(self._study.sampler, "guess", None)
        if guess is None:
            return None
        found: Callable[[dict[str, str]], float] = guess(self.trials)
        return found

    def within(self, factor: float) -> list[tuple[dict[str, str], float]]:
        """The points at most `factor` times the best's first objective, with theirs."""
        best = self.best()
        feasible = [t for t in self._finished if all(c <= 0 for c in t.constraints.values())]
        return [
            (self._space.texts(trial.params), trial.values[0])
            for trial in feasible
            if best is not None and trial.values and trial.values[0] <= factor * best[1]
        ]

    def value(self, params: Mapping[str, str]) -> float | None:
        """The first objective of a point that was told; None where it has none."""
        point = self._point(params)
        for trial in reversed(self._finished):
            if trial.values and self._point(self._space.texts(trial.params)) == point:
                return float(trial.values[0])
        return None

    def has(self, params: Mapping[str, str]) -> bool:
        """Whether the outcome of this point was told."""
        return self._point(params) in self.points

    def _frozen(self, params: Mapping[str, str], result: TrialResult | None) -> FrozenTrial:
        """A finished trial as Optuna knows it; without a result, one to keep away from."""
        import optuna

        states = optuna.trial.TrialState
        values = None if result is None else self._criteria.values(result)
        seen = {}
        if isinstance(result, Pruned) and not self._criteria.several:
            # TPE prefers what was seen, however slow, to what failed; of several objectives there
            # is no order of what was seen, and Optuna takes none.
            seen = {0: result.seen_mean_ms}
        return optuna.trial.create_trial(
            params=self._space.values(params),
            distributions=self._distributions,
            values=values,
            state=states.PRUNED if values is None else states.COMPLETE,
            user_attrs={} if result is None else _attributes(result),
            intermediate_values=seen,
            constraints={} if result is None else constraints(result, self._criteria),
        )

    def _keep(self, *trials: FrozenTrial) -> None:
        """Keep finished trials; forget most in the study when the sampler has seen too much."""
        self._finished += trials
        if len(trials) > _SLACK or len(self.trials) > MOST_SEEN + _SLACK:
            self._study = self._begun(self._study.sampler)

    def _begun(self, sampler: BaseSampler) -> optuna.Study:
        """A study in memory: the fastest and latest finished trials, and those asked."""
        import optuna

        directions: list[Literal["minimize"]] = ["minimize"] * len(self._criteria.objectives)
        study = optuna.create_study(directions=directions, sampler=sampler)
        study.add_trials(_selection(self._finished))
        for number, trial in self._asked.items():
            study.enqueue_trial(trial.params)
            self._asked[number] = study.ask(self._distributions)
        return study

    def _remember(self, params: Mapping[str, str], config_hash: str) -> None:
        self.tried.add(config_hash)
        self.points.add(self._point(params))

    def _point(self, params: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(params[key] for key in self._space.dimensions)


def _attributes(result: TrialResult) -> dict[str, str | float | dict[str, float]]:
    """What a trial tells beside its objectives; `sampler=stages` learns from it."""
    found = {
        HASH_ATTRIBUTE: result.config_hash,
        PARTS: parts(result),
        TOTAL: mean_ms(result),
        SECONDS: seconds(result),
    }
    return {name: value for name, value in found.items() if value}


def _selection(finished: list[FrozenTrial]) -> Iterable[FrozenTrial]:
    if len(finished) <= MOST_SEEN:
        return finished
    older, latest = finished[: _FASTEST_SEEN - MOST_SEEN], finished[_FASTEST_SEEN - MOST_SEEN :]
    return [*_best(older, _FASTEST_SEEN), *latest]


def _best(finished: Iterable[FrozenTrial], count: int) -> list[FrozenTrial]:
    """The fastest; of several objectives the Pareto set first, then the best in each by turns.

    What keeps the constraints comes first.
    """
    timed = [(trial, trial.values) for trial in finished if trial.values]
    feasible = [(t, v) for t, v in timed if all(c <= 0 for c in t.constraints.values())]
    kept = {id(trial) for trial, _ in feasible}
    chosen: dict[int, FrozenTrial] = {}
    if timed and len(timed[0][1]) > 1:
        front = pareto([values for _, values in feasible])
        chosen = {id(t): t for (t, _), on in zip(feasible, front, strict=True) if on}

    def ranked(place: int) -> list[tuple[FrozenTrial, list[float]]]:
        return sorted(timed, key=lambda entry: (id(entry[0]) not in kept, entry[1][place]))

    places = range(len(timed[0][1]) if timed else 0)
    for turn in zip(*map(ranked, places), strict=True):
        if len(chosen) >= count:
            break
        chosen |= {id(trial): trial for trial, _ in turn}
    return list(chosen.values())[:count]


def _sampler(name: str, seed: int) -> BaseSampler:
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)
