"""`python -m openpi_opt.track follow`: the process that `copies.Copies` starts.

It reads an order on stdin, copies what the journal has and gets, and says on stdout, one JSON
object a line: what MLflow still lacks (`left`), that it has all (`ended`), what is wrong (`note`,
`about` one of the two). "finish" on stdin makes it copy the rest and end; its end without that is a
kill.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
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
    order = sys.stdin.readline()
    asked = json.loads(order) if order else {}
    if os.getppid() != asked.get("parent"):  # killed while this was starting
        return 0
    store = Store(Path(asked["store"]))
    study_dir = store.study_dir(asked["study"])
    followers = []
    if asked["optuna"]:
        copy = OptunaCopy(store, study_dir, asked["storage"])
        followers.append(_Follower("optuna", store, study_dir, lambda j: copy.update(j.records())))
    if asked["experiment"] is not None:
        log, begun = MlflowLog(store, Tracking(experiment=asked["experiment"])), threading.Event()

        def end(journal: Journal) -> None:
            log.show(study_dir, journal)
            end_study(study_dir, log)
            _tell(ended=True)

        def to_mlflow(journal: Journal) -> None:
            if not begun.is_set():
                log.begin_study(study_dir)
                begun.set()
            log.sync(study_dir, journal, told=lambda left: _tell(left=left))

        followers.append(_Follower("mlflow", store, study_dir, to_mlflow, end))
    for follower in followers:
        follower.start()
    if sys.stdin.readline() != "finish\n":
        os._exit(0)  # whatever a thread waits for
    for follower in followers:
        follower.last.set()
    for follower in followers:
        follower.join()
    return 0


class _Follower(threading.Thread):
    """One copy of a study, in a thread of its own: neither copy holds up the other."""

    def __init__(
        self,
        about: str,
        store: Store,
        study_dir: Path,
        copy: Callable[[Journal], None],
        end: Callable[[Journal], None] = lambda journal: None,
    ):
        super().__init__(daemon=True)
        self.last = threading.Event()  # nothing comes any more
        self._about, self._copy, self._end = about, copy, end
        self._study_dir = study_dir
        self._later = sync_command(store, study_dir.name)

    def run(self) -> None:
        """Copy what is new until `last` is set, and then the rest."""
        journal, seen = Journal.open(self._study_dir), -1
        while True:
            last = self.last.is_set()
            try:
                journal.refresh()
                if len(journal) != seen:
                    self._copy(journal)
                    seen = len(journal)
                if last:
                    self._end(journal)
                    return
            except (TrackingError, CopyError) as error:  # which may be over later
                seen = -1
                self._note(str(error))
                if isinstance(error, CopyError) and (error.final or last):
                    return
            except UserError as error:  # the user's to mend: nothing can be delivered before
                text = " ".join(masked(str(error)).split())
                self._note(f"{text} Results are kept in the journal; afterwards: {self._later}")
                return
            if last:
                time.sleep(RETRY_S)
            else:
                self.last.wait(POLL_S if seen >= 0 else RETRY_S)

    def _note(self, text: str) -> None:
        if text:
            _tell(about=self._about, note=f"warning: {text}")


def _tell(**message: Any) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")  # one write: two threads say things
