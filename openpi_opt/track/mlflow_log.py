"""Delivery of a study's records to MLflow: parent run = study, child run = trial.

Only `MlflowClient` is used: the fluent API's active run is global. Whatever fails is delivered
later from the journal by `python -m openpi_opt.track sync`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from openpi_opt.config import Tracking
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError, masked
from openpi_opt.result import Ok
from openpi_opt.track import mlflow_content as content
from openpi_opt.track import mlflow_database as database
from openpi_opt.track import mlflow_study, study_plots
from openpi_opt.track.copies import sync_command
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.left import TAGS_FILE, VERDICTS_FILE, append_line, read_lines
from openpi_opt.track.link import note_page
from openpi_opt.track.mlflow_study import ROLE_TAG, STUDY_TAG
from openpi_opt.track.report import groups
from openpi_opt.track.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

UID_TAG = "openpi_opt.uid"
PARENT_TAG = "mlflow.parentRunId"
DAY_TAG = "openpi_opt.day"
# MLflow's own defaults let one call to a dead server block for four minutes, send usage statistics
# out, and print links on stdout, which belongs to the verb. What the user has set stays.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
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
        self.server = os.environ.get("MLFLOW_TRACKING_URI") or None
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = None
        self._parents: dict[str, str] = {}
        self._delivered: dict[str, dict[str, str]] = {}
        self._baselines: dict[tuple[str, str], float] = {}

    def begin_study(self, study_dir: Path) -> str:
        """Find or make the study's parent run and mark it running; returns its id."""
        with self._talking(study_dir.name), _study_lock(study_dir):
            parent = self.parent_of(study_dir)
            self.client().update_run(parent, status="RUNNING")
            return parent

    def end_study(self, study_dir: Path) -> None:
        """Mark the study's parent run as finished."""
        with self._talking(study_dir.name), _study_lock(study_dir):
            self.client().set_terminated(self.parent_of(study_dir), "FINISHED")

    def deliver(self, record: Record, study_dir: Path) -> str:
        """Log one record, once; returns the id of its run. A run of the same uid that is complete
        is left alone; one that a kill left open is completed."""
        with self._talking(record.study), _study_lock(study_dir):
            parent = self.parent_of(study_dir)
            marked = self._marked(study_dir, parent)
            if record.uid in marked:
                return marked[record.uid]
            run = self.run_of(record.uid)
            if run is None:
                run = self.client().create_run(
                    self.experiment_id(),
                    start_time=_milliseconds(record.result.started_at, record.created_at),
                    run_name=content.run_name(record),
                    tags={
                        PARENT_TAG: self._confirmation(record, parent)
                        if record.role == "confirm"
                        else parent,
                        STUDY_TAG: record.study,
                        UID_TAG: record.uid,
                    },
                )
            run_id: str = run.info.run_id
            if run.info.status == "RUNNING":
                self._fill(record, study_dir, run_id)
            marked[record.uid] = run_id
            mark = {"uid": record.uid, "run_id": run_id, "parent": parent}
            append_line(study_dir / "delivered.jsonl", mark)
            return run_id

    def sync(
        self,
        study_dir: Path,
        journal: Journal,
        verify: bool = False,
        told: Callable[[int], None] = lambda left: None,
    ) -> int:
        """Deliver every record that has not been; returns how many were.

        What `delivered.jsonl` lists is taken as delivered while the study's parent run is the one
        that it was delivered under; `verify` asks the server for each instead. `told` hears after
        each record how many are left.
        """
        study = study_dir.name
        with self._talking(study):
            with _study_lock(study_dir):
                parent = self.parent_of(study_dir)
            if verify:
                self._delivered[parent] = self._complete_runs(study)
            marked = self._marked(study_dir, parent)
            missing = [record for record in journal.records() if record.uid not in marked]
            self._baselines = baselines(journal.records())
            told(len(missing))
            for left, record in zip(reversed(range(len(missing))), missing, strict=True):
                self.deliver(record, study_dir)  # a lock for each: a running sweep need not wait
                told(left)
        return len(missing)

    def show(self, study_dir: Path, journal: Journal) -> None:
        """Bring the study's own run and its page up to date: figures, description, plots, marks."""
        records = journal.records()
        with self._talking(study_dir.name), _study_lock(study_dir):
            self._apply_tags(study_dir)
            self._apply_verdicts(study_dir)
            given = Criteria.load(study_dir)
            self._show_study(study_dir, journal, given or Criteria())
            if given is not None:
                self._mark_trials(study_dir, given, records)

    def _show_study(self, study_dir: Path, journal: Journal, criteria: Criteria) -> None:
        client, study, parent = self.client(), study_dir.name, self.parent_of(study_dir)
        records = [record for record in journal.records() if record.role != "confirm"]
        found = groups(records, criteria=criteria)
        for name, value in mlflow_study.metrics(records, found).items():
            client.log_metric(parent, name, value)
        for step in study_plots.steps(records, criteria):
            at = _milliseconds(step.at)
            client.log_metric(parent, "best_so_far_ms", step.best_ms, at, step.number)
        known = client.get_run(parent).data.params
        for name, text in mlflow_study.params(journal, criteria).items():
            if name not in known and text:  # MLflow keeps the first value of a parameter
                client.log_param(parent, name, text[: content.MAX_PARAM])
        store = str(self.store.path)
        text = mlflow_study.description(study, store, journal.header, found)
        client.set_tag(parent, content.NOTE_TAG, text[: content.MAX_TAG])
        key = mlflow_study.VIEW_TAG + mlflow_study.view_key(study)
        client.set_experiment_tag(self.experiment_id(), key, mlflow_study.view(study, found))
        note_page(study_dir, self.server, mlflow_study.page(self.experiment_id(), study))
        plots = study_plots.files(study_dir)
        for path in [*plots, *sorted(study_dir.glob("report/*"))]:
            upload(client, parent, path)

    def _mark_trials(self, study_dir: Path, criteria: Criteria, records: Sequence[Record]) -> None:
        """Bring the marks of the Pareto set and of limits up to date, on trials and on the study,
        for criteria that were given: a study of one objective that never had a limit has none."""
        client, parent = self.client(), self.parent_of(study_dir)
        wanted = study_plots.marks(records, criteria)
        marked = {
            run.data.tags.get(UID_TAG, ""): run
            for tag in (study_plots.PARETO_TAG, study_plots.OVER_TAG)
            for run in self._search(
                f"tags.`{STUDY_TAG}` = '{study_dir.name}' AND tags.`{tag}` LIKE '%'"
            )
            if run.info.run_id != parent
        }
        for uid in wanted.keys() - marked.keys():
            run = self.run_of(uid)
            if run is not None and run.info.lifecycle_stage == "active":
                marked[uid] = run
        for uid, run in marked.items():
            for tag in (study_plots.PARETO_TAG, study_plots.OVER_TAG):
                before, after = run.data.tags.get(tag), wanted.get(uid, {}).get(tag)
                if after is not None and after != before:
                    client.set_tag(run.info.run_id, tag, after[: content.MAX_TAG])
                elif after is None and before is not None:
                    client.delete_tag(run.info.run_id, tag)
        client.set_tag(parent, study_plots.OBJECTIVES_TAG, ",".join(criteria.objectives))
        client.set_tag(parent, study_plots.LIMITS_TAG, criteria.limits_text() or "none")
        over = sum(study_plots.OVER_TAG in tags for tags in wanted.values())
        client.log_metric(parent, "limits/trials_over", over)
        if criteria.several:
            front = [
                str(r.number) for r in records if study_plots.PARETO_TAG in wanted.get(r.uid, {})
            ]
            client.set_tag(parent, study_plots.PARETO_TAG, ", ".join(front)[: content.MAX_TAG])
            client.log_metric(parent, "pareto/trials", len(front))

    def _apply_tags(self, study_dir: Path) -> None:
        """Set the tags that verbs left with `leave_tag`, on the runs that are there."""
        for tag in read_lines(study_dir / TAGS_FILE):
            run = self.run_of(tag["uid"])
            if run is not None and run.data.tags.get(tag["key"]) != tag["value"]:
                value = tag["value"][: content.MAX_TAG]
                self.client().set_tag(run.info.run_id, tag["key"], value)

    def _apply_verdicts(self, study_dir: Path) -> None:
        """Show what promotions ended with, on the runs above their processes."""
        client = self.client()
        for verdict in read_lines(study_dir / VERDICTS_FILE):
            run = self.run_of(verdict["uid"])
            above = run and run.data.tags.get(PARENT_TAG)
            if not above:
                continue
            for name, value in json.loads(verdict["figures"]).items():
                client.log_metric(above, name, value)
            client.set_tag(above, "openpi_opt.preset", verdict["preset"])
            client.set_tag(above, content.NOTE_TAG, verdict["text"])

    def _confirmation(self, record: Record, parent: str) -> str:
        """The run that processes of confirmations of one day hang below, found or made."""
        day = record.created_at[:10]
        key = f"{record.study} {day}"
        if key not in self._parents:
            client = self.client()
            of_day = (
                f"tags.`{STUDY_TAG}` = '{record.study}' AND tags.`{ROLE_TAG}` = 'confirmation' "
                f"AND tags.`{DAY_TAG}` = '{day}'"
            )
            above = next(self._search(of_day), None)
            if above is None:
                tags = {STUDY_TAG: record.study, ROLE_TAG: "confirmation", DAY_TAG: day}
                tags[PARENT_TAG] = parent
                above = client.create_run(
                    self.experiment_id(), run_name=f"confirm {day}", tags=tags
                )
                client.set_terminated(above.info.run_id, "FINISHED")
            self._parents[key] = above.info.run_id
        return self._parents[key]

    def _fill(self, record: Record, study_dir: Path, run_id: str) -> None:
        """Log everything of a record, then end its run: an ended run is a complete one. The time of
        a metric is the record's, so logging a half-filled run again changes nothing."""
        from mlflow.entities import Metric, Param, RunTag

        client = self.client()
        at = _milliseconds(record.created_at)
        ms = self._baselines.get((record.result.context_hash, record.fingerprint_hash))
        client.log_batch(
            run_id,
            metrics=[
                Metric(key, value, at, 0) for key, value in content.metrics(record, ms).items()
            ],
            params=[Param(key, value) for key, value in content.params(record).items()],
            tags=[RunTag(key, value) for key, value in content.tags(record).items()],
        )
        with _scratch(study_dir) as folder:
            content.write_artifacts(record, folder)
            upload(client, run_id, folder)
        for path in content.trial_files(record, study_dir):
            upload(client, run_id, path)
        client.set_terminated(
            run_id, "FINISHED" if record.result.outcome == "ok" else "FAILED", end_time=at
        )

    def parent_of(self, study_dir: Path) -> str:
        """Id of the study's parent run, found or made (under the study's lock)."""
        study = study_dir.name
        if study not in self._parents:
            client = self.client()
            own = f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{ROLE_TAG}` = 'study'"
            found = list(self._search(own, deleted=True))
            active = [run for run in found if run.info.lifecycle_stage == "active"]
            run = next(iter([*active, *found]), None)
            if run is None:  # made as an ended one: only `begin_study` promises an end
                tags = {STUDY_TAG: study, ROLE_TAG: "study"}
                run = client.create_run(self.experiment_id(), run_name=study, tags=tags)
                client.set_terminated(run.info.run_id, "FINISHED")
            if run.info.lifecycle_stage == "deleted":
                # MLflow's dialog deletes a parent and leaves its trials (mlflow/mlflow#2347).
                client.restore_run(run.info.run_id)
            self._parents[study] = run.info.run_id
        return self._parents[study]

    def run_of(self, uid: str) -> Run | None:
        """The run of a record, also one that was deleted in the UI: it stays deleted."""
        if not re.fullmatch("[0-9a-f]{32}", uid):
            raise ValueError(f"{uid!r} is not the uid of a record")
        return next(self._search(f"tags.`{UID_TAG}` = '{uid}'", deleted=True), None)

    def _complete_runs(self, study: str) -> dict[str, str]:
        """Run ids by uid of the study's ended runs, from the server."""
        ended = f"tags.`{STUDY_TAG}` = '{study}' AND attributes.status != 'RUNNING'"
        runs = self._search(ended, deleted=True)
        return {run.data.tags[UID_TAG]: run.info.run_id for run in runs if UID_TAG in run.data.tags}

    def _search(self, text: str, deleted: bool = False) -> Iterator[Run]:
        """Runs by a filter, with `deleted` also those that were deleted; the oldest first."""
        from mlflow.entities import ViewType

        token: str | None = None
        while True:
            page = self.client().search_runs(
                [self.experiment_id()],
                text,
                ViewType.ALL if deleted else ViewType.ACTIVE_ONLY,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _marked(self, study_dir: Path, parent: str) -> dict[str, str]:
        """Run ids by uid of what was delivered under this parent run, read once from disk."""
        if parent not in self._delivered:
            self._delivered[parent] = {
                mark["uid"]: mark["run_id"]
                for mark in read_lines(study_dir / "delivered.jsonl")
                if mark.get("parent") == parent and {"uid", "run_id"} <= mark.keys()
            }
        return self._delivered[parent]

    def client(self) -> MlflowClient:
        """The connection to MLflow, made at the first use."""
        if self._client is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._client = database.connect(self.server, self.store)
        return self._client

    def experiment_id(self) -> str:
        """Id of the experiment that runs belong to, found or made."""
        if self._experiment_id is None:
            artifacts = None if self.server else self.store.artifacts.as_uri()
            self._experiment_id = database.find_or_create_experiment(
                self.client(), self.experiment, artifacts
            )
        return self._experiment_id

    @contextmanager
    def _talking(self, study: str) -> Iterator[None]:
        """Turn what MLflow raises into one line."""
        try:
            unreachable = database.unreachable()
        except Exception as error:  # whatever a broken installation raises when it is imported
            raise UserError(
                f"MLflow cannot be imported: {type(error).__name__}: "
                f"{content.one_line(str(error), 200)}.\nMend the installation (pip install mlflow)."
            ) from error
        try:
            yield
        except unreachable as error:
            line = (
                f"MLflow at {self.server or self.store.mlflow_db}: "
                f"{content.one_line(str(error), 200)}. Results are kept in the journal; deliver "
                "them later: " + sync_command(self.store, study)
            )
            raise TrackingError(masked(line)) from error


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
    """A folder for a moment, under the study's lock. Always the same one: what a kill leaves of it
    goes when the run that it was for is completed."""
    folder = study_dir / "mlflow.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def upload(client: MlflowClient, run_id: str, path: Path) -> None:
    """Upload a file, or the files of a folder. Every kind of artifact store (S3, GCS, ...) has
    exceptions of its own library, so all of them are taken as a failed delivery here."""
    try:
        put = client.log_artifacts if path.is_dir() else client.log_artifact
        put(run_id, str(path))
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


def tracking_of(journal: Journal) -> Tracking:
    """The tracking section that the study's sweep ran with."""
    records = journal.records()
    section = records[-1].result.config.get("tracking", {}) if records else {}
    return Tracking.model_validate(section)


def baselines(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Mean milliseconds of the baselines, by context and fingerprint."""
    return {
        (record.result.context_hash, record.fingerprint_hash): record.result.latency.mean_ms
        for record in records
        if record.role == "baseline" and isinstance(record.result, Ok)
    }
