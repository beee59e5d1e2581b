"""`python -m openpi_opt.track sync`: deliver to MLflow what it does not have yet."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from openpi_opt.cli import CONTINUED, run
from openpi_opt.process.locks import Controllers
from openpi_opt.track.follow import follow
from openpi_opt.track.journal import Journal
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError, tracking_of
from openpi_opt.track.optuna_copy import CopyError, OptunaCopy
from openpi_opt.track.store import Store
from openpi_opt.verbs import add_store, verb_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Deliver the named studies, or all; 0 when MLflow has everything, 1 when it is away."""
    arguments = _parser().parse_args(argv)
    if arguments.verb == "follow":
        return follow(end_if_left)
    store = Store.open(arguments.store, create=False)
    for name in arguments.study or store.studies():
        study_dir = store.find_study(name)
        journal = Journal.open(study_dir)
        for note in journal.notes:
            print(f"note: {note}", file=sys.stderr)
        log = MlflowLog(store, tracking_of(journal))
        try:
            count = log.sync(study_dir, journal, verify=True)
            log.show(study_dir, journal)
            end_if_left(study_dir, log)
        except TrackingError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        _sync_optuna(store, study_dir, journal)
        print(f"{name}: {count} of {len(journal.records())} records delivered, the rest was there")
    return 0


def _sync_optuna(store: Store, study_dir: Path, journal: Journal) -> None:
    """Bring the store's own copy for Optuna up to date, where there is one."""
    if not store.optuna_db.exists():
        return
    try:
        OptunaCopy(store, study_dir).update(journal.records())
    except CopyError as error:
        print(f"warning: {error}", file=sys.stderr)


def end_if_left(study_dir: Path, log: MlflowLog) -> None:
    """End the study's run in MLflow when no sweep works on it any more."""
    controllers = Controllers(study_dir)
    with controllers.alone():
        try:
            if controllers.others() == 0:
                log.end_study(study_dir)
        finally:
            controllers.leave()


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "track",
        description="Deliver studies from their journals to MLflow.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    verbs.add_parser("follow", help="what a verb starts to copy its results while it works")
    sync = verbs.add_parser(
        "sync",
        help="deliver what MLflow does not have yet",
        description=(
            "Deliver trials that MLflow does not have yet, to MLFLOW_TRACKING_URI when that is "
            "set, else to the store's own database. Nothing is delivered twice."
        ),
    )
    sync.add_argument("study", nargs="*", metavar="STUDY", help="default: every study in the store")
    add_store(sync)
    return parser


if __name__ == "__main__":
    run(main, CONTINUED)
