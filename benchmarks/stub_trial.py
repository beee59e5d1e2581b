"""A workload that stands in for a trial where the engine itself is measured or broken on purpose.

It takes the arguments of `python -m openpi_opt.trial`, begins in 30 ms, and takes as long as it is
told. With `--faults` its behaviour follows from `weights.seed`, one after another of `FAULTS`. It
is the argument `command` of `process.run.run_trial`; no option of a sweep leads here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FAULTS = (
    *("ok", "segfault", "ok", "abort", "ok", "killed", "ok", "exit", "ok", "garbage", "ok", "half"),
    *("ok", "nan", "ok", "negative", "ok", "flood", "ok", "daemon", "ok", "hang"),
    *("ok", "escape"),
)
FLOOD_BYTES = 40 * 2**20


def main() -> None:
    """Behave as told."""
    began = time.monotonic()
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--started", type=Path, help="file that gets a line for every start")
    parser.add_argument("--times", type=Path, help="file for when the work began and ended")
    parser.add_argument("--lengths", type=Path, help="JSON list: seconds for each seed")
    parser.add_argument("--finished", type=Path, help="file that gets the uid of every result")
    parser.add_argument("--imports", type=float, default=0.0, help="seconds before it loads")
    parser.add_argument("--measures", type=float, default=0.0, help="seconds with the device")
    parser.add_argument("--reads", type=float, default=0.0, help="seconds without it afterwards")
    parser.add_argument("--escapes", action="store_true", help="every third leaves a daemon")
    parser.add_argument("--together", type=int, default=0, help="ask when so many have imported")
    parser.add_argument("--ticks", type=Path, help="file for when it and a child of it ran")
    parser.add_argument("--dies", type=int, help="seed that dies in its import")
    parser.add_argument("--events", type=Path, help="file for what each trial did when, as JSON")
    parser.add_argument("--in-place", action="store_true")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--progress-fd", type=int, required=True)
    parser.add_argument("--gate-fd", type=int)
    parser.add_argument("--stopped-fd", type=int)
    own = parser.parse_args()
    config = json.loads(own.config.read_text())
    seed = config["weights"]["seed"]
    if own.started is not None:
        with own.started.open("a") as file:
            file.write(f"{seed}\n")
    fault = FAULTS[seed % len(FAULTS)] if own.faults else "ok"

    def event(what: str) -> None:
        if own.events is not None:
            about = {"seed": seed, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "what": what}
            line = json.dumps({**about, "pid": os.getpid(), "at": time.monotonic()})
            with own.events.open("a") as file:
                file.write(f"{line}\n")

    event("began")
    if own.ticks is not None:
        tick(own.ticks, seed)
    if own.imports:
        _say(own.progress_fd, "import")
        time.sleep(own.imports)
    if seed == own.dies:
        os.abort()
    event("imported")
    _say(own.progress_fd, "load")
    lengths = [own.seconds] if own.lengths is None else json.loads(own.lengths.read_text())
    time.sleep(lengths[seed % len(lengths)])
    while own.together and own.events.read_text().count('"imported"') < own.together:
        time.sleep(0.01)
    _say(own.progress_fd, "compile")
    _misbehave("escape" if own.escapes and seed % 3 == 0 else fault, own.result)
    pass_gate(own.progress_fd, own.gate_fd)
    _say(own.progress_fd, "measure")
    event("device")
    time.sleep(own.measures)
    event("measured")
    if own.reads:  # as openpi_opt.trial.Progress.free
        _say(own.progress_fd, "report")
        time.sleep(own.reads)
    known = json.loads(own.config.with_name("trial.json").read_text())
    mean_ms = {"nan": math.nan, "negative": -5.0}.get(fault, 10.0 + seed % 97)
    text = json.dumps(document(config, known, mean_ms))
    _write(own.result, {"garbage": "}{", "half": text[: len(text) // 2]}.get(fault, text))
    if own.finished is not None:  # before the controller can know of it
        with own.finished.open("a") as file:
            file.write(f"{known['uid']} {seed}\n")
    if own.times is not None:
        with own.times.open("a") as file:
            file.write(f"{began} {time.monotonic()}\n")
    event("end")


def tick(path: Path, seed: int) -> None:
    """Write down every 10 ms that this process runs, and a child in a session of its own."""

    def run(who: str, parent: int) -> None:
        with path.open("a") as file:
            while os.getppid() == parent:
                file.write(f"{seed} {who} {time.monotonic()}\n")
                file.flush()
                time.sleep(0.01)

    me = os.getpid()
    if os.fork() == 0:
        os.setsid()
        run("child", me)
        os._exit(0)
    threading.Thread(target=run, args=("trial", os.getppid()), daemon=True).start()


def pass_gate(progress_fd: int, gate_fd: int | None) -> None:
    """As `process.progress.Progress.ask`."""
    if gate_fd is None:
        return
    _say(progress_fd, "wait")
    if not os.read(gate_fd, 1):
        sys.exit("the gate was closed")


def _misbehave(fault: str, result: Path) -> None:
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "abort":
        os.abort()
    elif fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(3)
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "daemon":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True
        )
    elif fault == "escape" and os.fork() == 0:  # a daemon with every descriptor and no variable
        os.setsid()
        if os.fork() == 0:
            os.execve("/bin/sleep", [str(result), "3600"], {})
        os._exit(0)
    elif fault == "flood":
        line = b"x" * 65_535 + b"\n"
        for _ in range(FLOOD_BYTES // len(line)):
            os.write(1, line)


def _say(fd: int, phase: str) -> None:
    os.write(fd, (json.dumps({"phase": phase}) + "\n").encode())


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def document(config: dict, known: dict, mean_ms: float) -> dict:
    """What `openpi_opt.result.Ok` reads."""
    samples = [mean_ms] * 10
    return {
        "outcome": "ok",
        "schema_version": 3,
        "config": config,
        "config_hash": known["config_hash"],
        "context_hash": known["context_hash"],
        "started_at": "2026-01-01T00:00:00+00:00",
        "latency": {
            "clock": "wall",
            "mean_ms": mean_ms,
            "std_ms": 0.1,
            **dict.fromkeys(("min_ms", "p50_ms", "p95_ms", "p99_ms"), mean_ms),
            **dict.fromkeys(("ci95_low_ms", "ci95_high_ms", "wall_mean_ms"), mean_ms),
            "noisy": False,
            "iterations": len(samples),
            "samples_ms": samples,
            "wall_samples_ms": samples,
        },
        "throughput_hz": 1000 / mean_ms,
        "compile_seconds": 0.1,
        "guard": {
            "passed": True,
            "rel_l2": 0.0,
            "max_abs": 0.0,
            "cosine": 1.0,
            "plain_rel_l2": 0.0,
            "tolerance": 1.0,
            "inputs": 3,
        },
        "memory": {"peak_mib": 1.0, "device_peak_mib": None, "host_peak_mib": 1.0},
        "kernels": None,
    }


if __name__ == "__main__":
    main()
