"""A named space made ready for a machine: dead values dropped, defaults first, starts filled in.

A space of a few thousand combinations is walked through and counted. Of a larger one every value is
composed alone and dropped where a knob refuses it; the counts are estimated from random points.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.space.dimensions import Choices, Dimension
from openpi_opt.space.points import Compose, LeftOut, NotSensibleError, Points, left_out
from openpi_opt.space.space import Space

MAX_WALK = 20_000
SAMPLE = 2_000
# Of processor time, for each of the two estimates.
SAMPLE_SECONDS = 0.75
# A dimension with more values than this is not looked through value by value.
_MAX_LOOKED_THROUGH = 64


@dataclass
class Count:
    """Combinations of a space: `raw` as written, `sensible` ones, and `distinct` configurations.

    `sensible` and `distinct` are exact where what can run was walked through, else estimates from
    `drawn` random combinations. `raw` is None where a dimension is continuous. `left_out` has the
    number of combinations by reason, an estimate where values were dropped before; `alive` has the
    values of each dimension that can occur.
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
    raw = space.combinations()
    if raw is not None and raw <= MAX_WALK:
        found = _walk(space, compose, machine, allow_lossy)
    else:
        found = _estimate(space, compose, machine, allow_lossy)
    if not space.sensible_only:
        return space, found
    dimensions = dict(space.dimensions)
    if found.sensible or not found.exact:
        dimensions = {key: _kept(d, found.alive[key]) for key, d in dimensions.items()}
    dimensions = {key: _default_first(space, compose, key, d) for key, d in dimensions.items()}
    firsts = {key: dimension.texts()[0] for key, dimension in dimensions.items()}
    start = {
        name: {**firsts, **params}
        for name, params in space.start.items()
        if all(text in dimensions[key].texts() for key, text in params.items())
    }
    known = found.distinct if found.exact else None
    ready = dataclasses.replace(space, dimensions=dimensions, start=start, count=known)
    return ready, found


def require_some(space: Space, found: Count) -> None:
    """Refuse a named space of which nothing can run here. Raises UserError: with the most frequent
    reason."""
    if space.sensible_only and found.exact and not found.sensible:
        reason = max(found.left_out, key=lambda reason: found.left_out[reason])
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
            values = space.dimensions[key].texts()
            if space.dimensions[key].count() is not None and text not in values:
                raise UserError(
                    f"space: start {name} says {key}={text}, and the space has {', '.join(values)}."
                    "\nTake it out, or add the value."
                )


def _kept(dimension: Dimension, alive: Iterable[str]) -> Dimension:
    if not isinstance(dimension, Choices):
        return dimension
    return dimension.only([text for text in dimension.values if text in set(alive)])


def _default_first(space: Space, compose: Compose, key: str, dimension: Dimension) -> Dimension:
    if not isinstance(dimension, Choices) or len(dimension.values) > _MAX_LOOKED_THROUGH:
        return dimension
    plain = compose(space.overrides({}))
    for text in dimension.values:
        try:
            if compose(space.overrides({key: text})) == plain:
                others = [other for other in dimension.values if other != text]
                return dimension.only([text, *others])
        except UserError:  # a value that is right only together with others
            continue
    return dimension


def _walk(space: Space, compose: Compose, machine: Machine, allow_lossy: bool) -> Count:
    """Look at every combination."""
    points = Points(dataclasses.replace(space, sensible_only=True), compose, machine, allow_lossy)
    found = Count(space.combinations(), alive={key: set() for key in space.dimensions})
    hashes = set()
    for params in space.all():
        reason = _hash_of(points, params)
        if isinstance(reason, LeftOut):
            found.left_out[reason] += 1
            continue
        hashes.add(reason)
        found.sensible += 1
        for key, text in params.items():
            found.alive[key].add(text)
    found.distinct = len(hashes)
    return found


def _hash_of(points: Points, params: dict[str, str]) -> str | LeftOut:
    """The configuration's hash, or why it is left out."""
    try:
        return points.config(params).hash()
    except NotSensibleError as error:
        return error.left_out
    except UserError as error:
        return LeftOut("invalid", str(error))


def _estimate(space: Space, compose: Compose, machine: Machine, allow_lossy: bool) -> Count:
    """Drop dead values; walk through what is left, or draw combinations of it.

    The number of different configurations is the sum of 1 / m over the sensible combinations, where
    m are the combinations with the same canonical form. A combination's m is taken for the product
    of what each dimension alone contributes: its values that leave the form as it is.
    """
    found = Count(space.combinations())
    dimensions = {
        key: _live(space, compose, machine, allow_lossy, key, found) for key in space.dimensions
    }
    found.alive = {
        key: set(d.texts()) if isinstance(d, Choices) else set() for key, d in dimensions.items()
    }
    living = dataclasses.replace(space, dimensions=dimensions, sensible_only=True)
    if (living.combinations() or MAX_WALK + 1) <= MAX_WALK:
        walked = _walk(living, compose, machine, allow_lossy)
        walked.raw, walked.left_out = found.raw, walked.left_out + found.left_out
        return walked
    points = Points(living, compose, machine, allow_lossy)
    chosen = random.Random(0)
    reasons: Counter[LeftOut] = Counter()
    sensible: list[tuple[dict[str, str], str]] = []
    end = time.process_time() + SAMPLE_SECONDS
    while found.drawn < SAMPLE and (time.process_time() < end or not found.drawn):
        found.drawn += 1
        params = {key: _any_text(d, chosen) for key, d in dimensions.items()}
        known = _hash_of(points, params)
        if isinstance(known, LeftOut):
            reasons[known] += 1
        else:
            sensible.append((params, known))
    found.drawn_sensible = len(sensible)
    each = (living.combinations() or 0) / found.drawn
    found.sensible = round(len(sensible) * each)
    found.left_out += Counter({reason: round(n * each) for reason, n in reasons.items()})
    found.distinct = round(found.sensible * _share_of_different(points, dimensions, sensible))
    return found


def _share_of_different(
    points: Points, dimensions: dict[str, Dimension], sensible: list[tuple[dict[str, str], str]]
) -> float:
    """The mean of 1 / m over sensible combinations, as many as time allows."""
    shares: list[float] = []
    end = time.process_time() + SAMPLE_SECONDS
    for params, known in sensible:
        same = [
            sum(_hash_of(points, {**params, key: text}) == known for text in dimension.texts())
            for key, dimension in dimensions.items()
            if isinstance(dimension, Choices) and len(dimension.values) <= _MAX_LOOKED_THROUGH
        ]
        shares.append(1 / math.prod(max(1, number) for number in same))
        if time.process_time() > end:
            break
    return statistics.fmean(shares) if shares else 0.0


def _live(
    space: Space, compose: Compose, machine: Machine, allow_lossy: bool, key: str, found: Count
) -> Dimension:
    """A dimension without the values that a knob calls unavailable or lossy when they are alone."""
    dimension = space.dimensions[key]
    if not isinstance(dimension, Choices) or len(dimension.values) > _MAX_LOOKED_THROUGH:
        return dimension

    def reason(params: dict[str, str]) -> LeftOut | None:
        try:
            cfg = compose(space.overrides(params)).resolved(machine)
        except UserError:  # right only together with others, or not at all
            return None
        return left_out(cfg, machine, allow_lossy)

    plain, alive = reason({}), []
    for text in dimension.values:
        why = reason({key: text})
        if why is None or why.kind == "invalid" or why == plain:
            alive.append(text)
        else:
            found.left_out[why] += (found.raw or 0) // len(dimension.values)
    return dimension.only(alive) if alive else dimension


def _any_text(dimension: Dimension, chosen: random.Random) -> str:
    if dimension.count() is None:
        low, *_, high = map(float, dimension.texts())
        return dimension.text(chosen.uniform(low, high))
    return chosen.choice(dimension.texts())
