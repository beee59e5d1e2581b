"""The engine with real processes that misbehave or are killed; only the workload is a stub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Host, wait_for

from openpi_opt.process import locks, watcher
from openpi_opt.process.child import end_marked
from openpi_opt.process.environment import TRIAL_VARIABLE
from openpi_opt.result import Failed, Ok


def _left(result: object) -> bool:
    return any("left processes behind" in note for note in getattr(result, "notes", ()))


def test_every_fault_of_a_trial_is_an_outcome_and_leaves_nothing(host: Host) -> None:
    host.run("--faults", "--seeds", "24")
    assert sorted(host.seeds()) == list(range(24))
    outcomes = {
        record.result.config["weights"]["seed"]: record.result
        for record in host.records
        if not isinstance(record.result, Ok)
    }
    assert {seed: result.outcome for seed, result in outcomes.items()} == {
        1: "crashed",
        3: "crashed",
        5: "crashed",
        7: "crashed",
        9: "error",
        11: "error",
        13: "error",
        15: "error",
        21: "timeout",
    }
    assert all(isinstance(result, Failed) and result.reason for result in outcomes.values())
    left = [r.result.config["weights"]["seed"] for r in host.records if _left(r.result)]
    assert sorted(left) == [19, 23], "a daemon and its like are named"
    logs = [path.stat().st_size for path in host.study.glob("trials/*/log.txt")]
    assert 4 * 2**20 < max(logs) < 6 * 2**20  # of the 40 MiB that one of them printed
    host.assert_tidy()


@pytest.mark.parametrize("moment", ["running", "written"])
def test_a_killed_sweep_is_continued_and_no_finished_trial_repeated(
    host: Host, moment: str
) -> None:
    """`written`: the controller stands still, so the trial ends before anything is journaled."""
    events = host.folder / "events.jsonl"
    sweep = host.start("--seeds", "4", "--measures", "0.4", "--events", str(events))
    wait_for(lambda: events.exists() and events.read_text().count('"device"') == 2)
    if moment == "written":
        sweep.send_signal(signal.SIGSTOP)
        wait_for(lambda: len(list(host.study.glob("trials/*/result.json"))) == 2)
    sweep.kill()
    sweep.communicate()
    before = len(host.records)
    err = host.run("--seeds", "4", "--seconds", "0.01")
    assert host.seeds() == [0, 1, 2, 3]
    assert [record.number for record in host.records] == [0, 1, 2, 3]
    repeated = [seed for seed in host.started() if host.started().count(seed) > 1]
    assert repeated == ([] if moment == "written" else [1, 1])
    if moment == "written":
        assert "taken from disk" in err
        assert "taken from disk" in host.records[before].result.notes[-1]
    host.assert_tidy()


@pytest.mark.parametrize("stopped", ["trial", "both"])
def test_a_trial_that_outlives_its_sweep_is_ended(host: Host, stopped: str) -> None:
    """By its watcher, though it stands still; by the next sweep when the watcher does, too."""
    sweep = host.start("--seeds", "2", "--seconds", "10")
    wait_for(lambda: host.processes() and host.starts.exists())
    (trial,) = host.processes()
    found = watcher.look(trial)
    assert found is not None
    for pid in [trial, *([found.parent] if stopped == "both" else [])]:
        os.kill(pid, signal.SIGSTOP)
    sweep.kill()
    sweep.communicate()
    if stopped == "trial":
        wait_for(lambda: not host.processes())
    else:
        assert host.processes() == [trial]
    err = host.run("--seeds", "2", "--seconds", "0.01")
    assert ("ended 1 process(es)" in err) == (stopped == "both")
    assert host.seeds() == [0, 1]
    host.assert_tidy()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_sweeps_in_processes_of_their_own_share_one_study(host: Host) -> None:
    sweeps = [host.start("--seeds", "12", "--seconds", "0.05", "--mlflow") for _ in range(2)]
    wait_for(lambda: host.starts.exists() and len(host.started()) > 3)
    sweeps[0].kill()  # the other one takes over
    for sweep in sweeps:
        _, err = sweep.communicate(timeout=180)
    assert sweeps[1].returncode == 0, err
    assert sorted(host.seeds()) == list(range(12))
    assert [record.number for record in host.records] == list(range(12))
    assert len(host.started()) <= 13  # the killed one's, perhaps, twice
    host.run("--seeds", "12", "--mlflow")
    assert open_runs(host.store) == []
    host.assert_tidy()


def open_runs(store: Path) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 12 + 1
    return [run.info.run_id for run in runs if run.info.status == "RUNNING"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_what_is_kept_and_leaves_nothing(
    host: Host, number: signal.Signals
) -> None:
    sweep = host.start("--seeds", "2", "--seconds", "30")
    wait_for(host.processes)
    sweep.send_signal(number)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "0 finished trial(s) are kept, and 1 running ended" in err
    assert "Traceback" not in err
    wait_for(lambda: not host.processes())


def test_only_marked_processes_are_ended() -> None:
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    marked, stranger = (
        subprocess.Popen(argv, env=os.environ | {TRIAL_VARIABLE: uid}) for uid in ("a" * 32, "b")
    )
    try:
        wait_for(lambda: end_marked("a" * 32))
        assert marked.wait(5) == -signal.SIGKILL
        assert stranger.poll() is None
        assert end_marked("a" * 32) == 0
    finally:
        stranger.kill()
        stranger.wait()


def test_a_child_that_inherited_a_lock_keeps_it(tmp_path: Path) -> None:
    held = locks.take(tmp_path / "x.lock", json.dumps({"pid": 1}))
    assert held is not None
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held.fd])
    held.release()
    assert locks.is_held(tmp_path / "x.lock")
    assert locks.take(tmp_path / "x.lock") is None
    child.kill()
    child.wait()
    again = locks.take(tmp_path / "x.lock")
    assert again is not None
    assert again.found
    again.release(remove=True)
    fresh = locks.take(tmp_path / "x.lock")
    assert fresh is not None
    assert not fresh.found
    fresh.release()


def test_a_link_in_place_of_a_lock_is_refused_and_its_target_untouched(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "soft.lock").symlink_to(victim)
    (tmp_path / "hard.lock").hardlink_to(victim)
    for name in ("soft.lock", "hard.lock"):
        with pytest.raises(OSError, match=r"lock|symbolic"):
            locks.take(tmp_path / name, "note")
    assert victim.read_text() == "precious"
