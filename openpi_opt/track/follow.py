"""`python -m openpi_opt.track follow`: the process that `copies.Copies` starts.

It reads an order on stdin, copies what the journal has and gets, and says on stdout, one JSON
object a line, what MLflow still lacks (`left`), what is wrong (`note`, `about` one of the two), and
that MLflow has all (`ended`).
"finish" on stdin makes it copy the rest and end. The end of stdin without that word means that the
verb was killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpi_opt.config import Tracking
from openpi_opt.errors import UserError, masked
from openpi_opt.track.copies import sync_command
from openpi_opt.track.journal import Journal
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError
from openpi_opt.track.optuna_copy import CopyError, OptunaCopy
from openpi_opt.track.store import Store

EndStudy = Callable[[Path, MlflowLog], None]
POLL_S = 0.3
# A server that was away is asked again after this.
RETRY_S = 5.0
_PR_SET_PDEATHSIG = 1


def follow(end_study: EndStudy) -> int:
    """Copy until told to finish; returns 0, also where a copy could not be made. `end_study` ends
    the study's run in MLflow unless another sweep works on it."""
    # A call to a server that never answers does not see the end of stdin.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    orders = _Lines()
    order = orders.next(None)
    if not order:
        return 0
    asked = json.loads(order)
    if os.getppid() != asked["parent"]:  # killed while this was starting
        return 0
    optuna = _OptunaFollower(asked)
    follower = _MlflowFollower(asked, end_study)
    while True:
        waiting = not follower.look()
        word = orders.next(RETRY_S if waiting else POLL_S)
        if word == "":
            os._exit(0)  # whatever a thread waits for
        if word == "finish":
            break
    optuna.finish()
    while not (follower.look() and follower.end()):
        time.sleep(RETRY_S)
    _tell(ended=True)
    optuna.join()
    return 0


class _OptunaFollower(threading.Thread):
    """Optuna's copy, in a thread of its own: a tracking server that hangs does not hold it up."""

    def __init__(self, order: dict[str, Any]):
        super().__init__(daemon=True)
        store = Store(Path(order["store"]))
        self._study_dir = store.study_dir(order["study"])
        self._copy: OptunaCopy | None = None
        self._last = threading.Event()
        if order["optuna"]:
            self._copy = OptunaCopy(store, self._study_dir, order["storage"])
            self.start()

    def run(self) -> None:
        """Copy what is new until `finish`, and then the rest."""
        assert self._copy is not None
        journal, seen = Journal.open(self._study_dir), -1
        while True:
            last = self._last.is_set()
            try:
                journal.refresh()
                if len(journal) != seen:
                    self._copy.update(journal.records())
                    seen = len(journal)
            except CopyError as error:
                _tell(about="optuna", note=f"warning: {error}")
                if error.final or last:
                    return
            if last and seen == len(journal):
                return
            self._last.wait(POLL_S if seen >= 0 else RETRY_S)

    def finish(self) -> None:
        """Nothing comes any more."""
        self._last.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the rest to be copied."""
        if self._copy is not None:
            super().join(timeout)


class _MlflowFollower:
    """MLflow's copy of one study, and how far it has come."""

    def __init__(self, order: dict[str, Any], end_study: EndStudy):
        self._end_study = end_study
        self.store = Store(Path(order["store"]))
        self.study_dir = self.store.study_dir(order["study"])
        self.journal = Journal.open(self.study_dir)
        self.log: MlflowLog | None = None
        if order["experiment"] is not None:
            self.log = MlflowLog(self.store, Tracking(experiment=order["experiment"]))
        self._begun = False
        self._seen = -1

    def look(self) -> bool:
        """Copy what is new; False when something failed that may work later."""
        self.journal.refresh()
        records = self.journal.records()
        if len(records) == self._seen:
            return True
        done = self._attempt(self._to_mlflow)
        self._seen = len(records) if done else -1
        return done

    def end(self) -> bool:
        """Bring the marks up to date and end the study's run; False to be tried again."""
        return self._attempt(self._end)

    def _to_mlflow(self) -> None:
        if self.log is None:
            return
        if not self._begun:
            self.log.begin_study(self.study_dir)
            self._begun = True
        self.log.sync(self.study_dir, self.journal, told=lambda left: _tell(left=left))

    def _end(self) -> None:
        if self.log is not None:
            self.log.show(self.study_dir, self.journal)
            self._end_study(self.study_dir, self.log)

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except TrackingError as error:
            if str(error):
                _tell(about="mlflow", note=f"warning: {error}")
            return False
        except UserError as error:  # the user's to mend: nothing can be delivered before
            text = " ".join(masked(str(error)).split())
            later = sync_command(self.store, self.study_dir.name)
            _tell(
                about="mlflow",
                note=f"warning: {text} Results are kept in the journal; afterwards: {later}",
            )
            self.log = None
        return True


class _Lines:
    """Lines of stdin, with a limit on the time that one is waited for."""

    def __init__(self) -> None:
        self._rest = b""

    def next(self, seconds: float | None) -> str | None:
        """The next line; "" at the end of stdin, None when there is none within `seconds`."""
        while b"\n" not in self._rest:
            if not select.select([0], [], [], seconds)[0]:
                return None
            data = os.read(0, 1 << 16)
            if not data:
                return ""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


def _tell(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")  # one write: two threads say things
