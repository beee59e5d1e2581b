"""A sweep over `weights.seed` whose trials are stubs: `python -m benchmarks.stub_sweep STORE`.

All of the engine is real: processes, leases, claims, journal, Optuna and, with `--mlflow`, MLflow.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.machine import Machine, TorchBuild
from openpi_opt.search.display import Lines
from openpi_opt.search.plan import StudyRequest
from openpi_opt.search.process import run_trial
from openpi_opt.search.settings import Settings
from openpi_opt.search.space import Space, parse_override
from openpi_opt.search.study import StudyOutcome, run_study

STUDY = "stub"
# A fixed description, so that every host shares its results.
MACHINE = Machine((), TorchBuild("stub", None, None), "stub cpu", cores=2, memory_mib=8000)
HANG_LIMIT_SECONDS = 1.0


def compose(overrides: list[str], mlflow: bool = False) -> Config:
    """The configuration of a seed."""
    seeds = [int(str(parse_override(line).value())) for line in overrides]
    return Config.parse(
        {
            "weights": {"seed": seeds[0]},
            "tracking": {"mlflow": mlflow},
            "limits": {"compile": HANG_LIMIT_SECONDS},
        }
    )


def sweep(store: Path, own: argparse.Namespace) -> StudyOutcome:
    """Run the study until every seed has a result."""
    stub = [sys.executable, str(Path(__file__).with_name("stub_trial.py"))]
    stub += ["--seconds", str(own.seconds), *(["--faults"] if own.faults else [])]
    stub += ["--started", str(own.started)] if own.started else []
    settings = Settings.parse(
        {
            "store": str(store),
            "n_trials": own.trials or own.seeds,
            "sampler": own.sampler,
            "baseline": False,
            "devices": {"cpu_slots": own.slots},
        }
    )
    request = StudyRequest(
        STUDY, Space.parse([f"weights.seed=range(0,{own.seeds})"]), settings, MACHINE
    )
    run = partial(run_trial, command=stub)
    return run_study(request, partial(compose, mlflow=own.mlflow), Lines(), run)


def parser() -> argparse.ArgumentParser:
    """Options of a sweep of stubs."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.stub_sweep")
    options.add_argument("store", type=Path)
    options.add_argument("--seeds", type=int, default=22)
    options.add_argument("--trials", type=int, help="n_trials (default: all seeds)")
    options.add_argument("--sampler", default="grid")
    options.add_argument("--slots", type=int, default=2)
    options.add_argument("--seconds", type=float, default=0.05)
    options.add_argument("--faults", action="store_true")
    options.add_argument("--mlflow", action="store_true")
    options.add_argument("--started", type=Path, help="file that gets a line for every start")
    return options


def main() -> int:
    """Sweep."""
    own = parser().parse_args()
    return sweep(own.store, own).exit_code


if __name__ == "__main__":
    cli.run(main)
