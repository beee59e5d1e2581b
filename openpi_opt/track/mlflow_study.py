"""What a study is in MLflow: its run's figures and description, and the page that shows it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from openpi_opt.criteria import Criteria
from openpi_opt.track import table
from openpi_opt.track.journal import Header, Journal, Record
from openpi_opt.track.mlflow_content import device
from openpi_opt.track.report import Group, best_line, mean_ms

STUDY_TAG = "openpi_opt.study"
ROLE_TAG = "openpi_opt.role"
VIEW_TAG = "mlflow.sharedViewState."
# The columns of a study's page, before the knobs that differ.
_METRICS = ("latency/mean_ms", "vs_baseline", "latency/std_ms", "latency/p99_ms", "kernels/total")
_ROWS = 20


def metrics(trials: Sequence[Record], found: Sequence[Group]) -> dict[str, float]:
    """Figures of the parent run: of the best trial of the newest context, counts of outcomes,
    trials, and minutes from the first start to the last record."""
    outcomes = Counter(record.result.outcome for record in trials)
    shown = {"trials": float(len(trials))}
    shown |= {f"outcome/{name}": float(number) for name, number in outcomes.items()}
    best = next((group.best for group in reversed(found) if group.best), None)
    if best is not None and best.ok is not None:
        latency = best.ok.latency
        shown |= {"latency/mean_ms": latency.mean_ms, "latency/std_ms": latency.std_ms}
        shown |= {"latency/p99_ms": latency.p99_ms}
        shown |= {"vs_baseline": best.vs_baseline} if best.vs_baseline is not None else {}
    begun = [_time(record.result.started_at) for record in trials]
    ended = [_time(record.created_at) for record in trials]
    passed = (max(ended) - min(begun)).total_seconds() / 60 if trials else 0.0
    shown["minutes"] = max(0.0, passed)
    return {key: value for key, value in shown.items() if math.isfinite(value)}


def params(journal: Journal, criteria: Criteria) -> dict[str, str]:
    """What was asked for, and where it ran."""
    found = {"objectives": ",".join(criteria.objectives)}
    if journal.header is not None:
        found["command"] = " ".join(journal.header.command)
    if records := journal.records():
        result = records[-1].result
        config = result.config
        found |= {
            "model": str(config.get("model", {}).get("name", "")),
            "workload": str(config.get("workload", {}).get("name", "")),
            "machine": device(config, result.fingerprint),
            "git": str(result.fingerprint.get("git") or "unknown"),
        }
    return found


def description(study: str, store: str, header: Header | None, found: Sequence[Group]) -> str:
    """The parent run's text, in Markdown: the best, the tables, and what to do next."""
    lines = []
    for group in found:
        shown = table.trials(group, sorted(group.rows, key=mean_ms)[:_ROWS])
        lines += [f"### {group.title}", "", f"**{best_line(group)}**", "", *table.markdown(shown)]
        left = len(group.rows) - len(shown.body)
        lines += ["", f"{left} more are in the runs below and in `compare`." if left else "", ""]
    lines += [
        "### Next",
        "",
        "```",
        f"python -m openpi_opt.compare {study} --store {store}",
        f"python -m openpi_opt.promote {study} --store {store} --name NAME",
        "```",
    ]
    if header is not None and header.command:
        lines += ["", f"Begun by `{' '.join(header.command)}`."]
    return "\n".join(lines)


def view_key(study: str) -> str:
    """Name of a study's page among those of its experiment."""
    return hashlib.sha256(study.encode()).hexdigest()[:16]


def view(study: str, found: Sequence[Group]) -> str:
    """The state of the page of a study, as MLflow keeps one that was shared. The study's trials
    without confirmations, sorted by latency; columns for the latency, its spread, kernels, outcome
    and the knobs that differ."""
    knobs = dict.fromkeys(key for group in found for row in group.rows for key in row.differs)
    columns = [
        *(f"metrics.`{name}`" for name in _METRICS),
        "tags.`openpi_opt.outcome`",
        *(f"params.`{key}`" for key in knobs),
    ]
    state: dict[str, Any] = {
        "searchFilter": (
            f"tags.`{STUDY_TAG}` = '{study}' AND tags.`{ROLE_TAG}` != 'confirm' "
            f"AND tags.`{ROLE_TAG}` != 'confirmation' AND tags.`{ROLE_TAG}` != 'study'"
        ),
        "orderByKey": "metrics.`latency/mean_ms`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "viewMaximized": True,
        "runListHidden": False,
    }
    return json.dumps(state)


def page(experiment_id: str, study: str) -> str:
    """The address of a study's page below that of its server."""
    return (
        f"#/experiments/{experiment_id}/runs"
        f"?workflowType=machine_learning&viewStateShareKey={view_key(study)}"
    )


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
