"""One policy deployed several times: `python -m openpi_opt.sweep experiment=instances preset=NAME`.

Throughput and latency of 1 to 8 processes on one GPU, and on all GPUs of the node together. Each
answers one observation after another; what began and ended within the common seconds counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine, probe
from openpi_opt.paths import conf_dir
from openpi_opt.process.child import Place, StoppedError, run_command
from openpi_opt.process.devices import Devices, DeviceSettings, Lease, Slot, in_use, wait_for
from openpi_opt.process.environment import child_environment
from openpi_opt.process.run import log_tail, phase_limits
from openpi_opt.result import write_atomic
from openpi_opt.space.compose import compose
from openpi_opt.space.files import read
from openpi_opt.track import plots
from openpi_opt.track.table import Table, markdown

_HEADS = ("devices", "instances of each", "calls per s", "mean ms", "p50 ms", "p99 ms",
          "GPU MiB of each", "x of one")  # fmt: skip
_RAMP_SECONDS = 0.5
_INPUTS = 4


@dataclass(frozen=True)
class Load:
    """`each` instances on each of `devices` for the same seconds; or why there are no figures.

    `hz` is the sum over all of 1 / mean latency, in calls per second: each answers one call after
    another, and what the seconds cut at either end is left out. Latencies are of single calls, of
    all; `calls` is how many each instance answered.
    """

    devices: int
    each: int
    hz: float = 0.0
    mean_ms: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    peak_mib: float | None = None
    calls: tuple[int, ...] = ()
    problem: str = ""


def run(words: Sequence[str], out: str | None) -> int:
    """The experiment of a command line without `experiment=` and `out=`; 1 where nothing ran.
    Raises UserError: a wrong override, or a configuration that cannot run here."""
    plan = read(conf_dir() / "experiment" / "instances.yaml").content
    given = dict(word.partition("=")[::2] for word in words if not word.startswith("-"))
    counts = [int(n) for n in given.pop("counts", "").split(",") if n] or plan["counts"]
    seconds = float(given.pop("seconds", plan["seconds"]))
    preset = given.pop("preset", None)
    machine = probe()
    cfg = compose([f"{key}={value}" for key, value in given.items()], preset).resolved(machine)
    if cfg.measure.max_seconds is None or min(counts, default=0) < 1 or seconds <= 0:
        raise UserError("counts and seconds are numbers above 0: counts=1,2,4 seconds=10")
    from openpi_opt.process.run import refused

    problem = refused(cfg, machine)
    if problem is not None:
        raise UserError(f"this configuration is {problem.outcome}: {problem.reason}")
    folder = Path(out or "instances").resolve()
    rows = _measured(cfg, machine, counts, seconds, folder)
    text = _markdown(cfg, machine, rows, seconds)
    document = {"config": cfg.dump(), "seconds": seconds, "loads": [asdict(row) for row in rows]}
    plots.write_report(folder, "instances", text, document, None, "Give another out=FOLDER.")
    cli.say(f"wrote {folder}/instances.md and instances.json")
    return 0 if any(not row.problem for row in rows) else 1


def _measured(
    cfg: Config, machine: Machine, counts: Sequence[int], seconds: float, folder: Path
) -> list[Load]:
    devices = Devices(DeviceSettings(), machine)
    slots = devices.slots(cfg.device)
    if cfg.platform.gpu is not None and cfg.device != "cpu":
        slots = [slots[cfg.platform.gpu]]
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    rows: list[Load] = []
    with ExitStack() as held:
        leases: list[Lease] = []
        said: set[Slot] = set()
        for slot in slots:
            leases.append(wait_for([slot], partial(_pause, slot, said)))
            held.callback(leases[-1].release)
        for each in counts:
            rows.append(_load(cfg, machine, leases[:1], each, seconds, folder, verify=not rows))
            cli.say(_line(rows[-1]))
            if rows[-1].problem:
                break
        best = max(rows, key=lambda row: row.hz)
        for each in sorted({1, best.each}) if len(leases) > 1 and best.hz else ():
            rows.append(_load(cfg, machine, leases, each, seconds, folder))
            cli.say(_line(rows[-1]))
    return rows


def _load(
    cfg: Config, machine: Machine, leases: Sequence[Lease], each: int, seconds: float,
    folder: Path, verify: bool = False,
) -> Load:  # fmt: skip
    """Start all, let them go at one moment, and add up what they say."""
    stop, ready = threading.Event(), threading.Semaphore(0)
    uid, places = uuid4().hex[:12], [lease for lease in leases for _ in range(each)]
    go = folder / "logs" / f"{uid}.go"
    go.unlink(missing_ok=True)

    def on_phase(phase: str) -> None:
        if phase == "wait":
            ready.release()

    def instance(number: int) -> dict[str, Any] | str:
        lease, own = places[number], folder / "logs" / f"{len(leases)}x{each}-{number}"
        slot, answer = lease.slot, own.with_suffix(".json")
        answer.unlink(missing_ok=True)
        cores = slot.cores[number % each :: each] or slot.cores
        argv = [sys.executable, "-m", "openpi_opt.instances", "--config", json.dumps(cfg.dump()),
                "--go", str(go), "--answer", str(answer)]  # fmt: skip
        argv += ["--verify"] if verify and number == 0 else []
        env = child_environment(cfg, machine, gpu=slot.gpu, threads=len(cores))
        limits = {**phase_limits(cfg.limits), "measure": seconds + 60}
        place = Place(replace(slot, cores=cores), f"{uid}-{number}", fds=lease.fds, stop=stop)
        log = own.with_suffix(".log")
        try:
            run_command(argv, env, limits, log, on_phase, place)
        except StoppedError:
            return "stopped"
        finally:
            ready.release()  # one that ended too early must not be waited for
        if not answer.is_file():
            stop.set()
            return log_tail(log).strip().splitlines()[-1:][0] if log_tail(log).strip() else "ended"
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(instance, number) for number in range(len(places))]
        try:
            for _ in places:
                ready.acquire()
            begin = time.monotonic() + _RAMP_SECONDS
            write_atomic(go, json.dumps([begin, begin + seconds]))
            answers = [future.result() for future in futures]
        finally:
            stop.set()
    go.unlink(missing_ok=True)
    return _added(answers, len(leases), each, seconds)


def _added(
    answers: Sequence[dict[str, Any] | str], devices: int, each: int, seconds: float
) -> Load:
    import numpy as np

    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        first = next((text for text in failed if text != "stopped"), failed[0])
        return Load(devices, each, problem=first[:200])
    found = [answer for answer in answers if not isinstance(answer, str)]
    samples = [np.array(answer["samples_ms"]) for answer in found]
    if not all(map(len, samples)):
        return Load(devices, each, problem=f"an instance ended no call within {seconds:g} s")
    peaks = [answer["peak_mib"] for answer in found if answer["peak_mib"] is not None]
    together = np.concatenate(samples)
    p50, p99 = np.percentile(together, [50, 99])
    return Load(
        devices, each, sum(1e3 / float(own.mean()) for own in samples), float(together.mean()),
        float(p50), float(p99), max(peaks, default=None), tuple(map(len, samples)),
    )  # fmt: skip


def _pause(slot: Slot, said: set[Slot]) -> None:
    """Wait a second for a device; the first time say for whose."""
    if slot not in said:
        cli.say(f"waiting for a device: in use are {in_use([slot])}")
        said.add(slot)
    time.sleep(1.0)


def _cells(row: Load, one: Load) -> list[str]:
    if row.problem:
        return [str(row.devices), str(row.each), row.problem, *[""] * (len(_HEADS) - 3)]
    times = [f"{value:.3f}" for value in (row.mean_ms, row.p50_ms, row.p99_ms)]
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    scale = f"{row.hz / one.hz:.2f}" if one.hz else ""
    return [str(row.devices), str(row.each), f"{row.hz:.2f}", *times, peak, scale]


def _line(row: Load) -> str:
    cells = zip(_HEADS, _cells(row, Load(0, 0)), strict=True)
    return ", ".join(f"{head} {cell}" for head, cell in cells if cell)


def _markdown(cfg: Config, machine: Machine, rows: Sequence[Load], seconds: float) -> str:
    gpus = machine.gpus_for(cfg.device)
    where = gpus[0].name if gpus else f"CPU ({machine.cpu})"
    lines = [
        f"# Instances: {cfg.model.name} on {where}, workload {cfg.workload.name}", "",
        f"{seconds:g} s under load; each instance answers one call of "
        f"{cfg.workload.batch_size} observation(s) after another.", "",
        *markdown(Table([*_HEADS], [_cells(row, rows[0]) for row in rows], frozenset())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# --- one instance --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """One instance, started by `run`: get ready, wait for the moment, answer until the end."""
    parser = argparse.ArgumentParser(prog="python -m openpi_opt.instances")
    for name in ("config", "go", "answer"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--progress-fd", type=int, required=True)
    options = parser.parse_args(argv)
    from openpi_opt import runtime
    from openpi_opt.guarding import verify
    from openpi_opt.measure.clock import synchronise, upload
    from openpi_opt.pi0.workload import make_inputs
    from openpi_opt.trial import Progress

    progress = Progress(options.progress_fd)
    cfg, machine = Config.load(json.loads(options.config)), probe()
    # It sees its own GPU only, so that is number 0.
    seen = cfg.model_copy(update={"platform": cfg.platform.model_copy(update={"gpu": 0})})
    cfg = seen if cfg.device != "cpu" else cfg
    progress.enter("load")
    device, folder = runtime.torch_device(cfg), Path(options.answer).parent / "references"
    asked = verify.ask_first(cfg, machine, folder) if options.verify else None
    policy = runtime.build_policy(cfg, device)
    progress.enter("apply")
    prepared = runtime.apply_knobs(policy, cfg)
    if asked is not None:
        verify.ask_policy(asked, prepared, machine)
    workload = runtime.workload_of(cfg)
    inputs = [upload(make_inputs(workload, policy.config, seed, "cpu"), device)
              for seed in range(_INPUTS)]  # fmt: skip
    for number in range(max(3, _INPUTS)):
        prepared.call(inputs[number % _INPUTS])
        synchronise(cfg.device)
    progress.enter("wait")
    while not Path(options.go).is_file():
        time.sleep(0.005)
    begin, end = json.loads(Path(options.go).read_text(encoding="utf-8"))
    progress.enter("measure")
    samples_ms, calls, now = [], 0, time.monotonic()
    while now < end:
        started = now
        prepared.call(inputs[calls % _INPUTS])
        synchronise(cfg.device)
        calls, now = calls + 1, time.monotonic()
        if begin <= started and now <= end:
            samples_ms.append(1e3 * (now - started))
    peak = None
    if cfg.device != "cpu":
        import torch

        peak = torch.cuda.max_memory_reserved() / 2**20
    write_atomic(Path(options.answer), json.dumps({"samples_ms": samples_ms, "peak_mib": peak}))
    return 0


if __name__ == "__main__":
    cli.run(main)
