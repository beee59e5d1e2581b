"""Optuna's side of a study: what was tried, what to try next.

Ask and tell on a study in memory, made from what is known when a sweep begins, so that neither a
database nor another process stands between a free device and its next trial. `optuna.db` gets a
copy of every finished trial for who wants to look at it (`Optimizer.open(later=...)` says when).

An outcome without a latency is told PRUNED: TPE learns from that and stays away, while it learns
nothing from FAIL. FAIL is for what was never finished, and stays out of the copy. A lossy trial
violates a constraint unless lossy ones may win, so that no sampler is drawn to where it was fast.
So does a trial above a limit, by as much as it is above it. Limits may change from sweep to sweep:
trials of the copy are judged anew by their results; the copy itself keeps what was told then.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria, pareto
from openpi_opt.engine.storage import OptunaStorage
from openpi_opt.errors import UserError
from openpi_opt.result import Pruned, TrialResult
from openpi_opt.space.space import Space
from openpi_opt.track.store import Store

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

HASH_ATTRIBUTE = "config_hash"
_LOSSY = "lossy"  # the constraint's name
# TPE's time for one proposal grows with what it has seen: 14 ms with 1,000 trials, 300 ms with
# 10,000. It loses nothing by seeing the fastest and the latest ones only.
MOST_SEEN = 1000
_FASTEST_SEEN = 250
_SLACK = 200  # so many more before the selection is made anew
Later = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Proposal:
    """A point to try. `number` is None for a point that Optuna did not choose."""

    params: dict[str, str]
    number: int | None = None


def _nothing(text: str) -> None:
    pass


def _at_once(work: Callable[[], None]) -> None:
    work()


class Optimizer:
    """One search space of one study. Make it with `open`."""

    def __init__(
        self,
        copy: optuna.Study,
        copy_lock: FileLock,
        space: Space,
        later: Later,
        criteria: Criteria,
        storage: OptunaStorage,
        say: Callable[[str], None],
    ):
        self._copy = copy
        self._copy_lock = copy_lock  # of all who write to that database
        self._storage = storage
        self._say = say
        self._copy_is_away = False
        self._criteria = criteria
        self._space = space
        self._distributions = space.distributions()
        self._later = later
        self._study: optuna.Study
        self._finished: list[FrozenTrial] = []
        self._asked: dict[int, optuna.Trial] = {}  # by the numbers of their proposals
        self._numbers = itertools.count()
        self._copied: set[tuple[object, ...]] = set()
        self._looked_at = 0  # trials of the copy
        self.tried: set[str] = set()  # configuration hashes
        self.points: set[tuple[str, ...]] = set()

    @staticmethod
    def open(
        store: Store,
        name: str,
        space: Space,
        sampler: str,
        seed: int,
        allow_lossy: bool = False,
        later: Later = _at_once,
        criteria: Criteria | None = None,
        known: Callable[[str], TrialResult | None] = lambda config_hash: None,
        answers: Callable[[str], bool] = lambda config_hash: True,
        storage: str | None = None,
        say: Callable[[str], None] = _nothing,
    ) -> Optimizer:
        """Create or continue the study `name`, which is one of these objectives.

        A continued study seeds its sampler anew, or random proposals would begin again with the
        ones already made. `later` is given the work of writing the copy, `storage` names the place
        of the copy, and `say` is told when it is on a server that goes away; `known` finds the
        result of a configuration, by which its trial in the copy is judged. A trial of the copy
        counts only if the result of its configuration still `answers`.

        Raises:
            UserError: the database is damaged, of another version of Optuna, or not writable.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        criteria = (criteria or Criteria()).allowing(allow_lossy)
        place = OptunaStorage.of(store, storage)
        lock = FileLock(store.path / "optuna.lock", thread_local=False)
        with place.errors(), lock:
            # Several processes that create the tables at once break the database for good.
            copy = optuna.create_study(
                storage=place.open(),
                study_name=place.study_name(name),
                directions=_directions(criteria),
                load_if_exists=True,
            )
            optimizer = Optimizer(copy, lock, space, later, criteria, place, say)
            count = optimizer._load(known, answers)
        optimizer._begin(_sampler(sampler, (seed + count) % 2**32))
        return optimizer

    def forget(self) -> None:
        """Count nothing as tried, for `--fresh`; the sampler keeps what it learned."""
        self.tried.clear()
        self.points.clear()

    def ask(self) -> Proposal:
        """Let the sampler choose a point."""
        trial = self._study.ask(self._distributions)
        number = next(self._numbers)
        self._asked[number] = trial
        return Proposal(self._space.texts(trial.params), number)

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """Tell the outcome of a point: its objectives, or that it has none.

        Of a point that the sampler did not choose it is told once.
        """
        if proposal.number is None:
            if not self.has(proposal.params):
                self._add(self._frozen(proposal.params, result), copy=True)
        else:
            finished = self._frozen(proposal.params, result)
            trial = self._asked.pop(proposal.number)
            for key, violation in self._constraints(result).items():
                trial.set_constraint(key, violation)
            for step, seen in finished.intermediate_values.items():
                trial.report(seen, step)
            self._study.tell(trial, finished.values, state=finished.state)
            self._keep(finished, copy=not self.has(proposal.params))
        self._remember(proposal.params, result.config_hash)

    def learn(
        self, found: Iterable[tuple[dict[str, str], TrialResult]], copy: bool = False
    ) -> None:
        """Take in what other sweeps found out; they also make the copy, unless they were killed."""
        new = 0
        for params, result in found:
            if not self.has(params):
                self._finished.append(self._frozen(params, result))
                self._remember(params, result.config_hash)
                new += 1
        for trial in self._finished[len(self._finished) - new :]:
            if copy:
                self._later(partial(self._write, trial))
            if new <= _SLACK:
                self._study.add_trial(trial)
        if new > _SLACK:
            self._begin(self._study.sampler)
        else:
            self._bound()

    def give_up(self, proposal: Proposal, learn: bool) -> None:
        """End a point without a result: with `learn`, the sampler is to keep away from it."""
        import optuna

        states = optuna.trial.TrialState
        if proposal.number is None or proposal.number not in self._asked:  # it was told already
            return
        trial = self._asked.pop(proposal.number)
        self._study.tell(trial, state=states.PRUNED if learn else states.FAIL)
        if learn:
            self._keep(self._frozen(proposal.params, None), copy=True)

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
            user_attrs={} if result is None else {HASH_ATTRIBUTE: result.config_hash},
            intermediate_values=seen,
            constraints={} if result is None else self._constraints(result),
        )

    def _constraints(self, result: TrialResult) -> dict[str, float]:
        """Above 0 is violated."""
        limits = self._criteria.excess(result)
        if self._criteria.allow_lossy:
            return limits
        return {_LOSSY: 1.0 if _is_lossy(json.dumps(result.config)) else -1.0, **limits}

    def _add(self, trial: FrozenTrial, copy: bool) -> None:
        self._study.add_trial(trial)
        self._keep(trial, copy)

    def _keep(self, trial: FrozenTrial, copy: bool) -> None:
        self._finished.append(trial)
        if copy:
            self._later(partial(self._write, trial))
        self._bound()

    def _bound(self) -> None:
        """Forget most of it when the sampler has seen too much."""
        if len(self._study.get_trials(deepcopy=False)) > MOST_SEEN + _SLACK:
            self._begin(self._study.sampler)

    def _write(self, trial: FrozenTrial) -> None:
        """Copy a trial that the copy lacks: sweeps of one study tell each other's results too."""
        if self._copy_is_away:
            return
        try:
            with self._storage.errors(), self._copy_lock:
                new = self._copy.get_trials(deepcopy=False)[self._looked_at :]
                self._looked_at += len(new)
                self._copied.update(map(_outcome, new))
                if _outcome(trial) not in self._copied:
                    self._copy.add_trial(trial)
        except UserError as error:
            if not self._storage.remote:
                raise
            self._copy_is_away = True  # a pause for every trial would be none of its use
            self._say(f"warning: {error}")

    def _begin(self, sampler: BaseSampler) -> None:
        """Make the study in memory: the fastest and latest finished trials, and those asked."""
        import optuna

        self._study = optuna.create_study(directions=_directions(self._criteria), sampler=sampler)
        self._study.add_trials(_selection(self._finished))
        for number, trial in self._asked.items():
            self._study.enqueue_trial(trial.params)
            self._asked[number] = self._study.ask(self._distributions)

    def _load(
        self, known: Callable[[str], TrialResult | None], answers: Callable[[str], bool]
    ) -> int:
        """Take in the copy; returns how many trials it has."""
        trials = self._copy.get_trials(deepcopy=False)
        for copied in trials:
            trial = self._judged_anew(copied, known)
            if trial is None or trial.state.name not in ("COMPLETE", "PRUNED"):
                continue
            if trial.params.keys() != self._distributions.keys():
                continue
            config_hash = trial.user_attrs.get(HASH_ATTRIBUTE)
            if config_hash and not answers(config_hash):
                continue
            self._finished.append(trial)
            if config_hash:
                self._remember(self._space.texts(trial.params), config_hash)
        return len(trials)

    def _judged_anew(
        self, trial: FrozenTrial, known: Callable[[str], TrialResult | None]
    ) -> FrozenTrial | None:
        """A trial of the copy under the limits of today; None when it cannot be judged.

        Whether it is lossy does not change, and takes a millisecond to find out.
        """
        import optuna

        limits = self._criteria.limits
        lossy = {key: value for key, value in trial.constraints.items() if key == _LOSSY}
        if not limits and trial.constraints.keys() == lossy.keys():
            return trial
        result = known(trial.user_attrs.get(HASH_ATTRIBUTE, ""))
        if limits and result is None and trial.state.name == "COMPLETE":
            return None
        return optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            values=trial.values,
            state=trial.state,
            user_attrs=trial.user_attrs,
            intermediate_values=trial.intermediate_values,
            constraints=lossy if result is None else {**lossy, **self._criteria.excess(result)},
        )

    def _remember(self, params: Mapping[str, str], config_hash: str) -> None:
        self.tried.add(config_hash)
        self.points.add(self._point(params))

    def _point(self, params: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(params[key] for key in self._space.dimensions)


def _outcome(trial: FrozenTrial) -> tuple[object, ...]:
    """What makes two trials of a copy the same one."""
    return trial.state, tuple(trial.values or ()), *sorted(trial.params.items())


@functools.lru_cache(maxsize=65_536)
def _is_lossy(config: str) -> bool:
    """Reading a configuration takes a millisecond, and a continued study has thousands."""
    return Config.load(json.loads(config)).lossy()


def _directions(criteria: Criteria) -> list[Literal["minimize"]]:
    return ["minimize" for _ in criteria.objectives]


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
