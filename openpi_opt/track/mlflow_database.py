"""Opening MLflow safely: a local database made by one process, versions checked before use."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from openpi_opt.errors import UserError
from openpi_opt.track.store import Store, sqlite_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CHATTY = ("mlflow.store", "mlflow.tracking", "alembic", "urllib3.connectionpool")


def connect(server: str | None, store: Store) -> MlflowClient:
    """A client of a tracking server, or of the store's own database. That one is checked, made when
    absent, and led to its artifacts when the store was moved. Raises UserError: the database is of
    another version of MLflow, or not a database."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is raised as well
    from mlflow import MlflowClient

    if server is None:
        _prepare(store.mlflow_db)
        _find_artifacts(store)
    uri = server or sqlite_url(store.mlflow_db)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def unreachable() -> tuple[type[Exception], ...]:
    """Exceptions that mean MLflow did not take a request (requests' are `OSError`)."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    return (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, OSError)


def find_or_create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of the experiment; `artifacts` is where a new one puts its files. Raises UserError: it was
    deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment is None or experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {name!r} was deleted, so nothing can be logged to it.\n"
            "Restore it in the MLflow UI (or `mlflow experiments restore`), "
            "or use tracking.experiment=NAME."
        )
    return str(experiment.experiment_id)


def _prepare(path: Path) -> None:
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            _create(path)
    _check_version(path)


def _find_artifacts(store: Store) -> None:
    """Lead runs to the artifacts of this store, where it was moved, copied or mounted elsewhere.
    MLflow keeps the absolute folder that an experiment was made with (mlflow/mlflow#3144), so a
    moved store would show no files and write new ones to the old place."""
    here = store.artifacts.as_uri()
    with closing(sqlite3.connect(store.mlflow_db, timeout=20)) as database, database:
        ours = "artifact_location LIKE 'file:%/artifacts' AND artifact_location <> ?"
        found = f"SELECT DISTINCT artifact_location FROM experiments WHERE {ours}"
        for (old,) in database.execute(found, (here,)).fetchall():
            database.execute(
                "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?",
                (here, old),
            )
            begin = len(old) + 1
            database.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE substr(artifact_uri, 1, ?) = ?",
                (here, begin, begin, f"{old}/"),
            )


def _create(path: Path) -> None:
    """Make the database under another name and rename it. MLflow creates its tables in dozens of
    migrations; two processes at it, or one that is killed half-way, leave a database that never
    works again."""
    from mlflow import MlflowClient

    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    uri = sqlite_url(unfinished)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    os.replace(unfinished, path)


def _check_version(path: Path) -> None:
    """Compare the schema revision with those that the installed MLflow knows. Done before MLflow
    opens the file, because MLflow adds its tables to a database that it does not know before it
    refuses it."""
    import mlflow
    from mlflow.store import db_migrations

    revision = _revision(path)
    versions = Path(next(iter(db_migrations.__path__))) / "versions"
    migrations = [file.read_text("utf-8").replace("'", '"') for file in versions.glob("*.py")]
    if not any(f'\nrevision = "{revision}"' in text for text in migrations):
        raise UserError(
            f"{path} was written by another, newer MLflow than the installed {mlflow.__version__} "
            f"(schema {revision}).\n"
            "Upgrade MLflow (pip install --upgrade mlflow), or use another store with store=DIR.\n"
            "The journals of the studies are not affected."
        )
    if any(f'down_revision = "{revision}"' in text for text in migrations):
        raise UserError(
            f"{path} is a database of an older MLflow than the installed {mlflow.__version__}.\n"
            f"Copy the file, then run: mlflow db upgrade sqlite:///{path}\n"
            "Or use another store with store=DIR. The journals of the studies are not affected."
        )


def _revision(path: Path) -> str:
    try:
        with closing(sqlite3.connect(path, timeout=20)) as database:
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "no such table" not in str(error):
            raise  # locked or out of reach: the database itself may be fine
        raise UserError(
            f"{path} is not an MLflow database ({error}).\n"
            "Move the file away and run `python -m openpi_opt.track sync`, which fills a new one "
            "from the journals; or use another store with store=DIR."
        ) from None
    return str(row[0]) if row else "none"
