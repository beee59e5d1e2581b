"""One thread for what no device should wait for: copies of results to databases and servers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Work = Callable[[], None]
_LONG_SECONDS = 3.0


class Background:
    """Does work in the order given. What it raises is raised again by `check` and `finish`.

    The thread is a daemon: it may hang on a server, and a second Ctrl-C is to end the process.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="deliveries", daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        """Do it later. After an error nothing more is done."""
        self._queue.put(work)

    def check(self) -> None:
        """Raise what the work raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self, slow: Work = lambda: None) -> None:
        """Wait until all is done; `slow` is called when that takes long."""
        self._queue.put(None)
        self._thread.join(_LONG_SECONDS)
        if self._thread.is_alive():
            slow()
            self._thread.join()
        self.check()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  raised again in the sweep's own thread
                self._error = error
                return
