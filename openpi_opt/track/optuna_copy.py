"""Optuna's database as a copy of the journal: for optuna-dashboard and whoever reads it.

One Optuna study for each search space, called `STUDY SPACE`, with one trial for each record, in
order. A record that is no point of the space is a trial without parameters in state FAIL. One that
turns out to be a point later (the baseline) becomes one: the copy is then made anew.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from openpi_opt.config import is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.errors import masked
from openpi_opt.result import Pruned, TrialResult, write_atomic
from openpi_opt.track.journal import Record
from openpi_opt.track.left import append_line, read_lines
from openpi_opt.track.store import Store, sqlite_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

HASH_ATTRIBUTE = "config_hash"
_BATCH = 50
_LOCK_S = 30
_SQLITE_S = 30
_UID = "uid"  # of a record that may turn out to be a point
_LOSSY = "lossy"  # the constraint's name


class CopyError(Exception):
    """The database did not take something; `final` when asking again is of no use."""

    def __init__(self, text: str, final: bool):
        super().__init__(text)
        self.final = final


def write_space(study_dir: Path, space: str, distributions: Mapping[str, BaseDistribution]) -> None:
    """Keep what Optuna has to know of a search space beside the journal."""
    from optuna.distributions import distribution_to_json

    if (study_dir / "spaces" / f"{space}.json").exists():
        return
    content = {key: distribution_to_json(found) for key, found in distributions.items()}
    folder = study_dir / "spaces"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{space}.json", json.dumps(content, indent=1) + "\n")


def note_point(study_dir: Path, space: str, uid: str, params: Mapping[str, str]) -> None:
    """Keep that a record which was not proposed in this space is the point `params` of it."""
    path = study_dir / "spaces" / f"{space}.points.jsonl"
    if uid not in _points(study_dir, space):
        append_line(path, {"uid": uid, "params": dict(params)})


def _points(study_dir: Path, space: str) -> dict[str, dict[str, str]]:
    lines = read_lines(study_dir / "spaces" / f"{space}.points.jsonl")
    return {line["uid"]: line["params"] for line in lines if {"uid", "params"} <= line.keys()}


def frozen(
    record: Record,
    params: Mapping[str, str],
    distributions: Mapping[str, BaseDistribution],
    criteria: Criteria,
) -> FrozenTrial:
    """A record as the finished trial of the point `params` that Optuna knows. An outcome without a
    latency is PRUNED, with its reason: samplers stay away from it."""
    import optuna

    states = optuna.trial.TrialState
    result = record.result
    values = criteria.values(result)
    seen = {}
    if isinstance(result, Pruned) and not criteria.several:
        seen = {0: result.seen_mean_ms}
    attributes: dict[str, Any] = {HASH_ATTRIBUTE: result.config_hash, "outcome": result.outcome}
    reason = getattr(result, "reason", "")
    if reason:
        attributes["reason"] = reason.splitlines()[0][:500]
    return _at(
        record,
        optuna.trial.create_trial(
            state=states.PRUNED if values is None else states.COMPLETE,
            values=values,
            params={key: _value(params[key], kind) for key, kind in distributions.items()},
            distributions=dict(distributions),
            user_attrs=attributes,
            intermediate_values=seen,
            constraints=constraints(result, criteria),
        ),
    )


def constraints(result: TrialResult, criteria: Criteria) -> dict[str, float]:
    """How far a result is above each limit, and whether it is lossy; above 0 is violated."""
    limits = criteria.excess(result)
    if criteria.allow_lossy:
        return limits
    return {_LOSSY: 1.0 if is_lossy(result.config) else -1.0, **limits}


class OptunaCopy:
    """The copy of one study in the store's `optuna.db`, or in the database of a URL."""

    def __init__(self, store: Store, study_dir: Path, url: str | None = None):
        self._study_dir = study_dir
        self._url = url or sqlite_url(store.optuna_db)
        self._lock = FileLock(store.path / "optuna.lock", timeout=_LOCK_S)
        self._storage: optuna.storages.RDBStorage | None = None
        self._studies: dict[str, optuna.Study] = {}

    def update(self, records: Sequence[Record]) -> None:
        """Add the records that the copy lacks. Raises CopyError: the database is away, locked,
        full, damaged or of another version."""
        criteria = Criteria.load(self._study_dir) or Criteria()
        for path in sorted((self._study_dir / "spaces").glob("*.json")):
            with self._errors():
                while self._add(path, records, criteria):
                    pass

    def _add(self, path: Path, records: Sequence[Record], criteria: Criteria) -> bool:
        """Add a few records to the copy of one space; False when it has them all."""
        import optuna

        with self._lock:  # several processes that make the tables at once break the database
            study = self._studies.get(path.stem) or self._open(path.stem, criteria)
            points = _points(self._study_dir, path.stem)
            trials = study.get_trials(deepcopy=False)
            late = (t for t in trials if t.user_attrs.get(_UID) in points)
            if next(late, None) is not None:
                assert self._storage is not None  # of `_open`
                optuna.delete_study(study_name=study.study_name, storage=self._storage)
                study, trials = self._open(path.stem, criteria), []
            have = len(trials)
            distributions = {
                key: optuna.distributions.json_to_distribution(text)
                for key, text in json.loads(path.read_text(encoding="utf-8")).items()
            }
            for record in records[have : have + _BATCH]:
                params = record.params if record.space == path.stem else {}
                params = points.get(record.uid, params)
                ours = params.keys() == distributions.keys()
                trial = frozen(record, params, distributions, criteria) if ours else None
                study.add_trial(trial or _placeholder(record))
        return have + _BATCH < len(records)

    def _open(self, space: str, criteria: Criteria) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if self._storage is None:
            local = self._url.startswith("sqlite")
            options = {"connect_args": {"timeout": _SQLITE_S}} if local else {}
            self._storage = optuna.storages.RDBStorage(self._url, engine_kwargs=options)
        study = optuna.create_study(
            storage=self._storage,
            study_name=f"{self._study_dir.name} {space}",
            directions=["minimize" for _ in criteria.objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(criteria.objectives))
        self._studies[space] = study
        return study

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import optuna
        import sqlalchemy.exc

        shown = masked(self._url)
        later = "The journal has everything; the next sweep of the study copies the rest."
        try:
            yield
        except (ImportError, sqlalchemy.exc.ArgumentError) as error:
            raise CopyError(
                f"storage={shown}: {masked(str(error))}. {later} It takes a URL of SQLAlchemy's, "
                "as postgresql+psycopg://USER@HOST/DATABASE, and the driver that it names.",
                final=True,
            ) from error
        except RuntimeError as error:
            if "version" not in str(error).lower():
                raise
            raise CopyError(
                f"Optuna's database {shown} is of another version of Optuna than the installed "
                f"{optuna.__version__}. {later} Move the file away, or install that version.",
                final=True,
            ) from error
        except (
            optuna.exceptions.StorageInternalError,
            sqlalchemy.exc.SQLAlchemyError,
            OSError,
            Timeout,
        ) as error:
            cause = error.__cause__ or error
            detail = (str(getattr(cause, "orig", None) or cause).splitlines() or [""])[0]
            raise CopyError(
                f"Optuna's database {shown} cannot be used: {masked(detail)}. {later}", final=False
            ) from error


def _placeholder(record: Record) -> FrozenTrial:
    import optuna

    what = {"role": record.role, "reason": "no point of this search space", _UID: record.uid}
    state = optuna.trial.TrialState.FAIL
    return _at(record, optuna.trial.create_trial(state=state, user_attrs=what))


def _at(record: Record, trial: FrozenTrial) -> FrozenTrial:
    """With the record's own times: Optuna keeps local ones without a zone."""

    def local(text: str) -> datetime:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
        return found.astimezone().replace(tzinfo=None)

    trial.datetime_start = local(record.result.started_at)
    trial.datetime_complete = local(record.created_at)
    return trial


def _value(text: str, kind: BaseDistribution) -> str | int | float:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(kind, CategoricalDistribution):
        return text
    return int(text) if isinstance(kind, IntDistribution) else float(text)
