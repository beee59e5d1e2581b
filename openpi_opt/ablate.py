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
from openpi_opt.confirm.judge import Confirmed, Verdict, gain
from openpi_opt.errors import UserError
from openpi_opt.target import Session, flagged, parser, percent, session, why
from openpi_opt.track.plots import Bar

WHOLE = "all knobs"
# One-sided level of each bound of the 95% intervals.
ALPHA = 0.025
_STAGE = "ablation"
# What the configuration without the knob being so says of the knob.
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
    found = session("ablate", arguments)
    with found.runs.alone(found.target.config, arguments.device):
        ablation = measure(found)
    found.write(
        document(found, ablation),
        table(found, ablation),
        f"ablation of {found.runs.study_dir.name}\n{found.subtitle()}",
        "time added when the knob is taken away, in % (95% interval)",
        [
            Bar(
                label=f"without {loss.knobs}",
                value=100 * loss.added,
                low=100 * loss.low,
                high=100 * loss.high,
                text=f"{percent(loss.added)}, {loss.says}",
            )
            for loss in ablation.losses
        ],
    )
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
    """The whole configuration, the losses (largest first), what failed, what cannot be alone."""

    whole: Confirmed
    losses: list[Loss]
    failed: dict[str, str]
    remarks: dict[str, str]


def measure(found: Session) -> Ablation:
    """The configuration with all and without each of its knobs, interleaved.

    Raises:
        UserError: the configuration itself does not run, or no knob can be taken away.
    """
    target = found.target
    moves = target.removals()
    labels = {target.label(names): names for names in moves.sets}
    if not labels:
        raise UserError(
            "no knob can be taken away: "
            + "; ".join(f"{name} {reason}" for name, reason in moves.refused.items())
        )
    every = frozenset(target.knobs)
    configs = {f"without {label}": target.having(every - names) for label, names in labels.items()}
    measured, failed = found.judged({WHOLE: target.config, **configs}, WHOLE, _STAGE)
    whole = measured[WHOLE]
    losses = []
    for label in labels:
        entry = measured.get(f"without {label}")
        if entry is not None:
            change = gain(whole.means_ms, entry.means_ms, ALPHA)
            says = _SAYS[change.verdict]
            losses.append(Loss(label, entry, -change.mean, -change.high, -change.low, says))
    losses.sort(key=lambda loss: -loss.added)
    reasons = {shown: why(r) for shown, r in failed.items()}
    return Ablation(whole, losses, reasons, moves.refused)


def document(found: Session, ablation: Ablation) -> dict[str, Any]:
    """The ablation as plain data."""
    return {
        **found.about(),
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
        "flagged": flagged(found.flags.get(_STAGE, ())),
    }


def table(found: Session, ablation: Ablation) -> str:
    """The ablation as Markdown."""
    low, high = ablation.whole.ci95_ms()
    lines = [
        f"{found.subtitle()}; intervals are 95%.",
        "",
        "| without | mean ms | interval | time added | interval | the knob |",
        "|---|---|---|---|---|---|",
        f"| (nothing: all knobs) | {ablation.whole.mean_ms:.3f} | {low:.3f} to {high:.3f} | | | |",
    ]
    for loss in ablation.losses:
        low, high = loss.measured.ci95_ms()
        cells = [loss.knobs, f"{loss.measured.mean_ms:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [percent(loss.added), f"{percent(loss.low)} to {percent(loss.high)}", loss.says]
        lines.append(f"| {' | '.join(cells)} |")
    flags = flagged(found.flags.get(_STAGE, ()))
    lines += [""] if ablation.failed or ablation.remarks or flags else []
    lines += [f"- {shown}: {reason}" for shown, reason in ablation.failed.items()]
    lines += [f"- {name} taken away alone: {reason}" for name, reason in ablation.remarks.items()]
    lines += [f"- {line}" for line in flags]
    return "\n".join(lines) + "\n"


def _parser() -> Any:
    return parser(
        "ablate",
        "Take each knob away from a configuration and measure what that costs, in fresh "
        "interleaved processes.",
    )


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
