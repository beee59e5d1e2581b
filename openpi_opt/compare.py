"""Print the trials of a study: `python -m openpi_opt.compare STUDY`.

Read from the journal, so it works during a sweep, without MLflow, and changes nothing. Trials are
judged by the objectives and limits of the newest sweep, or by those given here.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpi_opt import criteria
from openpi_opt.cli import run
from openpi_opt.figures import FIGURES, Figure
from openpi_opt.result import (
    Compilation,
    Energy,
    GuardReport,
    Latency,
    Ok,
    Pruned,
    Roofline,
    Wrong,
)
from openpi_opt.track.journal import Journal
from openpi_opt.track.pareto import objectives
from openpi_opt.track.report import Row, rows
from openpi_opt.track.store import DEFAULT_STORE, Store
from openpi_opt.track.table import print_table

_SAMPLES = {name for name in Latency.model_fields if name.endswith("samples_ms")}
# Parts that only some outcomes have, with the columns that they always take in CSV.
_PARTS = {
    "latency": [name for name in Latency.model_fields if name not in _SAMPLES],
    "kernels": ["kind", "total", "busy_ms", "idle_ms"],
    "compilation": [name for name in Compilation.model_fields if name != "graph_breaks"],
    "roofline": ["floor_ms", "fraction", "ceilings"],
    "energy": list(Energy.model_fields),
    "guard": list(GuardReport.model_fields),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trials of a study on stdout, and only them.

    Raises:
        UserError: an unknown study or store, or a damaged journal.
    """
    arguments = _parser().parse_args(argv)
    gc.disable()  # whatever is read is kept until the end
    study_dir = Store.open(arguments.store, create=False).find_study(arguments.study)
    journal = Journal.read(study_dir, brief=True)
    for note in journal.notes:
        print(f"note: {note}", file=sys.stderr)
    records = journal.records()
    if not records:
        print(f"note: study {arguments.study} has no finished trial yet", file=sys.stderr)
    judged_by = criteria.of_arguments(arguments, study_dir)
    if arguments.format == "table":
        print_table(records, criteria=judged_by, stages=True, columns=arguments.columns)
        return 0
    found = sorted(rows(records, criteria=judged_by), key=lambda row: row.record.number)
    plain = [trial(row, study_dir, judged_by) for row in found]
    if arguments.format == "json":
        print(json.dumps(plain, indent=1, allow_nan=False))
    else:
        _print_csv(plain)
    return 0


def trial(row: Row, study_dir: Path, judged_by: criteria.Criteria | None = None) -> dict[str, Any]:
    """One trial as plain data: all that a script wants, without the samples."""
    record, result = row.record, row.record.result
    ok = result if isinstance(result, Ok) else None
    return {
        "number": record.number,
        "uid": record.uid,
        "role": record.role,
        "params": record.params,
        "labels": record.labels,
        "outcome": result.outcome,
        "reason": None if isinstance(result, Ok) else result.reason,
        "lossy": row.lossy,
        "best": row.best,
        "pareto": row.pareto,
        "over_limit": [f"{name}: {text}" for name, text in row.over.items()],
        "objectives": objectives(row, judged_by or criteria.Criteria()),
        "vs_baseline": row.vs_baseline,
        "latency": ok and ok.latency.model_dump(exclude=_SAMPLES),
        "throughput_hz": ok and ok.throughput_hz,
        "compile_seconds": ok and ok.compile_seconds,
        "peak_mib": ok and ok.memory.peak_mib,
        "kernels": ok and ok.kernels and ok.kernels.model_dump(),
        "launch_overhead_ms": ok and ok.launch_overhead_ms,
        "compilation": ok and ok.compilation and ok.compilation.model_dump(),
        "gpu": ok and ok.gpu and ok.gpu.model_dump(),
        "checks": ok and [check.model_dump() for check in ok.checks],
        "flags": ok and ok.flags(),
        "roofline": ok and ok.roofline and _roofline(ok.roofline),
        "energy": ok and ok.energy and ok.energy.model_dump(),
        "guard": result.guard.model_dump() if isinstance(result, Ok | Pruned | Wrong) else None,
        "model": result.config.get("model", {}).get("name"),
        "workload": result.config.get("workload", {}).get("name"),
        "config_hash": result.config_hash,
        "context_hash": result.context_hash,
        "fingerprint_hash": record.fingerprint_hash,
        "other_fingerprint": row.stale,
        "changed_since": row.changed,
        "created_at": record.created_at,
        "trial_dir": str(study_dir / record.trial_dir) if record.trial_dir else None,
    }


def _roofline(roofline: Roofline) -> dict[str, Any]:
    """Floor and fraction of the call and of each stage, and where the ceilings come from."""
    return {
        "floor_ms": roofline.floor_ms,
        "fraction": roofline.fraction,
        "ceilings": roofline.ceilings and roofline.ceilings.source,
        "stages": {
            name: stage.model_dump(include={"floor_ms", "bound", "measured_ms", "fraction"})
            for name, stage in roofline.stages.items()
        },
    }


def _print_csv(plain: Sequence[dict[str, Any]]) -> None:
    """Nested keys become columns joined with dots; a part that a trial lacks is left empty.

    Texts of a list are joined with semicolons.
    """
    parts = {key: dict.fromkeys(fields) for key, fields in _PARTS.items()}
    flat = [
        _flat({**trial, "checks": None, **{k: trial[k] or part for k, part in parts.items()}})
        for trial in plain
    ]
    for line in flat:
        del line["checks"]  # a table of their own; `flags` says what matters
    columns = list(dict.fromkeys(key for line in flat for key in line))
    writer = csv.DictWriter(sys.stdout, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = "; ".join(value) if isinstance(value, list) else value
    return found


def _columns(text: str) -> list[Figure]:
    unknown = [key for key in text.split(",") if key not in FIGURES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no figure; they are {', '.join(FIGURES)}"
        )
    return [FIGURES[key] for key in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.compare",
        description="Print the trials of a study: what differs, outcome, latency, kernels.",
    )
    parser.add_argument("study", metavar="STUDY", help="name of the study")
    parser.add_argument(
        "--store", default=DEFAULT_STORE, metavar="DIR", help="the sweep's store (default: mlruns)"
    )
    parser.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="default: table"
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="let lossy configurations (FP8) be the best"
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        default=[],
        metavar="A,B",
        help="show these figures too, as p95_ms,p99_ms; `python -m openpi_opt.figures` lists them",
    )
    criteria.add_arguments(parser, objectives=True)
    return parser


if __name__ == "__main__":
    run(main)
