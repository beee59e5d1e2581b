"""What a record becomes in MLflow: params, metrics, tags and files. Pure data, no MLflow."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi_opt.config import is_lossy, plain_labels
from openpi_opt.figures import metrics as figures
from openpi_opt.result import Ok, Pruned, Wrong
from openpi_opt.track.journal import Record

MAX_PARAM = 6_000  # MLflow's limits; longer values it would cut with a warning
MAX_TAG = 8_000
MAX_KEY = 250
NOTE_TAG = "mlflow.note.content"  # what MLflow shows as a run's description
MAX_REASON = 500
MAX_FILE_BYTES = 256 * 2**20
PARAM_SECTIONS = ("model", "weights", "workload")
# What a trial's folder may hold beside the result.
TRIAL_FILES = ("*.log", "log.txt", "trace*.json", "trace*.json.gz", "inductor.tar.gz",
               "profile/trace*")  # fmt: skip


def run_name(record: Record) -> str:
    """Short name of a trial's run: its number, and what sets it apart from the baseline."""
    plain = plain_labels()
    knobs = {key: text for key, text in record.labels.items() if text != plain.get(key)}
    keys = {
        key: text
        for key, text in record.params.items()
        if key.split(".")[0] not in knobs and text != plain.get(key)
    }
    shown = " ".join(f"{key}={value}" for key, value in {**knobs, **keys}.items())
    if record.role == "baseline":
        shown = "baseline"
    if record.role == "confirm" and record.shown:
        return one_line(f"{record.number} {record.shown}", 120)
    return one_line(f"{record.number} {shown or record.role}", 120)


def note(record: Record) -> str:
    """The description of a trial's run, in Markdown: why it is not ok, or its flags."""
    result = record.result
    if not isinstance(result, Ok):
        return f"**{result.outcome}**: {one_line(result.reason, MAX_REASON)}"
    flags = "\n".join(f"- {one_line(flag, MAX_REASON)}" for flag in result.flags())
    return f"Flagged:\n\n{flags}" if flags else ""


def params(record: Record) -> dict[str, str]:
    """Knob labels, and the fields that say what was inferred."""
    found = dict(record.labels)
    for section in PARAM_SECTIONS:
        fields = record.result.config.get(section, {})
        found |= {f"{section}.{key}": _text(value) for key, value in fields.items()}
    return {_key(key): value[:MAX_PARAM] for key, value in found.items()}


def metrics(record: Record, baseline_ms: float | None = None) -> dict[str, float]:
    """The design's metric names; only what the outcome has, only finite numbers. The latency comes
    first: MLflow's comparison plots the first metric."""
    result = record.result
    found: dict[str, float] = {}
    if isinstance(result, Ok):
        found |= _ok_metrics(result)
        if baseline_ms is not None:
            found["vs_baseline"] = baseline_ms / result.latency.mean_ms
    if isinstance(result, Ok | Pruned | Wrong):
        report = result.guard.model_dump(include={"rel_l2", "max_abs", "cosine", "tolerance"})
        found |= {f"guard/{name}": value for name, value in report.items() if value is not None}
    found |= {f"phase/{name}_s": seconds for name, seconds in result.phase_seconds.items()}
    return {_key(key): float(value) for key, value in found.items() if math.isfinite(value)}


def tags(record: Record) -> dict[str, str]:
    """Outcome, hashes, and what ran where."""
    result = record.result
    found = {
        "outcome": result.outcome,
        "role": record.role,
        "number": str(record.number),
        "config_hash": result.config_hash,
        "context_hash": result.context_hash,
        "fingerprint_hash": record.fingerprint_hash,
        "model": str(result.config.get("model", {}).get("name", "")),
        "device": device(result.config, result.fingerprint),
        "overrides": " ".join(f"{key}={value}" for key, value in record.params.items()),
        "trial_dir": record.trial_dir or "",
        "compile_cache": (result.compile_cache or "") if isinstance(result, Ok) else "",
        "noisy": str(result.latency.noisy).lower() if isinstance(result, Ok) else "",
        "flags": one_line("; ".join(result.flags()), MAX_REASON) if isinstance(result, Ok) else "",
        "lossy": "true" if is_lossy(result.config) else "",
        "reason": one_line(reason(record), MAX_REASON),
    }
    marked = {f"openpi_opt.{key}": value[:MAX_TAG] for key, value in found.items() if value}
    text = note(record)
    return marked | ({NOTE_TAG: text[:MAX_TAG]} if text else {})


def write_artifacts(record: Record, folder: Path) -> None:
    """Write the files made from the record itself: config, result, kernel table."""
    result = record.result
    config = json.dumps(result.config, indent=1) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "result.json").write_text(result.model_dump_json(indent=1), encoding="utf-8")
    if isinstance(result, Ok) and result.kernel_table:
        with (folder / "kernels.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "category", "calls", "total_ms"])
            writer.writerows(
                [row.name, row.category, row.calls, row.total_ms] for row in result.kernel_table
            )


def trial_files(record: Record, study_dir: Path) -> list[Path]:
    """Log and trace in the trial's folder; not links, nothing outside, nothing huge."""
    if record.trial_dir is None:
        return []
    folder = (study_dir / record.trial_dir).resolve()
    if not folder.is_dir() or not folder.is_relative_to(study_dir.resolve()):
        return []
    found = {path for pattern in TRIAL_FILES for path in folder.glob(pattern)}
    return sorted(
        path
        for path in found
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES
    )


def reason(record: Record) -> str:
    """Why a trial is not ok; empty when it is."""
    return "" if isinstance(record.result, Ok) else record.result.reason


def device(config: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    """The device that ran, as `cuda (NVIDIA H100)`."""
    kind = str(config.get("platform", {}).get("device", "unknown device"))
    gpu = fingerprint.get("gpu") or {}
    name = fingerprint.get("cpu") if kind == "cpu" else gpu.get("name")
    return f"{kind} ({name})" if name else kind


def one_line(text: str, limit: int) -> str:
    """Text for one line of a table or message: no control characters, cut at `limit`."""
    if len(text) <= limit and text.isprintable() and "  " not in text:
        return text.strip()  # as nearly all are
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours in the end of a log
    clean = "".join(c if c.isprintable() else " " for c in text)
    clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _ok_metrics(result: Ok) -> dict[str, float]:
    """Figures, then what only some results have: checks, kernels, the GPU's state, stages."""
    found = figures(result)
    if result.checks:  # documents of format 1 have none
        found["checks/flagged"] = len(result.flags())
    kernels, gpu = result.kernels, result.gpu
    if kernels is not None:
        # Device kernels and operator calls are different things and get different names.
        prefix = "kernels" if kernels.kind == "device_kernels" else "operators"
        found |= {f"{prefix}/total": kernels.total}
        found |= {f"{prefix}/{name}": count for name, count in kernels.by_category.items()}
        found |= {f"category/{name}_ms": value for name, value in kernels.category_ms.items()}
        found |= {f"stage/{name}_ms": value for name, value in kernels.stage_ms.items()}
        found |= {f"stage/{name}_{prefix}": count for name, count in kernels.by_stage.items()}
        found |= {"gpu/busy_ms": kernels.busy_ms, "gpu/idle_ms": kernels.idle_ms}
        found["gpu/longest_gap_ms"] = kernels.longest_gap_ms
    if gpu is not None:  # after the timed calls: the warmest that it was
        state = gpu.after.model_dump(exclude={"throttle_reasons", "not_read"})
        found |= {f"gpu/{name}": value for name, value in state.items()}
        throttled = gpu.throttled_ms or {}
        found |= {f"gpu/throttled_{cause}_ms": value for cause, value in throttled.items()}
    for name, stage in (result.roofline.stages if result.roofline else {}).items():
        found[f"roofline/{name}_fraction"] = stage.fraction
        found[f"roofline/{name}_floor_ms"] = stage.floor_ms
    return {name: value for name, value in found.items() if value is not None}


def _key(key: str) -> str:
    """A key that MLflow takes: alphanumeric and `_ - . space : /`, not too long."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:MAX_KEY]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
