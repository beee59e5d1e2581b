"""Delivery of a study's records to MLflow: parent run = study, child run = trial.

Only `MlflowClient` is used, never the fluent API, whose active run and tracking URI are global.
Nothing is kept in MLflow alone: whatever fails here is delivered later from the journal by
`python -m openpi_opt.track sync`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from openpi_opt import interrupt
from openpi_opt.config import Tracking
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError, masked
from openpi_opt.track import mlflow_content as content
from openpi_opt.track import mlflow_database as database
from openpi_opt.track import pareto
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STUDY_TAG = "openpi_opt.study"
UID_TAG = "openpi_opt.uid"
ROLE_TAG = "openpi_opt.role"
PARENT_TAG = "mlflow.parentRunId"
# A server that is away must not hold up the sweep after every trial.
RETRY_AFTER_S = 60.0
# MLflow's own defaults let one call to a dead server block for four minutes, send usage statistics
# out, and print links on stdout, which belongs to the verb. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackingError(Exception):
    """MLflow did not take something now. One line with the reason and how to deliver it later."""


class MlflowLog:
    """One store's way to MLflow: the server of `MLFLOW_TRACKING_URI`, else the local database.

    Raises, from every method:
        TrackingError: MLflow is away or refuses. The caller goes on; the journal has the record.
        UserError: the database belongs to another version of MLflow, or the experiment was
            deleted: to be mended before anything can be delivered.
    """

    def __init__(self, store: Store, tracking: Tracking):
        self.store = store
        self.experiment = tracking.experiment
        self.begun = False  # a run that is to be ended
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or store.mlflow_uri
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._parents: dict[str, str] = {}
        self._delivered: dict[str, dict[str, str]] = {}
        self._away_until = 0.0

    def begin_study(self, study_dir: Path) -> str:
        """Find or make the study's parent run and mark it running; returns its id."""
        with self._talking(study_dir.name), _study_lock(study_dir):
            parent = self._parent(study_dir)
            self.begun = True
            self._connect().update_run(parent, status="RUNNING")
            return parent

    def end_study(self, study_dir: Path) -> None:
        """Mark the study's parent run as finished."""
        with self._talking(study_dir.name), _study_lock(study_dir):
            self._connect().set_terminated(self._parent(study_dir), "FINISHED")

    def deliver(self, record: Record, study_dir: Path) -> str:
        """Log one record, once; returns the id of its run.

        A run of the same uid that is complete is left alone; one that a killed controller left
        open is completed. Right after a failure this fails at once, without asking again.
        """
        if time.monotonic() < self._away_until:
            raise TrackingError(self._line(record.study, "was away a moment ago"))
        with self._talking(record.study), _study_lock(study_dir):
            return self._deliver(record, study_dir)

    def sync(self, study_dir: Path, journal: Journal, verify: bool = False) -> int:
        """Deliver every record that has not been; returns how many were.

        What `delivered.jsonl` lists is taken as delivered while the study's parent run is the one
        that it was delivered under; `verify` asks the server for each instead.
        """
        count = 0
        study = study_dir.name
        with self._talking(study):
            with _study_lock(study_dir):
                parent = self._parent(study_dir)
            if verify:
                self._delivered[parent] = self._complete_runs(study)
            for record in journal.records():
                if record.uid in self._marked(study_dir, parent):
                    continue
                with _study_lock(study_dir):  # for each, so that a running sweep need not wait
                    self._deliver(record, study_dir)
                count += 1
        self.judge(study_dir, journal.records())
        return count

    def judge(self, study_dir: Path, records: Sequence[Record]) -> None:
        """Bring the marks of the Pareto set and of limits up to date, on trials and on the study.

        A study of one objective that never had a limit has none.
        """
        criteria = Criteria.load(study_dir)
        if criteria is None:
            return
        wanted = pareto.marks(records, criteria)
        with self._talking(study_dir.name), _study_lock(study_dir):
            parent = self._parent(study_dir)
            marked = self._marked_runs(study_dir.name, parent)
            for uid in wanted.keys() - marked.keys():
                run = self._run_of(uid)
                if run is not None and run.info.lifecycle_stage == "active":
                    marked[uid] = run
            for uid, run in marked.items():
                self._mark_run(run, wanted.get(uid, {}))
            self._mark_study(parent, criteria, wanted, records)
            for path in pareto.files(study_dir):
                _upload(self._connect(), parent, path)

    def _marked_runs(self, study: str, parent: str) -> dict[str, Run]:
        """The trials that have marks, by uid."""
        found: dict[str, Run] = {}
        for tag in (pareto.PARETO_TAG, pareto.OVER_TAG):
            token: str | None = None
            while True:
                page = self._connect().search_runs(
                    [self._experiment()],
                    f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{tag}` LIKE '%'",
                    page_token=token,
                )
                found |= {run.data.tags.get(UID_TAG, ""): run for run in page}
                token = page.token
                if not token:
                    break
        return {uid: run for uid, run in found.items() if uid and run.info.run_id != parent}

    def _mark_run(self, run: Run, wanted: dict[str, str]) -> None:
        client = self._connect()
        for tag in (pareto.PARETO_TAG, pareto.OVER_TAG):
            before, after = run.data.tags.get(tag), wanted.get(tag)
            if after is not None and after != before:
                client.set_tag(run.info.run_id, tag, after[: content.MAX_TAG])
            elif after is None and before is not None:
                client.delete_tag(run.info.run_id, tag)

    def _mark_study(
        self,
        parent: str,
        criteria: Criteria,
        wanted: dict[str, dict[str, str]],
        records: Sequence[Record],
    ) -> None:
        """On the parent run: the objectives, the limits, and the numbers of the Pareto set."""
        client = self._connect()
        client.set_tag(parent, pareto.OBJECTIVES_TAG, ",".join(criteria.objectives))
        client.set_tag(parent, pareto.LIMITS_TAG, criteria.limits_text() or "none")
        over = sum(pareto.OVER_TAG in tags for tags in wanted.values())
        client.log_metric(parent, "limits/trials_over", over)
        if criteria.several:
            front = [str(r.number) for r in records if pareto.PARETO_TAG in wanted.get(r.uid, {})]
            client.set_tag(parent, pareto.PARETO_TAG, ", ".join(front)[: content.MAX_TAG])
            client.log_metric(parent, "pareto/trials", len(front))

    def tag_run(self, uid: str, key: str, value: str) -> str:
        """Set a tag on the run of a delivered record; returns the run's id."""
        with self._talking(""):
            run = self._run_of(uid)
            if run is None:
                raise TrackingError(
                    f"MLflow has no run of the trial {uid}; deliver it first: "
                    + self._sync_command("")
                )
            run_id: str = run.info.run_id
            self._connect().set_tag(run_id, key, value[: content.MAX_TAG])
            return run_id

    def _deliver(self, record: Record, study_dir: Path) -> str:
        parent = self._parent(study_dir)
        marked = self._marked(study_dir, parent)
        if record.uid in marked:
            return marked[record.uid]
        with interrupt.shielded():
            run = self._run_of(record.uid)
            if run is None:
                run = self._create_run(record, parent)
            run_id: str = run.info.run_id
            if run.info.status == "RUNNING":
                self._fill(record, study_dir, run_id)
            marked[record.uid] = run_id
            _mark(study_dir, {"uid": record.uid, "run_id": run_id, "parent": parent})
        return run_id

    def _create_run(self, record: Record, parent: str) -> Run:
        return self._connect().create_run(
            self._experiment(),
            start_time=_milliseconds(record.result.started_at, record.created_at),
            run_name=content.run_name(record),
            tags={PARENT_TAG: parent, STUDY_TAG: record.study, UID_TAG: record.uid},
        )

    def _fill(self, record: Record, study_dir: Path, run_id: str) -> None:
        """Log everything of a record, then end its run: an ended run is a complete one.

        The time of a metric is the record's, so logging a half-filled run again changes nothing.
        """
        from mlflow.entities import Metric, Param, RunTag

        client = self._connect()
        at = _milliseconds(record.created_at)
        client.log_batch(
            run_id,
            metrics=[Metric(key, value, at, 0) for key, value in content.metrics(record).items()],
            params=[Param(key, value) for key, value in content.params(record).items()],
            tags=[RunTag(key, value) for key, value in content.tags(record).items()],
        )
        with _scratch(study_dir) as folder:
            content.write_artifacts(record, folder)
            _upload(client, run_id, folder)
        for path in content.trial_files(record, study_dir):
            _upload(client, run_id, path)
        client.set_terminated(
            run_id, "FINISHED" if record.result.outcome == "ok" else "FAILED", end_time=at
        )

    def _parent(self, study_dir: Path) -> str:
        """Id of the study's parent run, found or made (under the study's lock)."""
        study = study_dir.name
        if study not in self._parents:
            client = self._connect()
            found = client.search_runs(
                [self._experiment()],
                f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{ROLE_TAG}` = 'study'",
                max_results=1,
                order_by=["attributes.start_time ASC"],
            )
            run = found[0] if found else self._create_parent(study)
            self._parents[study] = run.info.run_id
        return self._parents[study]

    def _create_parent(self, study: str) -> Run:
        """Make the parent run, ended: only `begin_study` promises that somebody will end it."""
        client, experiment = self._connect(), self._experiment()
        tags = {STUDY_TAG: study, ROLE_TAG: "study"}
        with interrupt.shielded():
            run = client.create_run(experiment, run_name=study, tags=tags)
            client.set_terminated(run.info.run_id, "FINISHED")
        return run

    def _run_of(self, uid: str) -> Run | None:
        """The run of a record, also one that was deleted in the UI: it stays deleted."""
        from mlflow.entities import ViewType

        if not re.fullmatch("[0-9a-f]{32}", uid):
            raise ValueError(f"{uid!r} is not the uid of a record")
        found = self._connect().search_runs(
            [self._experiment()], f"tags.`{UID_TAG}` = '{uid}'", ViewType.ALL, max_results=1
        )
        return found[0] if found else None

    def _complete_runs(self, study: str) -> dict[str, str]:
        """Run ids by uid of the study's ended runs, from the server."""
        from mlflow.entities import ViewType

        complete: dict[str, str] = {}
        token: str | None = None
        while True:
            page = self._connect().search_runs(
                [self._experiment()],
                f"tags.`{STUDY_TAG}` = '{study}' AND attributes.status != 'RUNNING'",
                ViewType.ALL,
                page_token=token,
            )
            tagged = ((run.data.tags.get(UID_TAG), run.info.run_id) for run in page)
            complete |= {uid: run_id for uid, run_id in tagged if uid}
            token = page.token
            if not token:
                return complete

    def _marked(self, study_dir: Path, parent: str) -> dict[str, str]:
        """Run ids by uid of what was delivered under this parent run, read once from disk."""
        if parent not in self._delivered:
            self._delivered[parent] = _read_marks(study_dir, parent)
        return self._delivered[parent]

    def _connect(self) -> MlflowClient:
        if self._client is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._client = database.connect(self.uri)
        return self._client

    def _experiment(self) -> str:
        if self._experiment_id is None:
            local = self.uri.startswith(database.SQLITE)
            artifacts = self.store.artifacts.as_uri() if local else None
            self._experiment_id = database.find_or_create_experiment(
                self._connect(), self.experiment, artifacts
            )
        return self._experiment_id

    @contextmanager
    def _talking(self, study: str) -> Iterator[None]:
        """Turn what MLflow raises into one line."""
        # Before: while Ctrl-C interrupts MLflow's import, asking would import the torso of it.
        unreachable = database.unreachable()
        try:
            yield
        except unreachable as error:
            self._away_until = time.monotonic() + RETRY_AFTER_S
            raise TrackingError(self._line(study, content.one_line(str(error), 200))) from error
        self._away_until = 0.0

    def _line(self, study: str, why: str) -> str:
        line = (
            f"MLflow at {self.uri}: {why}. Results are kept in the journal; deliver them later: "
            + self._sync_command(study)
        )
        return masked(line)

    def _sync_command(self, study: str) -> str:
        words = ["python", "-m", "openpi_opt.track", "sync", *([study] if study else [])]
        return shlex.join([*words, "--store", str(self.store.path)])


@contextmanager
def _study_lock(study_dir: Path) -> Iterator[None]:
    """One delivery of a study at a time, so that two processes cannot both make the same run."""
    try:
        with FileLock(study_dir / "mlflow.lock"):
            yield
    except PermissionError as error:
        raise UserError(f"cannot write in {study_dir}: {error.strerror}.") from error


@contextmanager
def _scratch(study_dir: Path) -> Iterator[Path]:
    """A folder for a moment, under the study's lock.

    Always the same one: what a kill leaves of it goes when the run that it was for is completed.
    """
    folder = study_dir / "mlflow.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _upload(client: MlflowClient, run_id: str, path: Path) -> None:
    """Upload a file, or the files of a folder.

    Every kind of artifact store (S3, GCS, ...) has exceptions of its own library, so all of them
    are taken as a failed delivery here.
    """
    try:
        upload = client.log_artifacts if path.is_dir() else client.log_artifact
        upload(run_id, str(path))
    except Exception as error:
        raise OSError(f"uploading {path.name} failed: {error}") from error


def _milliseconds(*candidates: str) -> int:
    """The first readable ISO time as MLflow counts it."""
    for text in candidates:
        try:
            return int(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)
        except ValueError:
            continue
    return int(time.time() * 1000)


def _mark(study_dir: Path, mark: dict[str, str]) -> None:
    """Note a delivery. Begins with a newline, so that a torn line before it does no harm."""
    with (study_dir / "delivered.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(mark))


def _read_marks(study_dir: Path, parent: str) -> dict[str, str]:
    path = study_dir / "delivered.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    marks = [mark for mark in map(_parse_mark, lines) if mark.get("parent") == parent]
    return {mark["uid"]: mark["run_id"] for mark in marks if {"uid", "run_id"} <= mark.keys()}


def _parse_mark(line: str) -> dict[str, Any]:
    """An unreadable mark is no mark: the server is asked instead."""
    try:
        mark = json.loads(line)
    except ValueError:
        return {}
    return mark if isinstance(mark, dict) else {}
