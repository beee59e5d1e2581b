"""The body of a trial, which needs torch: policy, guard, latency, kernels, energy, floor."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from openpi_opt import result as results
from openpi_opt import runtime
from openpi_opt.config import MIN_ITERATIONS, RACE_FILE, Config
from openpi_opt.errors import RefusedError
from openpi_opt.guarding import power as power_of_guard
from openpi_opt.guarding import question
from openpi_opt.guarding.witness import Witness
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine
from openpi_opt.measure import (
    ceilings,
    checks,
    clock,
    compilation,
    gpu_state,
    guard,
    memory,
    planning,
    power,
    profile,
    roofline,
    stats,
    warm,
)
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.process.devices import float32_seat, measure_lock
from openpi_opt.process.environment import child_environment
from openpi_opt.process.locks import Held
from openpi_opt.process.progress import Progress
from openpi_opt.runtime import Prepared
from openpi_opt.track import identity
from openpi_opt.vendor import BY_DEVICE

_POLL_SECONDS = 0.05
# Of a trial's time so far, for timed calls that are made again and must answer the same.
_CALLS_AGAIN = 0.02
# Half-widths of the 95% interval of the mean, about four standard errors.
_SURELY = 2
# A trial within this factor of the fastest so far is worth its energy.
_ABOUT = 1.01


class _Timed(NamedTuple):
    latency: results.Latency
    gpu: results.Gpu | None
    checks: list[results.Check]


@dataclass
class Measuring:
    """One configuration on its way to an outcome; `monitor` reads its GPU, where it has one."""

    cfg: Config
    machine: Machine
    progress: Progress
    references: Path
    folder: Path
    monitor: gpu_state.Monitor | None

    def outcome(self) -> dict[str, Any]:
        """The fields of the result that its outcome has."""
        accelerator = BY_DEVICE[self.cfg.device].accelerator()
        if accelerator is not None and not accelerator.is_available():
            raise RefusedError("unavailable", f"torch {torch.__version__} sees no usable GPU")
        with self._in_float32(accelerator):
            policy, asked = self._questioned()
            if policy is None:
                return _wrong(asked.wrong_structure())
            self.progress.enter("apply")
            if self.cfg.canonical().knobs["compile"] != self.cfg.baseline().knobs["compile"]:
                compilation.observe()
            prepared = runtime.apply_knobs(policy, self.cfg)
            del policy
            identity.note_imported(self.cfg, self.folder)
        found = self._measured(prepared, asked)
        if found["outcome"] == "ok":
            self._explain(found, prepared, asked)
        return found

    @contextmanager
    def _in_float32(self, accelerator: Any) -> Iterator[None]:
        """Wait until there is room on the GPU for a float32 policy, and give its memory back after.

        Trials that prepare beside each other hold their 16 bits each, and few of them float32.
        """
        if accelerator is None:
            self.progress.enter("load")
            yield
            return
        gpu = self.machine.gpus_for(self.cfg.device)[0]
        self.progress.enter("queue")
        with _having(lambda: float32_seat(gpu)):
            self.progress.enter("load")
            yield
            gc.collect()
            accelerator.empty_cache()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With `measure.exclusive`, wait until no other trial of this host measures."""
        if not self.cfg.measure.exclusive:
            yield
            return
        self.progress.enter("wait")
        with _having(measure_lock):
            yield

    def _questioned(self) -> tuple[Pi0Policy | None, question.Question]:
        """The plain float32 policy and what the guard asks, which knows the structure.

        No policy where the structure is wrong.
        """
        cfg, device = self.cfg, runtime.torch_device(self.cfg)
        policy = runtime.build_policy(cfg, device)
        self.progress.enter("reference")
        gpus = self.machine.gpus_for(cfg.device)
        arch = gpus[0].arch if gpus else self.machine.cpu
        asked = question.ask(policy, cfg, arch, self.references)
        seen = asked.known_structure()
        # Once for a context, by its baseline. On a CPU it takes as long as several trials: by hand.
        measured = device.type == "cpu" or not cfg.is_baseline() or asked.power_is_known()
        if seen is None or not measured or policy.dtype != torch.float32:
            # Cast for the reference; the candidate must not depend on whether that was known.
            del policy
            seen = seen or asked.structure()
            if not measured:
                power_of_guard.measure_once(cfg, arch, self.references, asked.key)
            if seen.passed:
                self.progress.enter("load")
                policy = runtime.build_policy(cfg, device)
        return (policy if seen.passed else None), asked.knowing(seen)

    def _measured(self, prepared: Prepared, asked: question.Question) -> dict[str, Any]:
        progress, device = self.progress, self.cfg.device
        inputs = [clock.upload(item, asked.device) for item in asked.observations]
        first_call = self._first_call(prepared, inputs[0])
        progress.ask()
        progress.enter("warmup")
        clock.warm_up(prepared.call, inputs, self.cfg.measure.warmup, device)
        progress.enter("guard")
        report = asked.check(prepared.call, prepared.policy.layout, ordinary=True)
        if not report.passed:
            return _wrong(report)
        # Before the timing, whose inputs and outputs are kept for the guard, not by the policy.
        peak = memory.peak(device)
        witness = asked.witness(prepared.policy.layout)
        witness.begin(prepared.call)
        with self._alone():
            progress.enter("measure")
            warm.warm(
                lambda: prepared.call(inputs[0]),
                device,
                lambda: None if self.monitor is None else self.monitor.read().sm_clock_mhz,
                lambda: clock.synchronise(device),
            )
            self.cfg = raced(self.cfg, self.folder)
            hopeless = _hopeless(prepared, witness, self.cfg)
            compiled = compilation.graphs()
            timed = None if hopeless else self._timed(prepared, witness, inputs[0])
        if hopeless is not None:  # counted without the lock: who lets the device go may be stopped
            counted = self._counted(prepared, inputs[0], last=True)
            return {"outcome": "pruned", "guard": report, **first_call, **counted, **hopeless}
        assert timed is not None
        latency = timed.latency
        compiled_in_all = compilation.found(late=compilation.graphs() - compiled)
        progress.enter("guard")
        spare_ms = _CALLS_AGAIN * 1e3 * sum(progress.seconds.values())
        again = int(spare_ms / latency.wall_mean_ms)
        wall_ms = latency.wall_samples_ms
        report = asked.judge(witness, prepared.call, prepared.policy.layout, wall_ms, again)
        if not report.passed:
            return _wrong(report)
        more = self.cfg.profile.roofline != "none" or _wants_energy(self.cfg, latency.mean_ms)
        counted = self._counted(prepared, inputs[0], last=not more)
        kernels, overhead_ms = counted["kernels"], None
        if kernels is not None and kernels.busy_ms is not None:
            overhead_ms = latency.wall_mean_ms - kernels.busy_ms
        assert report.timed is not None
        return {
            "outcome": "ok",
            "latency": latency,
            "throughput_hz": self.cfg.workload.batch_size * 1000.0 / latency.mean_ms,
            **first_call,
            **counted,
            "guard": report,
            "memory": peak,
            "launch_overhead_ms": overhead_ms,
            "compilation": compiled_in_all,
            "gpu": timed.gpu,
            "checks": [
                *checks.of_latency(latency, self.cfg.measure.warmup, report.timed.calls),
                *checks.of_start(first_call["compile_seconds"], compiled_in_all),
                *timed.checks,
            ],
        }

    def _first_call(self, prepared: Prepared, inputs: Inputs) -> dict[str, Any]:
        """Compile, tune and capture: how long it took, and what of it came from caches."""
        if any(knob.times_kernels(self.cfg) for knob in KNOBS):
            self.progress.ask()
        self.progress.enter("compile")
        memory.reset_peak(self.cfg.device)
        triton = compilation.watch_triton() if self.cfg.device != "cpu" else lambda: (0, 0)
        started = self.progress.clock()
        prepared.call(inputs).cpu()
        seconds = self.progress.clock() - started
        entries = compilation.cache_entries(*triton())
        state = compilation.cache_state(entries)
        return {"compile_seconds": seconds, "compile_cache": state, "cache_entries": entries}

    def _timed(self, prepared: Prepared, witness: Witness, inputs: Inputs) -> _Timed:
        """Plan, then time; what the GPU's driver says is read right before and right after."""
        cfg, monitor = self.cfg, self.monitor
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
            found += checks.of_gpu(gpu, seconds * 1e3, self.progress.standing)
        return _Timed(latency, gpu, found)

    def _counted(self, prepared: Prepared, inputs: Inputs, last: bool) -> dict[str, Any]:
        """Kernels of one call, as `profile` asks, and what there is to say of the configuration.

        `last`: nothing runs on the device afterwards.
        """
        cfg, asked = self.cfg, self.cfg.profile
        notes = [note for knob in KNOBS for note in knob.notes(cfg)]
        if asked.trace:
            notes += profile.keep_generated_code(self.folder / "inductor.tar.gz")
        if asked.tool != "none":
            self.progress.enter("profile")
            profile.call_for_tool(prepared.call, inputs, cfg.device)
            notes.append(f"Run under {asked.tool}: all times are those under it.")
        if not asked.kernels or asked.tool != "none":
            return {"kernels": None, "notes": notes}
        self.progress.enter("profile")
        trace = self.folder / "trace.json.gz" if asked.trace else None
        found = profile.profile_call(
            *(prepared.call, inputs, cfg.device, trace, prepared.uncaptured),
            recorded=self.progress.free if last else lambda: None,
        )
        notes += found.notes
        return {"kernels": found.kernels, "kernel_table": found.table, "notes": notes}

    def _explain(self, found: dict[str, Any], prepared: Prepared, asked: question.Question) -> None:
        """Add energy and roofline to what was measured; nothing here can disturb the latency."""
        cfg = raced(self.cfg, self.folder)
        if cfg.profile.energy and not _wants_energy(cfg, found["latency"].mean_ms):
            found["notes"].append(
                f"No energy: the sweep has {cfg.limits.best_ms:.3f} ms, and this trial is slower "
                "(profile.energy=true measures it in every trial)."
            )
        elif cfg.profile.energy:
            inputs = [clock.upload(item, asked.device) for item in asked.observations]
            hz, enter = found["throughput_hz"], self.progress.enter
            found["energy"], notes = power.measure(
                prepared.call, inputs, cfg, self.machine, hz, enter
            )
            found["notes"] += notes
        if cfg.profile.roofline != "none":
            # A trial sees its own GPU only, so the baseline's is number 0.
            own = cfg.platform.model_copy(update={"gpu": 0})
            plain = cfg.baseline().model_copy(update={"platform": own})
            limits, notes = ceilings.obtain(
                cfg,
                self.machine,
                self.references.with_name("ceilings"),
                child_environment(plain, self.machine),
                lambda: self.progress.enter("ceilings"),
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


@contextmanager
def _having(lock: Callable[[], Held | None]) -> Iterator[None]:
    while (held := lock()) is None:
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        held.release()


def _wrong(report: results.GuardReport) -> dict[str, Any]:
    return {"outcome": "wrong", "guard": report, "reason": guard.explain(report)}


def raced(cfg: Config, folder: Path) -> Config:
    """With the limit of this moment: other trials may have been faster since this one began."""
    if cfg.limits.race is None:
        return cfg
    file = folder.absolute().parents[1] / RACE_FILE
    try:
        best = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # nothing has been measured yet
        return cfg
    return cfg.raced(best.get(cfg.context_hash()))


def _block(prepared: Prepared, witness: Witness, cfg: Config) -> Callable[..., clock.Timing]:
    """Times so many calls; with `compared` some of them are compared with the reference, later.

    Warm again, shortly: copies to the host, planning or a reading came in between.
    """
    return lambda iterations, compared=False: witness.time(
        prepared.call, iterations, cfg.device, compared
    )


def _hopeless(prepared: Prepared, witness: Witness, cfg: Config) -> dict[str, Any] | None:
    """What the first calls show, when they are surely above `limits.latency_ms`.

    Looks after `MIN_ITERATIONS` calls, and once more after all that are measured at least.
    """
    limit = cfg.limits.latency_ms
    if limit is None:
        return None
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
