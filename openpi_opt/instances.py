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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine, probe
from openpi_opt.paths import conf_dir
from openpi_opt.process.child import Place, StoppedError, run_command
from openpi_opt.process.devices import Devices, DeviceSettings, Lease, reserve
from openpi_opt.process.environment import child_environment
from openpi_opt.process.progress import Progress
from openpi_opt.process.run import log_tail, phase_limits, refused
from openpi_opt.result import write_atomic
from openpi_opt.space.compose import compose
from openpi_opt.space.files import read
from openpi_opt.track import plots
from openpi_opt.track.table import Table, markdown

_HEADS = ("devices", "instances of each", "calls per s", "mean ms", "p50 ms", "p99 ms",
          "GPU MiB of each", "x of one")  # fmt: skip
_RAMP_SECONDS = 0.5
_INPUTS = 4
_STOPPED = "stopped"


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
    if (problem := refused(cfg, machine)) is not None:
        raise UserError(f"this configuration is {problem.outcome}: {problem.reason}")
    folder = Path(out or "instances").resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    rows: list[Load] = []
    with ExitStack() as held:
        leases = []
        for name in _gpus(cfg, machine):
            leases.append(reserve(cfg, machine, name, [], cli.say))
            held.callback(leases[-1].release)

        def load(leases: Sequence[Lease], each: int) -> Load:
            load = Instances(cfg, machine, leases, each, seconds, folder).load(not rows)
            rows.append(load)
            cells = zip(_HEADS, _cells(load), strict=True)
            cli.say(", ".join(f"{head} {cell}" for head, cell in cells if cell))
            return load

        for each in counts:
            if load(leases[:1], each).problem:
                break
        best = max(rows, key=lambda row: row.hz)
        for each in sorted({1, best.each}) if len(leases) > 1 and best.hz else ():
            load(leases, each)
    gpus = machine.gpus_for(cfg.device)
    lines = [
        f"# Instances: {cfg.model.name} on {gpus[0].name if gpus else f'CPU ({machine.cpu})'}, "
        f"workload {cfg.workload.name}", "",
        f"{seconds:g} s under load; each instance answers one call of "
        f"{cfg.workload.batch_size} observation(s) after another.", "",
        *markdown(Table([*_HEADS], [_cells(row, rows[0]) for row in rows], frozenset())), "",
    ]  # fmt: skip
    document = {"config": cfg.dump(), "seconds": seconds, "loads": [asdict(row) for row in rows]}
    plots.write_report(
        folder, "instances", "\n".join(lines), document, None, "Give another out=FOLDER."
    )
    cli.say(f"wrote {folder}/instances.md and instances.json")
    return 0 if any(not row.problem for row in rows) else 1


def _gpus(cfg: Config, machine: Machine) -> Sequence[int | str | None]:
    """The names of the GPUs to use; one None stands for the CPU."""
    if cfg.device == "cpu" or cfg.platform.gpu is not None:
        return [cfg.platform.gpu]
    slots = Devices(DeviceSettings(), machine).slots(cfg.device)
    return [slot.gpu.uuid for slot in slots if slot.gpu is not None]


def _cells(row: Load, one: Load | None = None) -> list[str]:
    if row.problem:
        return [str(row.devices), str(row.each), row.problem, *[""] * (len(_HEADS) - 3)]
    times = [f"{value:.3f}" for value in (row.mean_ms, row.p50_ms, row.p99_ms)]
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    scale = f"{row.hz / one.hz:.2f}" if one is not None and one.hz else ""
    return [str(row.devices), str(row.each), f"{row.hz:.2f}", *times, peak, scale]


@dataclass
class Instances:
    """`each` processes on each of the leased devices, which answer for `seconds`."""

    cfg: Config
    machine: Machine
    leases: Sequence[Lease]
    each: int
    seconds: float
    folder: Path
    _uid: str = field(default_factory=lambda: uuid4().hex[:12])
    _stop: threading.Event = field(default_factory=threading.Event)
    _ready: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def load(self, verify: bool) -> Load:
        """Start all, let them go at one moment, and add up what they say."""
        count, go = len(self.leases) * self.each, self._file("go")
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(self._run, n, verify and n == 0) for n in range(count)]
            try:
                for _ in futures:
                    self._ready.acquire()
                begin = time.monotonic() + _RAMP_SECONDS
                write_atomic(go, json.dumps([begin, begin + self.seconds]))
                answers = [future.result() for future in futures]
            finally:
                self._stop.set()
        go.unlink(missing_ok=True)
        return added(answers, len(self.leases), self.each, self.seconds)

    def _file(self, kind: str, number: int = 0) -> Path:
        return self.folder / "logs" / f"{self._uid}-{number}.{kind}"

    def _run(self, number: int, verify: bool) -> dict[str, Any] | str:
        """What one instance answers, or why there is no answer."""
        lease = self.leases[number // self.each]
        cores = lease.slot.cores[number % self.each :: self.each] or lease.slot.cores
        log, answer = self._file("log", number), self._file("json", number)
        argv = [sys.executable, "-m", "openpi_opt.instances", "--answer", str(answer), "--config",
                json.dumps(self.cfg.dump()), "--go", str(self._file("go"))]  # fmt: skip
        argv += ["--verify"] if verify else []
        slot = replace(lease.slot, cores=cores)
        env = child_environment(self.cfg, self.machine, gpu=slot.gpu, threads=len(cores))
        limits = {**phase_limits(self.cfg.limits), "measure": self.seconds + 60}
        place = Place(slot, f"{self._uid}-{number}", fds=lease.fds, stop=self._stop)

        def on_phase(phase: str) -> None:
            if phase == "wait":
                self._ready.release()

        try:
            run_command(argv, env, limits, log, on_phase, place)
        except StoppedError:
            return _STOPPED
        finally:
            self._ready.release()  # one that ended too early must not be waited for
        if not answer.is_file():
            self._stop.set()
            return (log_tail(log).strip().splitlines() or ["ended"])[-1]
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def added(answers: Sequence[dict[str, Any] | str], devices: int, each: int, seconds: float) -> Load:
    """The load that instances had together, by what each answered."""
    failed = sorted((text for text in answers if isinstance(text, str)), key=_STOPPED.__eq__)
    if failed:
        return Load(devices, each, problem=failed[0][:200])
    found = [answer for answer in answers if not isinstance(answer, str)]
    samples = [np.array(answer["samples_ms"]) for answer in found]
    if not all(map(len, samples)):
        return Load(devices, each, problem=f"an instance ended no call within {seconds:g} s")
    peaks = [answer["peak_mib"] for answer in found if answer["peak_mib"] is not None]
    together = np.concatenate(samples)
    p50, p99 = map(float, np.percentile(together, [50, 99]))
    hz = sum(1e3 / float(own.mean()) for own in samples)
    peak, calls = max(peaks, default=None), tuple(map(len, samples))
    return Load(devices, each, hz, float(together.mean()), p50, p99, peak, calls)


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
