"""Where points come from: every combination in order, or a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from openpi_opt.space.neighbours import Neighbours
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.space import Space

# A sampler that proposes this many known points on end has no new one to propose.
MAX_REPEATS = 50
# The same for combinations of a named space that are passed over: there may be many of them.
MAX_PASSED_OVER = 2_000
_COUNTED = 100_000  # a limit above this is none: minutes are the budget


class Enumerated:
    """Every combination in order, up to `limit` different configurations.

    `ended` is the reason why there are no more points; None while there may be.
    """

    def __init__(self, space: Space, limit: int):
        self.ended: str | None = None
        self._points: Iterator[dict[str, str]] = space.all()
        self._limit = limit
        self._total = min(space.combinations() or 0, limit)
        self._number = 0
        self._hashes: set[str | None] = {None}

    def next(self) -> Proposal | None:
        """The next combination; None when there are no more."""
        if self.ended is None:
            params = next(self._points, None)
            if params is not None and len(self._hashes) <= self._limit:
                self._number += 1
                return Proposal(params)
            every = "every combination is tried"
            self.ended = every if params is None else f"n_trials={self._limit} reached"
        return None

    def position(self) -> str:
        """Number of the combination, for the screen."""
        return f"[{self._number}/{self._total}]"

    def seen(self, config_hash: str | None, passed_over: bool = False) -> None:
        """Count a configuration once; None is a combination that is not to be tried."""
        self._hashes.add(config_hash)

    def wake(self) -> None:
        """Nothing: the order is fixed."""


class Sampled:
    """What the sampler proposes, up to `limit` different configurations.

    It begins with the points that the space names to start with: known good ones. The last part
    of the budget goes to the neighbours of the best.
    `open_hashes` tells the configurations that are being measured, here and by others, and then
    makes the optimizer learn what others finished before.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        space: Space,
        limit: int,
        open_hashes: Callable[[], set[str]],
        neighbours: Neighbours | None = None,
    ):
        self.ended: str | None = None
        self._neighbours = neighbours
        self._optimizer = optimizer
        self._count = space.combinations()
        self._sensible = space.count
        self._limit = limit
        self._open_hashes = open_hashes
        self._known: set[str] = set()
        self._repeats = self._passed_over = 0
        self._starts = list(space.start.values())

    def next(self) -> Proposal | None:
        """The next point to look at; None when it has ended, or depends on what is being
        measured."""
        measured = self._open_hashes()  # first: what ends meanwhile is then among the tried
        self._known = self._optimizer.tried | measured
        self.ended = self._reason()
        enough = len(self._known) >= self._limit  # if what is being measured comes to an end
        if self.ended or enough:
            return None
        if self._starts:
            return Proposal(self._starts.pop(0))
        near = None if self._neighbours is None else self._neighbours.next(self._known)
        return self._optimizer.ask(near)

    def share(self) -> float:
        """The part of the number of trials that is used."""
        return len(self._known) / self._limit

    def position(self) -> str:
        """Number of the configuration, for the screen."""
        number = len(self._known) + 1
        end = f"/{self._limit}" if self._limit <= _COUNTED else ""
        return f"[{min(number, self._limit)}{end}]"

    def seen(self, config_hash: str | None, passed_over: bool = False) -> None:
        """Count proposals that hold nothing new: the same again, not to be tried (None), or
        `passed_over`, which is a combination of a named space that a knob refuses."""
        if config_hash is not None and config_hash not in self._known:
            self._repeats = self._passed_over = 0
        elif passed_over:
            self._passed_over += 1
        else:
            self._repeats += 1

    def wake(self) -> None:
        """A trial ended: the sampler knows more and is asked again."""
        self.ended, self._repeats, self._passed_over = None, 0, 0

    def _reason(self) -> str | None:
        tried, points = len(self._optimizer.tried), len(self._optimizer.points)
        if tried >= self._limit:
            return f"n_trials={self._limit} reached"
        if self._count is not None and points >= self._count:
            return "every combination is tried"
        if self._sensible is not None and tried >= self._sensible:
            return "every sensible combination is tried"
        if self._repeats >= MAX_REPEATS or self._passed_over >= MAX_PASSED_OVER:
            return (
                f"the last {self._repeats + self._passed_over} proposals held nothing new: the "
                "space seems exhausted"
            )
        return None


Source = Enumerated | Sampled
