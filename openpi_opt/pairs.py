"""Compare two configurations, and one with itself: `python -m openpi_opt.pairs --b GROUP=OPTION`.

Rounds of three fresh processes, A, A again and B, in an order drawn for each round. A against
itself shows what the machine does without any difference (A/A), B against A what the difference is
(A/B). One unjudged process of each comes first, so that code that compiles once is in the caches.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from openpi_opt import cli
from openpi_opt.cli import at_least, minutes, say
from openpi_opt.compose import compose
from openpi_opt.config import Config
from openpi_opt.confirm import promise
from openpi_opt.confirm.contenders import short
from openpi_opt.confirm.deadline import Deadline
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Gain
from openpi_opt.confirm.paired import MIN_PAIRS, Compared, Spread, compare, spread_of
from openpi_opt.confirm.promotion import draw_rounds
from openpi_opt.engine.trials import refused
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.process.devices import DEVICE_HELP, gpu_name
from openpi_opt.result import Ok, TrialResult, write_atomic
from openpi_opt.target import flagged, percent, why
from openpi_opt.track import plots
from openpi_opt.track.journal import Journal, utc_now
from openpi_opt.track.mlflow_log import MlflowLog
from openpi_opt.track.store import DEFAULT_STORE, Store

Role = Literal["A", "A again", "B"]
ROLES: tuple[Role, ...] = ("A", "A again", "B")
_FIRST: tuple[Role, ...] = ("A", "B")
_VERB = "pairs"


@dataclass(frozen=True)
class Process:
    """One judged process: its role, its round, its place in time, and what it measured."""

    role: Role
    round: int
    place: int
    mean_ms: float
    ci95_ms: tuple[float, float]
    seconds: dict[str, float]
    flags: list[str]


@dataclass
class Pairs:
    """The two configurations, the rounds that were run whole, and how many were planned.

    `wall_s` is what a process took from the end of the one before it to its own, on average over
    those of this session; None when the journal had all.
    """

    runs: FreshRuns
    a: Config
    b: Config
    planned: int
    seed: int
    processes: list[Process] = field(default_factory=list)
    wall_s: float | None = None

    @property
    def rounds(self) -> int:
        """Rounds that are whole."""
        return len(self.processes) // len(ROLES)

    def means(self, *roles: Role) -> list[float]:
        """Means of the processes of these roles, in order of time."""
        return [each.mean_ms for each in self.processes if each.role in roles]

    def config(self, role: Role) -> Config:
        """What a process of this role runs."""
        return self.b if role == "B" else self.a


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rounds, or the rest of them; write table, figures and plot. Returns 0.

    Raises:
        UserError: A and B cannot be compared or run, or the time was too short for any statement.
    """
    arguments = _parser().parse_args(argv)
    machine = probe()
    a, b = (
        _config(arguments, own).resolved(machine) for own in (arguments.a or [], arguments.b or [])
    )
    _check(a, b, machine)
    store = Store.open(arguments.store)
    study_dir = store.study_dir(arguments.study or f"{_VERB}-{a.hash()[:6]}-{b.hash()[:6]}")
    log = MlflowLog(store, a.tracking) if arguments.mlflow and a.tracking.mlflow else None
    journal = Journal.open(study_dir, sys.argv[1:])
    found = Pairs(
        FreshRuns(store, journal, log, machine, say), a, b, arguments.pairs, arguments.seed
    )
    with found.runs.alone(a, arguments.device):
        measure(found, None if arguments.minutes is None else arguments.minutes * 60)
    if found.rounds < MIN_PAIRS:
        raise UserError(
            f"--minutes {arguments.minutes:g} was enough for {found.rounds} round(s); "
            f"{MIN_PAIRS} are the least that say anything.\nWhat ran is kept: the same command "
            "goes on. Give more --minutes, or fewer measure.iterations."
        )
    write(found, Path(arguments.out) if arguments.out else study_dir / _VERB)
    return 0


def measure(found: Pairs, limit_s: float | None) -> None:
    """Run what is missing of the rounds; after `limit_s` seconds no other round is begun.

    The time ends the rounds, never what they show. What the journal has is not run again.

    Raises:
        UserError: a process was not ok.
    """
    started, known = time.monotonic(), len(found.runs.journal.records())
    deadline = Deadline(limit_s)
    rounds = draw_rounds(ROLES, found.planned, found.seed)
    order: list[tuple[Role, int | None]] = []  # None: not judged
    whole: list[Process] = []

    def planned() -> Iterator[Planned]:
        for role in _FIRST:
            order.append((role, None))
            yield _planned(found, role, "first", 0)
        for number, roles in enumerate(rounds):
            if not deadline.another(number, len(whole) / len(ROLES)):
                say(f"the time is over: {number} of {found.planned} rounds")
                return
            for role in roles:
                order.append((role, number))
                yield _planned(found, role, "round", number)

    # Closed at once when something is raised here, too: a process that was started ahead waits.
    with contextlib.closing(found.runs.in_turn(planned())) as results:
        for place, result in enumerate(results):
            role, round_number = order[place]
            if not isinstance(result, Ok):
                raise UserError(f"{role} was not ok, so there is nothing to compare: {why(result)}")
            if round_number is not None:
                whole.append(_process(role, round_number, len(whole), result))
    found.processes = whole[: len(whole) // len(ROLES) * len(ROLES)]
    run = len(found.runs.journal.records()) - known
    found.wall_s = (time.monotonic() - started) / run if run else None


def _planned(found: Pairs, role: Role, stage: str, number: int) -> Planned:
    cfg = found.config(role)
    place = (_VERB, found.a.hash(), found.b.hash(), found.seed, stage, role, number)
    return Planned(cfg, f"{stage} {number + 1}: {role}", place)


def _process(role: Role, number: int, place: int, ok: Ok) -> Process:
    return Process(
        role=role,
        round=number,
        place=place,
        mean_ms=ok.latency.mean_ms,
        ci95_ms=(ok.latency.ci95_low_ms, ok.latency.ci95_high_ms),
        seconds=dict(ok.phase_seconds),
        flags=ok.flags(),
    )


def _config(arguments: argparse.Namespace, own: Sequence[str]) -> Config:
    words = [*arguments.common, *own]
    if arguments.iterations is not None:
        words += ["measure.rel_ci=null", f"measure.iterations={arguments.iterations}"]
    presets = [word.partition("=")[2] for word in words if word.startswith("preset=")]
    if len(presets) > 1:
        raise UserError(f"{len(presets)} presets are given for one configuration; it has one.")
    folder = Path(arguments.preset_dir) if arguments.preset_dir else None
    rest = [word for word in words if not word.startswith("preset=")]
    return compose(rest, presets[0] if presets else None, folder)


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
        found: TrialResult | None = refused(cfg, machine)
        if found is not None:
            raise UserError(f"{name} ({short(cfg)}) cannot run here: {why(found)}")


def document(found: Pairs) -> dict[str, Any]:
    """All figures as plain data."""
    seen = found.runs.fingerprint(found.a)
    spread = _spread(found)
    (_, a_a), (_, a_b) = _compared(found)
    return {
        "study": found.runs.study_dir.name,
        "written_at": utc_now(),
        "a": _described(found.a),
        "b": _described(found.b),
        "model": found.a.model.name,
        "workload": found.a.workload.model_dump(mode="json"),
        "measure": found.a.measure.model_dump(mode="json"),
        "machine": {"gpu": seen["gpu"] and seen["gpu"]["name"], "cpu": seen["cpu"]},
        "fingerprint_hash": found.runs.fingerprint_hash(found.a),
        "rounds": found.rounds,
        "planned_rounds": found.planned,
        "seed": found.seed,
        "a_a": _plain(a_a),
        "a_b": _plain(a_b),
        "spread": asdict(spread),
        "rounds_for_1_percent": _rounds_for(spread),
        "phase_seconds": _phases(found),
        "wall_seconds_per_process": found.wall_s,
        "processes": [asdict(each) for each in found.processes],
    }


def _described(cfg: Config) -> dict[str, Any]:
    return {"label": short(cfg), "config_hash": cfg.hash(), "knobs": cfg.dump()["knobs"]}


def _compared(found: Pairs) -> list[tuple[Role, Compared]]:
    """A again and B, each against A."""
    others: tuple[Role, ...] = ("A again", "B")
    plain = found.means("A")
    return [(role, compare(plain, found.means(role), found.seed)) for role in others]


def _spread(found: Pairs) -> Spread:
    return spread_of(found.means("A", "A again"))


def _rounds_for(spread: Spread) -> int:
    """Rounds by which a promotion with one finalist finds 1%, planned with this spread."""
    tau = promise.Tau(spread.tau, spread.processes).upper
    return promise.pairs_needed(promise.GAIN, tau, promise.level(1), promise.PROBABILITY)


def _phases(found: Pairs) -> dict[str, float]:
    """Mean seconds of each phase, over the judged processes."""
    names = dict.fromkeys(name for each in found.processes for name in each.seconds)
    count = len(found.processes)
    return {name: sum(p.seconds.get(name, 0.0) for p in found.processes) / count for name in names}


def _plain(compared: Compared) -> dict[str, Any]:
    judged: Gain = compared.judged
    return {
        "change": compared.change,
        "ci95": [compared.low, compared.high],
        "p_value": compared.p_value,
        "sign_flip_p_value": compared.flip_p_value,
        "spread_between_processes": compared.spread,
        "verdict": judged.verdict,
        "gain": {"mean": judged.mean, "at_least": judged.low, "at_most": judged.high},
        "confidence": 1 - promise.level(1),
        "differences": compared.differences,
    }


def _where(found: Pairs) -> str:
    seen = found.runs.fingerprint(found.a)
    device = seen["gpu"]["name"] if seen["gpu"] else seen["cpu"]
    return f"A/A and A/B: {found.a.model.name} on {device}, workload {found.a.workload.name}"


def table(found: Pairs) -> str:
    """The result as Markdown."""
    whole = f"{found.rounds} rounds of three fresh processes"
    if found.rounds < found.planned:
        whole += f" ({found.planned} were planned; the time was over)"
    lines = [
        f"# {_where(found)}",
        "",
        f"{whole}, in random order within a round.",
        "",
        f"- A: {short(found.a)}",
        f"- B: {short(found.b)}",
        "",
        "| process | mean ms | std between processes |",
        "|---|---:|---:|",
    ]
    for role in ROLES:
        means = found.means(role)
        mean = sum(means) / len(means)
        between = promise.spread(means).value
        lines.append(f"| {role} | {mean:.3f} | {between:.3%} |")
    lines += [
        "",
        "| pair | time added | 95% interval | p (t test) | p (signs flipped) | spread | verdict |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, compared in _compared(found):
        cells = [
            f"{name} - A",
            _fine(compared.change),
            f"{_fine(compared.low)} to {_fine(compared.high)}",
            f"{compared.p_value:.2g}",
            f"{compared.flip_p_value:.2g}",
            f"{compared.spread:.3%}",
            compared.judged.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_remarks(found)]
    return "\n".join(lines) + "\n"


def _remarks(found: Pairs) -> list[str]:
    spread = _spread(found)
    seconds = _phases(found)
    shown = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items() if took >= 0.05)
    level, b = promise.level(1), dict(_compared(found))["B"]
    lines = [
        f"- spread between processes of A (tau): {spread.tau:.3%} in {spread.processes} processes "
        f"(95% interval {spread.low:.3%} to {spread.high:.3%}, excess kurtosis "
        f"{spread.excess_kurtosis:+.1f})",
        f"- over the time A {_trend(spread)} (Kendall's tau {spread.trend:+.2f}, p "
        f"{spread.trend_p:.2g})",
        f"- the verdict is the promotion's for one finalist, one-sided level {level:g} each way: "
        f"B takes {_bounds(b.judged)} than A",
        f"- with this spread a promotion of one finalist plans {_rounds_for(spread)} rounds to "
        f"find {promise.GAIN:.0%} with {promise.PROBABILITY:.0%} probability",
        f"- seconds of a process on average: {shown}"
        + (f"; one after another every {found.wall_s:.1f} s" if found.wall_s else ""),
    ]
    return [*lines, *(f"- {line}" for line in flagged(each.flags for each in found.processes))]


def _trend(spread: Spread) -> str:
    if spread.trend_p > 1 - 0.95:
        return "shows no trend"
    return "drifts up" if spread.trend > 0 else "drifts down"


def _bounds(judged: Gain) -> str:
    if judged.low > 0:
        return f"at least {judged.low:.2%} less time"
    if judged.high < 0:
        return f"at least {-judged.high:.2%} more time"
    return f"between {judged.high:.2%} less and {-judged.low:.2%} more time"


def _fine(value: float) -> str:
    """A share as a signed percentage, to a thousandth of a percent where it is small."""
    return f"{value:+.3%}" if math.fabs(value) < 0.01 else percent(value)


def write(found: Pairs, folder: Path) -> None:
    """Table, figures and plot; the table also on stdout.

    Raises:
        UserError: the folder cannot be written.
    """
    text = table(found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{_VERB}.md", folder / f"{_VERB}.json"]
        write_atomic(paths[0], text)
        write_atomic(paths[1], json.dumps(document(found), indent=1, allow_nan=False) + "\n")
        paths += plots.save(_figure(found), folder, _VERB)
    except OSError as error:
        raise UserError(
            f"cannot write in {folder}: {error.strerror or error}.\n"
            "Give another folder with --out; what was measured is kept."
        ) from error
    print(text, end="")
    say("wrote " + ", ".join(map(str, paths)))


def _figure(found: Pairs) -> Any:
    processes = [
        plots.Series(
            role,
            [
                plots.Point(each.place + 1, each.mean_ms, *each.ci95_ms)
                for each in found.processes
                if each.role == role
            ],
        )
        for role in ROLES
    ]
    differences = [
        plots.Series(
            f"{name} - A",
            [plots.Point(n + 1, 100 * math.expm1(d)) for n, d in enumerate(compared.differences)],
            level=plots.Point(0, 100 * compared.change, 100 * compared.low, 100 * compared.high),
            colour=ROLES.index(name),
        )
        for name, compared in _compared(found)
    ]
    return plots.dots(
        f"{_where(found)}\nA: {short(found.a)}\nB: {short(found.b)}",
        [
            plots.Panel(
                "each process, with its own 95% interval",
                processes,
                "process, in order of time",
                "mean latency, ms",
            ),
            plots.Panel(
                "within a round; mean and 95% interval", differences, "round", "time added, %"
            ),
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m openpi_opt.{_VERB}",
        description="Compare configuration A with itself and with B, in rounds of three fresh "
        "processes in random order.",
        epilog="After an interruption, or when the time was over, the same command goes on; "
        "finished processes are kept.",
    )
    parser.add_argument(
        "common",
        nargs="*",
        metavar="GROUP=OPTION",
        help="what A and B have in common, as `sweep` takes it (preset=NAME, too)",
    )
    parser.add_argument("--a", nargs="+", metavar="GROUP=OPTION", help="what only A has")
    parser.add_argument("--b", nargs="+", metavar="GROUP=OPTION", help="what only B has")
    parser.add_argument(
        "--pairs",
        type=at_least(MIN_PAIRS),
        default=20,
        help=f"rounds, at least {MIN_PAIRS} (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=at_least(10),
        help="exactly so many timed calls in each process: the spread between processes is what "
        "counts here (default: as `measure` says)",
    )
    parser.add_argument(
        "--minutes",
        type=minutes,
        help="begin no round that would not end within this time; what was done is reported",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="another one measures anew (default: 0)"
    )
    parser.add_argument("--device", type=gpu_name, metavar="GPU", help=DEVICE_HELP)
    parser.add_argument("--study", help="name of the study that keeps the processes")
    parser.add_argument("--store", default=DEFAULT_STORE, metavar="DIR", help="default: mlruns")
    parser.add_argument("--preset-dir", metavar="DIR", help="where presets are looked for, too")
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: the study)")
    parser.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="do not log to MLflow"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
