"""A sweep for experiments that are cut into pieces: `python -m benchmarks.carried`.

    python -m benchmarks.carried [--known JOURNAL] [--beside "WORDS"] words of a sweep ...

The points of the journal are told to the sampler alone, at the values that the space has today:
nothing of them counts as measured, so another machine, guard or version may have measured them. So
a search that was cut off goes on elsewhere. The configuration of WORDS is measured as one of the
sweep's trials (its role is `baseline`), of which neither the sampler nor the race hears.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.samplers import recorded_points
from openpi_opt import cli, sweep
from openpi_opt.engine import study
from openpi_opt.engine.findings import Findings
from openpi_opt.engine.jobs import Jobs
from openpi_opt.engine.ledger import Job
from openpi_opt.space.compose import Composer
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.track.journal import Record


def know(journal: Path) -> None:
    """Tell it to the sampler before the sweep asks."""
    make = study._optimizer

    def taught(request: Any, *rest: Any) -> Optimizer:
        optimizer = make(request, *rest)
        found = list(recorded_points(journal, request.space))
        optimizer.learn(found)
        print(f"{len(found)} trials of {journal.name} are known to the sampler", flush=True)
        return optimizer

    study._optimizer = taught


def beside(words: list[str]) -> None:
    """Measure this configuration first, and tell nobody."""
    consider, take, begun = Jobs._consider, Findings.take, []

    def considered(jobs: Jobs, *rest: Any) -> None:
        if not begun:
            begun.append(True)
            cfg = Composer()(words).resolved(jobs.request.machine)
            jobs._route(Job(cfg, "baseline", "[beside]"), show=False)
        consider(jobs, *rest)

    def taken(findings: Findings, job: Job, record: Record) -> None:
        if job.proposal is not None:
            take(findings, job, record)

    Jobs._consider, Findings.take = considered, taken  # type: ignore[method-assign]


def main() -> int:
    """Sweep."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.carried")
    options.add_argument("--known", type=Path)
    options.add_argument("--beside")
    own, sys.argv[1:] = options.parse_known_args()
    if own.known:
        know(own.known)
    if own.beside:
        beside(own.beside.split())
    return sweep.main()


if __name__ == "__main__":
    cli.run(main)
