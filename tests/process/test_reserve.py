"""The device of a promotion: which one, held by whom, and what a killed session leaves of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, wait_for
from search_samples import CPU, ok

from openpi_opt.config import Config
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.errors import UserError
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.process import devices, locks, watcher
from openpi_opt.process.child import Place
from openpi_opt.process.devices import LEASES_VARIABLE, Devices, gpu_name, reserve
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import DeviceSettings
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store

MODELS = ("A100", "H100", "H100", "H100")
HOST = dataclasses.replace(
    CPU,
    gpus=tuple(
        Gpu(n, f"GPU-{n}a", name, "nvidia", "sm90", 80_000, "1") for n, name in enumerate(MODELS)
    ),
    torch=TorchBuild("2.13", "13.0", None),
)


@pytest.fixture(autouse=True)
def _leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))


def on(gpu: int | None = None, device: str = "cuda") -> Config:
    return Config.parse({"platform": {"device": device, "gpu": gpu}})


def record(gpu: int, role: str = "trial") -> Record:
    seen = {"gpu": {"uuid": HOST.gpus[gpu].uuid} if gpu >= 0 else None}
    result = ok(on(), 5.0).model_copy(update={"fingerprint": seen})
    return Record(study="s", role=role, result=result, fingerprint_hash="f")


def taken(
    cfg: Config, wanted: int | str | None = None, *records: Record, machine: Machine = HOST
) -> str:
    lease = reserve(cfg, machine, wanted, records, pytest.fail, pytest.fail)
    lease.release()
    return lease.slot.name


@pytest.mark.parametrize(
    ("cfg", "wanted", "records", "name"),
    [
        (on(), None, [], "GPU 0"),
        (on(2), None, [], "GPU 2"),
        (on(), 3, [], "GPU 3"),
        (on(), "GPU-3", [], "GPU 3"),
        (on(), None, [record(2), record(3)], "GPU 2"),
        (on(), None, [record(0), record(3)], "GPU 3"),
        (on(), None, [record(3), record(0)], "GPU 0"),
        (on(), None, [record(2, "confirm"), record(3, "confirm"), record(1)], "GPU 3"),
        (on(), 1, [record(3, "confirm")], "GPU 1"),
        (on(2), None, [record(3, "confirm")], "GPU 2"),
        (on(device="cpu"), None, [record(3, "confirm"), record(-1)], "CPU slot 0"),
        (on(), None, [record(-1)], "GPU 0"),
    ],
)
def test_which_device(cfg: Config, wanted: int | None, records: list[Record], name: str) -> None:
    assert taken(cfg, wanted, *records) == name


def test_what_cannot_be_had_is_refused() -> None:
    for cfg, wanted, words in (
        (on(), 7, "no such GPU as 7"),
        (on(), "GPU-", "4 UUIDs"),
        (on(1), 2, "platform.gpu=1"),
    ):
        with pytest.raises(UserError, match=words):
            taken(cfg, wanted)
    with pytest.raises(UserError, match=r"devices=\[0\]: this machine has no GPU"):
        taken(on(device="cpu"), 0, machine=CPU)
    assert [gpu_name(text) for text in ("3", "-1", "GPU-3a")] == [3, -1, "GPU-3a"]


def test_it_waits_and_says_for_whom() -> None:
    slots = Devices(DeviceSettings(), HOST).slots("cuda")
    held = devices.lease(slots[0])
    assert held is not None
    said: list[str] = []

    def pause(_: float) -> None:
        assert len(said) == 1
        assert held is not None
        held.release()

    lease = reserve(on(0), HOST, None, [], said.append, pause)
    assert lease.slot == slots[0], "with the cores that a sweep gives it"
    lease.release()
    assert f"in use are GPU 0 by process {os.getpid()} of user" in said[0]
    assert "--device names another GPU" in said[0]


def test_another_free_gpu_of_the_study_is_taken_at_once() -> None:
    held = devices.lease(Devices(DeviceSettings(gpus=[1]), HOST).slots("cuda")[0])
    assert held is not None
    assert taken(on(), None, record(1), record(2)) == "GPU 2"
    held.release()


def test_processes_of_another_gpu_are_no_answer(tmp_path: Path) -> None:
    """However equal two GPUs are: the pairs of a confirmation are of one."""
    ran: list[str] = []

    def run(cfg: Config, *others: Any) -> TrialResult:
        place: Place = others[-1]
        ran.append(place.slot.keys[0])
        assert place.fds
        return ok(cfg, 5.0)

    store, said = Store.open(tmp_path), list[str]()
    journal = Journal.open(store.study_dir("s"))
    for wanted in (1, 1, 2, None):
        runs = FreshRuns(store, journal, None, HOST, said.append, run)
        with runs.alone(on(), wanted):
            next(runs.in_turn([Planned(on(), "x", ("tau", 0))]))
            seen = runs.fingerprint(on())["gpu"]["uuid"]
    assert ran == ["GPU-1a", "GPU-2a"]
    assert seen == "GPU-2a", "the one of the newest confirmation"
    gpus = [r.result.fingerprint["gpu"]["uuid"] for r in journal.records()]
    assert gpus == ran


class Sessions(Host):
    """Real sessions in processes of their own."""

    def session(self, study: str, count: int, seconds: float) -> subprocess.Popen[str]:
        program = str(Path(__file__).parents[1] / "samples" / "fresh_session.py")
        argv = [sys.executable, program, str(self.store), study, str(count), str(seconds)]
        return subprocess.Popen(argv, env=self.env, stderr=subprocess.PIPE, text=True)

    def end(self, process: subprocess.Popen[str]) -> str:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        return err

    def begun(self) -> list[int]:
        path = self.store / "starts.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def recorded(self, study: str) -> list[Record]:
        return Journal.read(self.store / "studies" / study).records()

    def assert_free(self) -> None:
        assert not [path for path in self.leases.iterdir() if locks.is_held(path)]


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path)


def test_promotions_of_two_studies_take_turns(sessions: Sessions) -> None:
    first = sessions.session("a", 2, 0.4)
    wait_for(sessions.begun)
    second = sessions.session("b", 1, 0.01)
    sessions.end(first)
    said = sessions.end(second)
    assert f"waiting for a device: in use are CPU slot 0 by process {first.pid} of user" in said
    lines = (sessions.store / "ran.jsonl").read_text().splitlines()
    *before, last = map(json.loads, lines)
    assert all(entry["ended"] < last["began"] for entry in before)
    assert last["cores"] == sorted(os.sched_getaffinity(0))
    sessions.assert_free()


def test_a_killed_session_leaves_no_process_and_no_lease_to_the_next(sessions: Sessions) -> None:
    """Stopped with its watcher, the process does not end by itself, and it holds the lease."""
    session = sessions.session("a", 2, 0.5)
    wait_for(sessions.begun)
    (orphan,) = sessions.begun()
    found = watcher.look(orphan)
    assert found is not None
    for pid in (found.parent, orphan):
        os.kill(pid, signal.SIGSTOP)
    session.kill()
    session.communicate()
    (lease,) = {path for path in sessions.leases.iterdir() if path.name == "core-0.lock"}
    assert locks.is_held(lease)
    said = sessions.end(sessions.session("a", 2, 0.01))
    assert "ended 1 process(es) that a killed session left" in said
    found = watcher.look(orphan)
    assert found is None or not found.lives
    assert [record.number for record in sessions.recorded("a")] == [0, 1]
    assert len(sessions.begun()) == 3
    sessions.assert_free()


def test_what_a_killed_session_had_finished_is_taken_from_disk(sessions: Sessions) -> None:
    session = sessions.session("a", 2, 0.3)
    wait_for(sessions.begun)
    session.send_signal(signal.SIGSTOP)
    wait_for(lambda: list(sessions.store.glob("studies/a/confirm/*/result.json")))
    session.kill()
    session.communicate()
    assert sessions.recorded("a") == []
    sessions.end(sessions.session("a", 2, 0.01))
    first, second = sessions.recorded("a")
    assert "taken from disk" in first.result.notes[-1]
    assert second.result.notes == []
    assert len(sessions.begun()) == 2
    sessions.assert_free()
