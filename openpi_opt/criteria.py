"""What results are judged by: the objectives of a study, and the limits that a result must keep.

Judging does not belong to a measurement: it reads results. So the same results are judged again
when the limits change. Nothing here knows how a study is searched or shown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from openpi_opt.config import Limits
from openpi_opt.errors import UserError, first_reason
from openpi_opt.figures import LIMITS, OBJECTIVES, Figure
from openpi_opt.result import Ok, Pruned, TrialResult, write_atomic

_FILE = "criteria.json"


def _known(names: Iterable[str]) -> AfterValidator:
    known = list(names)

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown, use one of {', '.join(known)}")
        return name

    return AfterValidator(check)


ObjectiveName = Annotated[str, _known(OBJECTIVES)]
LimitName = Annotated[str, _known(LIMITS)]


def in_order(names: Iterable[str]) -> list[str]:
    """Objectives in the order in which they are always shown and told: latency first."""
    return sorted(names, key=lambda name: (name != "latency", name))


class Criteria(BaseModel):
    """What counts as better, and what as too much. `objectives` are minimised; of several, the
    Pareto set is the answer. A result above one of `limits` (in the unit of its name) is not an
    answer, and a lossy one only with `allow_lossy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objectives: tuple[ObjectiveName, ...] = Field(("latency",), min_length=1)
    allow_lossy: bool = False
    limits: dict[LimitName, float] = Field(default_factory=dict)

    @field_validator("objectives")
    @classmethod
    def _with_latency_and_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("each objective is named once")
        if not any(OBJECTIVES[name].unit == "ms" for name in names):
            raise ValueError(
                "latency (or its p95 or p99) must be among the objectives: by it configurations "
                f"are confirmed and promoted. The Pareto set of [{','.join(['latency', *names])}] "
                f"holds the least {names[0]} as well"
            )
        return tuple(in_order(names))

    @staticmethod
    def of(objectives: Sequence[ObjectiveName], allow_lossy: bool, limits: Limits) -> Criteria:
        """The criteria of a sweep."""
        given = {name: getattr(limits, name) for name in LIMITS}
        return Criteria(
            objectives=tuple(objectives),
            allow_lossy=allow_lossy,
            limits={name: value for name, value in given.items() if value is not None},
        )

    @staticmethod
    def load(study_dir: Path) -> Criteria | None:
        """The criteria of a study's newest sweep; None: latency alone, without limits. Raises
        UserError: the file is damaged."""
        path = study_dir / _FILE
        try:
            return Criteria.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged: {first_reason(error)}.\n"
                "Move it away and run the sweep again: no result depends on it."
            ) from None

    def save(self, study_dir: Path) -> None:
        """Write them into the study's folder. Raises OSError: the folder cannot be written."""
        write_atomic(study_dir / _FILE, self.model_dump_json(indent=1) + "\n")

    def allowing(self, allow_lossy: bool) -> Criteria:
        """These criteria, with lossy results admitted if `allow_lossy`."""
        return self.model_copy(update={"allow_lossy": self.allow_lossy or allow_lossy})

    @property
    def several(self) -> bool:
        """Whether there is a Pareto set instead of a best one."""
        return len(self.objectives) > 1

    def figures(self) -> list[Figure]:
        """Of the objectives, in their order."""
        return [OBJECTIVES[name] for name in self.objectives]

    def shown(self) -> list[Figure]:
        """What a table shows next to the latency: the other objectives, then what is limited."""
        found = [*self.figures(), *(LIMITS[name] for name in self.limits)]
        return [figure for figure in dict.fromkeys(found) if figure.key != "mean_ms"]

    def values(self, result: TrialResult) -> tuple[float, ...] | None:
        """The objectives of a result; None unless it is ok and has them all."""
        if not isinstance(result, Ok):
            return None
        found = [figure.value(result) for figure in self.figures()]
        known = tuple(value for value in found if value is not None and math.isfinite(value))
        return known if len(known) == len(found) else None

    def excess(self, result: TrialResult) -> dict[str, float]:
        """By limit, how far a result is above it, as a share of the limit; at most 0 is kept. A
        pruned result has its guard's figure and the least that its latency can be; other outcomes
        have none."""
        return {
            name: value / self.limits[name] - 1 for name, value in self._limited(result).items()
        }

    def over(self, result: TrialResult) -> dict[str, str]:
        """By limit that a result does not keep, what it has instead: {"peak_mib": "912.0 MiB"}."""
        return {
            name: LIMITS[name].text(value)
            for name, value in self._limited(result).items()
            if value > self.limits[name]
        }

    def limits_text(self) -> str:
        """The limits by their names below `limits`."""
        return ", ".join(f"{name}={value:g}" for name, value in self.limits.items())

    def objectives_text(self) -> str:
        """The objectives in a sentence: "latency, energy and memory"."""
        *first, last = self.objectives
        return f"{', '.join(first)} and {last}" if first else last

    def _limited(self, result: TrialResult) -> dict[LimitName, float]:
        found: dict[LimitName, float | None] = {}
        if isinstance(result, Ok):
            found = {name: LIMITS[name].value(result) for name in self.limits}
        elif isinstance(result, Pruned):
            found = {name: LIMITS[name].seen(result) for name in self.limits}
        return {name: value for name, value in found.items() if value is not None}


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points belong to the Pareto set: none is as small in all places and smaller in one.
    Equal points belong to it together. Takes the points in lexical order: whatever dominates one
    comes before it, and some of that is in the set."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: tuple(points[number])):
        if not any(dominates(points[other], points[number]) for other in front):
            front.append(number)
    chosen = set(front)
    return [number in chosen for number in range(len(points))]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is at most `other` in all places and below it in one."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def add_arguments(parser: argparse.ArgumentParser, objectives: bool = False) -> None:
    """`--limit NAME=VALUE`, and `--objective A,B`, for verbs that judge a study's results."""
    parser.add_argument(
        "--limit",
        action="append",
        type=_limit,
        default=[],
        metavar="NAME=VALUE",
        help=f"judge by this limit instead of the sweep's: {', '.join(LIMITS)}; "
        "NAME=none lifts one. May be given several times",
    )
    if objectives:
        parser.add_argument(
            "--objective",
            type=_objectives,
            metavar="A,B",
            help=f"mark the Pareto set of these instead of the sweep's: {', '.join(OBJECTIVES)}",
        )


def of_arguments(arguments: argparse.Namespace, study_dir: Path) -> Criteria:
    """The study's own criteria with what the command line says instead. Lossy results are admitted
    by the command line alone. Raises UserError: the study's file is damaged."""
    found = Criteria.load(study_dir) or Criteria()
    limits = {**found.limits, **dict(arguments.limit)}
    return Criteria(
        objectives=getattr(arguments, "objective", None) or found.objectives,
        allow_lossy=arguments.allow_lossy,
        limits={name: value for name, value in limits.items() if value is not None},
    )


def over_text(over: Mapping[str, str]) -> str:
    """What `Criteria.over` found, in words."""
    return ", ".join(f"{name}: {text}" for name, text in over.items())


def _limit(text: str) -> tuple[str, float | None]:
    name, _, value = text.partition("=")
    if name not in LIMITS:
        raise argparse.ArgumentTypeError(f"{text}: no limit; they are {', '.join(LIMITS)}")
    if value in ("none", "null"):
        return name, None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0, or none to lift it")
    return name, number


def _objectives(text: str) -> tuple[str, ...]:
    try:
        found = Criteria.model_validate({"objectives": text.strip("[]").split(",")})
    except ValidationError as error:
        raise argparse.ArgumentTypeError(f"{text}: {first_reason(error)}") from None
    return found.objectives
