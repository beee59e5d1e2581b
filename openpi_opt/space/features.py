"""A configuration as the options that are not at their default, and a result as its parts.

The canonical form counts: an option that nothing reads is not a feature. So the launch parameters
of a kernel are features only where that kernel runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from openpi_opt.config import Config
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import STAGES
from openpi_opt.result import Ok, Pruned, TrialResult
from openpi_opt.space.space import Space

# The time in which no kernel runs: launches that the host is late with, gaps, waiting.
IDLE = "idle"
PARTS, TOTAL, SECONDS = "parts_ms", "total_ms", "seconds"  # attributes of a trial in Optuna
# Expected where the default is what measuring found best, and where a trial is declared short.
TUNED, QUICK = (0.02, 0.03), (-0.7, 0.3)
# Of the call, at least this share: a profile's times are not exact to more.
_LEAST_IDLE = 0.01


def features(cfg: Config, space: Space, params: Mapping[str, str]) -> dict[str, str]:
    """Options of the knobs that differ from their defaults, and what else the space sweeps. Of keys
    that belong to no knob (`weights.seed`) the value as written, unless it is the first."""
    found = {
        f"{name}.{key}": text
        for name, options in cfg.canonical().knobs.items()
        for key, text in _changed(options, _default(type(options)), "")
    }
    for key, text in params.items():
        if key.split(".")[0] not in BY_NAME and text != space.dimensions[key].values[0]:
            found[key] = text
    return found


@functools.cache
def touched(key: str) -> tuple[str, ...]:
    """The stages that a feature can change: as its knob declares, else all."""
    name, _, option = key.partition(".")
    return BY_NAME[name].touches(option) if name in BY_NAME else STAGES


def is_slow(found: Mapping[str, str]) -> bool:
    """Whether an option makes the first call take minutes, as its knob declares."""
    return any(
        text in BY_NAME[key.split(".")[0]].slow.get(key.partition(".")[2], ())
        for key, text in found.items()
        if key.split(".")[0] in BY_NAME
    )


@functools.cache
def is_tuned(key: str) -> bool:
    """Whether the default of a feature is what measuring found best, as its knob declares."""
    name, _, option = key.partition(".")
    return name in BY_NAME and option.split(".")[0] in BY_NAME[name].tuned


@functools.cache
def quick_values() -> dict[str, str]:
    """By key, the values with which a trial is short."""
    return {f"{k.name}.{option}": text for k in KNOBS for option, text in k.quick.items()}


def expected_time(key: str, text: str) -> tuple[float, float] | None:
    """Mean and scale of what an option adds to a log time, where its knob declares something."""
    return TUNED if is_tuned(key) else None


def expected_seconds(key: str, text: str) -> tuple[float, float] | None:
    """The same for the log seconds of a trial."""
    return QUICK if quick_values().get(key) == text else None


def parts(result: TrialResult) -> dict[str, float]:
    """Milliseconds of each stage and `IDLE`, which sum to the latency; empty where not known. Times
    under the profiler are scaled down where they exceed the call that was timed without it."""
    if not isinstance(result, Ok | Pruned) or result.kernels is None:
        return {}
    stages = {name: ms for name, ms in result.kernels.stage_ms.items() if ms > 0}
    total = mean_ms(result)
    busy = sum(stages.values())
    if not stages or total is None:
        return {}
    scale = min(1.0, (1 - _LEAST_IDLE) * total / busy)
    return {**{name: ms * scale for name, ms in stages.items()}, IDLE: total - busy * scale}


def mean_ms(result: TrialResult) -> float | None:
    """The mean of a call as far as it was measured; None where it was not."""
    if isinstance(result, Ok):
        return result.latency.mean_ms
    return result.seen_mean_ms if isinstance(result, Pruned) else None


def seconds(result: TrialResult) -> float:
    """What the trial took of a device and the host, without waiting for others."""
    return sum(
        spent for phase, spent in result.phase_seconds.items() if phase not in ("wait", "queue")
    )


_default = functools.cache(lambda kind: kind())


def _changed(options: BaseModel, default: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    if options == default:
        return
    for name in type(options).model_fields:
        value, plain = getattr(options, name), getattr(default, name)
        if isinstance(value, BaseModel):
            yield from _changed(value, plain, f"{prefix}{name}.")
        elif value != plain:
            yield f"{prefix}{name}", _text(value)


def _text(value: Any) -> str:
    return str(sorted(value.items())) if isinstance(value, dict) else str(value)
