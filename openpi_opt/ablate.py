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
from openpi_opt.rounds import Session, interval, percent, target_parser, target_session, why
from openpi_opt.rounds import table as markdown
from openpi_opt.track.plots import Bar, effects_figure

WHOLE = "all knobs"
_HEADS = "without", "mean ms", "interval", "time added", "interval", "the knob"
# What the verdict on the configuration without the knob says of the knob.
_SAYS: dict[Verdict, str] = {
    "slower": "helps",
    "same": "makes no difference",
    "ambiguous": "ambiguous",
    "faster": "hurts",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure with and without each knob, write table and plot. Returns 0.

    Raises:
        UserError: nothing to take away, or the configuration itself does not run.
    """
    arguments = _parser().parse_args(argv)
    found = target_session("ablate", arguments)
    with found.alone(arguments.device):
        ablation = measure(found)
    found.write(document(found, ablation), table(found, ablation), _figure(found, ablation))
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

    Raises:
        UserError: the configuration itself does not run, or no knob can be taken away.
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
    failed = {shown: why(result) for shown, result in measured.failed.items()}
    whole = measured.confirmed(WHOLE)
    return Ablation(whole, losses, failed, moves.refused, measured.flagged())


def document(found: Session, ablation: Ablation) -> dict[str, Any]:
    """The ablation as plain data."""
    return {
        **found.about_target(),
        "whole": {"mean_ms": ablation.whole.mean_ms, "means_ms": ablation.whole.means_ms},
        "without": [
            {
                "knobs": loss.knobs,
                "mean_ms": loss.measured.mean_ms,
                "means_ms": loss.measured.means_ms,
                "config_hash": loss.measured.subject.key,
                "added": loss.added,
                "ci95": [loss.low, loss.high],
                "verdict": loss.says,
            }
            for loss in ablation.losses
        ],
        "failed": ablation.failed,
        "remarks": ablation.remarks,
        "flagged": ablation.flagged,
    }


def table(found: Session, ablation: Ablation) -> str:
    """The ablation as Markdown."""

    def shown(entry: Confirmed) -> list[str]:
        return [f"{entry.mean_ms:.3f}", interval(*entry.ci95_ms(), "{:.3f}".format)]

    rows = [["(nothing: all knobs)", *shown(ablation.whole), "", "", ""]]
    for loss in ablation.losses:
        share = [percent(loss.added), interval(loss.low, loss.high), loss.says]
        rows.append([loss.knobs, *shown(loss.measured), *share])
    remarks = [f"{name}: {reason}" for name, reason in ablation.failed.items()]
    remarks += [f"{name} taken away alone: {why}" for name, why in ablation.remarks.items()]
    return found.report(markdown(_HEADS, rows), [*remarks, *ablation.flagged])


def _figure(found: Session, ablation: Ablation) -> Any:
    bars = [
        Bar(
            f"without {loss.knobs}",
            100 * loss.added,
            100 * loss.low,
            100 * loss.high,
            f"{percent(loss.added)}, {loss.says}",
        )
        for loss in ablation.losses
    ]
    return effects_figure(
        f"ablation of {found.runs.study_dir.name}\n{found.subtitle()}",
        "time added when the knob is taken away, in % (95% interval)",
        bars,
    )


def _parser() -> Any:
    return target_parser(
        "ablate",
        "Take each knob away from a configuration and measure what that costs, in fresh "
        "interleaved processes.",
    )


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
