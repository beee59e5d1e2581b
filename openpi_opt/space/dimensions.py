"""One swept key: the values that it takes, and what it is to Optuna.

A point of the space maps every swept key to the text that stands behind `=` in its override. So
what Optuna stores, what Hydra composes and what the user typed are one and the same.
"""

from __future__ import annotations

import math
import random
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from openpi_opt.config import fields

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Dimension:
    """The `values` of one swept key in the order written.

    `kind` is str for a list of values, int for whole numbers in equal steps, and float for a
    continuum, of which `values` are the ends and a point between. `bundles` are the overrides that
    each value stands for, where a value is a name: the steps of a named space. `order` is the seed
    of a shuffled key.
    """

    values: Sequence[str]
    kind: type[str] | type[int] | type[float] = str
    log: bool = False
    bundles: tuple[tuple[str, ...], ...] = ()
    order: int | None = None

    @staticmethod
    def of_range(values: range, log: bool = False, order: int | None = None) -> Dimension:
        """Whole numbers: `range(1,9,2)` (its stop excluded), `int(interval(1,8))` (both ends)."""
        return Dimension(_Texts(values), int, log, order=order)

    @staticmethod
    def of_interval(low: float, high: float, log: bool = False) -> Dimension:
        """A continuum, both ends included; the point between is not a round number."""
        between = low + (math.sqrt(5) - 1) / 2 * (high - low)
        return Dimension(tuple(map(repr, dict.fromkeys((low, between, high)))), float, log)

    @staticmethod
    def of_bundles(bundles: Mapping[str, Sequence[str]]) -> Dimension:
        """One value for each name, in this order."""
        return Dimension(tuple(bundles), bundles=tuple(map(tuple, bundles.values())))

    def count(self) -> int | None:
        """How many values there are; None for a continuum."""
        return None if self.kind is float and len(self.values) > 1 else len(self.values)

    def in_order(self) -> Sequence[str]:
        """The values in the order in which an enumeration takes them."""
        if self.order is None:
            return self.values
        values = list(self.values)
        random.Random(self.order).shuffle(values)
        return values

    def only(self, values: Sequence[str]) -> Dimension:
        """The same list with these of its values, in this order."""
        bundles = tuple(self.bundles[self.values.index(value)] for value in values if self.bundles)
        return replace(self, values=tuple(values), bundles=bundles)

    def overrides(self, key: str, text: str) -> Sequence[str]:
        """What a value is on the command line."""
        return self.bundles[self.values.index(text)] if self.bundles else [f"{key}={text}"]

    def value(self, text: str) -> str | int | float:
        """Optuna's value for one of `values`."""
        return self.kind(text)

    def text(self, value: str | int | float) -> str:
        """The text for a value that Optuna sampled, with all its digits."""
        return repr(float(value)) if self.kind is float else str(self.kind(value))

    def distribution(self) -> BaseDistribution:
        """What Optuna samples from: both ends included. Imports Optuna. A list is sorted, since
        Optuna refuses to continue a study with its choices in another order."""
        from optuna import distributions as of

        if self.kind is str:
            return of.CategoricalDistribution(sorted(self.values))
        if self.kind is int:
            low, high, step = self._steps()
            return of.IntDistribution(low, high, log=self.log, step=step)
        return of.FloatDistribution(float(self.values[0]), float(self.values[-1]), log=self.log)

    def identity(self) -> str:
        """The same text for the same values in whatever order."""
        if self.kind is str:
            values = zip(self.values, self.bundles, strict=True) if self.bundles else self.values
            return repr(sorted(values))
        if self.kind is int:
            low, high, step = self._steps()
            return repr(([low, high], step, self.log))
        low_text, high_text = self.values[0], self.values[-1]
        return f"Interval(low={low_text}, high={high_text}, log={self.log})"

    def _steps(self) -> tuple[int, int, int]:
        first, second, last = int(self.values[0]), int(self.values[:2][-1]), int(self.values[-1])
        return min(first, last), max(first, last), abs(second - first) or 1


class _Texts(Sequence[str]):
    """Texts of a range, made when asked for: a range may have millions of elements."""

    def __init__(self, values: range):
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        picked = self._values[index]
        return _Texts(picked) if isinstance(picked, range) else str(picked)


def key_values(key: str) -> list[Any]:
    """Every value of a switch or a choice such as `attention.denoise`; empty for other keys. The
    default comes first."""
    field = fields(key.split(".")[0]).get(key)
    if field is None:
        return []
    return sorted(_admitted(field.annotation), key=lambda value: value != field.default)


def _admitted(annotation: Any) -> list[Any]:
    """The members of a Literal, of bool, of None, and of a union of these."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin is Annotated:
        return _admitted(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [_admitted(part) for part in get_args(annotation)]
        return [value for part in members for value in part] if all(members) else []
    if annotation is bool:
        return [False, True]
    return [None] if annotation is type(None) else []
