"""Print the trials of studies: `python -m openpi_opt.compare STUDY [STUDY ...]`.

Read from the journal, so it works during a sweep, and changes nothing. Trials are judged by the
newest sweep's objectives and limits (of the first study), or by those given here.
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

from openpi_opt import cli, criteria
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
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.link import where
from openpi_opt.track.report import Row, groups
from openpi_opt.track.store import find_studies
from openpi_opt.track.study_plots import objectives
from openpi_opt.track.table import print_groups, print_side_by_side
from openpi_opt.verbs import add_studies, verb_parser

# Of an ok result as it is; None where there is none.
_FIGURES = dict.fromkeys(
    ["latency", "throughput_hz", "compile_seconds", "kernels", "launch_overhead_ms",
     "compilation", "gpu", "checks", "energy"]
)  # fmt: skip
_SAMPLES = {name for name in Latency.model_fields if name.endswith("samples_ms")}
_LEFT_OUT = {"latency": _SAMPLES}
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
    """Print the trials of studies on stdout, and only them."""
    arguments = _parser().parse_args(argv)
    gc.disable()  # whatever is read is kept until the end
    folders = find_studies(arguments.store, arguments.study)
    records = [record for folder in folders for record in _records(folder)]
    judged_by = criteria.of_arguments(arguments, folders[0])
    found = groups(records, criteria=judged_by, apart=len(folders) > 1)
    if arguments.format == "table":
        print_groups(found, stages=True, columns=arguments.columns)
        if len(folders) > 1:
            print_side_by_side(found)
        else:
            cli.say(f"see it: {where(folders[0])}")
        return 0
    homes = {folder.name: folder for folder in folders}
    places = {name: place for place, name in enumerate(homes)}
    every = [row for group in found for row in group.rows]
    every.sort(key=lambda row: (places.get(row.record.study, 0), row.record.number))
    plain = [trial(row, homes.get(row.record.study, folders[0]), judged_by) for row in every]
    if arguments.format == "json":
        print(json.dumps(plain, indent=1, allow_nan=False))
    else:
        _print_csv(plain)
    return 0


def _records(study_dir: Path) -> list[Record]:
    """What is recorded of a study; says on stderr what is wrong with its journal."""
    journal = Journal.read(study_dir, brief=True)
    for note in journal.notes:
        cli.say(f"note: {note}")
    records = journal.records()
    if not records:
        cli.say(f"note: study {study_dir.name} has no finished trial yet")
    return records


def trial(row: Row, study_dir: Path, judged_by: criteria.Criteria | None = None) -> dict[str, Any]:
    """One trial as plain data: all that a script wants, without the samples."""
    record, result = row.record, row.record.result
    ok = result if isinstance(result, Ok) else None
    return {
        "study": record.study,
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
        **(ok.model_dump(include={*_FIGURES}, exclude=_LEFT_OUT) if ok else _FIGURES),
        "peak_mib": ok and ok.memory.peak_mib,
        "flags": ok and ok.flags(),
        "roofline": ok and ok.roofline and _roofline(ok.roofline),
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
    """Nested keys become columns joined with dots; a part that a trial lacks is left empty. Texts
    of a list are joined with semicolons."""
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
    parser = verb_parser(
        "compare",
        description="Print the trials of studies: what differs, outcome, latency, kernels. Several "
        "studies share a table where machine, software and workload are equal; their best stand "
        "side by side below.",
    )
    add_studies(parser)
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
    cli.run(main)
