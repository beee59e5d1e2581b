"""What a promotion prints: the table of its confirmation, flags, and why the winner is it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from openpi_opt import cli
from openpi_opt.confirm import power
from openpi_opt.confirm.bench import ProcessBench
from openpi_opt.confirm.contenders import short
from openpi_opt.confirm.judge import Confirmed, gain
from openpi_opt.confirm.promotion import Judged
from openpi_opt.confirm.rounds import flagged

_HEADS = "configuration", "mean ms", "95% interval", "spread", "gain", "at least", "verdict", ""


def tell(bench: ProcessBench, judged: Judged, pipe_width: int = 160) -> None:
    """Print the table of a promotion, and say what has to be known besides.

    A terminal has its own width, anything else `pipe_width` columns.
    """
    entries = [judged.baseline, *sorted(judged.candidates, key=lambda c: c.mean_ms)]
    body = []
    for entry in entries:
        low, high = entry.ci95_ms()
        gain = entry.gain
        body.append((
            short(bench.configs[entry.subject.key]),
            f"{entry.mean_ms:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{entry.between_std_ms / entry.mean_ms:.2%}",
            f"{gain.mean:.2%}" if gain else "",
            f"{gain.low:.2%}" if gain else "",
            gain.verdict if gain else "",
            "winner" if entry is judged.winner else "",
        ))  # fmt: skip
    _print(body, pipe_width)
    for key in judged.dropped:
        why = "it went over a limit" if bench.over[key] else "it was not ok"
        cli.say(f"dropped {short(bench.configs[key])}: {why}, see above")
    for line in flagged(ok.flags() for every in bench.confirmed.values() for ok in every):
        cli.say(line)
    _say_what_holds(bench, judged)
    cli.say(reason(judged, {key: short(cfg) for key, cfg in bench.configs.items()}))


def _print(body: Sequence[Sequence[str]], pipe_width: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="confirmation in fresh interleaved processes")
    for head, *cells in zip(_HEADS, *body, strict=True):
        if head == "configuration":
            table.add_column(head, overflow="fold", min_width=len(head))
        else:
            table.add_column(head, no_wrap=True, min_width=max(map(len, [head, *cells])))
    for row in body:
        table.add_row(*map(Text, row))
    cli.print_uncut(Console(width=None if sys.stdout.isatty() else pipe_width), table)


def reason(judged: Judged, shown: Mapping[str, str]) -> str:
    """Why the winner is the winner, with the tie that was broken; `shown` names by key."""
    winner = judged.winner
    if winner is judged.baseline:
        return (
            "no configuration is confirmed faster than the baseline: the preset holds the "
            "baseline, the simplest that is as fast. More --minutes can tell smaller gains apart."
        )
    assert winner.gain is not None
    won = f"winner: {shown[winner.subject.key]}, at least {winner.gain.low:.2%} faster"
    faster = [c for c in judged.candidates if c.gain and c.gain.verdict == "faster"]
    best = min(faster, key=lambda c: c.mean_ms)
    if best is winner:
        return f"{won} than the baseline, with the smallest mean of those that are"
    found = gain(winner.means_ms, best.means_ms, judged.schedule.tie_alpha)
    mine, its = winner.subject, best.subject
    nearer = (
        f"changes fewer knobs ({mine.changed} against {its.changed})"
        if mine.changed < its.changed
        else "came earlier in the study"
    )
    return (
        f"{won} than the baseline. {shown[its.key]} has a smaller mean ({best.mean_ms:.3f} ms), "
        f"but its pairs do not confirm it faster than the winner (between {found.low:+.2%} and "
        f"{found.high:+.2%}): a tie, which goes to the one that {nearer}"
    )


def _say_what_holds(bench: ProcessBench, judged: Judged) -> None:
    """Where pairs were noisier than planned for, the promise did not reach."""
    kept = judged.schedule.promise
    for entry in judged.candidates:
        if kept is None:
            break
        seen = paired_spread(judged.baseline, entry)
        if seen > kept.tau and entry.gain and entry.gain.verdict == "ambiguous":
            cli.say(
                f"note: {short(bench.configs[entry.subject.key])}: its pairs differed as with a "
                f"spread of {seen:.2%} between processes, more than the {kept.tau:.2%} planned "
                "for, so for it the promise of finding a gain does not hold"
            )


def paired_spread(baseline: Confirmed, candidate: Confirmed) -> float:
    """Spread between processes (relative) that the pairs show: their spread over sqrt(2)."""
    logs = [
        math.log(mine / plain)
        for mine, plain in zip(candidate.means_ms, baseline.means_ms, strict=True)
    ]
    return power.spread([math.exp(value) for value in logs]).value / math.sqrt(2)
