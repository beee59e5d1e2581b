"""Take each knob away from a configuration: `python -m openpi_opt.ablate STUDY`.

The configuration and every variant without one of its knobs are measured in fresh interleaved
processes. A knob that cannot be taken away alone, because another one needs it, is taken away
together with that one.
"""

from __future__ import annotations

from collections.abc import Sequence

from openpi_opt import cli
from openpi_opt.confirm.judge import Verdict
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
)
from openpi_opt.track.plots import Point

WHOLE = "all knobs"
_WITHOUT = "without "
_HEADS = ["without", "mean ms", "interval", "time added", "interval", "the knob"]
# What the verdict on the configuration without the knob says of the knob.
_SAYS: dict[Verdict, str] = {
    "slower": "helps",
    "same": "makes no difference",
    "ambiguous": "ambiguous",
    "faster": "hurts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with and without each knob, write table and plot. Returns 0."""
    arguments = target_parser(
        "ablate",
        "Take each knob away from a configuration and measure what that costs, in fresh "
        "interleaved processes.",
    ).parse_args(argv)
    found = target_session("ablate", arguments)
    with found.alone(arguments.device):
        measured = measure(found)
    found.write(report(found, measured))
    return 0


def measure(found: Session) -> Measured:
    """The configuration with all and without each of its knobs, interleaved.

    Raises UserError: the configuration itself does not run, or no knob can be taken away.
    """
    target = found.target
    moves, every = target.removals(), frozenset(target.knobs)
    if not moves.sets:
        reasons = "; ".join(f"{name} {reason}" for name, reason in moves.refused.items())
        raise UserError(f"no knob can be taken away: {reasons}")
    less = {f"{_WITHOUT}{target.label(names)}": every - names for names in moves.sets}
    configs = {shown: target.having(names) for shown, names in less.items()}
    return found.judged({WHOLE: target.config, **configs}, [WHOLE], "ablation")


def report(found: Session, measured: Measured) -> Report:
    """The ablation as plain data, table and plot; what adds most time is first."""
    whole, refused = measured.confirmed(WHOLE), found.target.removals().refused
    rows: list[list[str]] = [_HEADS, ["(nothing: all knobs)", *cells(whole), "", "", ""]]
    entries, bars = [], []
    losses = [(measured.change(WHOLE, shown), shown) for shown in measured.whole[1:]]
    for change, shown in sorted(losses, key=lambda loss: loss[0].mean):
        added, low, high = -change.mean, -change.high, -change.low
        knobs, variant = shown.removeprefix(_WITHOUT), measured.confirmed(shown)
        says = _SAYS[change.verdict]
        rows.append([knobs, *cells(variant), percent(added), interval(low, high), says])
        text = f"{percent(added)}, {says}"
        bars.append(Point(shown, 100 * added, 100 * low, 100 * high, text))
        figures = {"added": added, "ci95": [low, high], "verdict": says}
        entries.append({"knobs": knobs, **plain(variant), **figures})
    failed = measured.reasons()
    remarks = [f"{name}: {reason}" for name, reason in failed.items()]
    remarks += [f"{name} taken away alone: {reason}" for name, reason in refused.items()]
    document = {
        "whole": plain(whole),
        "without": entries,
        "failed": failed,
        "remarks": refused,
        "flagged": measured.flagged(),
    }
    axis = "time added when the knob is taken away, in % (95% interval)"
    return found.effects(document, rows, remarks, "ablation of", axis, bars)


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
