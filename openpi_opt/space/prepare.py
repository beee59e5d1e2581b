"""A named space made ready for a machine: dead values dropped, defaults first, starts filled in."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.space.counting import Count, count
from openpi_opt.space.dimensions import Choices, Dimension
from openpi_opt.space.factors import NotFactorableError
from openpi_opt.space.points import Compose, Points
from openpi_opt.space.sensible import LeftOut, NotSensibleError
from openpi_opt.space.space import Space

SAMPLE = 2_000
SAMPLE_SECONDS = 2.0
# A dimension with more values than this is not looked through for its default.
_MAX_LOOKED_THROUGH = 64


@dataclass(frozen=True)
class Sample:
    """What was found among `drawn` random combinations of a space that could not be counted."""

    drawn: int
    sensible: int
    distinct: int
    left_out: dict[LeftOut, int]
    why: str

    def share(self) -> tuple[float, float]:
        """95% interval (Wilson) of the share of sensible combinations."""
        from scipy.stats import binomtest

        interval = binomtest(self.sensible, self.drawn).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)


def prepare(
    space: Space, compose: Compose, machine: Machine, allow_lossy: bool
) -> tuple[Space, Count | Sample]:
    """Count a space; of a named one, also leave only the values that can occur here.

    Values are dropped only where the count is exact. The value that the configuration has without
    the space comes first, so that an enumeration begins at the defaults, and starting points stand
    there in all that they do not name.

    Raises:
        UserError: a starting point names what the space does not sweep.
    """
    _check_starts(space)
    try:
        found: Count | Sample = count(space, compose, machine, allow_lossy)
    except NotFactorableError as error:
        found = _sample(space, compose, machine, allow_lossy, str(error))
    if not space.sensible_only:
        return space, found
    dimensions = dict(space.dimensions)
    if isinstance(found, Count) and found.sensible:
        dimensions = {key: _kept(d, found.alive[key]) for key, d in dimensions.items()}
    dimensions = {key: _default_first(space, compose, key, d) for key, d in dimensions.items()}
    firsts = {key: dimension.texts()[0] for key, dimension in dimensions.items()}
    start = {
        name: {**firsts, **params}
        for name, params in space.start.items()
        if all(text in dimensions[key].texts() for key, text in params.items())
    }
    known = found.distinct if isinstance(found, Count) else None
    ready = dataclasses.replace(space, dimensions=dimensions, start=start, count=known)
    return ready, found


def require_some(space: Space, found: Count | Sample) -> None:
    """Refuse a named space of which nothing can run here.

    Raises:
        UserError: with the most frequent reason.
    """
    if space.sensible_only and isinstance(found, Count) and not found.sensible:
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


def _sample(
    space: Space, compose: Compose, machine: Machine, allow_lossy: bool, why: str
) -> Sample:
    points = Points(dataclasses.replace(space, sensible_only=True), compose, machine, allow_lossy)
    chosen = random.Random(0)
    reasons: dict[LeftOut, int] = {}
    hashes: list[str] = []
    end = time.monotonic() + SAMPLE_SECONDS
    drawn = 0
    while drawn < SAMPLE and time.monotonic() < end:
        drawn += 1
        params = {key: _any_text(d, chosen) for key, d in space.dimensions.items()}
        try:
            hashes.append(points.config(params).hash())
        except NotSensibleError as error:
            reasons[error.left_out] = reasons.get(error.left_out, 0) + 1
        except UserError as error:
            reason = LeftOut("invalid", str(error))
            reasons[reason] = reasons.get(reason, 0) + 1
    return Sample(drawn, len(hashes), len(set(hashes)), reasons, why)


def _any_text(dimension: Dimension, chosen: random.Random) -> str:
    if dimension.count() is None:
        low, *_, high = map(float, dimension.texts())
        return dimension.text(chosen.uniform(low, high))
    return chosen.choice(dimension.texts())
