"""The body of `ladder`, `ablate` and `pairs`: rounds of fresh processes, kept in a study, reported.

The verbs say which configurations run, and what the figures mean.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm.bench import contenders, short
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Confirmed, Gain, Subject, gain
from openpi_opt.confirm.power import MIN_PAIRS
from openpi_opt.confirm.rounds import (
    Deadline,
    NeededError,
    draw_rounds,
    flagged,
    measure_rounds,
)
from openpi_opt.confirm.steps import Target
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.process.devices import DEVICE_HELP, gpu_name
from openpi_opt.process.run import refused
from openpi_opt.result import Ok, TrialResult
from openpi_opt.space.compose import compose
from openpi_opt.track import plots
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import DEFAULT_STORE, Store
from openpi_opt.verbs import verb_parser

# One-sided level of each bound of a 95% interval.
ALPHA = 0.025


@dataclass(frozen=True)
class Process:
    """A process that was ok: what it is called, its round, its place in time, its result."""

    shown: str
    round: int
    place: int
    result: Ok


@dataclass
class Measured:
    """What rounds of processes gave: the processes in order of time, and what failed.

    `names` are what the screen calls the configurations. Of the `planned` rounds there may be
    fewer when the time is over."""

    names: list[str]
    planned: int
    rounds: int = 0
    processes: list[Process] = field(default_factory=list)
    failed: dict[str, TrialResult] = field(default_factory=dict)

    def __contains__(self, shown: str) -> bool:
        """Whether it ran in every round."""
        return shown not in self.failed

    @property
    def whole(self) -> list[str]:
        """The configurations that ran in every round."""
        return [shown for shown in self.names if shown in self]

    def means(self, *shown: str) -> list[float]:
        """Means in ms of the processes with these names, in order of time."""
        return [p.result.latency.mean_ms for p in self.processes if p.shown in shown]

    def confirmed(self, shown: str) -> Confirmed:
        """The means of a configuration, one for each round."""
        [key] = {p.result.config_hash for p in self.processes if p.shown == shown}
        return Confirmed(Subject(key), self.means(shown))

    def change(self, before: str, after: str) -> Gain:
        """The gain of `after` over `before` in the pairs of the rounds, with its 95% interval."""
        return gain(self.means(before), self.means(after), ALPHA)

    def reasons(self) -> dict[str, str]:
        """Why those that failed did."""
        return {shown: why(result) for shown, result in self.failed.items()}

    def flagged(self) -> list[str]:
        """A line for each check that flagged some of the processes."""
        return flagged([process.result.flags() for process in self.processes])


@dataclass(frozen=True)
class Report:
    """What a verb leaves: figures as plain data, a text in Markdown, a plot."""

    document: Mapping[str, Any]
    text: str
    figure: Callable[[], Any]


@dataclass
class Session:
    """A configuration (`pairs`: A) and the processes that run for it, all kept in the study.
    `again` finds the configuration once more after the device was waited for."""

    verb: str
    config: Config
    runs: FreshRuns
    folder: Path
    seed: int
    rounds: int
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    again: Callable[[], Config] | None = None
    # Seconds from the end of one process to that of the next, on average over this session's.
    wall_s: float | None = None

    @property
    def target(self) -> Target:
        """The configuration, to be built up or taken apart on this machine."""
        return Target(self.config, lambda cfg: refusal(cfg, self.runs.machine))

    @contextmanager
    def alone(self, device: int | str | None) -> Iterator[None]:
        """Take the device, then look again for the study's best: the wait may have been long.
        Raises UserError: as `FreshRuns.alone`."""
        with self.runs.alone(self.config, device):
            self.deadline = Deadline(self.deadline.limit_s)  # the wait does not count
            if self.again is not None:
                before, self.config = self.config, self.again()
                if before.hash() != self.config.hash():
                    cli.say(f"the study has a better one by now: {short(self.config)}")
            yield

    def interleaved(
        self,
        configs: Mapping[str, Config],
        needed: Collection[str],
        stage: str,
        rounds: int,
        deadline: Deadline | None = None,
    ) -> Measured:
        """Every configuration once per round, in random order. The keys of `configs` are what the
        screen calls them. The order depends on the seed, the stage and the configurations alone, so
        it is the same after an interruption. Raises UserError: one of `needed` was not ok."""
        names = [f"{shown} {cfg.hash()}" for shown, cfg in configs.items()]
        text = "\n".join([self.verb, str(self.seed), stage, *names])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        found, of = (
            Measured(list(configs), rounds),
            (self.verb, self.config.hash(), self.seed, stage),
        )

        def planned(shown: str, number: int) -> Planned:
            said = f"{stage} {number + 1}: {shown}"
            return Planned(configs[shown], said, (*of, shown), key=shown, number=number)

        def means(
            places: Iterable[tuple[str, int]],
        ) -> Generator[tuple[str, float | None], None, None]:
            with closing(self.runs.in_turn(planned(*each) for each in places)) as results:
                for each, result in results:
                    if isinstance(result, Ok):
                        place = len(found.processes)
                        found.processes.append(Process(each.key, each.number, place, result))
                        yield each.key, result.latency.mean_ms
                    else:
                        found.failed.setdefault(each.key, result)
                        yield each.key, None

        started, known = time.monotonic(), len(self.runs.journal)
        try:
            by_shown, _ = measure_rounds(
                means, draw_rounds(list(configs), rounds, seed), needed, deadline
            )
        except NeededError as error:
            [shown] = error.args
            raise UserError(
                f"there is nothing to compare with: {shown} ended {why(found.failed[shown])}"
            ) from None
        new = len(self.runs.journal) - known
        self.wall_s = (time.monotonic() - started) / new if new else None
        found.rounds = len(by_shown[next(iter(needed))])
        return found

    def judged(
        self, configs: Mapping[str, Config], needed: Collection[str], stage: str
    ) -> Measured:
        """`interleaved`, in all rounds that fit into the time; `rounds` becomes their number.
        Raises UserError: `needed` was not ok, or the time was too short for any statement."""
        found = self.interleaved(configs, needed, stage, self.rounds, self.deadline)
        if found.rounds < self.rounds:
            cli.say(f"the time is over: {found.rounds} of {self.rounds} rounds")
        if found.rounds < MIN_PAIRS:
            raise UserError(
                f"--minutes was enough for {found.rounds} round(s); {MIN_PAIRS} are the least "
                "that say anything.\nWhat ran is kept: the same command goes on. Give more "
                "--minutes, or a smaller measure.max_seconds."
            )
        self.rounds = found.rounds
        return found

    def write(self, report: Report) -> None:
        """Table, figures and plot, in the session's folder; the table also on stdout. Raises
        UserError: the folder cannot be written."""
        mend = "Give another folder with --out; what was measured is kept."
        figure = report.figure()
        paths = plots.write_report(
            self.folder, self.verb, report.text, report.document, figure, mend
        )
        cli.say("wrote " + ", ".join(map(str, paths)))

    def effects(
        self,
        document: Mapping[str, Any],
        rows: Sequence[Sequence[str]],
        remarks: Sequence[str],
        title: str,
        axis: str,
        bars: Sequence[plots.Point],
    ) -> Report:
        """The report of `ladder` and `ablate`; the first of `rows` holds the heads, and `document`
        what was `flagged`."""
        remarks = [*remarks, *document["flagged"]]
        lines = [f"{self.subtitle()}; intervals are 95%.", "", *table(*rows)]
        lines += ["", *(f"- {line}" for line in remarks)] if remarks else []
        cfg, labels = self.config, self.config.labels()
        about = {
            **self.about(),
            "target": {name: labels[name] for name in self.target.knobs},
            "config_hash": cfg.hash(),
            "context_hash": cfg.context_hash(),
        }
        title = f"{title} {self.runs.study_dir.name}\n{self.subtitle()}"
        return Report(
            {**about, **document},
            "\n".join(lines) + "\n",
            lambda: plots.horizontal_bars(title, axis, bars),
        )

    def about(self) -> dict[str, Any]:
        """What the figures belong to, for JSON."""
        cfg = self.config
        seen = self.runs.fingerprint(cfg)
        return {
            "study": self.runs.study_dir.name,
            "model": cfg.model.name,
            "workload": cfg.workload.model_dump(mode="json"),
            "machine": {"gpu": seen["gpu"] and seen["gpu"]["name"], "cpu": seen["cpu"]},
            "fingerprint_hash": self.runs.fingerprint_hash(cfg),
            "rounds": self.rounds,
            "seed": self.seed,
        }

    def where(self) -> str:
        """Model, device and workload."""
        about = self.about()
        device = about["machine"]["gpu"] or about["machine"]["cpu"]
        return f"{about['model']} on {device}, workload {about['workload']['name']}"

    def subtitle(self) -> str:
        """Model, device, workload and number of processes."""
        return f"{self.where()}, {self.rounds} fresh processes each, interleaved"


def why(result: TrialResult) -> str:
    """How a process ended that was not ok."""
    return result.outcome if isinstance(result, Ok) else f"{result.outcome}: {result.reason}"


def refusal(cfg: Config, machine: Any) -> str | None:
    """Why this machine cannot run a configuration; None when it can."""
    found = refused(cfg, machine)
    return None if found is None else why(found)


def percent(value: float) -> str:
    """A share as a signed percentage."""
    return f"{value:+.2%}"


def interval(low: float, high: float, show: Callable[[float], str] = percent) -> str:
    """Two bounds in words."""
    return f"{show(low)} to {show(high)}"


def table(heads: Sequence[str], *rows: Sequence[str]) -> list[str]:
    """The lines of a table in Markdown; the columns of the numbers are not aligned."""
    every = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in every]


def cells(measured: Confirmed) -> list[str]:
    """Mean latency in ms and its 95% interval, for a table."""
    return [f"{measured.mean_ms:.3f}", interval(*measured.ci95_ms(), "{:.3f}".format)]


def plain(measured: Confirmed) -> dict[str, Any]:
    """Mean, interval and the means that they rest on, for JSON."""
    return {
        "mean_ms": measured.mean_ms,
        "ci95_ms": list(measured.ci95_ms()),
        "means_ms": measured.means_ms,
        "config_hash": measured.subject.key,
    }


def parser(verb: str, description: str, report: str) -> argparse.ArgumentParser:
    """The options that all three verbs have; `report` says what goes to --out."""
    found = verb_parser(
        verb,
        description=description,
        epilog="After an interruption, or when the time was over, the same command goes on; "
        "finished processes are kept.",
    )
    found.add_argument("--store", default=DEFAULT_STORE, metavar="DIR", help="default: mlruns")
    found.add_argument("--preset-dir", metavar="DIR", help="where presets are looked for, too")
    found.add_argument(
        "--minutes",
        type=cli.minutes,
        help="begin no round that would not end within this time; what was done is reported",
    )
    found.add_argument(
        "--seed",
        type=cli.at_least(0),
        default=0,
        help="another seed measures all again (default: 0)",
    )
    found.add_argument("--device", type=gpu_name, metavar="GPU", help=DEVICE_HELP)
    found.add_argument("--out", metavar="DIR", help=f"where {report} (default: the study)")
    found.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="do not log to MLflow"
    )
    return found


def target_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The command line of `ladder` and `ablate`."""
    found = parser(verb, description, "table and plot go")
    found.add_argument(
        "what",
        nargs="+",
        metavar="STUDY | preset=NAME | GROUP=OPTION",
        help="a study, for its best configuration; or overrides as `sweep` takes them",
    )
    found.add_argument(
        "--rounds",
        type=cli.at_least(MIN_PAIRS),
        default=8,
        help=f"fresh processes of each configuration, at least {MIN_PAIRS} (default: %(default)s)",
    )
    found.add_argument(
        "--allow-lossy", action="store_true", help="a study's best may be lossy (FP8)"
    )
    return found


def open_session(
    verb: str,
    arguments: argparse.Namespace,
    cfg: Config,
    study_dir: Path,
    again: Callable[[Journal], Config] | None = None,
) -> Session:
    """A session on a study, which is made if it does not exist. Raises UserError: a study that
    cannot be read or written."""
    store = Store.open(arguments.store)
    journal = Journal.open(study_dir, sys.argv[1:])
    tracking = cfg.tracking if arguments.mlflow and cfg.tracking.mlflow else None
    return Session(
        verb=verb,
        config=cfg,
        runs=FreshRuns(store, journal, tracking, cli.this_machine(), cli.say),
        folder=Path(arguments.out) if arguments.out else study_dir / verb,
        seed=arguments.seed,
        rounds=arguments.rounds,
        deadline=Deadline(None if arguments.minutes is None else arguments.minutes * 60),
        again=None if again is None else (lambda: again(journal)),
    )


def target_session(verb: str, arguments: argparse.Namespace) -> Session:
    """The session of `ladder` and `ablate` that was asked for. Raises UserError: no such study or
    preset, or a target that this machine cannot run or that is the baseline."""
    what, again = arguments.what, None
    folder = Path(arguments.store).expanduser()
    studies = Store.open(arguments.store, create=False).studies() if folder.is_dir() else []
    if len(what) == 1 and (what[0] in studies or "=" not in what[0]):
        study_dir = Store.open(arguments.store, create=False).find_study(what[0])

        def again(journal: Journal) -> Config:
            journal.refresh()
            judged_by = Criteria.load(study_dir)
            return contenders(journal.records(), arguments.allow_lossy, judged_by)[0].config

        cfg = again(Journal.open(study_dir))
    else:
        cfg = composed(what, arguments.preset_dir).resolved(probe())
        name = f"{verb}-{_preset_of(what) or 'custom'}-{cfg.hash()[:6]}"
        study_dir = Store.open(arguments.store).study_dir(name)
    reason = refusal(cfg, probe())
    if reason is not None:
        raise UserError(f"{short(cfg)} cannot run here: {reason}")
    if cfg.is_baseline():
        raise UserError(
            f"{' '.join(what)} is the baseline itself: there is no knob to add or to "
            "take away.\nGive a study with a faster configuration, or preset=NAME."
        )
    return open_session(verb, arguments, cfg, study_dir, again)


def composed(overrides: Sequence[str], preset_dir: str | None) -> Config:
    """The configuration that overrides give, of which one may be `preset=NAME`. Raises UserError:
    two presets, or what `compose` refuses."""
    rest = [text for text in overrides if not text.startswith("preset=")]
    folder = Path(preset_dir) if preset_dir else None
    return compose(rest, _preset_of(overrides), folder)


def _preset_of(overrides: Sequence[str]) -> str | None:
    presets = [text.partition("=")[2] for text in overrides if text.startswith("preset=")]
    if len(presets) > 1:
        raise UserError(f"{len(presets)} presets are given; one configuration has one.")
    return presets[0] if presets else None
