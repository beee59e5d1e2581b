"""A promotion in small, as a program: a few fresh processes of one configuration, one by one.

`python fresh_session.py STORE STUDY COUNT SECONDS`; with `--trial` it is the process itself. What
ran when, and on which cores, is appended to STORE/ran.jsonl. Nothing but the workload is a stub.
"""

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.stub_sweep import MACHINE
from benchmarks.stub_trial import document, pass_gate
from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.process.run import run_trial
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import Store

CFG = Config.parse({"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}})


def session() -> int:
    """Run the processes, or those that an earlier session did not finish."""
    path, study, count, seconds = sys.argv[1:]
    store = Store.open(path)
    journal = Journal.open(store.study_dir(study))
    command = [sys.executable, __file__, "--trial", seconds, path]
    run = partial(run_trial, command=command)
    runs = FreshRuns(store, journal, None, MACHINE, partial(print, file=sys.stderr), run)
    with runs.alone(CFG):
        for number in range(int(count)):
            next(runs.in_turn([Planned(CFG, f"round {number}", ("test", number))]))
    return 0


def trial() -> None:
    """Take SECONDS, write a result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trial", nargs=2, metavar=("SECONDS", "STORE"))
    parser.add_argument("--in-place", action="store_true")
    for name in ("config", "result", "references"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("progress", "gate", "stopped"):
        parser.add_argument(f"--{name}-fd", type=int)
    own = parser.parse_args()
    pass_gate(own.progress_fd, own.gate_fd)
    os.write(own.progress_fd, b'{"phase": "measure"}\n')
    began = time.monotonic()
    with Path(own.trial[1], "starts.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    config = json.loads(own.config.read_text())
    known = {"config_hash": CFG.hash(), "context_hash": CFG.context_hash()}
    time.sleep(float(own.trial[0]))
    ran = {"began": began, "ended": time.monotonic(), "cores": sorted(os.sched_getaffinity(0))}
    with Path(own.trial[1], "ran.jsonl").open("a") as file:
        file.write(json.dumps(ran) + "\n")
    unfinished = own.result.with_suffix(".tmp")
    unfinished.write_text(json.dumps(document(config, known, 10.0)))
    unfinished.rename(own.result)


if __name__ == "__main__":
    if "--trial" in sys.argv:
        trial()
    else:
        cli.run(session)
