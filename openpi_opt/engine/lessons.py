"""What failures teach: classes of combinations that are not worth another process.

A class is a set of key=value pairs. It is barred when at least three different configurations in
it ran, every one failed in the same way, and something outside it did not fail so. The class named
is the most general one; where several explain the same failures equally well, all of their pairs
together, so that nothing is barred that was not seen to fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from openpi_opt.result import Failed, Ok, Pruned, TrialResult, Wrong

MIN_FAILURES = 3
_MOST_KEYS = 2
Pairs = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class FailingClass:
    """A combination of values that fails. `way` says how, `seen` in how many configurations."""

    pairs: Pairs
    way: str
    seen: int

    def holds(self, params: Mapping[str, str]) -> bool:
        """Whether a point belongs to it."""
        return self.pairs <= params.items()

    def text(self, left_out: int) -> str:
        """One line for people."""
        shown = " ".join(f"{key}={value}" for key, value in sorted(self.pairs))
        return (
            f"{shown}: all {self.seen} configurations that were tried with it ended {self.way}; "
            f"{left_out} more left out (--fresh begins anew)"
        )


@dataclass
class Lessons:
    """Points with what became of them, and the classes that follow."""

    _ways: dict[frozenset[tuple[str, str]], str | None] = field(default_factory=dict)
    _hashes: dict[frozenset[tuple[str, str]], str] = field(default_factory=dict)
    _by_pairs: dict[Pairs, list[Pairs]] = field(default_factory=dict)
    classes: list[FailingClass] = field(default_factory=list)

    def add(self, params: Mapping[str, str], result: TrialResult) -> FailingClass | None:
        """Take in a result; returns the class that it completed, if any.

        Refusals teach nothing: they cost no process.
        """
        point = frozenset(params.items())
        if point in self._ways or not isinstance(result, Ok | Pruned | Wrong | Failed):
            return None
        self._ways[point] = way(result)
        self._hashes[point] = result.config_hash
        for pairs in _subsets(point):
            self._by_pairs.setdefault(pairs, []).append(point)
        found = self._found(point)
        if found is None or any(old.pairs <= found.pairs for old in self.classes):
            return None
        self.classes.append(found)
        return found

    def bars(self, params: Mapping[str, str]) -> FailingClass | None:
        """The class that a point belongs to, if it is not to be tried."""
        return next((known for known in self.classes if known.holds(params)), None)

    def _found(self, point: Pairs) -> FailingClass | None:
        """The class that the newest failure completes. Only classes with that point can be new."""
        failed = self._ways[point]
        if failed is None or all(other == failed for other in self._ways.values()):
            return None
        for size in range(1, _MOST_KEYS + 1):
            candidates = [c for c in _subsets(point) if len(c) == size and self._fails(c, failed)]
            if candidates:
                most = max(len(self._by_pairs[c]) for c in candidates)
                alike = [c for c in candidates if len(self._by_pairs[c]) == most]
                members = self._by_pairs[alike[0]]
                same = [c for c in alike if set(self._by_pairs[c]) == set(members)]
                return FailingClass(frozenset().union(*same), failed, self._count(members))
        return None

    def _fails(self, pairs: Pairs, failed: str) -> bool:
        members = self._by_pairs[pairs]
        if self._count(members) < MIN_FAILURES:
            return False
        return all(self._ways[member] == failed for member in members)

    def _count(self, members: Iterable[Pairs]) -> int:
        return len({self._hashes[member] for member in members})


def way(result: TrialResult) -> str | None:
    """How a configuration failed, as far as two failures can be the same; None for none."""
    if isinstance(result, Failed):
        return f"{result.outcome} in phase {result.phase}"
    return None if isinstance(result, Ok | Pruned) else str(result.outcome)


def _subsets(point: Pairs) -> list[Pairs]:
    sizes = range(1, min(_MOST_KEYS, len(point)) + 1)
    return [frozenset(c) for n in sizes for c in itertools.combinations(sorted(point), n)]
