"""Compare two configurations, and one with itself: `python -m openpi_opt.pairs --b GROUP=OPTION`.

Rounds of three fresh processes, A, A again and B, in an order drawn for each round. A against
itself shows what the machine does without any difference (A/A), B against A what the difference is
(A/B). One unjudged process of each comes first, so that code that compiles once is in the caches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm import power
from openpi_opt.confirm.bench import short
from openpi_opt.confirm.judge import CONFIDENCE, compare, spread_of
from openpi_opt.errors import UserError
from openpi_opt.session import (
    Measured,
    Report,
    Session,
    composed,
    interval,
    open_session,
    parser,
    percent,
    refusal,
    table,
)
from openpi_opt.track import plots
from openpi_opt.track.journal import utc_now
from openpi_opt.track.store import Store

ROLES = "A", "A again", "B"
_VERB = "pairs"
_HEADS = [
    *("pair", "time added", "95% interval"),
    *("p (t test)", "p (signs flipped)", "spread", "verdict"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds, or the rest of them; write table, figures and plot. Returns 0."""
    arguments = _parser().parse_args(argv)
    machine = cli.this_machine()
    a, b = (
        _config(arguments, own).resolved(machine) for own in (arguments.a or [], arguments.b or [])
    )
    _check(a, b, machine)
    name = arguments.study or f"{_VERB}-{a.hash()[:6]}-{b.hash()[:6]}"
    session = open_session(_VERB, arguments, a, Store.open(arguments.store).study_dir(name))
    with session.alone(arguments.device):
        measured = measure(session, b)
    session.write(report(session, b, measured))
    return 0


def measure(session: Session, b: Config) -> Measured:
    """Run what is missing of the rounds of the session's configuration A and `b`.

    The time ends the rounds, never what they show. What the journal has is not run again.

    Raises UserError: a process was not ok, or the time was too short for any statement.
    """
    a, stage = session.config, f"against {b.hash()}"
    session.interleaved({"A": a, "B": b}, ["A", "B"], f"{stage}, first", 1)
    return session.judged({"A": a, "A again": a, "B": b}, ROLES, f"{stage}, round")


def _config(arguments: argparse.Namespace, own: Sequence[str]) -> Config:
    words = [*arguments.common, *own]
    if arguments.iterations is not None:
        words += ["measure.rel_ci=null", f"measure.iterations={arguments.iterations}"]
    return composed(words, arguments.preset_dir)


def _check(a: Config, b: Config, machine: Any) -> None:
    """A and B must be different configurations of the same context that run here."""
    if a.hash() == b.hash():
        raise UserError(
            f"A and B compute the same ({short(a)}). Give --b another option; A against itself "
            "is part of every comparison."
        )
    if a.context_hash() != b.context_hash():
        raise UserError(
            "A and B differ in model, weights, workload, platform, measure or guard, so their "
            "latencies cannot be compared.\nGive such options once, in front of --a and --b."
        )
    for name, cfg in (("A", a), ("B", b)):
        reason = refusal(cfg, machine)
        if reason is not None:
            raise UserError(f"{name} ({short(cfg)}) cannot run here: {reason}")


def report(session: Session, b: Config, measured: Measured) -> Report:
    """All figures as plain data, as Markdown and as a plot."""
    a, means = session.config, measured.means
    compared = {role: compare(means("A"), means(role), session.seed) for role in ROLES[1:]}
    spread = spread_of(means("A", "A again"))
    tau = power.Tau(spread["tau"], int(spread["processes"]) - 1).upper
    rounds = power.pairs_needed(power.GAIN, tau, power.level(1), power.PROBABILITY)
    seconds = [process.result.phase_seconds for process in measured.processes]
    names = dict.fromkeys(name for each in seconds for name in each)
    phases = {name: fmean(each.get(name, 0.0) for each in seconds) for name in names}
    document = {
        **session.about(),
        "written_at": utc_now(),
        **{
            name: {"label": short(cfg), "config_hash": cfg.hash(), "knobs": cfg.dump()["knobs"]}
            for name, cfg in (("a", a), ("b", b))
        },
        "measure": a.measure.model_dump(mode="json"),
        "planned_rounds": measured.planned,
        "a_a": compared["A again"],
        "a_b": compared["B"],
        "spread": spread,
        "rounds_for_1_percent": rounds,
        "phase_seconds": phases,
        "wall_seconds_per_process": session.wall_s,
        "processes": [
            {
                "role": each.shown,
                "round": each.round,
                "place": each.place,
                "mean_ms": each.result.latency.mean_ms,
                "ci95_ms": [each.result.latency.ci95_low_ms, each.result.latency.ci95_high_ms],
                "seconds": each.result.phase_seconds,
                "flags": each.result.flags(),
            }
            for each in measured.processes
        ],
    }
    shown = ", ".join(f"{name} {s:.1f}" for name, s in phases.items() if s >= 0.05)
    every = f"; one after another every {session.wall_s:.1f} s" if session.wall_s else ""
    drifts = "drifts up" if spread["trend"] > 0 else "drifts down"
    trend = drifts if spread["trend_p"] <= 1 - CONFIDENCE else "shows no trend"
    remarks = [
        f"spread between processes of A (tau): {spread['tau']:.3%} in {spread['processes']} "
        f"processes (95% interval {spread['low']:.3%} to {spread['high']:.3%}, excess kurtosis "
        f"{spread['excess_kurtosis']:+.1f})",
        f"over the time A {trend} (Kendall's tau {spread['trend']:+.2f}, p "
        f"{spread['trend_p']:.2g})",
        f"the verdict is the promotion's for one finalist, one-sided level {power.level(1):g} each "
        f"way: B takes {_bounds(**compared['B']['gain'])} than A",
        f"with this spread a promotion of one finalist plans {rounds} rounds to find "
        f"{power.GAIN:.0%} with {power.PROBABILITY:.0%} probability",
        f"seconds of a process on average: {shown}{every}",
        *measured.flagged(),
    ]
    text = _text(session, b, measured, compared, remarks)
    return Report(document, text, lambda: _figure(session, b, measured, compared))


def _text(
    session: Session,
    b: Config,
    measured: Measured,
    compared: Mapping[str, Any],
    remarks: Sequence[str],
) -> str:
    whole = f"{measured.rounds} rounds of three fresh processes"
    if measured.rounds < measured.planned:
        whole += f" ({measured.planned} were planned; the time was over)"
    processes, pairs = [["process", "mean ms", "std between processes"]], [_HEADS]
    for role in ROLES:
        means = measured.means(role)
        processes.append([role, f"{fmean(means):.3f}", f"{power.spread(means).value:.3%}"])
    for role, each in compared.items():
        low, high = each["ci95"]
        added = _fine(each["change"]), interval(low, high, _fine)
        p_values = f"{each['p_value']:.2g}", f"{each['sign_flip_p_value']:.2g}"
        spread = f"{each['spread_between_processes']:.3%}"
        pairs.append([f"{role} - A", *added, *p_values, spread, each["verdict"]])
    lines = [
        f"# A/A and A/B: {session.where()}\n",
        f"{whole}, in random order within a round.\n",
        f"- A: {short(session.config)}",
        f"- B: {short(b)}\n",
        *table(*processes),
        "",
        *table(*pairs),
        "",
        *(f"- {line}" for line in remarks),
    ]
    return "\n".join(lines) + "\n"


def _bounds(mean: float, at_least: float, at_most: float) -> str:
    if at_least > 0:
        return f"at least {at_least:.2%} less time"
    if at_most < 0:
        return f"at least {-at_most:.2%} more time"
    return f"between {at_most:.2%} less and {-at_least:.2%} more time"


def _fine(value: float) -> str:
    """A share as a signed percentage, to a thousandth of a percent where it is small."""
    return f"{value:+.3%}" if math.fabs(value) < 0.01 else percent(value)


def _figure(session: Session, b: Config, measured: Measured, compared: Mapping[str, Any]) -> Any:
    """Each process, and the differences within the rounds."""
    points: dict[str, list[plots.Point]] = {role: [] for role in ROLES}
    for each in measured.processes:
        ms = each.result.latency
        point = plots.Point(each.place + 1, ms.mean_ms, ms.ci95_low_ms, ms.ci95_high_ms)
        points[each.shown].append(point)
    differences = []
    for role, each in compared.items():
        mean, low, high = (100 * share for share in (each["change"], *each["ci95"]))
        dots = [plots.Point(n + 1, 100 * math.expm1(d)) for n, d in enumerate(each["differences"])]
        level, colour = plots.Point(0, mean, low, high), ROLES.index(role)
        differences.append(plots.Series(f"{role} - A", dots, level=level, colour=colour))
    processes = [plots.Series(role, points[role]) for role in ROLES]
    title = "each process, with its own 95% interval"
    within = "within a round; mean and 95% interval"
    return plots.draw(
        "dots",
        f"A/A and A/B: {session.where()}\nA: {short(session.config)}\nB: {short(b)}",
        [
            plots.Panel(title, processes, "process, in order of time", "mean latency, ms"),
            plots.Panel(within, differences, "round", "time added, %"),
        ],
    )


def _parser() -> argparse.ArgumentParser:
    found = parser(
        _VERB,
        "Compare configuration A with itself and with B, in rounds of three fresh processes in "
        "random order.",
        "the report goes",
    )
    found.add_argument(
        "common",
        nargs="*",
        metavar="GROUP=OPTION",
        help="what A and B have in common, as `sweep` takes it (preset=NAME, too)",
    )
    for name in ("a", "b"):
        own = f"what only {name.upper()} has"
        found.add_argument(f"--{name}", nargs="+", metavar="GROUP=OPTION", help=own)
    found.add_argument(
        "--pairs",
        dest="rounds",
        type=cli.at_least(power.MIN_PAIRS),
        default=20,
        help=f"rounds, at least {power.MIN_PAIRS} (default: %(default)s)",
    )
    found.add_argument(
        "--iterations",
        type=cli.at_least(10),
        help="timed calls in each process: the spread between processes is what counts here "
        "(default: as `measure` says)",
    )
    found.add_argument("--study", help="name of the study that keeps the processes")
    return found


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
