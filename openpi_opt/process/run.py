"""One trial in one process, and whatever became of it as a result document."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from openpi_opt import result as results
from openpi_opt.config import Config, Limits
from openpi_opt.errors import UserError
from openpi_opt.figures import LIMITS
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import Refusal
from openpi_opt.machine import Machine, probe
from openpi_opt.process.child import Ended, Place, end_marked, run_command
from openpi_opt.process.environment import child_environment
from openpi_opt.result import Failed, Refused, TrialResult
from openpi_opt.track import identity
from openpi_opt.track.store import unusable

_TAIL_BYTES = 8192
_TAIL_LINES = 40
# Phases without a limit of their own, and the limit that they use.
_BORROWED_LIMITS = {
    "start": "load",
    "import": "load",
    "apply": "compile",
    "report": "profile",
}
# Waiting for other trials ends when they do, and each of them has limits.
_UNLIMITED = {"wait": math.inf, "queue": math.inf}
TRIAL_COMMAND = (sys.executable, "-m", "openpi_opt.trial")

Failure = Literal["oom", "timeout", "crashed", "error"]


# Runs one trial to its end: `run_trial`, and what stands in for it.
Run = Callable[..., TrialResult]

# `profile.tool`, a vendor's profiler in front of a trial: its device, and its words before the
# trial's own. The trial is the same; its times are those under the tool, so its configuration is
# another one to every comparison (`Config.hash`). CUDA's tools record one call, between
# cudaProfilerStart and -Stop (`measure.profile.call_for_tool`); rocprofv3 records the process.
# None has been run here. Sources: ROCm 7 "Using rocprofv3"; Nsight Compute CLI and Nsight Systems
# user guides, 2025.
TOOLS = {
    "rocprofv3": ("rocm", "--kernel-trace --output-format csv -d {folder} -o trace --"),
    "ncu": ("cuda", "--profile-from-start off --target-processes application-only --set full "
            "--force-overwrite --export {folder}/trace"),
    "nsys": ("cuda", "profile --trace cuda,nvtx --capture-range cudaProfilerApi "
             "--capture-range-end stop --export sqlite --force-overwrite true "
             "--output {folder}/trace"),
}  # fmt: skip


def run_trial(
    cfg: Config,
    trial_dir: Path,
    store_references: Path,
    on_phase: Callable[[str], None],
    machine: Machine | None = None,
    place: Place | None = None,
    command: Sequence[str] = TRIAL_COMMAND,
) -> TrialResult:
    """Run `cfg` in a fresh process and return its result; every end of it is one.

    `trial_dir` receives config.json, result.json and log.txt, with absolute paths whatever is
    given. `machine` spares looking at it again. Without `place` the trial has the whole machine.
    `command` is another program with the same arguments, for tests of the engine itself.
    Raises as `run_command`.
    """
    folder = trial_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, result, log = folder / "config.json", folder / "result.json", folder / "log.txt"
    for left in (result, folder / identity.FILE):
        left.unlink(missing_ok=True)
    results.write_atomic(config, json.dumps(cfg.dump(), indent=1))
    argv = [*_tool(cfg.profile.tool, folder / "profile"), *command]
    argv += ["--in-place", "--config", str(config)]
    argv += ["--result", str(result), "--references", str(store_references.resolve())]
    limits, machine, place = phase_limits(cfg.limits), machine or probe(), place or Place()
    slot, own = place.slot, dict[str, Any]()
    if slot is not None:
        own = {"gpu": slot.gpu, "threads": len(slot.cores), "caches": place.caches}
    started_at = _now()
    try:
        env = child_environment(cfg, machine, **own)
        ended = run_command(argv, env, limits, log, on_phase, place)
    finally:
        if place.uid:
            end_marked(place.uid)  # also when the watcher was killed
    return judge(cfg, ended, result, log, started_at)


def phase_limits(limits: Limits) -> dict[str, float]:
    """Seconds for every phase of `result.Phase`."""
    own: dict[str, float] = limits.model_dump(exclude={*LIMITS, "best_ms", "race"})
    return own | {phase: own[name] for phase, name in _BORROWED_LIMITS.items()} | _UNLIMITED


def refused(cfg: Config, machine: Machine) -> Refused | None:
    """The result without a process, when something says that `cfg` cannot run here."""
    refusals = (knob.check(cfg, machine) for knob in KNOBS)
    refusal = next(filter(None, refusals), None) or _tool_refusal(cfg)
    if refusal is None:
        return None
    return Refused(outcome=refusal.outcome, reason=refusal.reason, **_about(cfg, _now()))


def _tool(tool: str, folder: Path) -> list[str]:
    """The words of `profile.tool`; its files go to the folder, which is made."""
    if tool == "none":
        return []
    folder.mkdir(exist_ok=True)
    words = [word.format(folder=folder) for word in TOOLS[tool][1].split()]
    return [shutil.which(tool) or tool, *words]


def _tool_refusal(cfg: Config) -> Refusal | None:
    if (tool := cfg.profile.tool) == "none":
        return None
    device, _ = TOOLS[tool]
    if cfg.device != device:
        reason = f"profile.tool={tool} is for {device}; this trial runs on {cfg.device}"
    elif shutil.which(tool) is None:
        reason = f"profile.tool={tool}: there is no such program on PATH"
    else:
        return None
    return Refusal("unavailable", reason)


def lost(cfg: Config, folder: Path, outcome: Failure, phase: str, reason: str) -> Failed:
    """The result of a trial that went with the node or process that ran it."""
    return _failed(cfg, folder / "log.txt", _now(), outcome, phase=phase, reason=reason)


def cannot_run(folder: Path, error: OSError) -> UserError:
    """The host that refuses a process or a file is the user's to mend."""
    mend = "Free space, memory or permissions"
    return unusable(f"run a trial in {folder}", folder, error, mend)


def judge(cfg: Config, ended: Ended, result: Path, log: Path, started_at: str) -> TrialResult:
    """The document that the trial wrote, if it is a whole and fitting one, or why there is none."""
    found = read_result(result, cfg)
    if found is None or isinstance(found, str):
        outcome, reason = _failure(ended, found)
        about = {"phase": ended.phase, "phase_seconds": ended.phase_seconds, "reason": reason}
        return _failed(cfg, log, started_at, outcome, **about)
    notes = []
    if ended.returncode != 0:
        notes.append(f"after writing its result the process {_how(ended)}")
    if ended.left:
        notes.append(f"it left processes behind, which were ended: {', '.join(ended.left)}")
    return noted(found, *notes)


def noted(result: TrialResult, *notes: str) -> TrialResult:
    """The same result with notes behind its own."""
    return result.model_copy(update={"notes": [*result.notes, *notes]}) if notes else result


def log_tail(log: Path) -> str:
    """The last lines of a log of any size; empty when there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def read_result(path: Path, cfg: Config) -> TrialResult | str | None:
    """The result of `cfg` in a file, what is wrong with it, or None when there is none."""
    try:
        parsed = identity.renewed(results.parse(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        return f"{where}: {first['msg']}"
    if parsed.config_hash != cfg.hash():
        return f"it is of another configuration ({parsed.config_hash}, not {cfg.hash()})"
    return parsed


def whole_result(folder: Path, cfg: Config) -> TrialResult | None:
    """The result that a trial of `cfg` left in its folder, if it is a whole and fitting one."""
    found = read_result(folder / "result.json", cfg)
    return None if isinstance(found, str) else found


def _failed(cfg: Config, log: Path, started_at: str, outcome: Failure, **how: Any) -> Failed:
    files = identity.noted(log.parent)
    return Failed(
        outcome=outcome, log_tail=log_tail(log), files=files, **how, **_about(cfg, started_at)
    )


def _about(cfg: Config, started_at: str) -> dict[str, Any]:
    return {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "context_hash": cfg.context_hash(),
        "started_at": started_at,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _failure(ended: Ended, problem: str | None) -> tuple[Failure, str]:
    if ended.exceeded is not None:
        limit = _BORROWED_LIMITS.get(ended.phase, ended.phase)
        return "timeout", (
            f"phase {ended.phase} ran past its limit of {ended.exceeded:g} s "
            f"(limits.{limit}); the process was ended"
        )
    if ended.returncode == -signal.SIGKILL and ended.oom_killed:
        return "oom", f"ended by the kernel's out-of-memory killer in phase {ended.phase}"
    if ended.returncode != 0:
        return "crashed", f"the process {_how(ended)} in phase {ended.phase}"
    if problem is not None:
        return "error", f"the process wrote a result that cannot be read: {problem}"
    return "error", f"the process ended in phase {ended.phase} without a result"


def _how(ended: Ended) -> str:
    if ended.exceeded is not None:
        return f"hung for {ended.exceeded:g} s and was ended"
    if ended.returncode is None:
        return "could not be killed (it may still hold its device)"
    if ended.returncode >= 0:
        return f"exited with code {ended.returncode}"
    names: Mapping[int, str] = {int(number): number.name for number in signal.Signals}
    return f"was ended by {names.get(-ended.returncode, f'signal {-ended.returncode}')}"
