"""Where a preset comes from: written by `promote`, read to choose one and to warn.

Nothing here chooses an implementation. `auto` names a preset for this GPU, model and workload;
`other_machine` says how a machine differs from the one that a preset was promoted on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from openpi_opt.config import Config
from openpi_opt.confirm import power
from openpi_opt.confirm.judge import Confirmed
from openpi_opt.confirm.promotion import Judged
from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.result import GuardReport, Ok

AUTO = "auto"
# What of a fingerprint a preset carries as its versions.
VERSIONS = ("python", "torch", "triton", "aiter", "openpi_opt", "source_hash")
# What of it decides the latency: a difference is worth a warning.
_DECISIVE = ("torch", "triton", "aiter")


def of_promotion(
    cfg: Config, judged: Judged, processes: Sequence[Ok], fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """The provenance of a winner: what it is of, where it ran, and what was measured.

    `processes` are the winner's confirmation processes. Percentiles are means over them, the guard
    is that of the process farthest from the reference.
    """
    gpu, git = fingerprint["gpu"], fingerprint["git"]
    return {
        "promoted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config_hash": cfg.hash(),
        "lossy": cfg.lossy(),
        "machine": {
            "gpu": gpu and gpu["name"],
            "arch": gpu and gpu["arch"],
            "driver": gpu and gpu["driver"],
            "cpu": fingerprint["cpu"],
        },
        "versions": {name: fingerprint[name] for name in VERSIONS},
        "commit": git and git.removesuffix("-dirty"),
        "clean": None if git is None else not git.endswith("-dirty"),
        "model": cfg.model.model_dump(mode="json"),
        "workload": cfg.workload.model_dump(mode="json"),
        **_latency(judged.winner, processes),
        "guard": _worst_guard(processes),
        "flags": _flags(processes),
        "gain_over_baseline": _gain(judged.winner),
        "spread_between_processes": judged.schedule.tau and round(judged.schedule.tau, 5),
        "promise": judged.schedule.promise and judged.schedule.promise.model_dump(),
    }


def _latency(winner: Confirmed, processes: Sequence[Ok]) -> dict[str, Any]:
    p95, p99 = (
        float(np.mean([getattr(ok.latency, name) for ok in processes]))
        for name in ("p95_ms", "p99_ms")
    )
    return {
        "processes": len(winner.means_ms),
        "mean_ms": round(winner.mean_ms, 4),
        "p95_ms": round(p95, 4),
        "p99_ms": round(p99, 4),
        "std_ms": round(winner.between_std_ms, 4),
        "ci95_ms": [round(bound, 4) for bound in winner.ci95_ms()],
    }


def _gain(winner: Confirmed) -> dict[str, Any] | None:
    gain = winner.gain
    if gain is None:
        return None
    return {
        "verdict": gain.verdict,
        "mean": round(gain.mean, 4),
        "at_least": round(gain.low, 4),
        "confidence": 1 - power.TOTAL_ALPHA,
    }


def _worst_guard(processes: Sequence[Ok]) -> dict[str, Any]:
    """The plain figures of the guard that was farthest from the reference."""

    def distance(guard: GuardReport) -> float:
        return np.inf if guard.rel_l2 is None else guard.rel_l2

    worst = max((ok.guard for ok in processes), key=distance).model_dump(mode="json")
    return {name: value for name, value in worst.items() if isinstance(value, int | float)}


def _flags(processes: Sequence[Ok]) -> dict[str, int]:
    """By check: how many of the processes it flagged."""
    every = [name for ok in processes for name in {flag.partition(":")[0] for flag in ok.flags()}]
    return {name: every.count(name) for name in sorted(set(every))}


def presets(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The provenance of every preset in `folders`, by name; the first folder wins.

    A file that is no YAML mapping is left out: whoever asks for it by name hears why.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.yaml")):
            try:
                document = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue
            if isinstance(document, dict) and isinstance(document.get("provenance"), dict):
                found.setdefault(file.stem, document["provenance"])
    return found


def folders(preset_dir: Path | None) -> list[Path]:
    """Where presets are looked for: the given folder, the working folder's, the project's."""
    given = [] if preset_dir is None else [preset_dir]
    return [*given, user_conf_dir() / "preset", conf_dir() / "preset"]


def auto(
    known: Mapping[str, Mapping[str, Any]],
    gpu: str | None,
    model: str | None = None,
    workload: str | None = None,
) -> str:
    """The name of the preset for this GPU, model and workload; of several, the fastest.

    Only presets that were measured and are not lossy count. None for `model` or `workload` admits
    any, as long as all that remain are of one.

    Raises:
        UserError: there is none, or presets of different models or workloads remain. Says which
            presets there are.
    """
    measured = {
        name: found
        for name, found in known.items()
        if found.get("mean_ms") and not found.get("lossy")
    }
    asked = {"model": model, "workload": workload}
    fitting = {
        name: found
        for name, found in measured.items()
        if _of(found, "machine", "gpu") == gpu
        and all(wanted in (None, _of(found, part, "name")) for part, wanted in asked.items())
    }
    if len({(_of(p, "model", "name"), _of(p, "workload", "name")) for p in fitting.values()}) == 1:
        return min(fitting, key=lambda name: float(fitting[name]["mean_ms"]))
    words = ", ".join(f"{part} {wanted}" for part, wanted in asked.items() if wanted)
    what = f"{gpu or 'a CPU'}{words and ', '}{words}"
    why = "presets of several models or workloads fit" if fitting else "no measured preset is"
    lines = [f"  {name}: {described(found)}" for name, found in (fitting or measured).items()]
    raise UserError(
        f"preset=auto: {why} for {what}. "
        + ("Say model= and workload=, or one of" if fitting else "There are")
        + (":\n" + "\n".join(lines) if lines else " none.")
    )


def described(found: Mapping[str, Any]) -> str:
    """A preset in a line: GPU, model, workload and mean latency."""
    gpu = _of(found, "machine", "gpu") or _of(found, "machine", "cpu")
    model, workload = (_of(found, part, "name") for part in ("model", "workload"))
    return f"{gpu}, {model}, workload {workload}, {found.get('mean_ms', '?')} ms"


def other_machine(found: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    """How this machine differs from the one that a preset was promoted on: a line for each.

    Compared are the GPU (without one, the CPU), its driver, torch, triton and aiter; what either
    side does not know is not compared. An empty list: its figures hold here.
    """
    gpu = fingerprint["gpu"] or {}
    here: dict[str, Any] = {"gpu": gpu.get("name"), "driver": gpu.get("driver")}
    if not gpu and not _of(found, "machine", "gpu"):
        here["cpu"] = fingerprint["cpu"]
    pairs = [(name, _of(found, "machine", name), value) for name, value in here.items()]
    pairs += [(name, _of(found, "versions", name), fingerprint[name]) for name in _DECISIVE]
    return [
        f"promoted with {name} {_short(then)}, here it is {_short(now) if now else 'absent'}"
        for name, then, now in pairs
        if then is not None and then != now
    ]


def _short(value: Any) -> str:
    return str(value.get("version", value)) if isinstance(value, Mapping) else str(value)


def _of(found: Mapping[str, Any], part: str, name: str) -> Any:
    inside = found.get(part)
    return inside.get(name) if isinstance(inside, Mapping) else None
