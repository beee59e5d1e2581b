"""What a sweep was asked for, what it is judged by, and what it is going to do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display
from openpi_opt.errors import UserError
from openpi_opt.figures import LIMITS
from openpi_opt.machine import Machine
from openpi_opt.measure import power
from openpi_opt.space.points import Points
from openpi_opt.space.settings import Objective, Settings, identity, objective_text
from openpi_opt.space.space import MOST_VALUES, Space, few_values
from openpi_opt.track.store import Store

# `pruning=auto`. A configuration so much slower is no contender: fresh processes of one
# configuration differ by 0.3%.
RACE = 1.05


@dataclass(frozen=True)
class StudyRequest:
    """What is to be done. `swept` is False for one trial alone, which gets no baseline."""

    name: str
    space: Space
    settings: Settings
    machine: Machine
    command: tuple[str, ...] = ()
    swept: bool = True

    @property
    def has_baselines(self) -> bool:
        """Whether the plain policy of each context is measured, too."""
        return self.swept and self.settings.baseline


@dataclass(frozen=True)
class Plan:
    """Which points are tried: every one in order, or those that a sampler proposes."""

    enumerated: bool
    sampler: str
    text: str


def make_plan(request: StudyRequest) -> Plan:
    """Which points, and who chooses them; UserError for a sampler that is not for this space."""
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
    """The sampler that was asked for, or `stages` where it can be used and else TPE."""
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


def enumerated(request: StudyRequest, points: Points) -> Iterator[tuple[dict[str, str], Config]]:
    """The different configurations of an enumeration, up to `n_trials`, with their points."""
    seen: set[str] = set()
    for params in request.space.all():
        try:
            cfg = points.config(params)
        except UserError:
            continue
        if cfg.hash() not in seen:
            seen.add(cfg.hash())
            yield params, cfg
        if len(seen) >= request.settings.most_trials:
            return


def goals(objective: Objective, first: Config, machine: Machine) -> Criteria:
    """The criteria of a sweep whose first configuration is `first`, resolved.

    Raises UserError when energy is an objective and is not told or not to be measured.
    """
    criteria = Criteria.of(objective.minimize, objective.allow_lossy, first.limits)
    if "energy" not in criteria.objectives:
        return criteria
    asked = f"objective=[{','.join(criteria.objectives)}]"
    if first.profile.energy is False:
        raise UserError(
            f"{asked} needs the energy that profile.energy=false leaves unmeasured.\n"
            "Leave that out, or add profile.energy=true behind profile=NAME."
        )
    try:
        with power.open_meter(first, machine):
            return criteria
    except power.NoMeterError as error:
        raise UserError(
            f"{asked}: {error}.\n"
            "Without a figure nothing can be compared by it: mend that, or leave energy out."
        ) from error


def check_limits(criteria: Criteria, cfg: Config) -> None:
    """Refuse a combination with limits of its own, as options may set them: raises UserError."""
    for name in LIMITS:
        own, shared = getattr(cfg.limits, name), criteria.limits.get(name)
        if own != shared:
            raise UserError(
                f"limits.{name}={own} here and {shared} in the first combination: limits judge all "
                "trials of a study.\nGive it one value on the command line."
            )


def with_pruning(
    request: StudyRequest, plan: Plan, criteria: Criteria, display: Display
) -> StudyRequest:
    """The request with `pruning` settled: `auto` resolved, off where it would end the answer."""
    asked, alone = request.settings.pruning, criteria.objectives == ("latency",)
    settled = None if asked == "auto" else asked
    if asked == "auto" and alone and not plan.enumerated:
        settled = RACE
        display.note(
            f"trials surely {RACE - 1:.0%} slower than the best so far end early, as pruned "
            "(pruning=null measures each to its end)"
        )
    if settled is not None and not alone:
        display.note(
            f"pruning={settled:g} is off: with {criteria.objectives_text()} to minimise, a slow "
            "trial may be the best in something else (limits.latency_ms=MS ends what is too slow)"
        )
        settled = None
    settings = request.settings.model_copy(update={"pruning": settled})
    return replace(request, settings=settings)


def check_same(criteria: Criteria, study_dir: Path, busy: bool = False) -> Criteria:
    """The criteria that the study has; a UserError refuses to continue it with other objectives.

    `busy`: other sweeps are at work on it, so it counts as begun without a result, too.
    """
    journal = study_dir / "journal.jsonl"
    before = Criteria.load(study_dir) or Criteria()
    begun = busy or (journal.exists() and journal.stat().st_size)
    if begun and criteria.objectives != before.objectives:
        had, asked = (",".join(each.objectives) for each in (before, criteria))
        study = study_dir.name
        raise UserError(
            f"study {study} was begun with objective=[{had}] and cannot go on with "
            f"objective=[{asked}].\nGive study=NAME another name, or objective=[{had}]; "
            f"`python -m openpi_opt.compare {study} --objective {asked}` judges what it has."
        )
    return before


def settle(criteria: Criteria, study_dir: Path, display: Display, known: bool, busy: bool) -> None:
    """Leave the criteria in the study's folder, for whoever looks at it; says what they are.

    The limits may be others than in the sweep before: its results (`known`: there are some) are
    then judged anew. Of sweeps that run at the same time the last one's limits stay.
    """
    before = check_same(criteria, study_dir, busy)
    if criteria != before:
        criteria.save(study_dir)
    if criteria.several:
        display.note(f"objectives: {criteria.objectives_text()}; the answer is their Pareto set")
    if criteria.limits or before.limits:
        changed = criteria.limits != before.limits and known
        what = criteria.limits_text() or "none"
        display.note(f"limits: {what}" + ("; what is known is judged anew" if changed else ""))


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
    deciding = replace(space, fixed=(*shared, *([what] if what else [])))
    return hashlib.sha256(f"{deciding.hash()} {fingerprint_hash}".encode()).hexdigest()[:8]
