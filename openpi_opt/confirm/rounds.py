"""Rounds of fresh processes: every configuration once per round, each round in its own order."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

# Measures a fresh process for each configuration and number of a round, in order: its key and its
# mean latency in ms, or None if it was not ok. Some places are asked for before the means of those
# in front of them are there.
Measure = Callable[[Iterable[tuple[str, int]]], Generator[tuple[str, float | None], None, None]]

# A round is begun only when this many times what one took so far is left.
_MARGIN = 1.05


class NeededError(Exception):
    """A configuration that others are compared with did not end ok; its key is the argument."""


@dataclass
class Deadline:
    """The end in `limit_s` seconds, or none. Time alone ends the rounds, whatever they show."""

    limit_s: float | None
    _began: float = field(default_factory=lambda: time.monotonic())
    _first: float | None = None  # when the first round was begun

    def another(self, begun: int, done: float) -> bool:
        """Whether one more round would end in time after `begun` rounds, of which `done` ended.

        Processes start ahead of their turn, so `done` may be a fraction. The first round begins
        whenever some of the time is left.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = now
        if self.limit_s is None:
            return True
        left = _MARGIN * (now - self._first) / done * (begun + 1 - done) if done else 0.0
        return now - self._began + left <= self.limit_s


def draw_rounds(keys: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """`count` rounds, each all of `keys` in an order of its own: every order is as likely.

    So within each pair of a round either is first with probability 1/2.
    """
    drawn = random.Random(seed)
    return [drawn.sample(list(keys), len(keys)) for _ in range(count)]


def measure_rounds(
    measure: Measure,
    rounds: Sequence[Sequence[str]],
    needed: Collection[str] = (),
    deadline: Deadline | None = None,
    first: int = 0,
) -> tuple[dict[str, list[float]], list[str]]:
    """The means of every configuration by round, and which were dropped.

    A configuration that is not ok once is not run again: it cannot be judged any more. With a
    `deadline` there may be fewer rounds, but only whole ones. The rounds are numbered from `first`.
    Raises NeededError: one of `needed` was not ok.
    """
    found: dict[str, list[float]] = {key: [] for order in rounds for key in order}
    dropped: list[str] = []

    def places() -> Iterator[tuple[str, int]]:
        for number, order in enumerate(rounds):
            done = sum(map(len, found.values())) / max(1, len(order))
            if deadline is not None and not deadline.another(number, done):
                return
            yield from ((key, first + number) for key in order if key not in dropped)

    with closing(measure(places())) as measured:
        for key, mean in measured:
            if key in dropped:
                continue  # it had started ahead of its turn
            if mean is not None:
                found[key].append(mean)
            elif key in needed:
                raise NeededError(key)
            else:
                dropped.append(key)
    return found, dropped


def flag_counts(processes: Iterable[Sequence[str]]) -> dict[str, int]:
    """By check: how many processes it flagged, of their flags as `result.Ok.flags` gives them."""
    every = ({flag.partition(":")[0] for flag in flags} for flags in processes)
    return dict(sorted(Counter(name for names in every for name in names).items()))


def flagged(processes: Sequence[Sequence[str]]) -> list[str]:
    """A line for each check that flagged processes: `flagged host_shared: 5 of 24 processes`."""
    counts, of = flag_counts(processes).items(), len(processes)
    return [f"flagged {name}: {count} of {of} processes" for name, count in counts]
