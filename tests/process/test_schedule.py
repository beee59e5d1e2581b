"""Several trials prepare, one measures: real sweeps of stubs on pretended GPUs, and the rules."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, wait_for
from process_samples import LIMITS, SAY, gpu, machine
from search_samples import CPU, failed, ok

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import LocalExecutor, LostError, Task
from openpi_opt.process import devices, locks, watcher
from openpi_opt.process.child import Ended, Place, StoppedError, run_command
from openpi_opt.process.devices import LEASES_VARIABLE, Devices, DeviceSettings, Queue, reserve
from openpi_opt.process.schedule import DeviceLostError, Need, Room, Schedule, Turn
from openpi_opt.result import TrialResult
from openpi_opt.track.store import Store

CUDA = Config.parse({"platform": {"device": "cuda"}})
WIDE = Room(None, 1e9)


class Gpus(Host):
    """Sweeps of stubs on one GPU or several, with what each trial did when."""

    def __init__(self, folder: Path, gpus: int = 1, prepare: int = 3):
        super().__init__(folder)
        self.gpus, self.prepare = gpus, prepare
        self.events, self.ticks = folder / "events.jsonl", folder / "ticks.txt"

    def start(self, *words: str) -> subprocess.Popen[str]:
        given = ["--gpus", str(self.gpus), "--prepare", str(self.prepare)]
        given += ["--events", str(self.events), "--ticks", str(self.ticks)]
        return super().start(*given, *words)

    def seen(self) -> list[dict[str, Any]]:
        if not self.events.exists():
            return []
        return [json.loads(line) for line in self.events.read_text().splitlines(keepends=False)]

    def at(self) -> dict[int, dict[str, float]]:
        """By seed, when what happened."""
        found: dict[int, dict[str, float]] = defaultdict(dict)
        for event in self.seen():
            found[event["seed"]][event["what"]] = event["at"]
        return found

    def measured(self) -> list[tuple[float, float, int]]:
        """When each trial had the device, and its seed, in order."""
        at = self.at()
        had = [(at[s]["device"], at[s]["measured"], s) for s in at if "measured" in at[s]]
        return sorted(had)

    def ran(self) -> list[tuple[int, str, float]]:
        """Seed, trial or child of it, and when it ran."""
        lines = [line.split() for line in self.ticks.read_text().splitlines()]
        return [(int(line[0]), line[1], float(line[2])) for line in lines if len(line) == 3]

    def first(self) -> tuple[int, int]:
        """Seed and process of the first that has the device, once one has."""
        wait_for(lambda: [e for e in self.seen() if e["what"] == "device"])
        event = next(e for e in self.seen() if e["what"] == "device")
        return event["seed"], event["pid"]

    def standing(self) -> list[int]:
        """Processes of trials that are stopped."""
        looked = [watcher.look(pid) for pid in self.processes()]
        return [each.pid for each in looked if each is not None and each.state == "T"]

    def assert_all_free(self) -> None:
        wait_for(lambda: not [path for path in self.leases.iterdir() if locks.is_held(path)])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Gpus]:
    host = Gpus(tmp_path)
    yield host
    assert host.processes() == []


def test_one_measures_and_whatever_belongs_to_the_others_stands_still(host: Gpus) -> None:
    err = host.run("--seeds", "4", "--together", "3", "--measures", "0.6")
    assert sorted(host.seeds()) == list(range(4))
    assert sorted(host.started()) == list(range(4))
    at, measured, ran = host.at(), host.measured(), host.ran()
    assert all(first[1] < second[0] for first, second in pairwise(measured))
    assert at[1]["imported"] < at[0]["measured"], "nothing was prepared beside the first"
    for began, ended, seed in measured:
        others = [tick for tick in ran if tick[0] != seed and began + 0.03 < tick[2] < ended]
        assert others == []
        own = {who for own, who, when in ran if own == seed and began < when < ended}
        assert own == {"trial", "child"}
    late = {seed for seed, who, when in ran if who == "child" and when > measured[0][1]}
    assert late == {0, 1, 2, 3} - {measured[0][2]} or late == {0, 1, 2, 3}
    assert re.search(r"measured in \d+ s: GPU 0 \d+% of the time", err)
    host.assert_tidy()


def test_who_only_reads_its_profile_lets_the_next_have_the_device(host: Gpus) -> None:
    words = ("--together", "3", "--measures", "0.6", "--reads", "0.5")
    host.run("--seeds", "3", *words)
    at, measured, ran = host.at(), host.measured(), host.ran()
    assert all(first[1] < second[0] for first, second in pairwise(measured))
    first, second = measured[0][2], measured[1][2]
    assert at[second]["device"] < at[first]["end"], "it was not let go"
    for began, ended, seed in measured:  # and what still reads stands still
        assert [t for t in ran if t[0] != seed and began + 0.03 < t[2] < ended] == []
    assert len(host.records) == 3


@pytest.mark.parametrize("victim", ["trial", "watcher"])
def test_when_the_measuring_one_is_killed_the_next_goes_on(host: Gpus, victim: str) -> None:
    sweep = host.start("--seeds", "3", "--together", "3", "--measures", "1.5")
    seed, first = host.first()
    wait_for(host.standing)
    found = watcher.look(first)
    assert found is not None
    os.kill(first if victim == "trial" else found.parent, signal.SIGKILL)
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, err
    outcomes = {r.result.config["weights"]["seed"]: r.result.outcome for r in host.records}
    assert outcomes == {0: "ok", 1: "ok", 2: "ok", seed: "crashed"}
    assert len(host.measured()) == 2
    host.assert_tidy()


@pytest.mark.parametrize("dies", [0, 2])
def test_a_trial_that_dies_while_it_prepares_holds_nobody_up(host: Gpus, dies: int) -> None:
    host.run("--seeds", "4", "--dies", str(dies), "--imports", "0.2", "--measures", "0.2")
    outcomes = {r.result.config["weights"]["seed"]: r.result for r in host.records}
    assert [outcomes[seed].outcome == "ok" for seed in range(4)] == [s != dies for s in range(4)]
    assert "in phase import" in outcomes[dies].reason
    host.assert_tidy()


def test_a_killed_sweep_leaves_nothing_also_of_what_stands_still(host: Gpus) -> None:
    words = ["--seeds", "3", "--together", "3"]
    sweep = host.start(*words, "--measures", "60")
    _, has_it = host.first()
    wait_for(lambda: len(host.standing()) == 4)  # two trials, each with a child
    assert has_it in host.processes()
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not host.processes())
    host.assert_all_free()
    host.run(*words, "--measures", "0.1")
    assert sorted(host.seeds()) == [0, 1, 2]
    assert sorted(host.started()) == [0, 0, 1, 1, 2, 2]
    host.assert_tidy()


def test_ctrl_c_ends_what_measures_and_what_stands_still(host: Gpus) -> None:
    sweep = host.start("--seeds", "3", "--together", "3", "--measures", "60")
    seed, _ = host.first()
    wait_for(host.standing)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "0 finished trial(s) are kept, and 3 running ended" in err
    assert "Traceback" not in err
    assert host.processes() == []
    assert [e["seed"] for e in host.seen() if e["what"] == "device"] == [seed]
    host.assert_all_free()


@pytest.mark.parametrize(("sleeps", "exceeds"), [(0.3, False), (30, True)])
def test_a_limit_and_the_childs_own_clock_stand_still_with_it(
    tmp_path: Path, sleeps: float, exceeds: bool
) -> None:
    body = f"""
phase("load")
deadline = time.monotonic() + {sleeps}
while time.monotonic() < deadline: time.sleep(0.01)
print(os.pread(int(sys.argv[sys.argv.index("--stopped-fd") + 1]), 64, 0).decode())
"""
    script, log = tmp_path / "child.py", tmp_path / "log.txt"
    script.write_text(SAY.replace("sys.argv[-1]", "sys.argv[2]") + body)
    argv, limits = [sys.executable, str(script)], {**LIMITS, "load": 2.5}
    jobs, ends = Jobs(), list[Ended]()

    def stands(turn: Turn) -> TrialResult:
        place = Place(turn=turn)
        ends.append(run_command(argv, os.environ, limits, log, on_phase, place))
        return ok(CUDA, 1.0)

    def measures(turn: Turn) -> TrialResult:
        turn.asks()
        assert os.read(turn.gate, 1)
        time.sleep(4.0)
        return ok(CUDA, 1.0)

    def on_phase(phase: str) -> None:
        if phase == "load":
            jobs.start("measures", measures)

    jobs.start("stands", stands)
    wait_for(lambda: ends)
    jobs.join()
    (ended,) = ends
    assert (ended.exceeded == 2.5) == exceeds
    assert ended.phase_seconds["load"] < (4.0 if exceeds else 2.5)
    if not exceeds:
        assert 3.9 < float(log.read_text()) < 20


def test_sweeps_of_two_users_take_turns_on_one_gpu(tmp_path: Path) -> None:
    hosts = [Gpus(tmp_path / name, prepare=2) for name in "ab"]
    for host in hosts:
        host.folder.mkdir()
        host.env[LEASES_VARIABLE] = str(tmp_path / "leases")
    words = ["--seeds", "6", "--imports", "0.1", "--measures", "0.3"]
    first = hosts[0].start(*words)
    _, present = hosts[0].first()
    os.kill(present, signal.SIGSTOP)  # until the other one has come to wait
    second = hosts[1].start(*words)
    assert second.stderr is not None
    said = next(line for line in second.stderr if "waiting" in line)
    assert f"waiting for a device: in use are GPU 0 by process {first.pid} of user" in said
    os.kill(present, signal.SIGCONT)
    for process in (first, second):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    had = sorted(
        (began, ended, name)
        for name, host in zip("ab", hosts, strict=True)
        for began, ended, _ in host.measured()
    )
    assert len(had) == 12
    assert all(present[1] < following[0] for present, following in pairwise(had))
    order = "".join(name for _, _, name in had)
    assert max(map(len, re.findall("a+|b+", order[: order.rindex("a")]))) <= 4, order
    hosts[0].leases = tmp_path / "leases"
    hosts[0].assert_all_free()


class Killable:
    """A child that is never there; when it is killed, its job reads that at the gate."""

    paused = False

    def __init__(self, turn: Turn):
        self.turn = turn

    def pause(self, seconds: float) -> list[str]:
        return []

    def resume(self) -> None:
        return

    def kill(self) -> None:
        os.write(self.turn.write, b"k")


class Jobs:
    """Jobs on a schedule, without processes: each asks, and goes on when it is told."""

    def __init__(self, room: Room = WIDE, in_order: bool = False):
        self.stop = threading.Event()
        self.schedule = Schedule(self.stop, room, in_order)
        self.turns: dict[str, list[Turn]] = defaultdict(list)
        self.order: list[str] = []
        self.results: dict[str, TrialResult | BaseException] = {}
        self.threads: list[threading.Thread] = []

    def start(self, name: str, run: Callable[[Turn], TrialResult]) -> None:
        place = self.schedule.join()

        def begin(turn: Turn) -> TrialResult:
            self.turns[name].append(turn)
            return run(turn)

        def work() -> None:
            try:
                with place:
                    self.results[name] = place.run(CUDA, begin)
            except (DeviceLostError, StoppedError) as error:
                self.results[name] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def measure(self, name: str, ready: threading.Event | None = None) -> None:
        """A job that asks when `ready`, and takes note when it has the device."""

        def run(turn: Turn) -> TrialResult:
            turn.began(Killable(turn))  # type: ignore[arg-type]
            assert ready is None or ready.wait(20)
            turn.asks()
            if os.read(turn.gate, 1) == b"k":
                return failed(CUDA)
            self.order.append(name)
            return ok(CUDA, 1.0)

        self.start(name, run)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("in_order", [False, True])
def test_who_asks_first_has_it_or_who_is_first_in_the_line(in_order: bool) -> None:
    jobs, late = Jobs(in_order=in_order), threading.Event()
    jobs.measure("a", late)
    wait_for(lambda: jobs.turns["a"])
    jobs.measure("b")
    wait_for(lambda: jobs.turns["b"] and jobs.turns["b"][0].asked)
    if in_order:
        time.sleep(0.1)
        assert jobs.order == []
    else:
        wait_for(lambda: jobs.order == ["b"])
    late.set()
    jobs.join()
    assert jobs.order == (["a", "b"] if in_order else ["b", "a"])


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("again", ["ok", "oom"])
def test_who_runs_out_of_memory_beside_others_runs_again_alone(again: str, in_order: bool) -> None:
    jobs, go = Jobs(in_order=in_order), threading.Event()
    outcomes = ["oom", again]

    def hungry(turn: Turn) -> TrialResult:
        if len(outcomes) == 2:
            assert go.wait(20)
        else:
            assert turn.alone
            assert jobs.schedule.on_device() == [turn]
            turn.asks()
            assert os.read(turn.gate, 1)
        return failed(CUDA, "oom") if outcomes.pop(0) == "oom" else ok(CUDA, 1.0)

    jobs.start("hungry", hungry)
    wait_for(lambda: jobs.turns["hungry"])
    jobs.measure("neighbour")
    wait_for(lambda: jobs.turns["neighbour"])
    go.set()
    jobs.join()
    result = jobs.results["hungry"]
    assert not isinstance(result, BaseException)
    assert result.outcome == again
    assert again == "ok" or "alone, after" in getattr(result, "reason", "")
    assert isinstance(jobs.results["neighbour"], type(ok(CUDA, 1.0)))


def test_alone_from_the_beginning_it_is_oom_at_once() -> None:
    jobs = Jobs()
    jobs.start("a", lambda _: failed(CUDA, "oom"))
    jobs.join()
    assert len(jobs.turns["a"]) == 1


def test_no_more_are_prepared_than_memory_holds() -> None:
    room = Room(100, 1000)
    assert room.holds([Need(500, 5000)]), "one may try"
    assert room.holds([Need(50, 400), Need(50, 500)])
    assert not room.holds([Need(60, 400), Need(50, 400)])
    assert not room.holds([Need(10, 600), Need(10, 500)])
    guess = room.need(CUDA)
    assert 8_000 < guess.device < 12_000, "three billion parameters"
    assert 8_000 < guess.float32 < 11_000, "and more in float32"
    needs = [guess] * 8
    assert Room(81_559, 1e9).holds(needs[:6]), "as on an H100, two of them in float32"
    assert not Room(81_559, 1e9).holds(needs)
    room.learn(ok(CUDA, 1.0))
    assert room.need(CUDA).device < guess.device
    jobs, late = Jobs(Room(1.5 * guess.device, 1e9)), threading.Event()
    jobs.measure("a", late)
    wait_for(lambda: jobs.turns["a"])
    jobs.measure("b")
    time.sleep(0.2)
    assert not jobs.turns["b"]
    late.set()
    jobs.join()
    assert jobs.order == ["a", "b"]


def test_behind_what_cannot_be_killed_nobody_gets_the_device() -> None:
    jobs, go = Jobs(), threading.Event()

    def stuck(turn: Turn) -> TrialResult:
        assert go.wait(20)
        turn.ended(gone=False)
        return failed(CUDA, "crashed")

    def reads(turn: Turn) -> TrialResult:
        turn.asks()
        turn.frees()
        go.set()
        wait_for(lambda: jobs.schedule.lost)
        return failed(CUDA, "timeout")

    jobs.start("stuck", stuck)
    jobs.start("other", lambda turn: (go.wait(20), time.sleep(0.2), failed(CUDA, "crashed"))[-1])
    wait_for(lambda: jobs.turns["stuck"] and jobs.turns["other"])
    jobs.start("reads", reads)
    jobs.join()
    jobs.measure("late")
    jobs.join()
    assert not isinstance(jobs.results["reads"], BaseException)
    assert isinstance(jobs.results["other"], DeviceLostError)
    assert isinstance(jobs.results["late"], DeviceLostError)


def test_who_waits_to_begin_ends_with_all() -> None:
    jobs, late = Jobs(Room(1, 1)), threading.Event()
    jobs.measure("a", late)
    wait_for(lambda: jobs.turns["a"])
    jobs.measure("b")
    jobs.stop.set()
    wait_for(lambda: "b" in jobs.results)
    assert isinstance(jobs.results["b"], StoppedError)
    os.write(jobs.turns["a"][0].write, b".")
    late.set()
    jobs.join()


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "usable_cores", lambda: list(range(16)))
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))
    return tmp_path / "leases"


def made(folder: Path, run: Callable[..., TrialResult], count: int = 1) -> LocalExecutor:
    host = machine(*map(gpu, range(count)))
    found = Devices(DeviceSettings(prepare=2), host)
    found.slots("cuda")
    return LocalExecutor(run, Store.open(folder / "store"), host, found, Display())


@pytest.mark.usefixtures("leases")
def test_first_places_come_first_and_further_ones_only_beside_a_trial(tmp_path: Path) -> None:
    here = made(tmp_path, lambda *_: ok(CUDA, 1.0), 2)
    offered = []
    for lease in here.free():
        offered.append(lease)
    names = [lease.slot.name for lease in offered]
    assert names == [f"GPU {gpu}, place {place}" for place in (1, 2) for gpu in (0, 1)]
    named = Config.parse({"platform": {"device": "cuda", "gpu": 1}})
    assert [here.suits(lease.slot, named) for lease in offered] == [False, True, False, True]
    cores = [lease.slot.cores for lease in offered]
    assert len({core for share in cores for core in share}) == sum(map(len, cores)) == 16
    assert list(here.free()) == []
    offered[0].release()
    assert devices.lease(Devices(DeviceSettings(), machine(gpu(0))).slots("cuda")[0]) is None
    (again,) = here.free()
    assert again.slot == offered[0].slot
    for lease in (*offered, again):
        lease.release()
    for lease in here.free():
        assert lease.slot.name.endswith("place 1")
        lease.release()  # no trial for it


def test_how_many_prepare() -> None:
    def count(cores: int, prepare: Any = "auto", device: Any = "cuda") -> int:
        card = gpu(0) if device == "cuda" else None
        slot = devices.Slot("x", device, card, tuple(range(cores)))
        return len(Devices(DeviceSettings(prepare=prepare), CPU).places(slot))

    assert [count(cores) for cores in (1, 2, 4, 16, 64)] == [1, 1, 2, 8, 8]
    assert [count(cores, device="cpu") for cores in (1, 2, 4, 8)] == [1, 1, 1, 2]
    assert count(2, 5) == 5
    both = Devices(DeviceSettings(prepare=2), CPU).places(devices.Slot("x", "cpu", None, (0, 1)))
    assert [place.cores for place in both] == [(0, 1), (0, 1)], "all are measured on all"


@pytest.mark.usefixtures("leases")
def test_a_gpu_that_somebody_waits_for_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (made(tmp_path / name, lambda *_: ok(CUDA, 1.0)) for name in "ab")
    mine = next(here.free())
    assert list(there.free()) == []
    assert there.contended
    assert list(here.free()) == [], "a further place beside somebody who waits"
    mine.release()
    assert list(here.free()) == [], "left to who waits"
    theirs = next(there.free())
    assert list(here.free()) == []
    assert list(there.free()) == [], "now the first one waits"
    theirs.release()
    assert list(there.free()) == []
    monkeypatch.setattr(devices, "PATIENCE_SECONDS", 0.0)
    (theirs,) = there.free()  # the other one takes nothing: it was stopped perhaps
    here.rest()  # has nothing to start any more
    (second,) = there.free()
    for lease in (theirs, second):
        lease.release()
    there.close()
    here.close()


@pytest.mark.usefixtures("leases")
def test_a_confirmation_that_waits_is_heard_as_well(tmp_path: Path) -> None:
    here = made(tmp_path, lambda *_: ok(CUDA, 1.0))
    mine = next(here.free())
    seen: list[int] = []

    def pause(_: float) -> None:
        seen.append(len(list(here.free())))
        assert len(seen) == 1, "taken again at once"
        mine.release()

    theirs = reserve(CUDA, machine(gpu(0)), None, [], lambda _: None, pause)
    assert seen == [0]
    assert not Queue().is_wanted(theirs.slot)
    theirs.release()


@pytest.mark.usefixtures("leases")
def test_a_trial_of_a_lost_device_is_lost(tmp_path: Path) -> None:
    def run(*given: Any) -> TrialResult:
        given[-1].turn.ended(gone=False)
        return failed(CUDA, "crashed")

    here = made(tmp_path, run)
    leases = list(here.free())
    task = Task(CUDA, "0" * 32, tmp_path, "machine")
    assert here.start(task, leases[0]).result(20).outcome == "crashed"
    with pytest.raises(LostError, match="cannot be killed"):
        here.start(task, leases[1]).result(20)
    leases[1].release()
    assert list(here.free()) == [], "no trial beside it"
    leases[0].release()
    assert list(here.free()), "the lease tells that it is gone"
    here.close()
