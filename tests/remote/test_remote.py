"""Trials on other hosts: a real Ray cluster of two nodes and submitit's local executor.

The engine, the nodes, processes, leases and claims are real; only the workload is a stub, but for
one trial of `pi0_mini` on each.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hosts import Host, wait_for
from process_samples import gpu
from search_samples import CPU
from terminal_samples import Terminal

from openpi_opt.config import Config, Platform
from openpi_opt.engine import recovery
from openpi_opt.engine.display import Display
from openpi_opt.engine.ledger import Job, Ledger
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.recovery import ALIVE, NODE_LOCK
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.process import locks, watcher
from openpi_opt.process.devices import LEASES_VARIABLE
from openpi_opt.remote import node
from openpi_opt.remote.node import Declined, Description, Order, read_note
from openpi_opt.remote.remote import Nodes, connected
from openpi_opt.result import Failed, Ok
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.store import Store

SLURM = {"kind": "slurm", "cluster": "local", "slots": 2, "gpus": 0}


class Cluster:
    """Two Ray nodes in processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        script = Path(__file__).parents[1] / "samples" / "ray_cluster.py"
        with (folder / "log.txt").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(folder)],
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


@pytest.fixture
def fleet(tmp_path: Path, executor: dict) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, executor)
    yield fleet
    wait_for(lambda: not fleet.processes())


def agent_of(trial: int) -> int:
    """The process on the node that runs a trial: the parent of its watcher."""
    of_trial = watcher.look(trial)
    assert of_trial is not None
    of_watcher = watcher.look(of_trial.parent)
    assert of_watcher is not None
    return of_watcher.parent


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
    sweep = fleet.start("--seeds", "4", "--seconds", "300")
    wait_for(lambda: len(fleet.processes()) == fleet.hosts)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 130, err
    assert "2 running ended" in err
    assert "Traceback" not in err
    wait_for(lambda: not fleet.processes())  # the node was told: its trial takes 300 s
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
    """The agent on the node is killed, as a dying node takes it with it."""
    sweep = fleet.start("--seeds", "1", "--seconds", "30")
    for count in range(2):
        wait_for(partial(has_started, fleet, 0, count + 1))
        (trial,) = fleet.processes()
        os.kill(agent_of(trial), signal.SIGKILL)
    _, err = sweep.communicate(timeout=60)
    assert err.count("lost in phase load") == 2, err
    (record,) = fleet.records
    assert isinstance(record.result, Failed)
    assert record.result.outcome == "crashed"
    assert "ended with the node or process that ran it" in record.result.reason
    assert fleet.started() == [0, 0]
    fleet.assert_tidy()


def has_started(fleet: Fleet, seed: int, times: int) -> bool:
    """And its node has said so; it writes that a moment later than the trial itself."""
    started = fleet.started() if fleet.starts.exists() else []
    folders = fleet.store.glob("studies/*/trials/*")
    held = [folder for folder in folders if locks.is_held(folder / NODE_LOCK)]
    said = [read_note(folder)[1] for folder in held]
    return started.count(seed) == times and len(fleet.processes()) == 1 and said == ["load"]


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


def test_a_trial_of_the_real_policy(tmp_path: Path, executor: dict) -> None:
    terminal = Terminal(tmp_path)
    own = [f"executor.{key}={value}" for key, value in executor.items() if key != "kind"]
    words = [f"executor={executor['kind']}", *own, "tracking=none", "attention=sdpa"]
    code, out, err = terminal.run(*words)
    assert code == 0, err
    (record,) = terminal.records
    assert isinstance(record.result, Ok)
    assert record.fingerprint_hash == fingerprint_hash(fingerprint(probe()))
    assert "(raylet)" not in out


def test_a_node_dies_and_the_sweep_goes_on_with_the_other(tmp_path: Path, cluster: Cluster) -> None:
    """The last test with this cluster."""
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


class Nowhere:
    """An engine whose nodes say what is given."""

    name = "ray"

    def __init__(self, *found: Description):
        self._found = list(found)

    def describe(self, lock: Path, token: str, display: Display) -> list[Description]:
        return self._found

    def ask(self, folder: Path) -> Nodes:
        return Nodes.ask(self, Store.open(folder), Display())


@pytest.fixture
def this_host(tmp_path: Path) -> Description:
    held = locks.take(tmp_path / "probe.lock", "token")
    assert held is not None
    described = pickle.loads(pickle.dumps(node.describe(held.path, "token")))
    held.release()
    return described


def test_a_node_describes_itself_as_this_host_sees_itself(this_host: Description) -> None:
    assert not this_host.problem
    assert this_host.machine == probe(hidden=True)
    assert vars(this_host.machine)["aiter"] == probe().aiter, "found there, and not here"
    assert this_host.fingerprint == fingerprint(probe(), Platform(device="cpu"))


def test_a_node_without_the_store_or_its_locks_is_refused(tmp_path: Path) -> None:
    """Without locks nobody could tell a live trial from a dead one."""
    for token, problem in (("other", "does not see the store"), ("token", "locks in")):
        (tmp_path / "probe.lock").write_text("token")
        described = node.describe(tmp_path / "probe.lock", token)
        with pytest.raises(UserError, match=problem):
            Nowhere(described).ask(tmp_path / "store")


@pytest.mark.parametrize("what", ["cpu", "triton", "source_hash"])
def test_nodes_of_two_kinds_are_refused(tmp_path: Path, this_host: Description, what: str) -> None:
    other = replace(this_host, fingerprint={**this_host.fingerprint, what: "another"})
    problem = r"not of one kind \(.*-> another\)"
    if what == "source_hash":
        problem = "another openpi_opt than this host"
    with pytest.raises(UserError, match=problem):
        Nowhere(this_host, other).ask(tmp_path)


def test_nodes_with_two_models_of_gpu_are_refused(tmp_path: Path, this_host: Description) -> None:
    gpus = tuple(gpu(n, name) for n, name in enumerate(("H100", "H100", "H200")))
    one, other = (
        replace(this_host, machine=replace(this_host.machine, gpus=found))
        for found in (gpus[:2], gpus[2:])
    )
    nodes = Nowhere(this_host, one).ask(tmp_path)
    assert nodes.machine.gpus[0].name == "H100"  # not of the node without GPU
    assert nodes.fingerprint("cuda")["gpu"]["name"] == "H100"
    assert nodes.fingerprint("cpu")["gpu"] is None
    with pytest.raises(UserError, match="H100 sm90 1 -> H200 sm90 1"):
        Nowhere(one, other).ask(tmp_path).fingerprint("cuda")


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        ("nobody wants it", "void", "given up by its sweep"),
        ("its sweep gave it up", "void", "given up by its sweep"),
        ("another machine", "refused", "than the first node that was asked (gpu none; cpu "),
        ("the store is gone", "failed", "trial"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_declined(
    tmp_path: Path, case: str, kind: str, why: str
) -> None:
    folder = tmp_path / "trial"
    hash_of_this = fingerprint_hash(fingerprint(probe()))
    order = Order(
        *(Config().resolved(probe()), "0" * 32, folder, tmp_path, tmp_path),
        machine_hash="0" * 12 if case == "another machine" else hash_of_this,
        command=("-c", "raise SystemExit('never')"),
    )
    alive = None
    if case != "the store is gone":
        folder.mkdir()
    if case in ("its sweep gave it up", "another machine"):
        alive = locks.take(folder / ALIVE)
    if case == "its sweep gave it up":
        (folder / ALIVE).unlink()
    answer = node.run(order)
    assert isinstance(answer, Declined)
    assert answer.kind == kind
    assert why in answer.why
    assert not (folder / "config.json").exists()
    if alive is not None:
        alive.release()


def test_what_runs_on_a_node_without_its_sweep_is_not_measured_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition: the sweep was killed, and its node has not seen it yet."""
    monkeypatch.setattr(recovery, "WAIT_SECONDS", 0.1)
    store, cfg = Store.open(tmp_path), Config.parse({}).resolved(CPU)
    request = StudyRequest("s", Space.parse([]), Settings(), CPU)
    dead, ours = (Ledger(store, request, Display()) for _ in range(2))
    job, again = Job(cfg, "trial"), Job(cfg, "trial")
    assert dead.claim(job)
    dead.start(job)
    assert job.folder is not None
    on_node = locks.take(job.folder / NODE_LOCK)
    assert on_node is not None
    job.let_go()  # as a kill does
    dead.controllers.leave(remove=False)
    assert not ours.claim(again)
    assert not ours.claim(again)
    on_node.release()
    assert ours.claim(again)
    again.let_go(done=True)
    ours.close()


@pytest.mark.parametrize(("kind", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("ray_executor", "slurm_executor"):
        monkeypatch.delitem(sys.modules, f"openpi_opt.remote.{module}", raising=False)
    settings = Settings.parse({"executor": {"kind": kind}})
    with (
        pytest.raises(UserError, match=rf"pip install 'openpi_opt\[{kind}\]'"),
        connected(settings.executor),
    ):
        pass


def test_an_engine_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    settings = Settings.parse({"executor": {"kind": "slurm"}})
    with pytest.raises(UserError, match="no sbatch"), connected(settings.executor):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"executor": {"kind": "slurm", "partition": "a\n#SBATCH --wrap=x"}}, "executor.partition"),
        ({"executor": {"kind": "slurm", "slots": 0}}, "executor.slots=0"),
        (
            {"executor": {"kind": "ray"}, "devices": {"gpus": [0]}},
            "^devices names GPUs of this host",
        ),
    ],
)
def test_wrong_settings_are_named(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings.parse({"storage": "postgresql://me:secret@h/d", **given})


def test_two_hosts_with_one_store_share_the_work(tmp_path: Path) -> None:
    """Each has leases of its own, so both measure at the same time; no other lock is shared."""
    hosts = [Host(tmp_path), Host(tmp_path)]
    for number, host in enumerate(hosts):
        host.env[LEASES_VARIABLE] = str(tmp_path / f"leases-{number}")
    sweeps = [host.start("--seeds", "12", "--seconds", "0.3") for host in hosts]
    said = [sweep.communicate(timeout=90)[1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    assert sorted(hosts[0].started()) == list(range(12))
    assert [record.number for record in hosts[0].records] == list(range(12))
    own = [sum("(known" not in line and " ok " in line for line in s.splitlines()) for s in said]
    assert sum(own) == 12
    assert min(own) >= 2
    hosts[0].assert_tidy()
