"""Named search spaces, the options of the group `space`: words of a command line, kept in a file.

`sweep` holds sweeps in Hydra's syntax. With `knobs` every knob is swept, too: by its options, or by
each of its switches if it is among `switches`. `steps` is a list of points instead of a product,
each with the overrides of those before it. `start` holds points that a sampler begins with. What
the command line says of a key, or of the whole group, wins over the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.space.dimensions import Dimension, key_values
from openpi_opt.space.space import Options, Space, parse_override

# The name that the steps have among the dimensions; no group and no key is called so.
STEP = "step"


class NamedSpace(BaseModel):
    """One file of `conf/space/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sweep: tuple[str, ...] = ()
    knobs: bool = False
    switches: tuple[str, ...] = ()
    steps: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    start: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    def is_empty(self) -> bool:
        """Whether it adds no dimension: `space=none`."""
        return not self.sweep and not self.steps and not self.knobs

    def join(self, arguments: Sequence[str], options: Options | None = None) -> Space:
        """The search space of a command line together with this one. Raises UserError: bad syntax
        on the command line or in the file."""
        if self.is_empty():
            return Space.parse(arguments, options)
        taken = [_key(line) for line in arguments]
        kept = [line for line in self._lines() if not _is_taken(_key(line), taken)]
        space = Space.parse([*kept, *arguments], options)
        dimensions = dict(space.dimensions)
        if self.steps:
            dimensions = {STEP: Dimension.of_bundles(self._cumulative(taken)), **dimensions}
        if not dimensions:
            raise UserError(
                "the command line gives one value to all that the space sweeps.\n"
                "Leave out an override, or the space."
            )
        start = {name: _params(each, taken, name) for name, each in self._starts(arguments).items()}
        return Space(dimensions, space.fixed, sensible_only=True, start=start)

    def _lines(self) -> list[str]:
        """The sweeps: what the file says of a knob wins over the registry, in the knobs' order."""
        rest, found = {_key(line): line for line in self.sweep}, list[str]()
        for knob in KNOBS if self.knobs else ():
            keys = [f"{knob.name}.{name}" for name in knob.options_type.model_fields]
            own = [key for key in keys if key_values(key)]
            for key in own if knob.name in self.switches else [knob.name]:
                found.append(rest.pop(key, f"{key}=glob(*)"))
            found += [rest.pop(key) for key in [*rest] if key.split(".")[0] == knob.name]
        return [*found, *rest.values()]

    def _starts(self, arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The file's, or those of `space.start={...}`, which Hydra would add to the file's."""
        given = [parse_override(line) for line in arguments if _key(line) == "space.start"]
        if not given:
            return self.start
        value = given[-1].value()
        if not isinstance(value, dict):
            raise UserError("space.start names points: {NAME: [key=value]}, or {} for none.")
        return {str(name): tuple(map(str, lines)) for name, lines in value.items()}

    def _cumulative(self, taken: Sequence[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        standing: dict[str, str] = {}
        for name, lines in self.steps.items():
            standing |= {_key(line): line for line in lines if not _is_taken(_key(line), taken)}
            found[name] = tuple(standing.values())
        return found


def chosen_starts(space: Space, names: Sequence[str] | None) -> Space:
    """The space with these of its starting points, in this order; None for all of them. Raises
    UserError: a name that the space does not have."""
    if names is None:
        return space
    unknown = [name for name in names if name not in space.start]
    if unknown:
        known = ", ".join(space.start) or "none"
        raise UserError(
            f"start=[{','.join(names)}]: the space has no point {', '.join(unknown)}; it has "
            f"{known}.\nUse start=[] to begin blind, or leave it out for all of them."
        )
    return dataclasses.replace(space, start={name: space.start[name] for name in names})


def _params(lines: Iterable[str], taken: Sequence[str], name: str) -> dict[str, str]:
    """The overrides of a start as swept keys and their texts."""
    wrong = [line for line in lines if "=" not in line]
    if wrong:
        raise UserError(f"start {name}: {wrong[0]!r} is not an override. Write key=value.")
    pairs = (line.split("=", 1) for line in lines)
    return {key: text for key, text in pairs if not _is_taken(key, taken)}


def _key(line: str) -> str:
    return parse_override(line).key_or_group


def _is_taken(key: str, taken: Iterable[str]) -> bool:
    """Whether the command line names the key itself, or chooses an option of its group."""
    return any(key == other or key.startswith((f"{other}.", f"{other}@")) for other in taken)
