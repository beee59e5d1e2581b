"""A named space made ready for a machine: dead values dropped, defaults first, starts filled in.

A space of a few thousand combinations is walked through and counted. Of a larger one every value is
composed alone and dropped where a knob refuses it; the counts are estimated from random points.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.space.dimensions import Dimension
from openpi_opt.space.points import Compose, LeftOut, NotSensibleError, Points, left_out
from openpi_opt.space.space import Space

MAX_WALK = 20_000
SAMPLE = 2_000
_LEAST_SAMPLE = 50
# Of processor time, for each of the two estimates.
SAMPLE_SECONDS = 0.75
# A list with more values than this is not looked through value by value.
_MAX_LOOKED_THROUGH = 64

Params = dict[str, str]


@dataclass
class Count:
    """Combinations of a space: `raw` as written, `sensible` ones, and `distinct` configurations.

    `sensible` and `distinct` are exact where what can run was walked through, else estimates from
    `drawn` random combinations. `raw` is None where a dimension is continuous. `left_out` has the
    number of combinations by reason, an estimate where values were dropped before; `alive` has the
    values of each list that can occur.
    """

    raw: int | None
    sensible: int = 0
    distinct: int = 0
    drawn: int = 0
    drawn_sensible: int = 0
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    alive: dict[str, set[str]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every combination was looked at."""
        return not self.drawn

    def share(self) -> tuple[float, float]:
        """95% interval (Wilson) of the share of sensible combinations among those drawn."""
        from scipy.stats import binomtest

        test = binomtest(self.drawn_sensible, self.drawn)
        interval = test.proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def prepare(
    space: Space, compose: Compose, machine: Machine, allow_lossy: bool
) -> tuple[Space, Count]:
    """Count a space; of a named one, also leave only the values that can occur here.

    The value that the configuration has without the space comes first, so that an enumeration
    begins at the defaults, and starting points stand there in all that they do not name.

    Raises UserError: a starting point names what the space does not sweep.
    """
    _check_starts(space)

    @functools.cache
    def alone(**value: str) -> Config | None:
        """The configuration with one key's value, or with none; None where it needs others."""
        try:
            return compose(space.overrides(value)).resolved(machine)
        except UserError:
            return None

    def reason(**value: str) -> LeftOut | None:
        cfg = alone(**value)
        return None if cfg is None else left_out(cfg, machine, allow_lossy)

    found, living = Count(space.combinations()), dict(space.dimensions)
    for key in _looked_through(space) if (found.raw or math.inf) > MAX_WALK else ():
        values = living[key].values
        dead = {text: why for text in values if (why := reason(**{key: text})) and why != reason()}
        dead = {text: why for text, why in dead.items() if why.kind != "invalid"}
        if len(dead) < len(values):
            living[key] = living[key].only([text for text in values if text not in dead])
            for why in dead.values():
                found.left_out[why] += (found.raw or 0) // len(values)
    looked = dataclasses.replace(space, dimensions=living, sensible_only=True)
    _count(looked, Points(looked, compose, machine, allow_lossy), found)
    if not space.sensible_only:
        return space, found
    for key, dimension in living.items():
        if dimension.kind is str and found.sensible:
            living[key] = dimension.only([t for t in dimension.values if t in found.alive[key]])
    for key in _looked_through(looked) if alone() else ():
        values = living[key].values
        default = [text for text in values if alone(**{key: text}) == alone()][:1]
        living[key] = living[key].only(list(dict.fromkeys([*default, *values])))
    firsts = {key: dimension.values[0] for key, dimension in living.items()}
    start = {
        name: {**firsts, **params}
        for name, params in space.start.items()
        if all(text in living[key].values for key, text in params.items())
    }
    known = found.distinct if found.exact else None
    return dataclasses.replace(space, dimensions=living, start=start, count=known), found


def require_some(space: Space, found: Count) -> None:
    """Refuse a named space of which nothing can run here. Raises UserError: with the most frequent
    reason."""
    if space.sensible_only and found.exact and not found.sensible:
        [(reason, _)] = found.left_out.most_common(1)
        raise UserError(
            f"no combination of the space can run here: {reason.reason}.\n"
            "Add --dry-run for all reasons; name a group or key to replace what the space says."
        )


def _check_starts(space: Space) -> None:
    for name, params in space.start.items():
        unknown = [key for key in params if key not in space.dimensions]
        if unknown:
            raise UserError(
                f"space: start {name} names {', '.join(unknown)}, which the space does not sweep.\n"
                "Take it out, or sweep it."
            )
        for key, text in params.items():
            dimension = space.dimensions[key]
            if dimension.count() is not None and text not in dimension.values:
                raise UserError(
                    f"space: start {name} says {key}={text}, and the space has "
                    f"{', '.join(dimension.values)}.\nTake it out, or add the value."
                )


def _looked_through(space: Space) -> list[str]:
    """The keys that are looked through value by value."""
    return [
        key
        for key, dimension in space.dimensions.items()
        if dimension.kind is str and len(dimension.values) <= _MAX_LOOKED_THROUGH
    ]


def _count(space: Space, points: Points, found: Count) -> None:
    """Look at every combination, or at some that are drawn where there are too many."""
    number = space.combinations()
    exact = number is not None and number <= MAX_WALK
    reasons: Counter[LeftOut] = Counter()
    sensible: list[tuple[Params, str]] = []
    for params in space.all() if exact else _drawn(space):
        known = _hash_of(points, params)
        if isinstance(known, LeftOut):
            reasons[known] += 1
        else:
            sensible.append((params, known))
    looked = len(sensible) + reasons.total()
    each = 1.0 if exact else (number or 0) / looked
    found.sensible = round(len(sensible) * each)
    found.left_out += Counter({reason: round(n * each) for reason, n in reasons.items()})
    if exact:
        found.distinct = len({known for _, known in sensible})
        found.alive = {key: {params[key] for params, _ in sensible} for key in space.dimensions}
        return
    found.drawn, found.drawn_sensible = looked, len(sensible)
    found.distinct = round(found.sensible * _share_of_different(space, points, sensible))
    found.alive = {key: set(d.values) for key, d in space.dimensions.items() if d.kind is str}


def _drawn(space: Space) -> Iterator[Params]:
    """Random combinations, as many as time allows, and never too few to say something."""
    chosen = random.Random(0)
    end = time.process_time() + SAMPLE_SECONDS
    for number in range(SAMPLE):
        if number >= _LEAST_SAMPLE and time.process_time() > end:
            return
        yield {key: _any_text(d, chosen) for key, d in space.dimensions.items()}


def _share_of_different(space: Space, points: Points, sensible: list[tuple[Params, str]]) -> float:
    """The share of different configurations among sensible combinations, as time allows.

    It is the mean of 1 / m, where m combinations have the same canonical form. A combination's m is
    taken for the product of what each key alone contributes: its values that leave the form as it
    is.
    """
    shares: list[float] = []
    end = time.process_time() + SAMPLE_SECONDS
    for params, known in sensible:
        same = [
            sum(_hash_of(points, {**params, key: t}) == known for t in space.dimensions[key].values)
            for key in _looked_through(space)
        ]
        shares.append(1 / math.prod(max(1, number) for number in same))
        if time.process_time() > end:
            break
    return statistics.fmean(shares) if shares else 0.0


def _hash_of(points: Points, params: Params) -> str | LeftOut:
    """The configuration's hash, or why it is left out."""
    try:
        return points.config(params).hash()
    except NotSensibleError as error:
        return error.left_out
    except UserError as error:
        return LeftOut("invalid", str(error))


def _any_text(dimension: Dimension, chosen: random.Random) -> str:
    if dimension.count() is None:
        return dimension.text(
            chosen.uniform(*map(float, (dimension.values[0], dimension.values[-1])))
        )
    return chosen.choice(dimension.values)
