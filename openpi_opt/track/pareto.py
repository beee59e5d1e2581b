"""The Pareto sets of a study beside its tables: as data, as plots, and as marks for MLflow.

All of it is made from the journal and the study's criteria, and made again whenever either changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpi_opt.criteria import Criteria
from openpi_opt.figures import OBJECTIVES
from openpi_opt.result import write_atomic
from openpi_opt.track import plots
from openpi_opt.track.journal import Record
from openpi_opt.track.report import Group, Row, groups, mean_ms

STEM = "pareto"
ENDINGS = ("json", *plots.FORMATS)
PARETO_TAG = "openpi_opt.pareto"
OVER_TAG = "openpi_opt.over_limit"
OBJECTIVES_TAG = "openpi_opt.objectives"
LIMITS_TAG = "openpi_opt.limits"


def files(study_dir: Path) -> list[Path]:
    """What `write` left."""
    return sorted(path for end in ENDINGS for path in study_dir.glob(f"{STEM}*.{end}"))


def write(study_dir: Path, records: Sequence[Record]) -> list[Path]:
    """Write `pareto.json`, and a plot of each context that has an ok trial; returns the files.

    Nothing is written of a study with one objective. Needs matplotlib only if there is a plot.

    Raises:
        OSError: the folder cannot be written.
        UserError: the study's criteria are damaged.
    """
    criteria = Criteria.load(study_dir)
    if criteria is None or not criteria.several:
        return []
    found = groups(records, criteria=criteria)
    written = [study_dir / f"{STEM}.json"]
    text = json.dumps(document(study_dir.name, found, criteria), indent=1, allow_nan=False)
    write_atomic(written[0], text + "\n")
    for group in found:
        if drawn := panels(group):
            context = group.rows[0].record.result.context_hash
            stem = STEM if len(found) == 1 else f"{STEM}-{context}"
            title = f"{study_dir.name}: {group.title}"
            written += plots.save(plots.scatter(title, drawn), study_dir, stem)
    return written


def document(study: str, found: Sequence[Group], criteria: Criteria) -> dict[str, Any]:
    """The Pareto sets as plain data, the fastest first."""
    return {
        "study": study,
        "objectives": list(criteria.objectives),
        "limits": dict(criteria.limits),
        "contexts": [
            {
                "title": group.title,
                "context_hash": group.rows[0].record.result.context_hash,
                "pareto": [
                    {
                        "number": row.record.number,
                        "uid": row.record.uid,
                        "role": row.record.role,
                        "differs": row.differs,
                        "config_hash": row.record.result.config_hash,
                        "objectives": objectives(row, criteria),
                    }
                    for row in sorted(group.rows, key=mean_ms)
                    if row.pareto
                ],
            }
            for group in found
        ],
    }


def objectives(row: Row, criteria: Criteria) -> dict[str, float | None]:
    """The trial's figure of each objective, None where it has none."""
    return {
        name: OBJECTIVES[name].value(row.ok) if row.ok else None for name in criteria.objectives
    }


def marks(records: Sequence[Record], criteria: Criteria) -> dict[str, dict[str, str]]:
    """By uid, the tags that a trial has now: of the Pareto set, or over a limit and by what."""
    found: dict[str, dict[str, str]] = {}
    for group in groups(records, criteria=criteria):
        for row in group.rows:
            if row.pareto:
                found[row.record.uid] = {PARETO_TAG: "true"}
            if row.over:
                found[row.record.uid] = {
                    OVER_TAG: "; ".join(f"{name}: {text}" for name, text in row.over.items())
                }
    return found


def panels(group: Group) -> list[plots.Panel]:
    """Latency against each other objective; the groups of trials are told apart by marker."""
    criteria = group.criteria
    first, *others = criteria.figures()
    kinds: dict[str, list[Row]] = {
        "Pareto set": [row for row in group.rows if row.pareto],
        "dominated": [row for row in group.rows if row.ok and not row.pareto and not row.over],
        "over a limit": [row for row in group.rows if row.over],
    }
    found = []
    for figure in others:
        series = []
        for label, members in kinds.items():
            points = []
            for row in members:
                assert row.ok is not None
                x, y = first.value(row.ok), figure.value(row.ok)
                if x is not None and y is not None:
                    points.append(plots.Point(x, y, text=str(row.record.number)))
            if points:
                series.append(plots.Series(label, points))
        if series:
            found.append(
                plots.Panel(
                    title=f"{first.name} and {figure.name}",
                    series=series,
                    x_label=first.title,
                    y_label=figure.title,
                )
            )
    return found
