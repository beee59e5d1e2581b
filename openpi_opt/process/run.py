"""One trial in one process, and whatever became of it as a result document."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from openpi_opt import result as results
from openpi_opt.config import Config, Limits
from openpi_opt.figures import LIMITS
from openpi_opt.machine import Machine, probe
from openpi_opt.process import tools
from openpi_opt.process.child import Ended, Stop, Tether, Turn, run_command
from openpi_opt.process.devices import Slot
from openpi_opt.process.environment import child_environment
from openpi_opt.process.leftovers import end_marked
from openpi_opt.result import Failed, TrialResult
from openpi_opt.track import identity

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


@dataclass(frozen=True)
class Place:
    """What a trial gets from the sweep beside its configuration.

    `uid` marks its processes, `fds` are locks that are held until nothing is left of it, `caches`
    is the folder of compiled code, and `stop` ends it. With a `turn` it asks before it measures.
    """

    slot: Slot
    uid: str
    caches: Path | None = None
    fds: tuple[int, ...] = ()
    stop: Stop | None = None
    turn: Turn | None = None


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

    Raises:
        OSError: the folder cannot be written or the process cannot be started.
        StoppedError: `place.stop` was set.
    """
    folder = trial_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config, result, log = folder / "config.json", folder / "result.json", folder / "log.txt"
    for left in (result, folder / identity.FILE):
        left.unlink(missing_ok=True)
    results.write_atomic(config, json.dumps(cfg.dump(), indent=1))
    argv = [*tools.command(cfg.profile.tool, folder), *command]
    argv += ["--in-place", "--config", str(config)]
    argv += ["--result", str(result), "--references", str(store_references.resolve())]
    limits, machine = phase_limits(cfg.limits), machine or probe()
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if place is None:
        ended = run_command(argv, child_environment(cfg, machine), limits, log, on_phase)
        return judge(cfg, ended, result, log, started_at)
    slot = place.slot
    env = child_environment(
        cfg, machine, gpu=slot.gpu, threads=len(slot.cores), caches=place.caches
    )
    tether = Tether(place.uid, place.stop, place.fds, slot.cores, place.turn)
    try:
        ended = run_command(argv, env, limits, log, on_phase, tether)
    finally:
        end_marked(place.uid)  # also when the watcher was killed
    return judge(cfg, ended, result, log, started_at)


def phase_limits(limits: Limits) -> dict[str, float]:
    """Seconds for every phase of `result.Phase`."""
    own: dict[str, float] = limits.model_dump(exclude={*LIMITS, "best_ms", "race"})
    return own | {phase: own[name] for phase, name in _BORROWED_LIMITS.items()} | _UNLIMITED


def judge(cfg: Config, ended: Ended, result: Path, log: Path, started_at: str) -> TrialResult:
    """The document that the trial wrote, if it is a whole and fitting one, or why there is none."""
    try:
        document = result.read_bytes()
    except FileNotFoundError:
        document = None
    problem = None
    if document is not None:
        parsed = parse_result(document, cfg)
        if not isinstance(parsed, str):
            return _with_note(parsed, ended)
        problem = parsed
    outcome, reason = _failure(ended, problem)
    return Failed(
        outcome=outcome,
        reason=reason,
        phase=ended.phase,
        log_tail=log_tail(log),
        config=cfg.dump(),
        config_hash=cfg.hash(),
        context_hash=cfg.context_hash(),
        started_at=started_at,
        phase_seconds=ended.phase_seconds,
        files=identity.noted(result.parent),
    )


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


def parse_result(document: bytes, cfg: Config) -> TrialResult | str:
    """The result of `cfg`, or what is wrong with the document."""
    try:
        parsed = identity.renewed(results.parse(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        return f"{where}: {first['msg']}"
    if parsed.config_hash != cfg.hash():
        return f"it is of another configuration ({parsed.config_hash}, not {cfg.hash()})"
    return parsed


def whole_result(folder: Path, cfg: Config) -> TrialResult | None:
    """The result that a trial of `cfg` left in its folder, if it is a whole and fitting one."""
    try:
        parsed = parse_result((folder / "result.json").read_bytes(), cfg)
    except FileNotFoundError:
        return None
    return None if isinstance(parsed, str) else parsed


def _with_note(parsed: TrialResult, ended: Ended) -> TrialResult:
    """Keep a complete result whose process did not end in peace, and say so."""
    notes = []
    if ended.returncode != 0:
        notes.append(f"after writing its result the process {_how(ended)}")
    if ended.left:
        notes.append(f"it left processes behind, which were ended: {', '.join(ended.left)}")
    return parsed.model_copy(update={"notes": [*parsed.notes, *notes]}) if notes else parsed


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
