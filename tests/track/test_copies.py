"""Copies for MLflow and Optuna never hold back a sweep: real processes, servers and locks."""

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
from filelock import FileLock
from hosts import Host, wait_for

WAIT_S = 5.0  # for copies, which a test expects to be late


@contextlib.contextmanager
def bad_server(mode: str) -> Iterator[str]:
    argv = [sys.executable, "-m", "benchmarks.bad_server", mode]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


def trials(host: Host) -> list[optuna.trial.FrozenTrial]:
    url = f"sqlite:///{host.store}/optuna.db"
    (name,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=name, storage=url).get_trials()


def followers(host: Host) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"follow" in (entry / "cmdline").read_bytes().split(b"\0"):
                environ = (entry / "environ").read_bytes()
                if str(host.leases).encode() in environ:
                    found.append(int(entry.name))
    return found


def test_a_server_that_misbehaves_holds_back_no_trial(tmp_path):
    """One that is busy, one that drips and one that hangs, at the same time."""
    with contextlib.ExitStack() as stack:
        hosts, sweeps = [], []
        for mode in ("busy", "drip", "hang"):
            host = Host(tmp_path / mode)
            host.folder.mkdir()
            host.env |= {"MLFLOW_TRACKING_URI": stack.enter_context(bad_server(mode))}
            hosts.append(host)
            sweeps.append(host.start("--seeds", "3", "--mlflow", "--wait", str(WAIT_S)))
        wait_for(lambda: all(host.study.exists() and len(host.records) == 3 for host in hosts))
        begun = time.monotonic()
        for sweep in sweeps:
            _, said = sweep.communicate(timeout=WAIT_S + 60)
            assert sweep.returncode == 0, said
            assert "MLflow lacks 3 of 3 record(s), which the journal has; deliver them: " in said
        assert time.monotonic() - begun < WAIT_S + 60
    for host in hosts:
        assert not followers(host)
        host.assert_tidy()


def test_one_ctrl_c_ends_a_sweep_or_a_wait_for_a_server_that_hangs(host):
    with bad_server("hang") as uri:
        host.env |= {"MLFLOW_TRACKING_URI": uri}
        sweep = host.start("--seeds", "3", "--seconds", "30", "--mlflow")
        wait_for(lambda: host.starts.exists() and host.started())
        begun = time.monotonic()
        sweep.send_signal(signal.SIGINT)
        sweep.communicate(timeout=60)
        assert time.monotonic() - begun < 19  # and not the 20 s of an end without a Ctrl-C
        assert sweep.returncode == 130
        sweep = host.start("--seeds", "1", "--study", "done", "--mlflow")
        assert sweep.stderr is not None
        next(line for line in sweep.stderr if line.startswith("waiting up to"))
        sweep.send_signal(signal.SIGINT)  # ends the wait for copies, and not the verb's words
        _, said = sweep.communicate(timeout=60)
        assert "MLflow lacks 1 of 1 record(s)" in said
        assert sweep.returncode == 0, said
    assert not followers(host)


def test_a_killed_sweep_takes_its_copying_process_with_it(host):
    with bad_server("hang") as uri:
        host.env |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
        sweep = host.start("--seeds", "3", "--seconds", "30", "--mlflow")
        wait_for(lambda: followers(host))  # which have not read their order yet
        sweep.kill()
        sweep.communicate()
        wait_for(lambda: not followers(host))
    host.env.pop("MLFLOW_TRACKING_URI")
    host.run("--seeds", "1")  # ends the trial that was left


def test_an_mlflow_that_cannot_be_imported_is_said_once(host):
    broken = host.folder / "site" / "mlflow"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(
        "raise TypeError('Descriptors cannot be created directly.')"
    )
    host.env["PYTHONPATH"] = f"{broken.parent}:{host.env['PYTHONPATH']}"
    said = host.run("--seeds", "2", "--mlflow")
    assert len(host.records) == 2
    assert said.count("MLflow cannot be imported: TypeError: Descriptors cannot be created") == 1
    assert "track sync stub" in said


def test_a_lock_of_mlflow_that_a_stopped_neighbour_holds_holds_back_nothing(host):
    host.study.mkdir(parents=True)
    with FileLock(host.study / "mlflow.lock"):
        said = host.run("--seeds", "2", "--mlflow", "--wait", str(WAIT_S))
    assert len(host.records) == 2
    assert "MLflow lacks 2 of 2 record(s)" in said


def test_a_locked_database_of_optunas_holds_back_nothing(host):
    host.run("--seeds", "1")
    database = sqlite3.connect(host.store / "optuna.db")
    database.execute("BEGIN EXCLUSIVE")
    host.run("--seeds", "3", "--wait", str(WAIT_S))
    assert len(host.records) == 3
    database.rollback()
    database.close()
    host.run("--seeds", "4")
    url = f"sqlite:///{host.store}/optuna.db"
    for name in optuna.get_all_study_names(url):  # a range of other seeds is another space
        assert len(optuna.load_study(study_name=name, storage=url).trials) == 4


def test_a_damaged_database_of_optunas_is_a_warning(host):
    host.store.mkdir()
    (host.store / "optuna.db").write_bytes(b"no database, " * 1000)
    said = host.run("--seeds", "2")
    assert len(host.records) == 2
    assert "optuna.db cannot be used: file is not a database. The journal has everything" in said


def test_optunas_copy_has_the_numbers_the_times_and_the_reasons_of_the_table(host):
    host.run("--faults", "--seeds", "22")
    copied = trials(host)
    records = host.records
    assert [trial.number for trial in copied] == [record.number for record in records]
    for trial, record in zip(copied, records, strict=True):
        assert trial.params == {"weights.seed": record.result.config["weights"]["seed"]}
        assert trial.user_attrs["outcome"] == record.result.outcome
        assert (trial.state.name == "COMPLETE") == (record.result.outcome == "ok")
        assert trial.state.name == "COMPLETE" or trial.user_attrs["reason"]
        assert trial.datetime_start is not None
        assert trial.datetime_complete is not None
        assert abs(trial.datetime_complete.timestamp() - _seconds(record.created_at)) < 1


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def test_a_url_goes_to_optuna_as_it_is_and_its_password_nowhere(host):
    database = host.folder / "elsewhere.db"
    host.run("--seeds", "2", "--storage", f"sqlite:///{database}")
    assert database.exists()
    assert not (host.store / "optuna.db").exists()
    said = host.run("--seeds", "3", "--storage", "postgresql+nodriver://me:hunter2@h/x")
    assert len(host.records) == 3
    assert "storage=postgresql+nodriver://***@h/x" in said
    assert "hunter2" not in said
    for file in host.store.rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes()
