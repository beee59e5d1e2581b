import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from track_samples import ENERGY, config, failed, ok, record, refused, roofline, wrong

from openpi_opt.config import Tracking
from openpi_opt.errors import UserError
from openpi_opt.result import Ok
from openpi_opt.track import __main__ as verb
from openpi_opt.track import mlflow_log
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.left import leave_tag, leave_verdict
from openpi_opt.track.mlflow_content import metrics
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError
from openpi_opt.track.store import Store

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
HERE = Path(__file__).parent
SAMPLES = HERE.parent / "samples"


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in mlflow_log.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One local database for all tests; each uses a study of its own."""
    return Store.open(tmp_path_factory.mktemp("a store") / "mlruns")


@pytest.fixture
def study(store):
    path = store.study_dir(f"s-{uuid4().hex[:8]}")
    path.mkdir(parents=True)
    return path


@pytest.fixture
def log(store):
    return MlflowLog(store, Tracking())


def keep(study: Path, *records: Record) -> list[Record]:
    journal = Journal.open(study)
    return [journal.append(item.model_copy(update={"study": study.name})) for item in records]


def runs(log: MlflowLog, study: Path, role: str | None = None) -> list[Any]:
    found = log.client().search_runs(
        [log.experiment_id()], f"tags.`openpi_opt.study` = '{study.name}'"
    )
    return [run for run in found if run.data.tags.get("openpi_opt.role") != "study"]


def artifacts(log: MlflowLog, run_id: str) -> set[str]:
    return {item.path for item in log.client().list_artifacts(run_id)}


def test_what_only_a_gpu_has():
    found = metrics(record(ok(10.0, kind="device_kernels")))
    assert found["launch/overhead_ms"] == 1.0
    assert (found["gpu/busy_ms"], found["gpu/idle_ms"]) == (9.0, 0.5)
    assert (found["gpu/sm_clock_mhz"], found["gpu/throttled_thermal_ms"]) == (1200, 0)
    assert found["stage/vision_kernels"] == 100
    assert (found["kernels/total"], found["kernels/gemm"]) == (321, 300)
    assert not any(key.startswith("operators/") for key in found)
    on_cpu = metrics(record(ok(10.0)))
    assert not [name for name in on_cpu if name.startswith(("gpu/", "launch/"))]


def test_roofline_and_energy_are_metrics_where_they_are_known():
    without = metrics(record(ok(10.0)))
    result = ok(10.0).model_copy(update={"roofline": roofline(), "energy": ENERGY})
    found = metrics(record(result))
    assert {key: found[key] for key in set(found) - set(without)} == {
        "roofline/fraction": 0.4,
        "roofline/floor_ms": 4.0,
        "roofline/vision_fraction": 0.25,
        "roofline/vision_floor_ms": 1.0,
        "roofline/prefill_floor_ms": 3.0,
        "energy/seconds": 3.0,
        "energy/calls": 100.0,
        "energy/joule": 5.0,
        "energy/inferences_per_joule": 0.8,
        "energy/watt": 500.0,
        "energy/hz_per_watt": 0.25,
        "energy/idle_watt": 90.0,
        "energy/limit_watt": 700.0,
        "energy/hz_per_limit_watt": 0.2,
    }


def test_an_ok_trial_is_a_run_with_its_figures_tags_and_files(log, study, tmp_path):
    trial = study / "trials" / "0"
    trial.mkdir(parents=True)
    (trial / "log.txt").write_text("hello")
    (trial / "trace.json").write_text("{}")
    (trial / "secret.env").write_text("TOKEN=1")
    asked = {"attention": "sdpa", "attention.vision": "aiter"}
    (item,) = keep(study, record(ok(10.0), params=asked, trial_dir="trials/0"))
    run_id = log.deliver(item, study)
    (run,) = runs(log, study)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics == metrics(item)
    for name, value in (
        ("latency/mean_ms", 10.0),
        ("latency/p99_ms", 12.0),
        ("throughput/hz", 100.0),
        ("operators/gemm", 300.0),
        ("stage/denoise_ms", 7.0),
        ("compile/graph_breaks", 2.0),
        ("memory/peak_mib", 900.0),
        ("guard/rel_l2", 0.002),
        ("phase/load_s", 1.5),
    ):
        assert run.data.metrics[name] == value
    assert run.data.params["attention"] == "eager"
    assert run.data.params["model.name"] == "pi0_mini"
    assert run.data.params["workload.batch_size"] == "1"
    assert run.data.params["weights.kind"] == "random"
    tags = run.data.tags
    assert tags["openpi_opt.outcome"] == "ok"
    assert tags["openpi_opt.flags"] == "gpu_clock: 1200 of 1980 MHz before"
    assert tags["openpi_opt.config_hash"] == item.result.config_hash
    assert tags["openpi_opt.context_hash"] == item.result.context_hash
    assert tags["openpi_opt.fingerprint_hash"] == item.fingerprint_hash
    assert tags["openpi_opt.model"] == "pi0_mini"
    assert tags["openpi_opt.device"] == "cpu (AMD EPYC)"
    assert tags["openpi_opt.overrides"] == "attention=sdpa attention.vision=aiter"
    assert tags["mlflow.runName"] == "0 attention=sdpa attention.vision=aiter"
    files = {"config.json", "result.json", "kernels.csv", "log.txt", "trace.json"}
    assert artifacts(log, run_id) == files
    assert run.info.artifact_uri.startswith(log.store.artifacts.as_uri())
    path = log.client().download_artifacts(run_id, "result.json", str(tmp_path))
    assert Ok.model_validate(json.loads(Path(path).read_text())) == item.result
    parent = log.client().get_run(tags["mlflow.parentRunId"])
    assert parent.info.run_name == study.name
    assert parent.data.tags["openpi_opt.study"] == study.name


def test_other_outcomes_carry_no_latency(log, study):
    long = failed("\x1b[31mboom\x1b[0m\n" + "x" * 10_000)
    for item in keep(study, record(wrong()), record(refused()), record(long)):
        log.deliver(item, study)
    for run in runs(log, study):
        assert run.info.status == "FAILED"
        assert not any(key.startswith(("latency", "throughput")) for key in run.data.metrics)
        assert artifacts(log, run.info.run_id) == {"config.json", "result.json"}
    by_outcome = {run.data.tags["openpi_opt.outcome"]: run for run in runs(log, study)}
    assert by_outcome["wrong"].data.metrics["guard/rel_l2"] == 0.002
    assert by_outcome["unavailable"].data.tags["openpi_opt.reason"] == "aiter is missing"
    reason = by_outcome["crashed"].data.tags["openpi_opt.reason"]
    assert reason.startswith("boom xxx")
    assert len(reason) == 500


def test_keys_and_values_that_mlflow_would_refuse(log, study):
    item = record(ok(), params={"a[0]": "y" * 9_000})
    labels = {f"+odd=key@{i}": "z" * 7_000 for i in range(3)} | {f"k{i}": "" for i in range(150)}
    (item,) = keep(study, item.model_copy(update={"labels": labels}))
    log.deliver(item, study)
    (run,) = runs(log, study)
    assert run.data.params["_odd_key_0"] == "z" * 6_000
    assert run.data.params["k149"] == ""


def test_files_outside_the_trial_are_not_uploaded(log, study):
    (study / "trial").mkdir()
    (study.parent / "log.txt").write_text("another's")
    (study / "trial" / "log.txt").symlink_to("/etc/passwd")
    for where in ("..", "trial", "absent"):
        (item,) = keep(study, record(refused(), trial_dir=where))
        assert artifacts(log, log.deliver(item, study)) == {"config.json", "result.json"}


def test_delivered_twice_is_logged_once(store, log, study):
    (item,) = keep(study, record())
    first = log.deliver(item, study)
    assert log.deliver(item, study) == first
    assert MlflowLog(store, Tracking()).deliver(item, study) == first
    (study / "delivered.jsonl").unlink()  # then the server's tags decide
    assert MlflowLog(store, Tracking()).deliver(item, study) == first
    (study / "delivered.jsonl").write_text('torn {"uid"')
    assert MlflowLog(store, Tracking()).sync(study, Journal.read(study), verify=True) == 0
    assert len(runs(log, study)) == 1


def test_a_half_logged_run_is_completed(store, log, study, monkeypatch):
    """As after `kill -9` between the metrics and the end of the run."""
    (item,) = keep(study, record())

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(mlflow_log, "upload", kill)
        with pytest.raises(Killed):
            log.deliver(item, study)
    assert runs(log, study)[0].info.status == "RUNNING"
    fresh = MlflowLog(store, Tracking())
    assert fresh.sync(study, Journal.read(study)) == 1
    (run,) = runs(log, study)
    assert run.info.status == "FINISHED"
    history = log.client().get_metric_history(run.info.run_id, "latency/mean_ms")
    assert len(history) == 1
    assert "result.json" in artifacts(log, run.info.run_id)


def test_deleted_in_the_ui_stays_deleted(store, log, study):
    (item,) = keep(study, record())
    log.client().delete_run(log.deliver(item, study))
    (study / "delivered.jsonl").unlink()
    assert MlflowLog(store, Tracking()).sync(study, Journal.read(study), verify=True) == 0
    assert runs(log, study) == []


def test_parent_run_begins_and_ends(store, log, study):
    parent = log.begin_study(study)
    assert log.client().get_run(parent).info.status == "RUNNING"
    assert MlflowLog(store, Tracking()).begin_study(study) == parent
    log.end_study(study)
    assert log.client().get_run(parent).info.status == "FINISHED"


def test_a_tag_that_was_left_is_set_when_the_run_is_there(log, study):
    (item,) = keep(study, record())
    leave_tag(study, item.uid, "openpi_opt.preset", "h100")
    journal = Journal.read(study)
    log.show(study, journal)
    log.deliver(item, study)
    for _ in range(2):
        log.show(study, journal)
        assert runs(log, study)[0].data.tags["openpi_opt.preset"] == "h100"


def test_processes_of_a_confirmation_hang_below_a_run_with_its_verdict(log, study):
    shown = ["confirmation 1: baseline", "confirmation 1: attention=sdpa"]
    _, *processes = keep(
        study,
        record(),
        *(record(role="confirm").model_copy(update={"shown": text}) for text in shown),
    )
    log.sync(study, Journal.read(study))
    leave_verdict(study, processes[0].uid, "fast", {"gain": 0.25}, "Preset **fast**")
    log.show(study, Journal.read(study))
    found = {run.info.run_name: run for run in runs(log, study)}
    above = found[f"confirm {processes[0].created_at[:10]}"]
    assert above.data.tags["mlflow.parentRunId"] == log.begin_study(study)
    assert above.data.tags["openpi_opt.preset"] == "fast"
    assert above.data.tags["mlflow.note.content"] == "Preset **fast**"
    assert above.data.metrics["gain"] == 0.25
    for number, text in enumerate(shown, 1):
        run = found[f"{number} {text}"]
        assert run.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert len(found) == 4


def test_a_store_that_was_moved_takes_its_artifacts_along(tmp_path):
    old = Store.open(tmp_path / "old %41")
    study = old.study_dir("s")
    (item,) = keep(study, record())
    run_id = MlflowLog(old, Tracking()).deliver(item, study)
    old.path.rename(tmp_path / "new")
    store = Store.open(tmp_path / "new")
    log = MlflowLog(store, Tracking())
    assert "result.json" in artifacts(log, run_id)
    study = store.study_dir("s")
    (_, other) = keep(study, record(), record())
    run = log.client().get_run(log.deliver(other, study))
    assert run.info.artifact_uri.startswith(store.artifacts.as_uri())
    assert not old.path.exists()


def test_a_parent_that_was_deleted_alone_is_restored(store, study):
    first, second = keep(study, record(), record())
    log = MlflowLog(store, Tracking())
    log.deliver(first, study)
    parent = log.begin_study(study)
    log.client().delete_run(parent)
    later = MlflowLog(store, Tracking())
    later.deliver(second, study)
    assert later.client().get_run(parent).info.lifecycle_stage == "active"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs(later, study)} == {parent}


def test_server_down_is_told_in_seconds_and_sync_delivers_later(store, study, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{port}")
    log = MlflowLog(store, Tracking())
    items = keep(study, record(), record(refused()))
    start = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        log.deliver(items[0], study)
    assert time.monotonic() - start < 60
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"python -m openpi_opt.track sync {study.name} --store '{store.path}'" in message
    assert "hunter2" not in message
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    log = MlflowLog(store, Tracking())
    assert log.sync(study, Journal.read(study)) == 2
    assert log.sync(study, Journal.read(study)) == 0
    assert len(runs(log, study)) == 2


def test_what_the_user_set_stays(store, study, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    MlflowLog(store, Tracking()).begin_study(study)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


def test_real_server_and_sync_verb(store, study, mlflow_server, monkeypatch, capsys):
    """What was delivered locally is not on the server: the same study is delivered there too."""
    items = keep(study, record(), record(refused()))
    MlflowLog(store, Tracking()).deliver(items[0], study)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    arguments = ["sync", study.name, "--store", str(store.path)]
    assert MlflowLog(store, Tracking()).sync(study, Journal.read(study)) == 2
    keep(study, record(wrong()))
    assert verb.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{study.name}: 1 of 3 records delivered")
    (study / "delivered.jsonl").unlink()
    assert verb.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{study.name}: 0 of 3 records delivered")
    remote = MlflowLog(store, Tracking())
    assert len(runs(remote, study)) == 3
    delivered = remote.run_of(items[0].uid)
    assert delivered is not None
    assert artifacts(remote, delivered.info.run_id) == {"config.json", "kernels.csv", "result.json"}


def test_sync_uses_the_studys_experiment(store, study):
    keep(study, record(ok(cfg=config(tracking={"experiment": "mine"}))))
    assert verb.main(["sync", study.name, "--store", str(store.path)]) == 0
    assert len(runs(MlflowLog(store, Tracking(experiment="mine")), study)) == 1
    assert runs(MlflowLog(store, Tracking()), study) == []


def test_deleted_experiment_is_said(store, study):
    log = MlflowLog(store, Tracking(experiment="gone"))
    log.client().delete_experiment(log.experiment_id())
    with pytest.raises(UserError, match="'gone' was deleted"):
        MlflowLog(store, Tracking(experiment="gone")).begin_study(study)


def copy_with_revision(store: Store, study: Path, tmp_path: Path, revision: str) -> Store:
    MlflowLog(store, Tracking()).begin_study(study)
    other = Store.open(tmp_path)
    target = tmp_path / "mlflow.db"
    target.write_bytes((store.path / "mlflow.db").read_bytes())
    with sqlite3.connect(target) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()
    return other


@pytest.mark.parametrize(
    ("revision", "says"),
    [
        ("ffffffffffff", "newer MLflow than the installed"),
        ("0a8213491aaa", "mlflow db upgrade sqlite:///"),
    ],
)
def test_database_of_another_version(store, study, tmp_path, revision, says):
    other = copy_with_revision(store, study, tmp_path, revision)
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(UserError, match=says) as caught:
        MlflowLog(other, Tracking()).begin_study(study)
    assert str(tmp_path / "mlflow.db") in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert (tmp_path / "mlflow.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a database at all, " * 100])
def test_not_a_database(tmp_path, study, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with pytest.raises(UserError, match="is not an MLflow database"):
        MlflowLog(Store.open(tmp_path), Tracking()).begin_study(study)


def test_processes_that_begin_at_once_share_one_database(tmp_path):
    """A fresh database opened by several processes is where MLflow itself breaks."""
    code = (
        f"import sys; sys.path.insert(0, {str(SAMPLES)!r})\n"
        "from track_samples import *\n"
        "from openpi_opt.config import Tracking\n"
        "from openpi_opt.track.journal import Journal\n"
        "from openpi_opt.track.mlflow_log import MlflowLog\n"
        "from openpi_opt.track.store import Store\n"
        f"store = Store.open({str(tmp_path)!r})\n"
        "folder = store.study_dir('s')\n"
        "journal = Journal.open(folder)\n"
        "log = MlflowLog(store, Tracking())\n"
        "for _ in range(3): log.deliver(journal.append(record()), folder)\n"
        "log.sync(folder, Journal.open(folder))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert (out, err) == ("", "")  # none of MLflow's chatter
    store = Store.open(tmp_path)
    log = MlflowLog(store, Tracking())
    found = log.client().search_runs([log.experiment_id()], "tags.`openpi_opt.study` = 's'")
    assert len(found) == 6 + 1
    assert (
        len({run.data.tags["mlflow.parentRunId"] for run in found if run.info.run_name != "s"}) == 1
    )
    assert not list(tmp_path.glob("*.new"))


def test_what_a_kill_left_of_an_upload_is_gone_after_the_next(log, study):
    (item,) = keep(study, record(ok()))
    (study / "mlflow.tmp").mkdir()
    (study / "mlflow.tmp" / "half.json").write_text("{")
    run_id = log.deliver(item, study)
    assert not (study / "mlflow.tmp").exists()
    names = [file.path for file in log.client().list_artifacts(run_id)]
    assert names
    assert "half.json" not in names
