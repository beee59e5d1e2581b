"""What a sweep was asked for, and what it is going to do about it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.space.settings import Settings, identity, objective_text
from openpi_opt.space.space import MOST_VALUES, Space, few_values
from openpi_opt.track.store import Store


@dataclass(frozen=True)
class StudyRequest:
    """What is to be done. `swept` is False for one trial alone, which gets no baseline."""

    name: str
    space: Space
    settings: Settings
    machine: Machine
    command: tuple[str, ...] = ()
    swept: bool = True


@dataclass(frozen=True)
class Plan:
    """Which points are tried: every one in order, or those that a sampler proposes."""

    enumerated: bool
    sampler: str
    text: str


def make_plan(request: StudyRequest) -> Plan:
    """Which points, and who chooses them.

    Raises:
        UserError: every combination was asked for and there is no end of them.
    """
    asked, limit = request.settings.sampler, request.settings.most_trials
    minutes = request.settings.minutes
    raw = request.space.combinations()
    if not request.swept or raw == 1:
        return Plan(True, "grid", "1 configuration")
    known = "a space without end" if raw is None else f"{raw:,} combinations"
    count = raw
    if request.space.count is not None and raw is not None:
        known = f"{request.space.count:,} sensible and different configurations"
        count = request.space.count
    if asked == "grid" and count is None:
        raise UserError(
            "sampler=grid: an interval has no end of values, so not every combination can be "
            "tried.\nUse range(LOW,HIGH,STEP) or a list of values, or sampler=tpe."
        )
    few = count is not None and (count <= limit or request.space.has_steps())
    if asked == "grid" or (asked == "auto" and few):
        every = count is not None and count <= limit
        some = "every one in order" if every else f"the first {limit} in order, by n_trials"
        return Plan(True, "grid", f"{known}, {some} (sampler {asked})")
    name = _sampler(request)
    shown = f"auto: {name}" if asked == "auto" else name
    bounds = [f"{minutes:g} minutes"] if minutes is not None else []
    if minutes is None or request.settings.n_trials is not None:
        bounds.append(f"at most {limit} by n_trials")
    return Plan(False, name, f"{known}, {' and '.join(bounds)} (sampler {shown})")


def _sampler(request: StudyRequest) -> str:
    """The sampler that was asked for, or `stages` where it can be used and else TPE.

    Raises:
        UserError: `stages` was asked for, and the space or the objectives are not for it.
    """
    asked, objectives = request.settings.sampler, request.settings.objective.minimize
    listed, alone = few_values(request.space), objectives == ("latency",)
    if asked == "auto":
        return "stages" if listed and alone else "tpe"
    if asked == "stages" and not alone:
        raise UserError(
            f"sampler=stages minimises the latency alone, not [{','.join(objectives)}].\n"
            "Use sampler=tpe, or leave out objective=."
        )
    if asked == "stages" and not listed:
        raise UserError(
            f"sampler=stages needs at most {MOST_VALUES} values of each key, and no interval.\n"
            "Write the values out (key=16,32,64), or use sampler=tpe."
        )
    return asked


def announce(
    request: StudyRequest, first: Config, store: Store, plan: Plan, display: Display
) -> None:
    """Say what is about to be done, and what `auto` turned into."""
    display.note(f"study {request.name} in {store.path}: {plan.text}")
    device = first.platform.device
    where: str = device
    if device != "cpu" and device != "auto":
        where += f" ({request.machine.gpu(device, first.platform.gpu).name})"
    display.note(f"model {first.model.name} on {where}, workload {first.workload.name}")


def space_hash(
    space: Space, fingerprint_hash: str, objectives: Sequence[str] = ("latency",)
) -> str:
    """What is not to mix: other machines, other overrides shared by all trials, other objectives.

    The objectives count however they were given.
    """
    shared = [line for line in identity(space.fixed) if not re.match(r"objective=\w", line)]
    what = objective_text(objectives)
    deciding = dataclasses.replace(space, fixed=(*shared, *([what] if what else [])))
    text = f"{deciding.hash()} {fingerprint_hash}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]
