"""A search space taken apart: dimensions that change one knob only can be counted by themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from openpi_opt.config import SECTIONS, Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import Options
from openpi_opt.machine import Machine
from openpi_opt.space.points import Compose
from openpi_opt.space.space import Space

MAX_VALUES = 20_000
MAX_BASES = 256


class NotFactorableError(Exception):
    """The space cannot be taken apart, or into too many parts; says why."""


@dataclass
class Value:
    """Options of a knob, or why the schema refuses them, with the points that give them."""

    options: Options | None
    reason: str
    points: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Base:
    """One choice of all that is no knob: a resolved configuration and what each knob can be.

    `params` is the choice, `keys` the dimensions of each knob, in the order of `Value.points`.
    Without `cfg` the choice itself is refused, for `reason`; it stands for `size` points.
    """

    params: dict[str, str]
    cfg: Config | None
    reason: str
    keys: dict[str, tuple[str, ...]]
    values: dict[str, list[Value]]
    size: int


def bases(space: Space, compose: Compose, machine: Machine) -> Iterator[Base]:
    """Take `space` apart.

    Raises:
        NotFactorableError: a continuum, too many values, or a dimension that changes several knobs.
    """
    keys: dict[str, list[str]] = {knob.name: [] for knob in KNOBS}
    others: list[str] = []
    for key in space.dimensions:
        head = key.lstrip("+").split(".")[0]
        keys.get(head, others).append(key)
    _check_sizes(space, keys, others)
    own = {name: tuple(knob_keys) for name, knob_keys in keys.items()}
    for params in _products(space, others):
        yield _base(space, compose, machine, params, own)


def _check_sizes(space: Space, keys: Mapping[str, Sequence[str]], others: Sequence[str]) -> None:
    counts = {key: dimension.count() for key, dimension in space.dimensions.items()}
    for key, count in counts.items():
        if count is None:
            raise NotFactorableError(f"{key} has no end of values")
    sizes = {key: count for key, count in counts.items() if count is not None}
    if math.prod(sizes[key] for key in others) > MAX_BASES:
        raise NotFactorableError(f"{', '.join(others)} have too many combinations")
    for name, knob_keys in keys.items():
        if math.prod(sizes[key] for key in knob_keys) > MAX_VALUES:
            raise NotFactorableError(f"the keys of {name} have too many combinations")


def _base(
    space: Space,
    compose: Compose,
    machine: Machine,
    params: dict[str, str],
    keys: dict[str, tuple[str, ...]],
) -> Base:
    size = math.prod(len(space.dimensions[key].texts()) for part in keys.values() for key in part)
    try:
        plain = compose(space.overrides(params))
        cfg = plain.resolved(machine)
    except UserError as error:
        return Base(params, None, str(error), keys, {}, size)
    values = {name: _values(space, compose, params, plain, name, keys[name]) for name in BY_NAME}
    return Base(params, cfg, "", keys, values, size)


def _values(
    space: Space,
    compose: Compose,
    params: dict[str, str],
    plain: Config,
    name: str,
    keys: Sequence[str],
) -> list[Value]:
    """The different options that the dimensions of one knob lead to."""
    found: dict[str, Value] = {}
    for point in _products(space, keys):
        try:
            composed = compose(space.overrides({**params, **point}))
        except UserError as error:
            value, key = Value(None, str(error)), f"!{error}"
        else:
            if not _differs_in(composed, plain, name):
                raise NotFactorableError(f"{', '.join(keys)} change more than {name}")
            value, key = Value(composed.knobs[name], ""), repr(composed.knobs[name])
        found.setdefault(key, value).points.append(tuple(point.values()))
    return list(found.values())


def _differs_in(composed: Config, plain: Config, name: str) -> bool:
    """Whether `name` is all that sets the two apart."""
    knobs = all(composed.knobs[other] == plain.knobs[other] for other in BY_NAME if other != name)
    return knobs and all(getattr(composed, s) == getattr(plain, s) for s in SECTIONS)


def _products(space: Space, keys: Sequence[str]) -> Iterator[dict[str, str]]:
    columns = [space.dimensions[key].texts() for key in keys]
    for values in itertools.product(*columns):
        yield dict(zip(keys, values, strict=True))
