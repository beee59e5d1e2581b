"""Fresh processes in turn on one device, the next ones importing while the present one loads.

Of the ten seconds that a process of the full model takes on an H100, seven go into starting Python
and importing torch, where the device is not wanted. So the next few are started early, side by
side, and stop at two gates:

    import | gate | load, compile, warm up, guard | gate | measure | end

A process passes the first when the one before it has ended: there is never more than one on the
device. It passes the second when all that were started wait at their first: while something is
measured the others sleep, and nothing else of this project runs. So what is measured is what a
process alone would measure; only the waiting is shorter.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from openpi_opt.process.child import Stop, StoppedError

R = TypeVar("R")

_WAITING = "wait"  # the phase in which a trial says that it stands at a gate


@dataclass
class Gate:
    """Where one process waits: it reads a byte from `fd` at each gate. `stop` ends it."""

    fd: int
    stop: Stop


class Turn:
    """What a job needs for its process: a gate, and to whom to tell the phases."""

    def __init__(self, tell: Callable[[str], None], stop: Stop):
        self._tell, self._stop = tell, stop
        self._write: int | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def process(self) -> Iterator[tuple[Gate, Callable[[str], None]]]:
        """Gate and phase callback of one process; a job that repeats it takes another."""
        read, write = os.pipe()
        self._write = write
        self._tell("begin")
        try:
            yield Gate(read, self._stop), self._tell
        finally:
            with self._lock:
                self._write = None
                os.close(write)
            os.close(read)

    def pause(self, seconds: float) -> None:
        """Wait before another process of the job.

        Raises:
            StoppedError: all is to end.
        """
        if self._stop.wait(seconds):
            raise StoppedError("ended while it paused")

    def open(self) -> None:
        """Let the process pass, if it still is there."""
        with self._lock:
            if self._write is not None:
                os.write(self._write, b".")


Job = Callable[[Turn], R]


@dataclass
class _Runner(Generic[R]):
    """A job in its thread, and how far its process is."""

    turn: Turn
    thread: threading.Thread
    passed: int = 0  # gates
    waiting: bool = False
    ended: bool = False
    outcome: list[R] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def out_of_the_way(self) -> bool:
        """Whether it is done with importing, or with everything."""
        return self.waiting or self.ended


class Relay(Generic[R]):
    """Runs jobs in their order. A job gets a `Turn` and returns what became of its process.

    When none waits any more, the next `ahead` are started at once.
    """

    def __init__(self, jobs: Iterable[Job[R]], ahead: int = 1):
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        self._jobs = iter(jobs)
        self._ahead: deque[_Runner[R]] = deque()
        self._count = ahead
        self._events: queue.SimpleQueue[tuple[_Runner[R], str | None]] = queue.SimpleQueue()
        self._stop = Stop()

    def results(self) -> Generator[R, None, None]:
        """The results in order. The next jobs are asked for when the present one gets the device.

        Raises:
            BaseException: what a job raised; those begun are ended first.
        """
        current = self._start()
        try:
            while current is not None:
                if not current.ended:
                    self._take_event()
                if current.ended:
                    if current.error is not None:
                        raise current.error
                    done, current = current.outcome[0], None
                    if self._ahead:
                        current = self._ahead.popleft()
                        if current.waiting:
                            self._pass_first(current)
                    yield done
                    current = current or self._start()
                elif current.waiting and current.passed == 0:
                    self._pass_first(current)
                elif current.waiting and all(each.out_of_the_way for each in self._ahead):
                    self._let_pass(current)
        finally:
            self._stop.set()
            for runner in (current, *self._ahead):
                if runner is not None:
                    runner.thread.join()

    def _pass_first(self, current: _Runner[R]) -> None:
        """Give `current` the device, and start the next ones, unless some were started before."""
        self._let_pass(current)
        if not self._ahead:
            begun = (self._start() for _ in range(self._count))
            self._ahead.extend(runner for runner in begun if runner is not None)

    def _let_pass(self, runner: _Runner[R]) -> None:
        runner.waiting = False
        runner.passed += 1
        runner.turn.open()

    def _start(self) -> _Runner[R] | None:
        job = next(self._jobs, None)
        if job is None:
            return None
        runner: _Runner[R]

        def tell(phase: str) -> None:
            self._events.put((runner, phase))

        turn = Turn(tell, self._stop)

        def work() -> None:
            try:
                runner.outcome.append(job(turn))
            except BaseException as error:  # noqa: BLE001  raised where the results are taken
                runner.error = error
            finally:
                self._events.put((runner, None))

        runner = _Runner(turn, threading.Thread(target=work, daemon=True))
        runner.thread.start()
        return runner

    def _take_event(self) -> None:
        runner, phase = self._events.get()
        if phase is None:
            runner.ended, runner.waiting = True, False
        elif phase == "begin":
            runner.passed, runner.waiting = 0, False
        elif phase == _WAITING:
            runner.waiting = True
