"""A short stress run, and that its checks see what they are there for."""

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import stress
from benchmarks.stress_check import (
    LEASES_VARIABLE,
    Counts,
    Watcher,
    check_copies,
    check_study,
    check_tidy,
    said_finished,
)
from openpi_opt.paths import package_dir

SEEDS = 5
Break = Callable[[Path], None]


def test_eight_kills_lose_nothing_and_leave_nothing(capsys):
    words = ["--kills", "8", "--real", "0", "--seed", "3", "--seeds", "8", "--pace", "0.4"]
    code = stress.main(words)
    assert code == 0, capsys.readouterr().out


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store of a sweep that nobody killed, with its copies."""
    folder = tmp_path_factory.mktemp("sound")
    env = os.environ | {LEASES_VARIABLE: str(folder / "leases"), "PYTHONPATH": "."}
    env.pop("MLFLOW_TRACKING_URI", None)
    argv = [sys.executable, "-m", "benchmarks.stub_sweep", str(folder / "store"), "--mlflow"]
    argv += ["--seeds", str(SEEDS), "--finished", str(folder / "said.txt"), "--seconds", "0"]
    sync = [sys.executable, "-m", "openpi_opt.track", "sync", "--store", str(folder / "store")]
    for command in (argv, sync):  # on a busy host its copies are late
        subprocess.run(command, cwd=package_dir().parent, env=env, check=True, capture_output=True)
    (folder / "tmp").mkdir()
    return folder


def look(folder: Path) -> Counts:
    counts = Counts()
    store, study = folder / "store", folder / "store" / "studies" / "stub"
    check_study(study, dict(said_finished(folder / "said.txt")), SEEDS, counts)
    check_copies(store, [study], counts)
    check_tidy(store, folder / "leases", folder / "tmp", counts)
    return counts


def test_a_sweep_that_nobody_killed_passes(sound):
    counts = look(sound)
    assert counts.violations == []
    assert (counts.results, counts.finished) == (SEEDS, SEEDS)


def change_journal(change: Callable[[list[bytes]], list[bytes]]) -> Break:
    def apply(folder: Path) -> None:
        path = folder / "store" / "studies" / "stub" / "journal.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return apply


def change_database(name: str, statement: str) -> Break:
    def apply(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "store" / name)) as connection:
            assert connection.execute(statement).rowcount > 0
            connection.commit()

    return apply


def remove_result(folder: Path) -> None:
    next((folder / "store").glob("studies/stub/trials/*/result.json")).unlink()


def leave(name: str) -> Break:
    return lambda folder: (folder / name).write_text("")


def renumbered(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[-1])
    return [*lines[:-1], json.dumps(record | {"number": 0}).encode() + b"\n"]


def again(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[0])
    more = record | {"uid": "f" * 32, "number": len(lines)}
    return [*lines, json.dumps(more).encode() + b"\n"]


@pytest.mark.parametrize(
    ("apply", "says"),
    [
        (change_journal(lambda lines: lines[:-1]), "had finished, the journal lacks it"),
        (change_journal(lambda lines: [*lines, lines[0]]), "2 records of"),
        (change_journal(again), "2 records of"),
        (change_journal(renumbered), "the numbers are not"),
        (change_journal(lambda lines: [*lines[:-1], lines[-1][:50]]), "cannot be read"),
        (
            change_journal(lambda lines: [line.replace(b'_ms":1', b'_ms":2') for line in lines]),
            "says another thing",
        ),
        (remove_result, "its document is gone"),
        (change_database("optuna.db", "DELETE FROM trial_values WHERE trial_id = 1"), "lacks"),
        (
            change_database(
                "optuna.db",
                "INSERT INTO trials (number, study_id, state) VALUES (9, 1, 'COMPLETE')",
            ),
            "too often",
        ),
        (change_database("mlflow.db", "UPDATE runs SET status = 'RUNNING'"), "never ended"),
        (change_database("mlflow.db", "DELETE FROM latest_metrics"), "MLflow lacks"),
        (leave("store/studies/stub/claims/x-y.lock"), "was left"),
        (leave("store/studies/stub/.study.json.1.tmp"), "was left"),
        (leave("tmp/openpi-opt-x"), "was left"),
    ],
)
def test_the_check_sees_it(sound, tmp_path, apply, says):
    folder = tmp_path / "broken"
    shutil.copytree(sound, folder)
    apply(folder)
    found = look(folder).violations
    assert any(says in text for text in found), found


def test_the_check_sees_a_process_and_a_held_lock(sound, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(sound, folder)
    env = os.environ | {LEASES_VARIABLE: str(folder / "leases")}
    left = subprocess.Popen(["sleep", "60"], env=env)
    try:
        with next((folder / "leases").iterdir()).open("rb") as lease:
            fcntl.flock(lease, fcntl.LOCK_EX)
            counts = look(folder)
    finally:
        left.kill()
        left.wait()
    assert (counts.processes, counts.held) == (1, 1)
    assert len(counts.violations) == 2


def test_a_watcher_sees_a_line_that_changes_and_a_result_that_goes(sound, tmp_path):
    folder = tmp_path / "watched"
    shutil.copytree(sound, folder)
    counts = Counts()
    watcher = Watcher(folder / "store" / "studies" / "stub", counts)
    watcher.look()
    watcher.look()
    assert counts.violations == []
    change_journal(lambda lines: lines[1:])(folder)
    remove_result(folder)
    watcher.look()
    assert len(counts.violations) == 2
