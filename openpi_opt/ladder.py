"""Add the knobs of a configuration one at a time: `python -m openpi_opt.ladder STUDY`.

First the way is found, greedy by gain: at each step every knob that is left is tried on top of
what is there, in interleaved processes, and the one that gains most is kept. Then all rungs of the
way are measured again, each in fresh processes, interleaved; only these give the figures, so no
step looks good because it was chosen for looking good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openpi_opt import cli
from openpi_opt.confirm.judge import Confirmed, Gain
from openpi_opt.confirm.steps import Knobs
from openpi_opt.errors import UserError
from openpi_opt.session import (
    Report,
    Session,
    cells,
    interval,
    percent,
    plain,
    target_parser,
    target_session,
    why,
)
from openpi_opt.track.plots import Point

BASELINE = "baseline"
_HEADS = [
    *("added", "mean ms", "interval"),
    *("saved by the step", "interval", "verdict", "of the baseline"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Find the way, measure its rungs, write table and plot. Returns 0."""
    arguments = _parser().parse_args(argv)
    found = target_session("ladder", arguments)
    with found.alone(arguments.device):
        ladder = measure(found, climb(found, arguments.screening))
    found.write(report(found, ladder))
    return 0


@dataclass(frozen=True)
class Way:
    """The knobs in the order in which they are added, and what was found on the way.

    `remarks` holds, by knob, why it could not be taken alone or failed when tried.
    """

    additions: list[Knobs]
    remarks: dict[str, str]
    idle: list[str]


@dataclass(frozen=True)
class Rung:
    """A measured rung: what it adds, its means, and its gain over the rung below and the bottom."""

    added: str
    measured: Confirmed
    step: Gain | None
    total: Gain | None


@dataclass(frozen=True)
class Ladder:
    """Rungs from the baseline up, what failed when measured, the way's remarks, and flags."""

    rungs: list[Rung]
    failed: dict[str, str]
    way: Way
    flagged: list[str]


def climb(found: Session, screening: int) -> Way:
    """Find the order of the knobs, greedy by gain. Raises UserError: the baseline does not run."""
    target, have = found.target, frozenset[str]()
    additions: list[Knobs] = []
    remarks: dict[str, str] = {}
    broken: set[Knobs] = set()  # whole configurations that failed when they were tried
    while missing := frozenset(target.knobs) - have:
        moves = target.additions(have)
        remarks = {**moves.refused, **remarks}
        candidates = [names for names in moves.sets if have | names not in broken]
        if not candidates:
            if target.having(have).hash() == target.config.hash():
                break  # what is left changes nothing
            candidates = [missing]
        if len(candidates) > 1:
            best, failures = _best(found, have, candidates, screening)
            for names, reason in failures.items():
                broken.add(have | names)
                remarks[target.label(names)] = reason
            if best is None:
                continue
        else:
            best = candidates[0]
        additions.append(best)
        have |= best
        cli.say(f"step {len(additions)}: {target.label(best)}")
    idle = [name for name in target.knobs if name not in have]
    return Way(additions, remarks, idle)


def _best(
    found: Session, have: Knobs, candidates: Sequence[Knobs], screening: int
) -> tuple[Knobs | None, dict[Knobs, str]]:
    """The candidate that gains most on top of `have`, and why others failed."""
    target = found.target
    below = target.label(have) or BASELINE
    labels = {f"{target.label(names)} on {below}": names for names in candidates}
    configs = {shown: target.having(have | names) for shown, names in labels.items()}
    tried = found.interleaved(
        {below: target.having(have), **configs}, [below], f"way {len(have)}", screening
    )
    failures = {labels[shown]: why(result) for shown, result in tried.failed.items()}
    means = {names: tried.confirmed(s).mean_ms for s, names in labels.items() if s in tried}
    return min(means, key=lambda names: means[names], default=None), failures


def measure(found: Session, way: Way) -> Ladder:
    """All rungs again, in fresh interleaved processes.

    Raises UserError: the baseline does not run.
    """
    target, have = found.target, frozenset[str]()
    configs = {BASELINE: target.having(have)}
    for names in way.additions:
        have |= names
        configs[f"+ {target.label(names)}"] = target.having(have)
    measured = found.judged(configs, [BASELINE], "rung")
    below = BASELINE
    rungs = [Rung(BASELINE, measured.confirmed(BASELINE), None, None)]
    for added in list(configs)[1:]:
        if added in measured:
            step, total = (measured.change(before, added) for before in (below, BASELINE))
            rungs.append(Rung(added, measured.confirmed(added), step, total))
            below = added
    if len(rungs) == 1:
        raise UserError("no rung above the baseline ended ok; see above.")
    return Ladder(rungs, measured.reasons(), way, measured.flagged())


def report(found: Session, ladder: Ladder) -> Report:
    """The ladder as plain data, table and plot."""
    entries, rows, bars = [], [_HEADS], []
    for rung in ladder.rungs:
        mean_ms, step = rung.measured.mean_ms, rung.step
        of_step, left, text = ["", "", ""], "100%", f"{mean_ms:.2f} ms"
        if step and rung.total:
            of_step = [percent(step.mean), interval(step.low, step.high), step.verdict]
            left, text = f"{1 - rung.total.mean:.2%}", f"{text}, {percent(-step.mean)} by the step"
        rows.append([rung.added, *cells(rung.measured), *of_step, left])
        bars.append(Point(rung.added, mean_ms, *rung.measured.ci95_ms(), text))
        gains = {"step": _plain(step), "total": _plain(rung.total)}
        entries.append({"added": rung.added, **plain(rung.measured), **gains})
    way = ladder.way
    remarks = [f"{added}: failed when measured, {why}" for added, why in ladder.failed.items()]
    remarks += [f"{name} alone: {reason}" for name, reason in way.remarks.items()]
    remarks += [f"{name}: changes nothing on top of the others" for name in way.idle]
    document = {
        "rungs": entries,
        "failed": ladder.failed,
        "remarks": way.remarks,
        "without_effect": way.idle,
        "flagged": ladder.flagged,
    }
    axis = "latency of one inference in ms (95% interval of the mean over processes)"
    return found.effects(document, rows, [*remarks, *ladder.flagged], "ladder to", axis, bars)


def _plain(found: Gain | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "ci95": [found.low, found.high], "verdict": found.verdict}


def _parser() -> Any:
    found = target_parser(
        "ladder",
        "Add the knobs of a configuration one at a time, greedy by gain, from the baseline on, and "
        "measure each step in fresh interleaved processes.",
    )
    found.add_argument(
        "--screening",
        type=cli.at_least(1),
        default=1,
        help="processes of each candidate while the way is looked for (default: %(default)s)",
    )
    return found


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
