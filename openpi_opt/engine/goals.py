"""What a study is to be judged by, settled before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.plan import Plan, StudyRequest
from openpi_opt.errors import UserError
from openpi_opt.figures import LIMITS
from openpi_opt.machine import Machine
from openpi_opt.measure import power
from openpi_opt.space.settings import Objective

# `pruning=auto`. A configuration so much slower is no contender: fresh processes of one
# configuration differ by 0.3%.
RACE = 1.05


def goals(objective: Objective, first: Config, machine: Machine) -> Criteria:
    """The criteria of a sweep whose first configuration is `first`, resolved.

    Raises:
        UserError: energy is an objective, and this machine does not tell it, or the sweep says
            that it is not to be measured.
    """
    criteria = Criteria.of(objective.minimize, objective.allow_lossy, first.limits)
    if "energy" in criteria.objectives:
        _require_energy(criteria, first, machine)
    return criteria


def check_limits(criteria: Criteria, cfg: Config) -> None:
    """Refuse a combination with limits of its own, as options may set them.

    Raises:
        UserError: names the limit.
    """
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
    return dataclasses.replace(request, settings=settings)


def check_same(criteria: Criteria, study_dir: Path) -> None:
    """Refuse to continue a study with other objectives than it was begun with.

    Raises:
        UserError: says both.
    """
    journal = study_dir / "journal.jsonl"
    if journal.exists() and journal.stat().st_size:
        _refuse_others(criteria, Criteria.load(study_dir) or Criteria(), study_dir.name)


def settle(criteria: Criteria, ledger: Ledger, display: Display) -> None:
    """Leave the criteria in the study's folder, for whoever looks at it; says what they are.

    The limits may be others than in the sweep before: its results are then judged anew. Sweeps
    that run at the same time on one study have the same objectives; the last one's limits stay.

    Raises:
        UserError: the study is one of other objectives.
    """
    with ledger.planning():
        known = Criteria.load(ledger.study_dir)
        before = known or Criteria()
        if ledger.journal.records() or ledger.others:
            _refuse_others(criteria, before, ledger.study_dir.name)
        if criteria != before:
            criteria.save(ledger.study_dir)
    if criteria.several:
        display.note(f"objectives: {criteria.objectives_text()}; the answer is their Pareto set")
    if criteria.limits or before.limits:
        changed = criteria.limits != before.limits and bool(ledger.journal.records())
        what = criteria.limits_text() or "none"
        display.note(f"limits: {what}" + ("; what is known is judged anew" if changed else ""))


def _refuse_others(criteria: Criteria, before: Criteria, study: str) -> None:
    if criteria.objectives != before.objectives:
        had, asked = (",".join(each.objectives) for each in (before, criteria))
        raise UserError(
            f"study {study} was begun with objective=[{had}] and cannot go on with "
            f"objective=[{asked}].\nGive study=NAME another name, or objective=[{had}]; "
            f"`python -m openpi_opt.compare {study} --objective {asked}` judges what it has."
        )


def _require_energy(criteria: Criteria, first: Config, machine: Machine) -> None:
    asked = f"objective=[{','.join(criteria.objectives)}]"
    if first.profile.energy is False:
        raise UserError(
            f"{asked} needs the energy that profile.energy=false leaves unmeasured.\n"
            "Leave that out, or add profile.energy=true behind profile=NAME."
        )
    try:
        with power.open_meter(first, machine):
            pass
    except power.NoMeterError as error:
        raise UserError(
            f"{asked}: {error}.\n"
            "Without a figure nothing can be compared by it: mend that, or leave energy out."
        ) from error
