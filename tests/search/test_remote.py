"""Trials on other hosts: a real Ray cluster of two nodes and submitit's local executor.

The engine, the nodes, processes, leases and claims are real; only the workload is a stub, but for
one trial of `pi0_mini` on each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from test_engine_faults import Host, wait_for

from openpi_opt.result import Failed, Ok
from openpi_opt.search import locks
from openpi_opt.search.recovery import NODE_LOCK

SLURM = {"kind": "slurm", "cluster": "local", "slots": 2, "gpus": 0}


class Cluster:
    """Two Ray nodes in processes of their own."""

    def __init__(self, folder: Path, path: Path | None = None):
        self.folder = folder
        folder.mkdir()
        script = Path(__file__).with_name("ray_cluster.py")
        with (folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(folder), str(path or "")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, (self.folder / "log.txt").read_text()
        return line

    def kill_a_node(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        assert self._said() == "killed"

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("ray") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(params=["ray", "slurm"])
def executor(request: pytest.FixtureRequest) -> dict:
    if request.param == "slurm":
        return SLURM
    return {"kind": "ray", "address": request.getfixturevalue("cluster").address}


class Fleet(Host):
    """A store, and sweeps of stubs whose trials an engine runs."""

    def __init__(self, folder: Path, executor: dict):
        super().__init__(folder)
        self.executor = executor
        self.hosts = 2 if executor["kind"] == "ray" else 1  # with a CPU slot each

    def start(self, *words: str) -> subprocess.Popen[str]:
        return super().start("--executor", json.dumps(self.executor), *words)

    def processes(self) -> list[int]:
        """Trials of this store that live, by the program and the store in their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if "stub_trial.py" in words and str(self.store) in words:
                    found.append(int(entry.name))
        return found


@pytest.fixture
def fleet(tmp_path: Path, executor: dict) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, executor)
    yield fleet
    wait_for(lambda: not fleet.processes())


def agent_of(trial: int) -> int:
    """The process on the node that runs a trial."""
    return int(Path(f"/proc/{trial}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_every_outcome_comes_back_once_and_nothing_stays(fleet: Fleet) -> None:
    fleet.run("--faults", "--seeds", "4")
    outcomes = {r.result.config["weights"]["seed"]: r.result.outcome for r in fleet.records}
    assert outcomes == {seed: "crashed" if seed % 2 else "ok" for seed in range(4)}
    assert sorted(fleet.started()) == list(range(4))
    assert all(record.result.fingerprint["gpu"] is None for record in fleet.records)
    assert len({record.fingerprint_hash for record in fleet.records}) == 1
    fleet.assert_tidy()
    assert not list(fleet.study.glob(f"trials/*/{NODE_LOCK}"))
    assert not list(fleet.study.glob("trials/*/job"))
    assert not list((fleet.store / "nodes").iterdir())


def test_ctrl_c_ends_trials_on_the_nodes(fleet: Fleet) -> None:
    sweep = fleet.start("--seeds", "4", "--seconds", "30")
    wait_for(lambda: len(fleet.processes()) == fleet.hosts)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=30)
    assert sweep.returncode == 130, err
    assert "2 running ended" in err
    assert "Traceback" not in err
    assert not fleet.processes()
    assert not fleet.records
    claims = (fleet.study / "claims").iterdir()
    assert not [path for path in claims if locks.is_held(path)]


def test_a_killed_sweep_ends_its_trials_and_is_continued(fleet: Fleet) -> None:
    sweep = fleet.start("--seeds", "3", "--seconds", "30")
    wait_for(lambda: len(fleet.processes()) == fleet.hosts)
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not fleet.processes())
    fleet.run("--seeds", "3")
    assert sorted(fleet.seeds()) == [0, 1, 2]
    assert [record.number for record in fleet.records] == [0, 1, 2]
    fleet.assert_tidy()


def test_what_is_lost_is_tried_once_more_and_then_recorded(fleet: Fleet) -> None:
    """The agents on the nodes are killed, as a node takes them with it."""
    for seed, kills in ((0, 2), (1, 1)):
        sweep = fleet.start("--seeds", str(seed + 1), "--seconds", "1")
        for count in range(kills):
            wait_for(partial(has_started, fleet, seed, count + 1))
            (trial,) = fleet.processes()
            os.kill(agent_of(trial), signal.SIGKILL)
        _, err = sweep.communicate(timeout=60)
        assert err.count("lost in phase load") == kills, err
    first, second = (record.result for record in fleet.records)
    assert isinstance(first, Failed)
    assert first.outcome == "crashed"
    assert "ended with the node or process that ran it" in first.reason
    assert isinstance(second, Ok)
    assert fleet.started() == [0, 0, 1, 1]
    wait_for(lambda: not fleet.processes())
    assert not list((fleet.study / "claims").iterdir())


def has_started(fleet: Fleet, seed: int, times: int) -> bool:
    started = fleet.started() if fleet.starts.exists() else []
    return started.count(seed) == times and len(fleet.processes()) == 1


def test_a_job_that_is_requeued_begins_again_and_counts_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, SLURM)
    sweep = fleet.start("--seeds", "1", "--seconds", "2")
    wait_for(lambda: has_started(fleet, 0, 1))
    (trial,) = fleet.processes()
    os.kill(agent_of(trial), signal.SIGUSR2)  # as Slurm preempts a job
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 0, err
    assert "lost" not in err
    assert fleet.started() == [0, 0]
    assert [record.result.outcome for record in fleet.records] == ["ok"]
    fleet.assert_tidy()


def test_a_node_dies_and_the_sweep_goes_on_with_the_other(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        fleet = Fleet(tmp_path, {"kind": "ray", "address": cluster.address})
        sweep = fleet.start("--seeds", "3", "--seconds", "1.5")
        wait_for(lambda: len(fleet.processes()) == 2)
        cluster.kill_a_node()
        _, err = sweep.communicate(timeout=60)
        assert sweep.returncode == 0, err
        assert "NodeDiedError" in err
        assert sorted(fleet.seeds()) == [0, 1, 2]
        assert {record.result.outcome for record in fleet.records} == {"ok"}
        assert len(fleet.started()) == 4
        fleet.assert_tidy()
    finally:
        cluster.close()


def test_nodes_of_two_kinds_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """The second node has another `aiter` on its path."""
    (tmp_path / "second" / "aiter" / "ops").mkdir(parents=True)
    (tmp_path / "second" / "aiter" / "__init__.py").touch()
    cluster = Cluster(tmp_path / "cluster", path=tmp_path / "second")
    try:
        fleet = Fleet(tmp_path, {"kind": "ray", "address": cluster.address})
        sweep = fleet.start("--seeds", "3")
        _, err = sweep.communicate(timeout=60)
        assert sweep.returncode == 2
        assert "not of one kind (aiter: " in err
        assert "Traceback" not in err
        assert not fleet.study.exists()
    finally:
        cluster.close()
