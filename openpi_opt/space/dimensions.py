"""The kinds of dimension that a search space has, and what each is to Optuna.

A point of the space maps every swept key to the text that stands behind `=` in its override, so
what Optuna stores, what Hydra composes and what the user typed are one and the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# A range of floats has at most this many values.
MAX_LISTED = 10_000


class Dimension(ABC):
    """One swept key. Its texts stand behind `=`; Optuna knows `value` of them."""

    @abstractmethod
    def count(self) -> int | None:
        """How many values there are; None for a continuum."""

    @abstractmethod
    def texts(self) -> Sequence[str]:
        """The values in the order written; of a continuum its ends and a point between."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """What Optuna samples from. Imports Optuna."""

    def value(self, text: str) -> str | int | float:
        """Optuna's value for a text of `texts`."""
        return text

    def text(self, value: str | int | float) -> str:
        """The text for a value that Optuna sampled."""
        return str(value)

    def overrides(self, key: str, text: str) -> list[str]:
        """What a value is on the command line."""
        return [f"{key}={text}"]


@dataclass(frozen=True)
class Choices(Dimension):
    """A list of values: `a,b`, `choice(a,b)`, `glob(*)`, or a range of floats."""

    values: tuple[str, ...]

    def count(self) -> int:
        """How many there are."""
        return len(self.values)

    def texts(self) -> Sequence[str]:
        """As written."""
        return self.values

    def distribution(self) -> BaseDistribution:
        """Sorted: Optuna refuses to continue a study with its choices in another order."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(sorted(self.values))

    def only(self, texts: Sequence[str]) -> Choices:
        """The same with these of its values, in this order."""
        return Choices(tuple(texts))


@dataclass(frozen=True)
class Bundles(Choices):
    """Names that each stand for several overrides: the steps of a named space."""

    contents: tuple[tuple[str, ...], ...] = ()

    @staticmethod
    def of(bundles: Mapping[str, Sequence[str]]) -> Bundles:
        """One value for each name, in this order."""
        return Bundles(tuple(bundles), tuple(tuple(lines) for lines in bundles.values()))

    def overrides(self, key: str, text: str) -> list[str]:
        """The overrides that the name stands for."""
        return list(self.contents[self.values.index(text)])

    def only(self, texts: Sequence[str]) -> Bundles:
        """The same with these of its names, in this order."""
        return Bundles.of({text: self.overrides("", text) for text in texts})


@dataclass(frozen=True)
class Integers(Dimension):
    """Whole numbers: `range(1,9,2)` (its stop excluded), `int(interval(1,8))` (both included)."""

    values: range
    log: bool = False

    def count(self) -> int:
        """How many there are."""
        return len(self.values)

    def texts(self) -> Sequence[str]:
        """In the order of the range, which may fall."""
        return _Texts(self.values)

    def distribution(self) -> BaseDistribution:
        """Optuna includes both ends, so they are the first and last element."""
        from optuna.distributions import IntDistribution

        low, high = sorted((self.values[0], self.values[-1]))
        return IntDistribution(low, high, log=self.log, step=abs(self.values.step))

    def value(self, text: str) -> int:
        """The number."""
        return int(text)

    def text(self, value: str | int | float) -> str:
        """The number."""
        return str(int(value))


@dataclass(frozen=True)
class Interval(Dimension):
    """A continuum: `interval(0.1,1)`, `tag(log,interval(1e-4,1))`."""

    low: float
    high: float
    log: bool = False

    def count(self) -> int | None:
        """One when the ends are equal, no number otherwise."""
        return 1 if self.low == self.high else None

    def texts(self) -> Sequence[str]:
        """The ends and a point between them that is not a round number."""
        between = self.low + (math.sqrt(5) - 1) / 2 * (self.high - self.low)
        return tuple(repr(value) for value in dict.fromkeys((self.low, between, self.high)))

    def distribution(self) -> BaseDistribution:
        """Both ends included."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, text: str) -> float:
        """The number."""
        return float(text)

    def text(self, value: str | int | float) -> str:
        """The number with all its digits."""
        return repr(float(value))


class _Texts(Sequence[str]):
    """Texts of a range, made when asked for: a range may have millions of elements."""

    def __init__(self, values: range):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        picked = self._values[index]
        return _Texts(picked) if isinstance(picked, range) else str(picked)
