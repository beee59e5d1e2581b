"""What each minute of a study brought: the best so far against minutes, as data and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from openpi_opt.config import is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.result import Ok, write_atomic
from openpi_opt.track import plots
from openpi_opt.track.journal import Record

STEM = "best_so_far"
ENDINGS = ("json", *plots.FORMATS)
# Nothing is measured for so long only where no sweep runs: the pause between two of a study.
_PAUSE_MINUTES = 20.0


class Step(NamedTuple):
    """A trial that became the best: minutes of sweeping until then, its latency, number, end."""

    minutes: float
    best_ms: float
    number: int
    at: str


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
        mean_ms = _mean_ms(record, criteria)
        if mean_ms < (found[-1].best_ms if found else math.inf):
            found.append(Step(minutes, mean_ms, record.number, record.created_at))
    if found and found[-1].number != records[-1].number:
        found.append(Step(minutes, found[-1].best_ms, records[-1].number, records[-1].created_at))
    return found


def files(study_dir: Path) -> list[Path]:
    """What `write` left."""
    return sorted(path for end in ENDINGS for path in study_dir.glob(f"{STEM}.{end}"))


def write(study_dir: Path, records: Sequence[Record]) -> list[Path]:
    """Write `best_so_far.json` and its plot into the study's folder; returns the files.

    Nothing is written of a study of several objectives, workloads or of fewer than two steps.

    Raises:
        OSError: the folder cannot be written.
        UserError: the study's criteria are damaged.
    """
    criteria = Criteria.load(study_dir) or Criteria()
    found = steps(records, criteria)
    contexts = {record.result.context_hash for record in records if record.role != "confirm"}
    if criteria.several or len(contexts) > 1 or len(found) < 2:
        return []
    path = study_dir / f"{STEM}.json"
    write_atomic(path, json.dumps([step._asdict() for step in found], indent=1) + "\n")
    points = [plots.Point(step.minutes, step.best_ms, text=str(step.number)) for step in found]
    panel = plots.Panel(
        title="number of the trial beside its point",
        series=[plots.Series("best so far", points)],
        x_label="minutes of the sweep",
        y_label="latency of a call, ms",
        log_y=found[0].best_ms > 3 * found[-1].best_ms,
    )
    figure = plots.stairs(f"{study_dir.name}: best so far", [panel])
    return [path, *plots.save(figure, study_dir, STEM)]


def _mean_ms(record: Record, criteria: Criteria) -> float:
    """The mean of a trial that may be the best; infinite for others."""
    result = record.result
    if not isinstance(result, Ok) or record.role == "confirm" or criteria.over(result):
        return math.inf
    if is_lossy(result.config) and not criteria.allow_lossy:
        return math.inf
    return result.latency.mean_ms
