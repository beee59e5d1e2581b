"""What a promotion tells: the table of its confirmation, why the winner won, its provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm import power
from openpi_opt.confirm.bench import ProcessBench, short
from openpi_opt.confirm.judge import gain, paired_spread
from openpi_opt.confirm.promotion import Judged
from openpi_opt.confirm.rounds import flag_counts, flagged
from openpi_opt.result import GuardReport, Ok
from openpi_opt.track.table import Table, print_table

# What of a fingerprint a preset carries as its versions.
VERSIONS = ("python", "torch", "triton", "aiter", "openpi_opt", "source_hash")
_HEADS = ["configuration", "mean ms", "95% interval", "spread", "gain", "at least", "verdict", ""]


def tell(bench: ProcessBench, judged: Judged, pipe_width: int = 160) -> None:
    """Print the table of a promotion, and say what has to be known besides.

    A terminal has its own width, anything else `pipe_width` columns.
    """
    shown = {key: short(cfg) for key, cfg in bench.configs.items()}
    print("confirmation in fresh interleaved processes")
    print_table(_table(judged, shown), pipe_width, unfolded={*_HEADS[1:]})
    for key in judged.dropped:
        why = "it went over a limit" if bench.over[key] else "it was not ok"
        cli.say(f"dropped {shown[key]}: {why}, see above")
    for line in flagged([ok.flags() for every in bench.confirmed.values() for ok in every]):
        cli.say(line)
    kept = judged.schedule.promise
    for entry in judged.candidates:
        seen = paired_spread(judged.baseline.means_ms, entry.means_ms)
        if kept and seen > kept.tau and entry.gain and entry.gain.verdict == "ambiguous":
            cli.say(
                f"note: {shown[entry.subject.key]}: its pairs differed as with a spread of "
                f"{seen:.2%} between processes, more than the {kept.tau:.2%} planned for, so for "
                "it the promise of finding a gain does not hold"
            )
    cli.say(reason(judged, shown))


def _table(judged: Judged, shown: Mapping[str, str]) -> Table:
    body = []
    for entry in [judged.baseline, *sorted(judged.candidates, key=lambda c: c.mean_ms)]:
        (low, high), gain = entry.ci95_ms(), entry.gain
        body.append([
            shown[entry.subject.key],
            f"{entry.mean_ms:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{entry.between_std_ms / entry.mean_ms:.2%}",
            *((f"{gain.mean:.2%}", f"{gain.low:.2%}", gain.verdict) if gain else ("", "", "")),
            "winner" if entry is judged.winner else "",
        ])  # fmt: skip
    return Table(_HEADS, body, frozenset([_HEADS[0], *_HEADS[-2:]]))


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


def of_promotion(
    cfg: Config, judged: Judged, processes: Sequence[Ok], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of a winner: what it is of, where it ran, and what was measured.

    `processes` are the winner's confirmation processes. Percentiles are means over them, the guard
    is that of the process farthest from the reference.
    """
    gpu, git = fingerprint["gpu"], fingerprint["git"]
    winner, gain, schedule = judged.winner, judged.winner.gain, judged.schedule
    p95, p99 = np.mean([(ok.latency.p95_ms, ok.latency.p99_ms) for ok in processes], axis=0)
    farthest = max((ok.guard for ok in processes), key=_distance).model_dump(mode="json")
    return {
        "promoted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_hash": cfg.hash(),
        "lossy": cfg.lossy(),
        "machine": {
            "gpu": gpu and gpu["name"],
            "arch": gpu and gpu["arch"],
            "driver": gpu and gpu["driver"],
            "cpu": fingerprint["cpu"],
        },
        "versions": {name: fingerprint[name] for name in VERSIONS},
        "commit": git and git.removesuffix("-dirty"),
        "clean": None if git is None else not git.endswith("-dirty"),
        "model": cfg.model.model_dump(mode="json"),
        "workload": cfg.workload.model_dump(mode="json"),
        "processes": len(winner.means_ms),
        "mean_ms": round(winner.mean_ms, 4),
        "p95_ms": round(float(p95), 4),
        "p99_ms": round(float(p99), 4),
        "std_ms": round(winner.between_std_ms, 4),
        "ci95_ms": [round(bound, 4) for bound in winner.ci95_ms()],
        "guard": {
            key: value
            for key, value in farthest.items()
            if isinstance(value, int | float) or (key == "power" and value is not None)
        },
        "flags": flag_counts(ok.flags() for ok in processes),
        "gain_over_baseline": gain
        and {
            "verdict": gain.verdict,
            "mean": round(gain.mean, 4),
            "at_least": round(gain.low, 4),
            "confidence": 1 - power.TOTAL_ALPHA,
        },
        "spread_between_processes": schedule.tau and round(schedule.tau, 5),
        "promise": schedule.promise and schedule.promise.model_dump(),
    }


def _distance(guard: GuardReport) -> float:
    return np.inf if guard.rel_l2 is None else guard.rel_l2
