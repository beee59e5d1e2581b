"""What a sweep leaves beside its journal, as data and as plots: the best so far against minutes, or
the Pareto sets of several objectives.

All of it is made from the journal and the study's criteria, and made again whenever either changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from openpi_opt.config import is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.figures import OBJECTIVES
from openpi_opt.result import Ok, write_atomic
from openpi_opt.track import plots
from openpi_opt.track.journal import Record
from openpi_opt.track.report import Group, Row, groups, mean_ms

PARETO_TAG = "openpi_opt.pareto"
OVER_TAG = "openpi_opt.over_limit"
OBJECTIVES_TAG = "openpi_opt.objectives"
LIMITS_TAG = "openpi_opt.limits"
_CURVE, _PARETO = "best_so_far", "pareto"
# Nothing is measured for so long only where no sweep runs: the pause between two of a study.
_PAUSE_MINUTES = 20.0


class Step(NamedTuple):
    """A trial that became the best: minutes of sweeping until then, its latency, number, end."""

    minutes: float
    best_ms: float
    number: int
    at: str


def files(study_dir: Path) -> list[Path]:
    """What `write` left."""
    found = [path for stem in (_CURVE, _PARETO) for path in study_dir.glob(f"{stem}*.*")]
    return sorted(path for path in found if path.suffix[1:] in ("json", *plots.FORMATS))


def write(study_dir: Path, records: Sequence[Record]) -> list[Path]:
    """Write `pareto.json` and a plot of each context for a study of several objectives; for one of
    one objective and one context `best_so_far.json` and its plot, once there are two steps. Returns
    the files.

    Raises:
        OSError: the folder cannot be written.
        UserError: the study's criteria are damaged.
    """
    criteria = Criteria.load(study_dir) or Criteria()
    if criteria.several:
        found = groups(records, criteria=criteria)
        document: Any = _pareto_document(study_dir.name, found, criteria)
        written = [_write_json(study_dir / f"{_PARETO}.json", document)]
        for group in found:
            if panels := pareto_panels(group, lambda row: str(row.record.number)):
                context = group.rows[0].record.result.context_hash
                stem = _PARETO if len(found) == 1 else f"{_PARETO}-{context}"
                figure = plots.draw("scatter", f"{study_dir.name}: {group.title}", panels)
                written += plots.save(figure, study_dir, stem)
        return written
    best = steps(records, criteria)
    contexts = {record.result.context_hash for record in records if record.role != "confirm"}
    if len(contexts) > 1 or len(best) < 2:
        return []
    path = _write_json(study_dir / f"{_CURVE}.json", [step._asdict() for step in best])
    panel = curve_panel(best, lambda step: str(step.number))
    figure = plots.draw("stairs", f"{study_dir.name}: best so far", [panel])
    return [path, *plots.save(figure, study_dir, _CURVE)]


def steps(records: Sequence[Record], criteria: Criteria) -> list[Step]:
    """The trials that became the best of their study, and at last the newest trial. The clock
    begins when the first trial does; pauses between sweeps are left out. What is above a limit,
    lossy or measured to confirm another is never the best. Baselines compete."""
    found: list[Step] = []
    minutes, before = 0.0, None
    for record in records:
        now = datetime.fromisoformat(record.created_at)
        before = before or datetime.fromisoformat(record.result.started_at)
        passed = max(0.0, (now - before).total_seconds() / 60)
        minutes, before = minutes + (passed if passed < _PAUSE_MINUTES else 0.0), now
        mean_ms = _competing_ms(record, criteria)
        if mean_ms < (found[-1].best_ms if found else math.inf):
            found.append(Step(minutes, mean_ms, record.number, record.created_at))
    if found and found[-1].number != records[-1].number:
        found.append(Step(minutes, found[-1].best_ms, records[-1].number, records[-1].created_at))
    return found


def curve_panel(found: Sequence[Step], text: Callable[[Step], str]) -> plots.Panel:
    """The best so far against minutes, `text` beside each step."""
    points = [plots.Point(step.minutes, step.best_ms, text=text(step)) for step in found]
    return plots.Panel(
        title="number of the trial beside its point",
        series=[plots.Series("best so far", points)],
        x_label="minutes of the sweep",
        y_label="latency of the best so far, ms",
        log_y=found[0].best_ms > 3 * found[-1].best_ms,
    )


def pareto_panels(group: Group, text: Callable[[Row], str]) -> list[plots.Panel]:
    """Latency against each other objective, the trials told apart by what they are; `text` says
    what stands beside a trial."""
    first, *others = group.criteria.figures()
    kinds = {
        "Pareto set": [row for row in group.rows if row.pareto],
        "dominated": [row for row in group.rows if row.ok and not row.pareto and not row.over],
        "over a limit": [row for row in group.rows if row.over],
    }
    panels = []
    for other in others:
        points = {
            label: [
                plots.Point(x, y, text=text(row))
                for row in members
                if row.ok
                if (x := first.value(row.ok)) is not None
                if (y := other.value(row.ok)) is not None
            ]
            for label, members in kinds.items()
        }
        series = [plots.Series(label, found) for label, found in points.items() if found]
        title = f"{first.name} and {other.name}"
        if series:
            panels.append(plots.Panel(title, series, first.title, other.title))
    return panels


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
                over = "; ".join(f"{name}: {text}" for name, text in row.over.items())
                found[row.record.uid] = {OVER_TAG: over}
    return found


def _pareto_document(study: str, found: Sequence[Group], criteria: Criteria) -> dict[str, Any]:
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


def _write_json(path: Path, document: Any) -> Path:
    write_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def _competing_ms(record: Record, criteria: Criteria) -> float:
    """The mean of a trial that may be the best; infinite for others."""
    result = record.result
    if not isinstance(result, Ok) or record.role == "confirm" or criteria.over(result):
        return math.inf
    if is_lossy(result.config) and not criteria.allow_lossy:
        return math.inf
    return result.latency.mean_ms
