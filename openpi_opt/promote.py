"""Confirm a study's best configurations and write the winner as a preset.

`python -m openpi_opt.promote STUDY --name NAME`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import secrets
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from openpi_opt import cli, criteria, preset
from openpi_opt.config import Config
from openpi_opt.confirm import power, promotion, simulate
from openpi_opt.confirm.contenders import Contender, contenders, short
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Confirmed, Subject, changed_knobs
from openpi_opt.confirm.promotion import Judged, Schedule, Wanted
from openpi_opt.confirm.rounds import Mean, NeededError, Place, Stage
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.paths import user_conf_dir
from openpi_opt.process.reserve import DEVICE_HELP, gpu_name
from openpi_opt.result import Ok, TrialResult, write_atomic
from openpi_opt.rounds import flagged
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.mlflow_log import leave_tag
from openpi_opt.track.store import DEFAULT_STORE, Store

_PIPE_WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Confirm, choose, write, tag. Returns 0 when a preset was written, 1 when limits forbid it.

    Raises:
        UserError: nothing to promote, an existing name, or a machine that cannot run it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--simulate" in words:
        return simulate.main(words)
    arguments = _parser().parse_args(words)
    folder = Path(arguments.preset_dir) if arguments.preset_dir else None
    path = preset.preset_path(arguments.name, folder)
    if path.exists() and not arguments.force:
        raise UserError(f"preset {path} exists. Choose another --name, or --force to replace it.")
    store = Store.open(arguments.store, create=False)
    journal = Journal.open(store.find_study(arguments.study))
    judged_by = criteria.of_arguments(arguments, journal.study_dir)
    candidates = contenders(journal.records(), criteria=judged_by)
    _say_what_is_judged(judged_by)
    known = candidates[0].config.tracking  # as the study was run
    tracking = known if arguments.mlflow and known.mlflow else None
    runs = FreshRuns(store, journal, tracking, probe(), cli.say)
    wanted = Wanted(
        seed=secrets.randbits(32),
        finalists=arguments.finalists,
        rounds=arguments.rounds,
        limit_s=arguments.minutes * 60,
    )
    with runs.alone(candidates[0].config.resolved(runs.machine), arguments.device):
        bench, judged = confirm(runs, candidates, wanted, arguments.again, judged_by)
        _print_table(bench, judged)
        return _write(bench, judged, arguments, path, judged_by)


def _write(
    bench: ProcessBench,
    judged: Judged,
    arguments: argparse.Namespace,
    path: Path,
    judged_by: criteria.Criteria,
) -> int:
    """Write the winner's preset, and have its run in MLflow tagged; 1 when there is none."""
    winner = bench.configs[judged.winner.subject.key]
    over = bench.over[judged.winner.subject.key]
    if over:  # only the baseline: others above a limit were dropped
        cli.say(
            "no preset is written: nothing that keeps the limits is confirmed faster than the "
            f"baseline, which itself does not keep them ({_text(over)}). More --minutes can tell "
            "smaller gains apart; --limit NAME=VALUE judges by another limit."
        )
        return 1
    runs = bench.runs
    record = _record_of(runs.journal, winner)
    provenance = _provenance(arguments.study, record, winner, judged, runs)
    preset.write(
        path, winner, provenance | ({"limits": judged_by.limits} if judged_by.limits else {})
    )
    if record is not None:
        leave_tag(runs.study_dir, record.uid, "openpi_opt.preset", arguments.name)
    cli.say(f"wrote {path}")
    folder = Path(arguments.preset_dir) if arguments.preset_dir else None
    cli.say(f"use it: {_usage(arguments.name, folder)}")
    return 0


def confirm(
    runs: FreshRuns,
    candidates: Sequence[Contender],
    wanted: Wanted,
    again: bool = False,
    judged_by: criteria.Criteria | None = None,
) -> tuple[ProcessBench, Judged]:
    """Run a promotion to its end, or the rest of an interrupted one.

    `again` begins a new one where the same was finished before. A candidate that goes above a limit
    of `judged_by` in any process is dropped.

    Raises:
        UserError: the baseline was not ok, or the time is too short to show anything.
    """
    baseline = candidates[0].config.resolved(runs.machine).baseline()
    here = runs.fingerprint_hash(baseline)
    others = [c for c in candidates if not c.config.is_baseline()]
    current = [c for c in others if c.fingerprint_hash == here]
    if others and not current:
        cli.say(
            "note: the study was measured with another machine or software: its order is used, "
            "its numbers are not"
        )
    wanted = replace(wanted, known=int(bool(current) or not others))
    others = current or others
    bench = ProcessBench(runs, baseline, [c.config for c in others], wanted, again, judged_by)
    subjects = [
        Subject(c.config.hash(), changed_knobs(c.config), c.number, c.mean_ms) for c in others
    ]
    cli.say(
        f"{len(others)} configuration(s) of the study {runs.study_dir.name} against the baseline"
    )
    try:
        judged = promotion.run(bench, Subject(baseline.hash()), subjects, wanted)
    except NeededError:
        raise UserError(
            "the baseline did not end ok, so no gain can be stated; see above.\n"
            "Mend the cause, then begin anew with --again."
        ) from None
    except power.TooShortError as error:
        raise UserError(
            f"--minutes {(wanted.limit_s or 0) / 60:g} is too short to show even a gain of "
            f"{power.WIDEST_GAIN:.0%}: "
            f"at least {math.ceil(error.least_s / 60)} minutes are needed.\n"
            "The processes that ran are kept. Give more --minutes, or fewer --finalists."
        ) from None
    return bench, judged


class ProcessBench:
    """A `promotion.Bench` of fresh processes; the schedule is kept beside their folders."""

    def __init__(
        self,
        runs: FreshRuns,
        baseline: Config,
        others: Sequence[Config],
        wanted: Wanted,
        again: bool = False,
        judged_by: criteria.Criteria | None = None,
    ):
        self.runs = runs
        self.configs = {cfg.hash(): cfg for cfg in [baseline, *others]}
        self.over: dict[str, dict[str, str]] = {key: {} for key in self.configs}
        # Of each process that is judged.
        self.flags: list[list[str]] = []
        self._criteria = judged_by or criteria.Criteria()
        self._baseline = baseline.hash()
        gpu = runs.fingerprint(baseline)["gpu"]
        asked = {
            "configurations": sorted(self.configs),
            "fingerprint": runs.fingerprint_hash(baseline),
            "gpu": gpu and gpu["uuid"],
            "finalists": wanted.finalists,
            "rounds": wanted.rounds,
            "limit_s": wanted.limit_s,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        self.path = _schedule_path(runs.study_dir / "confirm", digest, again)

    def means(self, stage: Stage, places: Iterable[Place]) -> Generator[Mean, None, None]:
        """Mean latency in ms of fresh processes, now or from before an interruption."""
        asked: list[tuple[str, int, str]] = []

        def planned() -> Iterator[Planned]:
            # Confirmation runs belong to their schedule; the others may serve every promotion here.
            place = (self.path.stem,) if stage == "confirmation" else ()
            for key, number in places:
                cfg = self.configs[key]
                shown = f"{stage} {number + 1}: {short(cfg)}"
                asked.append((key, number, shown))
                yield Planned(cfg, shown, (*place, stage, number), retry=not place)

        with closing(self.runs.in_turn(planned())) as results:
            for place, result in enumerate(results):
                key, number, shown = asked[place]
                if stage == "confirmation" and isinstance(result, Ok):
                    self.flags.append(result.flags())
                yield key, number, self._mean(key, shown, result)

    def _mean(self, key: str, shown: str, result: TrialResult) -> float | None:
        if not isinstance(result, Ok):
            return None
        over = self._criteria.over(result)
        self.over[key] |= over
        if over and key != self._baseline:  # that one is measured to compare with, whatever it has
            cli.say(f"  {shown}: over the limit ({_text(over)})")
            return None
        return result.latency.mean_ms

    def seconds(self, key: str) -> float:
        """What a process takes, by the journal."""
        return self.runs.seconds(self.configs[key])

    def note(self, text: str) -> None:
        """Say it."""
        cli.say(text)

    def schedule(self) -> Schedule | None:
        """The schedule as it was kept.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            found = Schedule.model_validate_json(self.path.read_bytes())
        except ValidationError:
            raise UserError(
                f"{self.path} is damaged: it is no schedule of a promotion.\n"
                "Restore it, or begin a new promotion with --again."
            ) from None
        cli.say(
            f"continuing the promotion of {self.path.name}: {len(found.rounds)} rounds in the "
            "order that was drawn for it; what is finished is not run again (--again begins anew)"
        )
        return found

    def keep(self, schedule: Schedule) -> None:
        """Put it on disk, before anything that it is to judge is run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = len(list(self.path.parent.glob("schedule-*.json")))
        if earlier:
            cli.say(
                f"note: confirmation {earlier + 1} of this study. Each may be wrong with its own "
                "1%: promoting until something passes would find noise"
            )
        write_atomic(self.path, schedule.model_dump_json(indent=1) + "\n")
        order = f"{len(schedule.rounds)} rounds of {1 + len(schedule.finalists)} fresh processes"
        cli.say(f"confirmation: {order}, each round in random order")


def _schedule_path(folder: Path, digest: str, again: bool) -> Path:
    """The newest schedule of this request; with `again` the next, which does not exist yet."""
    number = 1
    while (folder / f"schedule-{digest}-{number + 1}.json").exists():
        number += 1
    if again and (folder / f"schedule-{digest}-{number}.json").exists():
        number += 1
    return folder / f"schedule-{digest}-{number}.json"


def _record_of(journal: Journal, cfg: Config) -> Record | None:
    """The study's record of a configuration: the trial, or failing that its last confirmation."""
    same = [r for r in journal.records() if r.result.config_hash == cfg.hash()]
    trials = [r for r in same if r.role != "confirm"]
    found = trials or same
    return found[-1] if found else None


def _provenance(
    study: str, record: Record | None, cfg: Config, judged: Judged, runs: FreshRuns
) -> dict[str, Any]:
    winner, schedule = judged.winner, judged.schedule
    low, high = winner.ci95_ms()
    gain = winner.gain
    fp = runs.fingerprint(cfg)
    return {
        "study": study,
        "trial": record and record.uid,
        "promoted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_hash": cfg.hash(),
        "machine": {"gpu": fp["gpu"] and fp["gpu"]["name"], "cpu": fp["cpu"]},
        "versions": {
            name: fp[name] for name in ("python", "torch", "triton", "aiter", "openpi_opt", "git")
        },
        "model": cfg.model.model_dump(mode="json"),
        "workload": cfg.workload.model_dump(mode="json"),
        "processes": len(winner.means_ms),
        "mean_ms": round(winner.mean_ms, 4),
        "std_ms": round(winner.between_std_ms, 4),
        "ci95_ms": [round(low, 4), round(high, 4)],
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


def _print_table(bench: ProcessBench, judged: Judged) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
    heads = ("configuration", "mean ms", "95% interval", "spread", "gain", "at least", "verdict")
    table = Table(title="confirmation in fresh interleaved processes")
    for head, *cells in zip((*heads, ""), *body, strict=True):
        if head == "configuration":
            table.add_column(head, overflow="fold", min_width=len(head))
        else:
            width = max(map(len, [head, *cells]))
            table.add_column(head, no_wrap=True, min_width=width)
    for row in body:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    cli.print_uncut(console, table)
    for key in judged.dropped:
        why = "it went over a limit" if bench.over[key] else "it was not ok"
        cli.say(f"dropped {short(bench.configs[key])}: {why}, see above")
    for line in flagged(bench.flags):
        cli.say(line)
    _say_what_holds(bench, judged)


def _say_what_holds(bench: ProcessBench, judged: Judged) -> None:
    """What can be said when pairs were noisier than planned for, or nothing is faster."""
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
    if judged.winner is judged.baseline:
        cli.say(
            "no configuration is confirmed faster than the baseline: the preset holds the "
            "baseline, the simplest that is as fast. More --minutes can tell smaller gains apart."
        )


def paired_spread(baseline: Confirmed, candidate: Confirmed) -> float:
    """Spread between processes (relative) that the pairs show: their spread over sqrt(2)."""
    logs = [
        math.log(mine / plain)
        for mine, plain in zip(candidate.means_ms, baseline.means_ms, strict=True)
    ]
    return power.spread([math.exp(value) for value in logs]).value / math.sqrt(2)


def _say_what_is_judged(judged_by: criteria.Criteria) -> None:
    if judged_by.limits:
        cli.say(f"limits: {judged_by.limits_text()}; what is above one of them is not promoted")
    if judged_by.several:
        cli.say(
            f"note: the study minimises {judged_by.objectives_text()}; the mean latency is what is "
            "confirmed, of the fastest that keep the limits. --limit NAME=VALUE leads to the "
            "others of the Pareto set"
        )
    elif judged_by.objectives != ("latency",):
        cli.say(
            f"note: the study minimises {judged_by.objectives_text()}; the mean latency of those "
            f"with the least {judged_by.objectives_text()} is what is confirmed"
        )


def _text(over: dict[str, str]) -> str:
    return ", ".join(f"{name}: {text}" for name, text in over.items())


def _usage(name: str, folder: Path | None) -> str:
    if folder is None or folder.absolute() == user_conf_dir() / "preset":
        return f"python -m openpi_opt.sweep preset={name}"
    return f"python -m openpi_opt.sweep --preset-dir {folder} preset={name}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.promote",
        description="Measure a study's best configurations and the baseline again, in interleaved "
        "fresh processes, and write the winner as a preset.",
    )
    parser.add_argument("study", metavar="STUDY", help="name of the study")
    parser.add_argument("--name", required=True, help="name of the preset")
    parser.add_argument("--store", default=DEFAULT_STORE, metavar="DIR", help="default: mlruns")
    parser.add_argument(
        "--preset-dir", metavar="DIR", help="where NAME.yaml goes (default: conf/preset)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing preset")
    simulate.add_finalists(parser)
    parser.add_argument(
        "--minutes",
        type=cli.minutes,
        default=60.0,
        help="time for screening and confirmation; when it does not suffice for the promise of "
        "1%%, the promise that can be kept is printed (default: %(default)g)",
    )
    parser.add_argument(
        "--rounds",
        type=cli.at_least(3),
        help="fix the rounds by hand, at least 3: the spread between processes is then not "
        "measured, and no promise of finding a gain is made",
    )
    parser.add_argument("--device", type=gpu_name, metavar="GPU", help=DEVICE_HELP)
    parser.add_argument(
        "--again",
        action="store_true",
        help="confirm anew; without it an interrupted promotion is continued, a finished one "
        "answered from its runs",
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="let lossy configurations (FP8) be the best"
    )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="no study: draw sweeps, promote them with this very code, and print how often that is "
        "wrong (`--simulate --help` has its options)",
    )
    criteria.add_arguments(parser)
    parser.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="do not log to MLflow"
    )
    return parser


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
