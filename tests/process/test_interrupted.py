"""Ctrl-C at drawn moments of every verb: it ends with a line, and leaves nothing open.

A moment is one of Python's audit events (a module found, a file opened, a database connected, ...)
in the main thread, so it is the same on a fast machine and on a busy one.
"""

import contextlib
import os
import random
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import wait_for
from terminal_samples import ROOT, Shell, held

from benchmarks.stress_check import marked
from openpi_opt.process.devices import LEASES_VARIABLE as VARIABLE

# Another thread sends the signal: so it comes some lines later, not within the hook.
PRESS = """
import _thread, atexit, os, pathlib, signal, sys

at = int(os.environ.pop("PRESS_AT", "-1"))  # popped: trials are not to be pressed
if at >= 0:  # at 0 events are only counted
    own, seen, turn = (os.getpid(), _thread.get_ident()), 0, _thread.allocate_lock()
    turn.acquire()

    def press():
        turn.acquire()
        os.killpg(own[0], signal.SIGINT)  # as a terminal does

    def count(event, arguments):
        global seen
        if "openpi_opt" in sys.modules and (os.getpid(), _thread.get_ident()) == own:
            seen += 1
            if seen == at:
                turn.release()

    _thread.start_new_thread(press, ())
    sys.addaudithook(count)
    atexit.register(lambda: pathlib.Path("events").write_text(str(seen)))
"""
LINE = re.compile("^interrupted: .*(kept|changed|written|begun)", re.MULTILINE)
STUB = ["benchmarks.stub_sweep", "store", "--mlflow", "--seeds", "4", "--seconds", "0.2"]
MODULES = ["model=pi0_mini", "platform=cpu", "store=store"]
FIRST = 100  # the package has its handlers by then
# What to run, and the number of events from which on it may be over.
VERBS = {
    "ablate": (["attention=sdpa", "--store", "store"], 8_000),
    "analyze": (["trace.json"], 300),
    "compare": (["known", "--store", "store"], 5_000),
    "doctor": ([], 500),
    "kernels": (["--arch", "sm90"], 20_000),
    "knobs": ([], 3_000),
    "ladder": (["attention=sdpa", "--store", "store"], 8_000),
    "pairs": (["--b", "attention=sdpa", "--store", "store"], 8_000),
    "promote": (["known", "--name", "x", "--store", "store"], 8_000),
    "sweep": (["-m", "attention=eager,sdpa", *MODULES], 60_000),
    "track": (["sync", "--store", "store"], 40_000),
}


class Desk:
    """A working folder with a store that has a study, where commands are interrupted."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = folder / "store"
        self.leases = folder / "leases"
        self.env = os.environ | {
            "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}",
            VARIABLE: str(self.leases),
        }
        self.env.pop("MLFLOW_TRACKING_URI", None)
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(PRESS)
        self.events = 0  # of a whole sweep of the stub
        (folder / "trace.json").write_text('{"traceEvents": []}')

    def run(self, *argv: str, press_at: int) -> tuple[int, str]:
        """Exit code and stderr of a module that is interrupted at that event."""
        done = subprocess.run(
            [sys.executable, "-m", *argv],
            cwd=self.folder,
            env=self.env | {"PRESS_AT": str(press_at)},
            capture_output=True,
            text=True,
            timeout=200,
            start_new_session=True,
        )
        return done.returncode, done.stderr

    def assert_nothing_left(self, said: str = "") -> None:
        """Of MLflow's runs one may be open when that was said: it has a few seconds only.

        The process that copies, and watchers, end on their own when a sweep exits where it is.
        """
        wait_for(lambda: not marked(self.leases))
        assert held(self.folder) == []
        assert not [*self.store.glob("studies/*/controllers/*-*"), *self.store.rglob("*.tmp")]
        with contextlib.closing(sqlite3.connect(self.store / "mlflow.db")) as database:
            asked = database.execute("SELECT name FROM runs WHERE status = 'RUNNING'")
            assert asked.fetchall() == [] or "track sync" in said

    def sync(self) -> None:
        code, said = self.run("openpi_opt.track", "sync", "--store", "store", press_at=0)
        assert code == 0, said


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = Desk(tmp_path_factory.mktemp("desk"))
    code, said = desk.run(*STUB, "--study", "known", press_at=0)
    assert code == 0, said
    desk.events = int((desk.folder / "events").read_text())
    desk.sync()  # a busy host may have been late
    yield desk
    desk.sync()
    desk.assert_nothing_left()


@pytest.mark.parametrize("verb", VERBS)
def test_one_press_ends_any_verb_with_a_line(desk, verb):
    words, events = VERBS[verb]
    at = int(FIRST * (events / FIRST) ** random.Random(f"{verb} 0").random())
    code, said = desk.run(f"openpi_opt.{verb}", *words, press_at=at)
    assert code == 130, (at, said)
    assert LINE.search(said), (at, said)
    assert "Traceback" not in said, (at, said)
    desk.assert_nothing_left()


def test_a_sweep_that_is_interrupted_at_any_moment_leaves_nothing(desk):
    """From about the end of the imports on, and before it is over."""
    drawn, told = random.Random(0), ""
    for number in range(3):
        at = int(desk.events * drawn.uniform(0.5, 0.95))
        code, said = desk.run(*STUB, "--study", f"pressed-{number}", press_at=at)
        assert code == 130, (at, said)
        assert len(LINE.findall(said)) == 1, (at, said)
        assert "Traceback" not in said, (at, said)
        told += said  # a run that an earlier one left open stays so until `track sync`
        desk.assert_nothing_left(told)


def test_a_terminal_that_is_closed_ends_its_sweep(desk):
    """The kernel sends SIGHUP, and what is written to it fails from then on."""
    argv = ["-m", *STUB[:-1], "60", "--study", "closed"]
    shell = Shell(desk.folder, argv, **{key: desk.env[key] for key in ("PYTHONPATH", VARIABLE)})
    shell.wait_for(lambda: [uid for uid in marked(desk.leases).values() if uid])
    shell.close()
    wait_for(lambda: not marked(desk.leases))
    _, status = os.waitpid(shell.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    desk.sync()
    desk.assert_nothing_left()
