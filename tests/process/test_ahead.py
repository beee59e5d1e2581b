"""The next trial of a GPU starts while one has it: real sweeps of stubs on pretended GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, wait_for
from search_samples import CPU, failed, ok
from test_devices import gpu, machine

from openpi_opt.config import Config
from openpi_opt.engine import executor
from openpi_opt.engine.display import Silent
from openpi_opt.engine.executor import LocalExecutor, LostError, Task
from openpi_opt.process import devices, locks
from openpi_opt.process.child import Stop
from openpi_opt.process.devices import LEASES_VARIABLE, Devices, Slot
from openpi_opt.process.reserve import reserve
from openpi_opt.process.run import Place
from openpi_opt.process.turns import Line
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import Settings
from openpi_opt.track.store import Store

IMPORTS = 0.5
CUDA = Config.parse({"platform": {"device": "cuda"}})


class Gpus(Host):
    """Sweeps of stubs with as many GPUs and cores as they are told."""

    def __init__(self, folder: Path, gpus: int = 2):
        super().__init__(folder)
        self.gpus = gpus
        self.events = folder / "events.jsonl"

    def start(self, *words: str) -> subprocess.Popen[str]:
        given = ["--gpus", str(self.gpus), "--cores", str(8 * self.gpus)]
        return super().start(*given, "--events", str(self.events), *words)

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

    def by_gpu(self) -> list[list[dict[str, float]]]:
        """The trials of each GPU in the order of their starting, which is that of the seeds."""
        of = {event["seed"]: event["gpu"] for event in self.seen()}
        assert len(set(of.values())) == self.gpus
        at = self.at()
        names = sorted(set(of.values()))
        return [[at[seed] for seed in sorted(of) if of[seed] == gpu] for gpu in names]

    def assert_one_at_a_time(self) -> None:
        """On each GPU, and in the order of starting."""
        for trials in self.by_gpu():
            had = [trial for trial in trials if "device" in trial]
            for present, following in pairwise(had):
                assert present.get("end", present["device"]) < following["device"]

    def pid(self, seed: int, what: str) -> int:
        """The process that did that, once it has."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [e["pid"] for e in self.seen() if (e["seed"], e["what"]) == (seed, what)]
            return bool(found)

        wait_for(look)
        return found[0]


@pytest.fixture
def gpus(tmp_path: Path) -> Iterator[Gpus]:
    host = Gpus(tmp_path)
    yield host
    assert host.processes() == []


@pytest.fixture
def one_gpu(tmp_path: Path) -> Iterator[Gpus]:
    host = Gpus(tmp_path, 1)
    yield host
    assert host.processes() == []


SHARES = re.compile(r"in use over \d+ s \(imports not counted\): GPU 0 ([\d.]+)%.*GPU 1 ([\d.]+)%")


def shares(err: str) -> list[float]:
    found = SHARES.search(err)
    assert found is not None, err
    return [float(share) / 100 for share in found.groups()]


def test_the_next_trial_imports_while_one_has_the_gpu(gpus: Gpus) -> None:
    err = gpus.run("--seeds", "10", "--imports", str(IMPORTS), "--seconds", "0.6")
    assert sorted(gpus.seeds()) == list(range(10))
    assert sorted(gpus.started()) == list(range(10))
    gpus.assert_one_at_a_time()
    for trials in gpus.by_gpu():
        for present, following in pairwise(trials):
            assert following["began"] < present["end"], "not started ahead"
            assert following["imported"] < present["end"] + IMPORTS
        for present, third in zip(trials, trials[2:], strict=False):
            assert present["end"] < third["began"], "two were waiting"
    at = gpus.at()
    whole = max(at[s]["end"] for s in at) - min(at[s]["device"] for s in at)
    for share, trials in zip(shares(err), gpus.by_gpu(), strict=True):
        real = sum(trial["end"] - trial["device"] for trial in trials) / whole
        assert real - 0.02 < share < real + 0.2  # Python's end takes a while, too
    gpus.assert_tidy()


def test_without_it_a_trial_starts_when_the_one_before_has_ended(gpus: Gpus) -> None:
    words = ["--seeds", "6", "--imports", str(IMPORTS), "--seconds", "0.2"]
    err = gpus.run("--no-ahead", *words)
    for trials in gpus.by_gpu():
        for present, following in pairwise(trials):
            assert present["end"] < following["began"]
    assert all(share < 0.6 for share in shares(err)), "imports are not use"
    gpus.assert_tidy()


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_trial_that_dies_while_it_imports_holds_nobody_up(one_gpu: Gpus, dies: int) -> None:
    words = ["--seeds", "4", "--dies", str(dies), "--imports", "0.2", "--seconds", "0.3"]
    one_gpu.run(*words)
    outcomes = {r.result.config["weights"]["seed"]: r.result for r in one_gpu.records}
    assert [outcomes[seed].outcome == "ok" for seed in range(4)] == [s != dies for s in range(4)]
    assert "in phase import" in outcomes[dies].reason
    assert "device" not in one_gpu.at()[dies]
    one_gpu.assert_one_at_a_time()
    one_gpu.assert_tidy()


@pytest.mark.parametrize("present", ["runs", "stands still"])
def test_a_killed_sweep_leaves_neither_process_nor_lease(one_gpu: Gpus, present: str) -> None:
    words = ["--seeds", "3", "--imports", "0.1"]
    sweep = one_gpu.start(*words, "--seconds", "60")
    has_it = one_gpu.pid(0, "device")
    waits = one_gpu.pid(1, "imported")
    assert sorted(one_gpu.processes()) == sorted([has_it, waits])
    if present == "stands still":
        os.kill(has_it, signal.SIGSTOP)
    sweep.kill()
    sweep.communicate()
    left = [has_it] if present == "stands still" else []
    wait_for(lambda: one_gpu.processes() == left)
    lease = one_gpu.leases / "GPU-stub-0.lock"
    assert locks.is_held(lease) == bool(left)
    err = one_gpu.run(*words, "--seconds", "0.1")
    assert ("ended 1 process(es)" in err) == bool(left)
    assert sorted(one_gpu.seeds()) == [0, 1, 2]
    assert sorted(one_gpu.started()) == [0, 0, 1, 1, 2]
    assert len([e for e in one_gpu.seen() if (e["seed"], e["what"]) == (1, "device")]) == 1
    one_gpu.assert_tidy()


def test_ctrl_c_ends_both_and_who_waits_never_gets_the_gpu(one_gpu: Gpus) -> None:
    sweep = one_gpu.start("--seeds", "3", "--imports", "0.1", "--seconds", "60")
    one_gpu.pid(0, "device")
    one_gpu.pid(1, "imported")
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "0 finished trial(s) are kept, and 2 running ended" in err
    assert "Traceback" not in err
    assert one_gpu.processes() == []
    assert "device" not in one_gpu.at()[1]
    assert not [path for path in one_gpu.leases.iterdir() if locks.is_held(path)]


def test_no_trial_can_open_the_gate_of_another(one_gpu: Gpus) -> None:
    """A pipe whose writing end leaked would also outlive the sweep that is to close it."""
    sweep = one_gpu.start("--seeds", "3", "--imports", "0.1", "--seconds", "60")
    pids = [one_gpu.pid(0, "device"), one_gpu.pid(1, "imported")]
    pipes = [open_pipes(pid) for pid in pids]
    gates = [gate_of(pid) for pid in pids]
    assert gates[0] != gates[1]
    assert gates[1] not in pipes[0]
    assert gates[0] not in pipes[1]
    assert all(pipes[n].count(gates[n]) == 1 for n in range(2)), "the reading end alone"
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not one_gpu.processes())


def open_pipes(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(entry))
    return found


def gate_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return os.readlink(f"/proc/{pid}/fd/{words[words.index('--gate-fd') + 1]}")


def test_sweeps_of_two_users_take_turns_on_one_gpu(tmp_path: Path) -> None:
    hosts = [Gpus(tmp_path / name, 1) for name in "ab"]
    for host in hosts:
        host.folder.mkdir()
        host.env[LEASES_VARIABLE] = str(tmp_path / "leases")
    words = ["--seeds", "6", "--imports", "0.1", "--seconds", "0.3"]
    first = hosts[0].start(*words)
    present = hosts[0].pid(0, "device")
    hosts[0].pid(1, "imported")
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
        (trial["device"], trial["end"], name)
        for name, host in zip("ab", hosts, strict=True)
        for trial in host.at().values()
    )
    assert len(had) == 12
    assert all(present[1] < following[0] for present, following in pairwise(had))
    order = "".join(name for _, _, name in had)
    # Two at a time, as a rule: the one that was waited with, and the one started ahead of it.
    assert max(map(len, re.findall("a+|b+", order[: order.rindex("a")]))) <= 3, order
    assert not [path for path in (tmp_path / "leases").iterdir() if locks.is_held(path)]


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(devices, "_cores", lambda: list(range(16)))
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))
    return tmp_path / "leases"


Run = Callable[..., TrialResult]


def made(folder: Path, run: Run, count: int = 1, **settings: object) -> LocalExecutor:
    host = machine(*map(gpu, range(count)))
    given = Settings.parse({"devices": {"ahead": True, **settings}}).devices
    found = Devices(given, host)
    found.slots("cuda")
    return LocalExecutor(run, Store.open(folder / "store"), host, found, Silent())


def task(folder: Path) -> Task:
    return Task(CUDA, "0" * 32, folder, "machine")


@pytest.mark.usefixtures("leases")
def test_first_seats_come_first_and_second_ones_only_beside_a_trial(tmp_path: Path) -> None:
    here = made(tmp_path, lambda *_: ok(CUDA, 1.0), 2)
    offered = []
    for lease in here.free():
        offered.append(lease)
    names = [lease.slot.name for lease in offered]
    assert names == ["GPU 0, seat 1", "GPU 1, seat 1", "GPU 0, seat 2", "GPU 1, seat 2"]
    assert list(here.free()) == []
    assert not here.contended
    offered[0].release()
    assert devices.lease(Slot("GPU 0", "cuda", gpu(0), (0,))) is None, "the other seat has it"
    (again,) = here.free()
    assert again.slot == offered[0].slot
    for lease in (*offered, again):
        lease.release()
    for lease in here.free():
        assert lease.slot.name.endswith("seat 1")
        lease.release()  # no trial for it


def test_seats_are_halves_that_share_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    def seats(cores: int, threads: int = 1, **settings: object) -> list[tuple[int, ...]]:
        monkeypatch.setattr(devices, "_place_of", lambda core: (0, core // threads, core))
        given = Settings.parse({"devices": {"ahead": True, **settings}}).devices
        found = Devices(given, CPU)
        slot = Slot("GPU 0", "cuda", gpu(0), tuple(range(cores)))
        return [seat.cores for seat in found.seats(slot)]

    assert seats(8) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert seats(9) == [(0, 1, 2, 3), (5, 6, 7, 8)]
    assert seats(10, threads=2) == [(0, 1, 2, 3), (6, 7, 8, 9)]
    assert seats(7) == [tuple(range(7))]
    assert seats(16, ahead=False) == [tuple(range(16))]
    cpu = Slot("CPU slot 0", "cpu", None, tuple(range(16)))
    assert Devices(Settings.parse({"devices": {"ahead": True}}).devices, CPU).seats(cpu) == (cpu,)


@pytest.mark.usefixtures("leases")
def test_nobody_starts_ahead_on_a_gpu_that_somebody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(executor.time, "monotonic", lambda: now)
    here, there = (made(tmp_path / name, lambda *_: ok(CUDA, 1.0)) for name in "ab")
    mine = next(here.free())
    assert list(there.free()) == []
    assert there.contended
    assert list(here.free()) == [], "a second seat beside somebody who waits"
    mine.release()
    assert list(here.free()) == [], "left to who waits"
    assert here.contended
    theirs = next(there.free())
    assert theirs.slot.name == "GPU 0, seat 1"
    assert list(here.free()) == []
    assert list(there.free()) == [], "now the first one waits"
    theirs.release()
    now += 0.5
    assert list(there.free()) == []
    now += 1.1  # the other one asks for nothing: it is stopped perhaps
    (theirs,) = there.free()  # and no second seat
    here.rest()  # has nothing to start any more
    (second,) = there.free()
    for lease in (theirs, second):
        lease.release()
    assert next(there.free()).held
    here.close()


@pytest.mark.usefixtures("leases")
def test_a_confirmation_that_waits_is_heard_as_well(tmp_path: Path) -> None:
    here = made(tmp_path, lambda *_: ok(CUDA, 1.0))
    mine = next(here.free())
    seconds: list[int] = []

    def pause(_: float) -> None:
        seconds.append(len(list(here.free())))
        assert len(seconds) == 1, "taken again at once"
        mine.release()

    host = machine(gpu(0))
    theirs = reserve(CUDA, host, None, [], lambda _: None, pause)
    assert seconds == [0]
    theirs.release()
    assert not devices.is_wanted(theirs.slot)


@pytest.mark.usefixtures("leases")
def test_behind_a_process_that_cannot_be_ended_nobody_gets_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the gate's pipe open, as it has the lease, which is how it is known to live."""
    monkeypatch.setattr("openpi_opt.process.turns._GONE_MS", 50)
    kept: list[int] = []
    began = threading.Event()

    def run(*given: Any) -> TrialResult:
        place: Place = given[-1]
        assert place.gate is not None
        passed = os.read(place.gate, 1)
        if not kept:
            assert passed
            assert began.wait(20)
            kept.extend([os.dup(place.gate), os.dup(place.fds[0])])
        return ok(CUDA, 1.0) if passed else failed(CUDA)

    here = made(tmp_path, run)
    first, second = here.free()
    futures = [here.start(task(tmp_path), lease) for lease in (first, second)]
    began.set()
    assert futures[0].result(20).outcome == "ok"
    with pytest.raises(LostError, match="GPU 0 has a process that cannot be killed"):
        futures[1].result(20)
    first.release()
    assert list(here.free()) == [], "no seat beside it"
    second.release()
    assert list(here.free()) == []
    assert here.contended
    for fd in kept:
        os.close(fd)
    third = next(here.free())
    assert here.start(task(tmp_path), third).result(20).outcome == "ok"
    third.release()
    here.close()


def test_a_line_lets_on_in_order_and_nobody_after_the_end() -> None:
    stop = Stop()
    line = Line(stop)
    first, second, third = (line.join() for _ in range(3))
    assert os.read(first.gate, 9) == b".."
    for turn in (second, third):
        os.set_blocking(turn.gate, False)
        with pytest.raises(BlockingIOError):
            os.read(turn.gate, 1)
    line.leave(second)  # died in its import
    with pytest.raises(BlockingIOError):
        os.read(third.gate, 1)
    line.leave(first)
    assert os.read(third.gate, 9) == b".."
    fourth = line.join()
    os.set_blocking(fourth.gate, False)
    stop.set()
    line.leave(third)
    with pytest.raises(BlockingIOError):
        os.read(fourth.gate, 1)
    line.leave(fourth)


def test_who_starts_while_the_sweep_is_busy_measures_afterwards() -> None:
    line = Line(Stop())
    first, second, third = (line.join(measures=False) for _ in range(3))
    assert os.read(first.gate, 9) == b".", "it may load"
    line.let_measure(second)
    line.let_measure(first)
    assert os.read(first.gate, 9) == b"."
    line.leave(first)
    assert os.read(second.gate, 9) == b".."
    line.leave(second)
    assert os.read(third.gate, 9) == b"."
    line.let_measure(second)  # which has ended
    line.let_measure(third)
    assert os.read(third.gate, 9) == b"."
    line.leave(third)
