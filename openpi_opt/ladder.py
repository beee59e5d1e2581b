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
from openpi_opt.confirm.steps import Knobs
from openpi_opt.errors import UserError
from openpi_opt.session import (
    Measured,
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
    parser = target_parser(
        "ladder",
        "Add the knobs of a configuration one at a time, greedy by gain, from the baseline on, and "
        "measure each step in fresh interleaved processes.",
    )
    parser.add_argument(
        "--screening",
        type=cli.at_least(1),
        default=1,
        help="processes of each candidate while the way is looked for (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    found = target_session("ladder", arguments)
    with found.alone(arguments.device):
        way = climb(found, arguments.screening)
        measured = measure(found, way)
    found.write(report(found, way, measured))
    return 0


@dataclass(frozen=True)
class Way:
    """The knobs in the order in which they are added, and what was found on the way.

    `remarks` holds, by knob, why it could not be taken alone or failed when tried; `idle` are the
    knobs that change nothing on top of the others.
    """

    additions: list[Knobs]
    remarks: dict[str, str]
    idle: list[str]


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
            tried = _tried(found, have, candidates, screening)
            for names, each in tried.items():
                if isinstance(each, str):
                    broken.add(have | names)
                    remarks[target.label(names)] = each
            means = {names: each for names, each in tried.items() if not isinstance(each, str)}
            if not means:
                continue
            candidates = [min(means, key=means.__getitem__)]
        additions += candidates
        have |= candidates[0]
        cli.say(f"step {len(additions)}: {target.label(candidates[0])}")
    return Way(additions, remarks, [name for name in target.knobs if name not in have])


def _tried(
    found: Session, have: Knobs, candidates: Sequence[Knobs], screening: int
) -> dict[Knobs, float | str]:
    """The mean of each candidate on top of `have` in ms, or why it failed."""
    target = found.target
    below = target.label(have) or BASELINE
    labels = {f"{target.label(names)} on {below}": names for names in candidates}
    configs = {shown: target.having(have | names) for shown, names in labels.items()}
    tried = found.interleaved(
        {below: target.having(have), **configs}, [below], f"way {len(have)}", screening
    )
    return {
        names: tried.confirmed(shown).mean_ms if shown in tried else why(tried.failed[shown])
        for shown, names in labels.items()
    }


def measure(found: Session, way: Way) -> Measured:
    """All rungs again, in fresh interleaved processes.

    Raises UserError: the baseline does not run, or no rung above it.
    """
    target, have = found.target, frozenset[str]()
    configs = {BASELINE: target.having(have)}
    for names in way.additions:
        have |= names
        configs[f"+ {target.label(names)}"] = target.having(have)
    measured = found.judged(configs, [BASELINE], "rung")
    if measured.whole == [BASELINE]:
        raise UserError("no rung above the baseline ended ok; see above.")
    return measured


def report(found: Session, way: Way, measured: Measured) -> Report:
    """The ladder as plain data, table and plot."""
    entries, rows, bars, below = [], [_HEADS], [], BASELINE
    for added in measured.whole:
        rung = measured.confirmed(added)
        of_step, left, text = ["", "", ""], "100%", f"{rung.mean_ms:.2f} ms"
        gains: dict[str, Any] = {"step": None, "total": None}
        if added != BASELINE:
            step, total = (measured.change(before, added) for before in (below, BASELINE))
            of_step = [percent(step.mean), interval(step.low, step.high), step.verdict]
            left, text = f"{1 - total.mean:.2%}", f"{text}, {percent(-step.mean)} by the step"
            for name, each in (("step", step), ("total", total)):
                ci95 = [each.low, each.high]
                gains[name] = {"mean": each.mean, "ci95": ci95, "verdict": each.verdict}
        rows.append([added, *cells(rung), *of_step, left])
        bars.append(Point(added, rung.mean_ms, *rung.ci95_ms(), text))
        entries.append({"added": added, **plain(rung), **gains})
        below = added
    failed = measured.reasons()
    remarks = [f"{added}: failed when measured, {reason}" for added, reason in failed.items()]
    remarks += [f"{name} alone: {reason}" for name, reason in way.remarks.items()]
    remarks += [f"{name}: changes nothing on top of the others" for name in way.idle]
    document = {
        "rungs": entries,
        "failed": failed,
        "remarks": way.remarks,
        "without_effect": way.idle,
        "flagged": measured.flagged(),
    }
    axis = "latency of one inference in ms (95% interval of the mean over processes)"
    return found.effects(document, rows, remarks, "ladder to", axis, bars)


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
