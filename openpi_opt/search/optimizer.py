"""Optuna's side of a study: what was tried, what to try next.

Ask and tell on a database. An outcome without a latency is told PRUNED: TPE learns from that and
stays away, while it learns nothing from FAIL. FAIL is for what was never finished. A lossy trial
violates a constraint unless lossy ones may win, so that no sampler is drawn to where it was fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.result import Ok, TrialResult
from openpi_opt.search.space import Space
from openpi_opt.track.store import Store

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

HASH_ATTRIBUTE = "config_hash"


@dataclass(frozen=True)
class Proposal:
    """A point to try. `number` is Optuna's, and None for a point that Optuna did not choose."""

    params: dict[str, str]
    number: int | None = None


class Optimizer:
    """One search space of one study. Make it with `open`."""

    def __init__(self, study: optuna.Study, space: Space, allow_lossy: bool = False):
        self._study = study
        self._allow_lossy = allow_lossy
        self._space = space
        self._asked: dict[int | None, optuna.Trial] = {}
        self.tried: set[str] = set()  # configuration hashes
        self.points: set[tuple[str, ...]] = set()

    @staticmethod
    def open(
        store: Store, name: str, space: Space, sampler: str, seed: int, allow_lossy: bool = False
    ) -> Optimizer:
        """Create or continue the study `name`.

        A continued study seeds its sampler anew, or random proposals would begin again with the
        ones already made.

        Raises:
            UserError: the database is damaged, of another version of Optuna, or not writable.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = store.path / "optuna.db"
        with _storage_errors(path), FileLock(store.path / "optuna.lock"):
            # Several processes that create the tables at once break the database for good.
            storage = optuna.storages.RDBStorage(
                store.optuna_url, engine_kwargs={"connect_args": {"timeout": 60}}
            )
            study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", load_if_exists=True
            )
            optimizer = Optimizer(study, space, allow_lossy)
            count = optimizer._load()
            study.sampler = _sampler(sampler, (seed + count) % 2**32)
        return optimizer

    def settle(self, lookup: Callable[[dict[str, str]], TrialResult | None]) -> int:
        """Tell Optuna what became of trials that a killed sweep left running; returns how many.

        `lookup` gives the recorded result of a point, or None when it was never finished. With
        them unsettled, TPE would keep away from their region for ever.
        """
        import optuna

        with self._errors():
            states = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING)
            left = self._study.get_trials(deepcopy=False, states=states)
            for trial in left:
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                if trial.params.keys() == self._space.dimensions.keys():
                    point = self._space.texts(trial.params)
                    result = lookup(point)
                    if result is not None:
                        self.tell(Proposal(point), result)
        return len(left)

    def ask(self) -> Proposal:
        """Let the sampler choose a point."""
        with self._errors():
            trial = self._study.ask(self._space.distributions())
        self._asked[trial.number] = trial
        return Proposal(self._space.texts(trial.params), trial.number)

    def tell(self, proposal: Proposal, result: TrialResult) -> None:
        """Tell the outcome of a point: its mean latency, or that it has none."""
        import optuna

        states = optuna.trial.TrialState
        value = result.latency.mean_ms if isinstance(result, Ok) else None
        state = states.PRUNED if value is None else states.COMPLETE
        with self._errors():
            if proposal.number is None:
                self._add(proposal, result, value, state)
            else:
                trial = self._asked.pop(proposal.number)
                trial.set_user_attr(HASH_ATTRIBUTE, result.config_hash)
                for key, violation in self._constraints(result).items():
                    trial.set_constraint(key, violation)
                self._study.tell(trial, value, state=state)
        self._remember(proposal.params, result.config_hash)

    def give_up(self, proposal: Proposal, learn: bool) -> None:
        """End a point without a result: with `learn`, the sampler is to keep away from it."""
        import optuna

        states = optuna.trial.TrialState
        trial = self._asked.pop(proposal.number, None)  # None: it was told already
        if trial is not None:
            with self._errors():
                self._study.tell(trial, state=states.PRUNED if learn else states.FAIL)

    def has(self, params: Mapping[str, str]) -> bool:
        """Whether the outcome of this point was told."""
        return self._point(params) in self.points

    def _add(
        self,
        proposal: Proposal,
        result: TrialResult,
        value: float | None,
        state: optuna.trial.TrialState,
    ) -> None:
        """Record a point that the sampler did not choose, as it would have been enqueued."""
        import optuna

        if self.has(proposal.params):
            return
        trial = optuna.trial.create_trial(
            params=self._space.values(proposal.params),
            distributions=self._space.distributions(),
            value=value,
            state=state,
            user_attrs={HASH_ATTRIBUTE: result.config_hash},
            constraints=self._constraints(result),
        )
        self._study.add_trial(trial)

    def _constraints(self, result: TrialResult) -> dict[str, float]:
        """Above 0 is violated."""
        if self._allow_lossy:
            return {}
        return {"lossy": 1.0 if Config.load(result.config).lossy() else -1.0}

    def _load(self) -> int:
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            config_hash = trial.user_attrs.get(HASH_ATTRIBUTE)
            if trial.state.is_finished() and config_hash:
                self._remember(self._space.texts(trial.params), config_hash)
        return len(trials)

    def _remember(self, params: Mapping[str, str], config_hash: str) -> None:
        self.tried.add(config_hash)
        self.points.add(self._point(params))

    def _point(self, params: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(params[key] for key in self._space.dimensions)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with _storage_errors(Path("optuna.db")):
            yield


def _sampler(name: str, seed: int) -> BaseSampler:
    import optuna

    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "gp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """A database that is damaged, locked, full or of another version is the user's to mend."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        detail = str(getattr(cause, "orig", None) or cause).splitlines()[0]
        raise UserError(
            f"Optuna's database {path} cannot be used: {detail}.\n"
            "The journals of the studies do not depend on it. Free space or mend permissions; if "
            "it is damaged, move it away: the next run fills a new one from the journal."
        ) from error
    except RuntimeError as error:
        if "version" not in str(error).lower():
            raise
        raise UserError(
            f"Optuna's database {path} was written by another version of Optuna "
            f"(this is {optuna.__version__}).\n"
            "Install that version, or move the file away: the next run fills a new one from the "
            "journal."
        ) from error
