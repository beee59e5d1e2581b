"""Compare two configurations, and one with itself: `python -m openpi_opt.pairs --b GROUP=OPTION`.

Rounds of three fresh processes, A, A again and B, in an order drawn for each round. A against
itself shows what the machine does without any difference (A/A), B against A what the difference is
(A/B). One unjudged process of each comes first, so that code that compiles once is in the caches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm import power
from openpi_opt.confirm.bench import short
from openpi_opt.confirm.judge import CONFIDENCE, Compared, Gain, Spread, compare, spread_of
from openpi_opt.errors import UserError
from openpi_opt.session import (
    Measured,
    Process,
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


@dataclass
class Pairs:
    """The two configurations, the rounds that were run whole, and how many were planned."""

    session: Session
    b: Config
    planned: int
    measured: Measured

    @property
    def a(self) -> Config:
        """What A and A again run."""
        return self.session.config

    @property
    def rounds(self) -> int:
        """Rounds that are whole."""
        return self.measured.rounds


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
        found = measure(session, b)
    session.write(report(found))
    return 0


def measure(session: Session, b: Config) -> Pairs:
    """Run what is missing of the rounds of the session's configuration A and `b`.

    The time ends the rounds, never what they show. What the journal has is not run again.

    Raises UserError: a process was not ok, or the time was too short for any statement.
    """
    planned, a = session.rounds, session.config
    stage = f"against {b.hash()}"
    session.interleaved({"A": a, "B": b}, ["A", "B"], f"{stage}, first", 1)
    configs = {"A": a, "A again": a, "B": b}
    return Pairs(session, b, planned, session.judged(configs, ROLES, f"{stage}, round"))


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


def report(found: Pairs) -> Report:
    """All figures as plain data, as Markdown and as a plot."""
    means = found.measured.means
    compared = {role: compare(means("A"), means(role), found.session.seed) for role in ROLES[1:]}
    spread = spread_of(means("A", "A again"))
    tau = power.Tau(spread.tau, spread.processes - 1).upper
    rounds = power.pairs_needed(power.GAIN, tau, power.level(1), power.PROBABILITY)
    text = _text(found, compared, spread, rounds)
    document = {
        **found.session.about(),
        "written_at": utc_now(),
        "a": _described(found.a),
        "b": _described(found.b),
        "measure": found.a.measure.model_dump(mode="json"),
        "planned_rounds": found.planned,
        "a_a": _plain(compared["A again"]),
        "a_b": _plain(compared["B"]),
        "spread": asdict(spread),
        "rounds_for_1_percent": rounds,
        "phase_seconds": _phases(found),
        "wall_seconds_per_process": found.session.wall_s,
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
            for each in found.measured.processes
        ],
    }
    return Report(document, text, lambda: _figure(found, compared))


def _described(cfg: Config) -> dict[str, Any]:
    return {"label": short(cfg), "config_hash": cfg.hash(), "knobs": cfg.dump()["knobs"]}


def _phases(found: Pairs) -> dict[str, float]:
    """Mean seconds of each phase, over the judged processes."""
    seconds = [process.result.phase_seconds for process in found.measured.processes]
    names = dict.fromkeys(name for each in seconds for name in each)
    return {name: fmean(each.get(name, 0.0) for each in seconds) for name in names}


def _plain(compared: Compared) -> dict[str, Any]:
    judged, added = compared.judged, _added(compared)
    return {
        "change": added[0],
        "ci95": added[1:],
        "p_value": compared.p_value,
        "sign_flip_p_value": compared.flip_p_value,
        "spread_between_processes": compared.spread,
        "verdict": judged.verdict,
        "gain": {"mean": judged.mean, "at_least": judged.low, "at_most": judged.high},
        "confidence": 1 - power.level(1),
        "differences": compared.differences,
    }


def _added(compared: Compared) -> list[float]:
    """The share of time that the second takes more than the first, with its 95% interval."""
    gain = compared.interval
    return [-gain.mean, -gain.high, -gain.low]


def _text(found: Pairs, compared: Mapping[str, Compared], spread: Spread, rounds: int) -> str:
    whole = f"{found.rounds} rounds of three fresh processes"
    if found.rounds < found.planned:
        whole += f" ({found.planned} were planned; the time was over)"
    processes, pairs = [["process", "mean ms", "std between processes"]], [_HEADS]
    for role in ROLES:
        means = found.measured.means(role)
        processes.append([role, f"{fmean(means):.3f}", f"{power.spread(means).value:.3%}"])
    for role, each in compared.items():
        change, low, high = _added(each)
        p_values = f"{each.p_value:.2g}", f"{each.flip_p_value:.2g}"
        added = _fine(change), interval(low, high, _fine)
        pairs.append([f"{role} - A", *added, *p_values, f"{each.spread:.3%}", each.judged.verdict])
    lines = [
        f"# A/A and A/B: {found.session.where()}",
        "",
        f"{whole}, in random order within a round.",
        "",
        f"- A: {short(found.a)}",
        f"- B: {short(found.b)}",
        "",
        *table(*processes),
        "",
        *table(*pairs),
        "",
        *(f"- {line}" for line in _remarks(found, compared["B"].judged, spread, rounds)),
    ]
    return "\n".join(lines) + "\n"


def _remarks(found: Pairs, judged: Gain, spread: Spread, rounds: int) -> list[str]:
    shown = ", ".join(f"{name} {s:.1f}" for name, s in _phases(found).items() if s >= 0.05)
    wall_s = found.session.wall_s
    every = f"; one after another every {wall_s:.1f} s" if wall_s else ""
    drifts = "drifts up" if spread.trend > 0 else "drifts down"
    trend = drifts if spread.trend_p <= 1 - CONFIDENCE else "shows no trend"
    return [
        f"spread between processes of A (tau): {spread.tau:.3%} in {spread.processes} processes "
        f"(95% interval {spread.low:.3%} to {spread.high:.3%}, excess kurtosis "
        f"{spread.excess_kurtosis:+.1f})",
        f"over the time A {trend} (Kendall's tau {spread.trend:+.2f}, p {spread.trend_p:.2g})",
        f"the verdict is the promotion's for one finalist, one-sided level {power.level(1):g} each "
        f"way: B takes {_bounds(judged)} than A",
        f"with this spread a promotion of one finalist plans {rounds} rounds to find "
        f"{power.GAIN:.0%} with {power.PROBABILITY:.0%} probability",
        f"seconds of a process on average: {shown}{every}",
        *found.measured.flagged(),
    ]


def _bounds(judged: Gain) -> str:
    if judged.low > 0:
        return f"at least {judged.low:.2%} less time"
    if judged.high < 0:
        return f"at least {-judged.high:.2%} more time"
    return f"between {judged.high:.2%} less and {-judged.low:.2%} more time"


def _fine(value: float) -> str:
    """A share as a signed percentage, to a thousandth of a percent where it is small."""
    return f"{value:+.3%}" if math.fabs(value) < 0.01 else percent(value)


def _figure(found: Pairs, compared: Mapping[str, Compared]) -> Any:
    """Each process, and the differences within the rounds."""

    def point(each: Process) -> plots.Point:
        ms = each.result.latency
        return plots.Point(each.place + 1, ms.mean_ms, ms.ci95_low_ms, ms.ci95_high_ms)

    def level(each: Compared) -> plots.Point:
        mean, low, high = (100 * share for share in _added(each))
        return plots.Point(0, mean, low, high)

    of = {role: [each for each in found.measured.processes if each.shown == role] for role in ROLES}
    processes = [plots.Series(role, [point(each) for each in of[role]]) for role in ROLES]
    differences = [
        plots.Series(
            f"{role} - A",
            [plots.Point(n + 1, 100 * math.expm1(d)) for n, d in enumerate(each.differences)],
            level=level(each),
            colour=ROLES.index(role),
        )
        for role, each in compared.items()
    ]
    title = "each process, with its own 95% interval"
    within = "within a round; mean and 95% interval"
    return plots.draw(
        "dots",
        f"A/A and A/B: {found.session.where()}\nA: {short(found.a)}\nB: {short(found.b)}",
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
    found.add_argument("--a", nargs="+", metavar="GROUP=OPTION", help="what only A has")
    found.add_argument("--b", nargs="+", metavar="GROUP=OPTION", help="what only B has")
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
