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
from openpi_opt.confirm.judge import Confirmed, Gain, gain
from openpi_opt.confirm.steps import Knobs
from openpi_opt.errors import UserError
from openpi_opt.target import Session, flagged, parser, percent, session, why
from openpi_opt.track.plots import Bar

BASELINE = "baseline"
# One-sided level of each bound of a step's 95% interval.
ALPHA = 0.025
_STAGE = "rung"


def main(argv: Sequence[str] | None = None) -> int:
    """Find the way, measure its rungs, write table and plot. Returns 0.

    Raises:
        UserError: nothing to add, or the baseline or the target does not run.
    """
    arguments = _parser().parse_args(argv)
    found = session("ladder", arguments)
    with found.runs.alone(found.target.config, arguments.device):
        way = climb(found, arguments.screening)
        ladder = measure(found, way)
    found.write(
        document(found, ladder),
        table(found, ladder),
        f"ladder to {found.runs.study_dir.name}\n{found.subtitle()}",
        "latency of one inference in ms (95% interval of the mean over processes)",
        _bars(ladder),
    )
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
    """Rungs from the baseline up, what failed when measured, and the way's remarks."""

    rungs: list[Rung]
    failed: dict[str, str]
    way: Way


def climb(found: Session, screening: int) -> Way:
    """Find the order of the knobs, greedy by gain.

    Raises:
        UserError: the baseline does not run.
    """
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
    stage = f"way {len(have)}"
    measured, failed = found.interleaved(
        {below: target.having(have), **configs}, below, stage, screening
    )
    failures = {labels[shown]: why(result) for shown, result in failed.items()}
    means = {labels[shown]: entry.mean_ms for shown, entry in measured.items() if shown != below}
    return (min(means, key=lambda names: means[names]) if means else None), failures


def measure(found: Session, way: Way) -> Ladder:
    """All rungs again, in fresh interleaved processes.

    Raises:
        UserError: the baseline does not run.
    """
    target, have = found.target, frozenset[str]()
    configs = {BASELINE: target.having(have)}
    for names in way.additions:
        have |= names
        configs[f"+ {target.label(names)}"] = target.having(have)
    measured, failed = found.judged(configs, BASELINE, _STAGE)
    bottom = below = measured[BASELINE]
    rungs = [Rung(BASELINE, bottom, None, None)]
    for added in list(configs)[1:]:
        if added in measured:
            entry = measured[added]
            step, total = (gain(m.means_ms, entry.means_ms, ALPHA) for m in (below, bottom))
            rungs.append(Rung(added, entry, step, total))
            below = entry
    if len(rungs) == 1:
        raise UserError("no rung above the baseline ended ok; see above.")
    reasons = {a: why(r) for a, r in failed.items()}
    return Ladder(rungs, reasons, way)


def document(found: Session, ladder: Ladder) -> dict[str, Any]:
    """The ladder as plain data."""
    rungs = []
    for rung in ladder.rungs:
        low, high = rung.measured.ci95_ms()
        rungs.append(
            {
                "added": rung.added,
                "mean_ms": rung.measured.mean_ms,
                "ci95_ms": [low, high],
                "means_ms": rung.measured.means_ms,
                "config_hash": rung.measured.subject.key,
                "step": _plain(rung.step),
                "total": _plain(rung.total),
            }
        )
    return {
        **found.about(),
        "rungs": rungs,
        "failed": ladder.failed,
        "remarks": ladder.way.remarks,
        "without_effect": ladder.way.idle,
        "flagged": flagged(found.flags.get(_STAGE, ())),
    }


def table(found: Session, ladder: Ladder) -> str:
    """The ladder as Markdown."""
    lines = [
        f"{found.subtitle()}; intervals are 95%.",
        "",
        "| added | mean ms | interval | saved by the step | interval | verdict | of the baseline |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung in ladder.rungs:
        low, high = rung.measured.ci95_ms()
        cells = [rung.added, f"{rung.measured.mean_ms:.3f}", f"{low:.3f} to {high:.3f}"]
        if rung.step and rung.total:
            step = rung.step
            cells += [percent(step.mean), f"{percent(step.low)} to {percent(step.high)}"]
            cells += [step.verdict, f"{1 - rung.total.mean:.2%}"]
        else:
            cells += ["", "", "", "100%"]
        lines.append(f"| {' | '.join(cells)} |")
    flags = flagged(found.flags.get(_STAGE, ()))
    lines += [""] if ladder.failed or ladder.way.remarks or ladder.way.idle or flags else []
    lines += [
        f"- {added}: failed when measured, {reason}" for added, reason in ladder.failed.items()
    ]
    lines += [f"- {name} alone: {reason}" for name, reason in ladder.way.remarks.items()]
    lines += [f"- {name}: changes nothing on top of the others" for name in ladder.way.idle]
    lines += [f"- {line}" for line in flags]
    return "\n".join(lines) + "\n"


def _plain(found: Gain | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "ci95": [found.low, found.high], "verdict": found.verdict}


def _bars(ladder: Ladder) -> list[Bar]:
    return [
        Bar(
            label=rung.added,
            value=rung.measured.mean_ms,
            low=rung.measured.ci95_ms()[0],
            high=rung.measured.ci95_ms()[1],
            text=f"{rung.measured.mean_ms:.2f} ms"
            + (f", {percent(-rung.step.mean)} by the step" if rung.step else ""),
        )
        for rung in ladder.rungs
    ]


def _parser() -> Any:
    found = parser(
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
