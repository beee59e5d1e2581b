"""What `ladder` and `ablate` share: the configuration, its processes, what is written."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openpi_opt.cli import at_least, minutes, say
from openpi_opt.compose import compose
from openpi_opt.config import Config
from openpi_opt.confirm.contenders import contenders
from openpi_opt.confirm.deadline import Deadline
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Confirmed, Subject
from openpi_opt.confirm.promotion import (
    BaselineError,
    Mean,
    Place,
    Stage,
    draw_rounds,
    measure_rounds,
)
from openpi_opt.confirm.steps import Target
from openpi_opt.criteria import Criteria
from openpi_opt.engine.trials import refused
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.process.devices import DEVICE_HELP, gpu_name
from openpi_opt.result import Ok, TrialResult, write_atomic
from openpi_opt.track import plots
from openpi_opt.track.journal import Journal
from openpi_opt.track.mlflow_log import MlflowLog
from openpi_opt.track.store import DEFAULT_STORE, Store

# The fewest rounds that say anything.
MIN_ROUNDS = 3


@dataclass
class Session:
    """A target and the processes that take it apart; everything that ran is kept in the study."""

    verb: str
    target: Target
    runs: FreshRuns
    folder: Path
    seed: int
    rounds: int
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    # By stage: the flags of each process that was ok.
    flags: dict[str, list[list[str]]] = field(default_factory=dict)

    def planned(self, cfg: Config, stage: str, number: int, shown: str) -> Planned:
        """One fresh process of a stage."""
        place = (self.verb, self.target.config.hash(), self.seed, stage, number)
        return Planned(cfg, f"{stage} {number + 1}: {shown}", place)

    def interleaved(
        self,
        configs: Mapping[str, Config],
        needed: str,
        stage: str,
        rounds: int,
        deadline: Deadline | None = None,
    ) -> tuple[dict[str, Confirmed], dict[str, TrialResult]]:
        """Every configuration once per round, in random order; and what failed, with its result.

        `configs` are by what is said of them. The order depends on the seed, the stage and the
        configurations alone, so after an interruption it is the same.

        Raises:
            UserError: `needed` was not ok.
        """
        keys = {cfg.hash(): shown for shown, cfg in configs.items()}
        central = configs[needed].hash()
        text = "\n".join([self.verb, str(self.seed), stage, *keys])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        bench = _Bench(self, {cfg.hash(): cfg for cfg in configs.values()}, keys, stage)
        order = draw_rounds(list(keys), rounds, seed)
        try:
            means, _ = measure_rounds(bench, order, central, deadline)
        except BaselineError:
            raise UserError(
                f"there is nothing to compare with: {needed} ended {why(bench.failed[central])}"
            ) from None
        hashes = {shown: cfg.hash() for shown, cfg in configs.items()}
        found = {
            shown: Confirmed(Subject(key), means[key])
            for shown, key in hashes.items()
            if key not in bench.failed
        }
        failed = {s: bench.failed[key] for s, key in hashes.items() if key in bench.failed}
        return found, failed

    def judged(
        self, configs: Mapping[str, Config], needed: str, stage: str
    ) -> tuple[dict[str, Confirmed], dict[str, TrialResult]]:
        """`interleaved` in all rounds that fit into the time, whose number `rounds` becomes.

        Raises:
            UserError: `needed` was not ok, or the time was too short for any statement.
        """
        found, failed = self.interleaved(configs, needed, stage, self.rounds, self.deadline)
        done = len(found[needed].means_ms)
        if done < self.rounds:
            say(f"the time is over: {done} of {self.rounds} rounds")
        if done < MIN_ROUNDS:
            raise UserError(
                f"--minutes was enough for {done} round(s); {MIN_ROUNDS} are the least that say "
                "anything.\nWhat ran is kept: the same command goes on. Give more --minutes, or a "
                "smaller measure.max_seconds."
            )
        self.rounds = done
        return found, failed

    def write(
        self,
        document: Mapping[str, Any],
        table: str,
        title: str,
        axis: str,
        bars: Sequence[plots.Bar],
    ) -> None:
        """Table, figures and plot, in the session's folder; the table also on stdout.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            paths = [self.folder / f"{self.verb}.{end}" for end in ("md", "json", "png")]
            write_atomic(paths[0], table)
            write_atomic(paths[1], json.dumps(document, indent=1, allow_nan=False) + "\n")
            plots.effects(paths[2], title, axis, bars)
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder}: {error.strerror or error}.\n"
                "Give another folder with --out; what was measured is kept."
            ) from error
        print(table, end="")
        say("wrote " + ", ".join(map(str, paths)))

    def about(self) -> dict[str, Any]:
        """What the figures are of, for JSON."""
        cfg = self.target.config
        seen = self.runs.fingerprint(cfg)
        return {
            "study": self.runs.study_dir.name,
            "target": {name: self.target.config.labels()[name] for name in self.target.knobs},
            "config_hash": cfg.hash(),
            "context_hash": cfg.context_hash(),
            "model": cfg.model.name,
            "workload": cfg.workload.model_dump(mode="json"),
            "machine": {"gpu": seen["gpu"] and seen["gpu"]["name"], "cpu": seen["cpu"]},
            "fingerprint_hash": self.runs.fingerprint_hash(cfg),
            "rounds": self.rounds,
            "seed": self.seed,
        }

    def subtitle(self) -> str:
        """Model, device, workload and number of processes."""
        about = self.about()
        device = about["machine"]["gpu"] or about["machine"]["cpu"]
        return (
            f"{about['model']} on {device}, workload {about['workload']['name']}, "
            f"{self.rounds} fresh processes each, interleaved"
        )


@dataclass
class _Bench:
    """A `promotion.Measurer` of one stage; keeps what failed."""

    session: Session
    configs: dict[str, Config]
    names: dict[str, str]
    stage: str
    failed: dict[str, TrialResult] = field(default_factory=dict)

    def means(self, stage: Stage, places: Iterable[Place]) -> Generator[Mean, None, None]:
        asked: list[Place] = []

        def planned() -> Iterator[Planned]:
            for key, number in places:
                asked.append((key, number))
                yield self.session.planned(self.configs[key], self.stage, number, self.names[key])

        with closing(self.session.runs.in_turn(planned())) as results:
            for place, result in enumerate(results):
                key, number = asked[place]
                if isinstance(result, Ok):
                    self.session.flags.setdefault(self.stage, []).append(result.flags())
                    yield key, number, result.latency.mean_ms
                else:
                    self.failed.setdefault(key, result)
                    yield key, number, None


def why(result: TrialResult) -> str:
    """How a process ended that was not ok."""
    return result.outcome if isinstance(result, Ok) else f"{result.outcome}: {result.reason}"


def flagged(processes: Iterable[Sequence[str]]) -> list[str]:
    """A line for each check that flagged processes: `flagged host_shared: 5 of 24 processes`.

    `processes` has the flags of each, as `result.Ok.flags` gives them.
    """
    every = list(processes)
    names = [name for flags in every for name in {flag.partition(":")[0] for flag in flags}]
    return [
        f"flagged {name}: {names.count(name)} of {len(every)} processes"
        for name in sorted(set(names))
    ]


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The command line that both verbs have."""
    found = argparse.ArgumentParser(
        prog=f"python -m openpi_opt.{verb}",
        description=description,
        epilog="After an interruption the same command goes on; finished processes are kept.",
    )
    found.add_argument(
        "what",
        nargs="+",
        metavar="STUDY | preset=NAME | GROUP=OPTION",
        help="a study, for its best configuration; or overrides as `sweep` takes them",
    )
    found.add_argument("--store", default=DEFAULT_STORE, metavar="DIR", help="default: mlruns")
    found.add_argument("--preset-dir", metavar="DIR", help="where presets are looked for, too")
    found.add_argument(
        "--rounds",
        type=at_least(MIN_ROUNDS),
        default=8,
        help=f"fresh processes of each configuration, at least {MIN_ROUNDS} (default: %(default)s)",
    )
    found.add_argument(
        "--minutes",
        type=minutes,
        help="begin no round that would not end within this time; what was done is reported",
    )
    found.add_argument(
        "--seed", type=at_least(0), default=0, help="another one measures anew (default: 0)"
    )
    found.add_argument(
        "--allow-lossy", action="store_true", help="a study's best may be lossy (FP8)"
    )
    found.add_argument("--device", type=gpu_name, metavar="GPU", help=DEVICE_HELP)
    found.add_argument("--out", metavar="DIR", help="where table and plot go (default: the study)")
    found.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="do not log to MLflow"
    )
    return found


def session(verb: str, arguments: argparse.Namespace) -> Session:
    """The session that was asked for.

    Raises:
        UserError: no such study or preset, or a target that this machine cannot run or that is
            the baseline.
    """
    machine = probe()
    studies = Store.open(arguments.store, create=False).studies() if _exists(arguments) else []
    is_study = len(arguments.what) == 1 and (
        arguments.what[0] in studies or "=" not in arguments.what[0]
    )
    if is_study:
        store = Store.open(arguments.store, create=False)
        study_dir = store.find_study(arguments.what[0])
        records = Journal.read(study_dir).records()
        found = contenders(records, arguments.allow_lossy, Criteria.load(study_dir))
        cfg = found[0].config
    else:
        cfg = _composed(arguments.what, arguments.preset_dir).resolved(machine)
        store = Store.open(arguments.store)
        study_dir = store.study_dir(f"{verb}-{_name(arguments.what, cfg)}")
    refuse = _refuse(machine)
    target = Target(cfg, refuse)
    reason = refuse(cfg)
    if reason is not None:
        raise UserError(f"{target.label(frozenset(target.knobs))} cannot run here: {reason}")
    if cfg.is_baseline():
        raise UserError(
            f"{' '.join(arguments.what)} is the baseline itself: there is no knob to add or to "
            "take away.\nGive a study with a faster configuration, or preset=NAME."
        )
    journal = Journal.open(study_dir, sys.argv[1:])
    log = MlflowLog(store, cfg.tracking) if arguments.mlflow and cfg.tracking.mlflow else None
    return Session(
        verb=verb,
        target=target,
        runs=FreshRuns(store, journal, log, machine, say),
        folder=Path(arguments.out) if arguments.out else study_dir / verb,
        seed=arguments.seed,
        rounds=arguments.rounds,
        deadline=Deadline(None if arguments.minutes is None else arguments.minutes * 60),
    )


def percent(value: float) -> str:
    """A share as a signed percentage."""
    return f"{value:+.2%}"


def _exists(arguments: argparse.Namespace) -> bool:
    return Path(arguments.store).expanduser().is_dir()


def _composed(overrides: Sequence[str], preset_dir: str | None) -> Config:
    presets = [text.partition("=")[2] for text in overrides if text.startswith("preset=")]
    if len(presets) > 1:
        raise UserError(f"{len(presets)} presets are given; one target has one.")
    rest = [text for text in overrides if not text.startswith("preset=")]
    folder = Path(preset_dir) if preset_dir else None
    return compose(rest, presets[0] if presets else None, folder)


def _name(overrides: Sequence[str], cfg: Config) -> str:
    """The preset's name, or the configuration's hash; with the context, which may differ."""
    presets = [text.partition("=")[2] for text in overrides if text.startswith("preset=")]
    return f"{presets[0] if presets else 'custom'}-{cfg.hash()[:6]}"


def _refuse(machine: Any) -> Callable[[Config], str | None]:
    def refuse(cfg: Config) -> str | None:
        found = refused(cfg, machine)
        return None if found is None else f"{found.outcome}: {found.reason}"

    return refuse
