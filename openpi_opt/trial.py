"""Run one configuration in this process and write its result: `python -m openpi_opt.trial`.

The sweep starts one such process per trial. Started by hand it first executes itself again in the
environment that the sweep would give it, because variables must be there before torch is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from openpi_opt import cli
from openpi_opt import result as results
from openpi_opt.config import MIN_ITERATIONS, MIN_WARMUP, RACE_FILE, Config
from openpi_opt.errors import RefusedError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine, probe
from openpi_opt.measure import power
from openpi_opt.process.devices import float32_seat, measure_lock
from openpi_opt.process.environment import (
    CACHES,
    child_environment,
    cleared_names,
    knob_variables,
)
from openpi_opt.track import identity
from openpi_opt.track.fingerprint import fingerprint
from openpi_opt.vendor import BY_DEVICE

if TYPE_CHECKING:
    from openpi_opt.guarding.question import Question
    from openpi_opt.guarding.witness import Witness
    from openpi_opt.measure.clock import Timing
    from openpi_opt.measure.gpu_state import Monitor
    from openpi_opt.pi0.inputs import Inputs
    from openpi_opt.pi0.policy import Pi0Policy
    from openpi_opt.process.locks import Held
    from openpi_opt.runtime import Prepared

_POLL_SECONDS = 0.05

# Of a trial's time so far, for timed calls that are made again and must answer the same.
_CALLS_AGAIN = 0.02
# Half-widths of the 95% interval of the mean, about four standard errors.
_SURELY = 2
# A trial within this factor of the fastest so far is worth its energy.
_ABOUT = 1.01

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


@dataclass
class Progress:
    """Says which phase begins, on a file descriptor of the parent or on stderr.

    The first phase, `start`, began with the process. With `gate_fd` the parent says when this
    process has the device, and at `stopped_fd` for how many seconds it stood still for others.
    `standing` trials stand still for this one.
    """

    fd: int | None
    gate_fd: int | None = None
    stopped_fd: int | None = None
    phase: str = "start"
    standing: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0
    _asked: bool = False

    def __post_init__(self) -> None:
        self._since = self.clock() - max(0.0, _age_seconds() - self._stopped())
        if self.fd is not None:
            threading.Thread(target=_end_with_parent, args=(self.fd,), daemon=True).start()

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        self.leave()
        self.phase = phase
        line = json.dumps({"phase": phase}) + "\n"
        if self.fd is None:
            sys.stderr.write(f"[{phase}]\n")
        else:
            os.write(self.fd, line.encode())

    def ask(self) -> None:
        """Wait until this process has the device for itself; asking again has no effect.

        From then until it has ended, the others on the device stand still (`process.schedule`).
        """
        if self.gate_fd is None or self._asked:
            return
        self._asked = True
        self.enter("wait")
        opened = os.read(self.gate_fd, 1)
        if not opened:
            sys.exit("the gate was closed: this process is not needed")
        self.standing = opened[0]

    def free(self) -> None:
        """Let others have the device: from here on this process only reads and writes."""
        self.enter("report")

    def clock(self) -> float:
        """Seconds on a clock that stands still while this process is stopped."""
        return time.monotonic() - self._stopped()

    def leave(self) -> None:
        """Book the time of the current phase."""
        now = self.clock()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._since
        self._since = now

    def _stopped(self) -> float:
        if self.stopped_fd is None:
            return 0.0
        return float(os.pread(self.stopped_fd, 64, 0) or 0)


def _age_seconds() -> float:
    """Seconds since this process began: field 22 of proc(5)'s stat, after the name's bracket."""
    ticks = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    started = int(ticks.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def _end_with_parent(fd: int) -> None:
    """End this process group when the controller that reads `fd` is gone, however it went."""
    poll = select.poll()
    poll.register(fd, select.POLLERR)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


@contextmanager
def measuring_alone(cfg: Config, progress: Progress) -> Iterator[None]:
    """With `measure.exclusive`, wait until no other trial of this host measures."""
    if not cfg.measure.exclusive:
        yield
        return
    progress.enter("wait")
    with _having(measure_lock):
        yield


@contextmanager
def in_float32(cfg: Config, machine: Machine, progress: Progress) -> Iterator[None]:
    """Wait until there is room on the GPU for a float32 policy, and give its memory back after.

    Trials that prepare beside each other hold their 16 bits each, and few of them float32.
    """
    accelerator = BY_DEVICE[cfg.device].accelerator()
    if accelerator is None:
        progress.enter("load")
        yield
        return
    gpu = machine.gpus_for(cfg.device)[0]
    progress.enter("queue")
    with _having(lambda: float32_seat(gpu)):
        progress.enter("load")
        yield
        gc.collect()
        accelerator.empty_cache()


@contextmanager
def _having(lock: Callable[[], Held | None]) -> Iterator[None]:
    while (held := lock()) is None:
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        held.release()


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
    from openpi_opt.measure import audit, gpu_state

    decisive = [name for name in cleared_names() if name not in CACHES]  # the sweep sets those
    checks = audit.audit(cfg, machine, os.environ, knob_variables(cfg), decisive)
    gpus = machine.gpus_for(cfg.device)
    progress.enter("import")
    _import_all(cfg)
    identity.imported(cfg)  # as they are now: they may be edited while this runs
    with contextlib.ExitStack() as stack:
        # Before torch makes a context: processes that are there now are not this one.
        monitor = stack.enter_context(gpu_state.monitor(gpus[0])) if gpus else None
        outcome = _run_checked(cfg, machine, progress, references, folder, monitor)
    if outcome["outcome"] == "ok":
        outcome["checks"] += [*checks, audit.inductor(cfg)]
    return outcome


def _import_all(cfg: Config) -> None:
    """Import what the trial needs: seconds in which the GPU is not wanted."""
    import torch

    from openpi_opt import runtime  # noqa: F401
    from openpi_opt.guarding import question  # noqa: F401
    from openpi_opt.measure import (  # noqa: F401
        checks,
        clock,
        compilation,
        guard,
        planning,
        profile,
        roofline,
        stats,
    )

    plain, own = cfg.baseline().knobs, cfg.canonical().knobs
    if own["compile"] != plain["compile"] or own["graph"] != plain["graph"]:
        import torch._dynamo  # noqa: F401  a capture asks it whether something was compiled


def _run_checked(
    cfg: Config,
    machine: Machine,
    progress: Progress,
    references: Path,
    folder: Path,
    monitor: Monitor | None,
) -> dict[str, Any]:
    import torch

    from openpi_opt import runtime
    from openpi_opt.measure import compilation

    accelerator = BY_DEVICE[cfg.device].accelerator()
    if accelerator is not None and not accelerator.is_available():
        raise RefusedError("unavailable", f"torch {torch.__version__} sees no usable GPU")
    with in_float32(cfg, machine, progress):
        policy, asked = _questioned(cfg, machine, progress, references)
        if policy is None:
            return _wrong(asked.wrong_structure())
        progress.enter("apply")
        if cfg.canonical().knobs["compile"] != cfg.baseline().knobs["compile"]:
            compilation.observe()
        prepared = runtime.apply_knobs(policy, cfg)
        del policy
        identity.note_imported(cfg, folder)
    found = _measure(prepared, asked, progress, folder, monitor)
    if found["outcome"] == "ok":
        asked = replace(asked, cfg=_raced(asked.cfg, folder))
        _explain(found, prepared, asked, machine, progress, references.with_name("ceilings"))
    return found


def _questioned(
    cfg: Config, machine: Machine, progress: Progress, references: Path
) -> tuple[Pi0Policy | None, Question]:
    """The plain float32 policy and what the guard asks, which knows the structure.

    No policy where the structure is wrong.
    """
    import torch

    from openpi_opt import runtime
    from openpi_opt.guarding import power as power_of_guard
    from openpi_opt.guarding import question

    device = runtime.torch_device(cfg)
    policy = runtime.build_policy(cfg, device)
    progress.enter("reference")
    gpus = machine.gpus_for(cfg.device)
    arch = gpus[0].arch if gpus else machine.cpu
    asked = question.ask(policy, cfg, arch, references)
    seen = asked.known_structure()
    # Once for a context, by its baseline. On a CPU it takes as long as several trials: by hand.
    measured = device.type == "cpu" or not cfg.is_baseline() or asked.power() is not None
    if seen is None or not measured or policy.dtype != torch.float32:
        # Cast for the reference; the candidate must not depend on whether that was known already.
        del policy
        seen = seen or asked.structure()
        if not measured:
            power_of_guard.measure_once(cfg, arch, references, asked.key)
        if seen.passed:
            progress.enter("load")
            policy = runtime.build_policy(cfg, device)
    return (policy if seen.passed else None), asked.knowing(seen)


def _wrong(report: results.GuardReport) -> dict[str, Any]:
    from openpi_opt.measure import guard

    return {"outcome": "wrong", "guard": report, "reason": guard.explain(report)}


def _measure(
    prepared: Prepared,
    asked: Question,
    progress: Progress,
    folder: Path,
    monitor: Monitor | None,
) -> dict[str, Any]:
    from openpi_opt.measure import checks, clock, compilation, memory, warm

    cfg, device = asked.cfg, asked.cfg.device
    inputs = [clock.upload(item, asked.device) for item in asked.observations]
    memory.reset_peak(device)
    triton_counts = compilation.watch_triton() if device != "cpu" else lambda: (0, 0)
    first_call_seconds = _call_first(prepared, inputs[0], cfg, progress)
    entries = compilation.cache_entries(*triton_counts())
    first_call = {
        "compile_seconds": first_call_seconds,
        "compile_cache": compilation.cache_state(entries),
        "cache_entries": entries,
    }
    progress.ask()
    progress.enter("warmup")
    clock.warm_up(prepared.call, inputs, cfg.measure.warmup, device)
    progress.enter("guard")
    report = asked.check(prepared.call, prepared.policy.layout)
    if not report.passed:
        return _wrong(report)
    # Before the timing, whose inputs and outputs are kept for the guard and are not the policy's.
    peak = memory.peak(device)
    witness = asked.witness()
    with measuring_alone(cfg, progress):
        progress.enter("measure")
        warm.warm(
            lambda: prepared.call(inputs[0]),
            device,
            lambda: None if monitor is None else monitor.read().sm_clock_mhz,
            lambda: clock.synchronise(device),
        )
        cfg = _raced(cfg, folder)
        hopeless = _hopeless(prepared, witness, cfg)
        if hopeless is not None:
            counted = _counted(prepared, inputs, cfg, progress, folder, last=True)
            return {"outcome": "pruned", "guard": report, **first_call, **counted, **hopeless}
        compiled = compilation.graphs()
        timed = _timed(prepared, witness, inputs[0], cfg, monitor, progress.standing)
    latency = timed.latency
    compiled_in_all = compilation.found(late=compilation.graphs() - compiled)
    progress.enter("guard")
    spare_ms = _CALLS_AGAIN * 1e3 * sum(progress.seconds.values())
    watched = asked.judge(
        witness,
        prepared.call,
        prepared.policy.layout,
        latency.wall_samples_ms,
        int(spare_ms / latency.wall_mean_ms),
    )
    report = report.model_copy(update={"timed": watched, "passed": watched.passed})
    if not report.passed:
        return _wrong(report)
    more = cfg.profile.roofline != "none" or _wants_energy(cfg, latency.mean_ms)
    counted = _counted(prepared, inputs, cfg, progress, folder, last=not more)
    kernels, overhead_ms = counted["kernels"], None
    if kernels is not None and kernels.busy_ms is not None:
        overhead_ms = latency.wall_mean_ms - kernels.busy_ms
    return {
        "outcome": "ok",
        "latency": latency,
        "throughput_hz": cfg.workload.batch_size * 1000.0 / latency.mean_ms,
        **first_call,
        **counted,
        "guard": report,
        "memory": peak,
        "launch_overhead_ms": overhead_ms,
        "compilation": compiled_in_all,
        "gpu": timed.gpu,
        "checks": [
            *checks.of_latency(latency, cfg.measure.warmup, watched.calls),
            *checks.of_start(first_call_seconds, compiled_in_all),
            *timed.checks,
        ],
    }


def _call_first(prepared: Prepared, inputs: Inputs, cfg: Config, progress: Progress) -> float:
    """Compile and capture; returns the seconds. What times kernels has the device for itself."""
    timing = [knob.untimed(cfg) for knob in KNOBS if knob.times_kernels(cfg)]
    later = [context for context in timing if context is not None]
    progress.enter("compile")
    started, waited = progress.clock(), progress.seconds.get("wait", 0.0)
    if later and len(later) == len(timing):
        with contextlib.ExitStack() as stack:
            for context in later:
                stack.enter_context(context)
            prepared.uncaptured(inputs).cpu()
    if timing:
        progress.ask()
        progress.enter("compile")
    prepared.call(inputs).cpu()
    return progress.clock() - started - progress.seconds.get("wait", 0.0) + waited


def _counted(
    prepared: Prepared,
    inputs: list[Inputs],
    cfg: Config,
    progress: Progress,
    folder: Path,
    last: bool,
) -> dict[str, Any]:
    """Kernels of one call, as `profile` asks, and what there is to say of the configuration.

    `last`: nothing runs on the device afterwards.
    """
    from openpi_opt.measure import profile

    notes = [note for knob in KNOBS for note in knob.notes(cfg)]
    if cfg.profile.trace:
        notes += profile.keep_generated_code(folder / "inductor.tar.gz")
    if cfg.profile.tool != "none":
        progress.enter("profile")
        profile.call_for_tool(prepared.call, inputs[0], cfg.device)
        notes.append(f"Run under {cfg.profile.tool}: all times are those under it.")
    if not cfg.profile.kernels or cfg.profile.tool != "none":
        return {"kernels": None, "notes": notes}
    progress.enter("profile")
    trace = folder / "trace.json.gz" if cfg.profile.trace else None
    found = profile.profile_call(
        *(prepared.call, inputs[0], cfg.device, trace, prepared.uncaptured),
        recorded=progress.free if last else lambda: None,
    )
    return {"kernels": found.kernels, "kernel_table": found.table, "notes": [*notes, *found.notes]}


def _raced(cfg: Config, folder: Path) -> Config:
    """With the limit of this moment: other trials may have been faster since this one began."""
    if cfg.limits.race is None:
        return cfg
    file = folder.absolute().parents[1] / RACE_FILE
    try:
        best = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # nothing has been measured yet
        return cfg
    return cfg.raced(best.get(cfg.context_hash()))


def _hopeless(prepared: Prepared, witness: Witness, cfg: Config) -> dict[str, Any] | None:
    """What the first calls show, when they are surely above `limits.latency_ms`.

    Looks after `MIN_ITERATIONS` calls, and once more after all that are measured at least.
    """
    limit = cfg.limits.latency_ms
    if limit is None:
        return None
    import numpy as np

    from openpi_opt.measure import stats

    block, taken = _block(prepared, witness, cfg), 0
    mean = low = 0.0
    samples: list[float] = []
    for calls in dict.fromkeys((MIN_ITERATIONS, cfg.measure.iterations)):
        samples += block(calls - taken).samples_ms
        taken = calls
        mean = float(np.mean(samples))
        low = mean - _SURELY * stats.mean_half_width(np.asarray(samples))
        if low > limit or mean < limit:  # surely above it, or nothing that says so
            break
    if low <= limit:
        return None
    return {
        "reason": f"surely slower than {limit:.3f} ms (limits.latency_ms): {len(samples)} calls "
        f"took {mean:.3f} ms, and the mean is at least {low:.3f} ms",
        "limit_ms": limit,
        "seen_mean_ms": mean,
        "seen_low_ms": low,
        "seen_calls": len(samples),
    }


class _Timed(NamedTuple):
    latency: results.Latency
    gpu: results.Gpu | None
    checks: list[results.Check]


def _block(prepared: Prepared, witness: Witness, cfg: Config) -> Callable[..., Timing]:
    """Times so many calls; with `compared` some of them are compared with the reference, later."""
    from openpi_opt.measure import clock

    def block(iterations: int, compared: bool = False) -> Timing:
        witness.begin(iterations, compared)
        # Warm again, shortly: copies to the host, planning or a reading came in between.
        return clock.time_calls(prepared.call, witness, MIN_WARMUP, iterations, cfg.device)

    return block


def _timed(
    prepared: Prepared,
    witness: Witness,
    inputs: Inputs,
    cfg: Config,
    monitor: Monitor | None,
    standing: int,
) -> _Timed:
    """Plan, then time; what the GPU's driver says is read right before and right after."""
    from openpi_opt.measure import checks, clock, gpu_state, planning, stats

    block = _block(prepared, witness, cfg)

    def under_load() -> results.GpuState | None:
        if monitor is None:
            return None
        prepared.call(inputs)  # not waited for: the driver is asked while it runs
        state = monitor.read()
        clock.synchronise(cfg.device)
        return state

    plan = planning.plan(block, cfg.measure)
    before = under_load()
    throttled = None if monitor is None else monitor.throttled_ms()
    wait = checks.HostWait()
    started = time.monotonic()
    timing = block(plan.iterations, compared=True)
    seconds = time.monotonic() - started
    found = [wait.check(seconds)]
    throttled_after = None if monitor is None else monitor.throttled_ms()
    after = under_load()
    latency = stats.summarise(
        timing.samples_ms,
        timing.wall_samples_ms,
        timing.clock,
        upload_samples_ms=timing.upload_samples_ms,
        planning_samples_ms=plan.samples_ms,
        asked_rel_ci=cfg.measure.rel_ci,
        ended=plan.ended,
    )
    gpu = gpu_state.between(before, after, throttled, throttled_after)
    if gpu is not None:
        found += checks.of_gpu(gpu, seconds * 1e3, standing)
    return _Timed(latency, gpu, found)


def _explain(
    found: dict[str, Any],
    prepared: Prepared,
    asked: Question,
    machine: Machine,
    progress: Progress,
    ceilings_folder: Path,
) -> None:
    """Add energy and roofline to what was measured; nothing here can disturb the latency."""
    from openpi_opt.measure import ceilings, clock, roofline

    cfg = asked.cfg
    if cfg.profile.energy and not _wants_energy(cfg, found["latency"].mean_ms):
        found["notes"].append(
            f"No energy: the sweep has {cfg.limits.best_ms:.3f} ms, and this trial is slower "
            "(profile.energy=true measures it in every trial)."
        )
    elif cfg.profile.energy:
        inputs = [clock.upload(item, asked.device) for item in asked.observations]
        energy, notes = power.measure(
            prepared.call, inputs, cfg, machine, found["throughput_hz"], progress.enter
        )
        found["energy"] = energy
        found["notes"] += notes
    if cfg.profile.roofline != "none":
        # A trial sees its own GPU only, so the baseline's is number 0.
        own = cfg.platform.model_copy(update={"gpu": 0})
        env = child_environment(cfg.baseline().model_copy(update={"platform": own}), machine)
        limits, notes = ceilings.obtain(
            cfg, machine, ceilings_folder, env, lambda: progress.enter("ceilings")
        )
        kernels = found["kernels"]
        found["roofline"], remarks = roofline.roofline(
            cfg, limits, found["latency"].mean_ms, kernels.stage_ms if kernels else None
        )
        found["notes"] += [*notes, *remarks]


def _wants_energy(cfg: Config, mean_ms: float) -> bool:
    """Whether the energy is asked for; a sweep asks for that of the fastest only."""
    best_ms = cfg.limits.best_ms
    slower = best_ms is not None and mean_ms > _ABOUT * best_ms
    return bool(cfg.profile.energy) and not (cfg.profile.energy == "auto" and slower)


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
