"""Ctrl-C at awkward moments of small programs, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from openpi_opt.paths import package_dir

HEAD = """
import atexit, os, signal, sys, time
from openpi_opt import cli

def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass

"""
TAIL = """
if __name__ == "__main__":
    cli.run(main, "all is kept")
"""
KEPT = "interrupted: all is kept\n"


class Program:
    """A package of its own, with a module `torso` that is imported by the wayside."""

    def __init__(self, folder: Path):
        self.folder = folder / "prog"
        self.folder.mkdir()
        begin = "from openpi_opt import interrupt\ninterrupt.arm_at_start(__name__)\n"
        (self.folder / "__init__.py").write_text(begin)
        self.env = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{package_dir().parent}"}
        self.seconds = 0.0

    def run(
        self, main: str, torso: str = "", before: Callable[[], None] | None = None
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        (self.folder / "__main__.py").write_text(HEAD + main + TAIL)
        (self.folder / "torso.py").write_text("from prog.__main__ import press, time\n" + torso)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "prog"],
            env=self.env, capture_output=True, text=True, timeout=60, preexec_fn=before,
        )  # fmt: skip
        self.seconds = time.monotonic() - began
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def program(tmp_path):
    return Program(tmp_path)


def test_an_import_is_ended_first(program):
    """What becomes another exception amid an import, as with pydantic, does not come to it."""
    main = "def main():\n    from prog import torso\n    time.sleep(60)\n"
    torso = "try:\n    press()\n    time.sleep(0.3)\nexcept BaseException:\n    raise ValueError\n"
    assert program.run(main, torso + "print('whole')\n") == (130, "whole\n", KEPT)


def test_the_next_import_is_not_begun(program):
    main = "def main():\n    from prog import torso\n    time.sleep(.2)\n    import prog.none\n"
    assert program.run(main, "press()\n") == (130, "", KEPT)


def test_two_end_an_import(program):
    main = "def main():\n    from prog import torso\n"
    code, out, err = program.run(main, "press()\nprint('on')\npress()\ntime.sleep(60)\n")
    assert (code, out, err) == (130, "on\n", KEPT)
    assert program.seconds < 30


@pytest.mark.parametrize(
    "main",
    [
        "    class Gone:\n        def __del__(self):\n            press()\n    Gone()\n",
        "    try:\n        press()\n    except BaseException:\n        pass\n",
        "    import weakref\n    gone = cli.argparse.Namespace()\n"
        "    kept = weakref.ref(gone, lambda _: press())\n    del gone\n",
        "    import sqlite3\n    db = sqlite3.connect(':memory:')\n"
        "    db.create_function('press', 0, press)\n"
        "    try:\n        db.execute('select press()')\n    except sqlite3.Error:\n        pass\n",
    ],
    ids=["destructor", "swallowed", "weakref", "callback"],
)
def test_it_is_not_lost(program, main):
    code, out, err = program.run(f"def main():\n{main}    time.sleep(60)\n")
    assert (code, out, err) == (130, "", KEPT)
    assert program.seconds < 30


def test_what_it_became_is_told_in_a_line(program):
    main = "def main():\n    try:\n        press()\n    except BaseException:\n"
    code, out, err = program.run(main + "        raise RuntimeError('a\\ndefect')\n")
    assert (code, out) == (130, "")
    assert err.startswith("interrupted: all is kept (on the way out: RuntimeError: a defect in ")
    assert len(err.splitlines()) == 1


def test_clearing_up_is_not_disturbed_but_by_the_second(program):
    main = "def main():\n    try:\n        press()\n    finally:\n"
    calm = "        time.sleep(0.5)\n        print('clean')\n"
    assert program.run(main + calm) == (130, "clean\n", KEPT)
    assert program.run(main + "        press()\n        time.sleep(60)\n") == (130, "", KEPT)
    assert program.seconds < 30


def test_before_and_after_main(program):
    early = "press()\ntime.sleep(60)\ndef main():\n    return 0\n"
    assert program.run(early) == (130, "", "interrupted: nothing was begun\n")
    late = "def main():\n    return 0\n@atexit.register\ndef late():\n    press()\n"
    assert program.run(late + "    print('ended')\n") == (0, "ended\n", "")
    assert program.run(late + "    press()\n    time.sleep(60)\n") == (130, "", KEPT)


def test_a_closed_terminal_counts_once_and_may_be_ignored(program):
    """A shell sends SIGHUP once more than the kernel; nohup ignores it."""
    main = "def main():\n    try:\n        press(signal.SIGHUP)\n    finally:\n"
    main += "        press(signal.SIGHUP)\n        print('clean')\n    return 0\n"
    assert program.run(main) == (130, "clean\n", KEPT)

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert program.run(main, before=nohup) == (0, "clean\n", "")


def test_sigterm_ends_as_ctrl_c_does(program):
    assert program.run("def main():\n    press(signal.SIGTERM)\n") == (130, "", KEPT)


def test_a_defect_keeps_its_traceback_and_programs_that_use_the_package_their_handlers(tmp_path):
    code = "import openpi_opt, signal; print(signal.getsignal(signal.SIGINT).__name__); 1 / 0"
    env = os.environ | {"PYTHONPATH": str(package_dir().parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "default_int_handler\n")
    assert "ZeroDivisionError" in done.stderr
