"""Confirm a study's best configurations and write the winner as a preset.

`python -m openpi_opt.promote STUDY --name NAME`
"""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from openpi_opt import cli, criteria, preset
from openpi_opt.confirm import bench, simulate, summary
from openpi_opt.confirm.bench import ProcessBench, contenders
from openpi_opt.confirm.fresh import FreshRuns
from openpi_opt.confirm.promotion import Judged, Wanted
from openpi_opt.confirm.summary import of_promotion
from openpi_opt.paths import user_conf_dir
from openpi_opt.process.devices import DEVICE_HELP, gpu_name
from openpi_opt.track.journal import Journal
from openpi_opt.track.left import leave_tag, leave_verdict
from openpi_opt.track.link import where
from openpi_opt.track.store import DEFAULT_STORE, Store
from openpi_opt.verbs import verb_parser

_PRESET_TAG = "openpi_opt.preset"


def main(argv: Sequence[str] | None = None) -> int:
    """Confirm, choose, write, tag. Returns 0 when a preset was written, 1 when limits forbid it."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--simulate" in words:
        return simulate.main(words)
    arguments = _parser().parse_args(words)
    folder = Path(arguments.preset_dir) if arguments.preset_dir else None
    path = preset.preset_path(arguments.name, folder)
    if not arguments.force:
        preset.check_free(path)
    store = Store.open(arguments.store, create=False)
    journal = Journal.open(store.find_study(arguments.study))
    judged_by = criteria.of_arguments(arguments, journal.study_dir)
    candidates = contenders(journal.records(), criteria=judged_by)
    _say_what_is_judged(judged_by)
    known = candidates[0].config.tracking  # as the study was run
    tracking = known if arguments.mlflow and known.mlflow else None
    runs = FreshRuns(store, journal, tracking, cli.this_machine(), cli.say)
    wanted = Wanted(
        seed=secrets.randbits(32),
        finalists=arguments.finalists,
        rounds=arguments.rounds,
        limit_s=arguments.minutes * 60,
    )
    bench.check_time(runs, candidates, wanted)
    with runs.alone(candidates[0].config.resolved(runs.machine), arguments.device):
        # The wait may have been long: all that it may have changed is looked at again.
        if not arguments.force:
            preset.check_free(path)
        journal.refresh()
        candidates = contenders(journal.records(), criteria=judged_by)
        benched, judged = bench.confirm(runs, candidates, wanted, arguments.again, judged_by)
        summary.tell(benched, judged)
        over = benched.over[judged.winner.subject.key]
        if over:  # only the baseline: others above a limit were dropped
            cli.say(
                "no preset is written: nothing that keeps the limits is confirmed faster than the "
                f"baseline, which itself does not keep them ({criteria.over_text(over)}). More "
                "--minutes can tell smaller gains apart; --limit NAME=VALUE judges by another "
                "limit."
            )
            return 1
        _write(benched, judged, arguments, path, judged_by.limits)
    at = "" if folder is None or folder.absolute() == user_conf_dir() / "preset" else folder
    flag = f"--preset-dir {at} " if at else ""
    cli.say(f"wrote {path}")
    cli.say(f"use it: python -m openpi_opt.sweep {flag}preset={arguments.name}")
    cli.say(f"see it: {where(runs.study_dir)}")
    return 0


def _write(
    benched: ProcessBench,
    judged: Judged,
    arguments: argparse.Namespace,
    path: Path,
    limits: Mapping[str, float],
) -> None:
    """Write the winner's preset, have its trial tagged, and its figures shown in MLflow.

    The trial is the study's record of the configuration, or failing that its last confirmation.
    """
    runs, key, name = benched.runs, judged.winner.subject.key, arguments.name
    winner, records = benched.configs[key], runs.journal.records()
    same = [record for record in records if record.result.config_hash == key]
    trials = [record for record in same if record.role != "confirm"]
    uid = (trials or same)[-1].uid
    document = {"study": arguments.study, "trial": uid}
    document |= of_promotion(winner, judged, benched.confirmed[key], runs.fingerprint(winner))
    document |= {"limits": limits} if limits else {}
    replaced = preset.presets([path.parent]).get(name, {})
    preset.write(path, winner, document, replace=arguments.force)
    old, other = replaced.get("trial"), runs.study_dir.parent / str(replaced.get("study"))
    if old not in (None, uid) and other.is_dir():
        leave_tag(other, str(old), _PRESET_TAG, f"{name} (replaced)")
    leave_tag(runs.study_dir, uid, _PRESET_TAG, name)
    # On the run above the processes that gave the figures.
    low, high = document["ci95_ms"]
    figures = {f"latency/{key}": document[key] for key in ("mean_ms", "p95_ms", "p99_ms")}
    figures |= {"latency/ci95_low_ms": low, "latency/ci95_high_ms": high}
    text = f"Preset **{name}**: {document['mean_ms']:.3f} ms (95%: {low:.3f} to {high:.3f})"
    if gain := document["gain_over_baseline"]:
        figures |= {"gain": gain["mean"], "gain_at_least": gain["at_least"]}
        text += (
            f", {gain['verdict']} than the baseline by {gain['mean']:.2%}, at least "
            f"{gain['at_least']:.2%}"
        )
    confirmed = [record.uid for record in records if record.role == "confirm"]
    leave_verdict(runs.study_dir, confirmed[-1], name, figures, f"{text}.")


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


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "promote",
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
        help="confirm once more; without it an interrupted promotion is continued, and a finished "
        "one is answered from its runs",
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
