"""A sweep over `weights.seed` whose trials are stubs: `python -m benchmarks.stub_sweep STORE`.

All of the engine is real: processes, leases, claims, journal, Optuna and, with `--mlflow`, MLflow.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import sabotage
from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.engine.display import Lines
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.study import StudyOutcome, run_study
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.process.run import run_trial
from openpi_opt.remote.remote import Nodes, connected
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space, parse_override
from openpi_opt.track import copies
from openpi_opt.track.store import Store

STUDY = "stub"
# A fixed description, so that every host shares its results.
MACHINE = Machine((), TorchBuild("stub", None, None), "stub cpu", cores=2, memory_mib=10**6)
HANG_LIMIT_SECONDS = 1.0


def machine(gpus: int) -> Machine:
    """The same with `gpus` GPUs, which are slots that need no core: a stub only sleeps."""
    about = ("stub gpu", "nvidia", "sm_90", 10**6, "1")
    made = tuple(Gpu(number, f"GPU-stub-{number}", *about) for number in range(gpus))
    return replace(MACHINE, gpus=made, torch=TorchBuild("stub", "12.8", None))


def compose(overrides: list[str], mlflow: bool = False, device: str = "cpu") -> Config:
    """The configuration of a seed."""
    seeds = [int(str(parse_override(line).value())) for line in overrides]
    return Config.parse(
        {
            "platform": {"device": device},
            "weights": {"seed": seeds[0]},
            "tracking": {"mlflow": mlflow},
            "limits": {"compile": HANG_LIMIT_SECONDS},
        }
    )


def sweep(store: Path, own: argparse.Namespace) -> StudyOutcome:
    """Run the study until every seed has a result."""
    stub = [sys.executable, str(Path(__file__).with_name("stub_trial.py"))]
    stub += ["--seconds", str(own.seconds), *(["--faults"] if own.faults else [])]
    stub += ["--escapes"] if own.escapes else []
    for name in (
        "started",
        "finished",
        "lengths",
        "times",
        "imports",
        "dies",
        "events",
        "measures",
        "reads",
        "together",
        "ticks",
    ):
        stub += [] if getattr(own, name) is None else [f"--{name}", str(getattr(own, name))]
    settings = Settings.parse(
        {
            "executor": json.loads(own.executor),
            **({"storage": own.storage} if own.storage else {}),
            "store": str(store),
            "n_trials": own.trials or own.seeds,
            "sampler": own.sampler,
            "baseline": False,
            "devices": {
                "cpu_slots": own.slots,
                "gpus": own.devices or "all",
                "prepare": own.prepare,
            },
        }
    )
    space = Space.parse([f"weights.seed=range(0,{own.seeds})"])
    run = partial(run_trial, command=stub)
    device = "cuda" if own.gpus else "cpu"
    composed = partial(compose, mlflow=own.mlflow, device=device)
    with connected(settings.executor, own.slots) as engine:
        found, nodes = machine(own.gpus) if own.gpus else MACHINE, None
        if engine is not None:
            nodes = Nodes.ask(engine, Store.open(store), Lines(), own.slots, stub[1:])
            found = nodes.machine
        request = StudyRequest(own.study, space, settings, found)
        return run_study(request, composed, Lines(), run, nodes)


def parser() -> argparse.ArgumentParser:
    """Options of a sweep of stubs."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.stub_sweep")
    options.add_argument("store", type=Path)
    options.add_argument("--seeds", type=int, default=24)
    options.add_argument("--trials", type=int, help="n_trials (default: all seeds)")
    options.add_argument("--sampler", default="grid")
    options.add_argument("--slots", type=int, default=2)
    options.add_argument("--gpus", type=int, default=0, help="so many stub GPUs instead of cores")
    options.add_argument("--prepare", type=int, default=1, help="trials beside each other")
    options.add_argument("--measures", type=float, help="seconds with the device")
    options.add_argument("--reads", type=float, help="seconds without it afterwards")
    options.add_argument("--escapes", action="store_true", help="every third trial leaves a daemon")
    options.add_argument("--together", type=int, help="ask when so many have imported")
    options.add_argument(
        "--ticks", type=Path, help="file for when trials and children of theirs ran"
    )
    options.add_argument("--devices", type=int, action="append", help="use this stub GPU only")
    options.add_argument("--study", default=STUDY)
    options.add_argument("--seconds", type=float, default=0.05)
    options.add_argument("--lengths", type=Path, help="JSON list: seconds for each seed")
    options.add_argument("--faults", action="store_true")
    options.add_argument("--executor", default='{"kind": "local"}', help="as JSON")
    options.add_argument("--storage", help="as in a sweep")
    options.add_argument("--mlflow", action="store_true")
    options.add_argument("--wait", type=float, help="seconds that its end waits for copies")
    options.add_argument("--started", type=Path, help="file that gets a line for every start")
    options.add_argument("--finished", type=Path, help="file that gets the uid of every result")
    options.add_argument("--times", type=Path, help="file for when the work began and ended")
    options.add_argument("--imports", type=float, help="seconds that each trial imports")
    options.add_argument("--dies", type=int, help="seed that dies in its import")
    options.add_argument("--events", type=Path, help="file for what each trial did when, as JSON")
    options.add_argument("--torn", type=float, default=0.0, help=sabotage.TORN)
    options.add_argument("--sabotage", choices=sabotage.WAYS, help="break the engine")
    return options


def main() -> int:
    """Sweep."""
    own = parser().parse_args()
    copies.WAIT_S = copies.WAIT_S if own.wait is None else own.wait
    if own.torn:
        sabotage.tear(own.torn)
    if own.sabotage:
        sabotage.WAYS[own.sabotage]()
    return sweep(own.store, own).exit_code


if __name__ == "__main__":
    cli.run(main, cli.CONTINUED)
