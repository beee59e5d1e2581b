"""Hydra overrides as a search space.

What Hydra's grammar calls a sweep (`a,b`, `choice`, `range`, `glob`, `interval`, with `sort`,
`shuffle`, `tag(log, ...)` and casts) becomes a dimension; everything else is the same in all
trials.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
)
from hydra.errors import HydraException

from openpi_opt.errors import UserError
from openpi_opt.space.dimensions import Dimension, key_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Tells the options of a group.
Options = Callable[[str], Sequence[str]]
MOST_VALUES = 64  # of one key, for `few_values`
MAX_LISTED = 10_000  # values of a range of floats
_PLAIN_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NOT_WORDS = ("null", "true", "false", "inf", "nan")  # what the grammar reads as something else


@dataclass(frozen=True)
class Space:
    """Swept keys with their values, and the overrides that all trials share.

    `sensible_only`: of the combinations, those that a knob refuses are passed over, not recorded as
    trials: nobody asked for them one by one. `start`: points that a sampler begins with, by name;
    keys that they leave out stand at the first value. `count`: how many combinations are sensible
    and different, where that is known.
    """

    dimensions: dict[str, Dimension]
    fixed: tuple[str, ...] = ()
    sensible_only: bool = False
    start: dict[str, dict[str, str]] = field(default_factory=dict)
    count: int | None = None

    @staticmethod
    def parse(overrides: Sequence[str], options: Options | None = None) -> Space:
        """Read a command line's overrides; `options` tells those of a group, for `glob`. Raises
        UserError: bad syntax, a sweep without values, or a key that is swept and given twice."""
        dimensions: dict[str, Dimension] = {}
        fixed: list[str] = []
        seen: list[str] = []
        for line in overrides:
            override = parse_override(line)
            key = override.get_key_element()
            if override.is_sweep_override():
                dimensions[key] = _dimension(line, override, options)
            else:
                fixed.append(line)
            seen.append(key)
        for key in dimensions:
            if seen.count(key) > 1:
                raise UserError(f"{key} is given more than once. Put all its values in one place.")
        return Space(dimensions, tuple(fixed))

    def combinations(self) -> int | None:
        """How many points there are; None when a dimension is a continuum."""
        counts = [dimension.count() for dimension in self.dimensions.values()]
        finite = [count for count in counts if count is not None]
        return math.prod(finite) if len(finite) == len(counts) else None

    def has_steps(self) -> bool:
        """Whether points are listed by name: their order then means something."""
        return any(dimension.bundles for dimension in self.dimensions.values())

    def all(self) -> Iterator[dict[str, str]]:
        """Every point in the order written, the last key changing fastest. Raises ValueError: the
        space is infinite."""
        if self.combinations() is None:
            raise ValueError("an interval has no end of values")
        for values in itertools.product(*(d.in_order() for d in self.dimensions.values())):
            yield dict(zip(self.dimensions, values, strict=True))

    def overrides(self, params: Mapping[str, str]) -> list[str]:
        """The overrides of one point."""
        swept = (self.dimensions[key].overrides(key, text) for key, text in params.items())
        return [*self.fixed, *itertools.chain.from_iterable(swept)]

    def distributions(self) -> dict[str, BaseDistribution]:
        """For Optuna. Imports it."""
        return {key: dimension.distribution() for key, dimension in self.dimensions.items()}

    def texts(self, sampled: Mapping[str, Any]) -> dict[str, str]:
        """The point for parameters as Optuna knows them."""
        return {key: self.dimensions[key].text(sampled[key]) for key in self.dimensions}

    def values(self, params: Mapping[str, str]) -> dict[str, str | int | float]:
        """A point's parameters as Optuna knows them."""
        return {key: self.dimensions[key].value(text) for key, text in params.items()}

    def hash(self) -> str:
        """Identity of the space, 8 hexadecimal digits, whatever the order of keys and values."""
        described = {key: dimension.identity() for key, dimension in self.dimensions.items()}
        text = json.dumps([described, sorted(self.fixed)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def few_values(space: Space) -> bool:
    """Whether every key has a list of values, few enough for a sampler to look at each."""
    counts = [dimension.count() for dimension in space.dimensions.values()]
    return all(count is not None and count <= MOST_VALUES for count in counts)


@lru_cache(maxsize=4096)
def parse_override(line: str) -> Override:
    """Read one override; the grammar takes a millisecond, so each is read once. Raises UserError:
    it does not follow Hydra's grammar, or has nothing behind `=`."""
    try:
        override = OverridesParser.create().parse_override(line)
    except HydraException as error:
        if "empty choice" in str(error):
            raise _empty(line) from None
        detail = " ".join(str(error).split()).partition(" See https")[0]
        detail = detail.partition(" expecting ")[0]  # the grammar's tokens help nobody
        raise UserError(
            f"{line!r} is not an override: {textwrap.shorten(detail, 160, placeholder='…')}.\n"
            "Write group=option, key=value, or key=a,b to sweep (with -m); quote blanks, brackets "
            "and commas that belong to a value: \"key='a b'\"."
        ) from None
    if not override.is_delete() and override.value() == "":
        raise _empty(line)
    if not override.key_or_group:
        raise UserError(f"{line!r} names no key. Write group=option or key=value.")
    return override


def head(override: Override) -> str:
    """The group or setting that an override is about."""
    return re.split("[./]", override.key_or_group)[0]


def _dimension(line: str, override: Override, options: Options | None) -> Dimension:
    sweep: Any = override.value()  # Hydra's annotation leaves Glob out
    if isinstance(sweep, Glob):
        return _glob(line, override.key_or_group, sweep, options)
    log = "log" in sweep.tags and not isinstance(sweep, ChoiceSweep)
    if strange := sorted(sweep.tags - {"log"} if log else sweep.tags):
        raise UserError(
            f"{line!r}: the tag {', '.join(strange)} has no meaning here.\n"
            "The only tag is log, of an interval or a range of whole numbers."
        )
    # The same order at every start.
    seed = int.from_bytes(hashlib.sha256(line.encode()).digest()[:4], "big")
    order = seed if getattr(sweep, "shuffle", False) else None
    if isinstance(sweep, ChoiceSweep):
        return Dimension(tuple(dict.fromkeys(map(text_of, sweep.list))), order=order)
    if isinstance(sweep, RangeSweep):
        return _range(line, sweep, log, order)
    assert isinstance(sweep, IntervalSweep)
    return _interval(line, sweep, log)


def _glob(line: str, group: str, sweep: Glob, options: Options | None) -> Dimension:
    known: Sequence[Any] = sorted(options(group)) if options else []
    names = {text_of(option): option for option in known or key_values(group)}
    include, exclude = ([_word(word) for word in part] for part in (sweep.include, sweep.exclude))
    words = Glob(include=include, exclude=exclude)
    matching = [names[name] for name in words.filter([*names])]
    if not matching:
        there = f"{group} has the options {', '.join(names)}" if names else "no such group or key"
        raise UserError(f"{line!r} matches nothing: {there}.\nUse glob(*) for all of a group.")
    return Dimension(tuple(map(text_of, matching)))


def _word(pattern: Any) -> str:
    """A pattern of `glob`, which may be read as a number or be quoted."""
    if isinstance(pattern, QuotedString):
        return pattern.text
    return pattern if isinstance(pattern, str) else text_of(pattern)


def _range(line: str, sweep: RangeSweep, log: bool, order: int | None) -> Dimension:
    if not sweep.step:
        raise UserError(f"{line!r}: the step of a range cannot be 0.\nLeave it out for steps of 1.")
    values = sweep.range()
    if isinstance(values, range):
        if not values:
            raise _empty(line)
        if log and (min(values[0], values[-1]) < 1 or abs(values.step) != 1):
            raise UserError(f"{line!r}: tag(log, ...) needs a range from 1 up in steps of 1.")
        return Dimension.of_range(values, log, order)
    if log:
        raise UserError(
            f"{line!r}: a range of floats cannot be logarithmic.\n"
            "Use tag(log,interval(LOW,HIGH)), or write the values out."
        )
    listed = _before_stop(itertools.islice(values, MAX_LISTED + 1), sweep)
    if not listed:
        raise _empty(line)
    if len(listed) > MAX_LISTED:
        raise UserError(f"{line!r} has more than {MAX_LISTED} values. Use interval(LOW,HIGH).")
    # Adding a step again and again leaves 0.30000000000000004. Twelve digits are kept, so that the
    # value is the one a user would write.
    return Dimension(tuple(repr(float(f"{value:.12g}")) for value in listed), order=order)


def _before_stop(values: Iterable[float], sweep: RangeSweep) -> list[float]:
    """Rounding lets 8 * 0.1 fall below a stop of 0.8; what equals the stop is excluded."""
    assert sweep.stop is not None
    stop = float(sweep.stop)
    return [value for value in values if not math.isclose(value, stop, rel_tol=1e-12)]


def _interval(line: str, sweep: IntervalSweep, log: bool) -> Dimension:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise UserError(f"{line!r} is empty: write interval(LOW,HIGH) with LOW at most HIGH.")
    if log and low <= 0:
        raise UserError(f"{line!r}: a logarithmic interval needs a lower end above 0.")
    if isinstance(low, int) and isinstance(high, int):
        return Dimension.of_range(range(low, high + 1), log)
    return Dimension.of_interval(float(low), float(high), log)


def text_of(value: Any) -> str:
    """The text of a value that the grammar reads back as that value. A string goes into quotes
    unless it is a plain word: so `str(1)` stays a text, and may hold blanks."""
    if isinstance(value, str):
        plain = _PLAIN_WORD.fullmatch(value) and value.lower() not in _NOT_WORDS
        return value if plain else quoted(value)
    if isinstance(value, bool):
        return str(value).lower()
    return Override._get_value_element_as_str(value)


def quoted(value: str) -> str:
    """A text in quotes, as the grammar reads it back."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _empty(line: str) -> UserError:
    key = line.partition("=")[0]
    return UserError(
        f"{line!r} gives {key} no value.\n"
        f"Write {key}=VALUE, or {key}=A,B to sweep (with -m); leave it out for the default."
    )
