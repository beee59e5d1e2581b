"""Processes in turn, played by small scripts that write down when they did what."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openpi_opt.process.child import Ended, StoppedError, run_command
from openpi_opt.process.relay import Job, Relay, Turn

LIMITS = dict.fromkeys(("start", "import", "load", "wait", "measure"), 30.0)
# The gate's descriptor is the first argument, the number of the process the second.
BODY = """
import json, os, sys, time
def phase(name): os.write(int(sys.argv[-1]), (json.dumps({"phase": name}) + "\\n").encode())
def note(what):
    with open("events", "a") as file: file.write(f"{time.monotonic()} {number} {what}\\n")
def gate():
    phase("wait")
    if not os.read(int(sys.argv[1]), 1): sys.exit("closed")
number = sys.argv[2]
note("began")
phase("import"); time.sleep(IMPORT); note("imported"); gate()
note("device"); phase("load"); time.sleep(0.1); gate()
note("measure"); phase("measure"); time.sleep(0.15); note("end")
"""


class Course:
    """Runs scripts and remembers who was on the device when."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[int] = []

    def job(self, number: int, body: str = BODY, imports: float = 0.1) -> Job[Ended]:
        script = self.folder / f"{number}.py"
        script.write_text(textwrap.dedent(body).replace("IMPORT", str(imports)))

        def job(turn: Turn) -> Ended:
            with turn.process() as (gate, on_phase):
                argv = [sys.executable, str(script), str(gate.fd), str(number)]
                log = self.folder / f"{number}.log"
                env = dict(os.environ)
                return run_command(argv, env, LIMITS, log, on_phase, gate.stop, (gate.fd,))

        return job

    def jobs(self, count: int, imports: Callable[[int], float]) -> Iterator[Job[Ended]]:
        for number in range(count):
            self.asked.append(number)
            yield self.job(number, imports=imports(number))

    def events(self) -> dict[tuple[int, str], float]:
        lines = [line.split() for line in (self.folder / "events").read_text().splitlines()]
        return {(int(number), what): float(at) for at, number, what in lines}


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    monkeypatch.chdir(tmp_path)
    return Course(tmp_path)


@pytest.mark.parametrize("imports", [lambda n: 0.1, lambda n: 0.6 * (n % 2)])
def test_one_on_the_device_and_the_next_asleep_while_it_measures(
    course: Course, imports: Callable[[int], float]
) -> None:
    ended = list(Relay(course.jobs(4, imports)).results())
    assert [each.returncode for each in ended] == [0] * 4
    at = course.events()
    for number in range(3):
        assert at[number, "end"] < at[number + 1, "device"]
        assert at[number + 1, "began"] < at[number, "measure"], "the next was not started ahead"
        assert at[number + 1, "imported"] < at[number, "measure"], "it imported meanwhile"


def test_several_import_side_by_side_and_all_sleep_while_one_measures(course: Course) -> None:
    ended = list(Relay(course.jobs(8, lambda n: 0.5), ahead=3).results())
    assert [each.returncode for each in ended] == [0] * 8
    at = course.events()
    for number in range(7):
        assert at[number, "end"] < at[number + 1, "device"]
    for batch in ([1, 2, 3], [4, 5, 6]):
        began = [at[number, "began"] for number in batch]
        assert max(began) < min(at[number, "imported"] for number in batch), "not side by side"
        assert at[batch[0] - 1, "device"] < min(began), "asked for too early"
        assert max(at[number, "imported"] for number in batch) < at[batch[0] - 1, "measure"]
    measured = [(at[number, "measure"], at[number, "end"]) for number in range(8)]
    imported = [(at[number, "began"], at[number, "imported"]) for number in range(8)]
    assert not [
        1 for low, high in measured for begin, end in imported if begin < high and end > low
    ]


def test_at_least_one_is_started_ahead() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Relay([], ahead=0)


def test_the_next_job_is_asked_for_when_the_present_has_the_device(course: Course) -> None:
    seen = []
    for number, _ in enumerate(Relay(course.jobs(3, lambda n: 0.0)).results()):
        seen.append((number, list(course.asked)))
        assert max(course.asked) <= number + 2
    assert len(seen) == 3


def test_processes_that_never_come_to_a_gate_hold_nobody_up(course: Course) -> None:
    short = "import sys\nsys.exit(3)"
    jobs = [course.job(0), course.job(1, short), course.job(2, short), course.job(3)]
    codes = [each.returncode for each in Relay(jobs).results()]
    assert codes == [0, 3, 3, 0]


def test_a_job_may_repeat_its_process_and_has_the_device_until_it_ends(course: Course) -> None:
    twice = course.job(7)

    def job(turn: Turn) -> Ended:
        twice(turn)
        return twice(turn)

    ended = list(Relay([job, course.job(8), course.job(9)]).results())
    assert [each.returncode for each in ended] == [0, 0, 0]
    lines = [line.split() for line in Path("events").read_text().splitlines()]
    order = [int(number) for _, number, what in lines if what == "end"]
    assert order == [7, 7, 8, 9]
    at = course.events()  # of the second process of 7
    assert at[7, "end"] < at[8, "device"]


def test_an_error_ends_what_was_started_ahead(course: Course) -> None:
    def fails(turn: Turn) -> Ended:
        course.job(0)(turn)
        raise OSError("no space")

    results = Relay([fails, course.job(1)]).results()
    with pytest.raises(OSError, match="no space"):
        next(results)
    assert (1, "device") not in course.events()
    assert not _running(course)


def test_leaving_early_ends_all(course: Course) -> None:
    stopped: list[BaseException] = []

    def watched(turn: Turn) -> Ended:
        try:
            return course.job(1, BODY.replace("time.sleep(0.1)", "time.sleep(60)"))(turn)
        except StoppedError as error:
            stopped.append(error)
            raise

    results = Relay([course.job(0), watched, course.job(2)]).results()
    next(results)
    began = time.monotonic()
    results.close()  # as when the consumer raises, or Ctrl-C
    assert stopped
    assert time.monotonic() - began < 10
    assert not _running(course)


def test_a_pause_of_a_job_ends_with_all(course: Course) -> None:
    paused: list[BaseException] = []

    def cooling(turn: Turn) -> Ended:
        try:
            turn.pause(60)
        except StoppedError as error:
            paused.append(error)
            raise
        return course.job(1)(turn)

    results = Relay([course.job(0), cooling]).results()
    next(results)
    began = time.monotonic()
    results.close()
    assert paused
    assert time.monotonic() - began < 10


def _running(course: Course) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if str(course.folder) in line]
