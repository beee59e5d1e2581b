"""The process that copies a study's journal to MLflow and to Optuna's database.

A copy may never hold back a measurement or an exit, and servers hang. So a verb starts `python -m
openpi_opt.track follow`, which reads the journal as it grows, and waits for it at the end for
`WAIT_S` at most. Whatever is missing then is said in one line, with the command that delivers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from openpi_opt import interrupt
from openpi_opt.config import Tracking
from openpi_opt.errors import masked
from openpi_opt.paths import package_dir
from openpi_opt.track.store import Store

# What a verb waits at its end for copies that are under way, and where it was interrupted.
WAIT_S = 20.0
INTERRUPTED_S = 5.0
# After this silence of a tracker that has work to do, a line says so.
LATE_S = 30.0
_SLOW_S = 3.0
# Copies are less urgent than anything that is measured.
_NICE = 19


class Copies:
    """Copies of one study, made by a process of their own from now until `close`. With
    `tracking.mlflow` off only Optuna's database gets one, and with `optuna` off only MLflow.
    `storage` is the URL of Optuna's database; without it that is `optuna.db` in the store."""

    def __init__(
        self,
        store: Store,
        study_dir: Path,
        tracking: Tracking,
        say: Callable[[str], None],
        optuna: bool = True,
        storage: str | None = None,
    ):
        self._study_dir, self._say = study_dir, say
        self._command = sync_command(store, study_dir.name)
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or str(store.mlflow_db)
        self._mlflow = tracking.mlflow
        self._left: int | None = None  # records that MLflow lacks, as the process says
        self._ended = False  # MLflow knows that the study has
        self._told: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        if not (tracking.mlflow or optuna):
            return
        order = {
            "parent": os.getpid(),
            "store": str(store.path),
            "study": study_dir.name,
            "experiment": tracking.experiment if tracking.mlflow else None,
            "optuna": optuna,
            "storage": storage,  # may hold a password: it is on no command line
        }
        path = [str(package_dir().parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openpi_opt.track", "follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # what is read is what `select` sees
            start_new_session=True,  # a Ctrl-C is for the verb, which ends this process
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)
        self._thread = threading.Thread(target=self._listen, name="copies", daemon=True)
        self._thread.start()
        self._write(json.dumps(order))  # last: without it nothing is begun that `close` has to end

    def close(self, records: int) -> None:
        """Let the process finish, within the time for that, and say what is missing. `records` is
        how many the journal has."""
        if self._process is None or self._thread is None:
            return
        try:
            self._write("finish")
            self._wait(INTERRUPTED_S if interrupt.pressed() else WAIT_S)
        except KeyboardInterrupt:  # ends this wait; what the verb has to say is still said
            interrupt.heeded()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._thread.join(1.0)
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            self._process = None
            self._say_missing(records)

    def _wait(self, seconds: float) -> None:
        assert self._process is not None
        end = time.monotonic() + seconds
        try:
            self._process.wait(_SLOW_S)
        except subprocess.TimeoutExpired:
            self._say(
                f"waiting up to {seconds:.0f} s for MLflow and Optuna's database to take the last "
                "results; the journal has them (Ctrl-C: do not wait)"
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, end - time.monotonic()))

    def _say_missing(self, records: int) -> None:
        left = records if self._left is None else self._left
        if self._mlflow and left:
            self._say(
                f"MLflow lacks {left} of {records} record(s), which the journal has; deliver them: "
                + self._command
            )
        elif self._mlflow and not self._ended:
            self._say(f"MLflow may show the study as running; {self._command} ends it there")

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and its last line said why
            self._process.stdin.write(line.encode() + b"\n")

    def _listen(self) -> None:
        """Take in what the process says until it ends."""
        assert self._process is not None
        out = self._process.stdout
        assert out is not None
        with contextlib.suppress(OSError, ValueError):
            while True:
                if self._mlflow and self._left != 0 and not select.select([out], [], [], LATE_S)[0]:
                    self._tell_late()
                line = out.readline()
                if not line:
                    return
                self._take(line)

    def _take(self, line: bytes) -> None:
        message = json.loads(line)
        self._left = message.get("left", self._left)
        self._ended = message.get("ended", self._ended)
        if "note" in message:
            self._say_once(message["about"], message["note"])

    def _tell_late(self) -> None:
        self._say_once(
            "mlflow",
            f"warning: MLflow at {self._uri} has not answered for {LATE_S:.0f} s. Trials go on and "
            f"the journal keeps them; later: {self._command}",
        )

    def _say_once(self, about: str, note: str) -> None:
        """The rest of a sweep would repeat it after every trial."""
        if about not in self._told:
            self._told.add(about)
            self._say(masked(note))


def sync_command(store: Store, study: str = "") -> str:
    """The command that delivers what a study's copies lack."""
    words = ["python", "-m", "openpi_opt.track", "sync", *([study] if study else [])]
    return shlex.join([*words, "--store", str(store.path)])
