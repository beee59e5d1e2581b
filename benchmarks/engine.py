"""What the engine costs for each trial, with 10, 1,000 and 10,000 finished ones in the study.

    python -m benchmarks.engine [--trials 20] [--finished 10,1000,10000]

Everything is real (Hydra's composition, TPE, claims, leases, journal, Optuna's database, one
process per trial) but the workload: a stub of known duration, and the trials that are finished
before, whose records are written without running them. Overhead is the time from the end of one
stub's process to the begin of the next one's work, less the time that the same process takes to
begin when nothing but a shell command stands before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.stub_sweep import MACHINE
from benchmarks.stub_trial import document
from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.plan import StudyRequest, space_hash
from openpi_opt.engine.study import run_study
from openpi_opt.process.locks import Controllers
from openpi_opt.process.run import run_trial
from openpi_opt.result import parse_plain
from openpi_opt.space.compose import Composer
from openpi_opt.space.points import Points
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Record
from openpi_opt.track.store import Store

STUDY = "overhead"
STUB = Path(__file__).with_name("stub_trial.py")
WORDS = (
    *("platform=cpu", "tracking=none", "model=pi0_mini"),
    *("precision=bfloat16,float32", "attention.vision=eager,sdpa", "attention.denoise=eager,sdpa"),
    *("attention.prefill=eager,sdpa", "compile=off,default", "fusion=none,all"),
    *("simplify=none,all", "guard.cap=interval(0.01,0.9)"),
)


def measure(finished: int, trials: int) -> dict[str, float]:
    """Overhead of `trials` trials in a study with `finished` ones."""
    compose = Composer()
    space = Space.parse(WORDS, compose.options)
    with tempfile.TemporaryDirectory(prefix="openpi-opt-bench-") as folder:
        store = Store.open(folder)
        _finish(store, space, Points(space, compose, MACHINE).check()[0], finished)
        settings = Settings.parse(
            {
                "store": folder,
                "n_trials": finished + trials,
                "sampler": "tpe",
                "baseline": False,
            }
        )
        request = StudyRequest(STUDY, space, settings, MACHINE)
        log = Path(folder) / "times.txt"
        run = partial(run_trial, command=[sys.executable, str(STUB), "--times", str(log)])
        # As if the sweep that found all this were at work still: it makes the copy for Optuna.
        other = Controllers(store.study_dir(STUDY))
        opening = time.monotonic()
        outcome = run_study(request, compose, Display(), run)
        other.leave()
        assert outcome.new == trials, f"{outcome.new} of {trials}: {outcome.ended}"
        spans = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
        gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
        begin = _begin_alone(outcome.store.study_dir(STUDY))
    return {
        "finished": finished,
        "open_seconds": spans[0][0] - opening,
        "overhead_ms": 1e3 * (statistics.mean(gaps) - begin),
        "overhead_median_ms": 1e3 * (statistics.median(gaps) - begin),
        "overhead_most_ms": 1e3 * (max(gaps) - begin),
    }


def _finish(store: Store, space: Space, cfg: Config, count: int) -> None:
    """Write records of random points."""
    drawn = random.Random(0)
    seen = fingerprint(MACHINE, cfg.platform)
    machine_hash = fingerprint_hash(seen)
    study_dir = store.study_dir(STUDY)
    study_dir.mkdir(parents=True)
    with (study_dir / "journal.jsonl").open("w", encoding="utf-8") as journal:
        for number in range(count):
            params = {
                key: dimension.text(drawn.uniform(0.01, 0.9))
                if dimension.count() is None
                else drawn.choice(list(dimension.values))
                for key, dimension in space.dimensions.items()
            }
            weights = cfg.weights.model_copy(update={"seed": number})
            one = cfg.model_copy(update={"weights": weights})
            known = {"config_hash": one.hash(), "context_hash": one.context_hash()}
            record = Record(
                uid=f"{drawn.getrandbits(128):032x}",
                study=STUDY,
                number=number,
                params=params,
                space=space_hash(space, machine_hash),
                labels=cfg.labels(),
                result=parse_plain(document(one.dump(), known, drawn.uniform(10, 100))),
                fingerprint_hash=machine_hash,
            )
            journal.write(record.model_dump_json() + "\n")


def _begin_alone(study_dir: Path) -> float:
    """Seconds from starting the stub to its first line, without the engine."""
    folder = next((study_dir / "trials").iterdir())
    log = folder / "alone.txt"
    taken = []
    for _ in range(10):
        began = time.monotonic()
        argv = [sys.executable, str(STUB), "--times", str(log), "--progress-fd", "1"]
        argv += ["--config", str(folder / "config.json"), "--result", str(folder / "alone.json")]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        taken.append(float(log.read_text().split()[-2]) - began)
    return statistics.median(taken)


def main() -> int:
    """Print one line for each number of finished trials."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--finished", default="10,1000,10000")
    parser.add_argument("--json", action="store_true", help="one JSON document per line")
    own = parser.parse_args()
    for finished in map(int, own.finished.split(",")):
        found = measure(finished, own.trials)
        print(
            json.dumps(found)
            if own.json
            else (
                f"{finished:6} finished trials: {found['overhead_ms']:6.1f} ms per trial "
                f"(median {found['overhead_median_ms']:.1f}, most {found['overhead_most_ms']:.1f}),"
                f" opening the study {found['open_seconds']:.1f} s"
            ),
            flush=True,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
