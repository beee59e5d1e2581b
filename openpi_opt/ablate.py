"""Take each knob away from a configuration: `python -m openpi_opt.ablate STUDY`.

The configuration and every variant without one of its knobs are measured in fresh interleaved
processes. A knob that cannot be taken away alone, because another one needs it, is taken away
together with that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openpi_opt import cli
from openpi_opt.confirm.judge import Confirmed, Verdict
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
)
from openpi_opt.track.plots import Point

WHOLE = "all knobs"
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
    arguments = _parser().parse_args(argv)
    found = target_session("ablate", arguments)
    with found.alone(arguments.device):
        ablation = measure(found)
    found.write(report(found, ablation))
    return 0


@dataclass(frozen=True)
class Loss:
    """What taking `knobs` away adds to the latency, as a share of the whole one's."""

    knobs: str
    measured: Confirmed
    added: float
    low: float
    high: float
    says: str


@dataclass(frozen=True)
class Ablation:
    """The whole configuration, the losses (largest first), what failed, remarks and flags."""

    whole: Confirmed
    losses: list[Loss]
    failed: dict[str, str]
    remarks: dict[str, str]
    flagged: list[str]


def measure(found: Session) -> Ablation:
    """The configuration with all and without each of its knobs, interleaved.

    Raises UserError: the configuration itself does not run, or no knob can be taken away.
    """
    target = found.target
    moves = target.removals()
    every = frozenset(target.knobs)
    labels = {f"without {target.label(names)}": names for names in moves.sets}
    if not labels:
        raise UserError(
            "no knob can be taken away: "
            + "; ".join(f"{name} {reason}" for name, reason in moves.refused.items())
        )
    configs = {shown: target.having(every - names) for shown, names in labels.items()}
    measured = found.judged({WHOLE: target.config, **configs}, [WHOLE], "ablation")
    losses = []
    for shown, names in labels.items():
        if shown in measured:
            change, label = measured.change(WHOLE, shown), target.label(names)
            shares = -change.mean, -change.high, -change.low
            losses.append(Loss(label, measured.confirmed(shown), *shares, _SAYS[change.verdict]))
    losses.sort(key=lambda loss: -loss.added)
    whole, failed = measured.confirmed(WHOLE), measured.reasons()
    return Ablation(whole, losses, failed, moves.refused, measured.flagged())


def report(found: Session, ablation: Ablation) -> Report:
    """The ablation as plain data, table and plot."""
    rows: list[list[str]] = [_HEADS, ["(nothing: all knobs)", *cells(ablation.whole), "", "", ""]]
    entries, bars = [], []
    for loss in ablation.losses:
        added, low, high = loss.added, loss.low, loss.high
        share = [percent(added), interval(low, high), loss.says]
        rows.append([loss.knobs, *cells(loss.measured), *share])
        text = f"{percent(added)}, {loss.says}"
        bars.append(Point(f"without {loss.knobs}", 100 * added, 100 * low, 100 * high, text))
        says = {"added": added, "ci95": [low, high], "verdict": loss.says}
        entries.append({"knobs": loss.knobs, **plain(loss.measured), **says})
    remarks = [f"{name}: {reason}" for name, reason in ablation.failed.items()]
    remarks += [f"{name} taken away alone: {why}" for name, why in ablation.remarks.items()]
    document = {
        "whole": plain(ablation.whole),
        "without": entries,
        "failed": ablation.failed,
        "remarks": ablation.remarks,
        "flagged": ablation.flagged,
    }
    axis = "time added when the knob is taken away, in % (95% interval)"
    return found.effects(document, rows, [*remarks, *ablation.flagged], "ablation of", axis, bars)


def _parser() -> Any:
    return target_parser(
        "ablate",
        "Take each knob away from a configuration and measure what that costs, in fresh "
        "interleaved processes.",
    )


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
