"""The sweep as users run it, in processes of its own: with pipes, and in a terminal."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from quick import QUICK

from openpi_opt.paths import package_dir
from openpi_opt.process import locks
from openpi_opt.track.journal import Journal, Record

ROOT = package_dir().parent
SHORT = (*QUICK[1:], "study=s")  # the model is the user's or that of the machine


class Terminal:
    """Runs the verb in an empty working folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {"PYTHONPATH": str(package_dir().parent)}
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "openpi_opt.sweep", *words, *SHORT],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    @property
    def records(self) -> list[Record]:
        return Journal.read(self.folder / "mlruns" / "studies" / "s").records()

    def trial_pid(self, after: set[int]) -> int:
        """The process of a trial of this folder that is not in `after`."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for pid in trials_of(self.folder):
                if pid not in after:
                    return pid
            time.sleep(0.02)
        raise AssertionError("no trial was started")


def trials_of(folder: Path) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                ours = words[1:3] == ["-m", "openpi_opt.trial"]  # and not its watcher
                if ours and any(str(folder) in word for word in words):
                    yield int(entry.name)


class Shell:
    """A command in the foreground of a terminal of its own, where Ctrl-C can be pressed."""

    def __init__(self, folder: Path, argv: list[str], **env: str):
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, [sys.executable, *argv], {**os.environ, **env})
        self.shown = ""
        self.code: int | None = None

    def read(self, seconds: float) -> bool:
        """Take what is printed; False when the terminal is closed."""
        if select.select([self._terminal], [], [], seconds)[0]:
            try:
                chunk = os.read(self._terminal, 65536)
            except OSError:  # nobody has it open any more
                return False
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", chunk.decode(errors="replace"))
            return bool(chunk)
        return True

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.shown
            assert self.read(0.02), self.shown

    def press_ctrl_c(self) -> None:
        os.write(self._terminal, b"\x03")

    def close(self) -> None:
        """Close the terminal under the command."""
        os.close(self._terminal)

    def end(self, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while self.read(0.05):
            assert time.monotonic() < deadline, self.shown
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        self.code = os.waitstatus_to_exitcode(status)
        return " ".join(self.shown.split())


def held(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.lock") if path.is_file() and locks.is_held(path)]
