"""Run one configuration in this process and write its result: `python -m openpi_opt.trial`.

The sweep starts one such process per trial. Started by hand it first executes itself again in the
environment that the sweep would give it, because variables must be there before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from openpi_opt import cli
from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine, probe
from openpi_opt.measure import audit, gpu_state, power
from openpi_opt.process.environment import (
    CACHES,
    KEPT_MEMORY,
    child_environment,
    cleared_names,
    knob_variables,
)
from openpi_opt.process.progress import Progress
from openpi_opt.track import identity
from openpi_opt.track.fingerprint import fingerprint

Result = results.Ok | results.Pruned | results.Wrong | results.Refused | results.Failed


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run, write the result. Exit code 0 whatever the outcome is."""
    arguments = _parser().parse_args(argv)
    text = arguments.resolved or arguments.config.read_text(encoding="utf-8")
    cfg = Config.load(json.loads(text))
    machine = probe()
    if not arguments.in_place:
        _execute_in_place(cfg.resolved(machine), machine)
    progress = Progress(arguments.progress_fd, arguments.gate_fd, arguments.stopped_fd)
    outcome = run(cfg, machine, progress, arguments.references, arguments.result.parent)
    results.write(arguments.result, outcome)
    return 0


def run(
    cfg: Config, machine: Machine, progress: Progress, references: Path, folder: Path
) -> Result:
    """Run `cfg` to whatever outcome it has. Only interruptions are raised."""
    common: dict[str, Any] = {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "context_hash": cfg.context_hash(),
        "fingerprint": fingerprint(machine, cfg.platform),
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        outcome = _run(cfg, machine, progress, references, folder)
    except RefusedError as refusal:
        outcome = {"outcome": refusal.outcome, "reason": refusal.reason}
    except Exception as error:  # noqa: BLE001  every end of a trial is an outcome, with its log
        traceback.print_exc()
        outcome = _failure(error, progress.phase)
    progress.leave()
    found = {"files": identity.imported(cfg), "phase_seconds": progress.seconds}
    return results.parse_plain({**common, **found, **outcome})


def _run(
    cfg: Config, machine: Machine, progress: Progress, references: Path, folder: Path
) -> dict[str, Any]:
    for knob in KNOBS:
        refusal = knob.check(cfg, machine)
        if refusal is not None:
            raise RefusedError(refusal.outcome, refusal.reason)
    power.require(cfg, machine)
    of_sweep = {*CACHES, *(KEPT_MEMORY if cfg.device == "cpu" else ())}
    decisive = [name for name in cleared_names() if name not in of_sweep]
    checks = audit.audit(cfg, machine, os.environ, knob_variables(cfg), decisive)
    gpus = machine.gpus_for(cfg.device)
    progress.enter("import")  # seconds in which the GPU is not wanted
    from openpi_opt.measuring import Measuring

    plain, own = cfg.baseline().knobs, cfg.canonical().knobs
    if own["compile"] != plain["compile"] or own["graph"] != plain["graph"]:
        import torch._dynamo  # noqa: F401  a capture asks it whether something was compiled
    identity.imported(cfg)  # as they are now: they may be edited while this runs
    with contextlib.ExitStack() as stack:
        # Before torch makes a context: processes that are there now are not this one.
        monitor = stack.enter_context(gpu_state.monitor(gpus[0])) if gpus else None
        outcome = Measuring(cfg, machine, progress, references, folder, monitor).outcome()
    if outcome["outcome"] == "ok":
        outcome["checks"] += [*checks, audit.inductor(cfg)]
    return outcome


# What the host's allocator, the GPU's runtime and its libraries say; torch's own has a class.
_OUT_OF_MEMORY = ("can't allocate memory", "error: out of memory", "ALLOC_FAILED")


def _failure(error: Exception, phase: str) -> dict[str, Any]:
    import torch

    message = str(error).strip() or type(error).__name__
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in message for words in _OUT_OF_MEMORY)
    )
    first_lines = " ".join(message.splitlines()[:2])
    return {
        "outcome": "oom" if out_of_memory else "error",
        "reason": f"{type(error).__name__}: {first_lines}"[:500],
        "phase": phase,
        "log_tail": traceback.format_exc()[-8000:],
    }


def _execute_in_place(cfg: Config, machine: Machine) -> NoReturn:
    """Become the same command in the environment of a trial, with `auto` resolved."""
    argv = [sys.executable, "-m", "openpi_opt.trial", "--in-place", *sys.argv[1:]]
    argv += ["--resolved", json.dumps(cfg.dump())]
    os.execve(sys.executable, argv, child_environment(cfg, machine))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.trial",
        description="Run one configuration in this process and write its result document.",
    )
    parser.add_argument("--config", type=Path, required=True, help="config.json of a trial")
    parser.add_argument("--result", type=Path, required=True, help="where the result goes")
    parser.add_argument(
        "--references",
        type=Path,
        default=Path("mlruns/references"),
        help="folder of the guard's references (default: %(default)s)",
    )
    parser.add_argument(
        "--progress-fd", type=int, help="file descriptor for phases (default: stderr)"
    )
    for name in ("gate", "stopped"):
        parser.add_argument(f"--{name}-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--in-place", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resolved", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    cli.run(main, "no result was written")
