"""Confirm a study's best configurations and write the winner as a preset.

`python -m openpi_opt.promote STUDY --name NAME`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from openpi_opt import cli, preset
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine, probe
from openpi_opt.paths import user_conf_dir
from openpi_opt.result import Ok, TrialResult
from openpi_opt.search import confirm
from openpi_opt.search.process import run_trial
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError
from openpi_opt.track.store import DEFAULT_STORE, Store

# Probability, over the whole promotion, that something is called faster that is not.
ALPHA = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Confirm, choose, write, tag. Returns 0 when a preset was written.

    Raises:
        UserError: nothing to promote, an existing name, or a machine that cannot run it.
    """
    arguments = _parser().parse_args(argv)
    folder = Path(arguments.preset_dir) if arguments.preset_dir else None
    path = preset.preset_path(arguments.name, folder)
    if path.exists() and not arguments.force:
        raise UserError(f"preset {path} exists. Choose another --name, or --force to replace it.")
    store = Store.open(arguments.store, create=False)
    study_dir = store.find_study(arguments.study)
    journal = Journal.open(study_dir)
    candidates = finalists(journal.records(), arguments.finalists, arguments.allow_lossy)
    tracking = candidates[0].tracking  # as the study was run
    log = MlflowLog(store, tracking) if arguments.mlflow and tracking.mlflow else None
    runner = _Runner(store, study_dir, journal, log)
    baseline, confirmed = runner.confirm(candidates, arguments.rounds)
    winner = confirm.choose(baseline, confirmed, ALPHA / max(1, len(confirmed)))
    _print_table(baseline, confirmed, winner)
    source = _record_of(journal, winner.config)
    run_id = runner.tag(source, arguments.name)
    preset.write(path, winner.config, _provenance(arguments.study, run_id, winner, runner))
    _say(f"wrote {path}")
    _say(f"use it: {_usage(arguments.name, folder)}")
    return 0


def finalists(records: Sequence[Record], count: int, allow_lossy: bool = False) -> list[Config]:
    """The fastest different configurations of a study that are right, without the baseline.

    Lossy ones (FP8) do not compete with the others unless `allow_lossy`.

    An empty list means that only the baseline itself was `ok`.

    Raises:
        UserError: no trial is `ok`, or the trials belong to different contexts.
    """
    ok = [r for r in records if isinstance(r.result, Ok) and r.role != "confirm"]
    if not ok:
        raise UserError(
            "this study has no trial with outcome ok, so there is nothing to promote. "
            "`python -m openpi_opt.compare STUDY` shows the reasons."
        )
    contexts = {r.result.context_hash for r in ok}
    if len(contexts) > 1:
        raise UserError(
            f"this study holds {len(contexts)} different models, workloads or platforms, whose "
            "latencies cannot be compared. Sweep one of them in a study of its own."
        )
    ok.sort(key=lambda r: r.result.latency.mean_ms if isinstance(r.result, Ok) else 0.0)
    distinct: dict[str, Config] = {}
    for record in ok:
        cfg = Config.load(record.result.config)
        if not cfg.is_baseline() and (allow_lossy or not cfg.lossy()):
            distinct.setdefault(cfg.hash(), cfg)
    return list(distinct.values())[:count] or [Config.load(ok[0].result.config).baseline()]


class _Runner:
    """Runs confirmations and records each before anything else is done with it."""

    def __init__(self, store: Store, study_dir: Path, journal: Journal, log: MlflowLog | None):
        self.store, self.study_dir, self.journal, self.log = store, study_dir, journal, log
        self.machine: Machine = probe()

    def confirm(
        self, candidates: Sequence[Config], rounds: int
    ) -> tuple[confirm.Confirmed, list[confirm.Confirmed]]:
        """Baseline and candidates after `rounds` interleaved processes each."""
        self.context = candidates[0].resolved(self.machine)
        baseline = self.context.baseline()
        others = [c for c in candidates if not c.is_baseline()]
        self.fingerprint = fingerprint(self.machine, self.context.platform)
        total = rounds * (1 + len(others))
        _say(
            f"confirming {len(others)} configuration(s) against the baseline: {rounds} rounds, "
            f"{total} fresh processes in random order"
        )
        found = confirm.measure_interleaved([baseline, *others], rounds, self._run, seed=0)
        alpha = ALPHA / max(1, len(others))
        base = _confirmed(baseline, found, None, alpha)
        if base is None:
            raise UserError("the baseline did not end ok, so no gain can be stated; see above.")
        pairs = [(c, _confirmed(c, found, base, alpha)) for c in others]
        for cfg, result in pairs:
            if result is None:
                last = found[cfg.hash()][-1]
                _say(f"dropped {_short(cfg)}: {last.outcome}: {getattr(last, 'reason', '')}")
        return base, [result for _, result in pairs if result is not None]

    def _run(self, cfg: Config, number: int) -> TrialResult:
        quick = cfg.model_copy(
            update={
                "profile": cfg.profile.model_copy(
                    update={"kernels": False, "trace": False, "energy": False}
                )
            }
        )
        uid = uuid4().hex
        folder = self.study_dir / "confirm" / uid
        result = run_trial(quick, folder, self.store.references, lambda phase: None, self.machine)
        result = result.model_copy(update={"fingerprint": self.fingerprint})
        record = Record(
            uid=uid,
            study=self.study_dir.name,
            role="confirm",
            labels=cfg.labels(),
            result=result,
            trial_dir=str(folder.relative_to(self.study_dir)),
            fingerprint_hash=fingerprint_hash(self.fingerprint),
        )
        record = self.journal.append(record)
        shown = f"{result.latency.mean_ms:.3f} ms" if isinstance(result, Ok) else result.outcome
        _say(f"  round {number + 1}: {_short(cfg)}: {shown}")
        self._deliver(record)
        return result

    def tag(self, record: Record | None, name: str) -> str | None:
        """Tag the winner's run in MLflow; its id, or None when MLflow does not have it."""
        if self.log is None or record is None:
            return None
        try:
            self.log.deliver(record, self.study_dir)
            return self.log.tag_run(record.uid, "openpi_opt.preset", name)
        except TrackingError as error:
            _say(f"note: {error}")
            return None

    def _deliver(self, record: Record) -> None:
        if self.log is None:
            return
        try:
            self.log.deliver(record, self.study_dir)
        except TrackingError as error:
            _say(f"note: {error}")


def _confirmed(
    cfg: Config,
    found: dict[str, list[TrialResult]],
    baseline: confirm.Confirmed | None,
    alpha: float,
) -> confirm.Confirmed | None:
    results = [r for r in found[cfg.hash()] if isinstance(r, Ok)]
    if len(results) < len(found[cfg.hash()]):
        return None
    means = [r.latency.mean_ms for r in results]
    gain = confirm.gain(baseline.means_ms, means, alpha) if baseline is not None else None
    return confirm.Confirmed(cfg, means, results, gain)


def _record_of(journal: Journal, cfg: Config) -> Record | None:
    """The study's record of a configuration: the trial, or failing that its last confirmation."""
    same = [r for r in journal.records() if r.result.config_hash == cfg.hash()]
    trials = [r for r in same if r.role != "confirm"]
    found = trials or same
    return found[-1] if found else None


def _provenance(
    study: str, run_id: str | None, winner: confirm.Confirmed, runner: _Runner
) -> dict[str, Any]:
    low, high = winner.ci95_ms()
    gain = winner.gain
    fp = runner.fingerprint
    return {
        "study": study,
        "mlflow_run_id": run_id,
        "promoted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_hash": winner.config.hash(),
        "machine": {"gpu": fp["gpu"] and fp["gpu"]["name"], "cpu": fp["cpu"]},
        "versions": {
            name: fp[name] for name in ("python", "torch", "triton", "aiter", "openpi_opt", "git")
        },
        "model": winner.config.model.model_dump(mode="json"),
        "workload": winner.config.workload.model_dump(mode="json"),
        "processes": len(winner.means_ms),
        "mean_ms": round(winner.mean_ms, 4),
        "std_ms": round(winner.between_std_ms, 4),
        "ci95_ms": [round(low, 4), round(high, 4)],
        "gain_over_baseline": gain
        and {
            "verdict": gain.verdict,
            "mean": round(gain.mean, 4),
            "at_least": round(gain.low, 4),
            "confidence": 1 - ALPHA,
        },
    }


def _print_table(
    baseline: confirm.Confirmed, confirmed: Sequence[confirm.Confirmed], winner: confirm.Confirmed
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="confirmation in fresh interleaved processes")
    for column in ("configuration", "mean ms", "95% interval", "gain", "at least", "verdict", ""):
        table.add_column(column)
    for entry in [baseline, *sorted(confirmed, key=lambda c: c.mean_ms)]:
        low, high = entry.ci95_ms()
        gain = entry.gain
        table.add_row(
            "baseline" if entry is baseline else _short(entry.config),
            f"{entry.mean_ms:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{gain.mean:.2%}" if gain else "",
            f"{gain.low:.2%}" if gain else "",
            gain.verdict if gain else "",
            "winner" if entry is winner else "",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if winner is baseline:
        _say(
            "no configuration is confirmed faster than the baseline: the preset holds the "
            "baseline, the simplest that is as fast. More --rounds can tell smaller gains apart."
        )


def _short(cfg: Config) -> str:
    plain = cfg.baseline().labels()
    changed = {k: v for k, v in cfg.labels().items() if v != plain[k]}
    shown = " ".join(f"{k}={v}" for k, v in changed.items()) or "baseline"
    return f"{shown} (lossy)" if cfg.lossy() else shown


def _usage(name: str, folder: Path | None) -> str:
    if folder is None or folder.absolute() == user_conf_dir() / "preset":
        return f"python -m openpi_opt.sweep preset={name}"
    return f"python -m openpi_opt.sweep --preset-dir {folder} preset={name}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    parser.add_argument(
        "--finalists", type=_at_least(1), default=3, help="candidates (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=_at_least(3),
        default=5,
        help="processes per configuration, at least 3 (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="let lossy configurations (FP8) be the best"
    )
    parser.add_argument(
        "--no-mlflow", dest="mlflow", action="store_false", help="do not log to MLflow"
    )
    return parser


def _at_least(minimum: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "int"
    return parse


if __name__ == "__main__":
    cli.run(main)
