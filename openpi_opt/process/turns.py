"""Several trials started for one device: one has it at a time, in the order of their starting.

A trial's process imports, then reads from its gate, a pipe, before it touches the device, and once
more before it measures (`trial.Progress.gate`). Both gates are opened at once, when whatever was
started before it is gone; the second one later while this process is busy itself. Closing the pipe,
also by the death of this process, ends who waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from dataclasses import dataclass, field

from openpi_opt.process.child import Stop

_GATES = 2  # of a trial
# So long a process that was ended may take to close its descriptors before it counts as stuck.
_GONE_MS = 2000


@dataclass(eq=False)
class Turn:
    """A trial's place in a line. Its process inherits `gate`.

    `opened`: it may have the device. `withdrawn`: it never gets on. `ended`: it was waited for or
    killed; `stuck`: in vain.
    """

    gate: int
    measures: bool = True  # whether both gates are opened at once
    withdrawn: bool = False
    ended: bool = False
    stuck: bool = False
    opened: bool = False
    _write: int = -1

    def open(self) -> None:
        """Let the process through its gates, now or when it comes to them."""
        self.opened = True
        self._let(_GATES if self.measures else _GATES - 1)

    def let_measure(self) -> None:
        """Let it through the second gate, too, when it may pass the first."""
        self.measures = True
        if self.opened:
            self._let(1)

    def withdraw(self) -> None:
        """End the process at its gate; when it has ended, nothing."""
        if not self.ended:
            self.withdrawn = True
            self.close()

    def is_gone(self, milliseconds: int) -> bool:
        """Whether the process, and all that inherited its gate, are gone; waits that long for it.

        Ask when this process has closed `gate`: a pipe without a reader is an error to who writes.
        """
        poll = select.poll()
        poll.register(self._write, 0)
        return bool(poll.poll(milliseconds))

    def _let(self, gates: int) -> None:
        if self._write >= 0:
            with contextlib.suppress(BrokenPipeError):  # it has just ended
                os.write(self._write, b"." * gates)

    def close(self) -> None:
        """Nobody is to be let through any more. Twice does no harm."""
        if self._write >= 0:
            os.close(self._write)
            self._write = -1


@dataclass
class Line:
    """The trials that were started for one device, oldest first: that one has it.

    A process that cannot be killed keeps its place, as it may keep the device: those behind it are
    withdrawn, and `stuck` says so until it is gone after all.
    """

    stop: Stop  # set when all ends: then nobody gets on
    _turns: list[Turn] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def join(self, measures: bool = True) -> Turn:
        """A place at the end of the line; its gate is open when there is nobody before.

        Without `measures` it waits at the second gate until `let_measure`.
        """
        with self._lock:
            read, write = os.pipe()
            turn = Turn(read, measures, _write=write)
            self._turns.append(turn)
            if self._turns[0] is turn:
                turn.open()
            return turn

    def let_measure(self, turn: Turn) -> None:
        """It need not wait at its second gate any more. When it has ended, nothing."""
        with self._lock:
            turn.let_measure()

    def withdraw(self, turn: Turn) -> None:
        """It is not needed any more: it ends at its next gate."""
        with self._lock:
            turn.withdraw()

    def leave(self, turn: Turn) -> None:
        """The trial has ended. The next one gets the device as soon as the process is gone."""
        os.close(turn.gate)
        with self._lock:
            turn.ended = True
        gone = turn.withdrawn or turn.is_gone(_GONE_MS)
        with self._lock:
            if gone:
                self._remove(turn)
                return
            turn.stuck = True
            for other in self._turns:
                if not other.opened:
                    other.withdraw()

    @property
    def stuck(self) -> bool:
        """Whether something that was ended may still have the device."""
        with self._lock:
            for turn in [turn for turn in self._turns if turn.stuck and turn.is_gone(0)]:
                self._remove(turn)
            return any(turn.stuck for turn in self._turns)

    def _remove(self, turn: Turn) -> None:
        first = self._turns[0] is turn
        self._turns.remove(turn)
        turn.close()
        if first and self._turns and not self.stop.is_set:
            self._turns[0].open()
